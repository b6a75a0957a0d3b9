"""What was gained, as a number a prompt of the test split: paired, and with a 95 % interval.

Two checkpoints are compared on the prompts that both answered, because most of the noise is in
which prompts were drawn; runs that differ in their seed are a second level of drawing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import cast

import numpy

from loop import retention
from loop.measure import LEVEL, bootstrap
from loop.report import Table
from loop.settings import Config
from store.database import Store
from store.records import Checkpoint

RESAMPLES = 10_000
Interval = tuple[float, float, float]
"""Mean, low, high."""
Values = Mapping[str, float]
"""Item (a test prompt's digest, say) -> value."""
ACCURACIES = ("score", "accuracy_sampled", "accuracy_greedy")
METRICS = (*ACCURACIES, "length", "truncated", "distinct", "unscored")

BY_PROMPT = """
SELECT prompt.digest AS digest, asked.purpose AS purpose, avg(score) AS score,
       avg(CASE WHEN score = 1 THEN 1.0 WHEN score IS NOT NULL THEN 0.0 END) AS accuracy,
       avg(candidate.tokens) AS length,
       avg(CASE WHEN finish_reason = 'length' THEN 1.0 ELSE 0.0 END) AS truncated,
       1.0 * count(DISTINCT candidate.text) / count(*) AS "distinct",
       avg(CASE WHEN score IS NULL THEN 1.0 ELSE 0.0 END) AS unscored
FROM candidate
JOIN asked ON asked.id = candidate.asked_id
JOIN prompt ON prompt.id = asked.prompt_id
JOIN judgement ON judgement.candidate_id = candidate.id AND judgement.round_id = asked.round_id
WHERE candidate.checkpoint_id = :checkpoint AND asked.purpose IN ('sampled', 'greedy')
  AND prompt.split = 'test' AND prompt.suite = 'held_out' AND judgement.judge = :judge
GROUP BY prompt.digest, asked.purpose ORDER BY prompt.digest, asked.purpose
"""


def by_prompt(store: Store, checkpoint_id: int, judge: str) -> dict[str, dict[str, float]]:
    """Metric -> digest of a test prompt -> value. `measure` stores the means of these."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in store.query(BY_PROMPT, checkpoint=checkpoint_id, judge=judge):
        values = dict(row)
        digest, greedy = values.pop("digest"), values.pop("purpose") == "greedy"
        accuracy = values.pop("accuracy")
        own = {"accuracy_greedy": accuracy} if greedy else {"accuracy_sampled": accuracy, **values}
        for metric, value in own.items():
            if value is not None:
                found[metric][digest] = value
    return dict(found)


def paired(
    before: Mapping[str, float], after: Mapping[str, float]
) -> tuple[list[float], list[float]]:
    """The values of the prompts that both have, in one order."""
    both = sorted(before.keys() & after.keys())
    return [before[each] for each in both], [after[each] for each in both]


def over_runs(
    runs: Sequence[Sequence[float]], seed: int = 0, less: Sequence[Sequence[float]] | None = None
) -> Interval:
    """Of values a run and prompt: the mean over runs of the mean over prompts, with a 95 %
    interval by percentile bootstrap over runs and, within each run drawn, over its prompts.

    less: values a run that are taken off, each run's drawn apart from those that they are taken
    off, because they are of other prompts. Of one run, the interval is over prompts alone.
    Source: Davison and Hinkley (1997), section 3.8, resampling with replacement at both levels.
    """
    random = numpy.random.default_rng(seed)
    drawn = random.integers(0, len(runs), (RESAMPLES, len(runs)))
    means = numpy.zeros(RESAMPLES)
    sides = [(1.0, runs)] if less is None else [(1.0, runs), (-1.0, less)]
    for sign, values_of in sides:
        for place, run in enumerate(values_of):
            values = numpy.asarray(run, dtype=numpy.float64)
            rows = numpy.nonzero(drawn == place)[0]
            for start in range(0, len(rows), 500):  # 500 rows at a time bounds the memory
                own = rows[start : start + 500]
                picked = values[random.integers(0, len(values), (len(own), len(values)))]
                numpy.add.at(means, own, sign * picked.mean(axis=1))
    means /= len(runs)
    tail = (1 - LEVEL) / 2 * 100
    low, high = numpy.percentile(means, [tail, 100 - tail])
    found = sum(sign * numpy.mean([numpy.mean(run) for run in each]) for sign, each in sides)
    return float(found), float(low), float(high)


def in_common(
    ours: Sequence[Values], theirs: Sequence[Values]
) -> tuple[list[Values], list[Values]]:
    """What of both sides is compared, run by run: the items that both have. All of them where the
    sides of some run have none in common, because then they are of other items altogether."""
    both = list(zip(ours, theirs, strict=True))
    if not all(one.keys() & other.keys() for one, other in both):
        return list(ours), list(theirs)
    return (
        [{item: one[item] for item in one if item in other} for one, other in both],
        [{item: other[item] for item in one if item in other} for one, other in both],
    )


def difference(ours: Sequence[Values], theirs: Sequence[Values], seed: int = 0) -> Interval:
    """Ours less theirs, run by run: item by item where both sides have items in common."""
    if not all(ours) or not all(theirs):
        raise ValueError("a run without values has nothing to be compared")
    ours, theirs = in_common(ours, theirs)
    both = list(zip(ours, theirs, strict=True))
    if all(one.keys() == other.keys() for one, other in both):
        return over_runs([[one[item] - other[item] for item in one] for one, other in both], seed)
    return over_runs(
        [list(each.values()) for each in ours], seed, [list(each.values()) for each in theirs]
    )


def achieved(store: Store, config: Config, checkpoint: Checkpoint | None = None) -> Table:
    """{model, checkpoint, path, baseline, gain, low, high, score, baseline_score, prompts,
    why_no_gain}: a checkpoint (the first model's best) against the one that the rounds began
    from, paired by prompt on the test split, with a 95 % interval by bootstrap over prompts.
    """
    new = checkpoint or retention.best_checkpoint(store, next(iter(config.models)))
    old = store.beginning(new.model)
    found: Table = {
        "model": new.model,
        "checkpoint": new.id,
        "path": str(new.path),
        "baseline": str(old.path),
        **dict.fromkeys(("gain", "low", "high", "score", "baseline_score")),
        "prompts": 0,
        "why_no_gain": "no gain: it is the checkpoint that the rounds began from",
    }
    if new.id == old.id:
        return found
    label = config.evaluate.judge.label
    scores = (by_prompt(store, cast(int, each.id), label).get("score", {}) for each in (old, new))
    before, after = paired(*scores)
    if not before:
        return found | {"why_no_gain": "no gain: no test prompt has a score on both sides"}
    differences = [new - old for old, new in zip(before, after, strict=True)]
    gain, low, high = bootstrap(differences, config.gate.resamples, config.seed)
    return found | {
        "gain": gain,
        "low": low,
        "high": high,
        "score": mean(after),
        "baseline_score": mean(before),
        "prompts": len(before),
        "why_no_gain": None,
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
