"""The logsumexp fold in Triton: one program for a row, or for a block of one in the backward.

TRITON_INTERPRET=1 runs it on a CPU, which is how it is tested where there is no GPU.
"""

from __future__ import annotations

import subprocess
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from kernels.fold_torch import LOWEST, Norm, Running, Scale

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FAILURES = (AssertionError, OSError, RuntimeError, subprocess.SubprocessError, TritonError)
"""What the first kernel raises where Triton finds no driver or device, or a compiler fails: its
launcher needs one for C."""
_BLOCK = 4096


def _scaled(y: Any, cap: Any, inv_temperature: Any, CAPPED: tl.constexpr) -> Any:
    if CAPPED:
        y = cap * (2 * tl.sigmoid(2 * y / cap) - 1)
    return y * inv_temperature


_scaled_jit = triton.jit(_scaled)


def _forward(
    tile: Any,
    stride: Any,
    columns: Any,
    targets: Any,
    start: Any,
    maxima: Any,
    sums: Any,
    of_target: Any,
    weighted: Any,
    totals: Any,
    before: Any,
    squared: Any,
    cap: Any,
    inv_temperature: Any,
    lowest: Any,
    CAPPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TOTAL: tl.constexpr,
    BEFORE: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(targets + row) - start
    m = tl.load(maxima + row)
    s = tl.load(sums + row)
    if WEIGHTED:
        x = tl.load(weighted + row)
    if TOTAL:
        t = tl.load(totals + row)
    if BEFORE:
        b = tl.load(before + row)
    if SQUARED:
        q = tl.load(squared + row)
    for first in range(0, columns, BLOCK):
        columns_B = first + tl.arange(0, BLOCK)
        there = columns_B < columns
        y = tl.load(tile + row * stride + columns_B, mask=there, other=0.0).to(tl.float32)
        z = _scaled_jit(y, cap, inv_temperature, CAPPED)
        if TOTAL:
            t += tl.sum(tl.where(there, z, 0.0), axis=0)
        z = tl.where(there, z, float("-inf"))
        if BEFORE:
            b = tl.maximum(b, tl.max(tl.where(columns_B < at, z, lowest), axis=0))
        up = tl.maximum(m, tl.max(z, axis=0))
        shrink = tl.exp(m - up)
        e = tl.exp(z - up)
        if WEIGHTED:
            x = (x + s * (m - up)) * shrink + tl.sum(e * tl.maximum(z - up, lowest), axis=0)
        s = s * shrink + tl.sum(e, axis=0)
        if SQUARED:
            q = q * shrink * shrink + tl.sum(e * e, axis=0)
        m = up
    tl.store(maxima + row, m)
    tl.store(sums + row, s)
    if WEIGHTED:
        tl.store(weighted + row, x)
    if TOTAL:
        tl.store(totals + row, t)
    if BEFORE:
        tl.store(before + row, b)
    if SQUARED:
        tl.store(squared + row, q)
    if (at >= 0) & (at < columns):
        y = tl.load(tile + row * stride + at).to(tl.float32)
        tl.store(of_target + row, _scaled_jit(y, cap, inv_temperature, CAPPED))


def _backward(
    tile: Any,
    stride: Any,
    columns: Any,
    targets: Any,
    start: Any,
    maxima: Any,
    log_sums: Any,
    grads: Any,
    cap: Any,
    inv_temperature: Any,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = columns_B < columns
    place = tile + row * stride + columns_B
    y = tl.load(place, mask=there, other=0.0).to(tl.float32)
    z = _scaled_jit(y, cap, inv_temperature, CAPPED)
    p = tl.exp(z - tl.load(maxima + row) - tl.load(log_sums + row))
    hit = (columns_B == tl.load(targets + row) - start).to(tl.float32)
    d = tl.load(grads + row) * inv_temperature * (hit - p)
    if CAPPED:
        t = 2 * tl.sigmoid(2 * y / cap) - 1
        d *= 1 - t * t
    tl.store(place, d.to(tile.dtype.element_ty), mask=there)


_forward_jit = triton.jit(_forward)
_backward_jit = triton.jit(_backward)


def forward(tile: Tensor, target: Tensor, start: int, running: Running, scale: Scale) -> None:
    """See kernels.fold_torch.forward."""
    _forward_jit[(len(tile),)](
        tile,
        tile.stride(0),
        tile.shape[1],
        target.contiguous(),
        start,
        *(running.max if one is None else one for one in running.all()),
        scale.softcap or 1.0,
        1 / scale.temperature,
        LOWEST,
        CAPPED=scale.softcap is not None,
        WEIGHTED=running.weighted is not None,
        TOTAL=running.total is not None,
        BEFORE=running.before is not None,
        SQUARED=running.squared is not None,
        BLOCK=_BLOCK,
        num_warps=8,
    )


def backward(
    tile: Tensor, target: Tensor, start: int, norm: Norm, grad: Tensor, scale: Scale
) -> None:
    """See kernels.fold_torch.backward."""
    _backward_jit[(len(tile), triton.cdiv(tile.shape[1], _BLOCK))](
        tile,
        tile.stride(0),
        tile.shape[1],
        target.contiguous(),
        start,
        norm.max.contiguous(),
        norm.log_sum.contiguous(),
        grad.to(norm.max.dtype).contiguous(),
        scale.softcap or 1.0,
        1 / scale.temperature,
        CAPPED=scale.softcap is not None,
        BLOCK=_BLOCK,
        num_warps=8,
    )
