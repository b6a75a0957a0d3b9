"""Every candidate a demonstration, mistakes and all, or every one that is good enough.

A warm-up learns from all that there is: nothing is looked at then but that there is a candidate,
so no judge is needed. With `min_score` it is rejection sampling, as in RFT, arXiv 2308.01825.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Annotated

from pydantic import Field

from roles.filters.eligibility import Reason, select_each
from roles.protocols import History
from store.records import Call, Candidate, Example, Group, Judgement, Selection


class Everything:
    """min_score: the least score of a candidate to imitate. None: whatever it is, even none.
    most: at most so many a prompt, drawn. None is all.
    different: of candidates that say the same, only the first."""

    rule = "everything"
    gives = "demonstration"

    def __init__(
        self,
        min_score: float | None = None,
        most: Annotated[int, Field(ge=1)] | None = None,
        different: bool = False,
    ) -> None:
        self.min_score, self.most, self.different = min_score, most, different

    def select(
        self,
        groups: Sequence[Group],
        judgements: Sequence[Judgement],
        history: History,
        call: Call,
    ) -> Selection:
        return select_each(groups, judgements, lambda group, judged: self._of(group, judged, call))

    def _of(
        self, group: Group, judged: Mapping[int, Judgement], call: Call
    ) -> list[Example] | Reason:
        if not group.candidates:
            return "too few candidates"
        kept = [one for one in group.candidates if self._is_good(judged.get(one.id))]
        if not kept:
            scored = any(one.id in judged for one in group.candidates)
            return "all wrong" if scored else "unjudged"
        if self.different:
            first: dict[str, Candidate] = {}
            for one in kept:
                first.setdefault(one.text, one)
            kept = list(first.values())
        if self.most is not None and len(kept) > self.most:
            chance = Random(call.seed_for(group.prompt.digest))
            drawn: list[Candidate] = chance.sample(kept, self.most)
            kept = sorted(drawn, key=lambda one: one.index)
        return [
            Example(
                kind="demonstration",
                asked_id=group.asked_id,
                prompt=group.prompt,
                chosen=candidate,
                rule=self.rule,
                chosen_judgement_id=judged[candidate.id].id if candidate.id in judged else None,
            )
            for candidate in kept
        ]

    def _is_good(self, judgement: Judgement | None) -> bool:
        if self.min_score is None:
            return True
        score = None if judgement is None else judgement.score
        return score is not None and score >= self.min_score
