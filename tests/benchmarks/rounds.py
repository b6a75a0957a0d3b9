"""One run of `loop start` in a process of its own: what it took, and what came of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import losses

from roles.policy import embedded
from store.database import Store

DEFAULT: dict[str, Any] = tomllib.loads(
    (Path(__file__).resolve().parents[2] / "loop" / "default.toml").read_text()
)
SHAPE = (
    f"the embedded model ({embedded.LAYERS} layers, hidden {embedded.HIDDEN}, vocabulary "
    f"{embedded.VOCABULARY})"
)
STAGES = ("propose", "generate", "judge", "filter", "train", "evaluate", "gate")
Sets = dict[str, Any]


@dataclass(frozen=True)
class Ran:
    """One run: what it took, and what came of it."""

    root: Path
    seconds: float
    cpu_seconds: float
    mib: float
    stages: dict[str, float]
    prompts: list[int]
    candidates: int
    examples: int
    accuracy: tuple[float, float, float]


def warmed_up(runs: Path) -> Path:
    """The model that the default's warm-up leaves."""
    # A run has a round at least. This one's is as short as it can be, and nothing of it is used.
    short = {"rounds": 1, "prompts": 16, "trainer.max_steps": 1, "checkpoints.keep_last": 9}
    path: Path = losses.run(runs / "warm-up", short).beginning("policy").path
    return path.resolve()


def command(folder: Path, sets: Mapping[str, Any]) -> list[str]:
    """What to tell `loop`, for a run into an empty folder with these settings."""
    shutil.rmtree(folder, ignore_errors=True)  # a run that went on would be timed in part
    asked = ["start", "--runs", str(folder)]
    for key, value in sets.items():
        asked += ["--set", f"{key}={json.dumps(value)}"]
    return asked


def environment(threads: int, home: Path) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONPATH": str(home),
    }


def run(folder: Path, sets: Sets, threads: int, home: Path) -> Ran:
    asked = [sys.executable, "-m", "loop", *command(folder, sets)]
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        child = subprocess.Popen(
            asked, cwd=home, env=environment(threads, home), stdout=said, stderr=said
        )
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            said.seek(0)
            sys.exit(f"{' '.join(asked)} ended with {child.returncode}:\n{said.read().decode()}")
    [database] = folder.glob("*/loop.db")
    mib = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return _outcome(database, seconds, used.ru_utime + used.ru_stime, mib)


def _outcome(database: Path, seconds: float, cpu_seconds: float, mib: float) -> Ran:
    store = Store(database)
    stages = dict.fromkeys(STAGES, 0.0)
    for round in store.rounds():
        for stage in STAGES:
            stages[stage] += round.seconds.get(stage, 0.0)

    def count(table: str) -> int:
        return int(store.query(f"SELECT count(*) AS n FROM {table}")[0]["n"])

    digests = store.query(
        "SELECT digest FROM asked JOIN prompt ON prompt.id = prompt_id "
        "ORDER BY purpose, digest, round_id"
    )
    [accuracy] = store.query(
        "SELECT value, low, high FROM evaluation JOIN round ON round.id = round_id "
        "WHERE split = 'test' AND metric = 'accuracy_sampled' ORDER BY number DESC LIMIT 1"
    )
    found = Ran(
        root=database.parent,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        mib=mib,
        stages=stages | {"outside the stages": seconds - sum(stages.values())},
        prompts=[int(row["digest"][:12], 16) for row in digests],
        candidates=count("candidate"),
        examples=count("trained_on"),
        accuracy=(accuracy["value"], accuracy["low"], accuracy["high"]),
    )
    store.close()
    return found
