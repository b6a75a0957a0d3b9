"""Examples as the token ids that are trained, and their batches.

Ids go from the record into the tensor: nothing is tokenised, ended or cut on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roles.policy.encoding import prompt_ids
from store.errors import UserError
from store.records import Candidate, Example, Prompt


@dataclass(frozen=True)
class Tokens:
    """A prompt and one completion, as ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    trained: tuple[bool, ...]
    """Which ids of the answer the loss sees: those that its mask does not hide."""

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt + self.answer

    @property
    def length(self) -> int:
        """Prompt and answer, in tokens."""
        return len(self.prompt) + len(self.answer)

    @cached_property
    def tokens(self) -> int:
        """How many the loss sees."""
        return sum(self.trained)


@dataclass(frozen=True)
class Row:
    """One example, encoded."""

    id: int
    weight: float
    chosen: Tokens
    rejected: Tokens | None

    @property
    def sides(self) -> tuple[Tokens, ...]:
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)

    @cached_property
    def length(self) -> int:
        """Of its longer side, with the prompt, in tokens."""
        return max(side.length for side in self.sides)


def encode(tokenizer: Any, examples: Sequence[Example]) -> list[Row]:
    """A row for each example, in order."""
    prompts: dict[str, tuple[int, ...]] = {}
    rows = []
    for example in examples:
        if example.id is None:
            raise ValueError(f"an example is stored before it is trained on: {example}")
        digest = example.prompt.digest
        if digest not in prompts:
            prompts[digest] = _prompt(tokenizer, example.prompt)
        sides = [_tokens(prompts[digest], side) for side in (example.chosen, example.rejected)]
        for side in sides:
            if side is not None and not side.tokens:
                raise UserError(f"example {example.id} has an answer with no token to train on")
        chosen, rejected = sides
        assert chosen is not None
        rows.append(Row(example.id, example.weight, chosen, rejected))
    return rows


def _prompt(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    ids = prompt_ids(tokenizer, prompt)
    if not ids:
        # The first token of a text has nothing before it to be predicted from, so it would be
        # left out of the loss.
        raise UserError(f"the chat template makes no token of the prompt {prompt.messages}")
    return tuple(ids)


def _tokens(prompt: tuple[int, ...], candidate: Candidate | None) -> Tokens | None:
    if candidate is None:
        return None
    mask = candidate.trained_mask
    if mask is None:
        mask = (True,) * len(candidate.token_ids)
    if len(mask) != len(candidate.token_ids):
        raise ValueError(
            f"candidate {candidate.id}: {len(candidate.token_ids)} tokens, a mask of {len(mask)}"
        )
    return Tokens(prompt, tuple(candidate.token_ids), tuple(mask))


def pad(sequences: Sequence[Tokens]) -> dict[str, Tensor]:
    """input_ids, attention_mask and completion_mask [B, T], filled up on the right with 0."""
    shape = (len(sequences), max(sequence.length for sequence in sequences))
    ids, seen, trained = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    for index, sequence in enumerate(sequences):
        ids[index, : sequence.length] = sequence.ids
        seen[index, : sequence.length] = 1
        trained[index, len(sequence.prompt) : sequence.length] = sequence.trained
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(seen),
        "completion_mask": torch.from_numpy(trained),
    }
