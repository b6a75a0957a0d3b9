"""How anything is put on a screen: lines, columns, and text that somebody else wrote.

Text that a model or a judge wrote is shown with its control characters spelled out, so that it
cannot write to the screen what it likes; markup is off for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from judges.harmless import harmless
from loop.report import Table

NOTHING = "-"
LONGEST_TEXT = 2000


def line(console: Console, text: str = "") -> None:
    """One line, however long: a terminal breaks it, a file keeps it whole."""
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def legible(text: str) -> str:
    """Text with its control characters spelled out, and cut where it gets long."""
    shown = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ... (--json has all)"
    return harmless(shown)


def block(console: Console, heading: str, text: str) -> None:
    """A text under its heading: on the same line when it is one."""
    shown = legible(text)
    if "\n" not in shown and len(shown) + len(heading) < 76:
        line(console, f"  {heading}: {shown}")
        return
    line(console, f"  {heading}:")
    for each in shown.split("\n"):
        line(console, f"    {each}")


def conversation(console: Console, messages: Sequence[Table], reference: str | None) -> None:
    for message in messages:
        block(console, message["role"], message["content"])
    if reference is not None:
        block(console, "right answer", reference)


def columns(*columns: str, right: Iterable[int] = (0,)) -> Grid:
    grid = Grid(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    numbers = set(right)
    for place, name in enumerate(columns):
        justify = "right" if place in numbers else "left"
        grid.add_column(name, justify=justify, no_wrap=True, overflow="fold")  # type: ignore[arg-type]
    return grid


def put(console: Console, grid: Grid) -> None:
    """As wide as it is: a line too long for the screen is broken there, and no cell is cut."""
    unbounded = console.options.update(width=10_000)
    grid.width = grid.__rich_measure__(console, unbounded).maximum
    console.print(grid, soft_wrap=True)


def figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return NOTHING if value is None else f"{value:,}"
