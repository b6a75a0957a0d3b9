"""Sampling with the engine's own decode loop, beside `generate` of transformers as it comes.

    python tests/benchmarks/generate.py [--passes 5] [--threads 1] [--json FILE]

The model is a Llama of 8 layers, 512 wide, with grouped heads and a vocabulary of 32k, random
weights, float32. The prompts are the same token ids and every completion has its full length, so
both sides make the same number of tokens. What is timed draws at temperature 1; what must agree
first are the greedy tokens. Ours records log-probabilities beside, `generate` does not. The last
table is one call of the engine on the embedded model, with texts in and texts out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import passes

NEW = 64
VOCABULARY = 32_000


def _model(positions: int, vocabulary: int = VOCABULARY, hidden: int = 512, layers: int = 8) -> Any:
    """A Llama with grouped heads."""
    from transformers import GenerationConfig

    model = models.llama(
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        positions=max(2048, positions),
        intermediate_size=hidden * 11 // 4,
        num_key_value_heads=hidden // 128,
        initializer_range=0.1,  # such that greedy tokens are no ties
        tie_word_embeddings=True,
    ).eval()
    model.generation_config = GenerationConfig()
    return model


def _prompts(
    lengths: list[int], common: int, vocabulary: int = VOCABULARY
) -> list[tuple[int, ...]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return [tuple(drawn[0][:common] + each[common:]) for each in drawn]


def ours(
    lengths: list[int], candidates: int, common: int = 0, new: int = NEW, **of: int
) -> passes.Pass:
    from roles.policy.decoding import Decoder
    from roles.policy.rows import Row
    from store.records import Sampling

    decoder = Decoder(_model(max(lengths) + new, **of))
    prompts = _prompts(lengths, common, of.get("vocabulary", VOCABULARY))
    rows = [
        Row(prompt, 1000 * place + number, new)
        for place, prompt in enumerate(prompts)
        for number in range(candidates)
    ]

    def drawn(temperature: float) -> list[int]:
        sampling = Sampling(temperature=temperature, max_tokens=new)
        found = decoder.decode(rows, sampling, end_ids=(), most=256, bytes_at_once=2**32)
        return [token for row in found for token in row.tokens]

    return passes.Pass(lambda: drawn(1.0), lambda: {"tokens": drawn(0.0)})


def generate(
    lengths: list[int], candidates: int, common: int = 0, new: int = NEW, **of: int
) -> passes.Pass:
    """Padded on the left, each prompt as often as it has candidates."""
    import torch

    model = _model(max(lengths) + new, **of)
    prompts = _prompts(lengths, common, of.get("vocabulary", VOCABULARY))
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(each)) + list(each) for each in prompts])
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts])

    def drawn(sample: bool) -> list[int]:
        asked: dict[str, Any] = {"do_sample": False}
        inputs, of = ids, mask
        if sample:
            asked = {"do_sample": True, "top_k": 0, "num_return_sequences": candidates}
        else:
            inputs, of = ids.repeat_interleave(candidates, 0), mask.repeat_interleave(candidates, 0)
        found = model.generate(
            inputs, attention_mask=of, max_new_tokens=new, pad_token_id=0, **asked
        )
        tokens: list[int] = found[:, width:].flatten().tolist()
        return tokens

    return passes.Pass(lambda: drawn(True), lambda: {"tokens": drawn(False)})


def embedded(engine: str, prompts: int = 128, candidates: int = 8) -> passes.Pass:
    """One call of the generator of `loop start`: questions in, texts and tokens out."""
    import reasoning_gym

    from roles.policy.embedded import build
    from roles.policy.transformers import TransformersEngine
    from store.records import Message, Prompt, Sampling

    folder = Path(tempfile.mkdtemp())
    build(folder, seed=0)
    opened: Any = TransformersEngine(device="cpu")
    if engine == "generate":
        import peer_engine

        opened = peer_engine.Generate()
    policy = opened.open(models.checkpoint(folder))
    questions = [
        entry["question"]
        for task in ("chain_sum", "letter_counting")
        for entry in reasoning_gym.create_dataset(task, size=prompts // 2, seed=1)
    ]
    asked = [Prompt(messages=(Message(role="user", content=text),)) for text in questions]
    seeds = [[10 * place + n for n in range(candidates)] for place in range(len(asked))]

    def tokens(temperature: float) -> list[int]:
        sampling = Sampling(temperature=temperature, max_tokens=8)
        groups = policy.sample(asked, sampling=sampling, seeds=seeds)
        return [token for group in groups for each in group for token in each.token_ids]

    return passes.Pass(lambda: tokens(1.0), lambda: {"tokens": tokens(0.0)})


def tables(settings: passes.Settings) -> Iterator[passes.Table]:
    asked: dict[str, dict[str, Any]] = {
        f"sampling {n} candidates of a prompt of 512 tokens, {NEW} new": {
            "lengths": [512],
            "candidates": n,
        }
        for n in (4, 16, 64)
    }
    asked["sampling for a judge: 16 prompts, 384 tokens of rubric in 416 to 446, 16 new"] = {
        "lengths": [416 + 2 * n for n in range(16)],
        "candidates": 1,
        "common": 384,
        "new": 16,
    }
    ragged = "sampling 4 candidates of each of 4 prompts of 150 to 300 tokens, 32 new"
    asked[ragged] = {"lengths": [150, 200, 250, 300], "candidates": 4, "new": 32}
    for title, of in asked.items():
        yield passes.compare(
            title,
            {"ours": (ours, of), "generate": (generate, of)},
            baseline="ours",
            agree={"tokens": 0},
            settings=settings,
            quoted=None if title == ragged else {"generate": "ours"},
        )
    yield passes.compare(
        "sampling of the embedded model, 8 candidates of 128 prompts, texts in and out",
        {
            "ours": (embedded, {"engine": "ours"}),
            "generate": (embedded, {"engine": "generate"}),
        },
        baseline="ours",
        agree={"tokens": 0},
        settings=settings,
        quoted={"generate": "ours"},
    )


if __name__ == "__main__":
    passes.main(tables)
