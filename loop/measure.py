"""What a checkpoint's answers on held-out prompts amount to, with 95 % intervals.

Everything is first a number a prompt; a value is their mean and its interval comes from
resampling prompts, because the answers to one prompt are not independent.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy

from store.records import Evaluation, Group, Judgement, Split

RESAMPLES = 2000
LEVEL = 0.95
Judged = Mapping[int, Judgement]
"""Candidate id -> judgement."""


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


def measure(
    model: str,
    split: Split,
    sampled: Sequence[Group],
    greedy: Sequence[Group],
    judged: Judged,
    judge: str,
    seed: int,
) -> list[Evaluation]:
    """Accuracy (the share of answers scored exactly 1), score, length, distinctness and more."""
    per_prompt: dict[str, Sequence[float | None]] = {
        "accuracy_greedy": [_mean_right(group, judged) for group in greedy],
        "accuracy_sampled": [_mean_right(group, judged) for group in sampled],
        "score": [mean_score(group, judged) for group in sampled],
        "length": [_mean(len(each.token_ids) for each in group.candidates) for group in sampled],
        "truncated": [
            _mean(each.finish_reason == "length" for each in group.candidates) for group in sampled
        ],
        "distinct": [
            len({each.text for each in group.candidates}) / len(group.candidates)
            for group in sampled
        ],
        "unscored": [
            _mean(judged[each.id].score is None for each in group.candidates) for group in sampled
        ],
    }
    return [
        evaluation
        for metric, values in per_prompt.items()
        if (evaluation := _evaluation(model, split, metric, values, judge, seed)) is not None
    ]


def gap(
    model: str,
    split: Split,
    sampled: Sequence[Group],
    chosen: Judged,
    judged: Judged,
    judge: str,
    seed: int,
) -> Evaluation | None:
    """The generation-verification gap: what picking the answer that the round's judge likes best
    gains over picking any, by the fixed judge's score. Zero: the judge has nothing left to teach.

    Source: Song et al. (2024), "Mind the Gap", arXiv 2412.02674, definition of the gap with
    best-of-n as the reweighting.
    """
    gains: list[float | None] = []
    for group in sampled:
        scored = [each for each in group.candidates if chosen[each.id].score is not None]
        mean = mean_score(group, judged)
        if not scored or mean is None:
            gains.append(None)
            continue
        top = max(chosen[each.id].score or 0.0 for each in scored)
        best = [judged[each.id].score for each in scored if chosen[each.id].score == top]
        gains.append(_mean(score for score in best if score is not None) - mean)
    return _evaluation(model, split, "gap", gains, judge, seed)


def mean_score(group: Group, judged: Judged) -> float | None:
    """None when no candidate of the group has a score."""
    scores = [judged[each.id].score for each in group.candidates]
    known = [score for score in scores if score is not None]
    return _mean(known) if known else None


def _mean_right(group: Group, judged: Judged) -> float | None:
    scores = [judged[each.id].score for each in group.candidates]
    known = [score == 1.0 for score in scores if score is not None]
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
