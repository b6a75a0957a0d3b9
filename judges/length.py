"""Score an answer by its length: a taste that many judges have, here by itself and on purpose.

As a member of a panel it makes a judge dearer or cheaper by the token.
"""

from __future__ import annotations

import math

from judges.base import Opinion, PointwiseJudge
from roles.protocols import Policy
from store.errors import UserError
from store.records import Call, Completion, Prompt


class Length(PointwiseJudge):
    """A judge that gives an answer so much for each of its tokens, its end of turn included.

    per_token: below 0, shorter is better. most: no answer gets more than this many tokens' worth.
    """

    def __init__(self, per_token: float = -0.01, most: int | None = None):
        if not math.isfinite(per_token):
            raise UserError(f"length's per_token is a number; found {per_token}")
        self.per_token, self.most = per_token, most

    def score(
        self, prompt: Prompt, completion: Completion, policy: Policy | None, call: Call
    ) -> Opinion:
        tokens = len(completion.token_ids)
        counted = tokens if self.most is None else min(tokens, self.most)
        return Opinion(score=self.per_token * counted, raw=f"{tokens} tokens")
