"""The memory that is foretold, held to what autograd keeps and to what a training really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trained_peak
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


# What a training takes

BATCHES: Mapping[str, tuple[int, dict[str, Any]]] = {
    "one layer": (1, {"batch_size": 8}),
    "few pairs": (6, {"batch_size": 2}),
    "many pairs": (6, {"batch_size": 8}),
    "in micro-batches": (6, {"batch_size": 8, "micro_batch_size": 2}),
    "activations twice": (6, {"batch_size": 8, "gradient_checkpointing": True}),
    "an adapter": (6, {"batch_size": 8, "lora_rank": 8}),
    "an adapter over 4 bits": (6, {"batch_size": 8, "lora_rank": 8, "load_in_4bit": True}),
}
"""Layers of the model, and what its trainer is told."""
SAMPLED = {
    "few answers": (3, 1, {"batch_size": 8}),
    "many answers": (3, 8, {"batch_size": 128}),
    "within a bound": (6, 8, {"batch_size": 128, "cache_gib": 0.03}),
}
"""Layers of the model, answers to a prompt, and what its engine is told."""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    """Of each of BATCHES what its training took, and what is foretold, in bytes."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is read from Linux's /proc")
    folder = tmp_path_factory.mktemp("peaks")
    cases: list[dict[str, Any]] = [
        *({"layers": layers, "options": options} for layers, options in BATCHES.values()),
        *(
            {"layers": layers, "answers": answers, "options": options}
            for layers, answers, options in SAMPLED.values()
        ),
    ]
    # What is freed goes back to the system at once: the peak is of what is held, and not of what
    # glibc keeps between.
    own = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, trained_peak.__file__, str(folder), json.dumps(cases)],
        capture_output=True,
        text=True,
        env=os.environ | own | {"MALLOC_MMAP_MAX_": "1000000", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        name: (
            each["bytes"],
            foretold(*BATCHES[name], each["prompt"])
            if name in BATCHES
            else foretold_of_sampling(*SAMPLED[name], each["prompt"]),
        )
        for name, each in zip([*BATCHES, *SAMPLED], found, strict=True)
    }


def foretold(layers: int, options: dict[str, Any], prompt: int) -> int:
    config = LlamaConfig(**trained_peak.SHAPE, num_hidden_layers=layers, tie_word_embeddings=True)
    lengths = Lengths(prompt, trained_peak.ANSWER)
    told = footprint.training(
        shape.of(config), Preference(**options), CPU, lengths, sides=2, scores=True
    )
    return told.peak


def foretold_of_sampling(layers: int, answers: int, options: dict[str, Any], prompt: int) -> int:
    config = LlamaConfig(**trained_peak.SHAPE, num_hidden_layers=layers, tie_word_embeddings=True)
    told = footprint.sampling(
        shape.of(config),
        4,
        CPU,
        Lengths(prompt, trained_peak.ANSWER),
        prompts=trained_peak.PAIRS,
        answers=answers,
        batch_size=options["batch_size"],
        cache_gib=options.get("cache_gib"),
    )
    return told.peak


@pytest.mark.parametrize("name", [*BATCHES, *SAMPLED])
def test_a_training_or_sampling_takes_what_is_foretold(
    peaks: dict[str, tuple[float, float]], name: str
) -> None:
    found, told = peaks[name]
    assert told / 1.3 < found < 1.15 * told


@pytest.mark.parametrize("less", ["one layer", "few pairs", "activations twice"])
def test_more_layers_more_pairs_and_keeping_activations_take_as_much_more_as_is_foretold(
    peaks: dict[str, tuple[float, float]], less: str
) -> None:
    found, told = (more - few for more, few in zip(peaks["many pairs"], peaks[less], strict=True))
    assert told > 100e6
    assert found == pytest.approx(told, rel=0.15)
