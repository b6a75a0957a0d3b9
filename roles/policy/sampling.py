"""Draw tokens within `generate` of transformers, and see where a completion ends.

Drawing is deterministic: for `generate` around it, decoding is greedy. Models that decoding.py
serves are not drawn from here.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kernels.sampling import sample_with_logprob
from store.records import Sampling


class KeyedDraw:
    """A logits processor for `generate`: draws each row's token and leaves only that one possible.

    After step t, `tokens[t]` and `logprobs[t]` hold the rows' tokens and their raw
    log-probabilities (temperature 1, whole vocabulary, fp32).
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self._seeds = seeds
        self._sampling = sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens_B, logps_B = sample_with_logprob(
            scores,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            top_k=self._sampling.top_k,
            seeds=self._seeds,
            positions=len(self.tokens),
        )
        self.tokens.append(tokens_B)
        self.logprobs.append(logps_B)
        # `generate` hands over a copy, so this may be written in place.
        return scores.fill_(-torch.inf).scatter_(1, tokens_B.unsqueeze(1), 0.0)


class StopStrings:
    """Ends a row whose completion contains a stop string; also a stopping criterion for `generate`.

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
        self._lengths = [0] * rows
        self._finished = [False] * rows
        # Every token that is not special adds at least one byte of text; the four more cover a
        # character begun before the window, and a first token that loses its leading space.
        self._window = max(len(string.encode()) for string in stop) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        rows = [row for row, finished in enumerate(self._finished) if not finished]
        self.add(rows, input_ids[rows, -1].tolist())
        return torch.tensor(self._finished, device=input_ids.device)

    def add(self, rows: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Which of these rows their next tokens end."""
        ended = []
        for row, token in zip(rows, tokens, strict=True):
            self._lengths[row] += 1
            self._finished[row] = self._ends_with(row, token)
            ended.append(self._finished[row])
        return ended

    def _ends_with(self, row: int, token: int) -> bool:
        if token in self._end_ids:
            return True
        if token in self._silent_ids:
            return False
        written = self._written[row]
        written.append(token)
        tail = self._tokenizer.decode(written[-self._window :], clean_up_tokenization_spaces=False)
        if any(string in tail for string in self._stop):
            self.ends[row] = self._lengths[row]
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
