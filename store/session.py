"""The database of a run, a transaction at a time.

Nothing else opens a session. A transaction that writes rows also changes the round's counts of
them, so the two cannot disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from sqlalchemy import Connection, Text, text
from sqlalchemy import cast as sql_cast
from sqlalchemy import select as plain_select
from sqlmodel import Session, SQLModel, col, select

from store import copying, postgres, rows
from store.connect import connect, only_reading, transaction, write_ahead
from store.errors import UserError
from store.migrations import LATEST, migrate, version
from store.records import Purpose
from store.tables import (
    AskedRow,
    CandidateRow,
    RoundRow,
    RunRow,
)


def now() -> datetime:
    """Now in UTC, as every time in the store."""
    return datetime.now(UTC)


class Database:
    """One run's history.

    Raises UserError where there is no database, where it is not one, and where a newer Ratchet
    wrote it.
    """

    def __init__(
        self, database: Path, *, create: bool = False, place: postgres.Place | None = None
    ) -> None:
        """place: where in PostgreSQL the rows are. None: where the run directory says so, if there
        is one; else in the SQLite file `database`.
        """
        if place is None and not create and not database.is_file():
            place = postgres.found(database.parent)
        if place is None and not create and not database.is_file():
            raise UserError(f"no run in {database.parent}: it has no {database.name}")
        self.root, self.place = database.parent, place
        self._engine = connect(database) if place is None else postgres.connect(place)
        self._lock = None if place is None else postgres.Lock(self._engine, place.schema)
        self._driver: str | None = None
        try:
            self._run_id = self._prepare(database, create)
        except BaseException:
            self.close()  # else SQLite's own files stay beside it
            raise

    def _prepare(self, database: Path, create: bool) -> int:
        """Bring the database up to date. Returns the run's id, 0 while there is none."""
        with self._read() as session:
            found = version(session.connection())
        if found == 0 and not create:
            raise UserError(
                f"{self.place or database} holds no run: it is another program's, or its run was "
                f"ended before it began; delete {self.root} if nothing else is in it"
            )
        if self.place is None:
            write_ahead(self._engine)
        if found != LATEST:
            with self._write() as session:
                self._migrate(session.connection())
        with self._read() as session:
            run = session.exec(select(RunRow)).first()
        return 0 if run is None else cast(int, run.id)

    def _migrate(self, connection: Connection) -> None:
        if self.place is not None:
            connection.execute(text(f'CREATE SCHEMA IF NOT EXISTS "{self.place.schema}"'))
        migrate(connection)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._engine.dispose()

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with transaction(self._engine, writes=False) as session:
            yield session

    @contextmanager
    def _write(self, *, fenced: bool = True) -> Iterator[Session]:
        """fenced: not by a driver whose place another process has taken meanwhile."""
        with transaction(self._engine, writes=True) as session:
            driver = self._driver if fenced else None
            if driver is not None and driver != _driver_of(session, self._run_id):
                raise UserError(f"another process has taken over {self.root}")
            yield session

    def query(self, sql: str, **parameters: Any) -> list[dict[str, Any]]:
        """The rows that a SELECT gives; `:run` stands for this run. Raises UserError for a
        statement that would change something."""
        with self._read() as session, only_reading(session) as connection:
            found = connection.execute(text(sql), {"run": self._run_id} | parameters)
            return [dict(row) for row in found.mappings()]

    def _count(self, session: Session, round_id: int, key: str, **added: int) -> None:
        row = session.get_one(RoundRow, round_id)
        counted = Counter(row.counts.get(key, {}))
        counted.update(added)
        row.counts = row.counts | {key: dict(counted)}


def _driver_of(session: Session, run_id: int) -> str | None:
    return session.exec(select(RunRow.driver).where(RunRow.id == run_id)).first()


def of_asked(chosen: Any, round_id: int, track: str, purpose: Purpose) -> Any:
    return chosen.where(
        col(AskedRow.round_id) == round_id,
        col(AskedRow.track) == track,
        col(AskedRow.purpose) == purpose,
    )


def columns(table: type[SQLModel], **more: Any) -> Any:
    """SELECT a table's columns as plain rows, and `more` under their names: ten times faster than
    as objects that the ORM keeps track of."""
    named = [column.label(name) for name, column in more.items()]
    return plain_select(*cast(Any, table).__table__.c, *named).select_from(table)


def candidate_columns() -> Any:
    """SELECT what rows.candidate_record takes."""
    table = cast(Any, CandidateRow).__table__
    return plain_select(
        *(
            sql_cast(table.c[name], Text) if name == "sampling" else table.c[name]
            for name in rows.CANDIDATE_COLUMNS
        )
    ).select_from(table)


def insert_rows(session: Session, table: type[SQLModel], made: Sequence[Mapping[str, Any]]) -> None:
    """Insert many rows of equal keys at once, past the ORM's bookkeeping of each."""
    copying.write_rows(session.connection(), cast(Any, table).__table__, made)
