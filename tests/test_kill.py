"""Killed anywhere, `loop start` goes on, and the finished store is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loop import verify as verification
from runs import HERE, everything, loop, scripted_toml, start
from store.database import Store

MOMENTS = [
    ("open_round", 2),
    ("set_stage", 9),
    ("add_seconds", 10),
    ("add_checkpoint", 1),
    ("add_prompts", 2),
    ("ask", 4),
    ("add_candidates", 20),
    ("add_judgements", 21),
    ("add_health", 3),
    ("add_selection", 1),
    ("add_selection", 2),
    ("add_checkpoint", 3),
    ("add_evaluations", 2),
    ("close_round", 1),
    ("close_round", 2),
    ("set_status", 1),
    ("set_status", 2),
]
"""A method of Store and which of its transactions: every one that a stage makes is here."""
PLACES = [(*moment, when) for moment in MOMENTS for when in ("inside", "after")]
PLACES.remove(("set_status", 2, "after"))  # the last of all: then the run is done
QUICK = [
    # A kill after one transaction is a kill before the next: every second one is left to `slow`.
    pytest.param(*place, marks=pytest.mark.slow) if place[2] == "after" and n % 4 == 3 else place
    for n, place in enumerate(PLACES)
]

SMALL = """
prompts = 48
batch_prompts = 16
rounds = 2
[warmup]
prompts = 256
[warmup.generator]
n = 2
[warmup.trainer]
batch_size = 16
epochs = 1
save_every_s = 0.5
[trainer]
batch_size = 4
epochs = 2
save_every_s = 0.5
learning_rate = 1e-3
[filter]
use = "best_worst"
[judge]
use = "verifier"
answer = "whole"
partial = true
[evaluate]
judge = "verifier"
gate_prompts = 20
test_prompts = 20
samples = 2
[gate]
undecided = "keep"
patience = 0
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    root, outcome = start(scripted_toml(folder), folder / "runs", ["rounds=2"])
    assert outcome.code == 0
    return root


def only_run(runs: Path) -> Path:
    [root] = [path for path in runs.iterdir() if path.is_dir()]
    return root


def same(one: Path, other: Path) -> None:
    """Field by field, times aside; the path of the base model is where the test lies."""
    left, right = everything(one), everything(other)
    for rows in (left, right):
        for row in rows["checkpoint"]:
            row["path"] = Path(row["path"]).name
        for row in rows["run"]:
            del row["config"], row["identity"]
    for table in left:
        assert left[table] == right[table], table


@pytest.mark.parametrize(("method", "nth", "when"), QUICK)
def test_a_run_killed_at_a_transaction_goes_on_to_the_same_store(
    tmp_path: Path, undisturbed: Path, method: str, nth: int, when: str
) -> None:
    file, runs = scripted_toml(tmp_path), tmp_path / "runs"
    driver = [sys.executable, HERE / "faults.py", file, runs, method, str(nth), when, "rounds=2"]
    killed = subprocess.run(driver, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    root, outcome = start(file, runs, ["rounds=2"])
    assert outcome.code == 0, outcome.reason
    assert root == only_run(runs)
    same(undisturbed, root)
    store = Store(root / "loop.db")
    verified = verification.verify(store)
    store.close()
    assert verified["ok"], verified["checks"]


def test_a_training_that_is_killed_goes_on_from_its_last_save(tmp_path: Path) -> None:
    file, runs = scripted_toml(tmp_path), tmp_path / "runs"
    sets = ["rounds=2", "trainer.kill_at=[2, 3]"]
    whole, _ = start(file, tmp_path / "whole", ["rounds=2"])
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); from pathlib import Path; "
    code += f"from runs import start; start(Path({str(file)!r}), Path({str(runs)!r}), {sets!r})"
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    part = only_run(runs) / "checkpoints" / "round-0002-policy.part"
    assert '"step": 3' in (part / "save.json").read_text()
    root, outcome = start(file, runs, sets)
    assert outcome.code == 0
    same(whole, root)


def start_command(config: Path, runs: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "loop", "start", "--config", str(config), "--runs", str(runs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def status(runs: Path) -> dict[str, Any]:
    """How the only run stands; empty before it began."""
    found = [json.loads(loop("status", root, "--json").stdout) for root in runs.glob("*")]
    return found[0] if found else {}


@pytest.mark.parametrize("moments", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_real_run_killed_in_training_and_at_random_moments_ends_the_same(
    tmp_path: Path, moments: int
) -> None:
    """The embedded model, the real trainers, the real command; the moments are drawn anew."""
    config, whole = tmp_path / "loop.toml", tmp_path / "whole"
    config.write_text(SMALL)
    running = start_command(config, whole)
    assert running.stdout is not None
    running.stdout.readline()  # it says which run it is: the imports are over
    began = time.monotonic()
    said, _ = running.communicate(timeout=900)
    lasted = time.monotonic() - began
    assert running.returncode == 0, said

    runs = tmp_path / "runs-0"
    running = start_command(config, runs)
    while not any(runs.glob("*/checkpoints/round-0000-policy.part/saves/*/*")):
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()

    chance, stages, ended = random.Random(), list[str](), 0
    while len(stages) < moments:
        running = start_command(config, runs)
        assert running.stdout is not None
        running.stdout.readline()
        try:
            # Anywhere in what an attempt can do.
            said, _ = running.communicate(timeout=chance.uniform(0, 1.1 * lasted))
            assert running.returncode == 0, said
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.communicate()
            found = status(runs)
            stages.append(f"{found.get('round')} {found.get('stage')}")
        if status(runs).get("status") == "done":
            same(only_run(whole), only_run(runs))
            ended += 1
            runs = tmp_path / f"runs-{ended}"  # a folder of its own: a start would begin another
    last = start_command(config, runs)
    said, _ = last.communicate(timeout=900)
    assert last.returncode == 0, said
    print(f"a run of {lasted:.0f} s, killed in (round, stage): {', '.join(stages)}")
    same(only_run(whole), only_run(runs))
    verified = loop("verify", only_run(runs))
    assert verified.returncode == 0, verified.stdout + verified.stderr
