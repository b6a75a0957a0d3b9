"""Pairs from all that was ever answered to a prompt: good enough, and unlike each other.

Source: "DIVE: Diversified Iterative Self-Improvement" (arXiv 2501.00747): sample pool expansion,
in which candidates are kept over rounds, and data selection, which balances quality and diversity.
Its abstract does not say how: here quality is a threshold, and within it the answers are chosen
that are least like each other, by ROUGE-L or by the characters that they have in common in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Annotated, Literal

from pydantic import Field

from roles.filters.eligibility import (
    Eligibility,
    Reason,
    Scored,
    by_candidate,
    pair,
    select_each,
)
from roles.proposers.similarity import common_words, rouge_l
from roles.protocols import History
from store.records import Call, Earlier, Example, Group, Judgement, Selection


class Diverse:
    """pairs: at most so many a prompt. threshold: the least score of a good answer.
    pool: from how many rounds candidates are taken, this one included; None is all. What earlier
    rounds answered is known where prompts are asked again, as with the proposer `repeated`.
    by: whether two answers are compared by their `words` or, where they have one, by `letters`.

    Of the good answers, and apart from them of the others, as many as there are pairs are taken one
    by one, each the one that is least like the nearest of those taken before.
    """

    rule = "diverse"
    gives = "pair"

    def __init__(
        self,
        pairs: Annotated[int, Field(ge=1)] = 4,
        threshold: float = 1.0,
        pool: Annotated[int, Field(ge=1)] | None = None,
        by: Literal["words", "letters"] = "words",
        min_tokens: int = 0,
        max_tokens: int | None = None,
        truncated: bool = False,
    ) -> None:
        self.pairs, self.threshold, self.pool = pairs, threshold, pool
        self.like = rouge_l if by == "words" else _like_spelled
        self.eligibility = Eligibility(min_tokens, max_tokens, truncated)

    def select(
        self,
        groups: Sequence[Group],
        judgements: Sequence[Judgement],
        history: History,
        call: Call,
    ) -> Selection:
        earlier = history.earlier(call) if self.pool != 1 else {}
        pooled = [self._pooled(group, earlier.get(group.asked_id, ()), call) for group in groups]
        known = [*judgements, *(each.judgement for own in earlier.values() for each in own)]
        found = by_candidate(each for each in known if each is not None)

        def pairs(group: Group, judged: Mapping[int, Judgement]) -> list[Example] | Reason:
            return self._pairs(group, found, call)

        return select_each(pooled, (), pairs)

    def _pooled(self, group: Group, earlier: Sequence[Earlier], call: Call) -> Group:
        """The group with what earlier rounds answered, the newest first: of two that say the same
        the later one stays."""
        oldest = 0 if self.pool is None else call.round - self.pool
        kept = [each.candidate for each in reversed(earlier) if each.round > oldest]
        return Group(
            asked_id=group.asked_id,
            prompt=group.prompt,
            candidates=(*group.candidates, *kept),
        )

    def _pairs(
        self, group: Group, judged: Mapping[int, Judgement], call: Call
    ) -> list[Example] | Reason:
        kept = self.eligibility.sort(group, judged)
        good = [one for one in kept.kept if one.score >= self.threshold]
        others = [one for one in kept.kept if one.score < self.threshold]
        if not good or not others:
            if len(kept.kept) < 2 and set(kept.lost) - {"duplicate"}:
                return kept.main_loss
            return "all right" if good else "all wrong"
        chance = Random(call.seed_for(group.prompt.digest))
        chosen, rejected = (self._spread(side, chance) for side in (good, others))
        # One side may have fewer than there are pairs: it then stands in several.
        met = list(dict.fromkeys(_meet(chosen, rejected)))
        return [pair(group, *each, self.rule) for each in met[: self.pairs]]

    def _spread(self, side: Sequence[Scored], chance: Random) -> list[Scored]:
        """Up to `pairs` of them, the first by chance, then always the one least like the rest."""
        left = list(side)
        chance.shuffle(left)
        taken = [left.pop()]
        while left and len(taken) < self.pairs:
            nearest = [
                max(self.like(one.candidate.text, each.candidate.text) for each in taken)
                for one in left
            ]
            taken.append(left.pop(nearest.index(min(nearest))))
        return taken


def _meet(chosen: Sequence[Scored], rejected: Sequence[Scored]) -> list[tuple[Scored, Scored]]:
    """Every one with every other, first those of one place."""
    longest = max(len(chosen), len(rejected))
    return [
        (chosen[(place + shift) % len(chosen)], rejected[place % len(rejected)])
        for shift in range(len(chosen))
        for place in range(longest)
    ]


def _like_spelled(one: str, other: str) -> float:
    """As ROUGE-L, of characters."""
    total = len(one) + len(other)
    return 2 * common_words(list(one), list(other)) / total if total else 0.0
