"""Stages in processes of their own: the same rows, and what crashes there ends no run."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from loop import casting, outcome
from loop import config as configuration
from loop import verify as verification
from loop.apart import isolates
from runs import HERE, everything, loop, printed, scripted_toml, start
from store.database import Store

FRAGILE = HERE / "fragile.py"
APART = "isolation=process"
FIRST = {"engine": "evaluate", "judge": "evaluate", "trainer": "train"}
"""Role -> the stage in which it is first at work."""
CLASSES = {"engine": "Engine", "judge": "Exact", "trainer": "Learner"}


def rows(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row but what says where and how it was made."""
    found = everything(root)
    for row in found["checkpoint"]:
        row["path"] = Path(row["path"]).name
    for row in found["run"]:
        del row["config"], row["identity"], row["changes"], row["versions"]
    for table in ("judgement", "verdict", "candidate", "evaluation", "health", "decision"):
        for row in found[table]:
            for key in ("judge", "judge_version", "by", "label"):
                row.pop(key, None)
    return found


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("inline")
    root, outcome = start(scripted_toml(folder), folder / "runs", ["rounds=2"])
    assert outcome.code == 0
    return rows(root)


def only(runs: Path) -> Path:
    [root] = [each for each in runs.iterdir() if each.is_dir()]
    return root


def apart(folder: Path, *sets: str) -> tuple[Path, str]:
    """A run whose stages have processes of their own, and what was said on the way."""
    said = printed(scripted_toml(folder), folder / "runs", ["rounds=2", APART, *sets])
    return only(folder / "runs"), said


def fragile(folder: Path, role: str, how: str, times: int = 1) -> list[str]:
    """Settings by which a role misbehaves so often."""
    left = folder / "left"
    left.mkdir()
    for n in range(times):
        (left / str(n)).touch()
    return [
        setting
        for place in ([role, "evaluate.judge"] if role == "judge" else [role])
        for setting in (
            f"{place}.use={FRAGILE}:{CLASSES[role]}",
            f"{place}.how={how}",
            f"{place}.left={left}",
        )
    ]


def children() -> list[psutil.Process]:
    """Processes of this one that perform tasks."""
    own = psutil.Process().children(recursive=True)
    return [each for each in own if each.is_running() and "loop.child" in each.cmdline()]


@pytest.mark.parametrize("there", [False, True])
def test_by_itself_a_stage_is_apart_where_it_computes_on_a_gpu(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = configuration.read()
    roles = casting.load_roles(made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert made.isolation == "auto"
    assert isolates(made, lambda role: roles[id(role)]) is there
    both = ["engine.device=cpu", "trainer.device=cpu"]
    on_cpu = configuration.read(sets=both)
    roles |= casting.load_roles(on_cpu)
    assert not isolates(on_cpu, lambda role: roles[id(role)])


def test_a_run_in_processes_of_their_own_has_the_rows_of_one_without(
    tmp_path: Path, inline: dict[str, Any]
) -> None:
    root, _ = apart(tmp_path)
    found = rows(root)
    for table in inline:
        assert found[table] == inline[table], table
    logs = {file.stem for file in (root / "logs").glob("*.log")}
    assert {"generate", "judge", "train", "evaluate"} <= logs
    assert children() == []


@pytest.mark.parametrize("role", FIRST)
@pytest.mark.parametrize("how", ["killed", "aborted"])
def test_a_process_that_crashes_costs_its_batch_and_no_run(
    tmp_path: Path, inline: dict[str, Any], role: str, how: str
) -> None:
    root, said = apart(tmp_path, *fragile(tmp_path, role, how))
    assert f"the process of stage {FIRST[role]!r} was killed by SIG" in said
    assert "is done again" in said
    if how == "aborted":
        assert "ends with: something in C went wrong" in said
    found = rows(root)
    for table in ("prompt", "asked", "candidate", "example", "dropped", "trained_on", "decision"):
        assert found[table] == inline[table], table
    assert len(found["judgement"]) == len(inline["judgement"])
    store = Store(root / "loop.db")
    verified = verification.verify(store)
    store.close()
    assert verified["ok"], verified["checks"]


@pytest.mark.parametrize(
    ("role", "option", "at_once", "changed"),
    [
        ("engine", "batch_size", 8, "models.policy.engine.batch_size"),
        ("trainer", "batch_size", 12, "models.policy.trainer.micro_batch_size"),
    ],
)
def test_what_lacks_memory_is_done_again_with_less_at_once_and_the_run_keeps_that(
    tmp_path: Path, role: str, option: str, at_once: int, changed: str
) -> None:
    sets = [f"{role}.use={FRAGILE}:{CLASSES[role]}", f"{role}.{option}={at_once}"]
    root, said = apart(tmp_path, *sets, f"{role}.fits=3")
    assert f"the process of stage {FIRST[role]!r} lacked memory (MemoryError: " in said
    store = Store(root / "loop.db")
    run = store.run()
    assert run is not None
    told = [each for each in run.changes if each["key"] == changed]
    wanted = [(None, 6), (6, 3)] if role == "trainer" else [(8, 4), (4, 2)]
    assert [(each["from"], each["to"]) for each in told] == wanted
    table = run.config["models"]["policy"][role]
    assert table[changed.rpartition(".")[2]] == told[-1]["to"]
    store.close()


def test_what_another_judge_lacks_memory_for_changes_nothing_else_of_the_run(
    tmp_path: Path,
) -> None:
    root, _ = apart(tmp_path, f"engine={FRAGILE}:Engine")
    before = config_of(root)
    assert json.loads((root / "config.json").read_text()) == before
    sets = fragile(tmp_path, "judge", "memory")[1:3]
    judge = ["--judge", f"{FRAGILE}:Exact", "--model", "round"]
    ended = loop("rejudge", root, "1", *judge, *told(sets))
    assert ended.returncode == 0, ended.stderr
    assert "lacked memory" in ended.stderr
    before["models"]["policy"]["engine"]["batch_size"] = 4
    assert config_of(root) == before
    assert json.loads((root / "config.json").read_text()) == before


def config_of(root: Path) -> dict[str, Any]:
    store = Store(root / "loop.db")
    run = store.run()
    store.close()
    assert run is not None
    return run.config


def test_what_lacks_memory_for_one_alone_stops_the_run_in_a_sentence(tmp_path: Path) -> None:
    file = scripted_toml(tmp_path)
    sets = [f"engine={FRAGILE}:Engine", "engine.batch_size=2", "engine.fits=0", APART]
    ended = loop("start", "--config", file, *told(sets), "--runs", tmp_path / "runs")
    assert ended.returncode == 4, ended.stderr
    assert "lacked memory (MemoryError: 1 at once)" in ended.stderr
    assert "Traceback" not in ended.stderr


def told(sets: list[str]) -> list[str]:
    return [part for each in sets for part in ("--set", each)]


def test_a_silent_process_is_ended_after_its_timeout(tmp_path: Path) -> None:
    sets = fragile(tmp_path, "judge", "silent")
    _, said = apart(tmp_path, *sets, "stage.evaluate.timeout_s=2.0")
    assert "the process of stage 'evaluate' said nothing for its timeout_s, 2 s" in said


def test_a_process_that_crashes_again_and_again_fails_its_stage_and_the_run_goes_on_later(
    tmp_path: Path, inline: dict[str, Any]
) -> None:
    sets = fragile(tmp_path, "judge", "killed", times=2)
    file, runs = scripted_toml(tmp_path), tmp_path / "runs"
    asked = [
        "start",
        "--config",
        file,
        *told(["rounds=2", APART, "stage.evaluate.retries=1", *sets]),
    ]
    ended = loop(*asked, "--runs", runs)
    assert ended.returncode == 4, ended.stderr
    assert "the process of stage 'evaluate' was killed by SIGKILL" in ended.stderr
    again = loop("start", only(runs))
    assert again.returncode == 0, again.stderr
    assert rows(only(runs))["candidate"] == inline["candidate"]


@pytest.mark.parametrize(
    ("how", "words"), [("strange", "Strange: one and other"), ("own", "Own: known there alone")]
)
def test_a_bug_there_is_shown_with_where_it_was(tmp_path: Path, how: str, words: str) -> None:
    file = scripted_toml(tmp_path)
    sets = told([*fragile(tmp_path, "judge", how), APART])
    ended = loop("start", "--config", file, *sets, "--runs", tmp_path / "runs")
    assert ended.returncode == 4
    assert words in ended.stderr
    assert "fragile.py" in ended.stderr, "the trace of the other process"


def test_what_goes_between_processes_comes_back_as_it_was() -> None:
    """A lack of memory needs no words, and an error that cannot be packed is told by its own."""
    assert outcome.told(MemoryError()) == ("memory", "MemoryError:")
    kind, packed, words, _ = outcome.told(ValueError("a word", 3))
    assert (kind, pickle.loads(packed).args, words) == (
        "raised",
        ("a word", 3),
        "ValueError: ('a word', 3)",
    )
    assert outcome.told(ValueError(lambda: 0))[1] == b""


def test_an_interrupt_ends_the_run_after_the_batch_and_its_process_too(tmp_path: Path) -> None:
    file, runs = scripted_toml(tmp_path), tmp_path / "runs"
    sets = told([APART, "trainer.seconds_a_step=0.5"])
    command = [sys.executable, "-m", "loop", "start", "--config", file, *sets, "--runs", runs]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = wait_for(lambda: next(runs.glob("*/logs/train.log"), None))
    time.sleep(2)
    worker = worker_of(driver.pid)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 130, said
    assert log.exists()
    assert not worker.is_running()
    again = loop("start", only(runs))
    assert again.returncode == 0, again.stderr


def test_a_process_whose_driver_is_killed_ends_as_well(tmp_path: Path) -> None:
    file, runs = scripted_toml(tmp_path), tmp_path / "runs"
    sets = told([APART, "trainer.seconds_a_step=0.5"])
    command = [sys.executable, "-m", "loop", "start", "--config", file, *sets, "--runs", runs]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: next(runs.glob("*/logs/train.log"), None))
    worker = worker_of(driver.pid)
    driver.kill()
    driver.wait()
    worker.wait(timeout=20)
    again = loop("start", only(runs))
    assert again.returncode == 0, again.stderr


def test_devices_are_what_the_process_sees(tmp_path: Path) -> None:
    judge = f"{FRAGILE}:Sees"
    devices = [f'stage.{stage}.devices=["1", "0"]' for stage in ("judge", "evaluate")]
    root, _ = apart(tmp_path, f"judge={judge}", *devices)
    store = Store(root / "loop.db")
    raws = store.query("SELECT DISTINCT raw FROM verdict WHERE judge = :judge", judge=judge)
    assert [row["raw"] for row in raws] == ["1,0"]
    store.close()


def worker_of(driver: int) -> psutil.Process:
    [found] = wait_for(lambda: psutil.Process(driver).children())
    return found


def wait_for(found: Any, seconds: float = 60.0) -> Any:
    """What it gives once it gives something."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value
