"""Which examples make a step."""

import random

import pytest

from roles.trainers.batches import Shuffled

CHANCE = random.Random(0)
LENGTHS = [CHANCE.randrange(5, 90) for _ in range(103)]


def steps(sampler: Shuffled, size: int) -> list[list[int]]:
    order = list(sampler)
    return [order[first : first + size] for first in range(0, len(order), size)]


@pytest.mark.parametrize("size", [1, 8, 200])
def test_every_example_comes_once_an_epoch_and_like_lengths_are_together(size: int) -> None:
    found = steps(Shuffled(LENGTHS, size, seed=3), size)
    assert sorted(place for step in found for place in step) == list(range(len(LENGTHS)))
    for step in found:
        assert [LENGTHS[place] for place in step] == sorted(LENGTHS[place] for place in step)


def test_which_examples_make_a_step_hangs_on_seed_and_epoch_alone() -> None:
    sampler = Shuffled(LENGTHS, 8, seed=3)
    first = steps(sampler, 8)
    assert steps(sampler, 8) == first
    sampler.set_epoch(1)
    second = steps(sampler, 8)
    assert second != first
    again = Shuffled(LENGTHS, 8, seed=3)
    again.set_epoch(1)
    assert steps(again, 8) == second
    assert steps(Shuffled(LENGTHS, 8, seed=4), 8) != first
    # Not by length over the whole: then a step would be of long answers alone.
    means = [sum(LENGTHS[place] for place in step) / len(step) for step in first]
    assert means != sorted(means)


def test_padding_is_less_than_of_a_step_as_it_was_drawn() -> None:
    order = [place for step in steps(Shuffled(LENGTHS, 1, seed=3), 1) for place in step]
    sorted_by_length = list(Shuffled(LENGTHS, 32, seed=3))
    assert padded(sorted_by_length, 8) < 0.8 * padded(order, 8)


def padded(order: list[int], micro: int) -> int:
    batches = [order[first : first + micro] for first in range(0, len(order), micro)]
    return sum(len(batch) * max(LENGTHS[place] for place in batch) for batch in batches)
