"""Direct Preference Optimization on preference pairs, by TRL.

The policy is held to a reference by each pair's log-probabilities alone, which are computed once,
before the first update. So one model is in memory, whatever the reference is. An example's weight
scales its gradient; the loss and the metrics that are reported count every pair once.
Source: https://arxiv.org/abs/2305.18290, equation 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from roles.trainers.options import Options
from store.records import Call, Checkpoint, Example, Training


@dataclass(frozen=True, kw_only=True)
class Preference(Options):
    """Make the chosen answer likelier than the rejected one, as compared with the reference."""

    loss: Literal["sigmoid"] = "sigmoid"
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How dear it is to leave the reference."""
    nll_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen tokens' mean negative log-likelihood, added to the loss; it keeps the
    chosen answers from getting less likely. Source: https://arxiv.org/abs/2404.19733"""

    def train(
        self,
        examples: Sequence[Example],
        start: Checkpoint,
        reference: Checkpoint,
        into: Path,
        call: Call,
    ) -> Training:
        """Train on preference pairs; see roles.protocols.Trainer."""
        from roles.trainers.pairs import train_pairs

        return train_pairs(self, examples, start, reference, into, call)
