"""What a process of ours needs to find the packages that this one runs."""

from __future__ import annotations

import os
from pathlib import Path


def python_path() -> dict[str, str]:
    """The environment variable by which it finds them, wherever it begins."""
    home = str(Path(__file__).resolve().parent.parent)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
