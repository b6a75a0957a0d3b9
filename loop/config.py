"""TOML to a frozen Config: default.toml < recipe < the user's file < --set.

Tables merge and lists replace; a role's table is replaced when another one is used, because its
options belong to it. The expanded form, in which every track and model is spelled out, is what is
stored with the run and read back.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_paths
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError

from loop.names import OURS
from loop.settings import ROLES, Config, Tables, flat
from roles.proposers.rows import FILES
from store.errors import UserError, unknown

HERE = Path(__file__).parent
SPELLED = (*ROLES, "engine", "trainer", "warmup_trainer")
"""Tables for which a string may stand: `judge = "verifier"` is `judge = { use = "verifier" }`."""
ARENAS = "arenas"
TRIAL = ("arena", "control", "plain", "trial", "shown", "claim")
"""Keys of a recipe's file that say how it is put to the test (loop/claims.py); the others are
settings."""
DATA = ("path", "gate_path", "test_path", "anchor_path")
"""Settings that may name data on the Hub."""
CODE = ("use", *SPELLED, "function", "source", "rubric")
"""Settings that may name code, as `path/file.py:Name`."""
ANSWERED = {"use": "demonstrations", "n": 4, "mistakes": 0.5}
"""How the answers of anchors are made when nothing else is said: half of them carry a mistake."""


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
    tables = _parse(HERE / "default.toml")
    if recipe is not None and recipe != "default":
        own = recipe_tables(recipe)
        known = {*USER_KEYS, *TRIAL}
        if strange := [key for key in own if key not in known]:
            raise unknown("setting", strange[0], known)
        below = recipe_tables(f"{ARENAS}/{own['arena']}") if "arena" in own else {}
        for each in (below, own):
            tables = merge(tables, {key: each[key] for key in each if key not in TRIAL})
    if file is not None:
        tables = merge(tables, _parse(file))
    for assignment in use_first(sets):
        tables = merge(tables, assigned(assignment))
    config = validate(expand(tables))
    if config.warmup is None:
        # Switched off for now; a mistake in it would be found when it is switched on.
        table = _warmup_table(tables)
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
    return _parse(recipe_path(name))


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


def merge(lower: Tables, upper: Tables) -> Tables:
    """`upper` over `lower`: tables merge, all else replaces."""
    replaced = "use" in upper and lower.get("use", upper["use"]) != upper["use"]
    merged = {} if replaced else dict(lower)
    for key, value in upper.items():
        under = merged.get(key)
        if key in SPELLED and isinstance(under, str | dict) and isinstance(value, str | dict):
            under, value = (
                {"use": each} if isinstance(each, str) else each for each in (under, value)
            )
        both = isinstance(under, dict) and isinstance(value, dict)
        merged[key] = merge(cast(Tables, under), value) if both else value
    return merged


MODEL_KEYS = ("engine", "trainer", "mix")
"""Tables of the top level that a model falls back to."""
BESIDE = ("stage", "cluster", "server", "cache", "alarms", "budget", "checkpoints", "store")
"""Tables that are the same in both forms."""
USER_KEYS = {
    *("rounds", "seed", "batch_prompts", "prompts", "isolation", "model", "warmup", "track"),
    *("models", "evaluate", "gate", *BESIDE, *ROLES, *MODEL_KEYS),
}


def expand(tables: Tables) -> Tables:
    """The user's form to the expanded one: what a named track or model leaves out, the top says."""
    for key in tables:
        if key not in USER_KEYS:
            raise unknown("setting", key, USER_KEYS)
    _must_be_tables(tables)
    named = dict(tables.get("models", {}))
    if "policy" in named:  # [model] by its other name
        tables = tables | {"model": merge(tables["model"], named.pop("policy"))}
    top_roles = {key: tables[key] for key in ROLES}
    top_track = top_roles | {key: tables[key] for key in ("prompts",) if key in tables}
    tracks = {"main": top_track}
    tracks |= {name: merge(top_track, track) for name, track in tables.get("track", {}).items()}
    top_model = {key: tables[key] for key in MODEL_KEYS if key in tables}
    models = {"policy": merge(top_model, tables["model"])}
    # A second model is made of what the first is, unless it says otherwise.
    same = {
        key: tables["model"][key] for key in ("path", "template_path") if key in tables["model"]
    }
    for name, model in named.items():
        models[name] = merge(top_model | ({} if "path" in model else same), model)
    rest = ("rounds", "seed", "batch_prompts", "isolation", "gate", *BESIDE)
    return {key: tables[key] for key in rest if key in tables} | {
        "track": tracks,
        "models": models,
        "evaluate": _evaluate(merge({"proposer": tables["proposer"]}, tables["evaluate"])),
        "warmup": _warmup(tables),
    }


def _evaluate(own: Tables) -> Tables:
    """What suites and anchors leave out, the table around them says."""
    if isinstance(own.get("judge"), str):
        own["judge"] = {"use": own["judge"]}
    if isinstance(own.get("anchors"), dict):
        own["anchors"] = merge({"proposer": own["proposer"], "generator": ANSWERED}, own["anchors"])
    if isinstance(suites := own.get("suite"), dict):
        above = {"judge": own.get("judge")}
        own["suite"] = {
            name: merge(above, suite) if isinstance(suite, dict) else suite
            for name, suite in suites.items()
        }
    return own


def _warmup(tables: Tables) -> Tables | None:
    """Left out, the embedded model is warmed up, because it knows nothing, and no other; and what
    a track of the warm-up is for may be wanted always."""
    embedded = tables["model"].get("path") == "embedded"
    own = tables.get("warmup", {})
    on = _when(own, "warmup", "embedded")
    if on == "never":
        return None
    made = _warmup_table(tables)
    for name, track in own.get("track", {}).items():
        when = _when(track, f"warmup.track.{name}", on)
        if when == "never" or (when == "embedded" and not embedded):
            del made["track"][name]
    if on == "embedded" and not embedded:
        del made["track"]["warmup"]
    return made if made["track"] else None


def _when(table: Tables, place: str, otherwise: str) -> str:
    found = table.get("when", otherwise)
    if found not in WHEN:
        raise UserError(f'{place}.when is "always", "never" or "embedded", found {found!r}')
    return str(found)


WHEN = ("always", "never", "embedded")
"""When there is a warm-up: always, never, or of the embedded model only, which knows nothing."""


def _warmup_table(tables: Tables) -> Tables:
    """What a warm-up leaves out the top says, and what one of its tracks leaves out the warm-up."""
    table = tables.get("warmup", {})
    top = {key: tables[key] for key in (*ROLES, "prompts", "trainer") if key in tables}
    own = {key: value for key, value in table.items() if key not in ("when", "track")}
    first = _apart(top, own)
    trainer = first.pop("trainer")
    tracks = {
        name: _apart(first, {key: value for key, value in track.items() if key != "when"})
        for name, track in table.get("track", {}).items()
    }
    return {"track": {"warmup": first, **tracks}, "trainer": trainer}


def _apart(lower: Tables, upper: Tables) -> Tables:
    """`upper` over `lower`, but a role that `upper` names takes no option from below: how the
    rounds choose or train, or what mistakes others' demonstrations have, is nothing to it."""
    named = {key for key, value in upper.items() if isinstance(value, dict) and "use" in value}
    return merge({key: value for key, value in lower.items() if key not in named}, upper)


def _must_be_tables(tables: Tables) -> None:
    for key in USER_KEYS - {"rounds", "seed", "batch_prompts", "prompts", "isolation"}:
        if key in SPELLED and isinstance(tables.get(key), str):
            tables[key] = {"use": tables[key]}
        if not isinstance(tables.get(key, {}), dict):
            raise UserError(f"{key} is a table, found {_short(tables[key])}")
    for key in ("track", "models", "server", "stage", "warmup.track"):
        found: Any = tables
        for part in key.split("."):
            found = found.get(part, {})
        for name, table in found.items() if isinstance(found, dict) else [("", found)]:
            if not isinstance(table, dict):
                raise UserError(f"{key}.{name} is a table, found {table!r}")


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
                f"letter, found {_short(first['input'])}"
            ) from None
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "tuple_type":  # what TOML calls otherwise
            said = "Input should be a list"
        whole = first["type"] == "missing" or not place
        found = "" if whole else f", found {_short(first['input'])}"
        raise UserError(f"{place or 'configuration'}: {said}{found}") from None


def _spoken(place: str) -> str:
    """A setting as a file names it: the warm-up's own track goes without its name."""
    return place.replace("warmup.track.warmup.", "warmup.", 1)


def _short(value: Any) -> str:
    """What was found, without the password that an address may hold."""
    written = re.sub(r"(://[^:@/\s]*):[^@\s]*@", r"\1:...@", repr(value))
    return written if len(written) <= 60 else written[:57] + "..."


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


def _parse(path: Path) -> Tables:
    if not path.is_file():
        raise UserError(f"no configuration file {path}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    return cast(Tables, _resolved(tables, path.resolve().parent))


def _resolved(tables: Any, base: Path, place: tuple[str, ...] = ()) -> Any:
    """Paths made absolute: they are relative to the file that names them."""
    if isinstance(tables, dict):
        if place[:-1] == ("evaluate", "command") and "run" in tables:
            tables = {"folder_path": ".", **tables}
        return {name: _resolved(value, base, (*place, name)) for name, value in tables.items()}
    if isinstance(tables, list):
        return [_resolved(each, base, place) for each in tables]
    if not isinstance(tables, str) or not place:
        return tables
    key, of_model = place[-1], place[:-1] == ("model",) or place[:-2] == ("models",)
    if key in CODE and re.search(r"\.py(:|$)", tables):
        return str(base / tables)
    if key == "model" and tables.startswith("checkpoint:"):
        if tables in ("checkpoint:", "checkpoint:base"):
            return tables
        path = base / tables.removeprefix("checkpoint:")
        return f"checkpoint:{path}" if path.exists() else tables
    if not (key == "path" or key.endswith("_path")) or (of_model and tables in ("embedded", "")):
        return tables
    path = base / Path(tables).expanduser()
    # Of a model or of data, what is not here may be a name on the Hub.
    named = key in DATA and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", tables)
    of_hub = of_model or (named and Path(tables).suffix.lower() not in FILES)
    return tables if of_hub and not path.exists() else str(path)


def use_first(sets: Sequence[str]) -> list[str]:
    """What is used before its options: the other way round it would clear them away."""

    def names_a_part(assignment: str) -> bool:
        key = assignment.partition("=")[0].strip().rpartition(".")[2]
        return key == "use" or key in SPELLED

    return sorted(sets, key=lambda each: not names_a_part(each))


def assigned(assignment: str) -> Tables:
    key, equals, written = assignment.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set takes key=value, as in judge.votes=3, found {assignment!r}")
    try:
        parsed = tomllib.loads(f"value = {written}")
    except tomllib.TOMLDecodeError:
        parsed = {"value": written}
    value: Any = parsed.pop("value")
    if parsed:
        raise UserError(f"--set takes one key=value, found {assignment!r}; repeat --set for more")
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return dict(_resolved(value, Path.cwd()))
