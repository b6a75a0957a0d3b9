"""Which arithmetic a run computes in: said at its start, and kept with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from runs import HERE, loop, scripted_toml
from store.database import Store

ON_CPU = ("--set", "trainer.device=cpu")


def started(fold: str | None, *arguments: str | Path) -> Any:
    env = {key: value for key, value in os.environ.items() if key != "RATCHET_FOLD"}
    return loop("start", *arguments, env=env | ({"RATCHET_FOLD": fold} if fold else {}))


def test_a_run_says_what_folds_keeps_it_and_notes_that_it_changed(tmp_path: Path) -> None:
    file, runs = scripted_toml(tmp_path), tmp_path / "runs"
    done = started("torch", "--config", file, "--runs", runs, *ON_CPU, "--set", "rounds=1")
    said = "the logsumexp fold on cpu is 'torch': RATCHET_FOLD says so"
    assert done.stderr.count(said) == 1, done.stderr
    (root,) = runs.iterdir()
    store = Store(root / "loop.db")
    run = store.run()
    store.close()
    assert run is not None
    assert run.versions["arithmetic"].startswith(said)
    assert not run.changes
    done = started(None, root, "--set", "rounds=2")
    assert "the logsumexp fold on cpu is " in done.stderr
    assert said not in done.stderr
    store = Store(root / "loop.db")
    run = store.run()
    store.close()
    assert run is not None
    (changed,) = (each for each in run.changes if each["key"] == "versions.arithmetic")
    assert changed["from"].startswith(said)
    assert changed["to"] == run.versions["arithmetic"]


def test_a_fold_that_there_is_not_is_a_sentence_and_nothing_is_written(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    done = started("fast", "--config", scripted_toml(tmp_path), "--runs", runs, *ON_CPU)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "RATCHET_FOLD is one of torch, c, triton; found 'fast'" in done.stderr
    assert not runs.exists()


def test_a_run_that_computes_nothing_here_says_nothing_of_it_and_loads_no_torch(
    tmp_path: Path,
) -> None:
    file, runs = scripted_toml(tmp_path), tmp_path / "runs"
    code = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from runs import printed
print(printed(Path({str(file)!r}), Path({str(runs)!r}), ["rounds=1"]))
print(sorted({{"torch", "transformers", "trl", "datasets", "pandas"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "fold" not in done
    assert done.splitlines()[-1] == "[]", done
