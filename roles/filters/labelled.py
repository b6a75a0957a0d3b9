"""Candidates labelled wanted or unwanted, each by its own score.

Source: KTO, arXiv 2402.01306, section 4: a signal of whether one output is desirable is enough,
and the two labels need not be of one prompt nor equally many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from roles.filters.eligibility import (
    Eligibility,
    Reason,
    Scored,
    select_each,
)
from roles.protocols import History
from store.errors import UserError
from store.records import Call, Example, Group, Judgement, Selection


class Labelled:
    """wanted: the least score of a wanted candidate. unwanted: the greatest of an unwanted one.
    What lies between is not used; a prompt that has nothing else is dropped for its margin.
    per_label: at most so many of each label a prompt. None is all."""

    rule = "labelled"
    gives = "labelled"

    def __init__(
        self,
        wanted: float = 1.0,
        unwanted: float = 0.0,
        per_label: int | None = None,
        min_tokens: int = 0,
        max_tokens: int | None = None,
        truncated: bool = False,
    ):
        if not unwanted < wanted:
            raise UserError(
                f"labelled needs its score unwanted to lie below wanted; found {unwanted} and "
                f"{wanted}"
            )
        if per_label is not None and per_label < 1:
            raise UserError(
                f"labelled takes at least 1 candidate of each label a prompt; found per_label = "
                f"{per_label}"
            )
        self.wanted = wanted
        self.unwanted = unwanted
        self.per_label = per_label
        self.eligibility = Eligibility(min_tokens, max_tokens, truncated)

    def select(
        self,
        groups: Sequence[Group],
        judgements: Sequence[Judgement],
        history: History,
        call: Call,
    ) -> Selection:
        return select_each(
            groups, judgements, lambda group, judged: self._labelled(group, judged, call)
        )

    def _labelled(
        self, group: Group, judged: Mapping[int, Judgement], call: Call
    ) -> list[Example] | Reason:
        sorted_ = self.eligibility.sort(group, judged)
        if not sorted_.kept:
            return sorted_.main_loss
        wanted = [one for one in sorted_.kept if one.score >= self.wanted]
        unwanted = [one for one in sorted_.kept if one.score <= self.unwanted]
        chance = Random(call.seed_for(group.prompt.digest))
        drawn = [(each, True) for each in self._draw(wanted, chance)]
        drawn += [(each, False) for each in self._draw(unwanted, chance)]
        drawn.sort(key=lambda one: one[0].candidate.index)
        return [_example(group, each, label, self.rule) for each, label in drawn] or "margin"

    def _draw(self, of_label: list[Scored], chance: Random) -> list[Scored]:
        if self.per_label is None or len(of_label) <= self.per_label:
            return of_label
        return chance.sample(of_label, self.per_label)


def _example(group: Group, scored: Scored, label: bool, rule: str) -> Example:
    return Example(
        kind="labelled",
        asked_id=group.asked_id,
        prompt=group.prompt,
        chosen=scored.candidate,
        label=label,
        rule=rule,
        chosen_judgement_id=scored.judgement_id,
    )
