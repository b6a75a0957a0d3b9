"""Problems that the policy made up in the last round, to be solved in this one."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from roles import plugins
from roles.arithmetic import value_of
from roles.protocols import History, Policy, Proposer
from store.records import Call, Message, Prompt, Split


class Conjectures:
    """proposer: a table of the proposer that gives the rest, and all prompts of the first round, of
    gate, test and anchor.
    track: whose answers of the last round are problems.
    min_score: what its judge must have given a problem.
    share: of the prompts, how many are such problems at most.

    A problem's right answer is what its own text comes to (`roles.arithmetic`).
    """

    def __init__(
        self,
        proposer: dict[str, Any],
        track: str = "conjectures",
        min_score: float = 1.0,
        share: Annotated[float, Field(gt=0, le=1)] = 0.5,
    ) -> None:
        self.proposer: Proposer = plugins.inner("proposer", proposer, "conjectures' proposer")
        self.track, self.min_score, self.share = track, min_score, share

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        """`count` prompts, problems of the policy's own first."""
        own = self._own(round(count * self.share), history, call) if split == "train" else []
        left = count - len(own)
        if left:
            given = self.proposer.propose(left, split, history, policy, call)
            known = {each.digest for each in own}
            own += [each for each in given if each.digest not in known]
        return own

    def _own(self, most: int, history: History, call: Call) -> list[Prompt]:
        if call.round < 2:
            return []
        held_out, asked = history.held_out(), history.asked()
        made: dict[str, Prompt] = {}
        for group, said in history.judged(replace(call, round=call.round - 1, track=self.track)):
            good = {
                each.candidate_id
                for each in said
                if each.score is not None and each.score >= self.min_score
            }
            for one in group.candidates:
                value = value_of(one.text) if one.id in good else None
                if value is None:
                    continue
                prompt = Prompt(
                    messages=(Message(role="user", content=one.text.strip()),),
                    reference=value,
                    task="conjecture",
                    origin="proposed",
                    parent_prompt_id=group.prompt.id,
                    parent_candidate_id=one.id,
                )
                if prompt.question_digest not in held_out and prompt.digest not in asked:
                    made.setdefault(prompt.digest, prompt)
        return list(made.values())[:most]
