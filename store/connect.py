"""Open a database: SQLite here, PostgreSQL in store/postgres.py.

A transaction says whether it will write. A writing one takes the lock when it begins: on SQLite one
that reads first and then writes could otherwise fail half-way with "database is locked", whatever
the busy timeout.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session

from store import postgres
from store.errors import UserError

BUSY_TIMEOUT_S = 30.0
NEWEST_WAL_BYTES = 64 << 20
REFUSED = {
    sqlite3.SQLITE_NOTADB: "is not a SQLite database",
    sqlite3.SQLITE_CORRUPT: "cannot be read: it is damaged",
    sqlite3.SQLITE_READONLY: "cannot be written",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_FULL: "cannot be written: its disk is full",
    sqlite3.SQLITE_IOERR: "cannot be read or written: its disk failed",
    sqlite3.SQLITE_BUSY: f"has been locked by another program for {BUSY_TIMEOUT_S:.0f} s",
}
"""Primary result codes that tell of the file and not of us."""


def connect(database: Path) -> Engine:
    """An engine on the SQLite file `database`, which is made if its folder exists."""
    engine = create_engine(f"sqlite:///{database}", connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: Any) -> None:
        # None: the sqlite3 module begins no transaction of its own; `begin` below does.
        connection.isolation_level = None
        for pragma in (
            # Safe against a killed process. A power failure can lose the last batches, never more,
            # and they are then done again.
            "synchronous = NORMAL",
            "foreign_keys = ON",
            f"journal_size_limit = {NEWEST_WAL_BYTES}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def write_ahead(engine: Engine) -> None:
    """Let readers go on while somebody writes. The file keeps it, so it is changed only once."""
    with reported(engine), engine.connect() as connection:
        connection.connection.execute("PRAGMA journal_mode = WAL")


@contextmanager
def reported(engine: Engine) -> Iterator[None]:
    """Raises UserError where the database, and not our use of it, is what is wrong."""
    try:
        yield
    except (DBAPIError, engine.dialect.loaded_dbapi.Error) as error:
        if is_postgres(engine):
            if (told := postgres.told(engine, error)) is not None:
                raise told from error
            raise
        found = error.orig if isinstance(error, DBAPIError) else error
        code = getattr(found, "sqlite_errorcode", 0) & 0xFF  # above it: the extended code
        if code in REFUSED:
            raise UserError(f"{engine.url.database} {REFUSED[code]} ({found})") from error
        raise


def is_postgres(engine: Engine) -> bool:
    return engine.dialect.name == "postgresql"


@contextmanager
def transaction(engine: Engine, *, writes: bool) -> Iterator[Session]:
    """A session that commits when the block ends and rolls back when it raises.

    Raises UserError where the database cannot be used.
    """
    with (
        reported(engine),
        engine.connect().execution_options(writes=writes) as connection,
        Session(connection, expire_on_commit=False, autoflush=False) as session,
        connection.begin(),
    ):
        yield session
        session.flush()


def check_postgres(url: str, password_env: str | None) -> None:
    """Raises UserError when no run could be made there."""
    engine = postgres.connect(postgres.Place(url, "none", password_env))
    named, sql = (
        postgres.shown(engine.url),
        (
            "SELECT current_setting('server_version_num')::int / 10000, "
            "has_database_privilege(current_database(), 'CREATE')"
        ),
    )
    try:
        with transaction(engine, writes=False) as session:
            version, may = session.connection().exec_driver_sql(sql).one()
    finally:
        engine.dispose()
    if version < postgres.OLDEST:
        raise UserError(f"{named} is PostgreSQL {version}; a run needs {postgres.OLDEST} or newer")
    if not may:
        raise UserError(
            f"{named} does not let us make a schema; right is: GRANT CREATE ON DATABASE "
            f"{engine.url.database} TO {engine.url.username or 'USER'}"
        )


@contextmanager
def only_reading(session: Session) -> Iterator[Connection]:
    """The session's connection, which meanwhile changes nothing, whatever it is told.

    Raises UserError for what would change something.
    """
    connection = session.connection()
    own: Any = connection.connection.driver_connection
    on_postgres = is_postgres(connection.engine)
    if on_postgres:
        own.prepare_threshold, before = 0, own.prepare_threshold  # prepared: one statement, not two
    else:
        connection.exec_driver_sql("PRAGMA query_only = ON")
    try:
        yield connection
    except DBAPIError as error:
        if _would_change(error.orig):
            url = connection.engine.url
            named = postgres.shown(url) if on_postgres else url.database
            raise UserError(
                f"a question to {named} reads and changes nothing, and "
                "this one would; it is a SELECT"
            ) from error
        raise
    finally:
        if on_postgres:
            own.prepare_threshold = before
        else:
            connection.exec_driver_sql("PRAGMA query_only = OFF")


def _would_change(error: Any) -> bool:
    """Whether a database refused because nothing may be changed: what each of them calls it."""
    code = getattr(error, "sqlite_errorcode", getattr(error, "sqlstate", None))
    return code in (sqlite3.SQLITE_READONLY, "25006")
