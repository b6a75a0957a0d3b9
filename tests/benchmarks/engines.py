"""Sampling with vLLM, in process and through its server, beside our own engine.

    .venv-vllm/bin/python tests/benchmarks/engines.py [--passes 3] [--threads 2] [--json FILE]

Two models of random weights in float32, the embedded one and one of 100 million parameters with its
tokenizer. A pass is one call of the policy, 64 prompts (16 to the larger model) with 8 candidates
each, at temperature 1 and at most 64 tokens, texts in and texts out, with log-probabilities; each
draws noise of its own, so they make within a percent as many tokens. What must agree first are the
greedy tokens. vLLM has read the model and compiled what it compiles before. On a CPU its prefix
cache shares whole blocks of 128 tokens, more than these prompts have. Memory is that of the process
that asks, in which only transformers computes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import passes

CANDIDATES, NEW = 8, 64
GREEDY = 8
ENGINES: dict[str, dict[str, Any]] = {
    "transformers": {},
    "vLLM": {},
    "vLLM, served": {"serve": True},
}


def build(into: Path, large: bool) -> None:
    """Write a model with the embedded one's tokenizer."""
    from roles.policy import embedded

    embedded.build(into, 0)
    if large:
        models.llama(
            vocabulary=embedded.VOCABULARY,
            hidden=768,
            layers=14,
            positions=embedded.POSITIONS,
            initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=4,
            pad_token_id=0,
        ).save_pretrained(into)


def sampled(engine: str, folder: str, prompts: int) -> passes.Pass:
    from roles.policy.transformers import TransformersEngine
    from roles.policy.vllm import VllmEngine
    from store import checkpoints
    from store.errors import UserError
    from store.records import Message, Prompt, Sampling

    # Else vLLM leaves a core to others.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    options = {"dtype": "float32", "cache_gib": 4.0, **ENGINES[engine]}
    try:
        made: Any = TransformersEngine if engine == "transformers" else VllmEngine
        policy = made(**options).open(checkpoints.measure(Path(folder), "policy"))
    except UserError as error:
        raise passes.Unavailable(str(error)) from error
    asked = [
        Prompt(messages=(Message(role="user", content=f"What is {n} times {7 * n + 3}?"),))
        for n in range(prompts)
    ]

    def drawn(count: int, candidates: int, temperature: float) -> list[int]:
        seeds = [[1000 * n + m for m in range(candidates)] for n in range(count)]
        sampling = Sampling(temperature=temperature, max_tokens=NEW)
        groups = policy.sample(asked[:count], sampling=sampling, seeds=seeds)
        return [token for group in groups for one in group for token in one.token_ids]

    return passes.Pass(
        lambda: drawn(prompts, CANDIDATES, 1.0), lambda: {"tokens": drawn(GREEDY, 1, 0.0)}
    )


def tables(settings: passes.Settings) -> Iterator[passes.Table]:
    for title, prompts in (("embedded", 64), ("100 M", 16)):
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), large=title != "embedded")
            yield passes.compare(
                f"{title}: {prompts} prompts x {CANDIDATES} answers of at most {NEW} tokens",
                {
                    name: (sampled, {"engine": name, "folder": folder, "prompts": prompts})
                    for name in ENGINES
                },
                baseline="transformers",
                agree={"tokens": 0.0},
                settings=settings,
            )


if __name__ == "__main__":
    passes.main(tables)
