"""PostgreSQL as the store: each run is a schema of its own in the database that a URL names.

What differs from SQLite is here and nowhere else. A transaction that writes takes the run's lock,
so writers come one after the other as they do on SQLite, and one that reads sees a single moment.
The one driver of a run holds a second lock on a connection of its own: the server gives it up when
that connection ends, however its process died, and ends a connection that has been silent too long.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import URL, Connection, Engine, Table, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from store import dialect
from store.errors import Away, UserError

POINTER = "store.json"
"""What a run directory has instead of a database file."""
OLDEST = 14
"""The version of PostgreSQL that ends silent sessions (`idle_session_timeout`)."""
LOCK_WAIT_S = 30
RECONNECT_S = 30.0
"""How long a server that answered before may be away: it restarts in less."""
STALLED_S = 60
"""A transaction of which nothing was heard for so long is given up by the server."""
SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
RIGHT = "right is postgresql://USER@HOST:PORT/DATABASE"
SECRETS = ("password", "sslpassword", "passfile")
REFUSED = {
    "08": "has ended the connection",
    "25P03": f"has waited for the rest of a transaction for {STALLED_S} s",
    "25006": "cannot be written",
    "28": "does not let us in",
    "3D": "is not there",
    "42501": "does not allow it",
    "53": "cannot take more",
    "55P03": f"has been locked by another program for {LOCK_WAIT_S} s",
    "57P": "has ended the connection",
    "58": "cannot be read or written",
    "XX001": "cannot be read: it is damaged",
    "XX002": "cannot be read: it is damaged",
}
"""SQLSTATEs, or how they begin, that tell of the server and not of us."""
LOST = ("08", "57P")
"""Those of a server that ended the connection, and may be back."""
SAID = {
    r"authentication failed|no password supplied|no pg_hba\.conf|role .* does not exist": "28",
    r"database .* does not exist": "3D",
}
"""What a server that refuses a connection says where psycopg gives no SQLSTATE."""


@dataclass(frozen=True)
class Place:
    """Where a run's rows are. Nothing in it is a secret, so it lies beside the run."""

    url: str
    schema: str
    password_env: str | None = None

    def keep(self, root: Path) -> None:
        """Write into a run directory where its rows are."""
        made = root / f"{POINTER}.new"
        made.write_text(json.dumps(asdict(self), indent=2) + "\n")
        made.replace(root / POINTER)

    def __str__(self) -> str:
        return f"schema {self.schema} of {shown(parsed(self.url))}"


def found(root: Path) -> Place | None:
    """Where the rows of a run directory are. None: not in PostgreSQL. Raises UserError."""
    pointer = root / POINTER
    if not pointer.is_file():
        return None
    try:
        return Place(**json.loads(pointer.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{pointer} does not say where the run's rows are: {error}") from None


def new_place(url: str, password_env: str | None, name: str) -> Place:
    """A schema that no other run has, which is made with its store. Raises UserError."""
    parsed(url)
    stem = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return Place(url, f"run_{stem[:40]}_{uuid4().hex[:8]}", password_env)


def parsed(url: str) -> URL:
    """Raises UserError for a URL that cannot be right, or that holds a password."""
    try:
        made = make_url(url)
    except (ArgumentError, ValueError):
        raise UserError(f"store.url is no address; {RIGHT}") from None
    if made.drivername not in SCHEMES:
        raise UserError(f"store.url begins with {made.drivername!r}; {RIGHT}")
    if not made.database:
        raise UserError(f"store.url names no database; {RIGHT}")
    if made.password is not None or any(key in made.query for key in SECRETS[:2]):
        raise UserError(
            "store.url holds a password, which would be kept with the run; leave it out, and set "
            "store.password_env to the name of an environment variable that holds it, or use "
            "PGPASSWORD or ~/.pgpass"
        )
    return made.set(drivername="postgresql+psycopg")


def shown(url: URL) -> str:
    """A URL as it is told: without options, and without a password in any case."""
    return url.set(drivername="postgresql", password=None, query={}).render_as_string()


def driver() -> Any:
    """psycopg 3. Raises UserError where it is not installed."""
    try:
        import psycopg
    except ImportError as error:
        raise UserError(
            "a run in PostgreSQL needs psycopg, which is not installed "
            f"({' '.join(str(error).split())}); right is: pip install 'ratchet-loop[postgres]'"
        ) from None
    return psycopg


def connect(place: Place) -> Engine:
    """An engine on the run's schema, which need not be there yet. Raises UserError."""
    api, url = driver(), parsed(place.url)
    engine = create_engine(
        url,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": 10,
            # A plan that is kept was made when tables were small: it reads them from end to end.
            "prepare_threshold": None,
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
        },
        json_serializer=dialect.written,
        json_deserializer=dialect.read,
    )
    before = False

    @event.listens_for(engine, "do_connect")
    def reach(way: Any, _: Any, arguments: Any, parameters: dict[str, Any]) -> Any:
        nonlocal before
        until = time.monotonic() + (RECONNECT_S if before else 0.0)
        while True:
            try:
                made = way.connect(*arguments, **parameters | _secret(place))
            except api.OperationalError:
                if time.monotonic() >= until:
                    before = False  # one who leaves a run does not wait again
                    raise
                time.sleep(0.5)
            else:
                before = True
                return made

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        dialect.adapt(connection)
        connection.autocommit = True
        connection.execute(
            "SELECT set_config(name, value, false) FROM (VALUES"
            " ('search_path', %s), ('timezone', 'UTC'), ('lock_timeout', %s),"
            " ('idle_in_transaction_session_timeout', %s)) AS own (name, value)",
            (f'"{place.schema}"', f"{LOCK_WAIT_S}s", f"{STALLED_S}s"),
        )
        connection.autocommit = False

    writer = key(place.schema, "writer")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        own: Any = connection.connection.driver_connection
        own.read_only = not writes
        own.isolation_level = None if writes else api.IsolationLevel.REPEATABLE_READ
        if writes:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({writer})")

    return engine


def copy_in(connection: Connection, table: Table, made: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys, in order, by COPY: several times as fast as by INSERT."""
    on, quote = connection.dialect, connection.dialect.identifier_preparer.quote
    columns = [table.c[name] for name in made[0]]
    ways = [each.type.dialect_impl(on).bind_processor(on) for each in columns]
    named = ", ".join(quote(each.name) for each in columns)
    said = f"COPY {quote(table.name)} ({named}) FROM STDIN"
    own: Any = connection.connection.driver_connection
    try:
        with own.cursor() as cursor, cursor.copy(said) as copy:
            for row in made:
                values = (row[each.name] for each in columns)
                copy.write_row(
                    [way(it) if way else it for way, it in zip(ways, values, strict=True)]
                )
    except driver().Error as error:
        raise DBAPIError.instance(said, None, error, driver().Error) from error


def key(schema: str, what: str) -> int:
    """Of an advisory lock: 64 bits, with a sign."""
    digest = hashlib.sha256(f"ratchet {schema} {what}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _secret(place: Place) -> dict[str, str]:
    """The password, if an environment variable was named for it; else libpq looks for one."""
    if place.password_env is None:
        return {}
    password = os.environ.get(place.password_env)
    if not password:
        raise UserError(
            f"the password for {shown(parsed(place.url))} is to be in the environment variable "
            f"{place.password_env!r}, which is not set"
        )
    return {"password": password}


def told(engine: Engine, error: Exception) -> UserError | None:
    """What is wrong with the server. None: the error is not about the server."""
    api = driver()
    found: Any = error.orig if isinstance(error, DBAPIError) else error
    said = " ".join(str(found).split())
    state = getattr(found, "sqlstate", None)
    gone = state is None and isinstance(found, api.OperationalError | api.InterfaceError)
    if gone:
        state = next((SAID[each] for each in SAID if re.search(each, said)), None)
    what = next((REFUSED[known] for known in REFUSED if state and state.startswith(known)), None)
    if gone and what is None:
        state, what = LOST[0], "cannot be reached"
    if what is None:
        return None
    kind = Away if state and state.startswith(LOST) else UserError
    return kind(f"{shown(engine.url)} {what} ({said})")


class Lock:
    """The lock of a run's one driver, on a connection of its own."""

    def __init__(self, engine: Engine, schema: str) -> None:
        self._engine, self._key = engine, key(schema, "driver")
        self._connection: Any = None
        self._timeout = timedelta(seconds=STALLED_S)
        self._alone = threading.Lock()

    def hold(self, timeout: timedelta | None = None) -> bool:
        """Take the lock, or keep it. False: another process holds it.

        timeout: called less often than this, the server gives the lock up.
        """
        with self._alone:
            self._timeout = timeout or self._timeout
            if self._connection is not None:
                try:
                    self._connection.execute("SELECT 1")
                    return True
                except driver().Error:  # the server was restarted, say
                    self._close()
            try:
                return self._take()
            except driver().Error as error:
                self._close()
                raise told(self._engine, error) or UserError(str(error)) from error

    def _take(self) -> bool:
        pooled = self._engine.raw_connection()
        self._connection = pooled.driver_connection
        pooled.detach()
        self._connection.autocommit = True
        silent_ms = int(self._timeout.total_seconds() * 1000)
        self._connection.execute(f"SET idle_session_timeout = {silent_ms}")
        held = self._connection.execute(f"SELECT pg_try_advisory_lock({self._key})")
        taken = bool(held.fetchone()[0])
        if not taken:
            self._close()
        return taken

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def release(self) -> None:
        with self._alone:
            if self._connection is not None:
                with suppress(driver().Error):  # a lock that is gone is given back
                    self._connection.execute(f"SELECT pg_advisory_unlock({self._key})")
            self._close()

    def is_held(self, connection: Connection) -> bool:
        """Whether any process holds it."""
        half = 0xFFFFFFFF
        found = connection.exec_driver_sql(
            "SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database "
            "WHERE datname = current_database() AND locktype = 'advisory' AND granted "
            f"AND objsubid = 1 AND classid = {(self._key >> 32) & half}::bigint::oid "
            f"AND objid = {self._key & half}::bigint::oid"
        )
        return bool(found.scalar())
