"""Many rows at once into a database, and a run's from one into another, whichever the two are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from sqlalchemy import Connection, Table, func, insert, select

from store import postgres, tables

ROWS = 2_000
"""Read and written together."""
TABLES: tuple[Table, ...] = tuple(
    cast(Any, row).__table__
    for row in (
        *(tables.RunRow, tables.RoundRow, tables.PromptRow, tables.AskedRow, tables.CheckpointRow),
        *(tables.CandidateRow, tables.VerdictRow, tables.JudgementRow, tables.HealthRow),
        *(tables.ExampleRow, tables.DroppedRow, tables.TrainedOnRow, tables.TrainingStepRow),
        *(tables.EvaluationRow, tables.DecisionRow),
    )
)
"""All of a run's tables, each after those that it names; only a prompt may name a candidate."""


def write_rows(into: Connection, table: Table, made: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys, in order."""
    if not made:
        return
    if into.dialect.name == "postgresql":
        postgres.copy_in(into, table, made)
    else:
        into.execute(insert(table), list(made))


def copy_rows(source: Connection, into: Connection) -> None:
    """Copy every row, ids included, into tables that are empty. The caller commits."""
    on_postgres = into.dialect.name == "postgresql"
    # A prompt is written before the candidate that it came from.
    defer = "SET CONSTRAINTS ALL DEFERRED" if on_postgres else "PRAGMA defer_foreign_keys = ON"
    into.exec_driver_sql(defer)
    for table in TABLES:
        chosen = select(table).order_by(*table.primary_key.columns)
        found = source.execution_options(yield_per=ROWS).execute(chosen)
        for part in found.mappings().partitions():
            write_rows(into, table, [dict(row) for row in part])
        if on_postgres and "id" in table.c:
            last = select(func.max(table.c.id)).scalar_subquery()
            into.execute(
                select(func.setval(func.pg_get_serial_sequence(table.name, "id"), last)).where(
                    last.is_not(None)
                )
            )
