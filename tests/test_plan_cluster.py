"""What a million prompts would take, by the rates of a run that was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from loop import config as configuration
from loop import run
from runs import loop, scripted_toml, start
from store.database import Store


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    made, outcome = start(scripted_toml(folder), folder / "runs", ["rounds=2"])
    assert outcome.code == 0
    return made


def planned(root: Path, gpus: int) -> dict[str, Any]:
    done = loop("plan", "--cluster", str(gpus), "--rates", root, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_it_follows_from_what_the_run_stored(root: Path) -> None:
    store = Store(root / "loop.db")
    (made,) = store.query(
        "SELECT count(*) AS answers, sum(tokens) AS tokens FROM candidate JOIN asked "
        "ON asked.id = asked_id WHERE purpose = 'train'"
    )
    took = {
        stage: sum(each.seconds[stage] for each in store.rounds() if each.number > 0)
        for stage in ("generate", "judge")
    }
    store.close()
    found = planned(root, 1)
    assert found["tokens_an_answer"] == made["tokens"] / made["answers"]
    # As many times the answers, at the same rate.
    times = 8_000_000 / made["answers"]
    assert found["generate"]["hours"] == pytest.approx(took["generate"] * times / 3600)
    assert found["judge"]["hours"] == pytest.approx(took["judge"] * times / 3600)
    on_four = planned(root, 4)
    assert on_four["generate"]["hours"] == pytest.approx(found["generate"]["hours"] / 4)
    assert on_four["answers_a_second"] == pytest.approx(4 * found["answers_a_second"])
    assert on_four["bytes"] == found["bytes"]


def test_it_is_said_in_words(root: Path) -> None:
    said = loop("plan", "--cluster", "8", "--rates", root).stdout
    assert said.startswith("1,000,000 prompts x 8 answers on 8 GPUs, by the rates of ")
    assert "generate" in said
    assert "tokens/s a process" in said


def test_a_run_whose_workers_were_changed_has_no_rate_of_each(root: Path, tmp_path: Path) -> None:
    other = tmp_path / root.name
    shutil.copytree(root, other)
    run.update(other, configuration.change(run.stored_config(other), ["cluster.workers=2"]))
    done = loop("plan", "--cluster", "8", "--rates", other)
    assert done.returncode == 2
    assert done.stderr.startswith("loop: cluster.workers was changed while ")


def test_without_a_run_that_did_both_there_are_no_rates(tmp_path: Path) -> None:
    done = loop("plan", "--cluster", "8", cwd=tmp_path)
    assert done.returncode == 2
    assert "no run under runs/ yet" in done.stderr
