"""Try from inside what a sandboxed program must not be able to do, and tell what worked.

A limit that was set is not a limit that holds: under another kernel or in a container the call
may succeed and do nothing. So each of these is tried for real.
"""

from __future__ import annotations

import _thread
import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

_PTRACE_PEEK = 2
_REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOSYS)


def main(order: Mapping[str, Any], report: TextIO) -> None:
    """Report for each thing that must not work how it came to work."""
    had = {
        what: sorted(set(found))
        for what, attempt in ATTEMPTS.items()
        if (found := list(attempt(order)))
    }
    report.write(json.dumps(had) + "\n")
    report.flush()
    os._exit(0)


def _tried(*attempts: tuple[str, Callable[[], Any]]) -> Iterable[str]:
    """The names of those that were not refused."""
    for name, attempt in attempts:
        try:
            attempt()
        except (OSError, MemoryError, ValueError, RuntimeError, subprocess.SubprocessError):
            continue
        yield name


def _called(name: str, *arguments: Any) -> None:
    """A call that harms nobody should it be let through: its arguments are wrong."""
    libc = ctypes.CDLL(None, use_errno=True)
    refused = getattr(libc, name)(*arguments) < 0 and ctypes.get_errno() in _REFUSALS
    if refused:
        raise OSError(ctypes.get_errno(), name)


def _network(order: Mapping[str, Any]) -> Iterable[str]:
    kinds = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6, "unix": socket.AF_UNIX}
    pairs = [
        (f"an {name} socket", lambda kind=kind: socket.socket(kind)) for name, kind in kinds.items()
    ]
    datagrams = lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # noqa: E731
    return _tried(*pairs, ("a datagram socket", datagrams))


def _files(order: Mapping[str, Any]) -> Iterable[str]:
    witness = order["witness"]
    folder = os.path.dirname(witness)
    return _tried(
        ("reading a file", lambda: open(witness).close()),
        ("listing a folder", lambda: os.listdir(folder)),
        ("writing a file", lambda: open(witness, "a").close()),
        ("emptying a file", lambda: os.open(witness, os.O_RDONLY | os.O_TRUNC)),
        ("emptying a file", lambda: os.truncate(witness, 0)),
        ("making a file", lambda: open(witness + ".new", "w").close()),
        ("removing a file", lambda: os.remove(witness)),
        ("changing a file's mode", lambda: os.chmod(witness, 0)),
        ("reading /etc/passwd", lambda: open("/etc/passwd").close()),
        ("reading /proc", lambda: open(f"/proc/{os.getppid()}/environ").close()),
    )


def _processes(order: Mapping[str, Any]) -> Iterable[str]:
    def forked() -> None:
        if os.fork() == 0:
            os._exit(0)

    return _tried(
        ("fork", forked),
        ("exec", lambda: _called("execve", b"", None, None)),
        ("a subprocess", lambda: subprocess.run([sys.executable, "-c", ""], check=False)),
    )


def _threads(order: Mapping[str, Any]) -> Iterable[str]:
    allowed = order["threads"]
    gate = _thread.allocate_lock()
    gate.acquire()
    _thread.stack_size(1 << 15)  # the limit of memory must not be what stops them
    started = 0
    while started < 4 * allowed + 512:
        try:
            _thread.start_new_thread(gate.acquire, ())
        except RuntimeError:
            return
        started += 1
    yield f"{started} threads where {allowed} are allowed"


def _others(order: Mapping[str, Any]) -> Iterable[str]:
    parent = os.getppid()
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    return _tried(
        ("a signal", lambda: os.kill(parent, 0)),
        ("a signal", lambda: signal.pidfd_send_signal(os.pidfd_open(parent), 0)),
        ("ptrace", lambda: _called("ptrace", _PTRACE_PEEK, parent, 0, 0)),
        ("its memory", lambda: _called("process_vm_readv", parent, 0, 0, 0, 0, 0)),
        ("its limits", lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE)),
        ("its priority", lambda: os.setpriority(os.PRIO_PROCESS, parent, priority)),
    )


def _kernel(order: Mapping[str, Any]) -> Iterable[str]:
    return _tried(
        ("unshare", lambda: _called("unshare", 0x10000000)),
        ("mount", lambda: _called("mount", None, None, None, 0, None)),
        ("becoming root", lambda: os.setuid(0)),
        ("io_uring", lambda: _called("syscall", 425, 1, 0)),
        (
            "bpf",
            lambda: _called("syscall", 321 if os.uname().machine == "x86_64" else 280, 0, 0, 0),
        ),
        ("a filter", lambda: _called("prctl", 22, 2, 0, 0, 0)),
        ("file handles", lambda: _called("name_to_handle_at", 0, b"/", 0, 0, 0)),
    )


def _memory(order: Mapping[str, Any]) -> Iterable[str]:
    size = (order["memory_mb"] + 1) << 20
    return _tried(
        ("an array", lambda: bytearray(size)),
        ("a mapping", lambda: mmap.mmap(-1, size)),
        ("a higher limit", lambda: _raised(resource.RLIMIT_AS)),
    )


def _time(order: Mapping[str, Any]) -> Iterable[str]:
    if resource.getrlimit(resource.RLIMIT_CPU)[1] != order["time_s"]:
        yield "no limit"
    yield from _tried(("a higher limit", lambda: _raised(resource.RLIMIT_CPU)))


def _room(order: Mapping[str, Any]) -> Iterable[str]:
    def fill() -> None:
        with open("filled", "wb") as file:
            os.remove("filled")
            file.truncate((order["disk_mb"] + 1) << 20)

    def hold() -> None:
        held = [open(os.devnull) for _ in range(1000)]  # noqa: SIM115
        held.clear()

    yield from _tried(("a large file", fill), ("a thousand files", hold))
    yield from _tried(("a higher limit", lambda: _raised(resource.RLIMIT_FSIZE)))


def _raised(which: int) -> None:
    limit = resource.getrlimit(which)[1]
    if limit != resource.RLIM_INFINITY:
        resource.setrlimit(which, (limit + 1, limit + 1))


def _surroundings(order: Mapping[str, Any]) -> Iterable[str]:
    return (f"the variable {name}" for name in os.environ if name not in order["environment"])


ATTEMPTS: dict[str, Callable[[Mapping[str, Any]], Iterable[str]]] = {
    "open a network connection": _network,
    "touch files outside its folder": _files,
    "start processes": _processes,
    "reach other processes": _others,
    "change the kernel's state": _kernel,
    "use more memory than it may": _memory,
    "use more processor time than it may": _time,
    "fill the disk": _room,
    "see the environment": _surroundings,
    "start more threads than it may": _threads,
}
"""What a program must not be able to do. Threads come last: those that were started stay."""
