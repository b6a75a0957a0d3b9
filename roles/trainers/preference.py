"""Preference optimization on pairs, with any loss of TRL's DPOTrainer or several weighted ones.

The policy is held to a reference by each pair's log-probabilities alone, which are computed once,
before the first update. So one model is in memory, whatever the reference is. An example's weight
scales its gradient; the loss and the metrics that are reported count every pair once.
"""

# No `from __future__ import annotations` here, for the reason that roles.trainers.options gives.

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from roles.trainers import losses
from roles.trainers.losses import NotNegative, Positive
from roles.trainers.options import Options
from store.errors import UserError
from store.records import Call, Checkpoint, Example, Training


@dataclass(frozen=True, kw_only=True)
class Preference(Options):
    """Make the chosen answer likelier than the rejected one, as compared with the reference."""

    learns_from = "pair"
    loss: str | list[str] = "sigmoid"
    """One of roles.trainers.losses.LOSSES, or several, whose weighted sum is trained."""
    loss_weights: list[Positive] | None = None
    """One for each loss. None is 1 each."""
    beta: Positive = 0.1
    """How dear it is to leave the reference. For ipo the paper's tau, for sppo_hard its 1/eta."""
    nll_weight: NotNegative = 0.0
    """Weight of the chosen answers' negative log-likelihood, added to the loss; it keeps them from
    getting less likely."""
    nll: Literal["token", "sequence"] = "token"
    """token: the mean over all chosen tokens of a step, TRL's `sft`. sequence: the mean over pairs
    of -log p(chosen) / its tokens. Source: https://arxiv.org/abs/2404.19733, equation 1."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """How often a label is taken to be wrong. exo_pair needs some; its paper takes 0.001."""
    length_weight: NotNegative = 0.0
    """What a token costs. The answer that maximizes reward - length_weight * tokens - beta * KL has
    the implicit reward beta * log-ratio + length_weight * tokens, so in place of its margin the
    loss sees beta * (chosen log-ratio - rejected log-ratio) + length_weight * (chosen tokens -
    rejected tokens): a pair whose chosen answer is the longer one teaches less. The metrics under
    rewards/ are of this reward. Source: R-DPO,
    https://arxiv.org/abs/2403.19159, and iLR-DPO, https://arxiv.org/abs/2406.11817."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """What the log-probabilities count for beyond the shorter side's length. None is fully, as is
    1. Source: LD-DPO, https://arxiv.org/abs/2409.06411."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    """How distance from the reference is measured. Source: https://arxiv.org/abs/2309.16240."""
    f_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Alpha of alpha_divergence: at 1 it is the reverse, at 0 the forward KL divergence."""
    discopop_tau: Positive = 0.05
    """The paper's. Below (1 - ln 2) / 3, about 0.102, the loss has a bump: from margin 0 it falls
    towards small negative margins first."""
    wpo: bool = False
    """Weigh pairs by how likely the policy is to write them. Source: WPO,
    https://arxiv.org/abs/2406.11827, equation 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.loss_names
        if self.loss_weights is not None and len(self.loss_weights) != len(names):
            raise UserError(
                f"loss_weights has {len(self.loss_weights)} numbers for {len(names)} losses "
                f"({', '.join(names)}); give one for each"
            )
        if self.label_smoothing:
            losses.heeded("label_smoothing", names, losses.SMOOTHED)
        elif "exo_pair" in names:
            raise UserError("exo_pair needs a label_smoothing above 0; its paper takes 0.001")
        if self.discopop_tau != 0.05:
            losses.heeded("discopop_tau", names, {"discopop"})
        if self.wpo:
            losses.suits("wpo", names, losses.WEIGHABLE)
        if self.f_divergence != "reverse_kl":
            losses.suits(f"f_divergence {self.f_divergence!r}", names, losses.DIVERGENT)
        if self.f_alpha != 0.5 and self.f_divergence != "alpha_divergence":
            raise UserError(
                f"f_alpha is of f_divergence 'alpha_divergence'; found {self.f_divergence!r}"
            )
        if self.length_weight:
            losses.suits("length_weight", names, losses.MARGINAL)
            if self.f_divergence != "reverse_kl":
                raise UserError(
                    f"length_weight is added to log-ratios, which f_divergence "
                    f"{self.f_divergence!r} has none of; leave that at 'reverse_kl'"
                )
        if self.rows_at_once != self.batch_size and losses.SORTING & set(names):
            raise UserError(
                f"{', '.join(names)} sorts all pairs of a step, so they are in memory at once; "
                f"found micro_batch_size {self.rows_at_once} of {self.batch_size}"
            )

    @property
    def loss_names(self) -> list[str]:
        return losses.named(self.loss)

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
