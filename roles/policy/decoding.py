"""Continue prompts token by token, on models of transformers, reading each prompt once.

Each different prompt of a batch is read once, whatever number of rows continue it, and what all of
them begin with is read once for all. The rows then decode in step: the model's own code runs on
one token a row, with the attention function of attending.py. Rows that have ended leave the batch.
What a model needs for that is in _UNSERVED, and a model is held to its own plain passes, on a few
tokens, before anything is drawn from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kernels.cascade_attention import padding
from kernels.causal import alike, few_ids, fixed_positions
from kernels.matmul import fast_float32
from kernels.sampling import sample_with_logprob
from roles.policy.attending import Calls, Prefix, Tails, Unserved, attending
from roles.policy.sampling import StopStrings
from store.records import Sampling

READ_AT_ONCE = 4096
"""Tokens of prompts, padding included, in one pass; more are no faster, and take more memory."""
_SHARED = 32
"""The fewest tokens at the beginning of all prompts that are read apart from the prompts."""
_FAST_FROM = 4
"""Tokens in a pass from which fast_float32() is faster."""
_SIZES = 8
"""A batch is packed to whole eighths, the last one filled up with rows that have ended: for each
number of rows that it meets, oneDNN compiles kernels, and keeps them."""


class Row(NamedTuple):
    """One completion to draw: what it continues, its noise, and how many tokens it may have."""

    prompt: tuple[int, ...]
    seed: int
    room: int


class Drawn(NamedTuple):
    """A row's tokens up to where it ended, the raw log-probability of each, and up to which token
    a stop string was completed, if one was."""

    tokens: list[int]
    logprobs: list[float]
    stop_end: int | None


def _cache_layers(model: Any) -> list[Any]:
    layers: list[Any] = DynamicCache(config=model.config).layers
    return layers


_UNSERVED: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("it is an encoder and a decoder", lambda model: bool(model.config.is_encoder_decoder)),
    (
        "it keeps more of a text than keys and values, such as a recurrent state",
        lambda model: (
            bool(getattr(model, "_is_stateful", False))
            or not {type(layer) for layer in _cache_layers(model)}
            <= {DynamicLayer, DynamicSlidingWindowLayer}
        ),
    ),
    (
        "its attention is code of its own, not called through transformers' interface",
        lambda model: not model._can_set_attn_implementation(),
    ),
    (
        "it takes no positions of tokens",
        lambda model: not _accepts(model, "position_ids") and not _accepts(model, "kwargs"),
    ),
)
"""Why a model is left to `generate`, and the fact that says so. What no fact says is found by
trying, in Decoder._try."""


def _accepts(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


class Decoder:
    """A model, ready to continue prompts, if it can be.

    read_at_once: tokens of prompts, padding included. unserved: why it cannot, or None.
    """

    def __init__(self, model: Any, *, read_at_once: int = READ_AT_ONCE) -> None:
        self._model = model
        self._read_at_once = read_at_once
        self._keeps = {"logits_to_keep": 1} if _accepts(model, "logits_to_keep") else {}
        self._windows: set[int] = set()
        self._limit = fixed_positions(model.config)
        self.bytes_per_token = 0
        self.unserved = next((why for why, holds in _UNSERVED if holds(model)), None)
        if self.unserved is None:
            try:
                with torch.inference_mode():
                    self._try()
            except Unserved as found:
                self.unserved = str(found)

    def serves(self, tokens: int) -> bool:
        """Whether texts of so many tokens can be decoded: prompt and completion."""
        return self.unserved is None and (self._limit is None or tokens <= self._limit)

    def batches(self, rows: Sequence[Row], most: int, bytes_at_once: int) -> Iterator[list[int]]:
        """Places of rows that decode() takes together: whole prompts, in the order they come in,
        up to `most` rows and so many bytes of keys and values. One prompt is always taken."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row.prompt, []).append(place)
        batch: list[int] = []
        prompts = width = room = 0
        for prompt, its_places in places.items():
            prompts, width = prompts + 1, max(width, len(prompt))
            room = max(room, *(rows[place].room for place in its_places))
            tokens = prompts * width + (len(batch) + len(its_places)) * room
            full = tokens * self.bytes_per_token > bytes_at_once
            if batch and (full or len(batch) + len(its_places) > most):
                yield batch
                batch, prompts, width = [], 1, len(prompt)
                room = max(rows[place].room for place in its_places)
            batch += its_places
        if batch:
            yield batch

    def decode(
        self,
        rows: Sequence[Row],
        sampling: Sampling,
        *,
        end_ids: Sequence[int],
        stops: StopStrings | None = None,
        most: int,
        bytes_at_once: int,
    ) -> list[Drawn]:
        """The rows' completions, in order; prompts are read once, then rows go `most` at a time.

        stops: of these rows, or None. Raises FloatingPointError for logits that are no numbers.
        """
        prompts = list(dict.fromkeys(row.prompt for row in rows))
        number = {prompt: group for group, prompt in enumerate(prompts)}
        groups_N = np.array([number[row.prompt] for row in rows])
        order = np.argsort(groups_N, kind="stable")
        room = max(row.room for row in rows)
        most = max(1, min(most, bytes_at_once // max(1, room * self.bytes_per_token)))
        drawn = _Record(rows, end_ids, stops)
        with torch.inference_mode():
            prefix = self._read(prompts, room)
            for start in range(0, len(order), most):
                self._continue(prefix, groups_N, order[start : start + most], sampling, drawn)
        return drawn.all()

    def _continue(
        self,
        prefix: Prefix,
        groups_N: NDArray[np.int64],
        alive: NDArray[np.int64],
        sampling: Sampling,
        drawn: _Record,
    ) -> None:
        """Draw the rows named in `alive`, which come prompt by prompt, to their ends."""
        room = int(drawn.rooms[alive].max())
        grain = max(1, len(alive) // _SIZES)
        tails = Tails(prefix, groups_N[alive], room - 1)
        logits_NV = prefix.logits_GV[torch.from_numpy(groups_N[alive]).to(self._model.device)]
        with attending(self._model, tails.attend):
            for step in range(room):
                tokens_N, logps_N = sample_with_logprob(
                    logits_NV,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    seeds=drawn.seeds[alive],
                    positions=step,
                )
                goes_on = drawn.add(alive, step, tokens_N, logps_N)
                left = int(goes_on.sum())
                if not left:
                    return
                packed = -(-left // grain) * grain
                if packed < len(alive):
                    goes_on[np.flatnonzero(~goes_on)[: packed - left]] = True
                    alive = alive[goes_on]
                    tails.keep(np.flatnonzero(goes_on))
                    tokens_N = tokens_N[torch.from_numpy(goes_on).to(tokens_N.device)]
                # A row that has ended and is still here shall not run past the context.
                at_N = tails.lengths_N + np.minimum(step, drawn.rooms[alive] - 1)
                at_N1 = torch.from_numpy(at_N)[:, None].to(tokens_N.device)
                logits_NV = self._pass(tokens_N[:, None], at_N1, tails.begin_step())

    def _pass(
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

    def _read(self, prompts: Sequence[tuple[int, ...]], room: int) -> Prefix:
        """Keys, values and last logits of different prompts."""
        lengths = [len(prompt) for prompt in prompts]
        common = self._common(prompts, max(lengths) + room)
        shared, device = DynamicCache(), self._model.device
        width = max(lengths) - common
        at_once = max(1, self._read_at_once // width)
        calls = Calls(self._model.config.get_text_config()._attn_implementation)
        layers: list[list[Tensor]] = []
        before: list[tuple[Tensor, Tensor]] | None = None
        logits = []
        with attending(self._model, calls.attend, calls.mask):
            if common:
                ids = torch.tensor([prompts[0][:common]], device=device)
                self._pass(ids, torch.arange(common, device=device)[None], shared)
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
        return self._pass(ids.to(device), positions.to(device), cache, padded)

    def _common(self, prompts: Sequence[tuple[int, ...]], longest: int) -> int:
        """How many tokens all prompts begin with, if it is worth reading them by themselves."""
        if any(window < longest for window in self._windows):
            return 0  # in a window, padding between the common beginning and the rest would count
        low, high = min(prompts), max(prompts)
        most = min(map(len, prompts)) - 1
        same = (n for n in range(most) if low[n] != high[n])
        common = next(same, most)
        return common if len(prompts) > 1 and common >= _SHARED else 0

    def _try(self) -> None:
        """Decode a few tokens and hold the logits to those of plain passes, or raise Unserved."""
        device = self._model.device
        ids = few_ids(self._model, 6)[0].tolist()
        try:
            found, tails = self._tried(ids)
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError) as error:
            raise Unserved(f"its code wants another cache: {error!r}") from error
        for row, first in ((0, 0), (1, 0), (2, 1)):
            wanted_TV = self._model(input_ids=torch.tensor([ids[first:]], device=device)).logits[0]
            for own_NV, wanted_V in zip(found, wanted_TV[3 - first :], strict=True):
                if not alike(wanted_V, own_NV[row]):
                    raise Unserved("its logits come out otherwise than those of a plain pass")
        self.bytes_per_token = sum(
            each.shape[1] * each.shape[3] * each.element_size()
            for keys, values in tails.kept
            for each in (keys, values)
        )
        self._windows = set(tails.windows.values())
        for place, layer in enumerate(_cache_layers(self._model)):
            declared = getattr(layer, "sliding_window", None)
            told = tails.windows.get(place)
            if told != declared:
                # It masks what is far (in chunks, say) and its attention is told nothing of it, or
                # the other way round: up to there it makes no difference.
                bounds = (self._limit, declared, told)
                self._limit = min(bound for bound in bounds if bound is not None)

    def _tried(self, ids: list[int]) -> tuple[list[Tensor], Tails]:
        """The logits behind the last three of six tokens, of two rows, and of one that lacks the
        first token, so that its prompt is padded."""
        prefix = self._read([tuple(ids[:4]), tuple(ids[1:4])], 3)
        groups_N = np.array([0, 0, 1])
        tails = Tails(prefix, groups_N, 2)
        found = [prefix.logits_GV[groups_N]]
        with attending(self._model, tails.attend):
            for step in (0, 1):
                tokens = torch.full((3, 1), ids[4 + step], device=self._model.device)
                at = torch.tensor([[4], [4], [3]], device=self._model.device) + step
                found.append(self._pass(tokens, at, tails.begin_step()))
        return found, tails


class _Record:
    """What has been drawn of each row, and which have ended."""

    def __init__(
        self, rows: Sequence[Row], end_ids: Sequence[int], stops: StopStrings | None
    ) -> None:
        self.seeds = np.array([row.seed % 2**64 for row in rows], dtype=np.uint64)
        self.rooms = np.array([row.room for row in rows])
        shape = (len(rows), int(self.rooms.max()))
        self._tokens_NT = np.zeros(shape, dtype=np.int64)
        self._logps_NT = np.zeros(shape, dtype=np.float32)
        self._lengths_N = np.zeros(len(rows), dtype=np.int64)
        self._ended_N = np.zeros(len(rows), dtype=bool)
        self._end_ids = np.array(end_ids)
        self._stops = stops

    def add(
        self, rows: NDArray[np.int64], step: int, tokens: Tensor, logps: Tensor
    ) -> NDArray[np.bool_]:
        """Write down what was drawn of these rows; which of them go on. Those that had ended are
        left as they were."""
        fresh = ~self._ended_N[rows]
        written = rows[fresh]
        tokens_M = tokens.cpu().numpy()[fresh]
        self._tokens_NT[written, step] = tokens_M
        self._logps_NT[written, step] = logps.cpu().numpy()[fresh]
        self._lengths_N[written] = step + 1
        ended_M = np.isin(tokens_M, self._end_ids) | (self.rooms[written] == step + 1)
        if self._stops is not None:
            ended_M |= self._stops.add(written.tolist(), tokens_M.tolist())
        self._ended_N[written] = ended_M
        return ~self._ended_N[rows]

    def all(self) -> list[Drawn]:
        ends: Sequence[int | None] = [None] * len(self.rooms)
        if self._stops is not None:
            ends = self._stops.ends
        return [
            Drawn(tokens[:length], logps[:length], end)
            for tokens, logps, length, end in zip(
                self._tokens_NT.tolist(),
                self._logps_NT.tolist(),
                self._lengths_N.tolist(),
                ends,
                strict=True,
            )
        ]
