"""Read prompts, each once, into the keys and values that rows then decode behind.

What all prompts begin with is read once for all of them; the rest of each follows in batches,
padded on the left.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kernels.cascade_attention import padding
from kernels.matmul import fast_float32, plain_float32
from roles.policy.attending import Prefix, attending, place_of

READ_AT_ONCE = 4096
"""Tokens of prompts, padding included, in one pass; more are no faster, and take more memory."""
_SHARED = 32
"""The fewest tokens at the beginning of all prompts that are read apart from the prompts."""
_FAST_FROM = 4
"""Tokens in a pass from which fast_float32() is faster."""


def accepts(model: Any, name: str, *, or_any: bool = False) -> bool:
    """Whether the model's forward has a parameter of this name, or takes any name."""
    found = inspect.signature(model.forward).parameters
    return name in found or (
        or_any and any(each.kind is each.VAR_KEYWORD for each in found.values())
    )


class _Calls:
    """An attention function that does what the model's own does, and takes the keys and values."""

    def __init__(self, implementation: str) -> None:
        self._implementation = implementation
        self._taken: list[tuple[Tensor, Tensor]] = []

    @property
    def mask(self) -> Callable[..., Any] | None:
        found: Callable[..., Any] | None = ALL_MASK_ATTENTION_FUNCTIONS.get(self._implementation)
        return found

    def taken(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, Hkv, T, D] since this was last asked; those that several layers
        share, once."""
        taken, self._taken = self._taken, []
        return taken

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *more: Any, **told: Any
    ) -> Any:
        if place_of(self._taken, key, value) is None:
            self._taken.append((key, value))
        if self._implementation == "eager":
            own = sys.modules[type(module).__module__].eager_attention_forward
        else:
            own = ALL_ATTENTION_FUNCTIONS[self._implementation]
        with plain_float32():
            return own(module, query, key, value, *more, **told)


class Reader:
    """A model that passes tokens behind what it has read. at_once: tokens, padding included."""

    def __init__(self, model: Any, at_once: int = READ_AT_ONCE) -> None:
        self._model = model
        self._at_once = at_once
        self._keeps = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}

    def last_logits(
        self, ids: Tensor, positions: Tensor, cache: Cache, mask: Tensor | None = None
    ) -> Tensor:
        """The logits behind the last token of each row."""
        with fast_float32() if ids.numel() >= _FAST_FROM else nullcontext():
            found = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **self._keeps,
            )
        last: Tensor = found.logits[:, -1]
        return last

    def read(self, prompts: Sequence[tuple[int, ...]], *, share: bool) -> Prefix:
        """Keys, values and last logits of different prompts.

        share: whether what all of them begin with may be read by itself.
        """
        lengths = [len(prompt) for prompt in prompts]
        common = _common(prompts) if share else 0
        shared, device = DynamicCache(), self._model.device
        width = max(lengths) - common
        at_once = max(1, self._at_once // width)
        calls = _Calls(self._model.config.get_text_config()._attn_implementation)
        layers: list[list[Tensor]] = []
        before: list[tuple[Tensor, Tensor]] | None = None
        logits = []
        with attending(self._model, calls.attend, calls.mask):
            if common:
                ids = torch.tensor([prompts[0][:common]], device=device)
                self.last_logits(ids, torch.arange(common, device=device)[None], shared)
                before = [(keys[0], values[0]) for keys, values in calls.taken()]
            for start in range(0, len(prompts), at_once):
                some = [prompt[common:] for prompt in prompts[start : start + at_once]]
                logits.append(self._read_some(some, shared, common))
                for number, found in enumerate(calls.taken()):
                    kept = [each[:, :, common:] for each in found]
                    if at_once >= len(prompts):
                        layers.append([each.contiguous() for each in kept])
                        continue
                    if start == 0:
                        layers.append(
                            [x.new_zeros(len(prompts), x.shape[1], width, x.shape[3]) for x in kept]
                        )
                    for whole, part in zip(layers[number], kept, strict=True):
                        whole[start : start + len(some), :, width - part.shape[2] :] = part
        bias = None
        if min(lengths) < max(lengths):
            own = torch.tensor(lengths, device=device) - common
            bias = padding(own, width, layers[0][0].dtype, left=True)
        return Prefix(layers, bias, np.array(lengths), before, torch.cat(logits))

    def _read_some(self, prompts: Sequence[tuple[int, ...]], shared: Any, common: int) -> Tensor:
        """The last logits of prompts, padded on the left behind what they share."""
        cache = DynamicCache()
        for layer in shared.layers:
            begun = DynamicLayer()
            begun.lazy_initialization(layer.keys, layer.values)
            begun.keys = layer.keys.expand(len(prompts), -1, -1, -1)
            begun.values = layer.values.expand(len(prompts), -1, -1, -1)
            cache.layers.append(begun)
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), prompts[0][0])
        mask = torch.zeros((len(prompts), common + width), dtype=torch.long)
        mask[:, :common] = 1
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, common + width - len(prompt) :] = 1
        positions = (mask.cumsum(-1) - 1)[:, common:].clamp_(min=0)
        device = self._model.device
        padded = None if bool(mask.all()) else mask.to(device)
        return self.last_logits(ids.to(device), positions.to(device), cache, padded)


def _common(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all prompts begin with, if it is worth reading them by themselves."""
    low, high = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    same = (n for n in range(most) if low[n] != high[n])
    common = next(same, most)
    return common if len(prompts) > 1 and common >= _SHARED else 0
