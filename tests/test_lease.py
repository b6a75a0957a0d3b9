"""The lease: one process drives a run, and a dead one's place is taken."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from loop import lease
from store.database import Store
from store.errors import UserError
from store.postgres import new_place
from store.records import Run

DRIVER = """
import sys
from pathlib import Path
from loop import lease
from store.database import Store
from store.errors import UserError

store = Store(Path(sys.argv[1]))
try:
    with lease.held(store, renewed_every_s=0.05) as lost:
        print("driving", flush=True)
        while not lost.wait(0.02):
            if store.stop_requested():
                break
        print("lost" if lost.is_set() else "stopped", flush=True)
except UserError as error:
    print(error, flush=True)
"""


of_sqlite = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
of_postgres = pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)


@pytest.fixture
def store(tmp_path, store_url):
    place = None if store_url is None else new_place(store_url, None, "test")
    made = Store(tmp_path / "loop.db", create=True, place=place)
    if place is not None:
        place.keep(tmp_path)
    made.create_run(Run(uuid="u", name="n", config={}, identity="i", seed=0, versions={}))
    yield made
    made.close()


@contextmanager
def driver(store):
    """Another process that drives the run until it is told to stop or loses the lease."""
    command = [sys.executable, "-c", DRIVER, str(store.root / "loop.db")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def said(process) -> str:
    return process.stdout.readline().strip()


def seen(store, ago: timedelta) -> None:
    """Make the driver's last sign of life this long ago."""
    store._update_run(driver_seen=datetime.now(UTC) - ago)


def until(done) -> None:
    """PostgreSQL needs a moment to see that a connection has ended."""
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def silent_too_long(store) -> None:
    """What makes a driver's place free that was not heard of."""
    seen(store, lease.TIMEOUT + timedelta(seconds=1))
    if store.place is not None:  # as the server itself does after lease.TIMEOUT
        with store._engine.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' "
                f"AND objid = {store._lock._key & 0xFFFFFFFF}::bigint::oid"
            )
        until(lambda: not store.is_driven())


def test_a_second_driver_is_refused_with_a_sentence_that_names_the_first(store):
    with driver(store) as first, driver(store) as second:
        answers = {first: said(first), second: said(second)}
        assert "driving" in answers.values()
        winner = next(process for process, answer in answers.items() if answer == "driving")
        (refused,) = (answer for process, answer in answers.items() if process is not winner)
        assert refused == (
            f"{store.root} is being driven by process {winner.pid} on {socket.gethostname()}; "
            f"`loop stop {store.root}` ends it"
        )
        with pytest.raises(UserError, match=f"driven by process {winner.pid}"), lease.held(store):
            pass
        assert winner.poll() is None
        assert lease.is_driven(store)
        store.request_stop()
        assert said(winner) == "stopped"
        winner.wait(10)
    assert store.run().driver is None
    assert not lease.is_driven(store)


def test_a_killed_driver_is_taken_over_at_once(store):
    with driver(store) as process:
        assert said(process) == "driving"
        held_by = store.run().driver
        process.kill()
        # Not waited for: a zombie is as dead.
        while not lease.is_dead(held_by):
            time.sleep(0.005)
        assert datetime.now(UTC) - store.run().driver_seen < lease.TIMEOUT
        until(lambda: not lease.is_driven(store))
        with lease.held(store):
            assert store.run().driver == lease.own_name()
        process.wait()
        assert lease.is_dead(held_by)


def test_a_later_process_with_the_pid_of_a_dead_driver_is_not_that_driver(store):
    host, pid, start = lease.own_name().rsplit(":", 2)
    assert not lease.is_dead(lease.own_name())
    assert lease.is_dead(f"{host}:{pid}:{float(start) - 100:.2f}")
    assert lease.is_dead(f"{host}:{2**22 + 1}:{start}")
    assert not lease.is_dead(f"another-host:{pid}:{start}")


@of_sqlite
def test_a_driver_on_another_host_is_dead_when_it_was_silent_too_long(store):
    away = "another-host:1:2.00"
    assert store.take_lease(away, timeout=lease.TIMEOUT) is None
    for ago in (timedelta(0), lease.TIMEOUT - timedelta(seconds=5)):
        seen(store, ago)
        assert lease.is_alive(store.run())
        with pytest.raises(UserError, match="by process 1 on another-host"), lease.held(store):
            pass
        assert store.run().driver == away
    seen(store, lease.TIMEOUT + timedelta(seconds=1))
    assert not lease.is_alive(store.run())
    with lease.held(store):
        assert store.run().driver == lease.own_name()
        assert not store.renew_lease(away)


def test_a_driver_that_lives_renews_its_lease(store):
    with driver(store) as process:
        assert said(process) == "driving"
        seen(store, timedelta(seconds=50))
        deadline = time.monotonic() + 10
        while datetime.now(UTC) - store.run().driver_seen > timedelta(seconds=5):
            assert time.monotonic() < deadline, "not renewed"
            time.sleep(0.02)


def test_a_driver_notices_that_another_has_taken_over(store):
    with driver(store) as process:
        assert said(process) == "driving"
        process.send_signal(signal.SIGSTOP)  # as a machine that sleeps
        silent_too_long(store)
        other = "another-host:1:2.00"
        assert store.take_lease(other, timeout=lease.TIMEOUT) is None
        process.send_signal(signal.SIGCONT)
        assert said(process) == "lost"
        process.wait(10)
    assert store.run().driver == other, "the loser does not release what is not its own"


def test_a_lease_is_released_when_the_driver_fails(store):
    def drive():
        with lease.held(store):
            assert store.run().driver == lease.own_name()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive()
    assert store.run().driver is None


def test_a_request_to_stop_an_earlier_driver_does_not_stop_the_next(store):
    store.request_stop()
    with lease.held(store):
        assert not store.stop_requested()


def test_a_driver_is_named_by_host_process_and_start():
    host, pid, start = lease.own_name().rsplit(":", 2)
    assert (host, int(pid)) == (socket.gethostname(), os.getpid())
    assert 0 < time.time() - float(start) < 24 * 3600
