"""The log-probability op is held to its definition, in value, gradient, passes and bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from kernels.linear_logprob import (
    STATS,
    TokenStats,
    linear_logprob,
    linear_logprob_stats,
    linear_logprob_twin,
)
from kernels.matmul import counting

SCALED = {"temperature": 0.7, "softcap": 5.0}


def made(
    rows: int = 7,
    vocabulary: int = 11,
    width: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, target (0 and V - 1 among them), bias; all that can have a gradient do."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    target = torch.randint(vocabulary, (rows,), generator=generator)
    target[0], target[-1] = 0, vocabulary - 1
    return random(rows, width), random(vocabulary, width), target, random(vocabulary)


def budget(rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes for so many rows of logits and, below float32, for what is widened beside them."""
    needed = rows * vocabulary * dtype.itemsize
    return needed if dtype.itemsize >= 4 else -(-needed * 8 // 7)


@pytest.mark.parametrize("scaled", [{}, SCALED])
@pytest.mark.parametrize("frozen", ["nothing", "head", "hidden"])
@pytest.mark.parametrize("most_rows", [7, 3, 0.5])
def test_the_gradient_is_that_of_finite_differences(
    scaled: dict[str, Any], frozen: str, most_rows: float
) -> None:
    hidden, weight, target, bias = made()
    if frozen == "head":
        weight, bias = weight.detach(), bias.detach()
    elif frozen == "hidden":
        hidden = hidden.detach()
    max_bytes = int(most_rows * 11 * 8)

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, target, bias=bias, max_bytes=max_bytes, **scaled)

    assert torch.autograd.gradcheck(op, (hidden, weight, bias))


def test_the_gradient_without_a_bias_is_that_of_finite_differences() -> None:
    hidden, weight, target, _ = made()
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, target), (hidden, weight))


def of_twin(*given: Tensor, **scaled: Any) -> tuple[TokenStats, list[Tensor]]:
    return _seen(linear_logprob_twin, *given, **scaled)


def of_op(*given: Tensor, **scaled: Any) -> tuple[TokenStats, list[Tensor]]:
    return _seen(linear_logprob_stats, *given, **scaled)


def _seen(
    op: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor, **scaled: Any
) -> tuple[TokenStats, list[Tensor]]:
    """Statistics and the gradients of a weighted sum of log-probabilities."""
    found = op(hidden, weight, target, bias=bias, **scaled)
    wanted = [one for one in (hidden, weight, bias) if one.requires_grad]
    upstream = torch.linspace(-1, 1, len(target)).to(found.logp)
    grads = torch.autograd.grad((found.logp * upstream).sum(), wanted)
    return found, list(grads)


@pytest.mark.parametrize("scaled", [{}, SCALED])
@pytest.mark.parametrize("most_rows", [100, 37, 0.3])
def test_float32_equals_the_definition(scaled: dict[str, Any], most_rows: float) -> None:
    given = made(100, 700, 48, torch.float32)
    max_bytes = int(budget(1, 700, torch.float32) * most_rows)
    found, grads = of_op(*given, max_bytes=max_bytes, **scaled)
    wanted, exact = of_twin(*given, **scaled)
    for name in ("logp", "entropy", "mean_logit", "log_sum_sq"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-5, msg=name
        )
    assert found.logp.dtype == torch.float32
    assert torch.equal(found.is_top1, wanted.is_top1)
    for ours, theirs in zip(grads, exact, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("most_rows", [256, 60])
def test_bfloat16_is_not_further_from_the_truth_than_the_definition_in_bfloat16(
    frozen: bool, most_rows: int
) -> None:
    hidden, weight, target, bias = made(256, 700, 64, torch.bfloat16)
    if frozen:
        weight, bias = weight.detach(), bias.detach()
    given = (hidden, weight, target, bias)
    double = [one.detach().double().requires_grad_(one.requires_grad) for one in (hidden, weight)]
    exact = (*double, target, bias.detach().double().requires_grad_(bias.requires_grad))
    found, grads = of_op(*given, max_bytes=budget(most_rows, 700, torch.bfloat16))
    naive, of_naive = of_twin(*given)
    truth, of_truth = of_twin(*exact)
    of_op_value = (found.logp - truth.logp).norm()
    assert of_op_value <= 1.5 * (naive.logp - truth.logp).norm()
    for ours, theirs, true in zip(grads, of_naive, of_truth, strict=True):
        assert (ours - true).norm() <= 1.5 * (theirs - true).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand_are_no_trouble(dtype: torch.dtype) -> None:
    hidden, weight, target, bias = made(6, 40, 8, dtype)
    with torch.no_grad():
        hidden.fill_(0)
        bias.copy_(torch.where(torch.arange(40) % 3 == 0, 1e4, -1e4))
    found, grads = of_op(hidden, weight, target, bias)
    wanted, exact = of_twin(hidden, weight, target, bias)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(grads, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tokens_that_a_bias_forbids_have_no_part_in_it(dtype: torch.dtype) -> None:
    hidden, weight, target, bias = made(6, 40, 8, dtype)
    with torch.no_grad():
        bias[10:30] = -torch.inf
    target = target % 10
    stats = ("entropy", "is_top1", "log_sum_sq")
    found = linear_logprob_stats(hidden, weight, target, bias=bias, stats=stats)
    allowed = torch.cat([torch.arange(10), torch.arange(30, 40)])
    wanted = linear_logprob_twin(hidden, weight[allowed], target, bias=bias[allowed], stats=stats)
    for name in ("logp", *stats):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(found.logp.sum(), weight)[0][10:30].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_not_a_number_is_not_hidden(dtype: torch.dtype) -> None:
    hidden, weight, target, _ = made(4, 40, 8, dtype)
    with torch.no_grad():
        hidden[2, 3] = torch.nan
    found = linear_logprob(hidden, weight, target)
    assert found.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("scaled", [{}, SCALED])
def test_statistics_and_gradients_equal_those_of_trl(scaled: dict[str, Any]) -> None:
    hidden, weight, target, bias = made(50, 300, 32, torch.float32)
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    logp, entropy, log_sum_sq, mean_logit, is_top1 = ChunkedLogProbFunction.apply(
        hidden,
        weight,
        bias,
        target,
        scaled.get("temperature", 1.0),
        128,
        scaled.get("softcap"),
        1.0,
        outputs,
    )
    found = linear_logprob_stats(hidden, weight, target, bias=bias, **scaled)
    wanted = TokenStats(logp, entropy, mean_logit, is_top1, log_sum_sq)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    every = (hidden, weight, bias)
    pairs = zip(
        torch.autograd.grad(found.logp.sum(), every),
        torch.autograd.grad(logp.sum(), every),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_tie_is_top_only_for_the_first() -> None:
    weight = torch.tensor([[0.0], [1.0], [1.0], [0.5]])
    found = linear_logprob_stats(torch.ones(3, 1), weight, torch.tensor([1, 2, 3]))
    assert found.is_top1 is not None
    assert found.is_top1.tolist() == [True, False, False]


def test_only_statistics_asked_for_are_made() -> None:
    hidden, weight, target, _ = made()
    found = linear_logprob_stats(hidden, weight, target, stats=["entropy"])
    assert [name for name in STATS if getattr(found, name) is not None] == ["entropy"]
    assert found.entropy is not None
    assert not found.entropy.requires_grad


def test_a_second_backward_finds_the_same() -> None:
    hidden, weight, target, _ = made()
    loss = linear_logprob(hidden, weight, target).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("most_rows", "frozen", "trains", "passes"),
    [
        (90, False, True, 3),
        (40, False, True, 4),
        (90, True, True, 2),
        (40, True, True, 2),
        (40, False, False, 1),
        (0.5, False, True, 4),
    ],
)
def test_passes_over_the_head_and_bytes_of_logits(
    dtype: torch.dtype, most_rows: float, frozen: bool, trains: bool, passes: int
) -> None:
    hidden, weight, target, _ = made(90, 256, 16, dtype)
    max_bytes = int(budget(1, 256, dtype) * most_rows)
    with counting() as count:
        logp = linear_logprob(
            hidden.requires_grad_(trains),
            weight.requires_grad_(trains and not frozen),
            target,
            max_bytes=max_bytes,
        )
        if trains:
            logp.sum().backward()
    del logp
    assert count.passes(90, 256, 16) == passes
    assert max_bytes / 2 < count.most_held <= max_bytes
    assert count.held == 0


def test_nothing_is_kept_for_a_backward_that_does_not_come() -> None:
    hidden, weight, target, _ = made()
    with torch.no_grad(), counting() as count:
        logp = linear_logprob(hidden, weight, target)
    assert not logp.requires_grad
    assert (count.passes(7, 11, 3), count.held) == (1, 0)


def test_autocast_decides_what_products_are_made_in() -> None:
    hidden, weight, target, _ = made(64, 300, 32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logp = linear_logprob(hidden, weight, target)
        theirs = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 512, None, 1.0, ())
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, theirs[0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(logp, linear_logprob(hidden, weight, target))
    grads = torch.autograd.grad(logp.sum(), (hidden, weight))
    wanted = torch.autograd.grad(theirs[0].sum(), (hidden, weight))
    for ours, exact in zip(grads, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 1e-2 * exact.norm()


def test_gradients_of_many_small_batches_under_autocast_are_not_rounded_one_by_one() -> None:
    """Into the float32 weight of a head, as a trainer that accumulates gradients has it."""
    generator = torch.Generator().manual_seed(0)
    same = torch.randn(24, 64, generator=generator)
    batches = [
        (
            same + 0.3 * torch.randn(24, 64, generator=generator),
            torch.randint(300, (24,), generator=generator),
        )
        for _ in range(16)
    ]
    weight = 0.05 * torch.randn(300, 64, generator=generator)

    def grad(op: Any, dtype: torch.dtype) -> Tensor:
        head = torch.nn.Linear(64, 300, bias=False, dtype=dtype)
        head.weight.data.copy_(weight)
        for hidden, target in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                logp = op(hidden.to(dtype), head.weight, target, stats=()).logp
            (-logp.mean() / 16).backward()
        assert head.weight.grad is not None
        return head.weight.grad.double()

    exact = grad(linear_logprob_twin, torch.float64)
    ours, naive = (grad(op, torch.float32) for op in (linear_logprob_stats, linear_logprob_twin))
    assert (ours - exact).norm() <= 0.9 * (naive - exact).norm()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"target": torch.tensor([0, 1, 11])}, "between 0 and 10, .* found 11"),
        ({"target": torch.tensor([0, -100, 3])}, "found -100"),
        ({"target": torch.tensor([0, 1])}, r"target is \[N\]"),
        ({"target": torch.tensor([0.0, 1.0, 2.0])}, "int64"),
        ({"hidden": torch.zeros(0, 3), "target": torch.zeros(0, dtype=torch.int64)}, "nothing"),
        ({"hidden": torch.zeros(3, 4)}, r"hidden is \[N, H\]"),
        ({"bias": torch.zeros(10)}, r"bias is \[V\]"),
        ({"temperature": 0.0}, "above 0; found temperature 0"),
        ({"softcap": -1.0}, "softcap -1"),
        ({"max_bytes": 1}, "max_bytes"),
        ({"stats": ["entropie"]}, "no statistic named 'entropie'; there are entropy"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(changed: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {
        "hidden": torch.zeros(3, 3),
        "weight": torch.zeros(11, 3),
        "target": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(ValueError, match=said):
        linear_logprob_stats(**given | changed)
