"""Answers that came with the data: which column of a prompt has them, and how to read it.

Data has several rows of one prompt (several pairs, several demonstrations, answers with labels),
and a run asks it once. So the rows are gathered: the column is a list, a row an entry, and an
entry holds texts under TRL's names ("chosen" and "rejected", or "completion" with or without a
"label"), beside what its row says differently from the prompt's first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from store.records import Prompt

COLUMN = "recorded"

Entry = dict[str, Any]


def recorded_rows(prompt: Prompt) -> list[Entry]:
    """Every row of the prompt that records an answer, with all its columns, in the data's order."""
    shared = {name: value for name, value in prompt.columns.items() if name != COLUMN}
    return [{**shared, **entry} for entry in _entries(prompt)]


def recorded_answers(prompt: Prompt) -> list[str]:
    """The different answers that the data has, in its order, a chosen one before its rejected."""
    return _different(_entries(prompt), "chosen", "rejected", "completion")


def wanted_answers(prompt: Prompt) -> list[str]:
    """Those of them to imitate: what a row chose, or has as a completion not labelled false."""
    # A column "label" beside a preference is not ours.
    wanted = (
        entry for entry in _entries(prompt) if "chosen" in entry or entry.get("label") is not False
    )
    return _different(wanted, "chosen", "completion")


def _entries(prompt: Prompt) -> list[Entry]:
    entries: list[Entry] = prompt.columns.get(COLUMN, [])
    return entries


def _different(entries: Iterable[Entry], *names: str) -> list[str]:
    return list(dict.fromkeys(entry[name] for entry in entries for name in names if name in entry))
