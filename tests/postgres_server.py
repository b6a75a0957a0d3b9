"""A PostgreSQL server for tests, from the packages of the system."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REQUIRED = "RATCHET_TESTS_NEED_POSTGRESQL"
"""The environment variable that makes a missing server a failure: `.ci/run` sets it."""


GUARDED = "guarded"
"""The one user who would have to say a password. The tests that need it make it."""


class Missing(Exception):
    """There is no server to start, and why."""


def programs() -> Path:
    """The folder of initdb and pg_ctl. Raises Missing."""
    there = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    path = str(there[-1]) if there else shutil.which("initdb")
    if path is None:
        raise Missing("PostgreSQL is not installed: no initdb below /usr/lib/postgresql or on PATH")
    return Path(path).parent


class Server:
    """A cluster in a folder of its own, with databases as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, programs()
        self.user = self._user()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        if os.geteuid() == 0:
            os.chown(folder, *self.user)
        self.run("initdb", "-A", "trust", "-U", "ratchet", "-E", "UTF8", "--no-locale", "-N")
        rules = self.folder / "data" / "pg_hba.conf"
        guarded = f"host all {GUARDED} 127.0.0.1/32 scram-sha-256\n"
        rules.write_text(guarded + rules.read_text())
        self.start()

    @staticmethod
    def _user() -> tuple[int, int]:
        """Who the server runs as: PostgreSQL refuses root."""
        if os.geteuid() != 0:
            return os.geteuid(), os.getegid()
        for name in ("postgres", "nobody"):
            try:
                found = pwd.getpwnam(name)
            except KeyError:
                continue
            return found.pw_uid, found.pw_gid
        raise Missing("a server cannot run as root, and there is no user postgres or nobody")

    def command(self, program: str, *arguments: str) -> list[str]:
        """A program of PostgreSQL's. It ends with the thread that began it, however that ends."""
        own = ["setpriv", "--pdeathsig=QUIT"]
        if shutil.which("setpriv") is None:
            raise Missing("a server is started by setpriv, which util-linux has")
        if os.geteuid() == 0:
            own += [f"--reuid={self.user[0]}", f"--regid={self.user[1]}", "--clear-groups"]
        return [*own, str(self.bin / program), "-D", str(self.folder / "data"), *arguments]

    def run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            self.command(program, *arguments), capture_output=True, text=True, cwd="/", check=False
        )
        if done.returncode:
            raise Missing(f"{program} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        options = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self.folder,
            "fsync": "off",
        }
        said = [f"--{name}={value}" for name, value in options.items()]
        deadline = time.monotonic() + 120
        self.process: subprocess.Popen[bytes] | None = None
        while not self._answers():
            if time.monotonic() > deadline:
                raise Missing(f"postgres: {(self.folder / 'log').read_text()[-2000:]}")
            # It refuses to begin while processes of a server that was killed are still there.
            if self.process is None or self.process.poll() is not None:
                with (self.folder / "log").open("ab") as log:
                    self.process = subprocess.Popen(
                        self.command("postgres", *said), stdout=log, stderr=log, cwd="/"
                    )
            time.sleep(0.2)

    def _answers(self) -> bool:
        ready = [str(self.bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(ready, check=False).returncode == 0

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends sessions in order, SIGQUIT at once, SIGKILL leaves that to themselves."""
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(300)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://ratchet@127.0.0.1:{self.port}/{database}"


@contextmanager
def running() -> Iterator[Server]:
    """Raises Missing."""
    folder = Path(tempfile.mkdtemp(prefix="ratchet-postgresql-", dir="/tmp"))
    server = None
    try:
        server = Server(folder)
        yield server
    finally:
        if server is not None:
            server.stop(signal.SIGQUIT)
        shutil.rmtree(folder)
