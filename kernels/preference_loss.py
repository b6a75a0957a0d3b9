"""The loss on preference pairs, straight from hidden states.

The loss of a pair needs no other pair, so its gradient can be made as soon as its logits are there:
they are never kept until the backward, nor made a second time for it, where a pair fits in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.fold_torch import Running, Scale
from kernels.head import (
    MAX_BYTES,
    Gradients,
    TiledHead,
    check,
    compute_dtype,
    seen,
    spans,
    tile_shape,
)
from kernels.linear_logprob import TokenStats, linear_logprob_stats, linear_logprob_twin
from kernels.preference_terms import Terms, checked_bounds, sums


class PreferenceLoss(NamedTuple):
    """What preference_loss returns; only `loss` has a gradient."""

    loss: Tensor
    logp: Tensor
    """[2B]: log p(completion), the sum over its tokens."""
    reward: Tensor
    """[2B]: beta (logp - ref_logp) + length_alpha tokens."""
    margin: Tensor
    """[B]: the chosen reward minus the rejected one."""
    stats: TokenStats
    """[N] each, with logp whatever was asked for."""
    unweighted: Tensor
    """The loss with all pair weights 1."""


def preference_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    ref_logp: Tensor,
    *,
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
    pair_weight: Tensor | None = None,
    length_alpha: float = 0.0,
    nll_alpha: float = 0.0,
    nll: Literal["sequence", "token"] = "sequence",
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    stats: Collection[str] = (),
    max_bytes: int = MAX_BYTES,
    pairs: float | None = None,
    nll_tokens: float | None = None,
) -> PreferenceLoss:
    """The weighted mean over pairs of a preference loss, and what a trainer reports beside it.

    hidden [N, H], weight [V, H], target [N], bias, softcap and temperature are as in
    linear_logprob. Rows cu_seqlens[s] to cu_seqlens[s+1] are completion s: the chosen and the
    rejected one of pair 0, those of pair 1, and so on; cu_seqlens [2B+1], ref_logp [2B],
    pair_weight [B]. With logp_s the sum of a completion's log-probabilities, n_s its tokens and
    r_s = logp_s - ref_logp_s, the loss of a pair (c, r) is, of

        x = beta (r_c - r_r) + length_alpha (n_c - n_r),

        sigmoid       -log sigmoid(x): https://arxiv.org/abs/2305.18290, equation 7; with
                      length_alpha https://arxiv.org/abs/2403.19159, which subtracts it from the
                      implicit reward of each token
        hinge         max(0, 1 - x): https://arxiv.org/abs/2309.06657
        robust        (s log sigmoid(-x) - (1 - s) log sigmoid(x)) / (1 - 2 s), s = label_smoothing:
                      https://arxiv.org/abs/2403.00409
        ipo           (r_c / n_c - r_r / n_r - 1 / (2 beta))^2: https://arxiv.org/abs/2310.12036,
                      equation 17
        sigmoid_norm  -log sigmoid(beta (r_c / n_c - r_r / n_r)):
                      https://arxiv.org/abs/2411.15124, the length-normalised DPO of Tülu 3

    each as DPOTrainer has it (trl/trainer/dpo_trainer.py, `_compute_loss`). nll_alpha adds the
    chosen completions' negative log-likelihood: "sequence" is the mean over pairs of -logp_c / n_c
    (https://arxiv.org/abs/2404.19733, equation 1), "token" the sum of -logp_c over `nll_tokens`.
    A pair's weight multiplies all of its part, in value and gradient. Means are over `pairs`, B
    unless told, and over `nll_tokens`, all chosen tokens unless told, so that a step can be made of
    several calls.

    The head is gone over three times in a training step (twice where it has no gradient), with
    tiles of whole pairs within `max_bytes`; four times for a pair that alone does not fit. In
    float16, where a gradient has to be scaled before it is made, or where not even one row of
    logits fits, linear_logprob does it all, in four.

    Raises ValueError as linear_logprob does, for a completion without tokens, for numbers that do
    not go together, and for an option that `kind` does not heed.
    """
    check(hidden, weight, target, bias, temperature, softcap, max_bytes, stats)
    bounds = checked_bounds(len(hidden), cu_seqlens, ref_logp, pair_weight)
    lengths = [stop - start for start, stop in pairwise(bounds)]
    terms = Terms.of(
        lengths,
        kind=kind,
        beta=beta,
        label_smoothing=label_smoothing,
        length_alpha=length_alpha,
        nll_alpha=nll_alpha,
        nll=nll,
        pairs=pairs,
        nll_tokens=nll_tokens,
    )
    dtype = compute_dtype(hidden)
    most, columns = tile_shape(len(hidden), len(weight), dtype, max_bytes)
    longest = max(bounds[each + 2] - bounds[each] for each in range(0, len(lengths), 2))
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    # With a frozen head linear_logprob takes two passes whatever fits.
    if columns < len(weight) or dtype == torch.float16 or (frozen and longest > most):
        found = linear_logprob_stats(
            hidden,
            weight,
            target,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            max_bytes=max_bytes,
            stats=stats,
        )
        return _of_tokens(found, terms, lengths, ref_logp, pair_weight)
    loss, unweighted, logp_S, reward_S, *tokens = _PreferenceLoss.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
        target,
        ref_logp.detach(),
        None if pair_weight is None else pair_weight.detach(),
        bounds,
        terms,
        Scale(temperature, softcap),
        max_bytes,
        tuple(stats),
        torch.is_grad_enabled(),  # inside a Function it is always off
        dtype,
    )
    margin_B = reward_S[0::2] - reward_S[1::2]
    return PreferenceLoss(loss, logp_S, reward_S, margin_B, TokenStats(*tokens), unweighted)


def preference_loss_twin(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    ref_logp: Tensor,
    *,
    pair_weight: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    stats: Collection[str] = (),
    **terms: Any,
) -> PreferenceLoss:
    """The same from all logits, by autograd. terms: kind, beta and so on, as Terms.of takes."""
    check(hidden, weight, target, bias, temperature, softcap, MAX_BYTES, stats)
    bounds = checked_bounds(len(hidden), cu_seqlens, ref_logp, pair_weight)
    lengths = [stop - start for start, stop in pairwise(bounds)]
    found = linear_logprob_twin(
        hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap, stats=stats
    )
    return _of_tokens(found, Terms.of(lengths, **terms), lengths, ref_logp, pair_weight)


def _of_tokens(
    found: TokenStats,
    terms: Terms,
    lengths: Sequence[int],
    ref_logp: Tensor,
    pair_weight: Tensor | None,
) -> PreferenceLoss:
    logp_S = sums(found.logp, lengths)
    ref_S, tokens_S = ref_logp.detach().to(logp_S), logp_S.new_tensor(lengths)
    loss_B = terms.losses(logp_S, ref_S, tokens_S)
    weighted_B = loss_B if pair_weight is None else loss_B * pair_weight.detach().to(loss_B)
    reward_S = terms.rewards(logp_S.detach(), ref_S, tokens_S)
    return PreferenceLoss(
        weighted_B.sum(),
        logp_S.detach(),
        reward_S,
        reward_S[0::2] - reward_S[1::2],
        found._replace(logp=found.logp.detach()),
        loss_B.sum().detach(),
    )


class _PreferenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ref_logp: Tensor,
        pair_weight: Tensor | None,
        bounds: list[int],
        terms: Terms,
        scale: Scale,
        max_bytes: int,
        stats: tuple[str, ...],
        train: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, ...]:
        head = TiledHead.of(weight, bias, dtype, scale, max_bytes)
        states = hidden.detach().to(dtype)
        most, columns = head.shape(len(hidden))
        chunks = list(_chunks(bounds, most))
        longest = max(bounds[last] - bounds[first] for first, last in chunks)
        buffer = head.tile(min(longest, most), columns)
        running = Running.start(buffer, len(hidden), stats)
        ref_S = ref_logp.to(running.max)
        weight_B = None if pair_weight is None else pair_weight.to(ref_S)
        needed = tuple(train and each for each in ctx.needs_input_grad[:3])
        grads = Gradients(head, states, needed, len(buffer) == len(hidden))
        loss = unweighted = ref_S.new_zeros(())
        logps, rewards = [], []
        for first, last in chunks:
            start, stop = bounds[first], bounds[last]
            tiles = [(start + low, start + high) for low, high in spans(stop - start, most)]
            for low, high in tiles:
                known = running.rows(low, high)
                made = head.folded(states[low:high], target[low:high], 0, known, buffer)
            lengths = [bounds[each + 1] - bounds[each] for each in range(first, last)]
            tokens_S = ref_S.new_tensor(lengths)
            logp_S = sums(running.rows(start, stop).logp, lengths)
            with torch.enable_grad():
                logp_S.requires_grad_()
                loss_B = terms.losses(logp_S, ref_S[first:last], tokens_S)
                of_pairs = slice(first // 2, last // 2)
                weighted = (loss_B if weight_B is None else loss_B * weight_B[of_pairs]).sum()
            if any(needed):
                (grad_S,) = torch.autograd.grad(weighted, logp_S)
                of_rows = grad_S.repeat_interleave(torch.tensor(lengths, device=grad_S.device))
                for low, high in tiles:
                    part, grad = states[low:high], of_rows[low - start : high - start]
                    if len(tiles) > 1:
                        made = head.logits(part, 0, buffer)
                    norm = running.rows(low, high).norm
                    head.unfolded(made, target[low:high], 0, norm, grad)
                    grads.add_hidden(slice(low, high), made)
                    grads.add_head(part, 0, made)
            loss, unweighted = loss + weighted.detach(), unweighted + loss_B.detach().sum()
            logps.append(logp_S.detach())
            rewards.append(terms.rewards(logps[-1], ref_S[first:last], tokens_S))
        ctx.save_for_backward(*grads.of(hidden, weight, bias))
        found = seen(running, len(weight))
        others = (unweighted, torch.cat(logps), torch.cat(rewards), *found)
        ctx.mark_non_differentiable(*(one for one in others if one is not None))
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # The gradients are handed on as they are where that is right: they are as large as the
        # head, and the engine lets go of what was saved before it adds them up.
        scaled = ctx.saved_tensors
        if grad != 1:
            scaled = tuple(None if one is None else (one * grad).to(one.dtype) for one in scaled)
        return *scaled, *(None,) * 10


def _chunks(bounds: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Completions of whole pairs, [first, last), as many at a time as `most` rows hold."""
    first = 0
    for last in range(2, len(bounds), 2):
        if last > first + 2 and bounds[last] - bounds[first] > most:
            yield first, last - 2
            first = last - 2
    yield first, len(bounds) - 1
