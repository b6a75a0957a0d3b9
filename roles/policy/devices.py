"""Which device computes, and in which arithmetic it can."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from store.errors import UserError

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda", "mps"]


def find(name: Device) -> torch.device:
    """The device of this name; of "auto" the first there is of cuda, mps, cpu.

    Raises UserError for one that this machine does not have.
    """
    import torch

    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    found = [kind for kind, is_there in there.items() if is_there]
    if name == "auto":
        return torch.device(found[0])
    if name not in found:
        raise UserError(f"no device {name!r} on this machine; there are: {', '.join(found)}")
    return torch.device(name)


def check_bfloat16(device: torch.device) -> None:
    """Raises UserError when the device cannot compute in bfloat16."""
    import torch

    able = True
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported()
    elif device.type == "mps":
        able = torch.backends.mps.is_macos_or_newer(14, 0)
    if not able:
        raise UserError(
            f"dtype 'bfloat16' was asked for, and the device {device.type!r} of this machine "
            "cannot compute in it; 'float32' works everywhere"
        )


def prefers_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is the faster arithmetic: a GPU that has it and does not emulate it."""
    import torch

    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def give_back() -> None:
    """Give memory that nobody holds any more back to the machine."""
    import ctypes
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        # glibc keeps what was freed between what is still held, and the next stage, whose tensors
        # have other sizes, would come on top of it.
        with suppress(AttributeError):  # of another C library
            ctypes.CDLL(None).malloc_trim(0)


def arithmetic(name: Device = "auto") -> str:
    """How the products that cost most are computed on the device of this name, in a sentence.

    It hangs on the machine alone, and another way gives other last digits. Raises UserError where
    RATCHET_FOLD asks for what is not to be had.
    """
    from kernels import fold, matmul

    device = find(name)
    try:
        said = fold.chosen(device).reason
    except ValueError as error:
        raise UserError(str(error)) from None
    if device.type == "cpu":
        library = "oneDNN" if matmul.is_accurate() else "torch's own choice"
        said += f"; float32 products by {library}"
    return said
