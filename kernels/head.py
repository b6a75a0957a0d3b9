"""A model's head as products take it: one tile of its logits at a time, and its gradients."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import fold
from kernels.fold_torch import Norm, Running, Scale, arithmetic
from kernels.matmul import add_product, large, narrowed, product, tile

MAX_BYTES = 128 << 20
MAX_BYTES_ELSEWHERE = 1 << 30
"""For who trains: a step goes over the head three times where a micro-batch's logits fit, and four
where they do not: 128 MiB are 440 rows of bfloat16 with a vocabulary of 152 000, fewer than an
ordinary pair. A GPU that trains such a model has room for more, and a CPU, whose memory the machine
shares, keeps to the ops' own bound."""
STATS = ("entropy", "mean_logit", "is_top1", "log_sum_sq")


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """What products with the head are made in."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    max_bytes: int,
    stats: Collection[str],
) -> None:
    """Raise ValueError for what the ops on a head cannot work with."""
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden is [N, H] and weight [V, H]; found {shapes}")
    if len(hidden) == 0 or len(weight) == 0:
        raise ValueError(f"there is no log-probability of nothing; found {shapes}")
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        found = f"{tuple(target.shape)} of {target.dtype}"
        raise ValueError(f"target is [N] of int64, with {shapes}; found {found}")
    lowest, highest = (int(end) for end in target.aminmax())
    if lowest < 0 or highest >= len(weight):
        within = f"is between 0 and {len(weight) - 1}, the vocabulary's last token"
        raise ValueError(f"each target {within}; found {lowest if lowest < 0 else highest}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is [V], with {shapes}; found {tuple(bias.shape)}")
    if not temperature > 0 or not (softcap is None or softcap > 0):
        found = f"temperature {temperature:g}, softcap {softcap}"
        raise ValueError(f"temperature and softcap are above 0; found {found}")
    if max_bytes < 16:
        raise ValueError(f"max_bytes has room for one logit at least, 16; found {max_bytes}")
    if others := set(stats) - {*STATS}:
        there = ", ".join(STATS)
        raise ValueError(f"no statistic named {min(others)!r}; there are {there}")


def tile_shape(rows: int, vocabulary: int, dtype: torch.dtype, max_bytes: int) -> tuple[int, int]:
    """Rows and columns of a tile: part of the vocabulary only where a row of it is too long."""
    row_bytes = vocabulary * dtype.itemsize
    if rows * row_bytes <= max_bytes:
        return rows, vocabulary
    budget = max_bytes - widened(dtype, max_bytes)
    if row_bytes <= budget:
        return budget // row_bytes, vocabulary
    elements = budget // dtype.itemsize
    high = min(rows, math.isqrt(elements))
    return high, min(vocabulary, elements // high)


def widened(dtype: torch.dtype, max_bytes: int) -> int:
    """Bytes kept free for what add_product widens."""
    return max_bytes // 8 if dtype.itemsize < 4 else 0


@dataclass(frozen=True)
class TiledHead:
    """A head as products take it, and how much of its logits is in memory at once."""

    weight: Tensor
    bias: Tensor | None
    scale: Scale
    max_bytes: int
    own: torch.dtype
    """What the weight is outside of products, where autocast may have them in another."""

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, scale: Scale, max_bytes: int
    ) -> TiledHead:
        bias = None if bias is None else bias.to(dtype)
        return cls(narrowed(weight, dtype), bias, scale, max_bytes, weight.dtype)

    def shape(self, rows: int) -> tuple[int, int]:
        return tile_shape(rows, len(self.weight), self.weight.dtype, self.max_bytes)

    def tile(self, rows: int, columns: int) -> Tensor:
        return tile(rows, columns, self.weight.dtype, self.weight.device)

    def logits(self, hidden: Tensor, start: int, out: Tensor) -> Tensor:
        """The product of [n, H] with the vocabulary from `start` on, in a tile's first rows."""
        stop = min(start + out.shape[1], len(self.weight))
        bias = None if self.bias is None else self.bias[start:stop]
        made = out[: len(hidden), : stop - start]
        return product(hidden, self.weight[start:stop].t(), bias=bias, out=made)

    def add(self, into: Tensor, left: Tensor, right: Tensor) -> None:
        """into += left @ right, within the bytes that are kept for it."""
        add_product(into, left, right, widened(self.weight.dtype, self.max_bytes))

    def folded(
        self, hidden: Tensor, target: Tensor, start: int, running: Running, out: Tensor
    ) -> Tensor:
        """Those logits, taken into what is known of their rows."""
        made = self.logits(hidden, start, out)
        fold.forward(made, target, start, running, self.scale)
        return made

    def unfolded(self, made: Tensor, target: Tensor, start: int, norm: Norm, grad: Tensor) -> None:
        """Logits turned into their gradients."""
        fold.backward(made, target, start, norm, grad, self.scale)


class Gradients:
    """The gradients of a head and of what went into it, summed over tiles; None is not needed."""

    def __init__(
        self, head: TiledHead, hidden: Tensor, needed: tuple[bool, ...], whole: bool
    ) -> None:
        """`whole`: one tile has all rows, so that no sum over tiles of rows is rounded to less.

        Nor is one over backward passes, where the weight is of a wider dtype than its products.
        """
        dtype, wide = head.weight.dtype, arithmetic(head.weight.dtype)
        self.head, self.once = head, whole and head.own == dtype != wide
        self.hidden = self.weight = self.bias = None
        if needed[0]:
            self.hidden = torch.empty_like(hidden, dtype=dtype)
        if needed[1]:
            self.weight = large(head.weight.shape, dtype if self.once else wide, hidden.device)
            if not self.once:
                self.weight.zero_()
        if needed[2]:
            self.bias = torch.zeros(len(head.weight), dtype=wide, device=hidden.device)

    def add_hidden(self, rows: slice, grad: Tensor) -> None:
        """Take in the gradient of these rows' logits, the whole vocabulary's."""
        if self.hidden is not None:
            product(grad, self.head.weight, out=self.hidden[rows])

    def add_head(self, hidden: Tensor, start: int, grad: Tensor) -> None:
        """Take in a tile's gradient [n, C], the vocabulary from `start` on."""
        stop = start + grad.shape[1]
        if self.weight is not None and self.once:
            product(grad.t(), hidden, out=self.weight[start:stop])
        elif self.weight is not None:
            self.head.add(self.weight[start:stop], grad.t(), hidden)
        if self.bias is not None:
            self.bias[start:stop] += grad.sum(dim=0, dtype=self.bias.dtype)

    def of(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the dtypes of what they are gradients of."""
        return (
            None if self.hidden is None else self.hidden.to(hidden.dtype),
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


def spans(length: int, at_once: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, at_once):
        yield first, min(first + at_once, length)


def seen(running: Running, vocabulary: int) -> tuple[Tensor | None, ...]:
    """The fields of TokenStats, from the sums over the whole vocabulary."""
    norm = running.norm
    entropy = mean = is_top1 = log_sum_sq = None
    if running.weighted is not None:
        entropy = norm.log_sum - running.weighted / running.sum
    if running.total is not None:
        mean = running.total / vocabulary
    if running.before is not None:
        is_top1 = (running.target >= running.max) & (running.target > running.before)
    if running.squared is not None:
        log_sum_sq = running.squared.log() - 2 * norm.log_sum
    return running.logp, entropy, mean, is_top1, log_sum_sq
