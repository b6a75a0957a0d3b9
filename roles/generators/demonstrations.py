"""Answers that came with the prompts, as completions: what a warm-up imitates.

Nobody is sampled. Some of the answers can be given a mistake, the way real data has them, so that
a model that imitated them still has something to improve.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from roles.protocols import Policy
from store.errors import UserError
from store.records import Call, Completion, Prompt

_CLASSES = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


class Demonstrations:
    """n completions of each prompt: its reference answer, or what `column` holds.

    mistakes: the share of answers in which one character is wrong, drawn for each of the n apart.
    """

    def __init__(
        self,
        n: Annotated[int, Field(ge=1)] = 1,
        mistakes: Annotated[float, Field(ge=0, le=1)] = 0.0,
        column: str | None = None,
    ) -> None:
        self.n = n
        self.mistakes = mistakes
        self.column = column

    def generate(
        self, prompts: Sequence[Prompt], policy: Policy, call: Call
    ) -> list[list[Completion]]:
        """Each prompt's n completions; none where the longest would not fit behind it."""
        written = []
        for prompt in prompts:
            answers = [self._answer(prompt, index, call) for index in range(self.n)]
            completions = [policy.write(answer) for answer in answers]
            longest = max(len(each.token_ids) for each in completions)
            written.append(completions if longest <= policy.room(prompt) else [])
        return written

    def _answer(self, prompt: Prompt, index: int, call: Call) -> str:
        found = prompt.reference if self.column is None else prompt.columns.get(self.column)
        if not isinstance(found, str):
            place = "reference answer" if self.column is None else f"text in column {self.column!r}"
            raise UserError(
                f"the prompt {prompt.messages[-1].content[:60]!r} has no {place} to demonstrate; "
                "give it one, or name the column that has (option 'column')"
            )
        chance = random.Random(call.seed_for(prompt.digest, "mistake", index))
        return with_mistake(found, chance) if chance.random() < self.mistakes else found


def with_mistake(text: str, chance: random.Random) -> str:
    """`text` with one digit or letter (ASCII) replaced by another of its class.

    Text that has neither is rotated by a part of its length, which leaves "--" what it was.
    """
    places = [
        (n, kind) for n, character in enumerate(text) for kind in _CLASSES if character in kind
    ]
    if not places:
        by = chance.randrange(1, len(text)) if len(text) > 1 else 0
        return text[by:] + text[:by]
    at, kind = chance.choice(places)
    return text[:at] + chance.choice(kind.replace(text[at], "")) + text[at + 1 :]
