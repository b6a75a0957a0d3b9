"""How results of recipes are told: a line, a table and its plots, and kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Table = dict[str, Any]
CONTROLS = ("arenas/spell", "arenas/collapse")
"""Trials of the trial itself: what must be confirmed, and what must not."""


def plain_name(recipe: str) -> str:
    """What a recipe, which may be a file or an arena, is called in the name of a file."""
    return recipe.removesuffix(".toml").strip("/").replace("/", "-")


def kept(out: Path | None) -> dict[str, Table]:
    file = None if out is None else out / "results.json"
    return json.loads(file.read_text()) if file is not None and file.is_file() else {}


def write(out: Path, rows: Mapping[str, Table]) -> None:
    """RESULTS.md, results.json and the plots."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    (out / "RESULTS.md").write_text(markdown(rows))
    for name, row in rows.items():
        plot(out / "plots" / f"{plain_name(name)}.svg", row)


def line(row: Table) -> str:
    """A recipe's first claim in a line."""
    first = row["claims"][0]
    ours = row["variants"]["recipe"]
    return (
        f"{row['recipe']:<22} {_ends(ours['course'])}  {first['verdict']}: "
        f"{_interval(first)} against {first['against']}  {ours['tokens']:,} tokens, "
        f"{ours['seconds']:.0f} s a run, {ours['slowest']:.0f} s the slowest"
    )


HEAD = """\
# Results of the recipes

Each recipe's claim was written into its file and committed before these runs were made. Every \
recipe ran beside its control (the claimed ingredient off) and beside plain iterative DPO, all \
three from one warm-up, over seeds {seeds}, and at as many generated tokens to a tenth where it is \
not said otherwise; settings were tuned on seeds from 100 up. Start and end are of the test split, \
and intervals are 95 % by bootstrap over seeds and, within each, over prompts. A difference is \
paired by seed, and by prompt where both sides answer the same ones. *confirmed* and *refuted* \
mean that the whole interval lies on one side.

All of it is the embedded model (a million parameters) on tasks of a second: it says whether a \
mechanism does what its paper says *there*, and nothing of how much it does for a large model.

Made by `make results`; plots are under [plots](plots).
"""


def markdown(rows: Mapping[str, Table]) -> str:
    """RESULTS.md."""
    from loop import claims

    seeds = ", ".join(map(str, next(iter(rows.values()))["seeds"])) if rows else ""
    lines = [HEAD.format(seeds=seeds)]
    columns = ("recipe", "arena", "start", "recipe's end", "control's", "plain DPO's", "verdict")
    columns += ("tokens, thousands", "minutes")
    lines += [_cells(columns), _cells(["---"] * len(columns))]
    ordered = sorted(rows.values(), key=lambda row: (row["recipe"] in CONTROLS, row["recipe"]))
    for row in ordered:
        own = row["variants"]
        lines.append(
            _cells(
                [
                    f"[{row['recipe']}](plots/{plain_name(row['recipe'])}.svg)",
                    row["arena"],
                    _value(own["recipe"]["course"][0]) if own["recipe"]["course"] else "",
                    *(
                        _value(each["course"][-1]) if each["course"] else ""
                        for each in own.values()
                    ),
                    "; ".join(each["verdict"] for each in row["claims"]),
                    " / ".join(f"{each['tokens'] / 1000:.0f}" for each in own.values()),
                    " / ".join(f"{each['seconds'] / 60:.1f}" for each in own.values()),
                ]
            )
        )
    lines.append("\nTokens and minutes are of a run: the recipe's / the control's / plain DPO's.")
    for row in ordered:
        lines.append(f"\n## {row['recipe']}\n")
        lines += _unequal(row["variants"])
        for claim, now in zip(row["claims"], claims.read(row["recipe"]).claim, strict=False):
            sides = ""
            if claim["items"]:
                sides = f" ({claim['ours']:.3f} against {claim['theirs']:.3f} of "
                sides += f"{OF[claim['against']]}, {claim['items']:,} values)"
            lines.append(
                f"- **{claim['verdict']}**: {claim['says']}. Expected {claim['expect']}"
                f"{_margin(claim)}; {_interval(claim)}{sides}."
            )
            if now.found:
                lines.append(f"  {now.found.strip()}")
    return "\n".join(lines) + "\n"


def _unequal(variants: Table) -> list[str]:
    """A line that says which runs did not generate as many tokens as the recipe's, if any."""
    own = variants["recipe"]["tokens"]
    off = [
        f"{NAMES[name]} {each['tokens'] / own - 1:+.0%}"
        for name, each in variants.items()
        if abs(each["tokens"] / own - 1) > MOST_UNEQUAL
    ]
    return [f"Generated tokens, against the recipe's: {', '.join(off)}.\n"] if off else []


MOST_UNEQUAL = 0.1

OF = {
    "control": "the control",
    "plain": "plain iterative DPO",
    "start": "where the rounds began",
    "zero": "no change",
}


def _cells(cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


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


def plot(file: Path, row: Table) -> None:
    """The course of the shown metric, round by round, with its interval."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = row["recipe"]  # the same rows make the same bytes
    file.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(5.2, 3.2), layout="constrained")
    longest = 1
    for name, variant in row["variants"].items():
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
    axes.set_title(row["recipe"], loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
