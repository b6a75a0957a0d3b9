"""Draw rows with `generate` of transformers: the road of what decoding.py does not serve.

Drawing is deterministic: for `generate` around it, decoding is greedy. So rows get the tokens that
decoding.py would draw of them, in more time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from kernels.causal import fixed_positions
from kernels.sampling import sample_with_logprob
from roles.policy.rows import Drawn, Row, StopStrings
from store.records import Sampling


def settings(end_ids: Sequence[int], pad_id: int, room: int | None = None) -> Any:
    """What `generate` is told: nothing that would change what is drawn."""
    return GenerationConfig(
        do_sample=False, eos_token_id=list(end_ids), pad_token_id=pad_id, max_new_tokens=room
    )


def batches(model: Any, rows: Sequence[Row], most: int, tokens_at_once: int) -> Iterator[list[int]]:
    """Places of rows that generate() takes together, up to `most` and to so many tokens; one row is
    always taken.

    Rows that the context cuts shorter than others do not share a batch with them: `generate` would
    run them past the context. Nor, where positions turn on the length of a text, do prompts of
    other lengths, for they would turn on that of the longest.
    """
    apart = fixed_positions(model.config) is not None
    alike: dict[tuple[int, int], list[int]] = {}
    for place, row in enumerate(rows):
        alike.setdefault((row.room, len(row.prompt) if apart else 0), []).append(place)
    for (room, _), places in alike.items():
        tokens = room + max(len(rows[place].prompt) for place in places)
        size = max(1, min(most, tokens_at_once // tokens))
        for start in range(0, len(places), size):
            yield places[start : start + size]


def generate(
    model: Any,
    rows: Sequence[Row],
    sampling: Sampling,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    stops: StopStrings | None = None,
) -> list[Drawn]:
    """The rows' completions, in order. All rows have the same room. stops: of these rows."""
    draw = KeyedDraw([row.seed for row in rows], sampling)
    with torch.inference_mode():
        model.generate(
            **shared_start(model, [row.prompt for row in rows], pad_id),
            generation_config=settings(end_ids, pad_id, rows[0].room),
            logits_processor=[draw],
            stopping_criteria=[] if stops is None else [stops],
        )
    tokens_BT = torch.stack(draw.tokens, 1).tolist()
    logps_BT = torch.stack(draw.logprobs, 1).tolist()
    drawn = []
    for row, (tokens, logps) in enumerate(zip(tokens_BT, logps_BT, strict=True)):
        # `generate` goes on until the last row of the batch ends.
        stop_end = None if stops is None else stops.ends[row]
        ends = [n for n, token in enumerate(tokens, 1) if token in end_ids]
        end = min([len(tokens), *ends[:1], *([] if stop_end is None else [stop_end])])
        drawn.append(Drawn(tokens[:end], logps[:end], stop_end))
    return drawn


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
