"""What answers amount to, and what the gate makes of it: by hand-made scores."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from loop.gate import decide, first, status_after
from loop.measure import bootstrap, gap, judging, measure
from loop.settings import Gate
from store.records import Answer, Checkpoint


def answer(prompt: int, score: float | None, *, text: str = "", greedy: bool = False) -> Answer:
    return Answer(prompt, "gate", greedy, text or str(score), 3, False, score)


def checkpoint(id: int, status: str = "trained") -> Checkpoint:
    return Checkpoint(
        id=id,
        model="policy",
        path=Path("x"),
        digest="",
        tokenizer_digest="",
        template_digest="",
        bytes=1,
        status=status,  # type: ignore[arg-type]
    )


def by_metric(answers: list[Answer]) -> dict[str, float]:
    return {each.metric: each.value for each in measure("policy", "gate", answers, "j", 0)}


def test_values_are_means_over_prompts_of_means_over_answers() -> None:
    answers = [answer(1, 1.0), answer(1, 0.5), answer(1, 0.0), answer(1, 0.0)]
    answers += [answer(2, 1.0), answer(2, 1.0), answer(2, 1.0, greedy=True)]
    found = by_metric(answers)
    assert found["accuracy_sampled"] == pytest.approx((0.25 + 1) / 2)
    assert found["score"] == pytest.approx((0.375 + 1) / 2)
    assert found["accuracy_greedy"] == 1.0
    assert found["distinct"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["length"] == 3


def test_an_answer_without_a_score_is_counted_and_not_taken_for_zero() -> None:
    found = by_metric([answer(1, 1.0), answer(1, None), answer(2, None), answer(2, None)])
    assert found["score"] == 1.0
    assert found["unscored"] == pytest.approx((0.5 + 1) / 2)


def test_the_gap_is_what_the_choice_of_the_judge_gains() -> None:
    fixed = [answer(1, 1.0), answer(1, 0.0), answer(2, 0.0), answer(2, 1.0)]
    right = gap("policy", "gate", fixed, fixed, "j", 0)
    wrong = gap(
        "policy", "gate", fixed, [answer(p, s) for p, s in ((1, 0), (1, 9), (2, 9), (2, 0))], "j", 0
    )
    blind = gap("policy", "gate", fixed, [each._replace(score=5.0) for each in fixed], "j", 0)
    assert right is not None
    assert wrong is not None
    assert blind is not None
    assert (right.value, wrong.value, blind.value) == (0.5, -0.5, 0.0)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    chance, covered = random.Random(5), 0
    for trial in range(200):
        values = [chance.gauss(0.3, 1.0) for _ in range(60)]
        _, low, high = bootstrap(values, 1000, trial)
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 200 <= 0.985


def scores(mean: float, prompts: int, seed: int) -> dict[int, list[float]]:
    chance = random.Random(seed)
    return {n: [float(chance.random() < mean) for _ in range(4)] for n in range(prompts)}


@pytest.mark.parametrize(
    ("new", "old", "decision"),
    [(0.7, 0.4, "accept"), (0.4, 0.7, "reject"), (0.5, 0.5, "undecided")],
)
def test_the_gate_accepts_rejects_or_cannot_tell(new: float, old: float, decision: str) -> None:
    made = decide(Gate(), checkpoint(2), checkpoint(1), scores(new, 200, 1), scores(old, 200, 2), 0)
    assert made.decision == decision
    assert made.numbers["low"] <= made.numbers["gain"] <= made.numbers["high"]
    assert made.numbers["prompts"] == 200


def test_a_gain_below_the_least_one_asked_for_is_not_accepted() -> None:
    rule = Gate(min_gain=0.25)
    made = decide(rule, checkpoint(2), checkpoint(1), scores(0.6, 200, 1), scores(0.4, 200, 2), 0)
    assert made.decision == "undecided"


def test_the_comparison_is_by_prompt() -> None:
    """Prompts that differ far more than the checkpoints do not hide a small gain on each."""
    old = {n: [float(n % 2)] * 4 for n in range(100)}
    new = {n: [float(n % 2) + 0.01] * 4 for n in range(100)}
    assert decide(Gate(), checkpoint(2), checkpoint(1), new, old, 0).decision == "accept"


def test_what_diverged_or_has_no_scores_is_rejected() -> None:
    some = scores(0.5, 20, 1)
    made = decide(Gate(), checkpoint(2, "diverged"), checkpoint(1), {}, some, 0)
    assert (made.decision, made.rule) == ("reject", "diverged")
    assert status_after(Gate(), made) == "diverged"
    made = decide(Gate(), checkpoint(2), checkpoint(1), {}, some, 0)
    assert (made.decision, made.rule) == ("reject", "unscored")
    assert first(checkpoint(2, "diverged"), checkpoint(1)).decision == "reject"


def test_keep_or_revert_decides_what_becomes_of_the_undecided() -> None:
    some = scores(0.5, 50, 1)
    made = decide(Gate(), checkpoint(2), checkpoint(1), some, some, 0)
    assert status_after(Gate(undecided="revert"), made) == "rejected"
    assert status_after(Gate(undecided="keep"), made) == "accepted"


def anchors(scores: list[tuple[float, float]]) -> list[Answer]:
    """Two answers to each prompt."""
    return [
        Answer(prompt, "anchor", False, f"{prompt} {n}", 3, False, score)
        for prompt, both in enumerate(scores)
        for n, score in enumerate(both)
    ]


@pytest.mark.parametrize(
    ("said", "kappa", "accuracy"),
    [
        ([(5.0, 1.0)] * 30, 1.0, 1.0),
        ([(1.0, 5.0)] * 30, -1.0, 0.0),
        ([(5.0, 1.0)] * 15 + [(1.0, 5.0)] * 15, 0.0, 0.5),
        ([(3.0, 3.0)] * 30, 0.0, 0.0),
        ([(5.0, 1.0)] * 20 + [(3.0, 3.0)] * 10, 0.5, 2 / 3),
    ],
)
def test_kappa_and_accuracy_are_the_same_in_whichever_order_the_answers_stand(
    said: list[tuple[float, float]], kappa: float, accuracy: float
) -> None:
    right_first = [(1.0, 0.0)] * 30
    backwards = [(b, a) if n % 2 else (a, b) for n, (a, b) in enumerate(right_first)]
    turned = [(b, a) if n % 2 else (a, b) for n, (a, b) in enumerate(said)]
    for truth, judge in ((right_first, said), (backwards, turned)):
        found = {
            each.metric: each
            for each in judging("policy", anchors(truth), anchors(judge), [], "j", 0)
        }
        assert found["kappa"].value == pytest.approx(kappa)
        assert found["accuracy"].value == pytest.approx(accuracy)
        low, high = found["kappa"].low, found["kappa"].high
        assert low is not None
        assert high is not None
        assert low <= kappa <= high


def test_drift_is_the_mean_change_as_a_share_of_the_range() -> None:
    truth, then = anchors([(1.0, 0.0)] * 4), anchors([(4.0, 0.0)] * 4)
    now = anchors([(4.0, 0.0)] * 2 + [(4.0, 2.0), (2.0, 0.0)])
    found = {each.metric: each.value for each in judging("policy", truth, now, [], "j", 0, then)}
    assert found["drift"] == pytest.approx((2 + 2) / 8 / 4)
    same = judging("policy", truth, then, [], "j", 0, then)
    assert {each.metric: each.value for each in same}["drift"] == 0.0
    other = [each._replace(text=f"{each.text}!") for each in then]
    assert "drift" not in {each.metric for each in judging("policy", truth, now, [], "j", 0, other)}
