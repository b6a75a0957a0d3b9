"""The attention function that models of transformers get while decoding.py runs them.

Keys are taken where attention is called, not where the model caches them, so models may cache what
they like and share it between layers. While prompts are read, the function is the model's own,
which is listened to (reading.py); while rows decode, one token each, it adds the prompts' keys to
the rows' own (kernels.cascade_attention).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin

from kernels.cascade_attention import Slots, cascade_attention

# What an attention function may be told beside queries, keys and values, and need not hear.
_UNHEARD = {
    "cache_position",
    "dropout",
    "is_causal",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}


class Unheard(Exception):
    """What attention was told that is not among what it hears here."""


@dataclass
class Prefix:
    """What was read of G prompts. Padding is on the left: a window then is the same slice of all.

    layers: keys and values [G, Hkv, P, D] of each layer. bias_GP: None where nothing is padded.
    shared: of each layer, [Hkv, C, D] that comes before all of them.
    """

    layers: list[list[Tensor]]
    bias_GP: Tensor | None
    lengths_G: NDArray[np.int64]
    shared: list[tuple[Tensor, Tensor]] | None
    logits_GV: Tensor

    def keep(self, groups: NDArray[np.int64]) -> None:
        """Only these prompts are still needed."""
        if len(groups) == len(self.lengths_G):
            return
        kept = torch.from_numpy(groups).to(self.logits_GV.device)
        for layer in self.layers:  # one by one: little is there twice
            for side, each in enumerate(layer):
                layer[side] = each[kept]
        self.bias_GP = None if self.bias_GP is None else self.bias_GP[kept]
        self.lengths_G = self.lengths_G[groups]
        self.logits_GV = self.logits_GV[kept]

    def copy(self) -> Prefix:
        """One whose prompts can go while these stay."""
        return replace(self, layers=[list(layer) for layer in self.layers])


def place_of(taken: Sequence[tuple[Tensor, Tensor]], key: Tensor, value: Tensor) -> int | None:
    """Where these very keys and values are."""
    for place, (its_key, its_value) in enumerate(taken):
        if its_key is key and its_value is value:
            return place
    return None


class _PassedOn(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """A layer of a cache that keeps nothing: attention gets the keys of this token only."""

    is_sliding = False

    def __init__(self, tails: Tails) -> None:
        super().__init__()
        self._tails = tails

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._tails.seen

    def get_max_length(self) -> int:
        return -1


class Tails:
    """The keys and values of rows that decode, behind those of the prompts that they continue,
    which leave `prefix` when their last row has ended.

    kept: keys and values [N, Hkv, room, D] of each call of attention, written in place.
    windows: of the layers whose attention sees no further back.
    """

    def __init__(self, prefix: Prefix, groups_N: NDArray[np.int64], room: int) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.windows: dict[int, int] = {}
        self._room = room
        self._length = 0
        self._before = prefix.layers[0][0].shape[2]
        self._before += prefix.shared[0][0].shape[1] if prefix.shared else 0
        self._now: list[tuple[Tensor, Tensor]] = []
        self._prefix = prefix
        self._set_groups(groups_N)

    @property
    def seen(self) -> int:
        """Tokens before the one that is decoded now."""
        return self._before + self._length - 1

    def cache(self) -> Cache:
        """What to run the model with, the same at every step."""
        # Not kept here: a circle of references would hold the keys until Python looks for circles.
        return Cache(layers=[_PassedOn(self) for _ in self._prefix.layers])

    def begin_step(self) -> None:
        """To be called before the model runs on one more token."""
        self._length += 1
        self._now = []

    def _set_groups(self, groups_N: NDArray[np.int64]) -> None:
        kept, groups_N, counts_G = np.unique(groups_N, return_inverse=True, return_counts=True)
        self._prefix.keep(kept)
        self._groups_N = groups_N
        self.lengths_N = self._prefix.lengths_G[groups_N]
        self._slots: Slots | None = None
        most = int(counts_G.max())
        if int(counts_G.min()) < most:
            first_G = np.cumsum(counts_G) - counts_G
            slot_of_row = groups_N * most + np.arange(len(groups_N)) - first_G[groups_N]
            row_of_slot = np.zeros(len(kept) * most, dtype=np.int64)
            row_of_slot[slot_of_row] = np.arange(len(groups_N))
            device = self._prefix.logits_GV.device
            self._slots = Slots(
                torch.from_numpy(row_of_slot).to(device), torch.from_numpy(slot_of_row).to(device)
            )

    def keep(self, rows: NDArray[np.int64]) -> None:
        """Only these rows go on."""
        self._set_groups(self._groups_N[rows])
        kept = torch.from_numpy(rows).to(self._prefix.logits_GV.device)
        for place, (keys, values) in enumerate(self.kept):  # one by one: little is there twice
            self.kept[place] = (self._packed(keys, kept), self._packed(values, kept))

    def _packed(self, old: Tensor, rows: Tensor) -> Tensor:
        new = old.new_empty(len(rows), *old.shape[1:])
        new[:, :, : self._length] = old[rows, :, : self._length]
        return new

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        s_aux: Tensor | None = None,
        **told: Any,
    ) -> tuple[Tensor, None]:
        """An attention function as transformers calls them: query [N, Hq, 1, D]."""
        said = {name for name in told.keys() - _UNHEARD if told[name] is not None}
        if said or attention_mask is not None:
            raise Unheard(", ".join(said) or "a mask of its own")
        if sliding_window is not None:
            self.windows[module.layer_idx] = sliding_window
        place = self._write(key, value)
        keys, values = self.kept[place]
        k_prefix, v_prefix = self._prefix.layers[place]
        bias, first, shared = self._prefix.bias_GP, 0, None
        if self._prefix.shared is not None:
            shared = self._prefix.shared[place]
        if sliding_window is not None and sliding_window <= self.seen:
            if shared is not None:
                raise RuntimeError("a window ends within what was read for all prompts")
            first = max(0, self._length - sliding_window)
            keys, values = keys[:, :, first:], values[:, :, first:]
            begin = max(0, k_prefix.shape[2] + self._length - sliding_window)
            k_prefix, v_prefix = k_prefix[:, :, begin:], v_prefix[:, :, begin:]
            bias = None if bias is None else bias[:, begin:]
        out = cascade_attention(
            query.squeeze(2),
            k_prefix,
            v_prefix,
            keys,
            values,
            self._length - first,
            scale=scaling,
            softcap=softcap,
            sinks=s_aux,
            prefix_bias=bias,
            slots=self._slots,
            shared=shared,
        )
        return out.unsqueeze(1), None

    def _write(self, key: Tensor, value: Tensor) -> int:
        """Keep this token's keys and values, unless an earlier layer's are these; their place."""
        place = place_of(self._now, key, value)
        if place is not None:
            return place
        self._now.append((key, value))
        place = len(self._now) - 1
        if place == len(self.kept):
            made = (
                each.new_empty(*each.shape[:2], self._room, each.shape[3]) for each in (key, value)
            )
            self.kept.append((next(made), next(made)))
        for into, each in zip(self.kept[place], (key, value), strict=True):
            into[:, :, self._length - 1 : self._length] = each
        return place


@contextmanager
def attending(
    model: Any, attend: Callable[..., Any], mask: Callable[..., Any] | None = None
) -> Iterator[None]:
    """The model with this attention function, and afterwards with its own. mask: what makes its
    masks; None: it gets none."""
    name = f"cascade-{id(attend)}"
    configs = {
        id(config): config
        for module in model.modules()
        if isinstance(config := getattr(module, "config", None), PretrainedConfig)
    }
    before = {place: config._attn_implementation for place, config in configs.items()}

    def heard(module: Any, *given: Any, **told: Any) -> Any:
        # Transformers' call of torch's attention does not cap scores, whatever it is told; rows
        # that decoded with a cap would come from another model than the one that scores them.
        if before.get(id(module.config)) == "sdpa":
            told.pop("softcap", None)
        return attend(module, *given, **told)

    AttentionInterface.register(name, heard)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)
    try:
        for config in configs.values():
            config._attn_implementation_internal = name
        yield
    finally:
        for place, config in configs.items():
            config._attn_implementation_internal = before[place]
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name, None)
