"""How the ops multiply: with which library, in which precision, and how much of it.

Every product with a head goes through `product` or `add_product`, and every tile of logits comes
from `tile`, so that `counting` can say how many passes over the head something took and how many
bytes of logits were held at once: facts that a test can hold, where seconds are not.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MKLDNN: Any = torch.backends.mkldnn
_UNCHOSEN = ("none", "ieee")
_FAST = "bf16"
"""What torch calls it where float32 products may go to oneDNN."""
# Of the kernels that oneDNN compiles, a megabyte each, it keeps a thousand; read at its first use.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
_HUGE = 2 << 20
_ROUND = 32
_MADV_HUGEPAGE = 14
_lock = threading.Lock()
_inside = _plain = 0
_before: tuple[str | None, str, str] = (None, "none", "none")
_counts: list[Count] = []


@dataclass(eq=False)  # two that counted the same are two
class Count:
    """What was multiplied and held while counting."""

    flops: int = 0
    held: int = 0
    """Bytes that exist now of tiles, and of heads in another dtype than their own."""
    most_held: int = 0

    def passes(self, tokens: int, vocabulary: int, hidden: int) -> float:
        """Passes over the head: one is the product that makes all logits, 2 N V H operations."""
        return self.flops / (2 * tokens * vocabulary * hidden)

    def hold(self, nbytes: int) -> None:
        self.held += nbytes
        self.most_held = max(self.most_held, self.held)


@contextmanager
def counting() -> Iterator[Count]:
    """Count what all threads multiply with heads, from here to the end of the block."""
    count = Count()
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)


def tile(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized [rows, columns] for logits, counted until it is freed."""
    return _held(large((rows, columns), dtype, device))


def narrowed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A head in the dtype of products: itself, or a copy, counted until it is freed."""
    return weight if weight.dtype == dtype else _held(weight.to(dtype))


def _held(made: Tensor) -> Tensor:
    for count in _counts:
        count.hold(made.nbytes)
        weakref.finalize(made, count.hold, -made.nbytes)
    return made


def large(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor, in huge pages where it is worth it and the system has them.

    Linux gives memory in pages of 4 KiB at its first use, which for a tile of 128 MiB takes longer
    than to fold it.
    """
    made = torch.empty(shape, dtype=dtype, device=device)
    if made.nbytes >= 4 * _HUGE and device.type == "cpu" and sys.platform == "linux":
        first = -(-made.data_ptr() // _HUGE) * _HUGE
        nbytes = (made.data_ptr() + made.nbytes - first) // _HUGE * _HUGE
        _madvise()(first, nbytes, _MADV_HUGEPAGE)  # advice: nothing is lost where it is refused
    return made


@functools.cache
def _madvise() -> Any:
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise


def product(left: Tensor, right: Tensor, *, bias: Tensor | None = None, out: Tensor) -> Tensor:
    """out = left @ right (+ bias), in out's dtype; float32 at its fastest."""
    _count(left, right)
    for rows, fast in _parts(left, len(left)):
        with fast():
            if bias is not None:
                torch.addmm(bias, left[rows], right, out=out[rows])
            else:
                torch.mm(left[rows], right, out=out[rows])
    return out


def add_product(into: Tensor, left: Tensor, right: Tensor, at_once: int) -> None:
    """into += left @ right, where a float32 `into` gets no product that was rounded to less.

    To round each chunk's product before it is summed biases training (trl/kernels/
    chunked_logprob.py, `_addmm_fp32`). On CUDA a product of bfloat16 matrices can be float32; the
    CPU of torch 2.13 has no such product, so there blocks of `left`'s rows are widened first, of
    `at_once` bytes.
    """
    if into.dtype == left.dtype:
        _count(left, right)
        for summed, fast in _parts(left, left.shape[1]):
            with fast():
                into.addmm_(left[:, summed], right[summed])
    elif into.device.type == "cuda":
        _count(left, right)
        torch.addmm(into, left, right, out_dtype=into.dtype, out=into)
    else:
        right = right.to(into.dtype)
        rows = min(len(left), max(1, at_once // (left.shape[1] * into.itemsize)))
        wide = tile(left.shape[1], rows, into.dtype, into.device)
        # A float32 product may go through bfloat16 on some CPUs: these factors lose nothing by it.
        with fast_float32(always=left.dtype == torch.bfloat16):
            for first in range(0, len(left), rows):
                part = left[first : first + rows]
                widened = wide[:, : len(part)].t().copy_(part)
                _count(widened, right)
                into[first : first + rows].addmm_(widened, right)


def _parts(
    left: Tensor, count: int
) -> list[tuple[slice, Callable[[], AbstractContextManager[None]]]]:
    """In which parts of a dimension to multiply, and how.

    oneDNN compiles a kernel for each shape that it meets, in some milliseconds, and keeps it; and
    the rows at a head are as many as a step happens to have.
    """
    if left.dtype != torch.float32 or left.device.type != "cpu":
        return [(slice(0, count), nullcontext)]
    round = count - count % _ROUND
    parts = [(slice(0, round), fast_float32), (slice(round, count), plain_float32)]
    return [(part, fast) for part, fast in parts if part.start < part.stop]


def _count(left: Tensor, right: Tensor) -> None:
    for count in _counts:
        count.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]


@contextmanager
def fast_float32(*, always: bool = False) -> Iterator[None]:
    """Multiply float32 matrices on the CPU with oneDNN where that is as accurate as float32.

    oneDNN is twice as fast as MKL on some CPUs, but torch goes to it only where it may be less
    accurate ("medium"), and on other CPUs it then multiplies in bfloat16. Which it is is found
    once per process, by the error of small products; `always` says that it does not matter. Blocks
    may be nested and may overlap in several threads; the setting is the whole process's, so other
    threads' float32 products are made as fast meanwhile. Products on CUDA stay what they are, and
    so does everything where somebody has chosen. Where there is CUDA, torch still tells its setting
    meanwhile, but not one for all backends (torch.get_float32_matmul_precision).
    """
    entered = False
    try:
        entered = (always or is_accurate()) and _enter()
        yield
    finally:
        if entered:
            _leave()


@contextmanager
def plain_float32() -> Iterator[None]:
    """Within fast_float32(), multiply as without it.

    Torch's own attention on a CPU multiplies small blocks, for each of which oneDNN takes some ten
    times as long as MKL. (What is differentiated runs backward outside this block: see
    kernels.passes.small_attention.)
    """
    global _plain
    setting = _MKLDNN.matmul
    try:
        with _lock:
            _plain += 1
            if _inside:
                setting.fp32_precision = "ieee"
        yield
    finally:
        with _lock:
            _plain -= 1
            if _inside and not _plain:
                setting.fp32_precision = _FAST


def _enter() -> bool:
    global _inside, _before
    mkldnn, cuda = _MKLDNN.matmul, torch.backends.cuda.matmul
    with _lock:
        if _inside == 0:
            if mkldnn.fp32_precision not in _UNCHOSEN:
                return False
            try:
                whole = torch.get_float32_matmul_precision()
            except RuntimeError:  # set backend by backend: torch then refuses to name one for all
                whole = None
            if torch.cuda.is_available():
                whole = None
            _before = (whole, mkldnn.fp32_precision, cuda.fp32_precision)
            # What is set for all backends is also CUDA's. Where there is none, that keeps every
            # setting readable; torch refuses to read those that contradict each other.
            if whole is None:
                mkldnn.fp32_precision = _FAST
            else:
                torch.set_float32_matmul_precision("medium")
        _inside += 1
    return True


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0:
            whole, of_mkldnn, of_cuda = _before
            if whole is not None:
                torch.set_float32_matmul_precision(whole)
                torch.backends.cuda.matmul.fp32_precision = of_cuda
            _MKLDNN.matmul.fp32_precision = of_mkldnn


@functools.cache
def is_accurate() -> bool:
    """Whether oneDNN's float32 products are: at several sizes, since it picks a kernel by them.

    The error is taken relative to the sum of the terms' sizes. It is some 2^-24 in float32, and
    beyond 2^-17 where factors were rounded to tf32 or bfloat16.
    """
    if not _MKLDNN.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((32, 64, 48), (7, 129, 257), (256, 512, 384), (384, 256, 1024)):
        left = torch.randn(rows, inner, generator=generator)
        right = torch.randn(inner, columns, generator=generator)
        with fast_float32(always=True):
            error = (left @ right - left.double() @ right.double()).abs()
        if not (error <= left.abs() @ right.abs() * math.ldexp(1, -19)).all():
            return False
    return True
