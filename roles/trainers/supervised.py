"""Imitation of demonstrations, by TRL.

The loss is the mean negative log-likelihood of a step's completion tokens. An example's weight
multiplies its tokens' share: weight 2 pulls twice as hard, weight 0 not at all.
"""

# No `from __future__ import annotations` here, for the reason that roles.trainers.options gives.

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from roles.trainers.losses import NotNegative
from roles.trainers.options import Options, Rate
from store.records import Call, Checkpoint, Example, Training


@dataclass(frozen=True, kw_only=True)
class Supervised(Options):
    """Make the demonstrated answers likelier."""

    learns_from = "demonstration"
    learning_rate: Rate = 1e-5
    kl_weight: NotNegative = 0.0
    """How dear it is to leave the reference: the weight of (log p - log p_reference)^2 / 2, a mean
    over the demonstrated tokens. Where the policy wrote them its gradient is that of their KL
    divergence. Source: the KL prior of SuperHF, https://arxiv.org/abs/2310.16763; the estimate,
    http://joschu.net/blog/kl-approx.html, k2."""

    def train(
        self,
        examples: Sequence[Example],
        start: Checkpoint,
        reference: Checkpoint,
        into: Path,
        call: Call,
    ) -> Training:
        """Train on demonstrations; see roles.protocols.Trainer. The reference is used by
        `kl_weight` alone."""
        from roles.trainers.demonstrations import train_demonstrations

        return train_demonstrations(self, examples, start, reference, into, call)
