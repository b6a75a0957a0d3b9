"""What there is to say about each recipe: its file read out, and what it came to in its trial."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from loop import catalogue, claims, config, trials
from loop.report import Table
from loop.screen import line
from loop.settings import Config

HEADINGS = ("Paper", "Mechanism", "Differs here, and why")
TRIED = {
    "trial": "all its runs",
    "control": "its control, the claimed ingredient off",
    "plain": "plain iterative DPO",
}
"""Of a trial, the settings of which runs."""
RESULTS = config.HERE / "recipes" / "results.json"


def told(name: str) -> Table:
    """{name, about, paper, mechanism, differs, path, parts {place: use}, settings {key: value},
    trial {arena, trial, control, plain}, claims [{says, metric, of, against, found, expect,
    margin, verdict, ours, theirs, difference, low, high, items, left_out}], result {metric, start,
    ends, tokens, seconds, seeds}}.

    Settings are those in which it is not default.toml; of its trial those that all its runs have,
    that switch the claimed ingredient off, and that make plain iterative DPO as large. The trial is
    None without claims; a verdict, its numbers and the result are None until it was run. The start
    and each end (of the recipe, its control and plain iterative DPO) are the metric's mean on the
    test split with the bounds of its 95 % interval. Tokens are those that a run's rounds generated
    to learn from, and seconds those of its rounds. Raises UserError for a name that is not there,
    and for a trial that names what is not there.
    """
    own, default = config.read(recipe=name), config.read()
    about, *paragraphs = catalogue.opening(catalogue.recipe(name)) or [""]
    said = {
        heading: paragraph.removeprefix(f"{heading}:").strip()
        for heading in HEADINGS
        for paragraph in paragraphs
        if paragraph.startswith(f"{heading}:")
    }
    row = _row(name)
    trial = _trial(name)
    return {
        "name": name,
        "about": about,
        "paper": said.get("Paper"),
        "mechanism": said.get("Mechanism"),
        "differs": said.get("Differs here, and why"),
        "path": str(config.recipe_path(name)),
        "parts": parts(own),
        "settings": {
            each["key"]: each["to"]
            for each in config.differences(default, own)
            if not each["key"].endswith(".use") and each["to"] is not None  # another part's
        },
        "trial": trial and _sides(trial),
        "claims": claims.with_results(trial.claim, row["claims"] if row else ()) if trial else [],
        "result": row and _result(row),
    }


def parts(own: Config) -> dict[str, str]:
    """Place -> what fills it, of the rounds: warm-ups and evaluations aside."""
    found: dict[str, str] = {}
    for name, track in own.track.items():
        before = "" if name == "main" else f"track.{name}."
        for role in ("proposer", "generator", "judge", "filter"):
            found[f"{before}{role}"] = getattr(track, role).use
    for name, model in own.models.items():
        before = "" if name == "policy" else f"models.{name}."
        found[f"{before}trainer"] = model.trainer.use
    return found


def _row(name: str) -> Any:
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return kept.get(config.recipe_key(name))


def _result(row: Any) -> Table:
    ran = row["variants"]
    course = ran["recipe"]["course"]
    return {
        "metric": row["shown"],
        "start": course[0] if course else None,
        "ends": {name: ran[name]["course"][-1] for name in SIDES if ran[name]["course"]},
        "tokens": ran["recipe"]["tokens"],
        "seconds": ran["recipe"]["seconds"],
        "seeds": row["seeds"],
    }


def _trial(name: str) -> claims.Trial | None:
    if "claim" not in config.recipe_tables(name):
        return None
    trials.check(name, lambda made: None)
    return claims.read(name)


def _sides(trial: claims.Trial) -> Table:
    sets = {key: list(getattr(trial, key)) for key in TRIED}
    return {"arena": trial.arena or "default", **sets}


def view(console: Console, found: Table) -> None:
    line(console, f"{found['name']}  {found['about']}")
    for key in ("paper", "mechanism", "differs"):
        if found[key]:
            line(console)
            line(console, f"{key}: {found[key]}")
    line(console)
    line(console, "parts: " + ", ".join(f"{at} {use}" for at, use in found["parts"].items()))
    if found["settings"]:
        line(console)
        line(console, "settings, where it is not the default:")
        for key, value in found["settings"].items():
            line(console, f"  {key} = {json.dumps(value)}")
    if found["trial"]:
        line(console)
        line(console, f"trial: in the arena {found['trial']['arena']}")
        for key, what in TRIED.items():
            if sets := found["trial"][key]:
                line(console, f"  {what}: {', '.join(sets)}")
    for each in found["claims"]:
        line(console)
        of = "" if each["of"] == "recipe" else f"of {each['of']}, "
        line(console, f"claim: {each['says']} ({of}{each['expect']}, against {each['against']})")
        line(console, f"  {_verdict(each, found['name'])}")
        if each["found"]:
            line(console, f"  {' '.join(each['found'].split())}")
    line(console)
    if found["result"]:
        _view_result(console, found["result"])
    own = found["name"]
    line(console, f"run it: loop start --recipe {own}; what it costs: loop plan --recipe {own}")
    line(console, f"change it: {found['path']}")


SIDES = {"recipe": "ends", "control": "its control ends", "plain": "plain iterative DPO ends"}


def _view_result(console: Console, found: Table) -> None:
    sides = [("begins", found["start"])] if found["start"] else []
    sides += [(SIDES[name], each) for name, each in found["ends"].items()]
    at = "; ".join(
        f"{what} at {mean:.3f} [{low:.3f}, {high:.3f}]" for what, (mean, low, high) in sides
    )
    line(console, f"{found['metric']}, test split: {at}")
    line(
        console,
        f"the rounds of a run of its trial: {found['tokens']:,} tokens to learn from, "
        f"{found['seconds']:.0f} s on a core, seeds {', '.join(map(str, found['seeds']))}",
    )


def _verdict(claim: Table, recipe: str) -> str:
    if claim["verdict"] is None:
        return f"not tried yet: `make results RECIPES={config.recipe_key(recipe)}`"
    if claim["difference"] is None:
        return f"{claim['verdict']}: its runs gave no values"
    interval = f"{claim['difference']:+.3f} [{claim['low']:+.3f}, {claim['high']:+.3f}]"
    return f"{claim['verdict']}: {interval}"
