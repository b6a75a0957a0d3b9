"""Passes of prompts and completions through the body of a model, with gradient.

Shared: prompts go through into a cache of keys and values, and completions on top of it. Keys of a
token do not hang on what follows it, so the hidden states are those of whole rows, and so are the
gradients. Whole: each row by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kernels.buckets import buckets
from kernels.causal import fixed_positions

Ids = Sequence[int]


def shared(
    body: Any,
    prompts: Sequence[Ids],
    flat: Sequence[Ids],
    owner: Sequence[int],
    device: Any,
    budget: int | None = None,
    most: int | None = None,
) -> Tensor:
    cache = new_cache(body.config)
    # No mask: padding is on the right, where a causal model does not look.
    prompts_PT = padded(prompts, device)
    longest = prompts_PT.shape[1]
    with small_attention(device, longest, longest):
        prompt_PTH = body(
            input_ids=prompts_PT, past_key_values=cache, use_cache=True
        ).last_hidden_state
    lengths_P = torch.tensor([len(ids) for ids in prompts], device=device)
    places_P = torch.arange(len(prompts), device=device)
    found = [prompt_PTH[places_P, lengths_P - 1]]
    rows = [[place] for place in owner]
    filled = len(prompts)
    for numbers in _cut([longest + len(ids) - 1 for ids in flat], budget, most):
        tails_ST = padded([flat[number][:-1] for number in numbers], device)
        room = tails_ST.shape[1]
        if not room:
            continue
        owner_S = torch.tensor([owner[number] for number in numbers], device=device)
        before_S1 = lengths_P[owner_S][:, None]
        steps_T = torch.arange(room, device=device)
        # Padding stands where its row's last token does: the model may have no later positions.
        last_S1 = torch.tensor([[len(flat[number]) - 2] for number in numbers], device=device)
        steps_ST = torch.minimum(steps_T, last_S1.clamp(min=0))
        seen_ST = torch.ones(len(numbers), longest + room, dtype=torch.int64, device=device)
        seen_ST[:, :longest] = torch.arange(longest, device=device) < before_S1
        with small_attention(device, room, longest + room):
            tails_STH = body(
                input_ids=tails_ST,
                attention_mask=seen_ST,
                position_ids=before_S1 + steps_ST,
                past_key_values=_of_rows(cache, owner_S),
                use_cache=True,
            ).last_hidden_state
        found.append(tails_STH.flatten(0, 1))
        for number in numbers:
            rows[number] += _span(filled, len(flat[number]) - 1)
            filled += room
    return take(torch.cat(found), torch.tensor([*chain(*rows)], device=device))


def _cut(lengths: Sequence[int], budget: int | None, most: int | None) -> list[list[int]]:
    return [list(range(len(lengths)))] if budget is None else buckets(lengths, budget, most=most)


def _of_rows(cache: Any, owner_S: Tensor) -> Any:
    """The cache with row owner_S[s] as its row s; the one that was given stays as it was."""
    of_rows = copy(cache)
    of_rows.layers = [copy(layer) for layer in cache.layers]
    for layer in of_rows.layers:
        layer.keys, layer.values = take(layer.keys, owner_S), take(layer.values, owner_S)
    return of_rows


def whole(
    body: Any,
    prompts: Sequence[Ids],
    flat: Sequence[Ids],
    owner: Sequence[int],
    device: Any,
    budget: int | None = None,
    most: int | None = None,
) -> Tensor:
    whole = [[*prompts[place], *ids[:-1]] for place, ids in zip(owner, flat, strict=True)]
    # What is computed a second time in the backward pass has to be computed in the same way.
    again = body.is_gradient_checkpointing
    found, filled = [], 0
    rows: list[range] = [range(0)] * len(flat)
    batches = _cut([len(ids) for ids in whole], budget, most)
    for numbers in like_positions(body.config, whole, batches):
        ids_ST = padded([whole[number] for number in numbers], device)
        longest = ids_ST.shape[1]
        with nullcontext() if again else small_attention(device, longest, longest):
            found.append(body(input_ids=ids_ST, use_cache=False).last_hidden_state.flatten(0, 1))
        for number in numbers:
            rows[number] = _span(filled + len(prompts[owner[number]]) - 1, len(flat[number]))
            filled += longest
    return take(torch.cat(found), torch.tensor([*chain(*rows)], device=device))


def like_positions(
    config: Any, rows: Sequence[Ids], batches: Sequence[list[int]]
) -> Iterator[list[int]]:
    """The batches, cut where a short row would get other positions beside a long one than alone."""
    limit = fixed_positions(config)
    for batch in batches:
        for long in (False, True):
            if some := [n for n in batch if (limit is not None and len(rows[n]) > limit) == long]:
                yield some


def rounded(
    prompts: Sequence[Ids], flat: Sequence[Ids], owner: Sequence[int], device: Any
) -> tuple[Sequence[Ids], Sequence[Ids], Sequence[int]]:
    """The same with rows that nobody asked for at the end, so that products have few shapes.

    oneDNN compiles kernels for each shape that it meets, in some milliseconds, and keeps them. With
    as many rows as a step happens to have, that took a fifth of the time and 200 MiB of a training
    with small steps.
    """
    if device.type != "cpu":
        return prompts, flat, owner
    more = _missing(len(flat))
    return (
        [*prompts, *[[0]] * _missing(len(prompts))],
        [*flat, *[[0]] * more],
        [*owner, *[0] * more],
    )


def _missing(rows: int) -> int:
    """Up to the next number of three binary digits and zeros."""
    return -rows % (1 << max(0, rows.bit_length() - 3))


def take(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index] along the first dimension, the gradient of which adds up in a fixed order."""
    # Of index_select the gradient is added up with atomics on a GPU; that of indexing is sorted
    # first, which on a CPU, where there is one thread to add, is only slower.
    return rows.index_select(0, index) if rows.device.type == "cpu" else rows[index]


def new_cache(config: Any) -> Any:
    """An empty cache, as models of this configuration make it."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _span(first: int, count: int) -> range:
    return range(first, first + count)


def padded(rows: Sequence[Ids], device: Any) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


@contextmanager
def small_attention(device: Any, queries: int, keys: int) -> Iterator[None]:
    """Attention by plain products where torch's fused kernel for the CPU is the slower one.

    That multiplies head by head, in oneDNN's kernels when products are bfloat16 or float32 at its
    fastest, and what it costs to begin one is then most of the time. Measured, forward and
    backward: 7 queries on 31 keys 7 to 25 times slower, 64 on 192 up to 2.5 times, 256 on 256 the
    same. The scores are kept for the backward pass, so keys are bounded too. The setting is the
    whole process's; blocks may overlap in several threads.
    """
    small = torch.device(device).type == "cpu" and queries * keys <= 2**14 and keys <= 512
    if small:
        _unfuse(1)
    try:
        yield
    finally:
        if small:
            _unfuse(-1)


_lock = threading.Lock()
_unfused = 0
_fused_before = True


def _unfuse(more: int) -> None:
    global _unfused, _fused_before
    with _lock:
        if not _unfused:
            _fused_before = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
        _unfused += more
        # It is named for CUDA, and the CPU's fused kernel goes by it too.
        torch.backends.cuda.enable_flash_sdp(_fused_before and not _unfused)
