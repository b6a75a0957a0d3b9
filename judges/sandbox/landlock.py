"""The files that a sandboxed program may open: some folders to read, one to write in, no others.

Landlock takes from a process what it does not name, whoever owns the file and whatever its mode.
It does not hide that a path exists, nor its size: `stat` needs no right.
"""

from __future__ import annotations

import ctypes
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1

_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_REMOVE_FILE, _MAKE_FILE, _TRUNCATE = 1 << 5, 1 << 8, 1 << 14
_READ = _READ_FILE | _READ_DIR
# No folders: what lies in the scratch folder can then be counted, and removed, in one pass.
_WRITE = _READ | _WRITE_FILE | _REMOVE_FILE | _MAKE_FILE | _TRUNCATE
_OF_FILES = _WRITE_FILE | _READ_FILE | _TRUNCATE
_KNOWN_SINCE = {1: (1 << 13) - 1, 2: 1 << 13, 3: _TRUNCATE, 5: 1 << 15}
"""The rights on files that each version of Landlock knows of; what it knows is to be named."""


class _Ruleset(ctypes.Structure):
    _fields_ = (("handled", ctypes.c_uint64),)


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def restrict(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Leave this process these files and folders alone; those that are not there are passed over.

    Raises OSError where the kernel has no Landlock. The process must not be able to gain
    privileges any more.
    """
    version = _call(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    known = sum(rights for since, rights in _KNOWN_SINCE.items() if since <= version)
    asked = _Ruleset(known)
    ruleset = _call(_CREATE_RULESET, ctypes.byref(asked), ctypes.sizeof(asked), 0)
    for rights, paths in ((_READ, readable), (_WRITE, writable)):
        for path in paths:
            try:
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            kept = rights & known
            if not stat.S_ISDIR(os.fstat(place).st_mode):
                kept &= _OF_FILES
            rule = _Beneath(kept, place)
            _call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
            os.close(place)
    _call(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    returned = int(libc.syscall(ctypes.c_long(number), *arguments))
    if returned < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return returned
