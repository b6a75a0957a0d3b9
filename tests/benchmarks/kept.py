"""The file that a benchmark leaves: its tables, every pass, and where they were measured."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from table import Table

PACKAGES = ("torch", "transformers", "trl", "liger-kernel")


@dataclass(frozen=True)
class Kept:
    where: str
    """The machine and its packages, in words."""
    tables: list[Table]


def keep(path: Path, tables: Sequence[Any], **more: Any) -> None:
    """Write dataclasses, tables or what holds some; `more` lies beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {"where": where(), "tables": [asdict(each) for each in tables], **more}
    path.write_text(json.dumps(written, indent=1))


def read(path: Path) -> Kept:
    """What `keep` wrote of tables."""
    from pydantic import TypeAdapter

    return TypeAdapter(Kept).validate_python(json.loads(path.read_text()))


def where() -> str:
    there = []
    for name in PACKAGES:
        try:
            there.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            there.append(f"no {name}")
    return f"{os.cpu_count()} cores of {_processor()}, {', '.join(there)}"


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        for line in cpus.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
