"""The logsumexp fold over tiles of logits, in torch: what the C and the Triton fold are held to.

With y a row of a tile, as the product with the head left it, and
    z = softcap tanh(y / softcap) / temperature        (z = y / temperature without a softcap)
`forward` keeps, over all tiles of the row's vocabulary, the sums from which log p(target) and the
row's statistics follow (the online softmax of https://arxiv.org/abs/1805.02867, algorithm 3);
`backward` puts in y's place the gradient of g log p(target) with respect to y,
    g (1[v = target] - p_v) (1 - tanh(y_v / softcap)^2) / temperature,  p_v = exp(z_v - log Z).
All of it is float32 arithmetic, float64 for a float64 tile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

LOWEST = -3.0e38
"""Where a running maximum starts: finite, since -inf - -inf is not a number."""
_AT_ONCE = 1 << 20


class Scale(NamedTuple):
    """From a product with the head to logits."""

    temperature: float = 1.0
    softcap: float | None = None

    def of(self, y: Tensor) -> Tensor:
        z = y if self.softcap is None else self.softcap * torch.tanh(y / self.softcap)
        return z if self.temperature == 1 else z / self.temperature


class Norm(NamedTuple):
    """log Z of each row, [N], as max + log_sum: added up, large logits would be rounded away."""

    max: Tensor
    log_sum: Tensor

    def rows(self, first: int, last: int) -> Norm:
        """A view of some rows."""
        return Norm(self.max[first:last], self.log_sum[first:last])


@dataclass
class Running:
    """What is known of each row after some of its vocabulary, [N]; None is not asked for."""

    max: Tensor
    sum: Tensor
    """Of exp(z - max)."""
    target: Tensor
    """The target's z; 0 before its tile."""
    weighted: Tensor | None
    """Sum of exp(z - max) (z - max)."""
    total: Tensor | None
    """Sum of z."""
    before: Tensor | None
    """Highest z before the target."""
    squared: Tensor | None
    """Sum of exp(z - max)^2."""

    @classmethod
    def start(cls, like: Tensor, rows: int, stats: Collection[str]) -> Running:
        """Nothing seen yet, for tiles such as `like`."""
        dtype = arithmetic(like.dtype)

        def filled(value: float, asked: bool = True) -> Tensor | None:
            return torch.full((rows,), value, dtype=dtype, device=like.device) if asked else None

        return cls(
            filled(LOWEST),  # type: ignore[arg-type]
            filled(0.0),  # type: ignore[arg-type]
            filled(0.0),  # type: ignore[arg-type]
            filled(0.0, "entropy" in stats),
            filled(0.0, "mean_logit" in stats),
            filled(LOWEST, "is_top1" in stats),
            filled(0.0, "log_sum_sq" in stats),
        )

    def all(self) -> Iterator[Tensor | None]:
        return (getattr(self, field.name) for field in fields(self))

    def rows(self, first: int, last: int) -> Running:
        """A view of some rows."""
        return Running(*(None if one is None else one[first:last] for one in self.all()))  # type: ignore[arg-type]

    @property
    def logp(self) -> Tensor:
        return self.target - self.max - self.sum.log()

    @property
    def norm(self) -> Norm:
        return Norm(self.max, self.sum.log())


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What a tile of this dtype is folded in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(tile: Tensor, target: Tensor, start: int, running: Running, scale: Scale) -> None:
    """Take a tile [N, C] of the vocabulary from `start` on into what is known of its rows."""
    for rows in _blocks(tile):
        z = scale.of(tile[rows].to(running.max.dtype))
        _merge(z, target[rows] - start, running.rows(rows.start, rows.stop))


def _merge(z: Tensor, at: Tensor, running: Running) -> None:
    before = running.max.clone()
    torch.maximum(before, z.amax(dim=1), out=running.max)
    shrink = torch.exp(before - running.max)
    e = torch.exp(z - running.max[:, None])
    seen = running.sum.clone()
    running.sum.mul_(shrink).add_(e.sum(dim=1))
    within = (at >= 0) & (at < z.shape[1])
    found = z.gather(1, at.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    running.target.copy_(torch.where(within, found, running.target))
    if running.weighted is not None:
        # A weight of 0 times -inf is not a number.
        away = (z - running.max[:, None]).clamp(min=LOWEST)
        running.weighted.add_(seen * (before - running.max)).mul_(shrink)
        running.weighted.add_((e * away).sum(dim=1))
    if running.total is not None:
        running.total.add_(z.sum(dim=1))
    if running.before is not None:
        earlier = torch.arange(z.shape[1], device=z.device) < at[:, None]
        highest = z.masked_fill(~earlier, LOWEST).amax(dim=1)
        running.before.copy_(torch.maximum(running.before, highest))
    if running.squared is not None:
        running.squared.mul_(shrink * shrink).add_((e * e).sum(dim=1))


def backward(
    tile: Tensor, target: Tensor, start: int, norm: Norm, grad: Tensor, scale: Scale
) -> None:
    """Turn a tile [N, C] into the gradient of sum(grad * log p(target)), in place."""
    for rows in _blocks(tile):
        y = tile[rows].to(norm.max.dtype)
        d = torch.exp(scale.of(y) - norm.max[rows, None] - norm.log_sum[rows, None]).neg_()
        at = target[rows] - start
        within = ((at >= 0) & (at < d.shape[1])).to(d.dtype)
        d.scatter_add_(1, at.clamp(0, d.shape[1] - 1)[:, None], within[:, None])
        d *= grad[rows, None] / scale.temperature
        if scale.softcap is not None:
            d *= 1 - torch.tanh(y / scale.softcap).square()
        tile[rows] = d.to(tile.dtype)


def _blocks(tile: Tensor) -> Iterator[slice]:
    """Rows a few at a time: what is made on the way stays small."""
    rows = max(1, _AT_ONCE // tile.shape[1])
    for first in range(0, len(tile), rows):
        yield slice(first, min(first + rows, len(tile)))
