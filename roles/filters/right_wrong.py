"""Pairs of a right candidate and a wrong one, several a prompt.

Source: Iterative Reasoning Preference Optimization, arXiv 2404.19733, section 2: pairs of a
winning and a losing generation of the same prompt, up to a number of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from random import Random

from roles.filters.eligibility import (
    Eligibility,
    Reason,
    Scored,
    check_min_margin,
    pair,
    select_each,
)
from roles.protocols import History
from store.errors import UserError
from store.records import Call, Example, Group, Judgement, Selection


class RightWrong:
    """pairs: at most so many a prompt. threshold: the least score that is right."""

    rule = "right_wrong"
    gives = "pair"

    def __init__(
        self,
        pairs: int = 1,
        threshold: float = 1.0,
        min_margin: float = 0.0,
        min_tokens: int = 0,
        max_tokens: int | None = None,
        truncated: bool = False,
        min_logprob: float | None = None,
    ):
        if pairs < 1:
            raise UserError(f"right_wrong makes at least 1 pair a prompt; found pairs = {pairs}")
        self.pairs = pairs
        self.threshold = threshold
        self.min_margin = check_min_margin(min_margin)
        self.eligibility = Eligibility(min_tokens, max_tokens, truncated, min_logprob)

    def select(
        self,
        groups: Sequence[Group],
        judgements: Sequence[Judgement],
        history: History,
        call: Call,
    ) -> Selection:
        return select_each(
            groups, judgements, lambda group, judged: self._pairs(group, judged, call)
        )

    def _pairs(
        self, group: Group, judged: Mapping[int, Judgement], call: Call
    ) -> list[Example] | Reason:
        sorted_ = self.eligibility.sort(group, judged)
        right = [one for one in sorted_.kept if one.score >= self.threshold]
        wrong = [one for one in sorted_.kept if one.score < self.threshold]
        if not right or not wrong:
            # With one candidate left, what took the others says more than what that one is. But
            # a duplicate is as right or wrong as what it repeats.
            others = set(sorted_.lost) - {"duplicate"}
            if not sorted_.kept or (len(sorted_.kept) == 1 and others):
                return sorted_.main_loss
            if len(group.candidates) < 2:
                return "too few candidates"
            return "all right" if right else "all wrong"
        chance = Random(call.seed_for(group.prompt.digest))
        chance.shuffle(right)
        chance.shuffle(wrong)
        found = [
            pair(group, chosen, rejected, self.rule)
            for chosen, rejected in _spread(right, wrong)
            if chosen.score - rejected.score >= self.min_margin
        ]
        return found[: self.pairs] or "margin"


def _spread(right: Sequence[Scored], wrong: Sequence[Scored]) -> Iterator[tuple[Scored, Scored]]:
    """Every pair once, along the diagonals, so that the first few share as little as they can."""
    diagonal = math.lcm(len(right), len(wrong))
    for step in range(len(right) * len(wrong)):
        yield right[step % len(right)], wrong[(step + step // diagonal) % len(wrong)]
