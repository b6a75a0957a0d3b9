"""Cascade attention against torch's own, row by row, in value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.cascade_attention import (
    Slots,
    cascade_attention,
    cascade_attention_plain,
    padding,
)

SHAPES = [  # prompts, rows of each, key heads, query heads of each, prefix, tail
    (1, 4, 2, 1, 33, 7),
    (3, 5, 2, 3, 40, 6),
    (2, 1, 1, 4, 17, 1),
    (2, 3, 2, 2, 0, 4),
    (1, 1, 2, 2, 0, 1),
    (4, 16, 2, 2, 90, 9),
]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, size: int = 16, value_size: int = 16
) -> tuple[Tensor, ...]:
    prompts, each, heads, shared_by, prefix, tail = shape
    torch.manual_seed(sum(shape))
    rows = prompts * each
    return (
        torch.randn(rows, heads * shared_by, size, dtype=dtype),
        torch.randn(prompts, heads, prefix, size, dtype=dtype),
        torch.randn(prompts, heads, prefix, value_size, dtype=dtype),
        torch.randn(rows, heads, tail, size, dtype=dtype),
        torch.randn(rows, heads, tail, value_size, dtype=dtype),
    )


def by_sdpa(given: tuple[Tensor, ...], tail_len: Tensor, scale: float | None = None) -> Tensor:
    """torch's attention over each row's own keys put together."""
    q, k_prefix, v_prefix, k_tail, v_tail = given
    each, shared_by = len(q) // len(k_prefix), q.shape[1] // k_prefix.shape[1]
    found = []
    for row in range(len(q)):
        seen = int(tail_len[row])
        k = torch.cat([k_prefix[row // each], k_tail[row, :, :seen]], 1)
        v = torch.cat([v_prefix[row // each], v_tail[row, :, :seen]], 1)
        found.append(
            torch.nn.functional.scaled_dot_product_attention(
                q[row, :, None],
                k.repeat_interleave(shared_by, 0),
                v.repeat_interleave(shared_by, 0),
                scale=scale,
            )[:, 0]
        )
    return torch.stack(found)


@pytest.mark.parametrize("plain_up_to", [0, 2**40], ids=["cascade", "copied"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_is_attention_over_prefix_and_ragged_tail(
    shape: tuple[int, ...], dtype: torch.dtype, atol: float, plain_up_to: int
) -> None:
    given = inputs(shape, dtype)
    rows, longest = len(given[0]), shape[-1]
    ragged = torch.randint(1, longest + 1, (rows,))
    for tail_len in (ragged, longest):
        lengths = ragged if tail_len is ragged else torch.full((rows,), longest)
        found = cascade_attention(*given, tail_len, plain_up_to=plain_up_to)
        torch.testing.assert_close(found, by_sdpa(given, lengths), atol=atol, rtol=0)
        torch.testing.assert_close(
            found, cascade_attention_plain(*given, tail_len), atol=atol, rtol=0
        )
    scaled = cascade_attention(*given, ragged, scale=0.5)
    torch.testing.assert_close(scaled, by_sdpa(given, ragged, 0.5), atol=atol, rtol=0)


def test_bfloat16_is_about_as_exact_as_the_plain_twin_in_it() -> None:
    narrow = tuple(each.bfloat16() for each in inputs(SHAPES[5], torch.float64))
    wide = tuple(each.double() for each in narrow)
    wanted = by_sdpa(wide, torch.full((len(wide[0]),), SHAPES[5][-1]))
    found = cascade_attention(*narrow, SHAPES[5][-1])
    assert found.dtype == torch.bfloat16
    own = (found.double() - wanted).norm()
    naive = (cascade_attention_plain(*narrow, SHAPES[5][-1]).double() - wanted).norm()
    assert 0 < own < 1.5 * naive


def test_a_prefix_without_prompts_is_that_of_one_prompt() -> None:
    q, k_prefix, v_prefix, k_tail, v_tail = inputs(SHAPES[0], torch.float64)
    alone = cascade_attention(q, k_prefix[0], v_prefix[0], k_tail, v_tail, 7)
    assert torch.equal(alone, cascade_attention(q, k_prefix, v_prefix, k_tail, v_tail, 7))


EXTRAS: list[dict[str, Any]] = [
    {"softcap": 1.5},
    {"sinks": torch.linspace(-1, 2, 6)},
    {"prefix_bias": padding(torch.tensor([40, 1, 23]), 40, torch.float64, left=True)},
    {"shared": True},
    {"softcap": 3.0, "sinks": torch.linspace(-1, 2, 6), "shared": True},
]


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("value_size", [16, 8])
def test_caps_sinks_padding_shared_keys_and_narrow_values_are_as_in_the_twin(
    extra: dict[str, Any], value_size: int
) -> None:
    given = inputs(SHAPES[1], torch.float64, value_size=value_size)
    extra = dict(extra)
    if extra.get("shared"):
        both = torch.randn(2, 2, 21, 16, dtype=torch.float64)
        extra["shared"] = (both[0], both[1, ..., :value_size])
    ragged = torch.randint(1, 7, (15,))
    found = cascade_attention(*given, ragged, **extra)
    wanted = cascade_attention_plain(*given, ragged, **extra)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    plain = cascade_attention_plain(*given, ragged)
    assert not torch.allclose(found, plain, atol=1e-3), "the extra changes nothing"


def test_prompts_of_unequal_numbers_of_rows_go_in_slots() -> None:
    q, k_prefix, v_prefix, k_tail, v_tail = inputs(SHAPES[1], torch.float64)
    rows = torch.tensor([0, 5, 6, 7, 10, 11])  # of the prompts 0, 1, 1, 1, 2, 2
    whole = cascade_attention(q, k_prefix, v_prefix, k_tail, v_tail, 6)
    slots = Slots(torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 0]), torch.tensor([0, 3, 4, 5, 6, 7]))
    given = (q[rows], k_prefix, v_prefix, k_tail[rows], v_tail[rows], 6)
    for attention in (cascade_attention, cascade_attention_plain):
        torch.testing.assert_close(attention(*given, slots=slots), whole[rows], atol=1e-12, rtol=0)


def test_scores_of_any_size_stay_finite() -> None:
    q, *rest = inputs(SHAPES[1], torch.float32)
    for size in (1e4, 1e-4):
        found = cascade_attention(size * q, *rest, 6)
        assert bool(found.isfinite().all())
        torch.testing.assert_close(
            found, by_sdpa((size * q, *rest), torch.full((15,), 6)), atol=1e-5, rtol=0
        )


def test_heads_and_rows_that_do_not_divide_are_refused() -> None:
    q, k_prefix, v_prefix, k_tail, v_tail = inputs(SHAPES[1], torch.float32)
    with pytest.raises(ValueError, match="5 heads of queries, 2 of the prefix"):
        cascade_attention(q[:, :5], k_prefix, v_prefix, k_tail, v_tail, 6)
    with pytest.raises(ValueError, match="14 rows after 3 prompts"):
        cascade_attention(q[:14], k_prefix, v_prefix, k_tail[:14], v_tail[:14], 6)
