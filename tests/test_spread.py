"""Answers and judgements by workers of Ray's, on this machine: the rows of a run without."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest

from loop import config as configuration
from loop import run
from loop import verify as verification
from loop.spread import Worker
from runs import loop, printed, scripted_toml, start
from store.database import Store
from test_isolation import fragile, only, rows, told

pytest.importorskip("ray")
SPREAD = ["rounds=2", "batch_prompts=3", "isolation=inline"]
CLUSTER = ["cluster.workers=2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("alone")
    root, outcome = start(scripted_toml(folder), folder / "runs", SPREAD)
    assert outcome.code == 0
    return rows(root)


def spread(folder: Path, *sets: str) -> tuple[Path, str]:
    """A run with two workers, and what was said on the way."""
    said = printed(scripted_toml(folder), folder / "runs", [*SPREAD, *CLUSTER, *sets])
    return only(folder / "runs"), said


def left_over() -> list[str]:
    """Processes of Ray's that this one or a child of it has started and that go on."""
    return [
        each.name()
        for each in psutil.Process().children(recursive=True)
        if each.is_running() and ("ray" in each.name() or "gcs_server" in each.name())
    ]


def test_two_workers_give_the_rows_of_none(
    tmp_path: Path, alone: dict[str, list[dict[str, Any]]]
) -> None:
    root, _ = spread(tmp_path)
    found = rows(root)
    assert len(found["asked"]) > 10
    for table in alone:
        assert found[table] == alone[table], table
    assert left_over() == []


@pytest.mark.parametrize("role", ["engine", "judge"])
def test_a_worker_that_dies_costs_its_batches_and_no_run(
    tmp_path: Path, alone: dict[str, list[dict[str, Any]]], role: str
) -> None:
    root, said = spread(tmp_path, *fragile(tmp_path, role, "killed"))
    assert "a worker of stage 'evaluate' has ended" in said
    assert "its batches are done again" in said
    found = rows(root)
    for table in ("prompt", "asked", "candidate", "example", "dropped", "trained_on", "decision"):
        assert found[table] == alone[table], table
    assert len(found["judgement"]) == len(alone["judgement"])
    store = Store(root / "loop.db")
    verified = verification.verify(store)
    again = store.query(
        'SELECT asked_id, "index", count(*) AS n FROM candidate GROUP BY 1, 2 HAVING count(*) > 1'
    )
    store.close()
    assert verified["ok"], verified["checks"]
    assert again == []


@pytest.mark.slow
def test_one_that_dies_each_time_stops_the_run_in_a_sentence_and_it_goes_on(
    tmp_path: Path, alone: dict[str, list[dict[str, Any]]]
) -> None:
    file = scripted_toml(tmp_path)
    sets = [*SPREAD, *CLUSTER, *fragile(tmp_path, "engine", "killed", 9), "cluster.retries=1"]
    ended = loop("start", "--config", file, "--runs", tmp_path / "runs", *told(sets))
    assert ended.returncode == 4, ended.stderr
    assert "a worker of stage 'evaluate' has ended" in ended.stderr
    for each in (tmp_path / "left").iterdir():
        each.unlink()
    root = only(tmp_path / "runs")
    ended = loop("start", root)
    assert ended.returncode == 0, ended.stderr
    assert rows(root)["candidate"] == alone["candidate"]


def test_workers_on_several_machines_write_no_file_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # a worker takes it
    file = scripted_toml(tmp_path)
    for sets, apart in (([], False), (["cluster.address=auto"], True)):
        tables = configuration.read(file, sets=sets).model_dump(mode="json")
        both = [Worker(tables, str(tmp_path / "runs" / "run")) for _ in range(2)]
        paths = {each._seat.config.cache.path for each in both}
        assert paths == {None} if not apart else len(paths) == 2


def test_what_lacks_memory_there_is_done_again_with_less_at_once(
    tmp_path: Path, alone: dict[str, list[dict[str, Any]]]
) -> None:
    sets = [*fragile(tmp_path, "engine", "")[:1], "engine.fits=2"]
    root, said = spread(tmp_path, *sets)
    assert "a worker of stage 'evaluate' lacked memory (MemoryError: 8 at once)" in said
    assert "done again with models.policy.engine.batch_size=4" in said
    assert "done again with models.policy.engine.batch_size=2" in said
    found = rows(root)
    for table in ("asked", "candidate", "judgement", "decision"):
        assert found[table] == alone[table], table
    assert run.stored_config(root).models["policy"].engine.options["batch_size"] == 2


def test_what_a_role_raises_there_ends_the_run_here_with_its_words(tmp_path: Path) -> None:
    file = scripted_toml(tmp_path)
    sets = [*SPREAD, *CLUSTER, *fragile(tmp_path, "engine", "own")]
    ended = loop("start", "--config", file, "--runs", tmp_path / "runs", *told(sets))
    assert ended.returncode == 4
    assert "Own: known there alone" in ended.stderr
    assert "In the process of a worker" in ended.stderr


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("cluster.address=127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: "),
        ("cluster.gpus=1.0", "0 GPUs, and 2 workers with 1 each need 2"),
    ],
)
def test_a_cluster_that_is_not_there_or_too_small_is_refused(
    tmp_path: Path, setting: str, said: str
) -> None:
    file = scripted_toml(tmp_path)
    sets = told([*SPREAD, *CLUSTER, setting])
    ended = loop("start", "--config", file, "--runs", tmp_path / "runs", *sets)
    assert ended.returncode == 4
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_budget_ends_a_run_where_it_ends_one_without(tmp_path: Path) -> None:
    ends = []
    for name, sets in (("alone", []), ("spread", CLUSTER)):
        file = scripted_toml(tmp_path)
        given = told([*SPREAD, *sets, "budget.generated_tokens=400"])
        ended = loop("start", "--config", file, "--runs", tmp_path / name, *given)
        assert ended.returncode == 3, ended.stderr
        ends.append(rows(only(tmp_path / name))["candidate"])
    assert ends[0] == ends[1]
    assert ends[0]
