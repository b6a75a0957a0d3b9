"""Score an answer by how it was made: what its generator did is known, and nobody is asked."""

from __future__ import annotations

from judges.base import Opinion, PointwiseJudge
from roles.protocols import Policy
from store.errors import UserError
from store.records import Call, Completion, Prompt


class MadeAs(PointwiseJudge):
    """A judge that gives each kind of candidate that a generator makes its own score.

    scores: what the generator calls them -> score, as in { good = 1, bad = 0 }. A candidate that
    is of none of these kinds gets no score; `plain` stands for one that has no name.
    """

    def __init__(self, scores: dict[str, float]):
        if not scores:
            raise UserError("made_as needs scores, as in scores = { good = 1, bad = 0 }")
        self.scores = scores

    def score(
        self, prompt: Prompt, completion: Completion, policy: Policy | None, call: Call
    ) -> Opinion:
        kind = completion.made_as or "plain"
        if kind not in self.scores:
            reason = f"made as {kind}, which has no score"
            return Opinion(score=None, raw=kind, reason=reason)
        return Opinion(score=self.scores[kind], raw=kind)
