"""Attention of many rows that decode after the same keys.

Rows that continue one prompt differ only in their tails. Their queries are stacked and meet the
prompt's keys in one matrix product, which reads them once for all rows; each row's tail is attended
to by itself; and the two parts, each normalised on its own, are merged by their logsumexps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.matmul import plain_float32

PLAIN = 2**15
"""Up to this many numbers of keys, copying each row its own prefix costs less than two passes."""


class Part(NamedTuple):
    """Attention over some of the keys: out [N, Hq, Dv], and the logsumexp of the scores over them,
    lse [N, Hq] float32, or float64 where out is."""

    out: Tensor
    lse: Tensor


class Slots(NamedTuple):
    """Which rows continue which prompt, where prompts have different numbers of rows.

    row_of_slot [G * n]: the row in each of the n slots of each prompt, any row in an empty one.
    slot_of_row [N]: where each row is.
    """

    row_of_slot: Tensor
    slot_of_row: Tensor


def cascade_attention(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_tail: Tensor,
    v_tail: Tensor,
    tail_len: Tensor | int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    slots: Slots | None = None,
    shared: tuple[Tensor, Tensor] | None = None,
    plain_up_to: int = PLAIN,
) -> Tensor:
    """softmax(scale * q @ [k_shared, k_prefix, k_tail].T) @ [v_shared, v_prefix, v_tail]: what one
    token a row attends to. [N, Hq, Dv] in q's dtype.

    q: [N, Hq, D]. k_prefix: [Hkv, P, D], or [G, Hkv, P, D] of G prompts, whose rows follow each
    other, N / G of each, unless `slots` says otherwise; P may be 0. k_tail: [N, Hkv, T, D], of
    which row n sees the first tail_len[n], at least one; an int is for all rows. v: [..., Dv].
    Query head h uses key head h // (Hq / Hkv). scale: None is D ** -0.5.
    softcap: scores become softcap * tanh(score / softcap).
    sinks: [Hq] scores of a key without a value, which the softmax counts.
    prefix_bias: [G, P], added to the scores: -inf where a prompt is padded; see padding().
    shared: keys and values [Hkv, C, D] that all rows of all prompts see before their own.
    plain_up_to: so many numbers of keys, each row gets a copy of its prompt's, and attends once.
    Raises ValueError for heads or rows that do not divide.
    Source: merging parts by logsumexp, https://arxiv.org/abs/2402.05099 (Hydragen), section 3.1,
    and https://arxiv.org/abs/2112.05682, section 3.
    """
    if k_prefix.dim() == 3:
        k_prefix, v_prefix = k_prefix[None], v_prefix[None]
    _check(q, k_prefix, k_tail, slots)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tail_bias = None
    if isinstance(tail_len, int):
        k_tail, v_tail = k_tail[:, :, :tail_len], v_tail[:, :, :tail_len]
    else:
        tail_bias = padding(tail_len, k_tail.shape[2], q.dtype, left=False)
    rows, width = len(q), k_prefix.shape[2]
    # By shapes alone: a choice by timing could fall otherwise after a restart.
    if width and slots is None and prefix_bias is None and tail_bias is None:
        copied = rows * k_prefix.shape[1] * width * k_prefix.shape[3]
        if copied <= plain_up_to:
            each = rows // len(k_prefix)
            k_tail = torch.cat([k_prefix.repeat_interleave(each, 0), k_tail], 2)
            v_tail = torch.cat([v_prefix.repeat_interleave(each, 0), v_tail], 2)
            width = 0
    part = attend(q, k_tail, v_tail, scale, softcap=softcap, bias=tail_bias)
    if width:
        stacked = q if slots is None else q.index_select(0, slots.row_of_slot)
        own = attend(stacked, k_prefix, v_prefix, scale, softcap=softcap, bias=prefix_bias)
        if slots is not None:
            own = Part(*(each.index_select(0, slots.slot_of_row) for each in own))
        part = merge(part, own)
    if shared is not None:
        k_shared, v_shared = (each.unsqueeze(0) for each in shared)
        part = merge(part, attend(q, k_shared, v_shared, scale, softcap=softcap))
    if sinks is None:
        return part.out.to(q.dtype)
    weight = torch.sigmoid(part.lse - sinks.to(part.lse.dtype)).unsqueeze(-1)
    return (part.out * weight).to(q.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Part:
    """Attention of G * n rows over the keys of G groups: q [G * n, Hq, D], k [G, Hkv, P, D].

    bias: [G, P], added to the scores.
    """
    (groups, kv_heads, _, size), (rows, heads, _) = k.shape, q.shape
    each, shared_by = rows // groups, heads // kv_heads
    if each > 1:
        q = q.view(groups, each, kv_heads, shared_by, size).transpose(1, 2)
    q = q.reshape(groups, kv_heads, each * shared_by, size)
    if bias is not None:
        bias = bias[:, None, None, :]
    if q.device.type == "cpu" and softcap is None and size == v.shape[-1]:
        # Never holds the scores, and is the one of torch's that returns the logsumexp.
        with plain_float32():
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, attn_mask=bias, scale=scale
            )
    else:
        out, lse = _attend_by_matmul(q, k, v, scale, softcap, bias)
    if each > 1:
        out = out.view(groups, kv_heads, each, shared_by, -1).transpose(1, 2)
        lse = lse.reshape(groups, kv_heads, each, shared_by).transpose(1, 2)
    return Part(out.reshape(rows, heads, -1), lse.reshape(rows, heads))


def _attend_by_matmul(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, bias: Tensor | None
) -> Part:
    scores = torch.matmul(q, k.transpose(-1, -2))
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    scores = scores * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1, keepdim=True)
    return Part(torch.matmul((scores - lse).exp_().to(v.dtype), v), lse.squeeze(-1))


def merge(one: Part, other: Part) -> Part:
    """Attention over the keys of both, in the precision of the logsumexps."""
    weight = torch.sigmoid(other.lse - one.lse).unsqueeze(-1)
    out = torch.lerp(one.out.to(weight.dtype), other.out.to(weight.dtype), weight)
    return Part(out, torch.logaddexp(one.lse, other.lse))


def padding(lengths: Tensor, width: int, dtype: torch.dtype, *, left: bool) -> Tensor:
    """[len(lengths), width] of 0 where there is a key and -inf where there is padding, which lies
    on the left or on the right."""
    places = torch.arange(width, device=lengths.device)[None, :]
    padded = places < width - lengths[:, None] if left else places >= lengths[:, None]
    bias = torch.zeros(padded.shape, dtype=dtype, device=lengths.device)
    return bias.masked_fill_(padded, -torch.inf)


def cascade_attention_plain(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_tail: Tensor,
    v_tail: Tensor,
    tail_len: Tensor | int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    slots: Slots | None = None,
    shared: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The same row by row: each row's keys put together, one softmax over them."""
    if k_prefix.dim() == 3:
        k_prefix, v_prefix = k_prefix[None], v_prefix[None]
    rows, heads, size = q.shape
    groups, kv_heads, width, _ = k_prefix.shape
    scale = size**-0.5 if scale is None else scale
    found = []
    for row in range(rows):
        slot = row if slots is None else int(slots.slot_of_row[row])
        group = slot // ((rows if slots is None else len(slots.row_of_slot)) // groups)
        seen = tail_len if isinstance(tail_len, int) else int(tail_len[row])
        k, v = [k_tail[row, :, :seen]], [v_tail[row, :, :seen]]
        k, v = [k_prefix[group], *k], [v_prefix[group], *v]
        start = 0
        if shared is not None:
            k, v, start = [shared[0], *k], [shared[1], *v], shared[0].shape[1]
        own_k, own_v = (
            torch.cat(parts, 1).repeat_interleave(heads // kv_heads, 0) for parts in (k, v)
        )
        scores = scale * torch.einsum("hd,htd->ht", q[row], own_k)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if prefix_bias is not None:
            scores[:, start : start + width] += prefix_bias[group]
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype)[:, None]], 1)
        share = scores.softmax(-1)[:, : own_v.shape[1]]
        found.append(torch.einsum("ht,htd->hd", share, own_v))
    return torch.stack(found)


def _check(q: Tensor, k_prefix: Tensor, k_tail: Tensor, slots: Slots | None) -> None:
    heads, (groups, kv_heads) = q.shape[1], k_prefix.shape[:2]
    if heads % kv_heads or k_tail.shape[1] != kv_heads:
        raise ValueError(
            f"{heads} heads of queries, {kv_heads} of the prefix' keys and {k_tail.shape[1]} of "
            "the tails'; the first must be a multiple of the others, which are one number"
        )
    stacked = len(q) if slots is None else len(slots.row_of_slot)
    if stacked % groups or len(q) != len(k_tail):
        raise ValueError(
            f"{stacked} rows after {groups} prompts, with {len(k_tail)} tails; as many rows must "
            "follow each prompt, and one tail each row"
        )
