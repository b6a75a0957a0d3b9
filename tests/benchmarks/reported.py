"""What must hold before reported seeds run: the claims are committed, and stay as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loop import claims, config
from loop.settings import digest

SEEDS = (0, 1, 2, 3, 4)


def untuned(seeds: Sequence[int], sets: Sequence[str]) -> None:
    """Leave if reported seeds are asked for under other settings than the recipes'."""
    if sets and (asked := sorted({*seeds} & {*SEEDS})):
        sys.exit(
            f"--set {sets[0]} is asked for with the reported seeds {', '.join(map(str, asked))}; "
            "tune on seeds from 100 up"
        )


def uncommitted(names: Sequence[str]) -> None:
    """A claim is made before it is tried: leave if the file of a recipe, of its arena, or
    default.toml says what no commit does."""
    arenas = {config.recipe_tables(name).get("arena") for name in names} - {None}
    below = ("default", *(f"{config.ARENAS}/{arena}" for arena in sorted(arenas)))
    files = [config.recipe_path(name).resolve() for name in dict.fromkeys([*names, *below])]
    states = [
        subprocess.run(
            ["git", "status", "--porcelain", "--", file.name],
            cwd=file.parent,
            capture_output=True,
            text=True,
        )
        for file in files
    ]
    if changed := "".join(each.stdout + each.stderr for each in states):
        sys.exit(f"commit these before their reported seeds run:\n{changed}")


def fix(place: Path, name: str) -> None:
    """Write a recipe's trial beside its runs before the first reported one, and leave if it is not
    what it was then. place: the folder of its runs."""
    file, now = place / "claim.json", _trial(name)
    if not file.is_file():
        place.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        return
    then = json.loads(file.read_text())
    keys = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    if keys:
        sys.exit(
            f"recipe {name!r} is not what it was when its reported seeds first ran, it differs in "
            f"{', '.join(keys)}; put that back, or remove {place} to run them anew"
        )


def _trial(name: str) -> dict[str, Any]:
    """A recipe's trial, and digests of what it stands on. What was found is written later."""
    trial = claims.read(name)
    found = {"claim": {"__all__": {"found"}}}
    said = trial.model_dump(mode="json", exclude=found, exclude_defaults=True)
    below = {"default.toml": "default", "the recipe's settings": name}
    if trial.arena is not None:
        below["the arena's settings"] = f"{config.ARENAS}/{trial.arena}"
    return said | {what: _settings(each) for what, each in below.items()}


def _settings(name: str) -> str:
    tables = config.recipe_tables(name)
    return digest({key: value for key, value in tables.items() if key not in config.TRIAL})
