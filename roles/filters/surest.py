"""The pairs of a round that are surest to be the right way round.

Source: "Self-Evolutionary Large Language Models through Uncertainty-Enhanced Preference
Optimization" (arXiv 2409.11212): pairs by a reward are noisy, and Monte Carlo dropout says of which
pairs the model that made them is sure. Its abstract does not say how pairs are chosen by it; here
it is the mean of the draws' differences over their standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, pstdev
from typing import Annotated, Literal

from pydantic import Field

from roles.filters.eligibility import (
    Eligibility,
    Reason,
    best_first,
    by_candidate,
    drop,
    pair,
    select_each,
)
from roles.protocols import History
from store.errors import UserError
from store.records import Call, Example, Group, Judgement, Selection


class Surest:
    """keep: the share of a round's pairs that are kept, those it is surest of.
    by: `votes` goes by the judge's votes on the two answers, vote by vote (of the judge
    `reward_model` with votes, say); `margin` by the difference of their scores.
    weigh: a pair's weight is its rank among those kept, from above 0 to 2; otherwise 1.

    A pair is a prompt's best candidate against its worst.
    """

    rule = "surest"
    gives = "pair"
    reads_verdicts = True

    def __init__(
        self,
        keep: Annotated[float, Field(gt=0, le=1)] = 0.5,
        by: Literal["votes", "margin"] = "votes",
        weigh: bool = False,
        min_tokens: int = 0,
        max_tokens: int | None = None,
        truncated: bool = False,
    ) -> None:
        self.keep, self.by, self.weigh = keep, by, weigh
        self.eligibility = Eligibility(min_tokens, max_tokens, truncated)

    def select(
        self,
        groups: Sequence[Group],
        judgements: Sequence[Judgement],
        history: History,
        call: Call,
    ) -> Selection:
        judged = by_candidate(judgements)
        found = select_each(groups, judgements, self._pair)
        # Of equals, whichever the prompt's digest puts first: their order in a round says nothing.
        ranked = sorted(
            found.examples,
            key=lambda each: (-self._sureness(each, judged), each.prompt.digest),
        )
        kept = ranked[: math.ceil(self.keep * len(ranked))]
        places = {each.asked_id: place for place, each in enumerate(kept)}
        left = {each.asked_id for each in ranked} - places.keys()
        unsure = [drop(group, "unsure") for group in groups if group.asked_id in left]
        examples = tuple(
            self._weighed(each, places[each.asked_id], len(kept))
            for each in found.examples
            if each.asked_id in places
        )
        return Selection(examples=examples, dropped=(*found.dropped, *unsure))

    def _pair(self, group: Group, judged: Mapping[int, Judgement]) -> list[Example] | Reason:
        kept = self.eligibility.sort(group, judged)
        if len(kept.kept) < 2:
            return kept.main_loss
        ranked = best_first(kept.kept)
        if ranked[0].score <= ranked[-1].score:
            return "tie"
        return [pair(group, ranked[0], ranked[-1], self.rule)]

    def _sureness(self, example: Example, judged: Mapping[int, Judgement]) -> float:
        if self.by == "margin":
            return example.margin or 0.0
        assert example.rejected is not None
        chosen, rejected = (_votes(judged[side.id]) for side in (example.chosen, example.rejected))
        differences = [chosen[vote] - rejected[vote] for vote in chosen.keys() & rejected.keys()]
        if len(differences) < 2:
            raise UserError(
                "the filter 'surest' goes by a judge's votes, and there are "
                f"{len(differences)} on both answers of a pair; give the judge several "
                "(judge.votes of 'reward_model'), or set by = \"margin\""
            )
        mean, spread = fmean(differences), pstdev(differences)
        return mean / spread if spread else math.copysign(math.inf, mean)

    def _weighed(self, example: Example, place: int, count: int) -> Example:
        if not self.weigh:
            return example
        return replace(example, weight=2 * (count - place) / (count + 1))


def _votes(judgement: Judgement) -> dict[int, float]:
    return {said.vote: said.value for said in judgement.verdicts if said.value is not None}
