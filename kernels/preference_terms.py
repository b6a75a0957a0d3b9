"""What the loss of a preference pair is made of, given its completions' log-probabilities.

Where those come from is another's business: the formulas are the same for the fused loss and for
its twin. They are written out, with their sources, in kernels.preference_loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

KINDS = ("sigmoid", "hinge", "robust", "ipo", "sigmoid_norm")
PER_TOKEN = frozenset({"ipo", "sigmoid_norm"})
"""Kinds whose log-ratios are means over tokens."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """A preference loss with its numbers. Raises ValueError for those that do not go together, and
    for one that `kind` does not heed."""

    kind: str
    beta: float
    label_smoothing: float = 0.0
    length_alpha: float = 0.0
    nll_alpha: float = 0.0
    nll: str = "sequence"
    pairs: float
    nll_tokens: float

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        *,
        pairs: float | None = None,
        nll_tokens: float | None = None,
        **others: Any,
    ) -> Terms:
        """Of completions of so many tokens, chosen and rejected in turns: means are over all of
        them unless `pairs` and `nll_tokens` are told."""
        return cls(
            pairs=len(lengths) // 2 if pairs is None else pairs,
            nll_tokens=sum(lengths[0::2]) if nll_tokens is None else nll_tokens,
            **others,
        )

    def __post_init__(self) -> None:
        kind = self.kind
        if kind not in KINDS:
            raise ValueError(f"no preference loss of kind {kind!r}; there are {', '.join(KINDS)}")
        if self.nll not in ("sequence", "token"):
            raise ValueError(f"nll is 'sequence' or 'token'; found {self.nll!r}")
        if not self.beta > 0 or not self.pairs > 0 or not self.nll_tokens > 0:
            found = f"beta {self.beta:g}, pairs {self.pairs:g}, nll_tokens {self.nll_tokens:g}"
            raise ValueError(f"beta, pairs and nll_tokens are above 0; found {found}")
        if not 0 <= self.label_smoothing < 0.5:
            found = f"{self.label_smoothing:g}"
            raise ValueError(f"label_smoothing is from 0 to below 0.5; found {found}")
        if self.label_smoothing and kind != "robust":
            raise ValueError(f"label_smoothing means nothing to {kind!r}; it does to 'robust'")
        if self.length_alpha and kind in PER_TOKEN:
            raise ValueError(f"length_alpha means nothing to {kind!r}, which divides by the length")

    def losses(self, logp_S: Tensor, ref_S: Tensor, tokens_S: Tensor) -> Tensor:
        """Each pair's part of the loss, [B]: the sum of these is a mean."""
        ratio_S = logp_S - ref_S
        score_S = ratio_S / tokens_S if self.kind in PER_TOKEN else ratio_S
        delta_B = score_S[0::2] - score_S[1::2]
        x_B = self.beta * delta_B + self.length_alpha * (tokens_S[0::2] - tokens_S[1::2])
        if self.kind in ("sigmoid", "sigmoid_norm"):
            loss_B = -logsigmoid(x_B)
        elif self.kind == "hinge":
            loss_B = torch.relu(1 - x_B)
        elif self.kind == "robust":
            flipped = self.label_smoothing
            loss_B = flipped * logsigmoid(-x_B) - (1 - flipped) * logsigmoid(x_B)
            loss_B = loss_B / (1 - 2 * flipped)
        else:
            loss_B = (delta_B - 1 / (2 * self.beta)) ** 2
        loss_B = loss_B / self.pairs
        if not self.nll_alpha:
            return loss_B
        of_B = tokens_S[0::2] * self.pairs if self.nll == "sequence" else self.nll_tokens
        return loss_B - self.nll_alpha * logp_S[0::2] / of_B

    def rewards(self, logp_S: Tensor, ref_S: Tensor, tokens_S: Tensor) -> Tensor:
        """beta (logp - ref_logp) + length_alpha tokens of each completion, [2B]."""
        return self.beta * (logp_S - ref_S) + self.length_alpha * tokens_S


def sums(logp_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """Over each completion. (index_add_ adds in no fixed order on a GPU.)"""
    there = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded = logp_N.new_zeros(there.shape).masked_scatter(there.to(logp_N.device), logp_N)
    return padded.sum(dim=1)


def checked_bounds(
    rows: int, cu_seqlens: Tensor, ref_logp: Tensor, pair_weight: Tensor | None
) -> list[int]:
    """cu_seqlens as numbers. Raises ValueError for what does not go together."""
    bounds: list[int] = cu_seqlens.tolist()
    if len(bounds) < 3 or len(bounds) % 2 == 0 or (bounds[0], bounds[-1]) != (0, rows):
        said = f"cu_seqlens is [2B+1] and goes from 0 to the {rows} rows of hidden"
        raise ValueError(f"{said}; found {len(bounds)} numbers, {bounds[:3]} to {bounds[-1:]}")
    for each, (start, stop) in enumerate(pairwise(bounds)):
        if stop <= start:
            side = ("chosen", "rejected")[each % 2]
            said = f"each completion has at least one token; found {stop - start}"
            raise ValueError(f"{said} in the {side} one of pair {each // 2}")
    if ref_logp.shape != (len(bounds) - 1,):
        raise ValueError(f"ref_logp is [{len(bounds) - 1}]; found {tuple(ref_logp.shape)}")
    if pair_weight is not None and pair_weight.shape != (len(bounds) // 2,):
        found = tuple(pair_weight.shape)
        raise ValueError(f"pair_weight is [{len(bounds) // 2}]; found {found}")
    return bounds
