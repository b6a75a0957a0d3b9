"""Draw tokens with noise that only the seed and the position decide, and record what they cost.

One number in [0, 1) for each (seed, position), from a hash and not from a stream, picks the token
where the cumulative probabilities pass it. So a row's tokens do not hang on who shares its batch,
and drawing is deterministic: for the engine around it, decoding is greedy.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    DynamicCache,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from store.records import Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: Sequence[int], positions: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), [len(seeds), positions], each from its seed and position alone.

    Source: splitmix64's finaliser (Steele, Lea, Flood 2014). The seed is mixed by itself first:
    otherwise seeds a golden ratio apart would share one sequence, shifted.
    """
    starts_B = _mixed(np.array([seed % 2**64 for seed in seeds], dtype=np.uint64) + _GOLDEN)
    steps_T = np.arange(1, positions + 1, dtype=np.uint64) * _GOLDEN
    bits_BT = _mixed(starts_B[:, None] + steps_T[None, :])
    # 52 bits and not 53: u * total then lies below total whatever the rounding.
    return (bits_BT >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class KeyedDraw:
    """A logits processor for `generate`: draws each row's token and leaves only that one possible.

    After step t, `tokens[t]` and `logprobs[t]` hold the rows' tokens and their raw
    log-probabilities (temperature 1, whole vocabulary, fp32).
    """

    def __init__(
        self, seeds: Sequence[int], sampling: Sampling, positions: int, device: torch.device
    ) -> None:
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self._greedy = sampling.temperature == 0
        self._warpers: list[Any] = []
        if not self._greedy:
            self._warpers = _warpers(sampling)
            # MPS has no float64.
            self._exact = torch.float32 if device.type == "mps" else torch.float64
            highest = 1 - torch.finfo(self._exact).eps
            noise_BT = torch.from_numpy(uniforms(seeds, positions)).to(self._exact)
            self._noise_TB = noise_BT.clamp_(max=highest).T.contiguous().to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logz_B1 = scores.logsumexp(-1, keepdim=True)
        chosen_B1 = self._choose(input_ids, scores, logz_B1)
        self.tokens.append(chosen_B1.squeeze(1))
        self.logprobs.append((scores.gather(1, chosen_B1) - logz_B1).squeeze(1))
        # `generate` hands over a copy, so this may be written in place.
        return scores.fill_(-torch.inf).scatter_(1, chosen_B1, 0.0)

    def _choose(self, input_ids: Tensor, scores: Tensor, logz_B1: Tensor) -> Tensor:
        if self._greedy:
            return scores.argmax(-1, keepdim=True)
        if self._warpers:
            warped = scores
            for warper in self._warpers:
                warped = warper(input_ids, warped)
            probs = warped.softmax(-1)
        else:
            probs = (scores - logz_B1).exp_()
        cumulative = probs.cumsum(-1, dtype=self._exact)
        threshold_B1 = self._noise_TB[len(self.tokens)].unsqueeze(1) * cumulative[:, -1:]
        # right=True passes over tokens of no probability. The clamp only matters for NaN, which
        # the caller reports once it has the log-probabilities.
        found_B1 = torch.searchsorted(cumulative, threshold_B1, right=True)
        return found_B1.clamp_(max=scores.shape[-1] - 1)


def _warpers(sampling: Sampling) -> list[Any]:
    warpers: list[Any] = []
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


class StopStrings:
    """A stopping criterion for `generate`: ends a row whose completion contains a stop string.

    It reads the completion only, so a stop string in the prompt does not count. `ends[row]` is
    the number of tokens up to and including the one that completed the string, or None.
    transformers' own criterion reads the prompt's end as well and cannot say where it stopped.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str], end_ids: Collection[int], rows: int
    ) -> None:
        self.ends: list[int | None] = [None] * rows
        self._tokenizer = tokenizer
        self._stop = stop
        self._end_ids = frozenset(end_ids)
        self._silent_ids = frozenset(tokenizer.all_special_ids)
        self._written: list[list[int]] = [[] for _ in range(rows)]
        self._finished = [False] * rows
        self._steps = 0
        # Every token that is not special adds at least one byte of text; the four more cover a
        # character begun before the window, and a first token that loses its leading space.
        self._window = max(len(string.encode()) for string in stop) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._steps += 1
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self._finished[row]:
                self._finished[row] = self._ends_with(row, token)
        return torch.tensor(self._finished, device=input_ids.device)

    def _ends_with(self, row: int, token: int) -> bool:
        if token in self._end_ids:
            return True
        if token in self._silent_ids:
            return False
        written = self._written[row]
        written.append(token)
        tail = self._tokenizer.decode(written[-self._window :], clean_up_tokenization_spaces=False)
        if any(string in tail for string in self._stop):
            self.ends[row] = self._steps
            return True
        return False


def shared_start(model: Any, rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Any]:
    """What `generate` is to be called with so that rows which begin equally are read once.

    rows: token ids of each row's prompt. Returns left-padded ids and mask [B, T] and, where it
    saves work, a cache of all but the last token. With n completions of a prompt of P tokens that
    is P - 1 tokens to read in place of n (P - 1), more than what then is sampled of short answers.
    """
    different = list(dict.fromkeys(tuple(row) for row in rows))
    number = {row: n for n, row in enumerate(different)}
    width = max(map(len, different))
    ids = torch.full((len(different), width), pad_id)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(different):
        ids[n, width - len(row) :] = torch.tensor(row)
        mask[n, width - len(row) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    expand = torch.tensor([number[tuple(row)] for row in rows], device=model.device)
    call = {"inputs": ids[expand], "attention_mask": mask[expand]}
    if len(different) < len(rows) and width > 1 and _can_share(model):
        cache = DynamicCache(config=model.config)
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        model(
            ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_select_indices(expand)
        call["past_key_values"] = cache
    return call


def _can_share(model: Any) -> bool:
    """Whether all that the model keeps of a prompt is keys and values."""
    if getattr(model, "_is_stateful", False):
        return False
    accepted = inspect.signature(model.forward).parameters
    if not {"position_ids", "past_key_values", "logits_to_keep"} <= accepted.keys():
        return False
    return all(
        isinstance(layer, DynamicLayer) for layer in DynamicCache(config=model.config).layers
    )
