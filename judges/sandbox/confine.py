"""Take from this process all that a program must not have, for good.

It has four parts, each of which an unprivileged process may do to itself: another user where it
is root, limits (setrlimit), files (Landlock), system calls (seccomp). No namespaces: containers
forbid them, and what they would add the list of system calls refuses already.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from contextlib import suppress

from judges.sandbox import landlock, seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_FIRST_UNUSED_USER = 1879048192
"""systemd's table of user ids leaves 1879048192 to 2147483646 to nobody."""
_NOBODY = 65534
_SHARED_TASKS = 128
"""How many tasks more than now a user may have that the sandbox shares with others."""
_OPEN_FILES = 64
_STACK_BYTES = 8 << 20
_MEGABYTE = 1 << 20

_DIE_WITH_PARENT, _KEEP_CAPABILITIES, _NO_NEW_PRIVILEGES = 1, 8, 38
_CAPABILITIES_VERSION = 0x20080522
_READ_ANY_FILE = (2, 1)
"""CAP_DAC_READ_SEARCH, and CAP_DAC_OVERRIDE, which is what root in a container has of it."""


def confine(order: Mapping[str, Any]) -> None:
    """Raises OSError with what could not be done. Afterwards nothing of it can be undone."""
    os.umask(0o077)
    alone = _leave_root(order["scratch"], bool(order["reads_any_file"]))
    _set_limits(order, alone)
    _give_up_capabilities(bool(order["reads_any_file"]))
    _prctl(_DIE_WITH_PARENT, signal.SIGKILL if order["dies_with_parent"] else 0)
    if os.getppid() != order["parent"]:
        raise OSError("the judge is gone")
    _prctl(_NO_NEW_PRIVILEGES, 1)  # Landlock refuses whoever could still gain some.
    landlock.restrict(order["readable"], [order["scratch"], "/dev/null"])
    seccomp.install(seccomp.instructions(os.uname().machine, os.getpid()))


def _leave_root(scratch: str, reads_any_file: bool) -> bool:
    """Become a user that nobody else is, if this is root. Whether that was possible."""
    if os.geteuid() != 0:
        return False
    if reads_any_file:
        _prctl(_KEEP_CAPABILITIES, 1)
    for user in (_FIRST_UNUSED_USER + os.getpid(), _NOBODY):
        with suppress(OSError):
            os.chown(scratch, user, user)
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            return True
    # The kernel limits the tasks of every user but root: the probe will find this out.
    return False


def _set_limits(order: Mapping[str, Any], alone: bool) -> None:
    tasks = int(order["threads"])
    if not alone and os.geteuid() != 0:
        tasks += _tasks_of_this_user() + _SHARED_TASKS
    limits = {
        resource.RLIMIT_AS: order["memory_mb"] * _MEGABYTE,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: order["disk_mb"] * _MEGABYTE,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_NPROC: tasks,
        resource.RLIMIT_STACK: _STACK_BYTES,
    }
    if order["time_s"] is not None:
        limits[resource.RLIMIT_CPU] = order["time_s"]
    for which, limit in limits.items():
        hard = resource.getrlimit(which)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (limit, limit))


def _tasks_of_this_user() -> int:
    """How many tasks the kernel counts, to 16. /proc does not show those of other containers."""
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    low, high = 0, 64
    while not _may_fork(high, hard):
        low, high = high, 2 * high
    while high - low > 16:
        middle = (low + high) // 2
        low, high = (low, middle) if _may_fork(middle, hard) else (middle, high)
    return high


def _may_fork(limit: int, hard: int) -> bool:
    if hard != resource.RLIM_INFINITY and limit > hard:
        raise OSError(f"the user's limit of {hard} processes is used up")
    resource.setrlimit(resource.RLIMIT_NPROC, (limit, hard))
    try:
        child = os.fork()
    except BlockingIOError:
        return False
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return True


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


def _give_up_capabilities(reads_any_file: bool) -> None:
    """All of them, but for the one that lets a root's Python be read where only root may look.

    Landlock has the last word on what that one opens.
    """
    for which in _READ_ANY_FILE if reads_any_file else ():
        with suppress(PermissionError):
            return _set_capabilities(1 << which)
    return _set_capabilities(0)


def _set_capabilities(kept: int) -> None:
    sets = (_Sets * 2)(_Sets(kept, kept, 0), _Sets(0, 0, 0))
    _checked("capset", ctypes.byref(_Header(_CAPABILITIES_VERSION, 0)), sets)


def _prctl(option: int, value: int) -> None:
    _checked("prctl", option, ctypes.c_ulong(value), 0, 0, 0)


def _checked(name: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
