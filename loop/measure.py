"""What a checkpoint's answers on held-out prompts amount to, with 95 % intervals.

Everything is first a number a prompt; a value is their mean and its interval comes from
resampling prompts, because the answers to one prompt are not independent.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy

from store.records import Answer, Evaluation, Split

RESAMPLES = 2000
LEVEL = 0.95


def bootstrap(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float, float]:
    """(mean, low, high) of values, by percentile bootstrap. Source: Efron (1979)."""
    drawn = numpy.asarray(values, dtype=numpy.float64)
    random = numpy.random.default_rng(seed)
    means = numpy.empty(resamples)
    for start in range(0, resamples, 500):  # 500 rows at a time bounds the memory
        size = (min(500, resamples - start), len(drawn))
        means[start : start + size[0]] = drawn[random.integers(0, len(drawn), size)].mean(axis=1)
    tail = (1 - LEVEL) / 2 * 100
    low, high = numpy.percentile(means, [tail, 100 - tail])
    return float(drawn.mean()), float(low), float(high)


def judging(
    model: str,
    truth: Sequence[Answer],
    judged: Sequence[Answer],
    variances: Sequence[float],
    judge: str,
    seed: int,
    before: Sequence[Answer] = (),
) -> list[Evaluation]:
    """How well a judge tells answers of known worth apart, and how much it says at all.

    truth, judged: the same answers in the same order, as the fixed judge and as `judge` scored
    them. agreement: of the pairs of answers to one prompt that differ in truth, the share that
    the judge puts in that order, ties counting half; 0.5 is a coin. accuracy: the same, a tie being
    wrong. kappa: Cohen's, of which of the two is better, the judge's word against the truth: 0 is
    chance. drift: the mean change of a score since `before`, which are the same answers as an
    earlier judge scored them, as a share of the range of all these scores. modal: the share of its
    commonest score; 1 is a judge that says the same of everything. variance: mean of the votes'
    variances. unscored: the share without a score.
    """
    known, said = (by_prompt(each, "anchor", greedy=False) for each in (truth, judged))
    both = list(zip(known, said, strict=True))
    per_prompt: dict[str, Sequence[float | None]] = {
        "agreement": [_mean_of(_orders(*each), ties=0.5) for each in both],
        "accuracy": [_mean_of(_orders(*each), ties=0.0) for each in both],
        "score": [mean_score(group) for group in said],
        "unscored": [_mean(each.score is None for each in group) for group in said],
        "variance": variances,
    }
    found = [
        _evaluation(model, "anchor", metric, values, judge, seed)
        for metric, values in per_prompt.items()
    ]
    told_apart = tuple(
        share
        for each in both
        if (share := _mean_of(_orders(*each, every=True), ties=0.5)) is not None
    )
    found = [
        replace(each, items=told_apart) if each and each.metric == "agreement" else each
        for each in found
    ]
    scores = Counter(each.score for group in said for each in group if each.score is not None)
    if scores:
        modal = scores.most_common(1)[0][1] / scores.total()
        found.append(
            Evaluation(
                model=model,
                split="anchor",
                metric="modal",
                value=modal,
                n=scores.total(),
                judge=judge,
            )
        )
    compared = [orders for each in both if (orders := _orders(*each))]
    if compared:
        value, low, high = _bootstrapped_kappa(compared, seed)
        found.append(
            Evaluation(
                model=model,
                split="anchor",
                metric="kappa",
                value=value,
                low=low,
                high=high,
                n=len(compared),
                judge=judge,
            )
        )
    if (moved := _drift(before, judged)) is not None:
        found.append(
            Evaluation(
                model=model, split="anchor", metric="drift", value=moved[0], n=moved[1], judge=judge
            )
        )
    return [replace(each, suite="judge") for each in found if each is not None]


def _orders(
    truth: Sequence[Answer], judged: Sequence[Answer], *, every: bool = False
) -> list[tuple[int, int]]:
    """(truth, judge) of each two answers that differ in truth: 1 the first is better, -1 the
    second, 0 the judge sees no difference.

    every: also of answers to which the judge gave no score, as if it saw no difference: so what
    there is of a prompt does not hang on the judge.
    """
    both = [
        (real.score, said.score)
        for real, said in zip(truth, judged, strict=True)
        if real.score is not None and (every or said.score is not None)
    ]
    return [
        (
            _sign(real - other_real),
            0 if said is None or other_said is None else _sign(said - other_said),
        )
        for (real, said), (other_real, other_said) in combinations(both, 2)
        if real != other_real
    ]


def _mean_of(orders: Sequence[tuple[int, int]], *, ties: float) -> float | None:
    """The share in which judge and truth say the same."""
    if not orders:
        return None
    return _mean(ties if said == 0 else float(said == real) for real, said in orders)


def _kappa(orders: Sequence[tuple[int, int]]) -> float:
    """Cohen's kappa, (p_o - p_e) / (1 - p_e). Source: Cohen (1960).

    Each pair counts both ways round, as none of its two orders is the right one.
    """
    both = [*orders, *((-real, -said) for real, said in orders)]
    n = len(both)
    observed = sum(real == said for real, said in both) / n
    real, said = (Counter(side) for side in zip(*both, strict=True))
    chance = sum(real[which] * said[which] for which in (-1, 0, 1)) / n**2
    return (observed - chance) / (1 - chance) if chance < 1 else 0.0


def _bootstrapped_kappa(
    by_prompt: Sequence[Sequence[tuple[int, int]]], seed: int
) -> tuple[float, float, float]:
    """(kappa, low, high): of all pairs, and its interval by resampling prompts."""
    # A row a prompt, a column for each of the nine ways truth and judge may meet.
    counts = numpy.zeros((len(by_prompt), 3, 3))
    for place, orders in enumerate(by_prompt):
        for real, said in orders:
            counts[place, real + 1, said + 1] += 1
            counts[place, 1 - real, 1 - said] += 1
    random = numpy.random.default_rng(seed)
    drawn = random.integers(0, len(counts), (RESAMPLES, len(counts)))
    weights = numpy.stack([numpy.bincount(each, minlength=len(counts)) for each in drawn])
    tables = numpy.einsum("rp,pij->rij", weights, counts)
    total = tables.sum((1, 2))
    observed = tables.trace(axis1=1, axis2=2) / total
    chance = (tables.sum(2) * tables.sum(1)).sum(1) / total**2
    kappas = numpy.where(chance < 1, (observed - chance) / numpy.maximum(1 - chance, 1e-12), 0.0)
    tail = (1 - LEVEL) / 2 * 100
    low, high = numpy.percentile(kappas, [tail, 100 - tail])
    return _kappa([pair for orders in by_prompt for pair in orders]), float(low), float(high)


def _drift(before: Sequence[Answer], judged: Sequence[Answer]) -> tuple[float, int] | None:
    """Mean change of a score, of the range of all, and of how many; None: nothing to compare."""
    if [each.text for each in before] != [each.text for each in judged]:
        return None
    both = [
        (then.score, now.score)
        for then, now in zip(before, judged, strict=True)
        if then.score is not None and now.score is not None
    ]
    if not both:
        return None
    scores = [score for pair in both for score in pair]
    span = max(scores) - min(scores)
    return (_mean(abs(now - then) for then, now in both) / span if span else 0.0), len(both)


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)


def measure(
    model: str, split: Split, answers: Sequence[Answer], judge: str, seed: int
) -> list[Evaluation]:
    """Accuracy (the share of answers scored exactly 1), score, length, distinctness and more, of
    the answers to prompts of `split`."""
    sampled = by_prompt(answers, split, greedy=False)
    if not sampled:  # a suite is answered greedily alone
        sampled = by_prompt(answers, split, greedy=True)
    per_prompt: dict[str, Sequence[float | None]] = {
        "accuracy_greedy": [_right(group) for group in by_prompt(answers, split, greedy=True)],
        "accuracy_sampled": [_right(group) for group in sampled],
        "score": [mean_score(group) for group in sampled],
        "length": [_mean(each.tokens for each in group) for group in sampled],
        "truncated": [_mean(each.truncated for each in group) for group in sampled],
        "distinct": [len({each.text for each in group}) / len(group) for group in sampled],
        "unscored": [_mean(each.score is None for each in group) for group in sampled],
    }
    return [
        evaluation
        for metric, values in per_prompt.items()
        if (evaluation := _evaluation(model, split, metric, values, judge, seed)) is not None
    ]


def gap(
    model: str,
    split: Split,
    answers: Sequence[Answer],
    chosen: Sequence[Answer],
    judge: str,
    seed: int,
) -> Evaluation | None:
    """The generation-verification gap: what picking the answer that the round's judge likes best
    gains over picking any, by the fixed judge's score. Zero: the judge has nothing left to teach.

    answers, chosen: the same answers in the same order, as the fixed and the round's judge scored
    them.

    Source: Song et al. (2024), "Mind the Gap", arXiv 2412.02674, definition of the gap with
    best-of-n as the reweighting.
    """
    fixed = by_prompt(answers, split, greedy=False)
    liked = by_prompt(chosen, split, greedy=False)
    gains = [_gain(*each) for each in zip(fixed, liked, strict=True)]
    return _evaluation(model, split, "gap", gains, judge, seed)


def _gain(group: Sequence[Answer], liked: Sequence[Answer]) -> float | None:
    known = [each.score for each in liked if each.score is not None]
    mean = mean_score(group)
    if not known or mean is None:
        return None
    best = [
        answer.score
        for answer, like in zip(group, liked, strict=True)
        if like.score == max(known) and answer.score is not None
    ]
    return _mean(best) - mean if best else None


def correlation(pairs: Sequence[tuple[float, ...]]) -> float | None:
    """Pearson's. None where one side does not vary."""
    if len(pairs) < 2:
        return None
    means = [statistics.fmean(side) for side in zip(*pairs, strict=True)]
    apart = [(a - means[0], b - means[1]) for a, b in pairs]
    of_a, of_b = (math.fsum(each[side] ** 2 for each in apart) for side in (0, 1))
    if of_a == 0 or of_b == 0:
        return None
    together = math.fsum(a * b for a, b in apart)
    return max(-1.0, min(1.0, together / math.sqrt(of_a * of_b)))


def by_prompt(answers: Sequence[Answer], split: Split, *, greedy: bool) -> list[list[Answer]]:
    """The answers of one kind, a list a prompt."""
    groups: dict[int, list[Answer]] = {}
    for each in answers:
        if each.split == split and bool(each.greedy) == greedy:
            groups.setdefault(each.prompt_id, []).append(each)
    return list(groups.values())


def mean_score(group: Sequence[Answer]) -> float | None:
    """None when no answer of the group has a score."""
    known = [each.score for each in group if each.score is not None]
    return _mean(known) if known else None


def _right(group: Sequence[Answer]) -> float | None:
    known = [each.score == 1.0 for each in group if each.score is not None]
    return _mean(known) if known else None


def _evaluation(
    model: str, split: Split, metric: str, values: Sequence[float | None], judge: str, seed: int
) -> Evaluation | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean, low, high = bootstrap(known, RESAMPLES, seed)
    return Evaluation(
        model=model,
        split=split,
        metric=metric,
        value=mean,
        low=low,
        high=high,
        n=len(known),
        judge=judge,
    )


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
