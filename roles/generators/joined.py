"""The completions of several generators, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from roles import plugins
from roles.protocols import Generator, Policy
from store.records import Call, Completion, Prompt


class Joined:
    """parts: tables of generators, as in [{ use = "demonstrations" }, { use = "sampler", n = 8 }].

    A prompt for which one of them has nothing, because it is too long, gets nothing at all.
    """

    def __init__(self, parts: Annotated[list[Any], Field(min_length=1)]) -> None:
        self.parts: list[Generator] = [
            plugins.inner("generator", part, f"part {place} of joined")
            for place, part in enumerate(parts)
        ]

    @property
    def n(self) -> int | None:
        """Of all completions. None where a part does not say."""
        return self._all("n")

    @property
    def most_tokens(self) -> int | None:
        return self._all("most_tokens")

    def _all(self, name: str) -> int | None:
        said = [getattr(part, name, None) for part in self.parts]
        return None if None in said else sum(each or 0 for each in said)

    def generate(
        self, prompts: Sequence[Prompt], policy: Policy, call: Call
    ) -> list[list[Completion]]:
        """Each prompt's completions, part by part."""
        made = [
            # Two parts that sample in the same way would otherwise draw the same.
            part.generate(prompts, policy, replace(call, stage=f"{call.stage} {place}"))
            for place, part in enumerate(self.parts)
        ]
        return [
            [one for own in parts for one in own] if all(parts) else []
            for parts in zip(*made, strict=True)
        ]
