"""Kahneman-Tversky Optimization: each answer wanted or unwanted by itself, no pairs needed.

An answer is a gain or a loss against a reference point: how far the policy has left the reference
on answers that have nothing to do with their prompt. An example's weight scales its gradient; the
loss and the metrics that are reported count every example once.
Source: https://arxiv.org/abs/2402.01306, equation 8.
"""

# No `from __future__ import annotations` here, for the reason that roles.trainers.options gives.

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from roles.trainers.losses import Positive
from roles.trainers.options import Options
from store.errors import UserError
from store.records import Call, Checkpoint, Example, Training


@dataclass(frozen=True, kw_only=True)
class Kto(Options):
    """Make wanted answers likelier and unwanted ones less likely, as compared with the reference.

    The data are shuffled once, because the reference point of a step is taken from the step's own
    answers, each set after a prompt of another; every epoch goes through the same steps.
    """

    learns_from = "labelled"
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """apo_zero_unpaired: the reference point stays 0.
    Source: https://arxiv.org/abs/2408.06266, equation 7."""
    beta: Positive = 0.1
    """How fast a gain or a loss stops mattering as it grows."""
    desirable_weight: Positive = 1.0
    """The paper advises that weight times number of wanted examples be 1 to 4/3 of the same of
    unwanted ones."""
    undesirable_weight: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "kto" and self.rows_at_once < 2:
            raise UserError(
                "kto sets an answer after another example's prompt, so at least 2 examples are in "
                f"memory at once; found batch_size {self.batch_size}, micro_batch_size "
                f"{self.micro_batch_size}"
            )

    def train(
        self,
        examples: Sequence[Example],
        start: Checkpoint,
        reference: Checkpoint,
        into: Path,
        call: Call,
    ) -> Training:
        """Train on labelled candidates; see roles.protocols.Trainer."""
        from roles.trainers.labelled import train_labelled

        return train_labelled(self, examples, start, reference, into, call)
