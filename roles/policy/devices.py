"""Which device computes, and in which arithmetic it can."""

from __future__ import annotations

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
