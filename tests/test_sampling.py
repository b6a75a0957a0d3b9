"""One token a row: its distribution, its noise, its log-probability."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kernels import sampling
from kernels.sampling import (
    sample_with_logprob,
    sample_with_logprob_plain,
    uniforms,
    uniforms_at,
)

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_p": 0.8},
    {"top_k": 20},
    {"temperature": 1.4, "top_p": 0.9, "top_k": 40},
]


def drawn_logits(rows: int, vocabulary: int, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + vocabulary)
    return spread * torch.randn(rows, vocabulary, generator=generator)


def kept(logits: np.ndarray, *, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """The exact distribution, token by token."""
    order = np.argsort(-logits)
    share = np.exp((logits - logits.max()) / temperature)
    share[order[top_k:] if top_k else []] = 0
    share /= share.sum()
    before = 0.0
    for token in order:
        if before >= top_p:
            share[token] = 0
        before += share[token]
    return share / share.sum()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("vocabulary", [5, 430, 2049, 5003])
def test_tokens_and_log_probabilities_are_those_of_the_plain_twin(
    vocabulary: int, settings: dict[str, Any]
) -> None:
    logits = drawn_logits(60, vocabulary)
    seeds, positions = range(7, 67), list(range(60))
    found = sample_with_logprob(logits, seeds=seeds, positions=positions, **settings)
    wanted = sample_with_logprob_plain(logits, seeds=seeds, positions=positions, **settings)
    assert torch.equal(found[0], wanted[0])
    assert torch.allclose(found[1], wanted[1], atol=2e-5, rtol=0)
    assert found[1].dtype == torch.float32
    raw = logits.double().log_softmax(-1).gather(1, found[0][:, None])[:, 0]
    assert torch.allclose(found[1].double(), raw, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
        {"temperature": 0.6, "top_p": 1.0, "top_k": 7},
        {"temperature": 1.3, "top_p": 0.7, "top_k": 0},
        {"temperature": 0.8, "top_p": 0.6, "top_k": 12},
    ],
)
@pytest.mark.parametrize("vocabulary", [30, 3000])
def test_draws_follow_the_exact_distribution(vocabulary: int, settings: dict[str, Any]) -> None:
    logits = drawn_logits(1, vocabulary, spread=2.0)
    share = kept(logits[0].double().numpy(), **settings)
    count = 4000
    tokens, _ = sample_with_logprob(
        logits.expand(count, -1), seeds=range(count), positions=3, **settings
    )
    seen = np.bincount(tokens.numpy(), minlength=vocabulary)
    assert not seen[share == 0].any()
    # Rare tokens are counted as one, so that the statistic is chi-square distributed.
    common = count * share >= 5
    seen_of = [*seen[common], seen[~common].sum()]
    share_of = [*share[common], share[~common].sum()]
    cells = [(s, count * p) for s, p in zip(seen_of, share_of, strict=True) if p > 0]
    total = sum((s - e) ** 2 / e for s, e in cells)
    freedom = len(cells) - 1
    assert freedom >= 1
    assert abs(total - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_rows_token_does_not_hang_on_who_shares_its_batch(settings: dict[str, Any]) -> None:
    logits = drawn_logits(700, 3001)
    seeds = [5 * row for row in range(700)]
    together, logps = sample_with_logprob(logits, seeds=seeds, positions=2, **settings)
    for rows in ([0], [699, 3, 77], list(range(100, 300))):
        tokens, its = sample_with_logprob(
            logits[rows], seeds=[seeds[row] for row in rows], positions=[2] * len(rows), **settings
        )
        assert torch.equal(tokens, together[rows])
        assert torch.equal(its, logps[rows])


def test_many_likely_tokens_are_found_beyond_those_that_are_sorted_first() -> None:
    logits = torch.zeros(3, 9000)
    logits[0, :4] = 13.0  # four tokens, then hundreds, then thousands reach p
    logits[1, :700] = 13.0
    tokens = [
        sample_with_logprob(logits, top_p=0.9, seeds=[3 * n, 3 * n + 1, 3 * n + 2], positions=0)[0]
        for n in range(200)
    ]
    seen = torch.stack(tokens)
    assert int(seen[:, 0].max()) < 4
    assert 300 < int(seen[:, 1].max()) < 700
    assert int(seen[:, 2].max()) > 8000


def test_tokens_as_likely_as_the_last_one_kept_stay() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, -3.0]]).expand(400, -1)
    for settings in ({"top_k": 2}, {"top_p": 0.5}):
        tokens, _ = sample_with_logprob(logits, seeds=range(400), positions=0, **settings)
        assert set(tokens.tolist()) == {0, 1, 2, 3}


def test_tokens_that_cannot_be_are_never_drawn_at_either_end() -> None:
    for vocabulary in (12, 4000):
        logits = torch.full((2000, vocabulary), -torch.inf)
        logits[:, 5:7] = 1e4
        tokens, logps = sample_with_logprob(logits, seeds=range(2000), positions=0)
        assert set(tokens.tolist()) == {5, 6}
        assert logps.tolist() == pytest.approx([np.log(0.5)] * 2000)


@pytest.mark.parametrize("temperature", [1e-30, 1e-46])
def test_a_temperature_that_is_all_but_0_takes_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.9]]).repeat(4, 1)
    tokens, _ = sample_with_logprob(
        logits, temperature=temperature, top_p=0.9, seeds=range(4), positions=0
    )
    assert tokens.tolist() == [1] * 4


def test_the_noise_nearest_to_one_still_draws_a_token_that_has_weight() -> None:
    weight = torch.zeros(1, 5000)
    weight[0, 100] = 1.0
    for noise in (0.0, 1 - 2.0**-52):
        token, total = sampling._drawn(weight, np.array([noise]))
        assert (token.item(), total.item()) == (100, 1.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_that_are_no_numbers_are_told_with_their_row(
    bad: float, settings: dict[str, Any]
) -> None:
    logits = drawn_logits(6, 50)
    logits[4, 7] = bad
    with pytest.raises(FloatingPointError, match="NaN or infinity, first in row 4"):
        sample_with_logprob(logits, seeds=range(6), positions=0, **settings)
    with pytest.raises(FloatingPointError, match="row 1"):
        sample_with_logprob(
            torch.full((2, 4), -torch.inf).index_fill(0, torch.tensor([0]), 0.0),
            seeds=[1, 2],
            positions=0,
            **settings,
        )


def test_half_precision_is_widened_before_anything_is_summed() -> None:
    logits = drawn_logits(40, 500).bfloat16()
    found = sample_with_logprob(logits, seeds=range(40), positions=0, temperature=0.9)
    wide = sample_with_logprob(logits.float(), seeds=range(40), positions=0, temperature=0.9)
    assert torch.equal(found[0], wide[0])
    assert torch.equal(found[1], wide[1])


def test_noise_hangs_on_seed_and_position_alone_and_is_what_it_always_was() -> None:
    # Drawn once with an implementation of splitmix64 in Python's own integers.
    def mixed(bits: int) -> int:
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        return bits ^ bits >> 31

    golden = 0x9E3779B97F4A7C15
    seeds = [0, 1, -1, 2**63 - 1, 12345]
    found = uniforms(seeds, 4)
    assert np.array_equal(uniforms(seeds, 2, first=2), found[:, 2:])
    for row, seed in enumerate(seeds):
        for position in range(4):
            start = mixed((seed + golden) % 2**64)
            bits = mixed((start + (position + 1) * golden) % 2**64)
            assert found[row, position] == (bits >> 12) / 2**52
    assert (uniforms_at(seeds, 2) == found[:, 2]).all()
    assert (uniforms_at(seeds, [3, 2, 1, 0, 3]) == found[range(5), [3, 2, 1, 0, 3]]).all()
    with pytest.raises(ValueError, match="5 seeds and 2 positions"):
        uniforms_at(seeds, [1, 2])
