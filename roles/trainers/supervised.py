"""Imitation of demonstrations, by TRL.

The loss is the mean negative log-likelihood of a step's completion tokens. An example's weight
multiplies its tokens' share: weight 2 pulls twice as hard, weight 0 not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from roles.trainers.options import Options, Rate
from store.records import Call, Checkpoint, Example, Training


@dataclass(frozen=True, kw_only=True)
class Supervised(Options):
    """Make the demonstrated answers likelier."""

    learns_from = "demonstration"
    learning_rate: Rate = 1e-5

    def train(
        self,
        examples: Sequence[Example],
        start: Checkpoint,
        reference: Checkpoint,
        into: Path,
        call: Call,
    ) -> Training:
        """Train on demonstrations; see roles.protocols.Trainer. The reference is not used."""
        from roles.trainers.demonstrations import train_demonstrations

        return train_demonstrations(self, examples, start, into, call)
