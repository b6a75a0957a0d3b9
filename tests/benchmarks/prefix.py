"""Prompts that pass once for both answers, against two rows: the body, forward and backward.

`python tests/benchmarks/prefix.py`; the options are those of passes.py. A Llama of hidden size 512
with 4 layers, 4 prompts with two answers each, 256 tokens a row. The share is the prompt's of a
row. Were all tokens as dear, the time ratio would be that of the tokens, which the title says; what
keeps it below is attention, which costs an answer's token the same either way, and narrower
products.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import models
import passes
import torch
from transformers import LlamaModel

from kernels.grouped_hidden import WORTH, grouped_hidden
from kernels.matmul import fast_float32

ROW, PROMPTS, ANSWERS = 256, 4, 2
SHARES = (0.25, 0.5, 0.75, 0.9)
QUOTED = (0.25, 0.75)


def model() -> Any:
    return models.llama(vocabulary=1000, hidden=512, layers=4, positions=1024)


def ids(share: float) -> tuple[list[list[int]], list[list[list[int]]]]:
    chance = random.Random(0)
    before = round(share * ROW)

    def some(count: int) -> list[int]:
        return [chance.randrange(1, 1000) for _ in range(count)]

    prompts = [some(before) for _ in range(PROMPTS)]
    return prompts, [[some(ROW - before) for _ in range(ANSWERS)] for _ in prompts]


def _passed(trained: Any, hidden: Any, dtype: str) -> passes.Pass:
    losses: list[float] = []
    direction = torch.randn(512, generator=torch.Generator().manual_seed(0))

    def run() -> None:
        trained.zero_grad()
        with fast_float32():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                found = hidden().float()
            loss = (found @ direction).square().mean()
            loss.backward()
        losses.append(loss.item())

    return passes.Pass(run, lambda: models.figures(losses[-1], trained.parameters()))


def shared(share: float, dtype: str) -> passes.Pass:
    trained, (prompts, answers) = model(), ids(share)
    return _passed(trained, lambda: grouped_hidden(trained, prompts, answers).hidden, dtype)


def rows(share: float, dtype: str) -> passes.Pass:
    trained, (prompts, answers) = model(), ids(share)
    body: LlamaModel = trained.model
    whole = torch.tensor(
        [prompt + answer for prompt, own in zip(prompts, answers, strict=True) for answer in own]
    )
    before = len(prompts[0])

    def hidden() -> torch.Tensor:
        found = body(input_ids=whole, use_cache=False).last_hidden_state
        return found[:, before - 1 : -1].flatten(0, 1)

    return _passed(trained, hidden, dtype)


def token_ratio(share: float) -> float:
    before = round(share * ROW)
    return ANSWERS * ROW / (before + ANSWERS * (ROW - before))


def tables(settings: passes.Settings) -> Iterator[passes.Table]:
    for dtype, tolerance in (("bfloat16", 0.05), ("float32", 1e-3)):
        for share in SHARES:
            of = {"share": share, "dtype": dtype}
            ratio = token_ratio(share)
            yield passes.compare(
                f"a prompt shared by two answers, {dtype}: 4 layers, hidden 512, no head; prompts "
                f"of {round(share * ROW)} tokens, answers of {ROW - round(share * ROW)}; "
                f"{ratio:.2f}× by tokens{', too little to share it' if ratio < WORTH else ''}",
                {"shared": (shared, of), "two rows": (rows, of)},
                baseline="shared",
                agree={"loss": tolerance, "grad_norm": tolerance},
                settings=settings,
                quoted={"two rows": "shared"} if share in QUOTED else None,
            )


if __name__ == "__main__":
    passes.main(tables)
