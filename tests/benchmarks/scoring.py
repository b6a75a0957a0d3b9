"""What it takes to score candidates, 8 to a prompt, in ours and in plain ways.

`python tests/benchmarks/scoring.py [--passes N] [--threads N] [--json FILE]`. Plain is what a user
has otherwise: each candidate's row, padded in batches of 8. "In order": as they come, with the
logits of all tokens. "By length": sorted, the prompts' logits left out. Both multiply float32 as
fast as ours does; "in order, as it comes" by torch's default. A title says how many times fewer
tokens pass where each prompt passes once, which is what that alone can win.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import models
import passes

PROMPTS, CANDIDATES = 16, 8
MODEL = {"vocabulary": 8000, "hidden": 256, "layers": 4}
ROWS = 256
"""That ours takes at once."""
BATCH = 8
Rows = list[list[int]]


def drawn(prompt: tuple[int, int], completion: tuple[int, int]) -> tuple[Rows, Rows]:
    """A prompt and a completion for every candidate, of so many tokens, from and to."""
    chance = random.Random(0)

    def ids(tokens: tuple[int, int]) -> list[int]:
        return [chance.randrange(MODEL["vocabulary"]) for _ in range(chance.randint(*tokens))]

    asked = [ids(prompt) for _ in range(PROMPTS)]
    prompts = [each for each in asked for _ in range(CANDIDATES)]
    return prompts, [ids(completion) for _ in prompts]


def model(dtype: str) -> Any:
    import torch

    made = models.llama(**MODEL, positions=1024, intermediate_size=768, num_key_value_heads=2)
    made = made.to(getattr(torch, dtype)).eval()
    return made.cuda() if torch.cuda.is_available() else made


def ours(dtype: str, prompt: tuple[int, int], completion: tuple[int, int]) -> passes.Pass:
    from roles.policy.scoring import token_logprobs

    scored, asked = model(dtype), drawn(prompt, completion)
    found: Rows = []

    def run() -> None:
        found[:] = token_logprobs(scored, *asked, rows=ROWS)

    return passes.Pass(run, lambda: {"logp": [sum(each) for each in found]})


def plain(
    dtype: str, prompt: tuple[int, int], completion: tuple[int, int], *, by_length: bool
) -> passes.Pass:
    scored, (prompts, completions) = model(dtype), drawn(prompt, completion)
    found = [0.0] * len(prompts)

    def run() -> None:
        order = list(range(len(prompts)))
        if by_length:
            order.sort(key=lambda n: len(prompts[n]) + len(completions[n]))
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            of_batch = ([prompts[n] for n in batch], [completions[n] for n in batch])
            for n, logp in zip(batch, logps(scored, *of_batch, keep=by_length), strict=True):
                found[n] = logp

    return passes.Pass(run, lambda: {"logp": found})


def plain_fast(**of: Any) -> passes.Pass:
    return models.fast(plain(**of))


def logps(model: Any, prompts: Rows, completions: Rows, *, keep: bool) -> list[float]:
    """Of each completion, padded to the longest row; keep: only logits from the first completion's
    beginning on."""
    import torch

    rows = [[*a, *b] for a, b in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
    kept = width - min(map(len, prompts)) + 1 if keep else width
    with torch.inference_mode():
        logits_BKV = model(ids_BT, attention_mask=mask_BT, logits_to_keep=kept).logits
        found = []
        for n, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            skipped = width - kept
            logits_TV = logits_BKV[n, len(prompt) - 1 - skipped : len(row) - 1 - skipped].float()
            chosen_T1 = logits_TV.gather(1, ids_BT[n, len(prompt) : len(row), None])
            found.append((chosen_T1[:, 0] - logits_TV.logsumexp(-1)).sum().item())
    return found


def tables(settings: passes.Settings) -> Iterator[passes.Table]:
    for prompt, completion in (((60, 180), (60, 180)), ((80, 240), (20, 60))):
        for dtype in ("float32", "bfloat16"):
            of: dict[str, Any] = {"dtype": dtype, "prompt": prompt, "completion": completion}
            rows = drawn(prompt, completion)
            variants: dict[str, passes.Setup] = {
                "ours": (ours, of),
                "in order": (plain_fast, of | {"by_length": False}),
                "by length": (plain_fast, of | {"by_length": True}),
            }
            if dtype == "float32":
                variants["in order, as it comes"] = (plain, of | {"by_length": False})
            yield passes.compare(
                f"scoring {CANDIDATES} candidates of each of {PROMPTS} prompts, {dtype}: "
                f"{MODEL['layers']} layers, hidden {MODEL['hidden']}, vocabulary "
                f"{MODEL['vocabulary']:,}; prompts of {prompt[0]} to {prompt[1]} tokens, answers "
                f"of {completion[0]} to {completion[1]}; {fewer(*rows):.2f}× by tokens",
                variants,
                baseline="ours",
                agree={"logp": 1e-5 if dtype == "float32" else 2e-2},
                settings=settings,
                quoted={"in order": "ours", "by length": "ours"},
            )


def fewer(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> float:
    answers = sum(map(len, completions))
    return (sum(map(len, prompts)) + answers) / (sum(map(len, prompts[::CANDIDATES])) + answers)


if __name__ == "__main__":
    passes.main(tables)
