"""Rows of unequal length in batches that hold little padding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from kernels.buckets import buckets


def drawn(chance: random.Random) -> tuple[list[int], int, int | None]:
    """Lengths of some shape, a budget and a number of rows."""
    longest = chance.choice([1, 7, 60, 900])
    draw = chance.choice(
        [
            lambda: chance.randint(0, longest),
            lambda: chance.choice([1, longest]),
            lambda: int(chance.lognormvariate(3, 1)),
            lambda: longest,
        ]
    )
    lengths = [draw() for _ in range(chance.choice([0, 1, 5, 40, 300]))]
    return lengths, chance.choice([1, 30, 500, 20_000]), chance.choice([None, 1, 3, 256])


def padded(lengths: Sequence[int], batch: Sequence[int]) -> int:
    return len(batch) * max(lengths[place] for place in batch)


@pytest.mark.parametrize("seed", range(60))
def test_every_place_is_in_one_batch_and_every_batch_is_within_its_bounds(seed: int) -> None:
    lengths, budget, most = drawn(random.Random(seed))
    batches = buckets(lengths, budget, most=most)
    order = [place for batch in batches for place in batch]
    assert order == sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or padded(lengths, batch) <= budget
        assert most is None or len(batch) <= most
        padding = padded(lengths, batch) - sum(lengths[place] for place in batch)
        assert 32 * padding <= budget


@pytest.mark.parametrize("seed", range(60))
def test_no_batch_could_have_taken_the_next_row(seed: int) -> None:
    lengths, budget, most = drawn(random.Random(seed))
    batches = buckets(lengths, budget, most=most)
    for batch, following in pairwise(batches):
        more = [*batch, following[0]]
        padding = padded(lengths, more) - sum(lengths[place] for place in more)
        full = padded(lengths, more) > budget or (most is not None and len(more) > most)
        assert full or 32 * padding > budget


def least_cost(lengths: Sequence[int], budget: int, of_a_pass: float) -> float:
    """Padded tokens and passes of the best way to cut the sorted lengths, by trying all."""
    ordered = sorted(lengths)
    least = [0.0]
    for end in range(1, len(ordered) + 1):
        starts = [s for s in range(end) if (end - s) * ordered[end - 1] <= budget or s == end - 1]
        least.append(min(least[s] + (end - s) * ordered[end - 1] + of_a_pass for s in starts))
    return least[-1]


@pytest.mark.parametrize("count", [16, 64, 400])
def test_tokens_and_passes_are_near_the_least_there_is(count: int) -> None:
    chance, budget = random.Random(count), 16_384
    lengths = [int(chance.lognormvariate(5, 0.6)) + 1 for _ in range(count)]
    batches = buckets(lengths, budget)
    cost = sum(padded(lengths, batch) + budget / 32 for batch in batches)
    assert cost <= 1.06 * least_cost(lengths, budget, budget / 32)
    # Filled to the budget alone, as much as possible of a batch is padding.
    one_pass = count * max(lengths)
    assert count > 64 or cost < 0.9 * one_pass


def test_equal_lengths_fill_the_budget_in_order() -> None:
    assert buckets([5] * 7, 15) == [[0, 1, 2], [3, 4, 5], [6]]
    assert buckets([5] * 7, 1000, most=4) == [[0, 1, 2, 3], [4, 5, 6]]
    assert buckets([0] * 4, 1) == [[0, 1, 2, 3]]


def test_a_row_longer_than_the_budget_is_a_batch_alone() -> None:
    assert buckets([900, 2, 901], 100) == [[1], [0], [2]]


def test_what_cannot_be_is_refused() -> None:
    for lengths, budget, most in (([1], 0, None), ([1], 9, 0), ([3, -1], 9, None)):
        with pytest.raises(ValueError, match=r"at least 1|a row of -1"):
            buckets(lengths, budget, most=most)
