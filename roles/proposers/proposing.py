"""Prompts that ask for a prompt, with one that fits as the answer, to warm up a proposer.

Each is what `self_instruct` asks: examples, and the request for one more.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

from pydantic import Field

from roles.proposers.self_instruct import SelfInstruct, last_asked
from roles.protocols import History, Policy
from store.errors import UserError
from store.records import Call, Prompt, Split


class Proposing:
    """path, proposer, shots, prompt, template_path: as `self_instruct` has them.

    What is to be learnt is a prompt of the same source that is not among the examples.
    """

    def __init__(
        self,
        path: Path | None = None,
        proposer: dict[str, Any] | None = None,
        shots: Annotated[int, Field(ge=1)] = 8,
        prompt: str = "self_instruct",
        template_path: Path | None = None,
    ):
        self._asking = SelfInstruct(
            path=path, proposer=proposer, shots=shots, prompt=prompt, template_path=template_path
        )

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        """One prompt for each of `count` of the source; fewer when some came out the same."""
        source = self._asking.source.propose(count, split, history, policy, call)
        shots = self._asking.shots
        if len(source) <= shots:
            raise UserError(
                f"proposing shows {shots} examples before each prompt, and its source gave "
                f"{len(source)} prompts; ask for more, or set a lower `shots`"
            )
        held_out, made = history.held_out(), {}
        for number, wanted in enumerate(source):
            chance = Random(call.seed_for("proposing", number))
            others = chance.sample(range(len(source) - 1), shots)
            shown = [source[other + (other >= number)] for other in others]
            asked = replace(
                self._asking.ask(shown), reference=last_asked(wanted), split=split, task="proposing"
            )
            made[asked.digest] = asked
        return [asked for asked in made.values() if asked.question_digest not in held_out]
