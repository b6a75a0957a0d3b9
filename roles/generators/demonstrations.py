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

from roles.proposers.recorded import wanted_answers
from roles.protocols import Policy
from store.errors import UserError
from store.records import Call, Completion, Prompt

_CLASSES = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


class Demonstrations:
    """n completions of each prompt: what `column` holds, or its reference answer, or without one
    the answers to imitate that came with the data, in turn.

    mistakes: the share of answers in which one character is wrong, drawn for each of the n apart.
    cut: the least and the most characters that are written of an answer, drawn for each: people who
    stop early. None is all of it.
    preamble: a line that people write before an answer; `preambles`: how often at most, drawn for
    each as well.
    """

    def __init__(
        self,
        n: Annotated[int, Field(ge=1)] = 1,
        mistakes: Annotated[float, Field(ge=0, le=1)] = 0.0,
        column: str | None = None,
        cut: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None,
        preamble: str = "",
        preambles: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        if bool(preamble) != (preambles > 0):
            raise UserError(
                "demonstrations need a preamble and how many preambles there are at most, or "
                f"neither; found {preamble!r} and {preambles}"
            )
        if cut is not None and cut[0] > cut[1]:
            raise UserError(f"demonstrations cut from the least to the most; found {list(cut)}")
        self.n, self.cut, self.most_tokens = n, cut, 0
        self.preamble, self.preambles = preamble, preambles
        self.mistakes = mistakes
        self.column = column

    def generate(
        self, prompts: Sequence[Prompt], policy: Policy, call: Call
    ) -> list[list[Completion]]:
        """Each prompt's n completions; none where the longest would not fit behind it."""
        return [written(self._answers(prompt, call), prompt, policy) for prompt in prompts]

    def _answers(self, prompt: Prompt, call: Call) -> list[str]:
        right = self._right(prompt)
        answers = [right[index % len(right)] for index in range(self.n)]
        for index, answer in enumerate(answers):
            chance = random.Random(call.seed_for(prompt.digest, "mistake", index))
            if chance.random() < self.mistakes:
                answers[index] = with_mistake(answer, chance)
            if self.cut is not None:
                answers[index] = answers[index][: chance.randint(*self.cut)]
            if self.preambles:
                before = f"{self.preamble}\n" * chance.randint(0, self.preambles)
                answers[index] = before + answers[index]
        return answers

    def _right(self, prompt: Prompt) -> list[str]:
        if self.column is not None:
            found = prompt.columns.get(self.column)
            right = [found] if isinstance(found, str) else []
            lacks = f"text in column {self.column!r}"
        else:
            right = wanted_answers(prompt) if prompt.reference is None else [prompt.reference]
            lacks = "reference or recorded answer"
        if not right:
            raise nothing_to_write(
                prompt, lacks, "give it one, or name the column that has (option 'column')"
            )
        return right


def written(answers: Sequence[str], prompt: Prompt, policy: Policy) -> list[Completion]:
    """`answers` as completions of the prompt; none where the longest would not fit behind it."""
    completions = [policy.write(answer) for answer in answers]
    longest = max(len(each.token_ids) for each in completions)
    return completions if longest <= policy.room(prompt) else []


def nothing_to_write(prompt: Prompt, lacks: str, right: str) -> UserError:
    return UserError(f"the prompt {prompt.messages[-1].content[:60]!r} has no {lacks}; {right}")


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
