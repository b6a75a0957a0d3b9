"""How results of recipes are told: a line, a table and its plots, and kept as JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import reported

from loop import claims, config
from loop.settings import digest
from store.errors import UserError

Table = dict[str, Any]
CONTROLS = ("arenas/spell", "arenas/collapse")
"""Trials of the trial itself: all that they claim must be confirmed. Among it is that rounds help,
and that there is no difference where nothing differs."""


def plain_name(recipe: str) -> str:
    """What a recipe is called in the name of a file or folder. recipe: its key in results; of two
    files of one name, and of one and a published recipe, each has its own."""
    own = recipe.endswith(".toml")
    return f"{title(recipe)}-{digest(recipe)[:6]}" if own else recipe.replace("/", "-")


def title(recipe: str) -> str:
    """What it is called where it is told of."""
    return Path(recipe).stem if recipe.endswith(".toml") else recipe


def kept(out: Path | None) -> dict[str, Table]:
    file = None if out is None else out / "results.json"
    return json.loads(file.read_text()) if file is not None and file.is_file() else {}


def write(out: Path, rows: Mapping[str, Table]) -> None:
    """RESULTS.md, results.json and the plots."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    (out / "RESULTS.md").write_text(markdown(rows))
    for name, row in rows.items():
        if drawing() is not None:
            plot(out / "plots" / f"{plain_name(name)}.svg", row)


def line(row: Table) -> str:
    """A recipe's first claim in a line."""
    first = row["claims"][0]
    ours = row["variants"]["recipe"]
    return (
        f"{title(row['recipe']):<22} {_ends(ours['course'])}  {first['verdict']}: "
        f"{_interval(first)} against {first['against']}  {ours['tokens']:,} tokens, "
        f"{ours['seconds']:.0f} s a run, {ours['slowest']:.0f} s the slowest"
    )


HEAD = """\
# Results of the recipes

Each recipe's claim was written into its file and committed before these runs were made. Every \
recipe ran beside its control (the claimed ingredient off) and beside plain iterative DPO, all \
three from one warm-up, over seeds {seeds} and with as many generated tokens, within 10 %, unless \
it says otherwise; settings were tuned on seeds from 100 up. {reading}

Made by `make results`{plots}.
"""
TUNING = """\
# A tuning run

{what}. It is no result: nothing was committed before these runs were made, and what is seen here \
may be changed. Every recipe ran beside its control (the claimed ingredient off) and beside plain \
iterative DPO, all three from one warm-up. {reading}

Made by `tests/benchmarks/results.py`{plots}.
"""
READING = """\
Tokens are those generated in rounds to learn from (answers, judgements on them, proposed \
prompts); measuring is the same for all and is not counted. Minutes are those of the rounds, \
measuring included.

Start and end are of the metric that is named, on the test split, and intervals are 95 % by \
bootstrap over seeds and, within each, over prompts. A difference is paired by seed and, of the \
prompts that both sides answered, by prompt; where a seed has none of those, by seed alone. \
*confirmed* and *refuted* mean that the whole interval lies on one side. With as few seeds the \
intervals are somewhat too narrow where seeds differ much, and nothing is corrected for there \
being {claims} claims.

*accuracy_sampled* is the share of right answers among several to each prompt, drawn at \
temperature 1; *length* is the mean of their tokens; *agreement* is how often a judge or a reward \
model puts the better of two answers of known worth first, and is measured on such pairs in place \
of test prompts. An arena is a task with its warm-up, a file in [arenas](arenas). Plain iterative \
DPO learns from pairs that the verifier makes, who knows the right answers; most recipes do \
without it, so theirs are not expected to end as high. Where a recipe's `plain` has filter.pairs, \
it learns from fewer pairs than its tokens would give, so that no run takes long.

All of it is the embedded model (a million parameters) on tasks that take it a second: it says \
whether a mechanism does what its paper says *there*, and nothing of how much it does for a large \
model."""


def _head(rows: Sequence[Table], claims: int) -> str:
    said = {
        "reading": READING.format(claims=claims),
        "plots": "; plots are under [plots](plots)" if drawing() is not None else "",
    }
    if not all(_tuned(row) for row in rows):
        return HEAD.format(seeds=_listed(reported.SEEDS), **said)
    ways = list(dict.fromkeys(_runs_of(row) for row in rows))
    return TUNING.format(what=ways[0] if len(ways) == 1 else "Seeds and settings differ", **said)


def _tuned(row: Table) -> bool:
    return not {*row["seeds"]} & {*reported.SEEDS}


def _runs_of(row: Table) -> str:
    sets = row.get("sets")
    under = f" with {', '.join(f'`{each}`' for each in sets)}" if sets else ""
    return f"Over seeds {_listed(row['seeds'])}{under}"


def _durations(rows: Sequence[Table]) -> str:
    runs = [(row, each) for row in rows for each in row["variants"].values()]
    hours = sum(len(row["seeds"]) * each["seconds"] for row, each in runs) / 3600
    return (
        f"One after the other all runs take {hours:.1f} hours, and two at once half of that; the "
        f"longest took {max(each['slowest'] for _, each in runs):.0f} s. Warm-ups come on top."
    )


def markdown(rows: Mapping[str, Table]) -> str:
    """RESULTS.md."""
    ordered = sorted(rows.values(), key=lambda row: (row["recipe"] in CONTROLS, row["recipe"]))
    claimed = {row["recipe"]: _claims(row) for row in ordered}
    lines = [_head(ordered, sum(map(len, claimed.values()))), _first_claims(claimed)]
    columns = ("recipe", "arena", "metric", "start", "recipe's end", "control's", "plain DPO's")
    columns += ("verdict", "tokens, thousands", "minutes")
    lines += [_cells(columns), _cells(["---"] * len(columns))]
    for row in ordered:
        own = {name: row["variants"][name] for name in NAMES}
        lines.append(
            _cells(
                [
                    _linked(row["recipe"]),
                    row["arena"],
                    row["shown"],
                    _value(own["recipe"]["course"][0]) if own["recipe"]["course"] else "",
                    *(
                        _value(each["course"][-1]) if each["course"] else ""
                        for each in own.values()
                    ),
                    "; ".join(each["verdict"] or UNTRIED for each in claimed[row["recipe"]]),
                    " / ".join(f"{each['tokens'] / 1000:.0f}" for each in own.values()),
                    " / ".join(f"{each['seconds'] / 60:.1f}" for each in own.values()),
                ]
            )
        )
    lines.append(
        "\nTokens and minutes are of a run: the recipe's / the control's / plain DPO's. "
        + _durations(ordered)
    )
    for row in ordered:
        lines.append(f"\n## {title(row['recipe'])}\n")
        if tuple(row["seeds"]) != reported.SEEDS:
            tuned = ": a tuning run" if _tuned(row) else ""
            lines.append(f"{_runs_of(row)}{tuned}.\n")
        lines += _unequal(row["variants"]) + _by_other_code(row.get("code", {}))
        for claim in claimed[row["recipe"]]:
            lines.append(_told(claim))
            if claim["found"]:
                lines.append(f"  {' '.join(claim['found'].split())}")
    return "\n".join(lines) + "\n"


def _claims(row: Table) -> list[Table]:
    """As the recipe says them now; as they were tried where it cannot be read any more."""
    try:
        now = claims.read(config.recipe_of(row["recipe"])).claim
    except UserError:
        return list(row["claims"])
    return claims.with_results(now, row["claims"])


def _first_claims(claimed: Mapping[str, Sequence[Table]]) -> str:
    of_recipes = [own for name, own in claimed.items() if name not in CONTROLS]
    first = _counted(own[0] for own in of_recipes)
    return f"First claims: {first}. All claims: {_counted(chain(*of_recipes))}.\n"


def _counted(claimed: Iterable[Table]) -> str:
    said = Counter(each["verdict"] or UNTRIED for each in claimed)
    verdicts = ["confirmed", "refuted", "undecided", *([UNTRIED] if said[UNTRIED] else [])]
    return ", ".join(f"{said[each]} {each}" for each in verdicts)


def _told(claim: Table) -> str:
    said = f"{claim['says']}. Expected {claim['expect']}{_margin(claim)}"
    if claim["verdict"] is None:
        return f"- **{UNTRIED}**: {said}."
    sides = ""
    if claim["items"]:
        sides = f" ({claim['ours']:.3f} against {claim['theirs']:.3f} of "
        sides += f"{OF[claim['against']]}, {claim['items']:,} values"
        left = claim["left_out"]
        sides += f", {left:,} left out that only one side has)" if left else ")"
    return f"- **{claim['verdict']}**: {said}; {_interval(claim)}{sides}."


def _unequal(variants: Table) -> list[str]:
    """A line that says which runs did not generate as many tokens as the recipe's, if any."""
    own = variants["recipe"]["tokens"]
    if not own:
        return ["The recipe's runs generated no tokens to learn from.\n"]
    more = {name: variants[name]["tokens"] / own - 1 for name in NAMES}
    off = [f"{NAMES[name]} {each:+.0%}" for name, each in more.items() if abs(each) > MOST_UNEQUAL]
    return [f"Generated tokens, against the recipe's: {', '.join(off)}.\n"] if off else []


def _by_other_code(runs: Mapping[str, Sequence[str]]) -> list[str]:
    """A line that says which runs were made by which code, if it was not the same for all."""
    if len(runs) < 2:
        return []
    told = "; ".join(f"{code} made {', '.join(made)}" for code, made in runs.items())
    return [f"Its runs are of different code: {told}.\n"]


def _linked(recipe: str) -> str:
    shown = title(recipe)
    return shown if drawing() is None else f"[{shown}](plots/{plain_name(recipe)}.svg)"


MOST_UNEQUAL = 0.1
UNTRIED = "not tried yet"

OF = {
    "control": "the control",
    "plain": "plain iterative DPO",
    "start": "where the rounds began",
    "zero": "no change",
}


def _cells(cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _margin(claim: Table) -> str:
    return f" by {claim['margin']:g}" if claim["margin"] else ""


def _interval(claim: Table) -> str:
    if claim["difference"] is None:
        return "no values"
    return f"{claim['difference']:+.3f} [{claim['low']:+.3f}, {claim['high']:+.3f}]"


def _value(point: Any) -> str:
    mean, low, high = point
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _ends(course: Any) -> str:
    return f"{course[0][0]:.3f} -> {course[-1][0]:.3f}" if course else "-"


COLOURS = {"recipe": "#1f4e9c", "control": "#c8641b", "plain": "#777777"}
NAMES = {"recipe": "recipe", "control": "control", "plain": "plain iterative DPO"}
"""In the order of columns: rows that were kept as JSON have theirs by name."""


@cache
def drawing() -> Any:
    """matplotlib, or None where it is missing, which is said once."""
    try:
        import matplotlib
    except ImportError:
        print(
            "results.py: plots are left out, because matplotlib is not installed; "
            "`make results` installs it, and so does pip install matplotlib",
            file=sys.stderr,
        )
        return None
    matplotlib.use("svg")
    return matplotlib


def plot(file: Path, row: Table) -> None:
    """The course of the shown metric, round by round, with its interval."""
    from matplotlib import pyplot

    matplotlib = drawing()
    matplotlib.rcParams["svg.hashsalt"] = row["recipe"]  # the same rows make the same bytes
    file.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(5.2, 3.2), layout="constrained")
    longest = 1
    for name in NAMES:
        variant = row["variants"][name]
        if not variant["course"]:
            continue
        means, lows, highs = zip(*variant["course"], strict=True)
        at = range(len(means))
        longest = max(longest, len(means))
        axes.plot(at, means, marker="o", markersize=3, color=COLOURS[name], label=NAMES[name])
        axes.fill_between(at, lows, highs, color=COLOURS[name], alpha=0.15, linewidth=0)
    axes.set_xlabel("round")
    axes.set_ylabel(f"{row['shown']}, test split")
    axes.set_xticks(range(longest))
    axes.set_title(title(row["recipe"]), loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
