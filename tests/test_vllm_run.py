"""Whole runs with the real vLLM, in process and as a server, beside one with our own engine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from loop import run
from runs import loop
from store.database import Store
from store.errors import UserError

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
SMALL = (
    *("rounds=2", "prompts=320", "seed=108", "gate.patience=0", "gate.undecided=keep"),
    *("evaluate.gate_prompts=150", "evaluate.test_prompts=300"),
)
VLLM = (
    *("engine.use=vllm", "engine.dtype=float32", "engine.cache_gib=0.25"),
    "engine.extra={enforce_eager=true}",
)
ENGINES = {"transformers": (), "in process": VLLM, "served": (*VLLM, "engine.serve=true")}
ASKED = (
    "SELECT number, track, purpose, prompt.digest AS digest FROM asked "
    "JOIN round ON round.id = round_id JOIN prompt ON prompt.id = prompt_id ORDER BY asked.id"
)
ANSWERED = (
    'SELECT number, track, purpose, prompt.digest AS digest, candidate."index" AS place, '
    "candidate.seed AS seed, candidate.text AS text, candidate.token_ids AS ids "
    "FROM candidate JOIN asked ON asked.id = asked_id JOIN round ON round.id = round_id "
    "JOIN prompt ON prompt.id = prompt_id WHERE candidate.checkpoint_id IS NOT NULL "
    "ORDER BY asked.id, place"
)

SAME = ("number", "track", "purpose", "digest", "place", "seed")
"""Of a candidate, what it is to have whoever drew it."""


def typed(engine: str, runs: Path) -> list[str]:
    sets = [*SMALL, *ENGINES[engine]]
    return ["start", "--runs", str(runs), *(part for each in sets for part in ("--set", each))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with each engine, which differ in nothing else."""
    folder, roots = tmp_path_factory.mktemp("engines"), {}
    for name in ENGINES:
        done = loop(*typed(name, folder / name))
        assert done.returncode == 0, done.stdout + done.stderr
        [roots[name]] = (folder / name).iterdir()
    return roots


def asked(root: Path, sql: str) -> list[dict[str, Any]]:
    store = Store(root / run.DATABASE)
    found = store.query(sql)
    store.close()
    return found


def gains(root: Path) -> np.ndarray:
    """Of each prompt of the test split: how much better its answers became."""
    store = Store(root / run.DATABASE)
    first, last = store.checkpoints("policy")[1], store.incumbent("policy")
    assert first.id is not None
    assert last.id is not None
    before, after = (store.scores(each, "test", "verifier") for each in (first.id, last.id))
    store.close()
    assert before.keys() == after.keys()
    return np.array([np.mean(after[each]) - np.mean(before[each]) for each in sorted(before)])


def interval(values: np.ndarray) -> tuple[float, float]:
    drawn = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


@pytest.mark.parametrize("engine", ["in process", "served"])
def test_the_same_is_asked_and_as_much_is_kept_of_each_answer(
    engine: str, made: dict[str, Path]
) -> None:
    ours, theirs = (asked(made[each], ASKED) for each in ("transformers", engine))
    assert ours == theirs
    ours, theirs = (asked(made[each], ANSWERED) for each in ("transformers", engine))
    assert [[row[each] for each in SAME] for row in ours] == [
        [row[each] for each in SAME] for row in theirs
    ]
    (lacking,) = asked(
        made[engine],
        "SELECT count(*) AS n FROM candidate WHERE checkpoint_id IS NOT NULL AND "
        "(logprob IS NULL OR token_ids IS NULL OR seed IS NULL OR sampling IS NULL)",
    )
    assert lacking["n"] == 0


@pytest.mark.parametrize("engine", ["in process", "served"])
def test_it_improves_as_much_as_with_our_own_engine(engine: str, made: dict[str, Path]) -> None:
    ours, theirs = gains(made["transformers"]), gains(made[engine])
    low, high = interval(theirs)
    apart = interval(theirs - ours)
    print(
        f"gain with transformers {ours.mean():+.3f}, with vLLM {engine} {theirs.mean():+.3f} "
        f"[{low:+.3f}, {high:+.3f}]; apart by {(theirs - ours).mean():+.3f} "
        f"[{apart[0]:+.3f}, {apart[1]:+.3f}]"
    )
    assert low > 0
    assert apart[0] < 0.05
    assert apart[1] > -0.05


@pytest.mark.parametrize("engine", ["in process", "served"])
def test_what_was_held_to_the_reference_had_the_same_probability_in_vllm(
    engine: str, made: dict[str, Path]
) -> None:
    """What vLLM says of each answer, and what the trainer computes of it."""
    rows = asked(
        made[engine],
        "SELECT candidate.logprob AS sampled, chosen_reference_logprob AS held "
        "FROM trained_on JOIN example ON example.id = example_id "
        "JOIN candidate ON candidate.id = chosen_id WHERE candidate.logprob IS NOT NULL",
    )
    assert len(rows) > 300
    assert max(abs(row["sampled"] - row["held"]) for row in rows) < 1e-3


def vllm_of(process: subprocess.Popen[str], engine: str) -> list[psutil.Process]:
    """vLLM's processes below a run's: the server, or who computes for the run's own."""
    said = "vllm.entrypoints.openai.api_server" if engine == "served" else "EngineCore"
    found = []
    for each in psutil.Process(process.pid).children(recursive=True):
        try:
            if said in " ".join([each.name(), *each.cmdline()]):
                found.append(each)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("engine", ["in process", "served"])
def test_a_vllm_that_is_killed_in_a_round_costs_nothing(
    engine: str, made: dict[str, Path], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "loop", *typed(engine, tmp_path / "runs")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )
    some = "SELECT 1 FROM asked JOIN round ON round.id = round_id WHERE number = 1 LIMIT 1"
    while True:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
        try:
            [root] = (tmp_path / "runs").iterdir()
            begun = asked(root, some)
        except (UserError, ValueError, FileNotFoundError):
            continue
        there = vllm_of(process, engine) if begun else []
        if there:
            break
    for each in there:
        each.kill()
    try:
        said, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "begun anew" in said
    ours, theirs = (asked(each, ANSWERED) for each in (made[engine], root))
    assert [[row[each] for each in SAME] for row in ours] == [
        [row[each] for each in SAME] for row in theirs
    ]
    places = [(r["number"], r["track"], r["purpose"], r["digest"], r["place"]) for r in theirs]
    assert len(set(places)) == len(places)
    verified = loop("verify", root)
    assert verified.returncode == 0, verified.stdout + verified.stderr
