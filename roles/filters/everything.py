"""Every candidate a demonstration, mistakes and all: what a warm-up learns from.

Nothing is looked at but that there is a candidate, so no judge is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from roles.filters.eligibility import by_candidate, drop
from roles.protocols import History
from store.records import Call, Example, Group, Judgement, Selection


class Everything:
    rule = "everything"
    gives = "demonstration"

    def select(
        self,
        groups: Sequence[Group],
        judgements: Sequence[Judgement],
        history: History,
        call: Call,
    ) -> Selection:
        judged = by_candidate(judgements)
        examples = [
            Example(
                kind="demonstration",
                asked_id=group.asked_id,
                prompt=group.prompt,
                chosen=candidate,
                rule=self.rule,
                chosen_judgement_id=judged[candidate.id].id if candidate.id in judged else None,
            )
            for group in groups
            for candidate in group.candidates
        ]
        empty = [drop(group, "too few candidates") for group in groups if not group.candidates]
        return Selection(examples=tuple(examples), dropped=tuple(empty))
