"""Draw one token a row from logits, with noise that only a seed and a position decide.

One number in [0, 1) for each (seed, position), from a hash and not from a stream, picks the token
where the cumulative probabilities pass it. So a row's tokens do not hang on who shares its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

_BLOCK = 256
"""Tokens in a block of the two-level sums."""
_ONE_LEVEL = 2048
"""Up to this vocabulary one cumulative sum is as fast as two levels."""
_AT_ONCE = 2**18
"""How many logits a CPU works on at a time: what is written between then stays in its cache, and
in memory that it has already."""
_LIKELIEST = 256
"""How many of a row's likeliest tokens are sorted before more of them are."""

Seeds = Sequence[int] | NDArray[np.uint64]


def sample_with_logprob(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seeds: Seeds,
    positions: int | Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Each row's token [N] int64, and its raw log-probability [N] float32.

    With q = softmax(logits / temperature) over the tokens that top_k and top_p leave, renormalised,
    and u = uniforms(seed, position): the first token, in the order of the vocabulary, at which the
    sum of q passes u. Sums are in float64, so that neither the noise nor the choice hangs on the
    batch. Raw is: at temperature 1 over the whole vocabulary, log softmax(logits)[token].

    logits: [N, V], -inf where a token cannot be. temperature: 0 takes the likeliest token, and
    needs no noise. top_k: the k likeliest, 0 all. top_p: of those the likeliest until their sum
    reaches p. Tokens as likely as the last that stays stay too. seeds: [N]. positions: [N], or one
    for all.
    Raises FloatingPointError for a row with NaN or +inf in it, or with nothing but -inf.
    Source: top_p is nucleus sampling, https://arxiv.org/abs/1904.09751, section 3.1.
    """
    noise_N = None if temperature == 0 else uniforms_at(seeds, positions)
    return sample_by_noise(logits, noise_N, temperature=temperature, top_p=top_p, top_k=top_k)


def sample_by_noise(
    logits: Tensor,
    noise: NDArray[np.float64] | None,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """The same where u is known: noise [N], or None at temperature 0.

    For who draws many tokens a row: uniforms() makes the noise of many positions at once.
    """
    rows = len(logits)
    if logits.device.type == "cpu":
        rows = max(1, _AT_ONCE // logits.shape[1])
    if rows >= len(logits):
        token_N, logp_N = _sampled(logits, noise, temperature, top_p, top_k)
    else:
        found = [
            _sampled(
                logits[start : start + rows],
                None if noise is None else noise[start : start + rows],
                temperature,
                top_p,
                top_k,
            )
            for start in range(0, len(logits), rows)
        ]
        token_N, logp_N = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not bool(logp_N.isfinite().all()):
        row = int(logp_N.isfinite().logical_not().nonzero()[0, 0])
        raise FloatingPointError(f"logits of NaN or infinity, first in row {row}")
    return token_N, logp_N


def _sampled(
    logits: Tensor,
    noise_N: NDArray[np.float64] | None,
    temperature: float,
    top_p: float,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    if logits.dtype != torch.float64:
        logits = logits.float()
    highest_N1 = logits.amax(-1, keepdim=True)
    weight_NV = (logits - highest_N1).exp_()
    if noise_N is None:
        sum_N1, token_N1 = _total(weight_NV), logits.argmax(-1, keepdim=True)
    elif temperature == 1 and top_k == 0 and top_p >= 1:
        token_N1, sum_N1 = _drawn(weight_NV, noise_N)
    else:
        sum_N1 = _total(weight_NV)
        # What rounds to 0 in float32 would make 0 / 0 of the likeliest token.
        scaled_NV = (logits - highest_N1).div_(max(temperature, torch.finfo(torch.float32).tiny))
        torch.exp(scaled_NV, out=weight_NV)
        _leave_likeliest(scaled_NV, weight_NV, top_k, top_p)
        token_N1, _ = _drawn(weight_NV, noise_N)
    logp_N1 = logits.gather(1, token_N1) - highest_N1 - sum_N1.log()
    return token_N1.squeeze(1), logp_N1.squeeze(1).float()


def sample_with_logprob_plain(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seeds: Seeds,
    positions: int | Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The same in float64: everything sorted, one cumulative sum over the vocabulary."""
    logits = logits.double()
    logp_NV = logits.log_softmax(-1)
    if temperature == 0:
        token_N1 = logits.argmax(-1, keepdim=True)
    else:
        scaled_NV = logits / temperature
        if top_k > 0:
            least_N1 = scaled_NV.sort(-1, descending=True).values[:, :top_k][:, -1:]
            scaled_NV = scaled_NV.masked_fill(scaled_NV < least_N1, -torch.inf)
        prob_NV = scaled_NV.softmax(-1)
        if top_p < 1:
            sorted_NV = prob_NV.sort(-1, descending=True).values
            kept_N1 = (sorted_NV.cumsum(-1) - sorted_NV < top_p).sum(-1, keepdim=True)
            prob_NV = prob_NV.masked_fill(prob_NV < sorted_NV.gather(1, kept_N1 - 1), 0.0)
        cumulative_NV = prob_NV.cumsum(-1)
        noise_N1 = torch.from_numpy(uniforms_at(seeds, positions)).to(logits.device)[:, None]
        token_N1 = torch.searchsorted(
            cumulative_NV, noise_N1 * cumulative_NV[:, -1:], right=True
        ).clamp_(max=logits.shape[1] - 1)
    return token_N1.squeeze(1), logp_NV.gather(1, token_N1).squeeze(1).float()


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _total(weight_NV: Tensor) -> Tensor:
    return weight_NV.sum(-1, keepdim=True, dtype=_exact(weight_NV.device))


def _drawn(weight_NV: Tensor, noise_N: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """The token at which each row's sum of weights passes noise * total, and the total: [N, 1]."""
    exact = _exact(weight_NV.device)
    noise_N1 = torch.from_numpy(noise_N).unsqueeze(1)
    if exact != torch.float64:  # to which some of the noise rounds up to 1
        noise_N1 = noise_N1.to(exact).clamp_(max=1 - torch.finfo(exact).eps)
    noise_N1 = noise_N1.to(weight_NV.device)
    rows, vocabulary = weight_NV.shape
    if vocabulary <= _ONE_LEVEL:
        cumulative_NV = weight_NV.cumsum(-1, dtype=exact)
        total_N1 = cumulative_NV[:, -1:]
        return _passed(cumulative_NV, noise_N1 * total_N1), total_N1
    weight_NV = torch.nn.functional.pad(weight_NV, (0, -vocabulary % _BLOCK))
    blocks_NKB = weight_NV.view(rows, -1, _BLOCK)
    cumulative_NK = blocks_NKB.sum(-1, dtype=exact).cumsum(-1)
    total_N1 = cumulative_NK[:, -1:]
    threshold_N1 = noise_N1 * total_N1
    block_N1 = _passed(cumulative_NK, threshold_N1)
    before_N1 = cumulative_NK.gather(1, (block_N1 - 1).clamp_(min=0))
    threshold_N1 = threshold_N1 - before_N1.masked_fill_(block_N1 == 0, 0.0)
    inside_NB = blocks_NKB[torch.arange(rows, device=weight_NV.device), block_N1.squeeze(1)]
    return block_N1 * _BLOCK + _passed(inside_NB.cumsum(-1, dtype=exact), threshold_N1), total_N1


def _passed(cumulative_NV: Tensor, threshold_N1: Tensor) -> Tensor:
    """The first place where the sums exceed the threshold, which is one of a weight above 0.

    Rounding may have put the threshold at the last sum; the last place of a weight is meant then.
    """
    found_N1 = torch.searchsorted(cumulative_NV, threshold_N1, right=True)
    last_N1 = torch.searchsorted(cumulative_NV, cumulative_NV[:, -1:].contiguous())
    # Sums of NaN would point past the end; the caller tells them.
    return torch.minimum(found_N1, last_N1).clamp_(max=cumulative_NV.shape[1] - 1)


def _leave_likeliest(scaled_NV: Tensor, weight_NV: Tensor, top_k: int, top_p: float) -> None:
    """Set the weights of all but each row's likeliest to 0. (exp of -inf would be slow.)"""
    vocabulary = scaled_NV.shape[1]
    if 0 < top_k < vocabulary:
        least_N1 = scaled_NV.topk(top_k, -1).values[:, -1:]
        weight_NV.masked_fill_(scaled_NV < least_N1, 0.0)
    if top_p >= 1:
        return
    total_N1 = _total(weight_NV)
    least_N1 = torch.empty_like(scaled_NV[:, :1])
    rows_M = torch.arange(len(scaled_NV), device=scaled_NV.device)
    likeliest = _LIKELIEST
    # What a row gets does not hang on how many of its tokens were sorted for it.
    while len(rows_M):
        count = min(likeliest, vocabulary)
        weight_MV = weight_NV if len(rows_M) == len(scaled_NV) else weight_NV[rows_M]
        place_M1, reached_M = _nucleus(weight_MV.topk(count, -1).values, total_N1[rows_M], top_p)
        least_N1[rows_M] = place_M1
        rows_M = rows_M[~reached_M] if count < vocabulary else rows_M[:0]
        likeliest *= 16
    weight_NV.masked_fill_(weight_NV < least_N1, 0.0)


def _nucleus(sorted_NK: Tensor, total_N1: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The smallest of the largest weights that is left, and whether top_p was reached among these:
    the last whose sum before it is below top_p."""
    cumulative_NK = sorted_NK.cumsum(-1, dtype=total_N1.dtype)
    kept_N1 = (cumulative_NK - sorted_NK < top_p * total_N1).sum(-1, keepdim=True).clamp_(min=1)
    return sorted_NK.gather(1, kept_N1 - 1), cumulative_NK[:, -1] >= top_p * total_N1[:, 0]


def uniforms(seeds: Seeds, positions: int, *, first: int = 0) -> NDArray[np.float64]:
    """Numbers in [0, 1), [len(seeds), positions], each from its seed and position alone.

    first: the first position.
    Source: splitmix64's finaliser (Steele, Lea, Flood 2014). The seed is mixed by itself first:
    otherwise seeds a golden ratio apart would share one sequence, shifted.
    """
    return _noise(
        _bits(seeds)[:, None], np.arange(first, first + positions, dtype=np.uint64)[None, :]
    )


def uniforms_at(seeds: Seeds, positions: int | Sequence[int]) -> NDArray[np.float64]:
    """uniforms() at one position of each seed: [len(seeds)]. positions: [N], or one for all."""
    bits_N = _bits(seeds)
    if not isinstance(positions, int) and len(positions) != len(bits_N):
        raise ValueError(f"{len(bits_N)} seeds and {len(positions)} positions")
    return _noise(bits_N, np.broadcast_to(np.asarray(positions, dtype=np.uint64), bits_N.shape))


def _bits(seeds: Seeds) -> NDArray[np.uint64]:
    if isinstance(seeds, np.ndarray):
        return seeds.astype(np.uint64)
    return np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)


def _noise(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        bits = _mixed(_mixed(seeds + _GOLDEN) + (positions + np.uint64(1)) * _GOLDEN)
    # 52 bits and not 53: u * total then lies below total whatever the rounding.
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
