"""Whether a model can pass a prompt once for all its completions, and up to which length."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kernels.causal import alike, backbone, bare, few_ids, fixed_positions, undisturbed
from kernels.passes import new_cache, padded, shared, whole

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
    if fixed_positions(config) is not None:
        return _NEVER
    if config.is_encoder_decoder or not _plain(new_cache(body.config), filled=False):
        return _NEVER
    with undisturbed(model), torch.no_grad():
        ids = few_ids(model, 12)[0].tolist()
        prompts, flat = [ids[:3], ids[3:5]], [ids[5:9], ids[9:10], ids[10:12], ids[4:7]]
        owner = [0, 0, 1, 1]
        rows = whole(body, prompts, flat, owner, model.device)
        cache = new_cache(body.config)
        body(input_ids=padded(prompts, model.device), past_key_values=cache, use_cache=True)
        if not _plain(cache, filled=True):
            return _NEVER
        if not alike(rows, shared(body, prompts, flat, owner, model.device)):
            return _NEVER
    return min([2**31, *_windows(config), *_sliding(cache), *_kept_masks(model)])


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
