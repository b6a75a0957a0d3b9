"""The model and the pairs that every variant of step.py is given."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import models
import torch

from roles.policy import adapters
from roles.trainers.rows import Row, Tokens


@dataclass(frozen=True)
class Sizes:
    """The tables' own, where nobody asks for others."""

    prompts: int = 4
    pairs: int = 1
    """Of each prompt."""
    prompt: tuple[int, int] = (96, 160)
    """Tokens, from and to."""
    answer: tuple[int, int] = (96, 160)
    vocabulary: int = 32_000
    hidden: int = 512
    layers: int = 4


OWN = Sizes()


def model(seed: int, rank: int = 0, sizes: Sizes = OWN) -> Any:
    made = models.llama(
        vocabulary=sizes.vocabulary,
        hidden=sizes.hidden,
        layers=sizes.layers,
        positions=max(1024, sizes.prompt[1] + sizes.answer[1]),
        seed=seed,
        pad_token_id=0,
    )
    if rank:
        adapters.add(
            made, rank=rank, alpha=2.0 * rank, dropout=0.0, targets="all-linear", seed=seed
        )
    return made


def rows(sizes: Sizes = OWN) -> list[Row]:
    chance = random.Random(0)

    def ids(lengths: tuple[int, int]) -> tuple[int, ...]:
        length = chance.randint(*lengths)
        return tuple(chance.randrange(1, sizes.vocabulary) for _ in range(length))

    found: list[Row] = []
    for _ in range(sizes.prompts):
        prompt = ids(sizes.prompt)
        for _ in range(sizes.pairs):
            chosen, rejected = ids(sizes.answer), ids(sizes.answer)
            sides = [Tokens(prompt, side, (True,) * len(side)) for side in (chosen, rejected)]
            found.append(Row(len(found), 1.0, *sides))
    return found


@dataclass(frozen=True)
class Padded:
    """Sides as rows of one length."""

    ids: torch.Tensor
    there: torch.Tensor
    answers: torch.Tensor
    """Whether a token is of the answer."""

    @classmethod
    def of(cls, sides: Sequence[Tokens]) -> Padded:
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(side.ids) for side in sides], batch_first=True
        )
        place = torch.arange(ids.shape[1])
        ends = torch.tensor([[side.length] for side in sides])
        begins = torch.tensor([[len(side.prompt)] for side in sides])
        return cls(ids, (place < ends).long(), (place >= begins) & (place < ends))

    def hidden(self, model: Any) -> torch.Tensor:
        """Of all tokens but the last, which has no next one."""
        found = model.model(input_ids=self.ids, attention_mask=self.there).last_hidden_state
        return found[:, :-1]  # type: ignore[no-any-return]
