"""The same prompts in every round: those of another proposer's first."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from roles import plugins
from roles.protocols import History, Policy, Proposer
from store.records import Call, Prompt, Split


class Repeated:
    """proposer: a table of the proposer that they come from, as in
    {use = "reasoning_gym", tasks = [...]}.
    rounds: after so many rounds the proposer is asked for others. None is never.
    """

    def __init__(
        self, proposer: dict[str, Any], rounds: Annotated[int, Field(ge=1)] | None = None
    ) -> None:
        self.proposer: Proposer = plugins.inner("proposer", proposer, "repeated's proposer")
        self.rounds = rounds

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        """What the proposer gave in the first round of this set of rounds."""
        first = call.round
        if split == "train" and call.round > 0:
            first = 1 if self.rounds is None else call.round - (call.round - 1) % self.rounds
        if first < call.round:
            return history.asked_in(replace(call, round=first))[:count]
        return self.proposer.propose(count, split, history, policy, call)
