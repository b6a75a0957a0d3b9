"""What must hold before reported seeds run: the claims are committed, and stay as they are."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loop import claims, config
from loop.names import OURS
from loop.settings import Config, Tables, digest
from store.errors import UserError

SEEDS = (0, 1, 2, 3, 4)


def untuned(seeds: Sequence[int], sets: Sequence[str]) -> None:
    """Raises UserError if reported seeds are asked for under other settings than the recipes'."""
    if sets and (asked := sorted({*seeds} & {*SEEDS})):
        raise UserError(
            f"--set {sets[0]} is asked for with the reported seeds {', '.join(map(str, asked))}; "
            "tune on seeds from 100 up"
        )


def uncommitted(names: Sequence[str], made: Iterable[Config]) -> None:
    """A claim is made before it is tried. Raises UserError if the file of a recipe, of its arena,
    default.toml, pyproject.toml, our code or that of a part of one's own says what no commit does.

    made: the configurations of the runs.
    """
    arenas = {config.recipe_tables(name).get("arena") for name in names} - {None}
    below = ("default", *(f"{config.ARENAS}/{arena}" for arena in sorted(arenas)))
    files = [config.recipe_path(name) for name in (*names, *below)]
    files += [file for each in made for file in config.own_files(each)]
    changed = [
        each
        for file in dict.fromkeys(file.resolve() for file in files)
        for each in _changed(file.parent, ["--ignored", "--", file.name], str(file))
    ]
    # Of all recipes only those that are tried matter, and results are written beside them.
    ours = [*OURS, "pyproject.toml", ":(exclude)loop/recipes"]
    changed += _changed(config.HERE.resolve().parent, ["--", *ours], "the code of Ratchet")
    if changed:
        told = ", ".join(dict.fromkeys(changed))
        raise UserError(f"commit these before their reported seeds run: {told}")


def _changed(folder: Path, asked: Sequence[str], what: str) -> list[str]:
    found = subprocess.run(
        ["git", "status", "--porcelain", *asked], cwd=folder, capture_output=True, text=True
    )
    if found.returncode:
        return [f"{what} ({' '.join(found.stderr.split())})"]
    return [line[3:] for line in found.stdout.splitlines()]


CLAIM, SETTINGS = "claim.json", "settings.json"


def unchanged(place: Path, name: str) -> None:
    """Raises UserError if a recipe's trial is not what it was when its first reported run began.
    place: the folder of its runs."""
    if not (place / CLAIM).is_file():
        return
    then, now = json.loads((place / CLAIM).read_text()), _trial(name)
    keys = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    if not keys:
        return
    before = _kept(place / SETTINGS)
    told = [
        _claims(then["claim"], now["claim"])
        if key == "claim"
        else key + _keys(before.get(key), _settings(name).get(key))
        for key in keys
    ]
    raise UserError(
        f"recipe {name!r} is not what it was when its reported seeds first ran, it differs in "
        f"{', '.join(told)}; put that back, or remove {place} to run them anew"
    )


def fix(place: Path, name: str) -> None:
    """Write a recipe's trial beside its runs before the first reported one."""
    place.mkdir(parents=True, exist_ok=True)
    for file, said in ((SETTINGS, _settings(name)), (CLAIM, _trial(name))):
        if not (place / file).is_file():
            (place / file).write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")


def _trial(name: str) -> dict[str, Any]:
    """A recipe's trial, and digests of what it stands on. What was found is written later."""
    trial = claims.read(name)
    found = {"claim": {"__all__": {"found"}}}
    said = trial.model_dump(mode="json", exclude=found, exclude_defaults=True)
    return said | {what: digest(tables) for what, tables in _settings(name).items()}


def _settings(name: str) -> dict[str, Tables]:
    """What a recipe stands on, in words -> the settings there."""
    below = {"default.toml": "default", "the recipe's settings": name}
    if (arena := claims.read(name).arena) is not None:
        below["the arena's settings"] = f"{config.ARENAS}/{arena}"
    return {
        what: {
            key: value
            for key, value in config.recipe_tables(each).items()
            if key not in config.TRIAL
        }
        for what, each in below.items()
    }


def _claims(then: Sequence[Tables], now: Sequence[Tables]) -> str:
    """Which claims are not as they were."""
    before, after = ({each["says"]: each for each in said} for said in (then, now))
    both = before.keys() & after.keys()
    told = [f"{says!r}, which is gone" for says in before if says not in both]
    told += [f"{says!r}, which is new" for says in after if says not in both]
    told += [
        f"{says!r}{_keys(before[says], after[says])}"
        for says in before
        if says in both and before[says] != after[says]
    ]
    return f"claim {', '.join(told)}" if told else "the order of its claims"


def _keys(before: Tables | None, after: Tables | None) -> str:
    """The dotted keys of what differs, where both sides are known."""
    if before is None or after is None:
        return ""
    one, other = dict(_flat(before)), dict(_flat(after))
    keys = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
    return f" ({', '.join(keys)})"


def _flat(tables: Mapping[str, Any], place: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{place}{key}.")
        else:
            yield place + key, value


def _kept(file: Path) -> dict[str, Tables]:
    return json.loads(file.read_text()) if file.is_file() else {}
