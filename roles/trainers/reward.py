"""Reward models: a score for each answer, learnt from pairs.

The chosen answer's score is made larger than the rejected one's; only their difference is learnt.
Source: "Training language models to follow instructions with human feedback" (arXiv 2203.02155),
equation 1.
"""

# No `from __future__ import annotations` here, for the reason that roles.trainers.options gives.

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from roles.trainers.losses import NotNegative
from roles.trainers.options import Options, Rate
from store.errors import UserError
from store.records import Call, Checkpoint, Example, Training


@dataclass(frozen=True, kw_only=True)
class Reward(Options):
    """Score the chosen answer above the rejected one.

    What is left is a model for sequence classification with one label, not a policy.
    """

    learns_from = "pair"
    makes = "reward model"
    learning_rate: Rate = 1e-5
    center_weight: NotNegative = 0.0
    """Weight of (chosen score + rejected score)^2, which keeps scores around 0.
    Source: https://arxiv.org/abs/2312.09244, equation 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank is not None:
            raise UserError(
                "a reward model is trained whole, because its head is new; leave lora_rank out"
            )

    def train(
        self,
        examples: Sequence[Example],
        start: Checkpoint,
        reference: Checkpoint,
        into: Path,
        call: Call,
    ) -> Training:
        """Train on preference pairs; see roles.protocols.Trainer. The reference is not used."""
        from roles.trainers.rewards import train_rewards

        return train_rewards(self, examples, start, into, call)
