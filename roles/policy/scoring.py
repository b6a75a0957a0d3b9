"""Log-probabilities of completions, each prompt read once for all the completions it has.

Prompts of like length pass through the model together and leave their keys and values; their
completions follow in buckets of like length. Only what predicts a completion's token reaches the
head, and of the logits there is never more than a tile at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from kernels.buckets import buckets
from kernels.causal import Head, read_head
from kernels.grouped_hidden import grouped_hidden
from kernels.head import MAX_BYTES
from kernels.linear_logprob import linear_logprob
from kernels.matmul import fast_float32
from kernels.passes import like_positions
from roles.policy.rows import Ids

Pair = tuple[Ids, Ids]
"""A prompt and one of its completions."""

TOKENS_ON_CPU, TOKENS = 4096, 16384
"""On a CPU more are slower: what a layer hands to the next one no longer fits into its caches."""


def token_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    rows: int,
    tokens: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> list[list[float]]:
    """log p(completion[t] | prompt, completion[:t]) of each token t, in nats.

    completions[n] follows prompts[n]. A completion without tokens has no log-probabilities.
    rows, tokens: how many pass at once, at most, padding and what is kept of their prompts
    included; a longer completion passes alone. tokens: None is what suits the device. max_bytes: of
    logits that are held at once.
    What is given twice passes once. So where the model's dropout is on, the completions of a prompt
    share what is dropped of it, and equal completions have equal values; each value is still a draw
    from the distribution that it has alone.
    """
    pairs = [(tuple(a), tuple(b)) for a, b in zip(prompts, completions, strict=True)]
    asked: dict[Ids, list[Ids]] = {}
    for prompt, completion in dict.fromkeys(pairs):
        if completion:
            asked.setdefault(prompt, []).append(completion)
    found: dict[Pair, list[float]] = {}
    with torch.inference_mode(), fast_float32():
        head = read_head(model)
        tokens = tokens or at_once(model)
        for batch in batches(asked, tokens, rows):
            if head is None:
                found |= _by_its_own_logits(model, batch, tokens, rows, max_bytes)
            else:
                found |= _by_its_head(model, head, batch, tokens, rows, max_bytes)
    return [found[pair] if pair[1] else [] for pair in pairs]


@contextmanager
def dropout(model: Any, seed: int | None) -> Iterator[None]:
    """The model, which is in eval mode, with its dropout on and drawn from `seed`; None: without.
    Other randomness is left alone."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.train()
        try:
            yield
        finally:
            model.eval()


def at_once(model: Any) -> int:
    """How many tokens to pass through the model together, padding included."""
    return TOKENS_ON_CPU if model.device.type == "cpu" else TOKENS


def batches(
    asked: dict[Ids, list[Ids]], budget: int, rows: int | None = None
) -> Iterator[dict[Ids, list[Ids]]]:
    """Prompts of like length with all their completions, cut where they pass the budget together.

    Of a prompt with one completion nothing is shared, so there the length is that of both. The
    prompts' own padded tokens are within the budget, as in buckets; a longer one comes alone.
    """
    alone = [prompt for prompt, several in asked.items() if len(several) == 1]
    others = [prompt for prompt, several in asked.items() if len(several) > 1]
    tokens = {prompt: len(prompt) + sum(map(len, several)) for prompt, several in asked.items()}
    for prompts, lengths in (
        (alone, [tokens[prompt] for prompt in alone]),
        (others, [len(prompt) for prompt in others]),
    ):
        for bucket in buckets(lengths, budget, most=rows):
            batch: dict[Ids, list[Ids]] = {}
            held = 0
            for prompt in (prompts[place] for place in bucket):
                if batch and held + tokens[prompt] > budget:
                    yield batch
                    batch, held = {}, 0
                batch[prompt] = asked[prompt]
                held += tokens[prompt]
            yield batch


def own_batches(
    model: Any, rows: Sequence[Ids], budget: int, max_bytes: int, most: int | None = None
) -> Iterator[list[int]]:
    """Places of the rows that pass together through the model's own forward: of like length, and
    at the positions that each has alone. Without a head to read all their logits come along, at
    most float32 and within max_bytes, unless a row alone has more."""
    if read_head(model) is None:
        row_bytes = 4 * model.config.get_text_config().vocab_size
        budget = max(1, min(budget, max_bytes // row_bytes))
    lengths = [len(row) for row in rows]
    return like_positions(model.config, rows, buckets(lengths, budget, most=most))


def _by_its_head(
    model: Any, head: Head, batch: dict[Ids, list[Ids]], tokens: int, rows: int, max_bytes: int
) -> dict[Pair, list[float]]:
    grouped = grouped_hidden(model, list(batch), list(batch.values()), budget=tokens, most=rows)
    logp = linear_logprob(
        grouped.hidden, target=grouped.target, max_bytes=max_bytes, **head._asdict()
    )
    values, ends = logp.tolist(), grouped.cu_seqlens.tolist()
    pairs = [(prompt, completion) for prompt, several in batch.items() for completion in several]
    spans = zip(pairs, pairwise(ends), strict=True)
    return {pair: values[start:end] for pair, (start, end) in spans}


def _by_its_own_logits(
    model: Any, batch: dict[Ids, list[Ids]], tokens: int, rows: int, max_bytes: int
) -> dict[Pair, list[float]]:
    """For a model whose head cannot be multiplied apart from it, as one that is quantised."""
    pairs = [(prompt, completion) for prompt, its in batch.items() for completion in its]
    whole = [(*prompt, *completion) for prompt, completion in pairs]
    found = {}
    for bucket in own_batches(model, whole, tokens, max_bytes, rows):
        ids_BT = torch.zeros(len(bucket), max(len(whole[n]) for n in bucket), dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for row, place in enumerate(bucket):
            ids_BT[row, : len(whole[place])] = torch.tensor(whole[place])
            mask_BT[row, : len(whole[place])] = 1
        ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
        for row, place in enumerate(bucket):
            first = len(pairs[place][0])
            last = len(whole[place])
            logits_TV = logits_BTV[row, first - 1 : last - 1].float()
            chosen_T1 = logits_TV.gather(1, ids_BT[row, first:last, None])
            found[pairs[place]] = (chosen_T1[:, 0] - logits_TV.logsumexp(-1)).tolist()
    return found
