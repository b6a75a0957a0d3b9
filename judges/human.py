"""A person as the judge: what an answer is worth is typed, and until it is, the loop waits.

`judge` asks nobody, because a run is not to stand still before a screen that nobody watches: it
says that it waits. `ask` asks, one prompt at a time.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from judges.harmless import harmless
from roles.protocols import Policy
from store.errors import UserError, Waiting
from store.records import ALONE, Call, Candidate, Group, Judgement, Verdict

KEYS = "words after a score are its reason; s: no score, b: back, q: quit"
_TYPED = re.compile(r"([+-]?[0-9]+(?:\.[0-9]*)?|[sS])(?:\s+(.*))?", re.DOTALL)


class Human:
    """A person scores the answers: the run waits, `loop review` asks, and `loop start` goes on.

    low, high: what a score lies within; fractions: whether it may be no whole number.
    instructions: what the person is told before the first answer.
    """

    version = "1"
    asks_person: ClassVar[bool] = True

    def __init__(
        self,
        low: int = 0,
        high: int = 5,
        fractions: bool = False,
        instructions: str | None = None,
    ) -> None:
        if not low < high:
            raise UserError(f"the lowest score, {low}, is not below the highest, {high}")
        self.low = low
        self.high = high
        self.fractions = fractions
        self.instructions = instructions

    @property
    def scale(self) -> str:
        return f"{'' if self.fractions else 'whole '}numbers from {self.low} to {self.high}"

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        """Raises Waiting: there is no judgement before `ask` was answered."""
        answers = sum(len(group.candidates) for group in groups)
        if answers:
            raise Waiting(f"{answers:,} answers wait for a person's scores")
        return []

    def ask(
        self,
        group: Group,
        read: Callable[[str], str] = input,
        write: Callable[[str], object] = print,
        *,
        seed: int = 0,
        again: bool = True,
    ) -> list[Judgement]:
        """What the person who reads `write` and answers `read` gives each answer of a prompt.

        seed: decides in which order the answers are shown.
        again: ask anew for what is no score. Off, it raises UserError: of answers that stand in a
        file, one too many would move all that follow.
        Raises Waiting when the person quits or there is nothing more to read.
        """
        shown = in_order(group, seed)
        for line in self._page(group, shown):
            write(line)
        given: list[Judgement] = []
        while len(given) < len(shown):
            began = time.monotonic()
            try:
                typed = read(self._question(len(given) + 1, len(shown))).strip()
            except EOFError:
                typed = "q"
            if typed.lower() == "q":
                raise Waiting(f"{len(shown):,} answers still wait for a person's scores")
            if typed.lower() == "b":
                if given:
                    given.pop()
                else:
                    write("this is the first answer of its prompt; those before it are kept")
                continue
            try:
                seconds = time.monotonic() - began
                given.append(self.concluded(shown[len(given)].id, typed, seconds))
            except UserError as error:
                if not again:
                    raise
                write(str(error))
        return given

    def concluded(self, candidate_id: int, typed: str, seconds: float | None = None) -> Judgement:
        """What a person typed about an answer. Raises UserError where it is no score."""
        found = _TYPED.fullmatch(typed.strip())
        value = None if found is None or found[1] in ("s", "S") else float(found[1])
        if found is None or (value is not None and not self._takes(value)):
            raise UserError(
                f"{harmless(typed[:60])!r} is no score: right are {self.scale}, or s for none, "
                "and after it a blank and the reason, if any"
            )
        words = found[2] or None
        if value is None:
            words = words or "the person gave no score"
        verdict = Verdict(
            candidate_id=candidate_id,
            raw=typed.strip(),
            status="abstained" if value is None else "ok",
            value=value,
            seconds=seconds,
        )
        return Judgement(
            candidate_id=candidate_id,
            score=value,
            status=verdict.status,
            reason=words,
            verdicts=(verdict,),
        )

    def _question(self, number: int, of: int) -> str:
        return f"score of answer {number} of {of} ({self.low} to {self.high}): "

    def _takes(self, value: float) -> bool:
        return self.low <= value <= self.high and (self.fractions or value == int(value))

    def _page(self, group: Group, shown: Sequence[Candidate]) -> Iterator[str]:
        """Each line of what a model wrote begins with a bar, so that none looks like ours."""
        yield ""
        for message in group.prompt.messages:
            yield f"{message.role}:"
            yield from _barred(message.content)
        for number, candidate in enumerate(shown, 1):
            yield f"answer {number} of {len(shown)}:"
            yield from _barred(candidate.text)


def in_order(group: Group, seed: int) -> list[Candidate]:
    """The answers in an order that says nothing of where they come from."""
    shown = list(group.candidates)
    random.Random(seed).shuffle(shown)
    return shown


def _barred(text: str) -> Iterator[str]:
    for line in harmless(text).split("\n"):
        yield f"  | {line}".rstrip()
