"""Whole runs of the embedded model on more than one process: the rows of a run in one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from runs import loop
from test_isolation import only, rows

pytestmark = pytest.mark.slow
SETS = (
    *("rounds=1", "prompts=64", "warmup.prompts=1200", "seed=108", "batch_prompts=32"),
    *("evaluate.gate_prompts=24", "evaluate.test_prompts=24", "gate.patience=0"),
)
WAYS = {
    "processes of their own": ("isolation=process",),
    "Ray": ("cluster.workers=2",),
}
ENV = {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def typed(runs: Path, *more: str) -> list[str]:
    sets = [part for each in (*SETS, *more) for part in ("--set", each)]
    return ["start", "--runs", str(runs), *sets]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    runs = tmp_path_factory.mktemp("alone")
    done = loop(*typed(runs), env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    return rows(only(runs))


@pytest.mark.parametrize("way", WAYS)
def test_elsewhere_a_model_writes_judges_and_learns_the_same(
    way: str, alone: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    if way == "Ray":
        pytest.importorskip("ray")
    done = loop(*typed(tmp_path, *WAYS[way]), env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(only(tmp_path))
    assert len(found["trained_on"]) > 0
    for table in alone:
        assert found[table] == alone[table], table


def test_a_run_of_which_a_training_process_is_killed_finishes(
    alone: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "loop", *typed(tmp_path, "trainer.processes=2")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ENV,
    )
    killed = None
    while killed is None and run.poll() is None:
        for each in psutil.Process(run.pid).children(recursive=True):
            try:
                if "roles.trainers.team" in each.cmdline():
                    each.kill()
                    killed = each.pid
            except psutil.Error:
                continue
        time.sleep(0.02)
    said, _ = run.communicate(timeout=300)
    assert killed is not None, said
    assert run.returncode == 0, said
    assert "the training goes on from its last save" in " ".join(said.split())
    found, root = rows(only(tmp_path)), only(tmp_path)
    for table in ("asked", "example", "trained_on"):
        assert len(found[table]) == len(alone[table]), table
    steps = [(each["checkpoint_id"], each["step"]) for each in found["training_step"]]
    assert len(set(steps)) == len(steps) == len(alone["training_step"])
    verified = loop("verify", root)
    assert verified.returncode == 0, verified.stdout + verified.stderr
