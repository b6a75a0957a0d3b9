"""A file of TOML, or one setting of it, as tables in which every path is absolute."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from loop.expanding import SPELLED
from loop.settings import Tables
from roles.proposers.rows import FILES
from store.errors import UserError

CODE = ("use", *SPELLED, "function", "source", "rubric")
"""Settings that may name code, as `path/file.py:Name`."""
DATA = ("path", "gate_path", "test_path", "anchor_path")
"""Settings that may name data on the Hub."""


def parse(path: Path) -> Tables:
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
