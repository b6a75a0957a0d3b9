"""A reward model of a run's preference pairs: trained, measured on pairs it never saw, kept.

Written aside and renamed, like every checkpoint: under its name it is whole. A training that was
interrupted lies aside, and the same command goes on from there.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from judges.reward_model import RewardModel
from loop import meant, stopping
from loop.files import assigned
from loop.measure import RESAMPLES, bootstrap
from loop.report import Table
from loop.screen import line
from loop.settings import Config
from roles import plugins
from roles.trainers.reward import Reward
from store import checkpoints
from store.database import Store
from store.errors import UserError
from store.records import Call, Checkpoint, Example, Group, Training

TRAINER = "roles.trainers.reward:Reward"
HELD_OUT = 10
"""One prompt in so many is kept from training."""


@dataclass(frozen=True)
class Wish:
    """What `loop judges train` was told."""

    into: Path
    rounds: Sequence[int] = ()
    accepted: bool = False
    start: str | None = None
    sets: Sequence[str] = ()


def train(store: Store, wish: Wish, screen: Console) -> Table:
    """{run, path, into, start, rounds, pairs, prompts, held_out_pairs, held_out_prompts, steps,
    loss, seconds, accuracy, low, high, unscored, next}. Raises UserError, and leaves nothing then.

    accuracy: the share of held-out pairs whose chosen answer gets the higher score, ties half, as
    a mean over prompts with its 95 % interval.
    """
    into = wish.into.absolute()
    _refuse_place(into)
    config = meant.config_of(store)
    model = meant.model(config, None)
    options = {key: value for each in wish.sets for key, value in assigned(each).items()}
    trainer: Reward = plugins.load("trainer", TRAINER, options)
    start = _start(store, model, wish.start)
    rounds = _rounds(store, wish)
    learnt, held = split(_pairs(store, config, model, rounds), config.seed)
    began = time.monotonic()
    training = _trained(trainer, learnt, start, checkpoints.aside(into), config.seed, screen)
    seconds = time.monotonic() - began
    measured = agreement(checkpoints.aside(into), held, trainer, config.seed)
    checkpoints.publish(into)
    return {
        "run": store.root.name,
        "path": str(store.root),
        "into": str(wish.into),
        "start": str(start.path),
        "rounds": rounds,
        "pairs": len(learnt),
        "prompts": len(_prompts(learnt)),
        "held_out_pairs": len(held),
        "held_out_prompts": len(_prompts(held)),
        "steps": len(training.steps),
        "loss": training.steps[-1].loss,
        "seconds": seconds,
        **measured,
        "next": f"loop start --set judge.use=reward_model --set judge.path={quote(str(wish.into))}",
    }


def _refuse_place(into: Path) -> None:
    if into.exists() or into.is_symlink():
        raise UserError(f"{into} is there; name a new folder for the reward model")
    part = checkpoints.aside(into)
    if part.exists() and not (part / "saves").is_dir():
        raise UserError(f"{part} is there, which a reward model is written in; delete it")


def _start(store: Store, model: str, path: str | None) -> Checkpoint:
    """What the training begins from: told nothing, what the run's rounds began from."""
    if path is None:
        return meant.checkpoint(store, model, "base")
    found = checkpoints.measure(checkpoints.locate(path), model)
    if found.tokenizer_digest != store.beginning(model).tokenizer_digest:
        raise UserError(
            f"{path} has another tokenizer than the models of {store.root}, whose pairs are the "
            "token ids that they sampled; begin from a model of the same tokenizer"
        )
    return found


def _rounds(store: Store, wish: Wish) -> list[int]:
    """The numbers of the rounds whose pairs are meant."""
    chosen = [store.round(number).number for number in wish.rounds]
    rounds = chosen or [each.number for each in store.rounds()]
    if wish.accepted:
        found = store.query(
            "SELECT number FROM decision JOIN round ON round.id = decision.round_id "
            "WHERE round.run_id = :run AND decision.decision = 'accept'"
        )
        rounds = [number for number in rounds if number in {row["number"] for row in found}]
    return sorted(set(rounds))


def _pairs(store: Store, config: Config, model: str, rounds: Sequence[int]) -> list[Example]:
    found = [
        example
        for number in rounds
        for example in store.examples(
            store.round(number).id or 0,
            [name for name, track in config.tracks(number).items() if track.model == model],
        )
        if example.kind == "pair"
    ]
    if len(_prompts(found)) < 2:
        told = ", ".join(map(str, rounds)) or "none"
        raise UserError(
            f"{store.root} has preference pairs of {len(_prompts(found))} prompts in these rounds: "
            f"{told}; a reward model is trained on those of 2 or more, which a filter such as "
            "best_worst makes"
        )
    return found


def _prompts(pairs: Sequence[Example]) -> list[str]:
    return sorted({pair.prompt.digest for pair in pairs})


def split(pairs: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """(to learn from, held out): all pairs of a prompt are in one of the two."""
    prompts = _prompts(pairs)
    chance = random.Random(Call(seed=seed).seed_for("held out"))
    held = set(chance.sample(prompts, max(1, len(prompts) // HELD_OUT)))
    return (
        [pair for pair in pairs if pair.prompt.digest not in held],
        [pair for pair in pairs if pair.prompt.digest in held],
    )


def _trained(
    trainer: Reward,
    pairs: Sequence[Example],
    start: Checkpoint,
    part: Path,
    seed: int,
    screen: Console,
) -> Training:
    part.mkdir(parents=True, exist_ok=True)
    shown = (TextColumn("train"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Bars(*shown, console=screen, transient=True, disable=not screen.is_terminal)
    task = bars.add_task("train", total=None)
    with stopping.signals() as signals, bars:
        call = Call(
            seed=seed,
            stage="judges train",
            progress=lambda done, total: bars.update(task, completed=done, total=total),
            stopping=lambda: signals.asked,
        )
        try:
            training = trainer.train(pairs, start, start, part, call)
        except BaseException as error:
            if isinstance(error, UserError) or not (part / "saves").is_dir():
                checkpoints.remove(part)  # nothing in it could be gone on from
            raise
    if training.status == "diverged":
        checkpoints.remove(part)
        raise UserError(
            f"the training met a number that is not finite ({training.reason}); try a lower "
            f"learning_rate than {trainer.rate(0):g}"
        )
    return training


def agreement(path: Path, pairs: Sequence[Example], trainer: Reward, seed: int) -> Table:
    """{accuracy, low, high, unscored} of the reward model in a folder on these pairs."""
    judge = RewardModel(str(path), device=trainer.device, dtype="float32")
    answers = {
        one.id: Group(asked_id=pair.asked_id, prompt=pair.prompt, candidates=(one,))
        for pair in pairs
        for one in (pair.chosen, pair.rejected)
        if one is not None
    }
    said = judge.judge(list(answers.values()), None, Call(seed=seed))
    judge.close()
    scores = {each.candidate_id: each.score for each in said}
    right: dict[str, list[float]] = {}
    for pair in pairs:
        better, worse = scores[pair.chosen.id], scores[pair.rejected.id if pair.rejected else 0]
        if better is not None and worse is not None:
            won = 0.5 if better == worse else float(better > worse)
            right.setdefault(pair.prompt.digest, []).append(won)
    unscored = sum(score is None for score in scores.values())
    if not right:
        return {"accuracy": None, "low": None, "high": None, "unscored": unscored}
    mean, low, high = bootstrap([fmean(won) for won in right.values()], RESAMPLES, seed)
    return {"accuracy": mean, "low": low, "high": high, "unscored": unscored}


def view(console: Console, found: Table) -> None:
    """What it learnt from, how well it does on what it never saw, and how to judge with it."""
    rounds = ", ".join(map(str, found["rounds"]))
    line(
        console,
        f"{found['into']} learnt from {found['pairs']:,} pairs of {found['prompts']:,} prompts of "
        f"{found['run']} (rounds {rounds}), from {found['start']}: {found['steps']:,} steps, last "
        f"loss {found['loss']:.3f}, {found['seconds']:,.0f} s",
    )
    held = f"{found['held_out_pairs']:,} held-out pairs of {found['held_out_prompts']:,} prompts"
    if found["accuracy"] is None:
        line(console, f"none of the {held} fit its context")
    else:
        line(
            console,
            f"it scores the chosen answer higher in {found['accuracy']:.3f} "
            f"[{found['low']:.3f}, {found['high']:.3f}] of the {held}; 0.5 is a coin",
        )
    if found["unscored"]:
        line(console, f"{found['unscored']:,} held-out answers got no score")
    line(console, f"next: {found['next']}")
