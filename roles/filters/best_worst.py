"""One pair a prompt: the best candidate against the worst.

Source: Self-Rewarding Language Models, arXiv 2401.10020, section 2.3: the highest and the lowest
score make the pair, and a prompt whose two are equal gives none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

from roles.filters.eligibility import (
    Eligibility,
    Reason,
    best_first,
    check_min_margin,
    pair,
    select_each,
)
from roles.protocols import History
from store.records import Call, Example, Group, Judgement, Selection


class BestWorst:
    """min_margin: the least difference of scores that makes a pair. A tie never does.
    window: how much of the way from the worst score to the best counts as being as good as the
    best, where then the shortest is chosen, and as bad as the worst, where the longest is rejected.
    Source: the length control of Meta-Rewarding, arXiv 2407.19594, whose rho it is.
    """

    rule = "best_worst"
    gives = "pair"

    def __init__(
        self,
        min_margin: float = 0.0,
        min_tokens: int = 0,
        max_tokens: int | None = None,
        truncated: bool = False,
        min_logprob: float | None = None,
        window: Annotated[float, Field(ge=0, lt=0.5)] = 0.0,
    ):
        self.min_margin = check_min_margin(min_margin)
        self.window = window
        self.eligibility = Eligibility(min_tokens, max_tokens, truncated, min_logprob)

    def select(
        self,
        groups: Sequence[Group],
        judgements: Sequence[Judgement],
        history: History,
        call: Call,
    ) -> Selection:
        return select_each(groups, judgements, self._pair)

    def _pair(self, group: Group, judged: Mapping[int, Judgement]) -> list[Example] | Reason:
        sorted_ = self.eligibility.sort(group, judged)
        if len(sorted_.kept) < 2:
            return sorted_.main_loss
        ranked = best_first(sorted_.kept)
        best, worst = ranked[0], ranked[-1]
        if best.score <= worst.score:
            return "tie"
        if best.score - worst.score < self.min_margin:
            return "margin"
        if self.window:
            near = self.window * (best.score - worst.score)
            best = min(
                (one for one in ranked if one.score >= best.score - near),
                key=lambda one: len(one.candidate.token_ids),
            )
            worst = max(
                (one for one in ranked if one.score <= worst.score + near),
                key=lambda one: len(one.candidate.token_ids),
            )
        return [pair(group, best, worst, self.rule)]
