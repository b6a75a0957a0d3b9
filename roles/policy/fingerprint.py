"""Fingerprints of weights: that an engine computes with those of a checkpoint, and no others.

An engine keeps weights in another form than the files: fused, padded, sharded, packed for its
kernels. What stays is which numbers there are, and how often each. So a fingerprint is a sum over
numbers of a hash of each, modulo 2**64, which no order and no zero can change; one number that
differs changes it but once in 2**64 times.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from store import checkpoints

_PROCESS = uuid4().hex
_CHUNK, _ROWS = 1 << 22, 256
_FIRST, _SECOND = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9  # odd, and of both halves
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WHOLE = ("adapter_model.safetensors", "model.safetensors")
_LEFT = (".inv_freq", ".attn.masked_bias", ".attn.bias")
"""What old files hold and no engine reads: it follows from the configuration."""


def of_tensor(tensor: Tensor, dtype: torch.dtype) -> int:
    """The fingerprint of a tensor's numbers, rounded to dtype: 0 to 2**64 - 1. Of zeros it is 0."""
    total = 0
    flat = tensor.detach().reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        rounded = flat[start : start + _CHUNK].to(dtype)
        mixed = rounded.view(_BITS[rounded.element_size()]).to(torch.int64) * _FIRST
        mixed ^= mixed >> 29
        mixed *= _SECOND
        mixed ^= mixed >> 32
        total += int(mixed.masked_fill_(rounded == 0, 0).sum())
    return total % 2**64


def total(tensors: Iterable[Tensor], dtype: torch.dtype) -> int:
    """The fingerprint of all of them together."""
    return sum(of_tensor(each, dtype) for each in tensors) % 2**64


def of_folder(path: Path, dtype: torch.dtype) -> int:
    """What an engine that has read the whole weights of a model folder must have."""
    table = json.loads((path / "config.json").read_text(encoding="utf-8"))
    # Tied weights are there once, whatever the file holds.
    left = (*_LEFT, "lm_head.weight") if table.get("tie_word_embeddings") else _LEFT
    return total((each for name, each in stored(path) if not name.endswith(left)), dtype)


def of_adapter(path: Path, dtype: torch.dtype) -> int:
    """What an engine that has read an adapter must have: its scale is multiplied into B."""
    table = json.loads((path / checkpoints.ADAPTER).read_text(encoding="utf-8"))
    rank = table["r"]
    scale = table["lora_alpha"] / (rank**0.5 if table.get("use_rslora") else rank)
    whole = (
        each.to(dtype) * scale if ".lora_B." in name else each.to(dtype)
        for name, each in stored(path)
    )
    return total(whole, dtype)


def stored(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and content of each tensor that a folder's weights are, one after the other."""
    from safetensors import safe_open

    for file in _weight_files(path):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no dictionary)
                yield name, opened.get_tensor(name)


def _weight_files(path: Path) -> list[Path]:
    """Those that are read. Others beside them may hold the same weights in another form."""
    for whole in (path / name for name in _WHOLE):
        if whole.is_file():
            return [whole]
    table = json.loads((path / checkpoints.INDEX).read_text(encoding="utf-8"))
    return [path / name for name in sorted(set(table["weight_map"].values()))]


def joined(workers: Sequence[dict[str, str]]) -> int:
    """One fingerprint of those that each worker has by name: what all of them have alike is there
    once, of the rest each has its share."""
    whole = 0
    for name, first in workers[0].items():
        parts = [worker[name] for worker in workers]
        whole += int(first) if set(parts) == {first} else sum(map(int, parts))
    return whole % 2**64


class Worker:
    """Mixed into vLLM's workers (`worker_extension_cls`), which then can be asked.

    Answers are of strings and lists, since they also go over HTTP.
    """

    def ratchet_process(self) -> str:
        """Told apart from every other process, one on the same port later among them."""
        return _PROCESS

    def ratchet_weights(self) -> dict[str, Any]:
        """The model's dtype and device, which log-probabilities it tells, and the fingerprint of
        each of its weights by name."""
        model, dtype = self._ratchet_model()
        device = next(model.parameters()).device.type
        found = {name: str(each) for name, each in _held(model, dtype)}
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
            "logprobs": str(self._ratchet_runner().model_config.logprobs_mode),
            "weights": found,
        }

    def ratchet_adapters(self) -> list[dict[str, Any]]:
        """The same of each adapter that is there."""
        manager = self._ratchet_runner().lora_manager._adapter_manager
        return [_of_lora(manager.get_adapter(number)) for number in manager.list_adapters()]

    def _ratchet_model(self) -> tuple[Any, torch.dtype]:
        runner = self._ratchet_runner()
        return runner.get_model(), runner.model_config.dtype

    def _ratchet_runner(self) -> Any:
        return self.model_runner  # type: ignore[attr-defined]


def _held(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, int]]:
    """The fingerprint of each weight that a vLLM model computes with, once.

    On a CPU layers compute with a copy that is packed for it, and may have nothing else. Where a
    layer has the weight too, as one whose weight is also another's, the copy is to be the same:
    what it is off by comes on top.
    """
    seen = set[int]()
    for where, module in model.named_modules():
        packed = hasattr(module, "cpu_linear")
        for own, weight in module.named_parameters(recurse=False):
            name = f"{where}.{own}"
            own_print = of_tensor(weight, dtype) if weight.numel() else 0
            if packed and own == "weight":
                copied = of_tensor(_asked(module, dtype, weight.device), dtype)
                yield f"{name} packed", (copied - own_print) % 2**64
            if weight.numel() and weight.data_ptr() not in seen:
                seen.add(weight.data_ptr())
                replicas = getattr(module, "num_kv_head_replicas", 1)
                if replicas == 1:
                    yield name, own_print
                    continue
                # Keys and values are here as often as there are more workers than heads of them.
                queries = of_tensor(weight[: module.num_heads * module.head_size], dtype)
                yield f"{name} queries", queries
                first = module.tp_rank % replicas == 0
                yield f"{name} keys, values", (own_print - queries) % 2**64 if first else 0


def _asked(linear: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight of a linear layer that has packed it away, [in, out]: what it makes of each unit
    vector, which is exact, since all other products are zero."""
    known = ("input_size_per_partition", "input_size", "embedding_dim")
    width = next(getattr(linear, name) for name in known if hasattr(linear, name))
    units = torch.eye(width, dtype=dtype, device=device)
    starts = range(0, width, _ROWS)
    return torch.cat(
        [linear.quant_method.apply(linear, units[n : n + _ROWS], None) for n in starts]
    )


def _of_lora(adapter: Any) -> dict[str, Any]:
    found, dtype = {}, torch.float32
    for name, layer in adapter.loras.items():
        for side in ("lora_a", "lora_b"):
            parts = getattr(layer, side)
            parts = parts if isinstance(parts, list) else [parts]
            there = [part for part in parts if part is not None]
            dtype = there[0].dtype if there else dtype
            found[f"{name}.{side}"] = str(total(there, dtype))
    return {"dtype": str(dtype).removeprefix("torch."), "weights": found}
