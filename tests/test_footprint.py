"""The memory that is foretold, held to what autograd keeps and to what a training really takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

from kernels.grouped_hidden import grouped_hidden
from roles import footprint
from roles.footprint import Device, Lengths, Passed
from roles.policy import adapters, shape
from roles.trainers.preference import Preference

CPU = Device("cpu")
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def small(layers: int) -> LlamaConfig:
    return LlamaConfig(**SMALL, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])


def kept(layers: int, lengths: Lengths, *, narrow: int, low_rank: bool, sides: int) -> int:
    """Bytes that autograd keeps of a pass, weights aside: storages, each once."""
    model = LlamaForCausalLM(small(layers))
    if low_rank:
        model.to(torch.bfloat16 if narrow == 2 else torch.float32)
        adapters.add(model, rank=2, alpha=4, dropout=0.0, targets=adapters.ALL_LINEAR, seed=0)
    model.train()
    ours = {each.untyped_storage().data_ptr() for each in model.parameters()}
    seen: dict[int, tuple[int, Any]] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    prompt = [list(range(lengths.prompt))]
    answers = [[[side] * (lengths.answer + 1) for side in range(sides)]]
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=narrow == 2),
    ):
        grouped_hidden(model, prompt, answers)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("sides", [1, 2], ids=["whole rows", "a prompt shared"])
@pytest.mark.parametrize("low_rank", [False, True], ids=["all weights", "an adapter"])
@pytest.mark.parametrize("narrow", [4, 2], ids=["float32", "bfloat16"])
def test_a_layer_keeps_what_the_formula_says(narrow: int, low_rank: bool, sides: int) -> None:
    lengths = Lengths(160, 96)  # too long for plain products of attention
    of = {"narrow": narrow, "low_rank": low_rank}
    found = (kept(3, lengths, **of, sides=sides) - kept(1, lengths, **of, sides=sides)) / 2
    passed = Passed.of(lengths, sides, again=False)
    many, one = (footprint.activations(shape.of(small(n)), passed, **of)[0] for n in (3, 1))
    told = (many - one) / 2
    layer = shape.of(small(1))
    if narrow == 2:  # what products need of the weights in bfloat16, which is counted apart
        told += 2 * (layer.adapter(2) if low_rank else layer.multiplied)
    assert found == pytest.approx(told, rel=0.02)
