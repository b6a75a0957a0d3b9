"""What SQLite takes and PostgreSQL does not: column types, a character, numbers that are none."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

MARK = "\ue000"
"""Of a private use area, so it stands in no text of anybody's. Doubled where it does."""


def escaped(text: str) -> str:
    """A text without the character 0, which PostgreSQL does not take and a model may sample."""
    if "\0" not in text and MARK not in text:
        return text
    return text.replace(MARK, f"{MARK}{MARK}").replace("\0", f"{MARK}0")


def unescaped(text: str) -> str:
    if MARK not in text:
        return text
    return re.sub(f"{MARK}([0{MARK}])", lambda m: "\0" if m[1] == "0" else MARK, text)


def adapt(connection: psycopg.Connection[Any]) -> None:
    """Make a connection take and give what SQLite does: any text, and numbers that are plain."""
    from psycopg.adapt import Loader
    from psycopg.types.string import StrDumper, StrDumperUnknown, StrDumperVarchar

    class Number(Loader):
        """A sum or mean is a Decimal otherwise."""

        def load(self, data: Any) -> int | float:
            said = bytes(data)
            return int(said) if said.lstrip(b"-").isdigit() else float(said)

    class Text(Loader):
        def load(self, data: Any) -> str:
            return unescaped(bytes(data).decode())

    def escaping(plain: Any) -> Any:
        return type(plain.__name__, (plain,), {"dump": lambda self, value: escaped(value).encode()})

    for plain in (StrDumperVarchar, StrDumper, StrDumperUnknown):  # in psycopg's own order
        connection.adapters.register_dumper(str, escaping(plain))
    for name in ("text", "varchar"):
        connection.adapters.register_loader(name, Text)
    connection.adapters.register_loader("numeric", Number)


def written(value: Any) -> str:
    """As JSON, which has no numbers that are not finite."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_each(value, lambda one: f"{MARK}{one}" if _strange(one) else one))


def read(said: str | bytes) -> Any:
    value = json.loads(said)
    marked = b"\\ue000" in said if isinstance(said, bytes) else "\\ue000" in said
    return _each(value, lambda one: STRANGE.get(one, one)) if marked else value


STRANGE: dict[Any, float] = {f"{MARK}{one}": one for one in (math.nan, math.inf, -math.inf)}


def _strange(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {name: _each(one, change) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_each(one, change) for one in value]
    return change(value)


TYPES = {
    r"\bid INTEGER NOT NULL": "id SERIAL NOT NULL",
    r"\bVARCHAR\b": 'VARCHAR COLLATE "C"',  # in the order of bytes, as on SQLite
    r"\bBLOB\b": "BYTEA",
    r"\bDATETIME\b": "TIMESTAMP WITH TIME ZONE",
}


def ddl(statement: str) -> str:
    """A statement of the migrations, which are SQLite's, as PostgreSQL takes it."""
    for ours, theirs in TYPES.items():
        statement = re.sub(ours, theirs, statement)
    return statement
