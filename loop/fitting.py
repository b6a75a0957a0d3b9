"""Whether a stage fits into a device's memory, and with which settings it would."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from roles.footprint import Device, Footprint
from roles.trainers.options import Options
from store.errors import UserError

SPARE = 0.9
"""Share of a device's memory that tensors may take: the process and what its allocator cannot join
up have the rest."""
LESS = (
    ("micro_batch_size", 1),
    ("gradient_checkpointing", True),
    ("lora_rank", 16),
    ("dtype", "bfloat16"),
    ("load_in_4bit", True),
)
"""What makes a training smaller, the least harm first; each is added to those before it."""


def fits(found: Footprint, device: Device, share: float = SPARE) -> bool:
    """Where nobody knows how much memory there is, all does."""
    return device.bytes is None or found.peak <= share * device.bytes


def smaller_sampling(
    engine: Any, found: Callable[[Any], Footprint], device: Device
) -> list[str] | None:
    """Settings with which it fits; None where there are none."""
    smaller, sets = copy.copy(engine), []
    for option, value in (("dtype", "bfloat16"), ("cache_gib", 1.0)):
        setattr(smaller, option, value)
        sets.append(f"engine.{option}={value}")
        if fits(found(smaller), device):
            return sets
    return None


def smaller_training(
    trainer: Options, found: Callable[[Options], Footprint], device: Device
) -> list[str] | None:
    """Settings with which the training fits; None where none of LESS will do."""
    has = {
        "micro_batch_size": trainer.rows_at_once == 1,
        "gradient_checkpointing": trainer.gradient_checkpointing,
        "lora_rank": trainer.lora_rank is not None,
        "dtype": trainer.dtype == "bfloat16",
        "load_in_4bit": trainer.load_in_4bit,
    }
    changes: dict[str, Any] = {}
    for option, value in LESS:
        if has[option]:
            continue
        changes[option] = value
        try:
            smaller = dataclasses.replace(trainer, **changes)
        except UserError:
            del changes[option]
            continue
        if fits(found(smaller), device):
            return [f"trainer.{key}={_toml(value)}" for key, value in changes.items()]
    return None


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
