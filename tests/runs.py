"""Run the loop in tests: in this process, or as a user does in one that can be killed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from loop import config, run
from loop.progress import Progress
from loop.settings import Config
from scripted import write_model
from store.copying import TABLES
from store.database import Store

HERE = Path(__file__).parent
SCRIPTED = HERE / "scripted.py"
TIMES = {"started", "ended", "seconds", "driver", "driver_seen", "uuid", "name", "applied"}
"""Columns in which two equal runs may differ."""


def scripted_toml(folder: Path, more: str = "", skill: float = 0.3) -> Path:
    """A configuration file of a scripted run of some seconds."""
    write_model(folder / "base", skill)
    file = folder / "loop.toml"
    file.write_text(
        f"""
prompts = 24
batch_prompts = 8
engine = "{SCRIPTED}:Engine"
proposer = "{SCRIPTED}:Sums"
judge = "{SCRIPTED}:Exact"
[model]
path = "base"
[trainer]
use = "{SCRIPTED}:Learner"
[filter]
use = "right_wrong"
[evaluate]
judge = "{SCRIPTED}:Exact"
gate_prompts = 60
test_prompts = 40
[checkpoints]
keep_last = 9
"""
        + more
    )
    return file


def start(file: Path, runs: Path, sets: Sequence[str] = ()) -> tuple[Path, run.Outcome]:
    """What `loop start --config` does, without a process of its own."""
    settings = config.read(file, sets=sets)
    roles = run.load_roles(settings)
    root = run.unfinished(runs, settings) or run.begin(settings, runs, "test", roles)
    return root, go_on(root, settings, roles)


def go_on(root: Path, settings: Config, roles: dict[int, Any]) -> run.Outcome:
    progress = Progress(Console(file=io.StringIO()))
    return run.drive(root, progress, roles, settings)


def printed(file: Path, runs: Path, sets: Sequence[str]) -> str:
    """What a new run to its end says on the way."""
    settings = config.read(file, sets=sets)
    roles = run.load_roles(settings)
    out = io.StringIO()
    progress = Progress(Console(file=out, width=10_000))
    outcome = run.drive(run.begin(settings, runs, "test", roles), progress, roles, settings)
    assert outcome.code == 0, outcome.reason
    return out.getvalue()


def loop(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """The command as a user types it."""
    return subprocess.run(
        [sys.executable, "-m", "loop", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"} | more.pop("env", {}),
        **more,
    )


def everything(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row of a run, times aside."""
    store = Store(root / "loop.db")
    tables = [*(table.name for table in TABLES), "schema_version"]
    found = {
        table: [
            {key: value for key, value in row.items() if key not in TIMES}
            for row in store.query(f'SELECT * FROM "{table}" ORDER BY 1, 2')
            if (table, row.get("metric")) != ("health", "seconds")
        ]
        for table in sorted(tables)
    }
    store.close()
    return found
