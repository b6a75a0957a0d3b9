"""Hidden states of completions, each prompt passing through the model once for all of them.

A prompt goes through the body into a cache of keys and values, with gradient; the completions go
through on top of it. Keys of a token do not hang on what follows it, so the hidden states are those
of whole rows, and so are the gradients. A model that keeps another kind of cache, or that has to
compute activations twice, gets whole rows.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from itertools import accumulate, chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kernels.buckets import buckets
from kernels.causal import alike, backbone, bare, undisturbed

Ids = Sequence[int]

_WORTH = 1.15
"""What sharing has to save, in tokens: it takes a second pass, and copies keys."""


class Grouped(NamedTuple):
    """hidden[n] is what predicts target[n]; completion s has rows cu_seqlens[s]:cu_seqlens[s+1].

    Completions are in order: all of the first prompt, then all of the second, and so on.
    """

    hidden: Tensor
    """[N, H], in the body's dtype, with gradient."""
    target: Tensor
    """[N] int64"""
    cu_seqlens: Tensor
    """[S + 1] int64, on the CPU"""


def grouped_hidden(
    model: Any,
    prompt_ids: Sequence[Ids],
    completions: Sequence[Sequence[Ids]],
    *,
    budget: int | None = None,
    most: int | None = None,
) -> Grouped:
    """The hidden states that predict each completion's tokens after its prompt.

    completions[p] are those of prompt p, one or more. Equal prompts that are given twice pass
    twice, as do equal completions. All prompts pass together, and so do all completions, padded to
    the longest; with a budget, completions pass in buckets of like length, each of at most `most`
    rows and `budget` tokens, what it reads of its prompts included. Where so little is shared that
    it would not pay, whole rows pass.
    Raises ValueError for a prompt or a completion without tokens and a prompt without completions.
    """
    _check(prompt_ids, completions)
    counts = [len(several) for several in completions]
    flat = [ids for several in completions for ids in several]
    owner = [place for place, count in enumerate(counts) for _ in range(count)]
    device = bare(model).device
    target = torch.tensor([token for ids in flat for token in ids], device=device)
    room = max(map(len, prompt_ids)) + max(map(len, flat))
    if _pays(prompt_ids, flat, owner) and room <= shared_room(model):
        rounded = (prompt_ids, flat, owner) if budget else _rounded(prompt_ids, flat, owner, device)
        hidden = _shared(backbone(model), *rounded, device, budget, most)[: len(target)]
    else:
        hidden = _whole(backbone(model), prompt_ids, flat, owner, device, budget, most)
    return Grouped(hidden, target, torch.tensor([0, *accumulate(map(len, flat))]))


def _pays(prompts: Sequence[Ids], flat: Sequence[Ids], owner: Sequence[int]) -> bool:
    own = sum(len(ids) - 1 for ids in flat)
    whole = own + sum(len(prompts[place]) for place in owner)
    return whole >= _WORTH * (own + sum(map(len, prompts)))


def _check(prompt_ids: Sequence[Ids], completions: Sequence[Sequence[Ids]]) -> None:
    if len(prompt_ids) != len(completions) or not prompt_ids:
        raise ValueError(f"{len(prompt_ids)} prompts and {len(completions)} lists of completions")
    for place, (prompt, several) in enumerate(zip(prompt_ids, completions, strict=True)):
        if not len(prompt):
            raise ValueError(f"prompt {place} has no token, so nothing predicts what follows it")
        if not several:
            raise ValueError(f"prompt {place} has no completion")
        for number, ids in enumerate(several):
            if not len(ids):
                raise ValueError(f"completion {number} of prompt {place} has no token")


def _rounded(
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


def _shared(
    body: Any,
    prompts: Sequence[Ids],
    flat: Sequence[Ids],
    owner: Sequence[int],
    device: Any,
    budget: int | None = None,
    most: int | None = None,
) -> Tensor:
    cache = _cache(body.config)
    # No mask: padding is on the right, where a causal model does not look.
    prompts_PT = _padded(prompts, device)
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
        tails_ST = _padded([flat[number][:-1] for number in numbers], device)
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


def _whole(
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
    for numbers in _like_positions(body.config, whole, batches):
        ids_ST = _padded([whole[number] for number in numbers], device)
        longest = ids_ST.shape[1]
        with nullcontext() if again else small_attention(device, longest, longest):
            found.append(body(input_ids=ids_ST, use_cache=False).last_hidden_state.flatten(0, 1))
        for number in numbers:
            rows[number] = _span(filled + len(prompts[owner[number]]) - 1, len(flat[number]))
            filled += longest
    return take(torch.cat(found), torch.tensor([*chain(*rows)], device=device))


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


def _span(first: int, count: int) -> range:
    return range(first, first + count)


def _padded(rows: Sequence[Ids], device: Any) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


# What a model can do.

_NEVER = 0
_room: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def shared_room(model: Any) -> int:
    """Up to how many tokens, prompt and completion together, prompts are shared; 0 is never.

    It is a matter of the model's classes and configuration, held to the model's own whole rows
    once, on a few tokens.
    """
    model = bare(model)
    if model.is_gradient_checkpointing:
        return _NEVER  # its layers leave the cache alone
    if model not in _room:
        _room[model] = _room_of(model)
    return _room[model]


def _room_of(model: Any) -> int:
    body = backbone(model)
    config = model.config.get_text_config()
    takes = inspect.signature(body.forward).parameters
    if not {"past_key_values", "position_ids", "attention_mask", "use_cache"} <= set(takes):
        return _NEVER
    if set(_rope_types(config)) & {"dynamic", "longrope"}:
        return _NEVER  # frequencies hang on the length of the row
    if config.is_encoder_decoder or not _plain(_cache(body.config), filled=False):
        return _NEVER
    with undisturbed(model), torch.no_grad():
        ids = [1 + 7919 * n % (model.get_input_embeddings().weight.shape[0] - 1) for n in range(12)]
        prompts, flat = [ids[:3], ids[3:5]], [ids[5:9], ids[9:10], ids[10:12], ids[4:7]]
        owner = [0, 0, 1, 1]
        whole = _whole(body, prompts, flat, owner, model.device)
        cache = _cache(body.config)
        body(input_ids=_padded(prompts, model.device), past_key_values=cache, use_cache=True)
        if not _plain(cache, filled=True):
            return _NEVER
        if not alike(whole, _shared(body, prompts, flat, owner, model.device)):
            return _NEVER
    return min([2**31, *_windows(config), *_sliding(cache), *_kept_masks(model)])


def _cache(config: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _plain(cache: Any, *, filled: bool) -> bool:
    """Whether the cache is keys and values of each token, and nothing else."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    plain = all(type(each) in (DynamicLayer, DynamicSlidingWindowLayer) for each in cache.layers)
    return plain and (
        not filled or (bool(cache.layers) and all(_full(each) for each in cache.layers))
    )


def _full(layer: Any) -> bool:
    return bool(layer.is_initialized) and layer.keys.shape[-2] == 3


def _sliding(cache: Any) -> Iterator[int]:
    # A window counts places in the cache, where a shorter prompt has padding behind it.
    return (layer.sliding_window for layer in cache.layers if layer.is_sliding)


def _kept_masks(model: Any) -> Iterator[int]:
    # A causal mask that is as wide as the context, and no wider where the longest prompt is not
    # that of the longest completion.
    for each in model.buffers():
        if each.dtype is torch.bool and each.dim() >= 2 and each.shape[-1] == each.shape[-2]:
            yield each.shape[-1]


def _windows(config: Any) -> list[int]:
    """Of attention that is local by a mask of the model's own, which its cache does not tell."""
    found = getattr(config, "window_size", None)
    return [found] if isinstance(found, int) else []


def _like_positions(
    config: Any, rows: Sequence[Ids], batches: Sequence[list[int]]
) -> Iterator[list[int]]:
    """The batches, cut where a short row would get other positions beside a long one than alone.

    Some rotary embeddings turn otherwise for a whole batch once its longest row passes a length.
    """
    config = config.get_text_config()
    kinds = [each for each in _ropes(config) if each["rope_type"] in ("dynamic", "longrope")]
    if not kinds:
        yield from batches
        return
    stated = [each.get("original_max_position_embeddings") for each in kinds]
    stated += [getattr(config, "original_max_position_embeddings", None)]
    limit = min([*filter(None, stated)], default=config.max_position_embeddings)
    for batch in batches:
        for long in (False, True):
            if some := [number for number in batch if (len(rows[number]) > limit) == long]:
                yield some


def _rope_types(config: Any) -> Iterator[str]:
    return (each["rope_type"] for each in _ropes(config))


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    waiting = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            if isinstance(found.get("rope_type"), str):
                yield found
            waiting += found.values()
