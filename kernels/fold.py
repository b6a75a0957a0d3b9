"""Which logsumexp fold is used: C on a CPU, Triton on a GPU, torch where neither can be had.

The choice is made by facts (what is installed, whether what a compiler makes of it folds as torch
does), never by a timing, so that a run that goes on after a kill computes as it did before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import subprocess
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import fold_torch
from kernels.fold_torch import Norm, Running, Scale

NAMES = ("torch", "c", "triton")
VARIABLE = "RATCHET_FOLD"
_OFF = 3e-5
"""How far a fold may lie from torch's: GPUs have exponentials that are approximations."""


class Chosen(NamedTuple):
    """A fold, and why it is that one."""

    name: str
    reason: str


def forward(tile: Tensor, target: Tensor, start: int, running: Running, scale: Scale) -> None:
    """See kernels.fold_torch.forward."""
    _fold(tile).forward(tile, target, start, running, scale)


def backward(
    tile: Tensor, target: Tensor, start: int, norm: Norm, grad: Tensor, scale: Scale
) -> None:
    """See kernels.fold_torch.backward."""
    _fold(tile).backward(tile, target, start, norm, grad, scale)


def chosen(device: str | torch.device) -> Chosen:
    """The fold for tiles on this device. Raises ValueError where RATCHET_FOLD asks for another.

    (The C and the Triton fold are for the dtypes of models; float64 is folded in torch anywhere.)
    """
    return _chosen(torch.device(device).type, os.environ.get(VARIABLE) or None)


@functools.cache
def _chosen(device: str, asked: str | None) -> Chosen:
    if asked not in (None, *NAMES):
        raise ValueError(f"{VARIABLE} is one of {', '.join(NAMES)}; found {asked!r}")
    wanted = asked or {"cpu": "c", "cuda": "triton"}.get(device, "torch")
    missing = _missing(wanted, device)
    if asked:
        if missing:
            raise ValueError(f"{VARIABLE} asks for {asked!r} on {device}, but {missing}")
        return Chosen(asked, f"the logsumexp fold on {device} is {asked!r}: {VARIABLE} says so")
    if missing:
        said = f"the logsumexp fold on {device} is the slower one of torch: {missing}"
        return Chosen("torch", said)
    known = "there is no other for this device"
    if wanted == "c":
        known = _module("c").built().how
    elif wanted == "triton":
        known = "Triton is there"
    return Chosen(wanted, f"the logsumexp fold on {device} is {wanted!r}: {known}")


def _missing(name: str, device: str) -> str | None:
    """Why this fold cannot be used on this device; None when it can."""
    if name == "torch":
        return None
    if name == "c" and device != "cpu":
        return "the C fold is for a CPU"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton runs on a CPU with TRITON_INTERPRET=1 only"
    return tried(name, device)


def tried(name: str, device: str) -> str | None:
    """Why this fold does not work on this device, tried on a few small tiles; None when it does.

    A compiler, a driver or a processor that we do not know is found out here, and not by a kernel
    in the middle of a training.
    """
    try:
        folding = _module(name)
    except (ImportError, OSError) as error:
        return f"fold_{name} cannot be imported: {said(error)}"
    y = torch.linspace(-30, 30, 3 * 2083, device="cpu").view(3, 2083).sin() * 20
    try:
        for dtype, scale in product(folding.DTYPES, (Scale(), Scale(0.7, 15.0))):
            found = _folded(folding, y.to(device, dtype, copy=True), scale)
            wanted = _folded(fold_torch, y.to(dtype, copy=True), scale)
            rtol = 1e-5 if dtype == torch.float32 else 1e-2
            sides = zip(found, wanted, (1e-5, 1e-5, 1e-5, rtol), strict=True)
            if not all(torch.allclose(one, other, rtol=r, atol=_OFF) for one, other, r in sides):
                return f"what was compiled of fold_{name} does not fold as torch does"
    except folding.FAILURES as error:
        return str(error) if name == "c" else f"Triton cannot run a kernel: {said(error)}"
    return None


def _folded(by: Any, tile: Tensor, scale: Scale) -> tuple[Tensor, ...]:
    """Of each row the maximum, the logarithm of the sum, the target and the gradient."""
    target = torch.tensor([0, 1040, 2082], device=tile.device)
    grad = torch.tensor([1.0, -2.0, 0.5], device=tile.device)
    running = Running.start(tile, len(tile), ())
    by.forward(tile, target, 0, running, scale)
    by.backward(tile, target, 0, running.norm, grad, scale)
    return tuple(each.float().cpu() for each in (*running.norm, running.target, tile))


def said(error: BaseException) -> str:
    """The error in a clause that is the same each time: runs are compared by it."""
    if isinstance(error, subprocess.CalledProcessError):
        # What it was called with are files that have other names each time.
        return f"{error.cmd[0]} ended with exit status {error.returncode}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def _module(name: str) -> Any:
    return importlib.import_module(f"kernels.fold_{name}")


def _fold(tile: Tensor) -> Any:
    name = chosen(tile.device).name
    if name == "torch":
        return fold_torch
    folding = _module(name)
    return folding if tile.dtype in folding.DTYPES else fold_torch
