"""Run a program that nobody trusts: in a child that has nothing, or not at all.

What is required is the whole of it: no network, no files but Python's own and a scratch folder,
no other processes, none of the caller's environment, and limits of time, memory, threads, output
and disk. It is made of what a process may do to itself on Linux 5.13 or later without privileges
(see `confine`), and is believed only after a child has tried to break out (see `probe`).
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from judges.sandbox.children import Child, Limits, attend
from judges.sandbox.seccomp import MACHINES
from judges.sandbox.workers import WorkerError, Workers
from store.errors import UserError

__all__ = ["Child", "Limits", "WorkerError", "Workers", "attend", "missing", "require"]

_PROBE = Limits(time_s=5, memory_mb=256, threads=4, disk_mb=4)
_proven = threading.Lock(), set[int]()


def require() -> None:
    """Raises UserError unless programs can be run here with all of the isolation.

    What was proven once in a process is not tried again in it.
    """
    lock, proven = _proven
    with lock:
        if os.getpid() in proven:
            return
        lacks = missing()
        if lacks:
            raise UserError(
                "programs are run in a sandbox or not at all, and on this machine there is none "
                f"that holds: {'; '.join(lacks)}; it takes Linux 5.13 or later with Landlock and "
                "seccomp, and a container must not forbid them"
            )
        proven.add(os.getpid())


def missing() -> list[str]:
    """What a program could do here that it must not, in words; nothing when the sandbox holds."""
    if sys.platform != "linux":
        return [f"this is {sys.platform} and not Linux"]
    if platform.machine() not in MACHINES:
        return [f"the processor is {platform.machine()} and not {' or '.join(MACHINES)}"]
    folder = Path(tempfile.mkdtemp(prefix="ratchet-witness-"))
    try:
        witness = folder / "witness"
        witness.write_text("to be read by anybody who is let\n")
        witness.chmod(0o666)
        folder.chmod(0o777)
        child = Child("probe", {"witness": str(witness)}, _PROBE)
        attend([child], child, _PROBE.wall_s)
    finally:
        shutil.rmtree(folder)
    if child.lacks is not None:
        return [f"a child could not be confined: {child.lacks}"]
    if not child.reported:
        said = child.ended_by or child.err.decode(errors="replace").strip() or child.exit
        return [f"the probe did not end: {said}"]
    return [f"a program could {what} ({', '.join(how)})" for what, how in child.reported[0].items()]
