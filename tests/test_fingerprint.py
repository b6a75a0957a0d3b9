"""Fingerprints of weights: what changes them and what does not, on models that are saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import small_model
from roles.policy import fingerprint
from roles.policy.adapters import CONFIG, WEIGHTS
from small_model import checkpoint, examples
from test_adapters import lora, train

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.build(tmp_path_factory.mktemp("model") / "tied")


@pytest.fixture
def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_of_the_numbers_and_of_no_order(
    weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    parts = [weights[f"model.layers.0.self_attn.{each}_proj.weight"] for each in "qkv"]
    apart = fingerprint.total(parts, dtype)
    fused = torch.cat(parts)
    assert fingerprint.of_tensor(fused, dtype) == apart
    assert fingerprint.of_tensor(fused.t().contiguous(), dtype) == apart
    padded = torch.zeros(fused.shape[0] + 64, fused.shape[1])
    padded[: len(fused)] = fused
    padded[-1] = -0.0
    assert fingerprint.of_tensor(padded, dtype) == apart
    assert 0 < apart < 2**64


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_that_differs_by_the_least_changes_it(
    weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    tensor = weights["model.embed_tokens.weight"].to(dtype)
    before = fingerprint.of_tensor(tensor, dtype)
    flat = tensor.view(-1)
    flat[7] = torch.nextafter(flat[7], torch.tensor(torch.inf, dtype=dtype))
    assert fingerprint.of_tensor(tensor, dtype) != before


def test_it_is_that_of_the_rounded_numbers(weights: dict[str, torch.Tensor]) -> None:
    tensor = weights["model.embed_tokens.weight"]
    rounded = tensor.to(torch.bfloat16)
    expected = fingerprint.of_tensor(rounded, torch.bfloat16)
    assert fingerprint.of_tensor(tensor, torch.bfloat16) == expected
    assert fingerprint.of_tensor(rounded.float(), torch.bfloat16) == expected


def test_of_a_folder_it_is_what_a_model_has_in_memory(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    found = fingerprint.of_folder(model, torch.float32)
    assert found == fingerprint.total(loaded.parameters(), torch.float32)
    # Tied weights are there once, though a file have them twice.
    stored = load_file(model / "model.safetensors")
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    twice = stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    save_file(twice, tmp_path / "model.safetensors")
    assert fingerprint.of_folder(tmp_path, torch.float32) == found


def test_of_a_folder_only_what_is_read_counts(
    model: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """The same weights may lie beside it in another form, as those of Mistral's models do."""
    found = fingerprint.of_folder(model, torch.float32)
    for folder in (one := tmp_path / "one", parts := tmp_path / "parts"):
        folder.mkdir()
        (folder / "config.json").write_text((model / "config.json").read_text())
        save_file(weights, folder / "consolidated.safetensors")
    save_file(weights, one / "model.safetensors")
    assert fingerprint.of_folder(one, torch.float32) == found
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, those in files.items():
        save_file({name: weights[name] for name in those}, parts / file)
    index = {"weight_map": {name: file for file, those in files.items() for name in those}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint.of_folder(parts, torch.float32) == found


def test_of_an_adapter_it_has_the_scale_in_it(model: Path, tmp_path: Path) -> None:
    start = checkpoint(model)
    train(lora(lora_alpha=6), examples(model, 4), start, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    table: dict[str, Any] = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert table["lora_alpha"] / table["r"] == 1.5
    scaled = [each * (1.5 if ".lora_B." in name else 1.0) for name, each in stored.items()]
    expected = fingerprint.total(scaled, torch.float32)
    assert fingerprint.of_adapter(tmp_path / "adapter", torch.float32) == expected


def test_workers_that_share_a_weight_have_it_once(weights: dict[str, torch.Tensor]) -> None:
    split, same = (weights[f"model.{name}.weight"] for name in ("embed_tokens", "norm"))
    found = [
        {
            "split": str(fingerprint.of_tensor(half, torch.float32)),
            "same": str(fingerprint.of_tensor(same, torch.float32)),
        }
        for half in split.chunk(2)
    ]
    assert fingerprint.joined(found) == fingerprint.total([split, same], torch.float32)


class Fused(torch.nn.Module):
    """A worker's share of queries, keys and values, as vLLM lays them out."""

    def __init__(self, shares: list[torch.Tensor], rank: int, replicas: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.cat(shares))
        self.num_heads, self.head_size = 2, len(shares[0]) // 2
        self.tp_rank, self.num_kv_head_replicas = rank, replicas


def test_keys_and_values_that_more_than_one_worker_has_count_once() -> None:
    """Four workers, eight heads of queries, two of keys and values."""
    queries, keys, values = (torch.randn(heads * 4, 16) for heads in (8, 2, 2))
    workers = []
    for rank in range(4):
        of = [keys.chunk(2)[rank // 2], values.chunk(2)[rank // 2]]
        fused = Fused([queries.chunk(4)[rank], *of], rank, 2)
        workers.append({k: str(v) for k, v in fingerprint._held(fused, torch.float32)})
    expected = fingerprint.total([queries, keys, values], torch.float32)
    assert fingerprint.joined(workers) == expected
