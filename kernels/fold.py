"""Which logsumexp fold is used: C on a CPU, Triton on a GPU, torch where neither can be had.

The choice is made by facts (what is installed, what a compiler makes), never by a timing, so that a
run that goes on after a kill computes as it did before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import fold_c, fold_torch
from kernels.fold_torch import Norm, Running, Scale

NAMES = ("torch", "c", "triton")
VARIABLE = "RATCHET_FOLD"


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
    why = {"c": "built with the system's compiler", "triton": "Triton is there"}
    known = why.get(wanted, "there is no other for this device")
    return Chosen(wanted, f"the logsumexp fold on {device} is {wanted!r}: {known}")


def _missing(name: str, device: str) -> str | None:
    """Why this fold cannot be used on this device; None when it can."""
    if name == "c":
        if device != "cpu":
            return "the C fold is for a CPU"
        try:
            fold_c.library()
        except fold_c.Unavailable as error:
            return str(error)
    elif name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton runs on a CPU with TRITON_INTERPRET=1 only"
    return None


def _fold(tile: Tensor) -> Any:
    name = chosen(tile.device).name
    if name == "c" and tile.dtype in fold_c.DTYPES:
        return fold_c
    if name == "triton" and tile.dtype != torch.float64:
        return importlib.import_module("kernels.fold_triton")
    return fold_torch
