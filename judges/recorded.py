"""Score an answer by what the data says of it: a track of people's own preferences or labels."""

from __future__ import annotations

from collections.abc import Iterator
from math import fsum
from typing import Any

from judges.base import Opinion, PointwiseJudge
from judges.numbers import read_number
from roles.proposers.recorded import recorded_rows
from roles.protocols import Policy
from store.errors import UserError
from store.records import Call, Completion, Prompt


class Recorded(PointwiseJudge):
    """Chosen is 1, rejected 0; a completion is what its label says, without one 1.

    An answer in several rows gets their mean; one that the data does not have gets no score.
    scores: take the numbers of the columns score_chosen, score_rejected or score_completion.
    """

    def __init__(self, scores: bool = False):
        self.scores = scores

    def score(
        self, prompt: Prompt, completion: Completion, policy: Policy | None, call: Call
    ) -> Opinion:
        said = list(self._said(prompt, completion.text))
        if not said:
            return Opinion(
                score=None, raw="not recorded", reason="the data does not have this answer"
            )
        names, values = zip(*said, strict=True)
        words = ", ".join(names)
        reason = None
        if len(set(values)) > 1:
            reason = f"the data has it {len(values)} times and disagrees: the mean of {words}"
        return Opinion(score=fsum(values) / len(values), raw=words, reason=reason)

    def _said(self, prompt: Prompt, text: str) -> Iterator[tuple[str, float]]:
        """What each row that has the answer says of it: in words, and as a number."""
        for row in recorded_rows(prompt):
            sides = ("chosen", "rejected") if "chosen" in row else ("completion",)
            for side in sides:
                if row[side] != text:
                    continue
                if self.scores:
                    value = _number(prompt, row, f"score_{side}")
                    yield f"{side} {value:g}", value
                elif side == "completion":
                    wanted = row.get("label") is not False
                    yield f"labelled {wanted}".lower() if "label" in row else side, float(wanted)
                else:
                    yield side, float(side == "chosen")


def _number(prompt: Prompt, row: dict[str, Any], column: str) -> float:
    value = row.get(column)
    # A table of texts, as CSV is, spells numbers.
    found = read_number(value) if isinstance(value, str) else value
    if found is None or isinstance(found, bool | list | dict):
        raise UserError(
            f"the judge 'recorded' with scores = true needs a number in column {column!r}, and a "
            f"row of the prompt {prompt.messages[-1].content[:60]!r} has {value!r}; "
            "give it one, or leave `scores` out"
        )
    return float(found)
