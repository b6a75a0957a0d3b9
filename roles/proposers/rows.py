"""The rows of a file, of a folder or of a data set on the Hugging Face Hub, one after the other.

Each comes with its place, a file and a line or a number from 1, for the sentence that says what
is wrong with it. Nothing is held but what is being read.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from store.errors import UserError, unknown

_log = logging.getLogger(__name__)

Rows = Iterator[tuple[str, dict[str, Any]]]

# What a table is turned into Python objects by: enough for speed, and little to hold.
_ROWS_AT_ONCE = 1000
# One of these is in a folder that `save_to_disk` wrote, and in no other.
_SAVED = ("dataset_dict.json", "state.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def read_rows(path: Path, split: str | None = None, subset: str | None = None) -> Rows:
    """split: of a data set that has splits; None is "train". subset: of one on the Hub.

    Raises UserError for what cannot be read.
    """
    if path.is_dir() and any((path / name).is_file() for name in _SAVED):
        return _saved(path, split, subset)
    if not path.exists():
        if path.suffix.lower() not in FILES and _HUB_ID.fullmatch(str(path)):
            return _hub(str(path), split or "train", subset)
        raise UserError(f"cannot read prompts from {str(path)!r}: No such file or folder")
    for name, value in (("split", split), ("subset", subset)):
        if value is not None:
            raise UserError(
                f"{str(path)!r} has no {name} {value!r}: only a data set on the Hub or saved by "
                "`save_to_disk` has; name the file itself"
            )
    return _folder(path) if path.is_dir() else _file(path)


def _file(path: Path) -> Rows:
    if path.suffix.lower() not in FILES:
        raise UserError(f"cannot read prompts from {str(path)!r}: {_endings()}")
    try:
        yield from FILES[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 text: {error}") from None
    except OSError as error:
        why = error.strerror or _first_line(error)
        raise UserError(f"cannot read prompts from {str(path)!r}: {why}") from None


def _endings() -> str:
    return f"right endings are {', '.join(FILES)}"


def _folder(path: Path) -> Rows:
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
    found = [file for file in files if file.suffix.lower() in FILES]
    if not found:
        raise UserError(f"the folder {str(path)!r} has no file to read prompts from; {_endings()}")
    if others := [file.name for file in files if file.suffix.lower() not in FILES]:
        _log.warning("%s: not read for their endings: %s", path, ", ".join(others))
    for file in found:
        yield from _file(file)


def _lines(path: Path) -> Rows:
    # Only \n ends a line: JSON texts may hold the other characters that do elsewhere.
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, _object(_json(line, f"{place} is not a line of JSON"), place)


def _json_file(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig") as text:
        first = next((line.lstrip()[0] for line in text if line.strip()), "")
    if first != "[":
        yield from _lines(path)
        return
    rows = _json(path.read_text(encoding="utf-8-sig"), f"{path} is not JSON")
    for number, row in enumerate(rows, start=1):
        place = f"{path}, row {number}"
        yield place, _object(row, place)


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: {error}") from None


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f'{place} is not an object such as {{"prompt": "..."}}')
    return row


def _separated(by: str) -> Callable[[Path], Rows]:
    def read(path: Path) -> Rows:
        with path.open(encoding="utf-8-sig", newline="") as text:
            csv.field_size_limit(sys.maxsize)  # else 128 KiB, and a prompt may be longer
            table = csv.reader(text, delimiter=by, strict=True)
            try:
                yield from _records(table, path)
            except csv.Error as error:
                raise UserError(f"{path}:{table.line_num} is not CSV: {error}") from None

    return read


def _records(table: Any, path: Path) -> Rows:
    header: list[str] = next(table, [])
    if len(set(header)) < len(header) or "" in header:
        raise UserError(f"{path}:1 names each column, and differently; found {header}")
    if len(header) == 1 and ";" in header[0]:
        raise UserError(f"{path}:1 is separated by semicolons; right are commas, or tabs in a .tsv")
    if spaced := [name for name in header if name != name.strip()]:
        raise UserError(f"{path}:1 has a space at an end of the column name {spaced[0]!r}")
    line = table.line_num + 1
    for cells in table:
        place, line = f"{path}:{line}", table.line_num + 1
        if not cells:
            continue
        if len(cells) != len(header):
            raise UserError(f"{place} has {len(cells)} values for {len(header)} columns")
        # There is no other way to leave one out.
        yield place, {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _parquet(path: Path) -> Rows:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _table(file.iter_batches(_ROWS_AT_ONCE), str(path))
    except ArrowException as error:
        raise UserError(f"{str(path)!r} cannot be read as Parquet: {_first_line(error)}") from None


def _saved(path: Path, split: str | None, subset: str | None) -> Rows:
    from datasets import DatasetDict, load_from_disk
    from pyarrow import ArrowException

    if subset is not None:
        raise UserError(f"{str(path)!r} has no subset {subset!r}: it was saved by `save_to_disk`")
    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, ArrowException) as error:
        raise UserError(
            f"{str(path)!r} cannot be read as a data set saved by `save_to_disk`: "
            f"{_first_line(error)}"
        ) from None
    if isinstance(found, DatasetDict):
        wanted = split or "train"
        if wanted not in found:
            raise UserError(f"{str(path)!r}: {unknown('split', wanted, found)}")
        found = found[wanted]
    elif split is not None:
        raise UserError(f"{str(path)!r} has no splits: it is one data set; leave split {split!r}")
    yield from _table(found.with_format("arrow").iter(_ROWS_AT_ONCE), str(path))


def _hub(name: str, split: str, subset: str | None) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        found = load_dataset(name, subset, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"cannot read prompts from {name!r}: there is no such file or folder here, and as a "
            f"data set on the Hub it cannot be had: {_first_line(error)}"
        ) from None
    yield from _table(found.with_format("arrow").iter(_ROWS_AT_ONCE), name)


def _table(batches: Any, name: str) -> Rows:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{name}, row {number}", row


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


FILES: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json_file,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
"""How a file is read, by its ending."""
