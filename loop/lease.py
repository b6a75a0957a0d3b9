"""One process drives a run: it holds a lease that it keeps renewing while it lives."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil

from store.database import Store
from store.errors import UserError

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


@contextmanager
def held(store: Store) -> Iterator[threading.Event]:
    """Hold the run's lease. The event is set if another process takes it.

    Raises UserError when another process drives the run.
    """
    run, name = store.run(), own_name()
    assert run is not None
    dead = [run.driver] if run.driver is not None and is_dead(run.driver) else []
    other = store.take_lease(name, timeout=TIMEOUT, dead=dead)
    if other is not None:
        host, pid, _ = other.rsplit(":", 2)
        raise UserError(
            f"{store.root} is being driven by process {pid} on {host}; "
            f"`loop stop {store.root}` ends it"
        )
    lost, done = threading.Event(), threading.Event()

    def renew() -> None:
        while not done.wait(RENEWED_EVERY_S):
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
        store.release_lease(name)
