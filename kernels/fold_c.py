"""The logsumexp fold in C, built with the system's compiler when it is first wanted.

The library is kept in the user's cache under a name made of all that it depends on, so a home that
machines share holds one for each, and two processes that build at once put the same in place. Where
nothing can be kept there, each process builds its own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.fold_torch import Norm, Running, Scale

DTYPES = (torch.bfloat16, torch.float32)
_SOURCE = Path(__file__).with_name("fold.c")
# Not -ffast-math, for the reasons that fold.c gives.
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
_WORTH_A_THREAD = 1 << 20
_SUM = ".sha256"
_PATIENCE = 120
"""Seconds for a compiler that takes one."""


class Unavailable(Exception):
    """Why there is no C fold here, in one clause."""


FAILURES = (Unavailable,)


class _Unusable(Exception):
    """Why no library can be kept for other processes, in one clause."""


class Built(NamedTuple):
    """The library, and how it was had, in one clause."""

    library: ctypes.CDLL
    how: str


class _Tile(ctypes.Structure):
    _fields_ = (
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("is_bf16", ctypes.c_int32),
        ("is_capped", ctypes.c_int32),
        ("cap", ctypes.c_float),
        ("inv_temperature", ctypes.c_float),
    )


def forward(tile: Tensor, target: Tensor, start: int, running: Running, scale: Scale) -> None:
    """See kernels.fold_torch.forward."""
    shape, target = _described(tile, start, scale), target.contiguous()
    kept = list(running.all())

    def fold(first: int, last: int) -> None:
        built().library.ratchet_fold_forward(
            ctypes.byref(shape), _at(tile), _at(target), first, last, *map(_at, kept)
        )

    _spread(fold, tile)


def backward(
    tile: Tensor, target: Tensor, start: int, norm: Norm, grad: Tensor, scale: Scale
) -> None:
    """See kernels.fold_torch.backward."""
    shape, target = _described(tile, start, scale), target.contiguous()
    known = [one.contiguous() for one in (*norm, grad.to(norm.max.dtype))]

    def fold(first: int, last: int) -> None:
        built().library.ratchet_fold_backward(
            ctypes.byref(shape), _at(tile), _at(target), first, last, *map(_at, known)
        )

    _spread(fold, tile)


def _described(tile: Tensor, start: int, scale: Scale) -> _Tile:
    assert tile.stride(1) == 1, "rows of a tile are contiguous"
    return _Tile(
        tile.shape[1],
        tile.stride(0),
        start,
        tile.dtype == torch.bfloat16,
        scale.softcap is not None,
        scale.softcap or 1.0,
        1 / scale.temperature,
    )


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _spread(fold: Callable[[int, int], None], tile: Tensor) -> None:
    """Fold shares of the rows side by side: ctypes lets go of the interpreter's lock.

    Threads of OpenMP would bring a second runtime into torch's process.
    """
    rows = len(tile)
    shares = min(torch.get_num_threads(), rows, -(-tile.numel() // _WORTH_A_THREAD))
    bounds = [rows * share // shares for share in range(shares + 1)]
    others = [Thread(target=fold, args=share) for share in pairwise(bounds[1:])]
    for each in others:
        each.start()
    fold(bounds[0], bounds[1])
    for each in others:
        each.join()


@functools.cache
def built() -> Built:
    """The library, built if it is not there yet. Raises Unavailable."""
    if not hasattr(os, "getuid"):
        raise Unavailable("whose a file is cannot be told on this system")
    compiler = _compiler()
    name = f"fold-{_digest(compiler)}.so"
    try:
        file = _folder() / name
        if not _is_whole(file):
            _build(compiler, file)
        _refuse_others(file)
        return Built(_loaded(file), "built with the system's compiler")
    except _Unusable as error:
        why = str(error)
    except OSError as error:
        # Not its text: that names files which are called otherwise each time.
        why = f"the cache folder cannot be used: {error.strerror or 'no library loads from it'}"
    try:
        with tempfile.TemporaryDirectory() as aside:
            library = _loaded(_compiled(compiler, Path(aside) / name))
    except OSError as error:
        raise Unavailable(f"{why}; nor can a temporary one") from error
    return Built(library, f"built with the system's compiler for this process alone, since {why}")


def _compiler() -> list[str]:
    asked = os.environ.get("CC")
    for command in [asked] if asked else ["cc", "gcc", "clang"]:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise Unavailable(f"CC is no command: {command!r} ({error})") from error
        if words and (found := shutil.which(words[0])):
            return [found, *words[1:]]
    raise Unavailable(f"there is no C compiler ({asked or 'cc, gcc or clang'})")


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "ratchet"
    if not folder.is_absolute():
        raise _Unusable(f"the cache folder {folder} is no absolute path")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_others(folder)
    return folder


def _refuse_others(path: Path) -> None:
    """What others own or can write to is not loaded: it would run as this user."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _Unusable(f"others than this user own {path} or can write to it")


def _digest(compiler: list[str]) -> str:
    version = _run([*compiler, "--version"]).stdout
    parts = [_SOURCE.read_bytes(), version, shlex.join([*compiler, *_FLAGS]).encode(), _cpu()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
        )
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} did not end within {_PATIENCE} s") from error


def _cpu() -> bytes:
    """What the CPU can do; where that is not told, the machine's name stands for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return repr(platform.uname()).encode()
    kinds = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part", "isa")
    told = [line for line in lines if line.split("\t")[0].split(":")[0].strip() in kinds]
    return "\n".join([platform.machine(), *(told or [platform.node()])]).encode()


def _build(compiler: list[str], file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as aside:
        made = _compiled(compiler, Path(aside) / file.name)
        its_sum = made.with_suffix(_SUM)
        its_sum.write_text(_sum(made))
        for each in (made, its_sum):
            with each.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(each, file.with_suffix(each.suffix))


def _compiled(compiler: list[str], made: Path) -> Path:
    done = _run([*compiler, *_FLAGS, "-shared", "-fPIC", str(_SOURCE), "-o", str(made)])
    if done.returncode != 0 or not made.exists():
        said = done.stderr.decode(errors="replace").strip()
        why = (said.splitlines() or ["it said nothing"])[0]
        raise Unavailable(f"{compiler[0]} failed on {_SOURCE.name}: {why}")
    made.chmod(0o700)
    return made


def _is_whole(file: Path) -> bool:
    """Whether the library is there as it was built: one that was cut short would end the process
    that loads it."""
    try:
        return file.with_suffix(_SUM).read_text() == _sum(file)
    except (OSError, UnicodeDecodeError):
        return False


def _sum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _loaded(file: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(file))
    try:
        functions = ((loaded.ratchet_fold_forward, 7), (loaded.ratchet_fold_backward, 3))
    except AttributeError as error:
        raise Unavailable("what was compiled of fold.c has not its functions") from error
    pointer, index = ctypes.c_void_p, ctypes.c_int64
    shared: list[Any] = [ctypes.POINTER(_Tile), pointer, pointer, index, index]
    for function, more in functions:
        function.argtypes = [*shared, *[pointer] * more]
        function.restype = None
    return loaded
