"""The losses on preference pairs that TRL's DPOTrainer has, and which options each one heeds.

An option that no loss in use heeds is a mistake of whoever set it, and is told as one: TRL would
train as if it were not there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated

from pydantic import Field

from store.errors import UserError, unknown

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

LOSSES = {
    "sigmoid": "https://arxiv.org/abs/2305.18290, equation 7: DPO",
    "hinge": "https://arxiv.org/abs/2309.06657: RSO, and SLiC's loss on log-ratios",
    "ipo": "https://arxiv.org/abs/2310.12036, equation 17, each log-ratio a mean over tokens",
    "exo_pair": "https://arxiv.org/abs/2402.00856, equation 16",
    "nca_pair": "https://arxiv.org/abs/2402.05369: NCA for two answers",
    "robust": "https://arxiv.org/abs/2403.00409: DPO on labels of which some are flipped",
    "bco_pair": "https://arxiv.org/abs/2404.04656: BCO, its reward shift left at 0",
    "sppo_hard": "https://arxiv.org/abs/2405.00675, equation 4.7, the chosen side always winning",
    "aot": "https://arxiv.org/abs/2406.05882: optimal transport between sorted margins",
    "aot_unpaired": "https://arxiv.org/abs/2406.05882: the same between sorted sides",
    "apo_zero": "https://arxiv.org/abs/2408.06266, equation 7",
    "apo_down": "https://arxiv.org/abs/2408.06266, equation 8",
    "discopop": "https://arxiv.org/abs/2406.08414, equation 5",
    "sigmoid_norm": "https://arxiv.org/abs/2411.15124: DPO, each log-ratio a mean over tokens",
}
"""Name, as in TRL, and where it comes from. All of them are held to a reference."""

SORTING = frozenset({"aot", "aot_unpaired"})
"""Losses that sort a batch: no part of their value belongs to one pair alone."""
SMOOTHED = SORTING | {"exo_pair", "robust"}
MARGINAL = frozenset({"sigmoid", "hinge", "exo_pair", "robust", "discopop"})
"""Losses of a pair's margin alone, that is of chosen log-ratio minus rejected log-ratio. (ipo and
sigmoid_norm divide by the length, so that a reward for each token would be the same on both.)"""
DIVERGENT = MARGINAL | {"ipo", "sigmoid_norm"}
"""Losses that stay what they are under another f-divergence than the reverse Kullback-Leibler."""
WEIGHABLE = frozenset(LOSSES) - SORTING - {"hinge"}
"""Losses that TRL can weigh as WPO does. (It does so in place, which undoes the hinge's gradient.)
"""


def named(losses: str | Sequence[str]) -> list[str]:
    """The losses as a list. Raises UserError for one that is not there or is there twice."""
    names = [losses] if isinstance(losses, str) else list(losses)
    for name in names:
        if name == "sft":
            raise UserError(
                "loss 'sft' is the chosen answers' negative log-likelihood, which nll_weight adds "
                "to the other losses; to train on it alone take the trainer 'supervised'"
            )
        if name not in LOSSES:
            raise unknown("loss", name, LOSSES)
        if names.count(name) > 1:
            raise UserError(f"loss names {name!r} twice; give it once, with its loss_weights")
    if not names:
        raise UserError("loss is an empty list; name at least one loss, as 'sigmoid'")
    return names


def heeded(option: str, losses: Sequence[str], by: Collection[str]) -> None:
    """Refuse an option that none of these losses heeds."""
    if not set(losses) & set(by):
        raise UserError(
            f"{option} means nothing to {_joined(losses)}; it does to {_joined(sorted(by))}"
        )


def suits(option: str, losses: Sequence[str], by: Collection[str]) -> None:
    """Refuse an option that one of these losses cannot bear."""
    others = [name for name in losses if name not in by]
    if others:
        raise UserError(
            f"{option} does not go with {_joined(others)}; it does with {_joined(sorted(by))}"
        )


def _joined(names: Sequence[str]) -> str:
    return ", ".join(names)
