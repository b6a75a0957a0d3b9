"""One process drives a run: it holds a lease that it keeps renewing while it lives."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
from sqlalchemy.exc import SQLAlchemyError

from store.database import Store
from store.errors import UserError
from store.records import Run

TIMEOUT = timedelta(seconds=60)
"""A driver on another machine that has been silent for so long counts as dead."""
RENEWED_EVERY_S = 10.0


def own_name() -> str:
    """host:pid:start. The start tells this process from a later one with its pid."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def is_dead(driver: str) -> bool:
    """Whether a driver is known not to live: only one of this machine can be."""
    host, pid, start = driver.rsplit(":", 2)
    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(pid))
        ended = process.status() == psutil.STATUS_ZOMBIE
        return ended or f"{process.create_time():.2f}" != start
    except psutil.NoSuchProcess:
        return True


def is_alive(run: Run) -> bool:
    """Whether the run has a driver that lives, as far as this machine can tell."""
    if run.driver is None or run.driver_seen is None or is_dead(run.driver):
        return False
    here = run.driver.rsplit(":", 2)[0] == socket.gethostname()
    return here or datetime.now(UTC) - run.driver_seen < TIMEOUT


def is_driven(store: Store) -> bool:
    """Whether somebody drives a run: the database knows, or this machine as far as it can."""
    known = store.is_driven()
    if known is not None:
        return known
    run = store.run()
    return run is not None and is_alive(run)


def driven(root: Path, driver: str) -> UserError:
    """The error for a run that another process drives."""
    host, pid, _ = driver.rsplit(":", 2)
    return UserError(
        f"{root} is being driven by process {pid} on {host}; `loop stop {root}` ends it"
    )


@contextmanager
def held(store: Store, *, renewed_every_s: float = RENEWED_EVERY_S) -> Iterator[threading.Event]:
    """Hold the run's lease. The event is set if another process takes it.

    Raises UserError when another process drives the run.
    """
    run, name = store.run(), own_name()
    assert run is not None
    dead = [run.driver] if run.driver is not None and is_dead(run.driver) else []
    # A process of this machine is known to live or not, however long it has been silent.
    ours = run.driver is not None and run.driver.rsplit(":", 2)[0] == socket.gethostname()
    ours &= store.place is None  # PostgreSQL knows better, of any machine
    other = store.take_lease(name, timeout=timedelta.max if ours else TIMEOUT, dead=dead)
    if other is not None:
        raise driven(store.root, other)
    lost, done = threading.Event(), threading.Event()

    def renew() -> None:
        while not done.wait(renewed_every_s):
            # A full disk, say: the work itself will meet it. Whether another process took over
            # is seen when it can be asked again.
            with suppress(SQLAlchemyError, UserError):
                if not store.renew_lease(name):
                    lost.set()
                    return

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield lost
    finally:
        done.set()
        thread.join()
        with suppress(
            SQLAlchemyError, UserError
        ):  # a full disk, say; the next sees that this process is dead
            store.release_lease(name)
