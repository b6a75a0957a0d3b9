"""Start a confined child, hear it out within its limits, and leave nothing of it behind."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

_LAUNCH = str(Path(__file__).with_name("launch.py"))
# Neither the user's packages nor the folder of the script, and no .pyc written.
_FLAGS = ("-s", "-S", "-P", "-B")
_MOST_FILES = 1000
_LOOK_EVERY_S = 0.05
_SYSTEM = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime"),
    *("/usr/share/zoneinfo", "/dev/null", "/dev/urandom"),
)


@dataclass(frozen=True)
class Limits:
    """What a child may use. Beyond it the kernel refuses, or the child is killed."""

    time_s: int | None = 5
    """Of processor time. None: it is asked again and again, and whoever asks keeps the time."""
    memory_mb: int = 512
    threads: int = 8
    output_kb: int = 256
    """Of each of its streams."""
    disk_mb: int = 16
    """In its scratch folder, which is all that it may write to."""

    @property
    def wall_s(self) -> float:
        """How long it may take on the clock: long enough for a busy machine, not to sleep in."""
        return 3.0 * (self.time_s or 0)


class Child:
    """One confined process. Whoever starts it calls `close`.

    role: the module of this package that it becomes. streams: whether what it prints is kept.
    """

    def __init__(
        self,
        role: str,
        order: Mapping[str, Any],
        limits: Limits,
        *,
        stdin: bytes | int = b"",
        pass_fds: Sequence[int] = (),
        packages: bool = False,
        streams: bool = True,
    ) -> None:
        self.limits = limits
        self.scratch = tempfile.mkdtemp(prefix="ratchet-")
        self.out, self.err, self.report = bytearray(), bytearray(), bytearray()
        self.ended_by: str | None = None
        """In words, what it was killed for."""
        self.exit: int | None = None
        """Its exit status, or minus the signal that ended it."""
        self.cpu_s = 0.0
        environment = _environment(self.scratch)
        whole = {
            **order,
            **asdict(limits),
            "role": role,
            "scratch": self.scratch,
            "parent": os.getpid(),
            "packages": _packages() if packages else [],
            "readable": (readable := _readable(packages)),
            "reads_any_file": not _open_to_all((*readable, os.path.dirname(self.scratch))),
            "dies_with_parent": limits.time_s is not None,
            "environment": sorted(environment),
        }
        reads, writes = os.pipe()
        try:
            with _file_of(json.dumps(whole).encode()) as ordered, _file_of(stdin) as given:
                self._running = subprocess.Popen(
                    [sys.executable, *_FLAGS, _LAUNCH, str(ordered.fileno()), str(writes)],
                    stdin=given,
                    stdout=subprocess.PIPE if streams else subprocess.DEVNULL,
                    stderr=subprocess.PIPE if streams else subprocess.DEVNULL,
                    cwd=self.scratch,
                    env=environment,
                    start_new_session=True,
                    pass_fds=(ordered.fileno(), writes, *pass_fds),
                )
        except BaseException:
            os.close(reads)
            shutil.rmtree(self.scratch)
            raise
        finally:
            os.close(writes)
        self.pid = self._running.pid
        self.report_at = reads
        self._streams = {reads: self.report}
        for stream, kept in ((self._running.stdout, self.out), (self._running.stderr, self.err)):
            if stream is not None:
                self._streams[stream.fileno()] = kept
        for place in self._streams:
            os.set_blocking(place, False)

    @property
    def reported(self) -> list[Any]:
        """The lines of its report, without the first."""
        return [json.loads(line) for line in self.report.splitlines()[1:]]

    @property
    def lacks(self) -> str | None:
        """Why it was never confined, so that nothing was run; None when it was."""
        said, newline, _ = self.report.partition(b"\n")
        if newline:
            found = json.loads(said).get("lacks")
            return None if found is None else str(found)
        last = self.err.decode(errors="replace").strip().splitlines()[-1:]
        return self.ended_by or "".join(last) or f"it ended with {self.exit} before it was confined"

    def hear(self, place: int) -> bool:
        """Take what there is to read at `place`; whether more may come."""
        kept = self._streams[place]
        while True:
            try:
                some = os.read(place, 65536)
            except BlockingIOError:
                return True
            kept += some
            if not some:
                return False
            if kept is not self.report and len(kept) > self.limits.output_kb << 10:
                self.ended_by = f"it printed more than {self.limits.output_kb} kB"
                return False

    def look(self) -> None:
        """Notice when it has filled its folder."""
        size = 0
        with os.scandir(self.scratch) as entries:
            for count, entry in enumerate(entries):
                with contextlib.suppress(FileNotFoundError):
                    size += entry.stat(follow_symlinks=False).st_size
                if count == _MOST_FILES:
                    self.ended_by = f"it made more than {_MOST_FILES} files"
        if size > self.limits.disk_mb << 20:
            self.ended_by = f"it wrote more than {self.limits.disk_mb} MB of files"

    def close(self) -> None:
        """Kill it and take its remains away. It cannot have started another process."""
        if self._running.returncode is not None:
            return
        over = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        _, status, used = os.wait4(self.pid, 0)
        self.exit = self._running.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_s = used.ru_utime + used.ru_stime
        for place in list(self._streams):
            if self.ended_by is None:
                self.hear(place)
        os.close(self.report_at)
        for stream in (self._running.stdout, self._running.stderr):
            if stream is not None:
                stream.close()
        shutil.rmtree(self.scratch)
        limit = self.limits.time_s
        if self.ended_by is None and limit is not None:
            # The kernel kills by the ticks that it counted, too many where many processes share a
            # processor; what was used it tells exactly.
            killed = over and self.exit == -signal.SIGKILL and self.cpu_s > limit / 2
            if killed or self.cpu_s > limit - 0.1:
                self.ended_by = f"it used more than {limit} s of processor time"


def attend(children: Sequence[Child], until: Child, wall_s: float) -> None:
    """Hear them until this one has ended, or one has used what it may; then end them all."""
    deadline = time.monotonic() + wall_s
    ended = os.pidfd_open(until.pid)
    try:
        with selectors.DefaultSelector() as watched:
            watched.register(ended, selectors.EVENT_READ)
            for child in children:
                for place in child._streams:
                    watched.register(place, selectors.EVENT_READ, child)
            _hear(children, watched, ended, deadline)
    finally:
        os.close(ended)
        for child in children:
            child.close()


def _hear(
    children: Sequence[Child], watched: selectors.BaseSelector, ended: int, deadline: float
) -> None:
    while (left := deadline - time.monotonic()) > 0:
        for key, _ in watched.select(min(left, _LOOK_EVERY_S)):
            if key.fd == ended:
                return
            if not key.data.hear(key.fd):
                watched.unregister(key.fd)
        for child in children:
            child.look()
        if any(child.ended_by for child in children):
            return
    for child in children:
        child.ended_by = f"it took more than {child.limits.wall_s:g} s on the clock"


@contextlib.contextmanager
def _file_of(given: bytes | int) -> Any:
    """A file to read `given` from, or the pipe that was given."""
    if isinstance(given, int):
        yield os.fdopen(given, closefd=False)
        return
    with tempfile.TemporaryFile() as file:
        file.write(given)
        file.seek(0)
        yield file


def _environment(scratch: str) -> dict[str, str]:
    """All that the child finds in its environment. No key of the user's is in it."""
    return {
        "PYTHONHASHSEED": "0",  # the order of a set of strings must not decide a verdict
        "PYTHONUTF8": "1",
        "LANG": "C.UTF-8",
        "HOME": scratch,
        "TMPDIR": scratch,
        "MALLOC_ARENA_MAX": "1",  # each thread's own arena would count as 64 MB of memory
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _packages() -> list[str]:
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def _readable(packages: bool) -> list[str]:
    """What Python needs to run: its library, the system's, and the time zone."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    base |= {"installed_base": sys.base_prefix, "installed_platbase": sys.base_exec_prefix}
    library = {sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib")}
    library |= {str(Path(sys.base_prefix, "lib"))}
    return [*sorted(library), *_SYSTEM, *(_packages() if packages else [])]


@cache
def _open_to_all(paths: tuple[str, ...]) -> bool:
    """Whether every user may look into these folders."""
    there = [Path(path) for path in paths if os.path.isdir(path)]
    return all(os.stat(way).st_mode & 1 for path in there for way in (path, *path.parents))
