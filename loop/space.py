"""Whether the disk has room for what a run will write, asked before it writes anything."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop.settings import Config, Model, Track
from roles.policy import shape
from store import checkpoints
from store.errors import UserError

WEIGHT_BYTES = 4
"""A trained checkpoint is float32, whatever it began as."""
SAVE_WEIGHTS = 3
"""Numbers that a save keeps for each weight: itself, and the two moments of Adam."""
SAVES = 2
"""While a save is written, the one before it is still there."""
EMBEDDED_WEIGHTS = 1_050_000
ANSWER_BYTES = 420
"""Of the database for each answer, its judgement and its share of the rest. Measured: 421 on the
default run, whose answers are four tokens long, so it is the least."""
BESIDE_BYTES = 16 << 20
"""For the write-ahead log, the settings and what is printed."""


@dataclass(frozen=True)
class Need:
    """What a run writes at most, in bytes. The database grows on with long answers."""

    checkpoints: int
    training: int
    database: int

    @property
    def total(self) -> int:
        return self.checkpoints + self.training + self.database


def needed(config: Config, roles: Mapping[int, Any]) -> Need:
    """What lies on disk at once: the checkpoints that are kept, the training that is under way
    and the database. `roles` are those that load_roles made of `config`.
    """
    weights = [_trained(model, roles[id(model.trainer)]) for model in config.models.values()]
    # Beside the last ones: the incumbent, the best, and what the rounds began from.
    kept = config.checkpoints.keep_last + 3
    if config.rounds:
        kept = min(kept, config.rounds + 1)
    return Need(
        checkpoints=sum(weights) * WEIGHT_BYTES * kept,
        training=max(weights) * WEIGHT_BYTES * SAVE_WEIGHTS * SAVES,
        database=(0 if config.store.url else _answers(config, roles) * ANSWER_BYTES) + BESIDE_BYTES,
    )


def check(config: Config, roles: Mapping[int, Any], runs: Path) -> None:
    """Raises UserError unless the disk on which `runs` is or will be has room for a new run."""
    disk, need = shutil.disk_usage(place(runs)), needed(config, roles)
    if disk.free < need.total and disk.total:  # what has no size at all is no disk
        raise UserError(
            f"the disk of {runs}/ has {shown(disk.free)} free, and this run needs about "
            f"{shown(need.total)} (checkpoints {shown(need.checkpoints)}, a training's saves "
            f"{shown(need.training)}, the database {shown(need.database)}); free some, name "
            "another disk with --runs, or set a lower checkpoints.keep_last"
        )


def place(runs: Path) -> Path:
    """The folder that is there already in which `runs` is or will be."""
    return next(each for each in (runs, *runs.absolute().parents) if each.exists())


def shown(size: int) -> str:
    """A number of bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size} bytes"


def _trained(model: Model, trainer: Any) -> int:
    """How many weights a checkpoint of the model has. An adapter's hardly count beside them."""
    adapter = getattr(trainer, "lora_rank", None) is not None and not model.fresh_adapter
    if adapter:
        return 0
    if model.path == "embedded":
        return EMBEDDED_WEIGHTS
    folder = checkpoints.locate(model.path, weights=False)
    if Path(model.path).is_dir() or any(folder.glob(checkpoints.WEIGHTS)):
        return count_weights(folder)
    return shape.read(folder).parameters  # of the Hub, and not fetched yet


def count_weights(folder: Path) -> int:
    """How many numbers a model folder holds, from the headers of its files.

    Source: the safetensors format: the header's length in eight bytes, then the header as JSON.
    """
    count = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = opened.read(int.from_bytes(opened.read(8), "little"))
        try:
            tensors = json.loads(header)
            tensors.pop("__metadata__", None)
            count += sum(math.prod(tensor["shape"]) for tensor in tensors.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is damaged: its header is not safetensors'") from error
    return count


def _answers(config: Config, roles: Mapping[int, Any]) -> int:
    """Of a whole run, or of one round where rounds are without end."""
    evaluate = config.evaluate
    held_out = (evaluate.gate_prompts + evaluate.test_prompts) * (evaluate.samples + 1)
    held_out = len(config.models) * (held_out + sum(s.prompts for s in evaluate.suite.values()))

    def asked(tracks: Mapping[str, Track]) -> int:
        return sum(each.prompts * _of_each(roles[id(each.generator)]) for each in tracks.values())

    first = asked(config.tracks(0)) + held_out
    return first + max(config.rounds, 1) * (asked(config.tracks(1)) + held_out)


def _of_each(generator: Any) -> int:
    """Answers that a generator makes for a prompt, as far as it says."""
    count = getattr(generator, "n", 1)
    return count if isinstance(count, int) else 1
