"""A trainer that is as shipped but for the rounds in which something is planted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from roles.trainers.preference import Preference
from store.records import Call, Checkpoint, Example, Training


@dataclass(frozen=True, kw_only=True)
class BadRounds(Preference):
    """In the n-th of the rounds `bad` the learning rate is the n-th of `times` what it was."""

    bad: tuple[int, ...] = (2,)
    times: tuple[float, ...] = (100.0,)

    def train(
        self,
        examples: Sequence[Example],
        start: Checkpoint,
        reference: Checkpoint,
        into: Path,
        call: Call,
    ) -> Training:
        if call.round not in self.bad:
            return super().train(examples, start, reference, into, call)
        times = self.times[self.bad.index(call.round)]
        spoilt = replace(self, learning_rate=self.learning_rate * times, bad=())
        return spoilt.train(examples, start, reference, into, call)
