"""TOML to a frozen Config: default.toml < recipe < the user's file < --set.

The expanded form, in which every track and model is spelled out, is what is stored with the run
and read back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_paths
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from loop.expanding import MODEL_KEYS, USER_KEYS, expand, merge, short, warmup_table
from loop.files import CODE, assigned, parse, use_first
from loop.names import OURS
from loop.settings import ROLES, Config, Tables, flat
from store.errors import UserError, unknown

HERE = Path(__file__).parent
ARENAS = "arenas"
TRIAL = ("arena", "control", "plain", "trial", "shown", "claim")
"""Keys of a recipe's file that say how it is put to the test (loop/claims.py); the others are
settings."""


def differences(old: Config, new: Config) -> list[dict[str, Any]]:
    """Each setting in which two configurations differ."""
    before, after = flat(old), flat(new)
    return [
        {"key": key, "from": before.get(key), "to": after.get(key)}
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def read(file: Path | None = None, recipe: str | None = None, sets: Sequence[str] = ()) -> Config:
    """The configuration that these make together. Raises UserError.

    A recipe stands on its arena, which stands on default.toml: what the task is, and how a model
    that knows nothing is warmed up for it.
    """
    tables = parse(HERE / "default.toml")
    if recipe is not None and recipe != "default":
        own = recipe_tables(recipe)
        known = {*USER_KEYS, *TRIAL}
        if strange := [key for key in own if key not in known]:
            raise unknown("setting", strange[0], known)
        below = recipe_tables(f"{ARENAS}/{own['arena']}") if "arena" in own else {}
        for each in (below, own):
            tables = merge(tables, {key: each[key] for key in each if key not in TRIAL})
    if file is not None:
        tables = merge(tables, parse(file))
    for assignment in use_first(sets):
        tables = merge(tables, assigned(assignment))
    config = validate(expand(tables))
    if config.warmup is None:
        # Switched off for now; a mistake in it would be found when it is switched on.
        table = warmup_table(tables)
        validate(config.model_dump() | {"warmup": table})
    return config


def change(config: Config, sets: Sequence[str]) -> Config:
    """An expanded configuration with settings named as in a file changed. Raises UserError."""
    tables: Tables = config.model_dump(mode="json")
    for assignment in use_first(sets):
        said = assigned(assignment)
        top = next(iter(said))
        if top not in USER_KEYS:
            raise unknown("setting", top, USER_KEYS)
        if top in (*ROLES, "prompts"):
            said = {"track": {"main": said}}
        elif top in MODEL_KEYS:
            said = {"models": {"policy": said}}
        elif top == "warmup" and not isinstance(said[top], dict):
            raise UserError(f"warmup is a table, found {said[top]!r}")
        elif top == "warmup" and not said[top].keys() & {"track", "trainer"}:
            said = {"warmup": {"track": {"warmup": said[top]}}}
        elif top == "model":
            said = {"models": {"policy": said["model"]}}
        tables = merge(tables, said)
    return validate(tables)


def recipes() -> list[str]:
    """The names of the recipes there are."""
    return ["default", *sorted(path.stem for path in (HERE / "recipes").glob("*.toml"))]


def recipe_path(name: str) -> Path:
    """Of a recipe by its name or its file, or of an arena by itself: plain iterative DPO there.

    Raises UserError for one that is not there.
    """
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise UserError(f"no recipe in {name}: there is no such file")
        return Path(name)
    path = HERE / "default.toml" if name == "default" else HERE / "recipes" / f"{name}.toml"
    folder, _, arena = name.rpartition("/")
    arenas = [path.stem for path in HERE.glob(f"recipes/{ARENAS}/*.toml")]
    if folder == ARENAS and arena not in arenas:
        raise unknown("arena", arena, arenas)
    known = [*recipes(), *(f"{ARENAS}/{each}" for each in arenas)]
    if name not in known:
        raise unknown("recipe", name, known)
    return path


def recipe_key(name: str) -> str:
    """What a recipe is called in results, wherever it is named from: a published one's name, or
    its file as seen from the folder that holds loop/."""
    if not name.endswith(".toml"):
        return name
    file, home = Path(name).resolve(), HERE.resolve()
    for folder, before in ((home / "recipes", ""), (home / "recipes" / ARENAS, f"{ARENAS}/")):
        if file.parent == folder:
            return before + file.stem
    return os.path.relpath(file, home.parent)


def recipe_of(key: str) -> str:
    """A name for the recipe that results have under `key`."""
    return str(HERE.parent / key) if key.endswith(".toml") else key


def recipe_tables(name: str) -> Tables:
    """What a recipe's file says, its trial included. Raises UserError."""
    return parse(recipe_path(name))


def own_files(config: Config) -> list[Path]:
    """Where parts lie that are neither ours nor an installed package's."""
    installed, found = Path(get_paths()["purelib"]), set[Path]()
    for spec in _code(config.model_dump(mode="json")):
        place, _, _ = spec.rpartition(":")
        if spec.endswith(".py") or place.endswith(".py"):
            found.add(Path(spec if spec.endswith(".py") else place))
        elif place and place.split(".")[0] not in OURS:
            with suppress(ImportError, ValueError):  # it is no module's name
                module = find_spec(place)
                if module is not None and module.has_location and module.origin is not None:
                    found.add(Path(module.origin))
    return sorted(each for each in found if not each.is_relative_to(installed))


def _code(tables: Any, key: str = "") -> Iterator[str]:
    """What may name code in a configuration."""
    if isinstance(tables, dict):
        for name, value in tables.items():
            yield from _code(value, name)
    elif isinstance(tables, list):
        for each in tables:
            yield from _code(each, key)
    elif isinstance(tables, str) and key in CODE:
        yield tables


def validate(expanded: Tables) -> Config:
    """Raises UserError: which setting, what was found, what would be right."""
    try:
        return Config.model_validate(expanded)
    except ValidationError as error:
        first = error.errors()[0]
        place = _spoken(".".join(str(part) for part in first["loc"]))
        if first["type"] == "extra_forbidden":
            raise unknown("setting", place, _setting_names(first["loc"][:-1])) from None
        if place.endswith(".[key]"):
            name = place.removesuffix(".[key]")
            raise UserError(
                f"{name}: a name has lower-case letters, digits, - and _, and begins with a "
                f"letter, found {short(first['input'])}"
            ) from None
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "tuple_type":  # what TOML calls otherwise
            said = "Input should be a list"
        whole = first["type"] == "missing" or not place
        found = "" if whole else f", found {short(first['input'])}"
        raise UserError(f"{place or 'configuration'}: {said}{found}") from None


def _spoken(place: str) -> str:
    """A setting as a file names it: the warm-up's own track goes without its name."""
    return place.replace("warmup.track.warmup.", "warmup.", 1)


def _setting_names(place: tuple[Any, ...]) -> list[str]:
    """The dotted names of all settings beside the one at `place`."""
    kind: Any = Config
    for part in place:
        fields = getattr(kind, "model_fields", None)
        kind = fields[part].annotation if fields and part in fields else kind
        # Of a dict and of what may be None, the tables inside.
        inside = [each for each in get_args(kind) if isinstance(each, type)]
        kind = next((each for each in inside if issubclass(each, BaseModel)), kind)
    return [_spoken(".".join([*map(str, place), name])) for name in kind.model_fields]
