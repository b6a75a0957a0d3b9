"""The one table that the README quotes, of what each benchmark has left in its file.

A row of it is a variant that its benchmark marks as quoted, held to the row of ours that is named
there. A ratio is there only where both did the baseline's work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kept import Kept
from table import Table, on, times

LEGEND = (
    "An excerpt. How many times what ours takes: the quotient "
    "of the shortest passes (a round: of the sums over seeds), the spread over passes taken one "
    "after the other (over seeds), and the memory that passes need (the whole process). Peers' "
    "float32 products are made by the same library as ours, or by torch's own where that is faster."
)


def markdown(parts: Mapping[str, Kept]) -> str:
    """parts: a benchmark's name -> what it left."""
    lines = [*_conditions(parts), "", LEGEND, ""]
    lines += ["| what | against | time | spread | memory |", "|---|---|--:|--:|--:|"]
    for part in parts.values():
        for table in part.tables:
            lines += _rows(table)
    return "\n".join(lines)


def agreed(parts: Mapping[str, Kept]) -> bool:
    return all(table.agreed for part in parts.values() for table in part.tables)


def _conditions(parts: Mapping[str, Kept]) -> Iterator[str]:
    """Where each part was measured: one line, if that was the same for all."""
    measured: dict[str, list[str]] = {}
    for name, part in parts.items():
        for threads in sorted({table.threads for table in part.tables}):
            measured.setdefault(f"{part.where}; {on(threads)}", []).append(name)
    for where, names in measured.items():
        yield f"On {where}{'.' if len(measured) == 1 else ': ' + ', '.join(names) + '.'}"
    noisy = [name for name, part in parts.items() if any(each.noisy for each in part.tables)]
    if noisy:
        yield f"NOISY, other work ran beside: {', '.join(noisy)}."


def _rows(table: Table) -> Iterator[str]:
    what = table.title
    for variant, own in table.quoted.items():
        row, ours = table[variant], table[own]
        without = [each for each in (row, ours, table[table.baseline]) if each.ratio is None]
        if without:
            cells = [
                next(f"{each.variant}: {each.note}" for each in without if each.note),
                "-",
                "-",
            ]
        else:
            ratio = row.over(ours)
            by_cpu = "" if ratio.cpu is None else f" ({times(ratio.cpu)} by CPU)"
            low, high = ratio.range
            spread = f"{low:.2f} to {high:.2f}"
            if ratio.cpu_range is not None:
                spread += " ({:.2f} to {:.2f} by CPU)".format(*ratio.cpu_range)
            cells = [times(ratio.time) + by_cpu, spread, times(ratio.memory)]
        against = variant if own == table.baseline else f"{variant}, held to {own}"
        yield f"| {what} | {against} | {' | '.join(cells)} |"
        what = ""  # said once, for all rows of the table
