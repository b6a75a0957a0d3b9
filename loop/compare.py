"""Two sides, each a run or runs that differ in their seed alone, set beside each other.

Both are measured on the same test prompts, prompt by prompt, so that what they differ in is what
they learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from loop.config import differences
from loop.gain import METRICS, mean, over_runs, paired
from loop.report import Table
from loop.screen import NOTHING, columns, line, put
from loop.sides import SECONDS, SUMMED, Pair, Reading, Side, meet, side
from store.errors import UserError

SAMPLED_BY = ("samples", "temperature", "top_p", "top_k", "max_tokens", "stop")
SHOWN_SETTINGS = 12


def compare(a: str, b: str, runs: Path) -> Table:
    """{a SIDE, b SIDE, paired {runs, seeds [[a, b]], prompts}, better ("a", "b", None: not told
    apart), metrics [{metric, a, b, a_base, b_base, difference, low, high, prompts}], rounds
    [{round, a, b, difference, low, high, a_tokens, b_tokens}], settings [{key, a, b}], warnings}.

    A SIDE has name, kind (run, folder or recipe), runs [path], seeds, model, rounds, accepted,
    prompts, examples, generated_tokens, seconds, in_policy, in_judge, in_trainer (totals of its
    runs), best [{path, round}] and left_out [{path, why}].

    Differences are b - a of the best checkpoints, and in `rounds` of the incumbents after a round,
    on the test prompts of both sides, with 95 % intervals; `better` goes by `score`. `a_base` and
    `b_base` are of the checkpoints that the rounds began from. Tokens are a run's mean.

    Raises UserError when the sides cannot be compared.
    """
    sides = [side(name, runs) for name in (a, b)]
    pairs, left_out = meet(*sides)
    _refuse_unlike(pairs)
    metrics = [row for name in METRICS if (row := _metric(pairs, name)) is not None]
    score = next((row for row in metrics if row["metric"] == "score"), None)
    return {
        "a": _side(sides[0], [pair[0] for pair in pairs], left_out[0]),
        "b": _side(sides[1], [pair[1] for pair in pairs], left_out[1]),
        "paired": {
            "runs": len(pairs),
            "seeds": [[one.config.seed, other.config.seed] for one, other in pairs],
            "prompts": sum(len(one.test_prompts() & other.test_prompts()) for one, other in pairs),
        },
        "better": _better(score),
        "metrics": metrics,
        "rounds": _rounds(pairs),
        "settings": _settings(pairs[0]),
        "warnings": _warnings(pairs),
    }


def _refuse_unlike(pairs: Sequence[Pair]) -> None:
    for one, other in pairs:
        judges = [each.config.evaluate.judge.label for each in (one, other)]
        if judges[0] != judges[1]:
            raise UserError(
                f"{one.root} was measured by judge {judges[0]!r} and {other.root} by "
                f"{judges[1]!r}; give both the same [evaluate]"
            )
        if not one.test_prompts() & other.test_prompts():
            raise UserError(
                f"{one.root} and {other.root} were measured on different prompts: of "
                f"{len(one.test_prompts())} and {len(other.test_prompts())} test prompts none is "
                "the same; give both the same seed and [evaluate]"
            )


def _warnings(pairs: Sequence[Pair]) -> list[str]:
    found = []
    one, other = pairs[0]
    for key in SAMPLED_BY:
        values = [getattr(each.config.evaluate, key) for each in (one, other)]
        if values[0] != values[1]:
            found.append(f"answers were sampled unlike: evaluate.{key} {values[0]} and {values[1]}")
    if len(versions := {each.judge_version for pair in pairs for each in pair}) > 1:
        found.append(f"the judge was of versions {' and '.join(sorted(versions))}")
    prompts = [len(each.test_prompts()) for pair in pairs for each in pair]
    shared = [len(one.test_prompts() & other.test_prompts()) for one, other in pairs]
    if 2 * sum(shared) < sum(prompts):
        found.append(
            f"{sum(shared):,} of {sum(prompts[::2]):,} and {sum(prompts[1::2]):,} test prompts "
            "are the same, and the others are left out"
        )
    return found


def _side(side: Side, readings: Sequence[Reading], left_out: list[Table]) -> Table:
    return {
        "name": side.name,
        "kind": side.kind,
        "runs": [str(each.root) for each in readings],
        "seeds": [each.config.seed for each in readings],
        "model": readings[0].model,
        **{key: sum(each.totals[key] for each in readings) for key in (*SUMMED, *SECONDS)},
        "best": [{"path": each.best_path, "round": each.best_round} for each in readings],
        "left_out": left_out,
    }


def _metric(pairs: Sequence[Pair], metric: str) -> Table | None:
    found = _difference(pairs, metric, lambda reading: reading.best)
    if found is None:
        return None
    base = _difference(pairs, metric, lambda reading: reading.base) or {"a": None, "b": None}
    return {"metric": metric, **found, "a_base": base["a"], "b_base": base["b"]}


def _difference(pairs: Sequence[Pair], metric: str, of: Callable[[Reading], int]) -> Table | None:
    """{a, b, difference, low, high, prompts}. None when no prompt has a value on both sides."""
    met = [paired(*(each.values[of(each)].get(metric, {}) for each in pair)) for pair in pairs]
    met = [(left, right) for left, right in met if left]
    if not met:
        return None
    by_run = [[b - a for a, b in zip(left, right, strict=True)] for left, right in met]
    difference, low, high = over_runs(by_run)
    return {
        "a": mean([mean(left) for left, _ in met]),
        "b": mean([mean(right) for _, right in met]),
        "difference": difference,
        "low": low,
        "high": high,
        "prompts": sum(len(left) for left, _ in met),
    }


def _better(score: Table | None) -> str | None:
    if score is None or score["low"] <= 0 <= score["high"]:
        return None
    return "b" if score["low"] > 0 else "a"


def _rounds(pairs: Sequence[Pair]) -> list[Table]:
    last = max(len(each.after) for pair in pairs for each in pair)
    found = []
    for number in range(last):
        row = _difference(pairs, "score", lambda each: each.standing(number).checkpoint)  # noqa: B023 - used at once
        if row is None:
            continue
        tokens = [
            mean([each.standing(number).generated_tokens for each in own])
            for own in zip(*pairs, strict=True)
        ]
        del row["prompts"]
        found.append({"round": number, **row, "a_tokens": tokens[0], "b_tokens": tokens[1]})
    return found


def _settings(pair: Pair) -> list[dict[str, Any]]:
    one, other = (each.config for each in pair)
    return [
        {"key": each["key"], "a": each["from"], "b": each["to"]} for each in differences(one, other)
    ]


# On a screen


def view(console: Console, found: Table) -> None:
    """What each side took, how good it became, how it got there, and which is better."""
    sides = [found["a"], found["b"]]
    for letter, each in zip("AB", sides, strict=True):
        _show_side(console, letter, each)
    line(console)
    _show_totals(console, sides)
    _show_metrics(console, found["metrics"])
    _show_rounds(console, found["rounds"])
    _show_settings(console, found["settings"])
    for each in found["warnings"]:
        line(console, f"warning: {each}")
    line(console, _paired_by(found["paired"]))
    line(console, verdict(found))


def _show_side(console: Console, letter: str, found: Table) -> None:
    seeds = ", ".join(map(str, found["seeds"]))
    many = f"{found['kind']} {found['name']}, " if found["kind"] != "run" else ""
    line(console, f"{letter}  {many}seed {seeds}")
    for each in found["best"]:
        line(console, f"   best after round {each['round']}: {each['path']}")
    for each in found["left_out"]:
        line(console, f"   left out {each['path']}: {each['why']}")


def _show_totals(console: Console, sides: Sequence[Table]) -> None:
    grid = columns("", "A", "B", right=(1, 2))
    grid.add_row("runs", *(f"{len(each['runs'])}" for each in sides))
    for key in SUMMED:
        grid.add_row(key.replace("_", " "), *(f"{each[key]:,}" for each in sides))
    for key in SECONDS:
        grid.add_row(key.replace("_", " "), *(f"{each[key]:,.1f}" for each in sides))
    put(console, grid)
    line(console)


def _show_metrics(console: Console, metrics: Sequence[Table]) -> None:
    grid = columns("test split", "A base", "best", "B base", "best", "B - A", right=range(1, 5))
    for row in metrics:
        values = (_value(row[key]) for key in ("a_base", "a", "b_base", "b"))
        grid.add_row(row["metric"], *values, _interval(row))
    put(console, grid)
    line(console)


def _show_rounds(console: Console, each: Sequence[Table]) -> None:
    """`score` of the incumbent after a round, and what a run had generated by then."""
    grid = columns(
        "round", "A score", "B score", "B - A", "A tokens", "B tokens", right=(0, 1, 2, 4, 5)
    )
    for row in each:
        tokens = (f"{row[key]:,.0f}" for key in ("a_tokens", "b_tokens"))
        values = (_value(row["a"]), _value(row["b"]), _interval(row))
        grid.add_row(str(row["round"]), *values, *tokens)
    put(console, grid)
    line(console)


def _show_settings(console: Console, found: Sequence[Table]) -> None:
    line(console, f"{len(found)} settings differ" if found else "the settings are the same")
    for each in found[:SHOWN_SETTINGS]:
        line(console, f"  {each['key']}: {each['a']} and {each['b']}")
    if len(found) > SHOWN_SETTINGS:
        line(console, f"  and {len(found) - SHOWN_SETTINGS} more (--json has all)")


def _paired_by(found: Table) -> str:
    if found["runs"] == 1:
        over = "over prompts of one pair of runs, another seed may tell otherwise"
    else:
        over = f"over {found['runs']} pairs of runs and their prompts"
    return f"paired by {found['prompts']:,} test prompts; 95 % intervals by bootstrap {over}"


def verdict(found: Table) -> str:
    """Which side is better, in words."""
    score = next((row for row in found["metrics"] if row["metric"] == "score"), None)
    if score is None:
        return "not told apart: no test prompt has a score on both sides"
    if found["better"] is None:
        return f"not told apart: B - A is {_interval(score)} in score"
    if found["better"] == "a":
        swapped = {"difference": -score["difference"], "low": -score["high"], "high": -score["low"]}
        return f"A is better by {_interval(swapped)} in score"
    return f"B is better by {_interval(score)} in score"


def _value(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _interval(found: Table) -> str:
    return f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
