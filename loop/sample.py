"""Answers of a checkpoint beside those of what the run began from, to a prompt that is typed.

Both sides are given the same seeds, so that what differs is what was learned.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any, cast

from rich.console import Console

from loop import meant
from loop.report import Table
from loop.run import is_run
from loop.screen import block, conversation, line
from loop.settings import Config
from roles import plugins
from roles.protocols import Engine
from store.database import Store
from store.errors import UserError
from store.records import Call, Checkpoint, Completion, Message, Prompt, Sampling

LABELS = {"best": "the best checkpoint", "base": "what the rounds began from"}
LABELS["given"] = "the model as it was given"


@dataclass(frozen=True)
class Wish:
    """What `loop sample` was told; None is as the run evaluates."""

    text: str
    checkpoint: str = "best"
    model: str | None = None
    n: int = 1
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int = 0


def said(first: str, second: str | None, runs: Path) -> tuple[Path | None, str]:
    """(run, prompt) of `[RUN] PROMPT`. The prompt "-" is what stdin says.

    Raises UserError for a run without a prompt, and for a prompt of nothing.
    """
    if second is None and any(is_run(place / first) for place in (Path(), runs)):
        raise UserError(f'no prompt: `loop sample {quote(first)} "PROMPT"` asks that run')
    text = first if second is None else second
    if text == "-":
        text = sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise UserError('the prompt is empty; right is `loop sample "PROMPT"`')
    return (None if second is None else Path(first)), text


def sample(store: Store, wish: Wish) -> Table:
    """{run, path, model, prompt, sampling, seed, checkpoints [{which, checkpoint, round, path,
    status, gone, answers [{text, tokens, finish_reason, logprob, seed}]}]}: the wanted checkpoint
    last, before it "base", if it is another. `gone`: why that one has no answers, or None.
    Raises UserError.
    """
    config = meant.config_of(store)
    model = meant.model(config, wish.model)
    wanted = meant.checkpoint(store, model, wish.checkpoint)
    base = store.beginning(model)
    asked = {"base": base} if base.id != wanted.id else {}
    asked[wish.checkpoint] = wanted
    role, rounds = config.models[model].engine, meant.rounds_of(store)
    engine = cast(Engine, plugins.load("engine", role.use, role.options))
    sampling, prompt = _sampling(config, wish), _prompt(wish.text)
    return {
        "run": store.root.name,
        "path": str(store.root),
        "model": model,
        "prompt": wish.text,
        "sampling": asdict(sampling),
        "seed": wish.seed,
        "checkpoints": [
            {
                "which": which,
                "checkpoint": each.id,
                "round": rounds[cast(int, each.id)],
                "path": str(each.path),
                "status": each.status,
                "gone": meant.gone(each),
                "answers": _answers(engine, each, prompt, sampling, wish),
            }
            for which, each in asked.items()
        ],
    }


def _prompt(text: str) -> Prompt:
    return Prompt(messages=(Message(role="user", content=text),))


def _sampling(config: Config, wish: Wish) -> Sampling:
    told: dict[str, Any] = {"temperature": wish.temperature, "max_tokens": wish.max_tokens}
    changes = {key: value for key, value in told.items() if value is not None}
    return replace(config.evaluate.sampling(greedy=False), **changes)


def _answers(
    engine: Engine, checkpoint: Checkpoint, prompt: Prompt, sampling: Sampling, wish: Wish
) -> list[Table]:
    """One model is in memory, and gone afterwards."""
    if meant.gone(checkpoint) is not None:
        return []
    call = Call(seed=wish.seed, stage="sample")
    seeds = [call.seed_for(prompt.digest, index) for index in range(wish.n)]
    policy = engine.open(checkpoint)
    try:
        if policy.room(prompt) < 1:
            raise UserError(
                f"the prompt has {len(policy.prompt_ids(prompt)):,} tokens, which leaves no room "
                f"for an answer in the context of {checkpoint.path}; ask something shorter"
            )
        [answers] = policy.sample([prompt], sampling=sampling, seeds=[seeds])
        return [_answer(each) for each in answers]
    finally:
        policy.close()


def _answer(found: Completion) -> Table:
    shown = ("text", "finish_reason", "logprob", "seed")
    return {key: getattr(found, key) for key in shown} | {"tokens": len(found.token_ids)}


def view(console: Console, found: Table) -> None:
    """A block a checkpoint, with each answer, how it ended and how long it is."""
    settings = found["sampling"]
    how = f"temperature {settings['temperature']:g}, at most {settings['max_tokens']:,} tokens"
    line(console, f"{found['path']}, {how}, seed {found['seed']}")
    conversation(console, [{"role": "user", "content": found["prompt"]}], None)
    for each in found["checkpoints"]:
        line(console)
        label = LABELS.get(each["which"], f"the checkpoint of round {each['round']}")
        line(console, f"{label} (round {each['round']}, {each['status']}): {each['path']}")
        if each["gone"] is not None:
            line(console, f"  no answers: {each['gone']}")
        for number, answer in enumerate(each["answers"], 1):
            unit = "token" if answer["tokens"] == 1 else "tokens"
            ended = "cut off" if answer["finish_reason"] == "length" else answer["finish_reason"]
            block(console, f"{number}, {answer['tokens']} {unit}, {ended}", answer["text"])
