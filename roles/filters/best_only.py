"""One demonstration a prompt: the best candidate, to imitate.

Source: rejection sampling as in RAFT, arXiv 2304.06767, algorithm 1: of each prompt's candidates
the one with the highest score is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from roles.filters.eligibility import (
    Eligibility,
    Reason,
    best_first,
    select_each,
)
from roles.protocols import History
from store.records import Call, Example, Group, Judgement, Selection


class BestOnly:
    """min_score: a best candidate below it gives nothing. None takes it whatever its score."""

    rule = "best_only"
    gives = "demonstration"

    def __init__(
        self,
        min_score: float | None = None,
        min_tokens: int = 0,
        max_tokens: int | None = None,
        truncated: bool = False,
        min_logprob: float | None = None,
    ):
        self.min_score = min_score
        self.eligibility = Eligibility(min_tokens, max_tokens, truncated, min_logprob)

    def select(
        self,
        groups: Sequence[Group],
        judgements: Sequence[Judgement],
        history: History,
        call: Call,
    ) -> Selection:
        return select_each(groups, judgements, self._best)

    def _best(self, group: Group, judged: Mapping[int, Judgement]) -> list[Example] | Reason:
        sorted_ = self.eligibility.sort(group, judged)
        if not sorted_.kept:
            return sorted_.main_loss
        best = best_first(sorted_.kept)[0]
        if self.min_score is not None and best.score < self.min_score:
            return "all wrong"
        return [
            Example(
                kind="demonstration",
                asked_id=group.asked_id,
                prompt=group.prompt,
                chosen=best.candidate,
                rule=self.rule,
                chosen_judgement_id=best.judgement_id,
            )
        ]
