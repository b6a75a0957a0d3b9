"""Prompts that ask for a judgement of what the policy itself answered in the round before.

Their candidates are judgements, so a judge is trained by a track like any other: another judge says
which judgement is better.

Source: "Meta-Rewarding Language Models" (arXiv 2407.19594): judgements of the policy's own answers,
of those answers first whose judgements vary most.
"""

# No `from __future__ import annotations` here: see judges/model_judge.py.

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from judges.judging import QUESTION, Judging, known_by
from roles.protocols import History, Policy
from roles.template import conversation
from store.records import Call, Candidate, Group, Judgement, Prompt, Split


class Answered(Judging):
    """track: whose answers of the last round are judged, as `rubric` asks it, one a prompt: that
    whose judgement varied most over its votes. In the first round, and for any other split, answers
    are made up as the proposer `judging` makes them.
    proposer, prompt, prompt_path, nonce, mistakes, worst, low, high, judgement: as `judging` has
    them.

    The columns are those that the judge `meta` shows: the question, the answer, and what is known
    to be right, where that is known.
    """

    def __init__(
        self,
        proposer: dict[str, Any],
        track: str = "main",
        prompt: str | None = None,
        prompt_path: Path | None = None,
        nonce: bool = True,
        mistakes: float = 0.5,
        worst: int = 1,
        low: int = 0,
        high: int = 5,
        judgement: str | None = None,
    ) -> None:
        super().__init__(
            proposer,
            "rubric",
            prompt,
            prompt_path,
            nonce=nonce,
            mistakes=mistakes,
            worst=worst,
            low=low,
            high=high,
            judgement=judgement,
        )
        self.track = track

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        """Up to `count` prompts, those first whose answers' judgements vary most."""
        if split != "train" or call.round < 2:
            return super().propose(count, split, history, policy, call)
        judged = history.judged(replace(call, round=call.round - 1, track=self.track))
        picked = [(group, *found) for group, said in judged if (found := _unsettled(group, said))]
        picked.sort(key=lambda each: (-each[2], each[0].prompt.digest))
        held_out, made = history.held_out(), dict[str, Prompt]()
        for group, answer, _ in picked:
            prompt = self._about(group.prompt, answer)
            if prompt.question_digest not in held_out:
                made[prompt.digest] = prompt
        return list(made.values())[:count]

    def _about(self, question: Prompt, answer: Candidate) -> Prompt:
        columns: dict[str, Any] = {
            "question": conversation(question),
            "answer": answer.text,
            QUESTION: known_by(question),
        }
        if question.reference is not None:
            columns |= {
                "reference": question.reference,
                "score": self.score(answer.text, question.reference),
            }
        asked = self._asked([question], [answer.text])
        return replace(
            asked,
            origin="derived",
            split=question.split,
            columns=columns,
            parent_prompt_id=question.id,
            parent_candidate_id=answer.id,
        )


def _unsettled(group: Group, judgements: Sequence[Judgement]) -> tuple[Candidate, float] | None:
    """The answer whose judgement varied most, and by how much; None where none was judged."""
    by_id = {one.id: one for one in group.candidates}
    known = [each for each in judgements if each.score is not None]
    if not known:
        return None
    most = max(known, key=lambda each: (each.variance or 0.0, -each.candidate_id))
    return by_id[most.candidate_id], most.variance or 0.0
