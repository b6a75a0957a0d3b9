"""What a training leaves on disk to go on from.

A save is a folder, and whole once its marker is there; the marker is written last and taken away
first, so a kill at any moment leaves either a whole save or none.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

MARKER = "complete"


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until the folder and all files in it are on the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def write_json(path: Path, content: Any) -> None:
    """Write the whole file or nothing."""
    aside = path.with_name(path.name + ".aside")
    aside.write_text(json.dumps(content))
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def complete(save: Path) -> None:
    """Mark the save as whole, then remove the others beside it."""
    sync_tree(save)
    write_json(save / MARKER, {})
    for other in _saves(save.parent):
        if other != save:
            discard(other)


def newest(folder: Path) -> Path | None:
    """The last whole save; broken ones are removed."""
    whole = []
    for save in _saves(folder):
        if (save / MARKER).exists():
            whole.append(save)
        else:
            discard(save)
    return whole[-1] if whole else None


def discard(folder: Path) -> None:
    """Remove a save, or a folder of saves."""
    for marker in folder.rglob(MARKER):
        marker.unlink()
    if folder.exists():
        shutil.rmtree(folder)


def _saves(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
