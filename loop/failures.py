"""Why a run stopped, in a sentence, where the cause is somebody's to mend and not a bug.

A full disk or a file that is gone reaches us as whatever exception a library makes of it, so the
cause is looked for along the whole chain, and where that says nothing, on the disk.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from loop import names
from loop.settings import Config
from store import checkpoints
from store.database import Store
from store.errors import UserError

OF_A_DISK = {
    errno.EDQUOT: "a disk quota is used up",
    errno.EFBIG: "a file would be larger than is allowed (`ulimit -f`)",
    errno.EROFS: "a disk cannot be written",
    errno.EIO: "a disk failed",
}
"""Never a bug, whichever file it was. Nor is a full disk."""
OF_A_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR}
"""Somebody's to mend if the file is not ours."""
RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers say what is an OSError elsewhere."""
FULL_BYTES = 1 << 20
"""A library that ran out of disk leaves less than this, even where it says nothing of it."""


def cause(error: BaseException, store: Store, config: Config) -> str | None:
    """What stopped the run, in a sentence. None: a bug, of ours or of a plug-in."""
    if isinstance(error, UserError):
        return str(error)
    chain, said = list(_chain(error)), f" ({type(error).__name__}: {error})"
    if any(_number(each) == errno.ENOSPC for each in chain) or not _has_room(store.root):
        full = f"the disk of {store.root}" if not _has_room(store.root) else "a disk"
        return f"{full} is full; free some of it{said}"
    for each in chain:
        if (told := _told(each)) is not None:
            return told
    if any(isinstance(each, OSError) for each in chain) and (gone := _gone(store, config)):
        return f"{gone} is missing or not as it was written; put it back{said}"
    return None


def _has_room(root: Path) -> bool:
    return not root.exists() or shutil.disk_usage(root).free >= FULL_BYTES


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _number(error: BaseException) -> int | None:
    """What the operating system called it."""
    if isinstance(error, OSError):
        return error.errno
    found = RUST.search(str(error))
    return int(found[1]) if found else None


def _told(error: BaseException) -> str | None:
    number, file = _number(error), getattr(error, "filename", None)
    if number in OF_A_DISK:
        return f"{OF_A_DISK[number]} ({error})"
    if number in OF_A_FILE and isinstance(file, str) and file:
        return None if names.is_ours(file) else f"a file cannot be used: {error}"
    return None


def _gone(store: Store, config: Config) -> Path | None:
    """The checkpoint that a model goes on from, if it is not there any more."""
    try:
        found = [store.incumbent(model) for model in config.models if store.checkpoints(model)]
    except (SQLAlchemyError, UserError):
        return None
    return next((each.path for each in found if not checkpoints.intact(each)), None)
