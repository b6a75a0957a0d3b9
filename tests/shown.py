"""Groups to judge, and a model that answers by what it is shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from roles.policy.embedded import build
from roles.policy.transformers import TransformersEngine, TransformersPolicy
from scripted import ScriptedPolicy
from store.records import (
    Call,
    Candidate,
    Checkpoint,
    Completion,
    Group,
    Message,
    Prompt,
    Sampling,
)

CALL = Call(seed=1, stage="judge")
SPELL = "Spell this word backward (example: sun -> nus): akee"
_FENCE = re.compile(r"([=~#+])\1{2,}( [0-9a-f]{8})?")


def ask(text: str, **rest: Any) -> Prompt:
    return Prompt(messages=(Message(role="user", content=text),), **rest)


def group_of(*texts: str, prompt: Prompt | None = None, first_id: int = 1) -> Group:
    return Group(
        asked_id=first_id,
        prompt=prompt or ask(SPELL, reference="eeka"),
        candidates=tuple(
            Candidate(id=first_id + n, asked_id=first_id, index=n, text=text, token_ids=(n,))
            for n, text in enumerate(texts)
        ),
    )


def parts(shown: str) -> list[str]:
    """What stands between the fences of a judge's question, in order.

    The last line that can be a fence is one: a judge's own words stand after it.
    """
    fence = [line for line in shown.splitlines() if _FENCE.fullmatch(line)][-1]
    return [each[1:-1] for each in shown.split(fence)[1::2]]


class Scripted(ScriptedPolicy):
    """Says what `answer` makes of the parts that it is shown, and keeps what it was asked."""

    def __init__(self, answer: Callable[..., str], finish: Any = "stop") -> None:
        self.answer, self.finish = answer, finish
        self.asked: list[str] = []
        self.calls = 0
        self.seeds: list[int] = []

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        self.calls += 1
        return [
            [self._said(prompt.messages[-1].content, seed) for seed in own]
            for prompt, own in zip(prompts, seeds, strict=True)
        ]

    def _said(self, shown: str, seed: int) -> Completion:
        self.asked.append(shown)
        self.seeds.append(seed)
        text = self.answer(*parts(shown))
        return Completion(
            text=text, token_ids=tuple(text.encode()), finish_reason=self.finish, seed=seed
        )


def embedded(folder: Path) -> TransformersPolicy:
    """A real model that knows nothing yet."""
    build(folder, seed=0)
    return TransformersEngine(device="cpu").open(
        Checkpoint(
            model="policy",
            path=folder,
            digest=folder.name,
            tokenizer_digest="t",
            template_digest="c",
            bytes=1,
            id=1,
        )
    )
