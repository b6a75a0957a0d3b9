"""Low-rank adapters (LoRA): laid over a base, trained in its place, merged into it.

A checkpoint that is an adapter holds what was learnt and where its base lies. The model stays the
base's own class with small layers inside, so whatever samples, scores or trains a model does the
same with one that has an adapter.
Source: https://arxiv.org/abs/2106.09685, equation 3.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from packaging.version import Version

from roles.policy.folders import load_whole, save, stored_dtype
from store.errors import UserError, unknown
from store.records import Checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BITSANDBYTES = "0.49"
"""The oldest that holds weights in 4 bits as they are trained over here."""
ALL_LINEAR: Literal["all-linear"] = "all-linear"


def require_peft() -> None:
    """Raises UserError when the package that adapters need is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "an adapter (LoRA) was asked for, and the package peft is not installed; "
            "`pip install 'ratchet-loop[peft]'` installs it"
        )


def require_bitsandbytes() -> None:
    """Raises UserError when the package that holds weights in 4 bits is not there, or too old."""
    try:
        found = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or Version(found) < Version(BITSANDBYTES):
        there = "is not installed" if found is None else f"is {found}"
        raise UserError(
            f"load_in_4bit was asked for, which takes bitsandbytes {BITSANDBYTES} or newer, and "
            f"that {there}; `pip install 'ratchet-loop[bitsandbytes]'` installs it"
        )


def _peft() -> Any:
    require_peft()
    return importlib.import_module("peft")


def settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the adapter's configuration says."""
    path = checkpoint.path / CONFIG
    if not path.is_file():
        raise UserError(f"{checkpoint.path} is an adapter by its record, and has no {CONFIG}")
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return table


def base_path(checkpoint: Checkpoint) -> Path:
    """The folder of the whole weights: a full checkpoint's own, an adapter's base.

    Where the record says the base lies goes before the adapter's configuration, which was written
    before the run's directory was moved, if it was.
    """
    if checkpoint.kind == "full":
        return checkpoint.path
    path = checkpoint.base_path or Path(settings(checkpoint)["base_model_name_or_path"])
    if not path.is_dir():
        raise UserError(
            f"{checkpoint.path} is an adapter of {path}, where no folder is; put its base back"
        )
    return path


def load_model(checkpoint: Checkpoint, dtype: Any, four_bit_on: str | None = None) -> Any:
    """The checkpoint's model, where load_whole puts it; of an adapter, its base with that over it.

    dtype: of the base, as from_pretrained takes it; an adapter is in float32. four_bit_on: as
    load_whole has it. Of a model with an adapter only the adapter's weights require gradients.
    """
    model = load_whole(base_path(checkpoint), dtype, four_bit_on)
    if checkpoint.kind == "adapter":
        settings(checkpoint)
        _lay_over(model, _peft().PeftConfig.from_pretrained(str(checkpoint.path)), seed=0)
        restore(model, checkpoint.path)
    return model


def add(
    model: Any, *, rank: int, alpha: float, dropout: float, targets: str | list[str], seed: int
) -> None:
    """Lay a fresh adapter over the model; until it is trained the model computes what it did.

    Raises UserError for a target that is no linear layer of the model.
    """
    if targets != ALL_LINEAR:
        _check_targets(model, [targets] if isinstance(targets, str) else targets)
    config = _peft().LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    _lay_over(model, config, seed)


def _lay_over(model: Any, config: Any, seed: int) -> None:
    import torch

    config.inference_mode = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config)
    # In the dtype of the base, updates as small as a step's round away. This comes before weights
    # are read: transformers' own load_adapter would round them on the way.
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    # TRL multiplies by the head's weight itself, so an adapter on it would never be trained.
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            names = {name.rpartition(".")[2] for name in linear}
            raise unknown("linear layer for lora_targets", target, {ALL_LINEAR, *names})


def has_adapter(model: Any) -> bool:
    """Whether an adapter lies over the model."""
    return hasattr(model, "peft_config")


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """The model as its base, while this lasts."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def write(model: Any, base: Path, like: Path, into: Path) -> None:
    """Save the adapter that lies over the model, where its base is, and what lies beside the
    weights in the folder `like`."""
    save(model, like, into)
    path = into / CONFIG
    table = json.loads(path.read_text(encoding="utf-8"))
    table["base_model_name_or_path"] = str(base.resolve())
    # A set, whose order is another one in each process.
    table["target_modules"] = sorted(table["target_modules"])
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def restore(model: Any, folder: Path) -> None:
    """Give the adapter that lies over the model the weights that were saved in a folder.

    Raises RuntimeError when they are those of an adapter of another model.
    """
    from safetensors.torch import load_file

    saved = load_file(folder / WEIGHTS)
    found = _peft().set_peft_model_state_dict(model, saved)
    missing = [key for key in found.missing_keys if ".lora_" in key]
    if missing or found.unexpected_keys:
        raise RuntimeError(
            f"the adapter in {folder} is not of this base; without weights: {missing[:3]}, "
            f"without a place: {found.unexpected_keys[:3]}"
        )


def merge(
    checkpoint: Checkpoint, into: Path, *, dtype: Literal["base", "float32"] = "base"
) -> None:
    """Write the adapter's base with the adapter added to it, as a model folder of its own.

    dtype: what the sum, which is made in float32, is stored in. "base" is the dtype the base is
    stored in, as whoever runs the model expects it; in bfloat16 that rounds away what is small of
    an adapter, so "float32" is what to train on from.
    Raises UserError for a checkpoint that is no adapter.
    """
    import torch

    if checkpoint.kind != "adapter":
        raise UserError(f"{checkpoint.path} is a full checkpoint; only an adapter can be merged")
    base = base_path(checkpoint)
    model = load_whole(base, torch.float32)
    merged = _peft().PeftModel.from_pretrained(model, str(checkpoint.path)).merge_and_unload()
    save(merged.to(stored_dtype(base)) if dtype == "base" else merged, checkpoint.path, into)
