"""Hidden states of completions, each prompt passing through the model once for all of them.

A model that keeps another cache than keys and values, or that has to compute activations twice,
gets whole rows, and so do completions that share too little.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.causal import backbone, bare
from kernels.passes import Ids, rounded, shared, whole
from kernels.sharing import shared_room

WORTH = 1.15
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
        rows = (prompt_ids, flat, owner) if budget else rounded(prompt_ids, flat, owner, device)
        hidden = shared(backbone(model), *rows, device, budget, most)[: len(target)]
    else:
        hidden = whole(backbone(model), prompt_ids, flat, owner, device, budget, most)
    return Grouped(hidden, target, torch.tensor([0, *accumulate(map(len, flat))]))


def _pays(prompts: Sequence[Ids], flat: Sequence[Ids], owner: Sequence[int]) -> bool:
    own = sum(len(ids) - 1 for ids in flat)
    whole = own + sum(len(prompts[place]) for place in owner)
    return whole >= WORTH * (own + sum(map(len, prompts)))


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
