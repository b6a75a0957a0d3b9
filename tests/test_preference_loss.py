"""The fused preference loss is held to the papers' formulas, in value, gradient, passes, bytes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import formulas
from kernels.linear_logprob import linear_logprob_twin
from kernels.matmul import counting
from kernels.preference_loss import PreferenceLoss, preference_loss, preference_loss_twin
from kernels.preference_terms import KINDS

LENGTHS = [3, 1, 4, 2, 1, 5]  # three pairs; one-token completions on either side
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0)
ROWS, VOCABULARY, WIDTH = sum(LENGTHS), 11, 3
WEIGHTS = torch.tensor([1.0, 0.25, 2.0])

TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"pair_weight": WEIGHTS},
    "nll of sequences": {"nll_alpha": 0.7, "nll": "sequence", "pair_weight": WEIGHTS},
    "nll of tokens": {"nll_alpha": 0.7, "nll": "token", "pair_weight": WEIGHTS},
    "lengths": {"length_alpha": 0.3},
    "smoothed": {"label_smoothing": 0.1},
    "scaled": {"temperature": 0.7, "softcap": 5.0},
}
CASES = [
    (kind, name)
    for kind in KINDS
    for name in TERMS
    if not (name == "lengths" and kind in ("ipo", "sigmoid_norm"))
    and not (name == "smoothed" and kind != "robust")
]


def made(dtype: torch.dtype = torch.float64, *, times: int = 1) -> tuple[Tensor, ...]:
    """hidden, weight, bias, target, ref_logp."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    target = torch.randint(VOCABULARY * times, (ROWS * times,), generator=generator)
    target[0], target[-1] = 0, VOCABULARY * times - 1
    hidden = random(ROWS * times, WIDTH * times)
    weight, bias = random(VOCABULARY * times, WIDTH * times), random(VOCABULARY * times)
    drawn = linear_logprob_twin(hidden, weight, target, bias=bias, stats=()).logp.detach()
    bounds = CU_SEQLENS * times
    sums = [drawn[first:last].sum() for first, last in pairwise(bounds.tolist())]
    reference = torch.stack(sums) + torch.randn(len(sums), generator=generator)
    return hidden, weight, bias, target, reference


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_gradient_is_that_of_finite_differences(kind: str, name: str) -> None:
    hidden, weight, bias, target, reference = made()

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return preference_loss(
            hidden,
            weight,
            target,
            CU_SEQLENS,
            reference,
            kind=kind,
            beta=0.4,
            bias=bias,
            max_bytes=6 * VOCABULARY * 8,  # three tiles of one pair each
            **TERMS[name],
        ).loss

    assert torch.autograd.gradcheck(op, (hidden, weight, bias))


@pytest.mark.parametrize("frozen", ["head", "hidden"])
@pytest.mark.parametrize("most_rows", [16, 10, 6, 5])
def test_what_is_frozen_has_no_gradient_and_the_rest_the_same(frozen: str, most_rows: int) -> None:
    hidden, weight, bias, target, reference = made()
    if frozen == "head":
        weight, bias = weight.detach(), bias.detach()
    else:
        hidden = hidden.detach()

    def op(hidden: Tensor, weight: Tensor) -> Tensor:
        return preference_loss(
            hidden,
            weight,
            target,
            CU_SEQLENS,
            reference,
            kind="sigmoid",
            beta=0.4,
            bias=bias,
            max_bytes=most_rows * VOCABULARY * 8,
        ).loss

    assert torch.autograd.gradcheck(op, (hidden, weight))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_loss_is_the_formula_of_the_paper(kind: str, name: str) -> None:
    hidden, weight, bias, target, reference = made()
    terms = TERMS[name]
    scaled = {key: terms[key] for key in ("temperature", "softcap") if key in terms}
    found = preference_loss(
        hidden, weight, target, CU_SEQLENS, reference, kind=kind, beta=0.4, bias=bias, **terms
    )
    logp = linear_logprob_twin(hidden, weight, target, bias=bias, stats=(), **scaled).logp
    policy = torch.stack([part.sum() for part in logp.split(LENGTHS)]).detach()
    pairs = formulas.Pairs(
        policy=policy.view(3, 2).T.numpy(),
        reference=reference.view(3, 2).T.numpy(),
        tokens=np.array(LENGTHS, dtype=float).reshape(3, 2).T,
        beta=0.4,
        smoothing=terms.get("label_smoothing", 0.0),
        token_cost=terms.get("length_alpha", 0.0),
    )
    each = formulas.LOSSES[kind](pairs) / 3
    if terms.get("nll") == "sequence":
        each = each - 0.7 * pairs.policy[0] / pairs.tokens[0] / 3
    elif terms.get("nll") == "token":
        each = each - 0.7 * pairs.policy[0] / pairs.tokens[0].sum()
    pair_weight = terms.get("pair_weight", torch.ones(3)).numpy()
    assert found.loss.item() == pytest.approx((each * pair_weight).sum(), rel=1e-10)
    assert found.unweighted.item() == pytest.approx(each.sum(), rel=1e-10)
    rewards = pairs.rewards + pairs.token_cost * pairs.tokens
    np.testing.assert_allclose(found.logp.view(3, 2).T, pairs.policy, rtol=1e-10)
    np.testing.assert_allclose(found.reward.view(3, 2).T, rewards, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(found.margin, rewards[0] - rewards[1], rtol=1e-9, atol=1e-10)


def of(op: Any, given: tuple[Tensor, ...], **more: Any) -> tuple[PreferenceLoss, list[Tensor]]:
    hidden, weight, bias, target, reference = given
    times = len(hidden) // ROWS
    found = op(hidden, weight, target, CU_SEQLENS * times, reference, beta=0.1, bias=bias, **more)
    return found, list(torch.autograd.grad(found.loss, (hidden, weight, bias)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most_rows", [160, 100, 60, 50])
def test_float32_equals_the_definition(kind: str, most_rows: int) -> None:
    given = made(torch.float32, times=10)
    max_bytes = most_rows * VOCABULARY * 10 * 4
    asked = {"kind": kind, "nll_alpha": 0.5, "stats": ("entropy", "is_top1")}
    found, grads = of(preference_loss, given, max_bytes=max_bytes, **asked)
    wanted, exact = of(preference_loss_twin, given, **asked)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=0)
    sides = ((*one[1:4], *one.stats[:2]) for one in (found, wanted))
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.stats.is_top1, wanted.stats.is_top1)
    for ours, theirs in zip(grads, exact, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("most_rows", [160, 80])
def test_bfloat16_is_not_further_from_the_truth_than_the_definition_in_bfloat16(
    most_rows: int,
) -> None:
    given = made(torch.bfloat16, times=10)
    hidden, weight, bias = (one.detach().double().requires_grad_() for one in given[:3])
    max_bytes = -(-most_rows * VOCABULARY * 10 * 2 * 8 // 7)
    found, grads = of(preference_loss, given, kind="sigmoid", max_bytes=max_bytes)
    naive, of_naive = of(preference_loss_twin, given, kind="sigmoid")
    truth, of_truth = of(preference_loss_twin, (hidden, weight, bias, *given[3:]), kind="sigmoid")
    assert abs(found.loss - truth.loss) <= 1.5 * abs(naive.loss - truth.loss) + 1e-6
    for ours, theirs, true in zip(grads, of_naive, of_truth, strict=True):
        assert (ours - true).norm() <= 1.5 * (theirs - true).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("most_rows", "frozen", "passes"),
    # Of pairs of 40, 60 and 60 rows those that do not fit take four passes.
    [
        (160, False, 3),
        (70, False, 3),
        (70, True, 2),
        (50, False, 3.75),
        (30, False, 4),
        (50, True, 2),
        (0.5, False, 4),
    ],
)
def test_passes_over_the_head_and_bytes_of_logits(
    dtype: torch.dtype, most_rows: float, frozen: bool, passes: float
) -> None:
    hidden, weight, _, target, reference = made(dtype, times=10)
    spare = 8 / 7 if dtype == torch.bfloat16 else 1  # what is widened beside the logits
    max_bytes = math.ceil(most_rows * VOCABULARY * 10 * dtype.itemsize * spare)
    with counting() as count:
        preference_loss(
            hidden,
            weight.requires_grad_(not frozen),
            target,
            CU_SEQLENS * 10,
            reference,
            kind="sigmoid",
            beta=0.1,
            max_bytes=max_bytes,
        ).loss.backward()
    assert count.passes(*hidden.shape[:1], *weight.shape) == passes
    assert max_bytes / 2 < count.most_held <= max_bytes, "of whole rows and of parts of one"
    assert count.held == 0


def test_no_gradient_wanted_is_one_pass() -> None:
    hidden, weight, bias, target, reference = made()
    with torch.no_grad(), counting() as count:
        found = preference_loss(
            hidden, weight, target, CU_SEQLENS, reference, kind="ipo", beta=0.1, bias=bias
        )
    assert not found.loss.requires_grad
    assert count.passes(ROWS, VOCABULARY, WIDTH) == 1


@pytest.mark.parametrize("nll", ["sequence", "token"])
def test_calls_on_parts_of_a_step_add_up_to_the_step(nll: str) -> None:
    hidden, weight, bias, target, reference = made()
    terms: dict[str, Any] = {"kind": "sigmoid", "beta": 0.4, "nll_alpha": 0.5, "nll": nll}
    whole = preference_loss(hidden, weight, target, CU_SEQLENS, reference, bias=bias, **terms)
    at, loss = int(CU_SEQLENS[2]), torch.zeros(())
    for rows, sides in ((slice(0, at), slice(0, 2)), (slice(at, None), slice(2, None))):
        bounds = CU_SEQLENS[sides.start :] if sides.start else CU_SEQLENS[:3]
        loss = (
            loss
            + preference_loss(
                hidden[rows],
                weight,
                target[rows],
                bounds - bounds[0],
                reference[sides],
                bias=bias,
                pairs=3,
                nll_tokens=sum(LENGTHS[0::2]),
                **terms,
            ).loss
        )
    torch.testing.assert_close(loss, whole.loss)
    every = (hidden, weight, bias)
    parts = torch.autograd.grad(loss, every)
    for ours, theirs in zip(parts, torch.autograd.grad(whole.loss, every), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_backward_scales_by_what_comes_from_above_each_time() -> None:
    hidden, weight, _, target, reference = made()
    loss = preference_loss(
        hidden, weight, target, CU_SEQLENS, reference, kind="sigmoid", beta=0.4
    ).loss
    (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, weight, retain_graph=True)
    (again,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(thrice, 3 * once)
    assert torch.equal(once, again)


@pytest.mark.parametrize("most_rows", [16, 5])
def test_a_second_backward_adds_to_the_gradient_that_a_leaf_has(most_rows: int) -> None:
    hidden, weight, bias, target, reference = made()
    loss = preference_loss(
        hidden,
        weight,
        target,
        CU_SEQLENS,
        reference,
        kind="sigmoid",
        beta=0.4,
        bias=bias,
        max_bytes=most_rows * VOCABULARY * 8,
    ).loss
    leaves = (hidden, weight, bias)
    once = [one.clone() for one in torch.autograd.grad(loss, leaves, retain_graph=True)]
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        for leaf, grad in zip(leaves, once, strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad, times * grad)


@pytest.mark.parametrize("op", [preference_loss, preference_loss_twin])
@pytest.mark.parametrize("most_rows", [16, 5, 0.5])
def test_only_the_loss_has_a_gradient_and_only_of_the_policy(op: Any, most_rows: float) -> None:
    hidden, weight, _, target, reference = made()
    fixed = (reference.requires_grad_(), WEIGHTS.clone().requires_grad_())
    within = {"max_bytes": int(most_rows * VOCABULARY * 8)} if op is preference_loss else {}

    def of(hidden: Tensor, weight: Tensor) -> PreferenceLoss:
        found: PreferenceLoss = op(
            hidden,
            weight,
            target,
            CU_SEQLENS,
            fixed[0],
            kind="sigmoid",
            beta=0.4,
            pair_weight=fixed[1],
            **within,
        )
        return found

    found = of(hidden, weight)
    others = (found.logp, found.reward, found.margin, found.stats.logp, found.unweighted)
    assert [one.requires_grad for one in others] == [False] * len(others)
    found.loss.backward()
    assert hidden.grad is not None
    assert [one.grad for one in fixed] == [None, None]
    assert not of(hidden.detach(), weight.detach()).loss.requires_grad


def test_gradients_that_float16_cannot_hold_are_scaled_before_they_are_made() -> None:
    """As torch.amp.GradScaler does, of a small loss."""
    given = made(torch.float16, times=10)
    leaves, scale = given[:3], 2.0**16
    every = {"kind": "sigmoid", "beta": 0.1, "pairs": 2.0**14}

    def grads(op: Any, leaves: tuple[Tensor, ...], times: float) -> list[Tensor]:
        hidden, weight, bias = leaves
        loss = op(hidden, weight, given[3], CU_SEQLENS * 10, given[4], bias=bias, **every).loss
        return [one.double() / times for one in torch.autograd.grad(loss * times, leaves)]

    exact = tuple(one.detach().double().requires_grad_() for one in leaves)
    wanted = grads(preference_loss_twin, exact, 1)
    for ours, true in zip(grads(preference_loss, leaves, scale), wanted, strict=True):
        assert (ours - true).norm() <= 1e-2 * true.norm()
    with torch.autocast("cpu", torch.float16):
        wide = tuple(one.detach().float().requires_grad_() for one in leaves)
        for ours, true in zip(grads(preference_loss, wide, scale), wanted, strict=True):
            assert (ours - true).norm() <= 1e-2 * true.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [False, True])
def test_logits_of_ten_thousand_are_no_trouble(dtype: torch.dtype, wrong: bool) -> None:
    hidden, weight, bias, target, reference = made(dtype)
    if wrong:  # each pair as far on the wrong side as a sigmoid tells
        reference = torch.tensor([1e6, -1e6] * 3)
    with torch.no_grad():
        bias.copy_(torch.where(torch.arange(VOCABULARY) % 3 == 0, 1e4, -1e4))
    given = (hidden, weight, bias, target, reference)
    found, grads = of(preference_loss, given, kind="sigmoid")
    wanted, exact = of(preference_loss_twin, given, kind="sigmoid")
    assert found.loss.isfinite()
    assert (found.margin < -1e4).all() == wrong
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, exact, strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


def test_under_autocast_products_are_made_in_bfloat16_and_gradients_are_float32() -> None:
    given = made(torch.float32, times=10)
    with torch.autocast("cpu", torch.bfloat16):
        found, grads = of(preference_loss, given, kind="sigmoid")
    exact, wanted = of(preference_loss, given, kind="sigmoid")
    assert not torch.equal(found.loss, exact.loss)
    torch.testing.assert_close(found.loss, exact.loss, rtol=5e-2, atol=0)
    for ours, theirs in zip(grads, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 5e-2 * theirs.norm()


@pytest.mark.parametrize("op", [preference_loss, preference_loss_twin])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cu_seqlens": torch.tensor([0, 2, 2, 4, 6])}, "found 0 in the rejected one of pair 0"),
        ({"cu_seqlens": torch.tensor([0, 2, 4, 6])}, r"cu_seqlens is \[2B\+1\]"),
        ({"cu_seqlens": torch.tensor([0, 1, 2, 4, 5])}, "from 0 to the 6 rows"),
        ({"ref_logp": torch.zeros(3)}, r"ref_logp is \[4\]"),
        ({"pair_weight": torch.ones(4)}, r"pair_weight is \[2\]"),
        ({"target": torch.full((6,), 99)}, "found 99"),
        ({"kind": "dpo"}, "no preference loss of kind 'dpo'; there are sigmoid, hinge"),
        ({"beta": 0.0}, "beta, pairs and nll_tokens are above 0; found beta 0"),
        ({"pairs": 0}, "pairs 0"),
        ({"nll": "row"}, "nll is 'sequence' or 'token'; found 'row'"),
        ({"label_smoothing": 0.1}, "means nothing to 'sigmoid'"),
        ({"kind": "robust", "label_smoothing": 0.5}, "below 0.5"),
        ({"kind": "ipo", "length_alpha": 0.1}, "means nothing to 'ipo'"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(op: Any, changed: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {
        "hidden": torch.zeros(6, 3),
        "weight": torch.zeros(5, 3),
        "target": torch.zeros(6, dtype=torch.int64),
        "cu_seqlens": torch.tensor([0, 1, 2, 4, 6]),
        "ref_logp": torch.zeros(4),
        "kind": "sigmoid",
        "beta": 0.1,
    }
    with pytest.raises(ValueError, match=said):
        op(**given | changed)
