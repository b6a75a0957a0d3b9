"""Which examples make a step, and in which order they pass through the model.

A step's examples are drawn at random. Within it the order means nothing, so where a step is made
of several micro-batches like lengths go together: less of each is padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class Shuffled(Sampler[int]):
    """Places 0..len(lengths)-1 in an order drawn from (seed, epoch), each step's by length.

    lengths: tokens of each example. step: examples of one optimizer step.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int) -> None:
        self._lengths = lengths
        self._step = step
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next order is of; accelerate says so."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        chance = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(len(self._lengths), generator=chance).tolist()
        for first in range(0, len(order), self._step):
            yield from sorted(order[first : first + self._step], key=self._lengths.__getitem__)
