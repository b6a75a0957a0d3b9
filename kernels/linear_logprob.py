"""Log-probabilities of tokens under a language model's head, without its logits in memory at once.

A tile of logits, as large as the byte budget allows, is made by a product and folded into a few
numbers a row; in the backward it is turned into its own gradient in place.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.fold_torch import Norm, Running, Scale, arithmetic
from kernels.head import MAX_BYTES, STATS, Gradients, TiledHead, check, compute_dtype, seen, spans
from kernels.matmul import product


class TokenStats(NamedTuple):
    """What linear_logprob_stats returns, [N] each; None is not asked for.

    With z a row's logits, softcap and temperature applied, and p = softmax(z).
    """

    logp: Tensor
    """log p(target). The only one with a gradient."""
    entropy: Tensor | None = None
    """-sum p log p, in nats."""
    mean_logit: Tensor | None = None
    """Mean of z over the vocabulary."""
    is_top1: Tensor | None = None
    """Whether the target is the likeliest token, the first where several are; bool."""
    log_sum_sq: Tensor | None = None
    """log sum p^2."""


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """log p(target) of each row: the logp of linear_logprob_stats."""
    return linear_logprob_stats(
        hidden,
        weight,
        target,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        max_bytes=max_bytes,
        stats=(),
    ).logp


def linear_logprob_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    max_bytes: int = MAX_BYTES,
    stats: Collection[str] = STATS,
) -> TokenStats:
    """log p(target) of each row, and what else is asked for in `stats`, without gradient.

        y = hidden weight^T + bias,  z = softcap tanh(y / softcap) / temperature,
        logp_n = z_n[target_n] - log sum_v exp(z_nv)

    hidden [N, H], weight [V, H], bias [V] and target [N] (int64). What is returned is float32, and
    float64 for float64 `hidden`. The product is made in hidden's dtype, under autocast in
    autocast's, and everything after it in float32; gradients of the head are summed in float32.

    Tiles of logits take `max_bytes` at most, beside which there are the gradients themselves and,
    under autocast, a copy of the head in autocast's dtype, made in each forward and backward. A
    training step goes over the head four times; three times where all logits fit into max_bytes,
    since they are kept then; twice, however many rows there are, where the head has no gradient:
    then what the backward needs is weight[target] - sum_v p_v weight_v, [N, H]. (Four times in any
    case where not even one row of logits fits.)

    Raises ValueError for shapes that do not go together, no rows at all, a target that is not in
    the vocabulary, and statistics that there are not.

    Source: online softmax, https://arxiv.org/abs/1805.02867, algorithm 3; statistics as in
    ChunkedLogProbFunction (trl/kernels/chunked_logprob.py).
    """
    check(hidden, weight, target, bias, temperature, softcap, max_bytes, stats)
    train = torch.is_grad_enabled()  # inside a Function it is always off
    scale, asked = Scale(temperature, softcap), tuple(stats)
    found = _LinearLogprob.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, target, scale, max_bytes, asked, train, compute_dtype(hidden)
    )
    return TokenStats(*found)


def linear_logprob_twin(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    stats: Collection[str] = STATS,
) -> TokenStats:
    """The same by its definition, with all logits in memory several times over."""
    y_NV = torch.nn.functional.linear(hidden, weight, bias)
    return of_logits(Scale(temperature, softcap).of(y_NV.to(arithmetic(y_NV.dtype))), target, stats)


def of_logits(z_NV: Tensor, target: Tensor, stats: Collection[str] = STATS) -> TokenStats:
    """What TokenStats says of logits that are there."""
    logps_NV = z_NV.log_softmax(dim=1)
    z_NV, fixed_NV = z_NV.detach(), logps_NV.detach()
    return TokenStats(
        logps_NV.gather(1, target[:, None])[:, 0],
        -(fixed_NV.exp() * fixed_NV).sum(dim=1) if "entropy" in stats else None,
        z_NV.mean(dim=1) if "mean_logit" in stats else None,
        z_NV.argmax(dim=1) == target if "is_top1" in stats else None,
        (2 * fixed_NV).logsumexp(dim=1) if "log_sum_sq" in stats else None,
    )


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        scale: Scale,
        max_bytes: int,
        stats: tuple[str, ...],
        train: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, ...]:
        head = TiledHead.of(weight, bias, dtype, scale, max_bytes)
        states = hidden.detach().to(dtype)
        rows, columns = head.shape(len(hidden))
        train = train and any(ctx.needs_input_grad[:3])
        frozen = train and not any(ctx.needs_input_grad[1:3]) and columns == len(weight)
        buffer = head.tile(rows, columns)
        running = Running.start(buffer, len(hidden), stats)
        local = torch.empty_like(states) if frozen else None
        ones = torch.ones_like(running.max)
        for first, last in spans(len(hidden), rows):
            part, aims, known = states[first:last], target[first:last], running.rows(first, last)
            for start in range(0, len(weight), columns):
                made = head.folded(part, aims, start, known, buffer)
            if local is not None:
                head.unfolded(made, aims, 0, known.norm, ones[first:last])
                product(made, head.weight, out=local[first:last])
        kept = train and not frozen and (rows, columns) == (len(hidden), len(weight))
        ctx.save_for_backward(hidden, weight, bias, target, *running.norm, local)
        ctx.buffer = buffer if kept else None
        ctx.scale, ctx.max_bytes, ctx.dtype = scale, max_bytes, dtype
        found = seen(running, len(weight))
        ctx.mark_non_differentiable(*(one for one in found[1:] if one is not None))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, *known, local = ctx.saved_tensors
        nothing = (None,) * 6
        if local is not None:
            return (grad[:, None] * local).to(hidden.dtype), None, None, *nothing
        norm = Norm(*known)
        head = TiledHead.of(weight, bias, ctx.dtype, ctx.scale, ctx.max_bytes)
        states = hidden.detach().to(ctx.dtype)
        # The logits are used up by the first backward; another one makes them again.
        buffer, ctx.buffer = ctx.buffer, None
        rows, columns = head.shape(len(hidden))
        made_before = buffer is not None
        if buffer is None:
            buffer = head.tile(rows, columns)
        grads = Gradients(head, states, ctx.needs_input_grad[:3], rows == len(hidden))
        for first, last in spans(len(hidden), rows):
            part, aims = states[first:last], target[first:last]
            total = None
            if grads.hidden is not None and columns < len(weight):
                total = torch.zeros_like(part, dtype=norm.max.dtype)
            for start in range(0, len(weight), columns):
                made = buffer if made_before else head.logits(part, start, buffer)
                head.unfolded(made, aims, start, norm.rows(first, last), grad[first:last])
                if total is not None:
                    part_of_head = head.weight[start : start + columns]
                    head.add(total, made, part_of_head)
                else:
                    grads.add_hidden(slice(first, last), made)
                grads.add_head(part, start, made)
            if total is not None and grads.hidden is not None:
                grads.hidden[first:last] = total
        return *grads.of(hidden, weight, bias), *nothing
