"""What there is to say about each recipe: its file read out, and what it came to in its trial."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from loop import catalogue, claims, config
from loop.report import Table
from loop.screen import line
from loop.settings import Config

HEADINGS = ("Paper", "Mechanism", "Differs here, and why")
RESULTS = config.HERE / "recipes" / "results.json"


def told(name: str) -> Table:
    """{name, about, paper, mechanism, differs, path, parts {place: use}, settings {key: value},
    claims [{says, metric, of, against, found, expect, margin, verdict, ours, theirs, difference,
    low, high, items, left_out}], result {tokens, seconds, seeds}}: settings are those in which it
    is not default.toml; a verdict, its numbers and the result are None until its trial was run.
    Tokens are those that a run's rounds generated to learn from, and seconds those of its rounds.
    Raises UserError for a name that is not there.
    """
    about, *paragraphs = catalogue.opening(catalogue.recipe(name)) or [""]
    said = {
        heading: paragraph.removeprefix(f"{heading}:").strip()
        for heading in HEADINGS
        for paragraph in paragraphs
        if paragraph.startswith(f"{heading}:")
    }
    own, default = config.read(recipe=name), config.read()
    row = _row(name)
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
            if not each["key"].endswith(".use")
        },
        "claims": _claims(name, row),
        "result": row
        and {
            "tokens": row["variants"]["recipe"]["tokens"],
            "seconds": row["variants"]["recipe"]["seconds"],
            "seeds": row["seeds"],
        },
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
    return json.loads(RESULTS.read_text()).get(name) if RESULTS.is_file() else None


def _claims(name: str, row: Any) -> list[Table]:
    if "claim" not in config.recipe_tables(name):
        return []
    return claims.with_results(claims.read(name).claim, row["claims"] if row else ())


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
    for each in found["claims"]:
        line(console)
        of = "" if each["of"] == "recipe" else f"of {each['of']}, "
        line(console, f"claim: {each['says']} ({of}{each['expect']}, against {each['against']})")
        line(console, f"  {_verdict(each)}")
        if each["found"]:
            line(console, f"  {each['found']}")
    line(console)
    if found["result"]:
        cost = found["result"]
        line(
            console,
            f"the rounds of a run of its trial: {cost['tokens']:,} tokens to learn from, "
            f"{cost['seconds']:.0f} s on a core, seeds {', '.join(map(str, cost['seeds']))}",
        )
    own = found["name"]
    line(console, f"run it: loop start --recipe {own}; what it costs: loop plan --recipe {own}")
    line(console, f"change it: {found['path']}")


def _verdict(claim: Table) -> str:
    if claim["verdict"] is None:
        return "not tried yet: `make results`"
    if claim["difference"] is None:
        return f"{claim['verdict']}: its runs gave no values"
    interval = f"{claim['difference']:+.3f} [{claim['low']:+.3f}, {claim['high']:+.3f}]"
    return f"{claim['verdict']}: {interval}"
