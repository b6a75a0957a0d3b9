"""Products are counted, float32 stays float32, and nothing that was set stays changed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from kernels.matmul import (
    add_product,
    counting,
    fast_float32,
    narrowed,
    plain_float32,
    product,
    tile,
)

MKLDNN = torch.backends.mkldnn
CPU = torch.device("cpu")


def settings() -> tuple[str, str, str]:
    return (
        torch.get_float32_matmul_precision(),
        MKLDNN.matmul.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
    )


@pytest.fixture
def restored() -> Iterator[None]:
    before = settings()
    yield
    torch.set_float32_matmul_precision(before[0])
    MKLDNN.matmul.fp32_precision = before[1]
    torch.backends.cuda.matmul.fp32_precision = before[2]


def test_products_within_are_as_accurate_as_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, inner, columns in ((1, 64, 1000), (130, 257, 65), (300, 1024, 700)):
        left = torch.randn(rows, inner, generator=generator)
        right = torch.randn(inner, columns, generator=generator)
        exact = left.double() @ right.double()
        with fast_float32():
            found = left @ right
        assert (found - exact).abs().max() <= 3e-7 * (left.abs() @ right.abs()).max()


def test_the_setting_is_what_it_was_after_nested_blocks_and_errors() -> None:
    before = settings()
    with fast_float32():
        inside = settings()
        with fast_float32():
            pass
        assert settings() == inside
    assert settings() == before
    with pytest.raises(KeyError), fast_float32():
        raise KeyError
    assert settings() == before


def test_blocks_that_overlap_in_threads_leave_the_setting_as_it_was() -> None:
    before = settings()
    with fast_float32():
        inside = settings()
    entered, leave, left = (threading.Event() for _ in range(3))

    def other() -> None:
        with fast_float32():
            entered.set()
            leave.wait(10)
        left.set()

    thread = threading.Thread(target=other)
    with fast_float32():
        thread.start()
        assert entered.wait(10)
    assert settings() == inside  # the other block goes on
    leave.set()
    assert left.wait(10)
    thread.join()
    assert settings() == before


@pytest.mark.usefixtures("restored")
def test_what_somebody_has_chosen_stays_chosen() -> None:
    torch.set_float32_matmul_precision("high")
    with fast_float32():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("restored")
def test_a_setting_made_for_one_backend_is_left_to_it() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    before = MKLDNN.matmul.fp32_precision
    with fast_float32():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert MKLDNN.matmul.fp32_precision == before


def test_passes_and_bytes_are_counted_while_counting_and_no_longer() -> None:
    with counting() as count:
        held = tile(6, 10, torch.float32, CPU)
        product(torch.ones(6, 4), torch.ones(4, 10), bias=torch.ones(10), out=held)
        small = tile(1, 10, torch.bfloat16, CPU)
        del held
    assert count.passes(6, 10, 4) == 1
    assert (count.most_held, count.held) == (6 * 10 * 4 + 20, 20)
    with counting() as other:
        product(torch.ones(6, 4), torch.ones(4, 10), out=torch.empty(6, 10))
    assert count.passes(6, 10, 4) == other.passes(6, 10, 4) == 1
    del small
    assert count.held == 0


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 20])
def test_products_of_bfloat16_are_added_without_being_rounded_to_it(at_once: int) -> None:
    """Many parts that nearly cancel: rounded ones would leave an error as large as the sum."""
    generator = torch.Generator().manual_seed(2)
    left = torch.randn(37, 512, generator=generator).bfloat16()
    right = torch.randn(512, 19, generator=generator).bfloat16()
    parts = [left, (-1.01 * left).bfloat16()] * 2  # little of it is left
    found, rounded = torch.zeros(37, 19), torch.zeros(37, 19)
    exact = torch.zeros(37, 19, dtype=torch.float64)
    for part in parts:
        add_product(found, part, right, at_once)
        rounded += (part @ right).float()
        exact += part.double() @ right.double()
    assert (found - exact).norm() <= 1e-4 * exact.norm()
    assert (rounded - exact).norm() > 1e-2 * exact.norm()


@pytest.mark.parametrize("cuda", [False, True])
def test_torchs_settings_can_be_read_within(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which a contradiction would be told at CUDA's next product."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    before, setting = settings(), MKLDNN.matmul
    with fast_float32(always=True):
        assert setting.fp32_precision == "bf16"
        assert torch.backends.cuda.matmul.allow_tf32 in (False, not cuda)
        assert not cuda or torch.backends.cuda.matmul.fp32_precision == before[2]
        with plain_float32():
            assert torch.backends.cuda.matmul.allow_tf32 in (False, not cuda)
    assert settings() == before


def test_a_head_in_another_dtype_is_counted_while_it_is_there() -> None:
    weight = torch.ones(10, 4)
    with counting() as count:
        copied = narrowed(weight, torch.bfloat16)
        assert count.held == copied.nbytes == 80
        assert narrowed(copied, torch.bfloat16) is copied
        del copied
    assert (count.most_held, count.held) == (80, 0)


def test_a_float64_sum_is_added_to_in_float64() -> None:
    into = torch.ones(3, 5, dtype=torch.float64)
    left, right = torch.rand(3, 4, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64)
    add_product(into, left, right, 1)
    torch.testing.assert_close(into, 1 + left @ right)


def test_counts_may_be_nested() -> None:
    with counting() as outer:
        with counting() as inner:
            pass
        product(torch.ones(2, 3), torch.ones(3, 4), out=torch.empty(2, 4))
    assert (outer.flops, inner.flops) == (48, 0)


def test_plain_products_are_plain_within_fast_ones_until_the_last_block_ends() -> None:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with fast_float32(always=True):
        fast = setting.fp32_precision
        one, other = plain_float32(), plain_float32()
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert setting.fp32_precision == "ieee"
        other.__exit__(None, None, None)
        assert setting.fp32_precision == fast != "ieee"
    assert setting.fp32_precision == before
