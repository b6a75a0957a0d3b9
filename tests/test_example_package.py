"""A judge of somebody else's: a package that is built, installed and found by its entry point."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runs import loop, scripted_toml
from store.database import Store

PACKAGE = Path(__file__).parent / "example_package"
JUDGE = "last_number"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the package installed."""
    folder = tmp_path_factory.mktemp("example")
    # A build leaves its folders beside what it builds.
    shutil.copytree(PACKAGE, folder / "source")
    into = folder / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(into)]
    done = subprocess.run([*pip, str(folder / "source")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {"PYTHONPATH": str(into)}


def listed(**more: Any) -> dict[str, dict[str, Any]]:
    done = loop("judges", "list", "--json", **more)
    assert done.returncode == 0, done.stderr
    return {each["name"]: each for each in json.loads(done.stdout)}


def test_it_is_listed_once_it_is_installed(installed: dict[str, str], tmp_path: Path) -> None:
    assert JUDGE not in listed(cwd=tmp_path)
    found = listed(cwd=tmp_path, env=installed)[JUDGE]
    assert found["about"] == "Right is an answer whose last number is the reference."
    assert [(each["option"], each["default"]) for each in found["options"]] == [("wrong", 0.0)]


def test_it_is_planned_with_by_its_name(installed: dict[str, str], tmp_path: Path) -> None:
    plan = ("plan", "--config", scripted_toml(tmp_path), "--set", f"judge.use={JUDGE}", "--set")
    assert loop(*plan, "judge.wrong=-1.0", cwd=tmp_path, env=installed).returncode == 0
    done = loop(*plan, "judge.rong=-1.0", cwd=tmp_path, env=installed)
    assert done.returncode == 2
    assert "did you mean 'wrong'?" in done.stderr


def test_a_run_is_judged_by_it(installed: dict[str, str], tmp_path: Path) -> None:
    file = scripted_toml(tmp_path)
    sets = ("--set", f"judge.use={JUDGE}", "--set", "rounds=1")
    done = loop("start", "--config", file, *sets, cwd=tmp_path, env=installed)
    assert done.returncode == 0, done.stderr
    (root,) = (tmp_path / "runs").iterdir()
    store = Store(root / "loop.db")
    rows = store.query(
        "SELECT score, text, reference FROM judgement JOIN candidate ON candidate.id = candidate_id"
        " JOIN asked ON asked.id = asked_id JOIN prompt ON prompt.id = prompt_id"
        f" WHERE judge = '{JUDGE}'"
    )
    store.close()
    assert {row["score"] for row in rows} == {0.0, 1.0}
    assert all(row["score"] == (row["text"] == row["reference"]) for row in rows)


def test_the_judge_has_ten_lines() -> None:
    lines = (PACKAGE / "ratchet_judge_example.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 10
