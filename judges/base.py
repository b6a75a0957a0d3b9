"""The two judges that most others are: one scores an answer, the other compares two.

A subclass writes one method about one question; asking it of every candidate, waiting for many
at once and keeping what was said as verdicts is done here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from judges.asking import ask_all, timed
from judges.comparing import ComparingJudge, Shown
from roles.protocols import Policy
from store.records import (
    ALONE,
    Call,
    Candidate,
    Completion,
    Group,
    Judgement,
    Prompt,
    Status,
    Verdict,
)


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """A score with the words it came in. Without one, `status` and `reason` say why."""

    score: float | None
    raw: str
    status: Status | None = None
    """None is "ok" with a score and "abstained" without."""
    reason: str | None = None
    tokens: int | None = None
    cost: float | None = None


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Which of two answers is better, with the words it came in."""

    choice: Literal[0, 1] | None
    raw: str
    status: Status | None = None
    reason: str | None = None
    tokens: int | None = None
    cost: float | None = None


class PointwiseJudge(ABC):
    """A judge that scores each answer by itself."""

    version: str = "1"
    concurrency: int = 32
    """How many calls of an async `score` are under way at once."""

    @abstractmethod
    def score(
        self, prompt: Prompt, completion: Completion, policy: Policy | None, call: Call
    ) -> float | Opinion | Awaitable[float | Opinion | None] | None:
        """A finite number, or an Opinion to say more; None abstains. May be async.

        The verdict's raw text is the Opinion's, or else the repr of what was returned.
        """

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        asked = [(group.prompt, one) for group in groups for one in group.candidates]
        answers = ask_all(
            [timed(self.score, prompt, one, policy, call) for prompt, one in asked],
            limit=self.concurrency,
            call=call,
        )
        return [
            self._concluded(one, returned, seconds)
            for (_, one), (returned, seconds) in zip(asked, answers, strict=True)
        ]

    def _concluded(self, candidate: Candidate, returned: Any, seconds: float) -> Judgement:
        plain = not isinstance(returned, Opinion)
        opinion: Opinion = Opinion(score=returned, raw=repr(returned)) if plain else returned
        score = _finite(self, opinion.score)
        status: Status = opinion.status or ("abstained" if score is None else "ok")
        reason = opinion.reason
        if status == "abstained" and reason is None:
            reason = "the judge gave no score"
        verdict = Verdict(
            candidate_id=candidate.id,
            raw=opinion.raw,
            status=status,
            value=score,
            seconds=seconds,
            tokens=opinion.tokens,
            cost=opinion.cost,
        )
        return Judgement(
            candidate_id=candidate.id,
            score=score,
            status=status,
            reason=reason,
            verdicts=(verdict,),
        )


class PairwiseJudge(ComparingJudge):
    """A judge that compares two answers; a candidate's score is the share of them it won.

    Every two candidates of a group are shown in both orders. Only an answer that is preferred in
    both has won: what changes with the order says something about the judge, not the answers.
    A verdict belongs to the candidate that was shown first.

    A class attribute `scoring = "bradley_terry"` makes the score a log-strength instead, and
    `comparisons = 4` a tournament in which each candidate meets four others at most.
    """

    version: str = "1"
    concurrency: int = 32

    @abstractmethod
    def prefer(
        self,
        prompt: Prompt,
        first: Completion,
        second: Completion,
        policy: Policy | None,
        call: Call,
    ) -> int | Preference | Awaitable[int | Preference | None] | None:
        """0 when the first is better, 1 when the second is, None for neither. May be async."""

    def compare(self, shown: Sequence[Shown], policy: Policy | None, call: Call) -> list[Verdict]:
        answers = ask_all(
            [
                timed(self.prefer, prompt, first, second, policy, call)
                for prompt, first, second in shown
            ],
            limit=self.concurrency,
            call=call,
        )
        return [
            self._heard(first, second, returned, seconds)
            for (_, first, second), (returned, seconds) in zip(shown, answers, strict=True)
        ]

    def _heard(self, first: Candidate, second: Candidate, returned: Any, seconds: float) -> Verdict:
        plain = not isinstance(returned, Preference)
        preference: Preference = (
            Preference(choice=returned, raw=repr(returned)) if plain else returned
        )
        choice = preference.choice
        if choice is not None and (isinstance(choice, bool) or choice not in (0, 1)):
            raise ValueError(
                f"{type(self).__name__}.prefer returned {choice!r}; "
                "it returns 0 (the first), 1 (the second) or None"
            )
        return Verdict(
            candidate_id=first.id,
            other_candidate_id=second.id,
            order=0,
            raw=preference.raw,
            status=preference.status or ("abstained" if choice is None else "ok"),
            value=None if choice is None else float(choice == 0),
            seconds=seconds,
            tokens=preference.tokens,
            cost=preference.cost,
        )


def _finite(judge: object, score: Any) -> float | None:
    name = f"{type(judge).__name__}.score"
    if score is None:
        return None
    if not isinstance(score, Real):
        raise TypeError(f"{name} returned {score!r}; it returns a number, an Opinion or None")
    if not math.isfinite(score):
        raise ValueError(f"{name} returned {score!r}; a score is a finite number")
    return float(score)
