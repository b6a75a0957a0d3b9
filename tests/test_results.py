"""How recipes are put to the test: which runs are made, and what is read of them."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from loop import claims, config
from runs import HERE, SCRIPTED, scripted_toml, start
from store.database import Store

sys.path.insert(0, str(HERE / "benchmarks"))

import results
import told

RESULTS = HERE / "benchmarks" / "results.py"
TINY = (
    *("rounds=1", "prompts=24", "trainer.epochs=1", "warmup.prompts=1600", "warmup.generator.n=4"),
    *("evaluate.gate_prompts=16", "evaluate.test_prompts=24", "generator.n=8"),
    "evaluate.samples=4",  # both recipes measure alike, so they have one warm-up
)
SCORE = claims.Claim(says="It is so", metric="score")


# The trial itself, on two recipes


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """results.py on two recipes with few prompts, one seed, and before them on one that fails."""
    folder = tmp_path_factory.mktemp("results")
    broken = folder / "broken.toml"
    broken.write_text(
        'judge = "nobody"\nbatch_prompts = 64\ncontrol = ["rounds=2"]\n'
        '[[claim]]\nsays = "x"\nmetric = "score"\n'
    )
    command = [sys.executable, str(RESULTS), str(broken), "irpo", "mbr-dpo", "--seeds", "100"]
    command += ["--runs", str(folder / "runs"), "--out", str(folder / "out")]
    command += [part for each in TINY for part in ("--set", each)]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(HERE.parent)}
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert ended.stderr.startswith(f"{broken}: ")
    assert "no judge named 'nobody'" in ended.stderr
    return folder, ended.stdout


def test_a_trial_tells_of_each_claim_what_the_runs_own_stores_say(tried: tuple[Path, str]) -> None:
    folder, printed = tried
    rows = json.loads((folder / "out" / "results.json").read_text())
    assert set(rows) == {"irpo", "mbr-dpo"}
    row = rows["irpo"]
    (root,) = (folder / "runs" / "irpo" / "recipe" / "seed-100").iterdir()
    store = Store(root / "loop.db")
    (accuracy,) = store.query(
        "SELECT value FROM evaluation WHERE split = 'test' AND metric = 'accuracy_sampled' "
        "AND checkpoint_id = :checkpoint",
        checkpoint=store.incumbent("policy").id,
    )
    (tokens,) = store.query(
        "SELECT sum(tokens) AS n FROM candidate JOIN asked ON asked.id = candidate.asked_id "
        "JOIN round ON round.id = asked.round_id WHERE number > 0 AND purpose = 'train'"
    )
    store.close()
    first, second = row["claims"][:2]
    assert first["ours"] == pytest.approx(accuracy["value"])
    assert first["low"] <= first["difference"] <= first["high"]
    assert row["variants"]["recipe"]["tokens"] == tokens["n"]
    assert second["against"] == "zero"
    assert second["items"] == 1
    assert {each["verdict"] for each in (first, second)} <= {"confirmed", "refuted", "undecided"}
    assert [line.split()[0] for line in printed.splitlines()] == ["irpo", "mbr-dpo"]


def test_all_runs_of_a_trial_begin_from_one_warm_up_and_answer_the_same_questions(
    tried: tuple[Path, str],
) -> None:
    folder, _ = tried
    began, asked = set(), set()
    for name in ("irpo", "mbr-dpo"):
        for variant in ("recipe", "control", "plain"):
            (root,) = (folder / "runs" / name / variant / "seed-100").iterdir()
            store = Store(root / "loop.db")
            began.add(store.beginning("policy").digest)
            held = [*store.prompts("gate"), *store.prompts("test")]
            asked.add(tuple(each.digest for each in held))
            store.close()
    assert len(began) == 1
    assert len(asked) == 1
    (warm,) = (folder / "runs" / "warm-ups").glob("*/*")
    store = Store(warm / "loop.db")
    learned = store.query(
        "SELECT digest FROM prompt JOIN asked ON asked.prompt_id = prompt.id "
        "WHERE purpose = 'train'"
    )
    store.close()
    assert not {row["digest"] for row in learned} & set(*asked)


def test_a_trial_that_is_begun_again_runs_nothing_anew(tried: tuple[Path, str]) -> None:
    folder, printed = tried
    databases = sorted(folder.glob("runs/**/loop.db"))
    written = [each.stat().st_mtime_ns for each in databases]
    command = [sys.executable, str(RESULTS), "irpo", "mbr-dpo", "--seeds", "100"]
    command += ["--runs", str(folder / "runs")]
    command += [part for each in TINY for part in ("--set", each)]
    again = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(HERE.parent)}
    )
    assert again.stdout == printed
    assert sorted(folder.glob("runs/**/loop.db")) == databases
    assert [each.stat().st_mtime_ns for each in databases] == written


def test_results_are_told_as_a_table_with_a_plot_of_each_recipe(tried: tuple[Path, str]) -> None:
    folder, _ = tried
    told = (folder / "out" / "RESULTS.md").read_text()
    for name in ("irpo", "mbr-dpo"):
        assert f"| [{name}](plots/{name}.svg) |" in told
        assert f"## {name}" in told
        assert "recipe" in (folder / "out" / "plots" / f"{name}.svg").read_text()
        for claim in claims.read(name).claim:
            assert claim.says in told


@pytest.mark.parametrize("more", [(), ("--seeds", "3", "100")])
def test_reported_seeds_are_not_run_before_the_claim_is_committed(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text("rounds = 1\n")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    ended = subprocess.run(
        [sys.executable, str(RESULTS), "mine.toml", "--runs", str(tmp_path / "runs"), *more],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
    )
    assert ended.returncode == 1
    assert "commit these before their reported seeds run" in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_runs_that_generated_more_than_the_recipes_are_named(tried: tuple[Path, str]) -> None:
    folder, _ = tried
    rows = told.kept(folder / "out")
    own = rows["irpo"]["variants"]["recipe"]["tokens"]
    for name, share in (("control", 1.08), ("plain", 1.5)):
        rows["irpo"]["variants"][name]["tokens"] = round(own * share)
    said = told.markdown({"irpo": rows["irpo"]})
    assert "Generated tokens, against the recipe's: plain iterative DPO +50%." in said
    rows["irpo"]["variants"]["plain"]["tokens"] = own
    assert "Generated tokens, against" not in told.markdown({"irpo": rows["irpo"]})


# Which runs


def test_a_run_of_other_settings_is_not_the_one_that_is_wanted(tmp_path: Path) -> None:
    """Also where they are settings that may change in a run."""
    file, place = scripted_toml(tmp_path), tmp_path / "runs"
    root, _ = start(file, place, ["rounds=1"])
    found = results.run_of(place, config.read(file, sets=["rounds=1"]))
    assert found == results.Found(root, True)
    assert results.run_of(place) == found
    for other in ("rounds=2", "gate.patience=7", "gate.target=0.5", "trainer.step=0.1"):
        asked = config.read(file, sets=["rounds=1", other])
        assert results.run_of(place, asked) is None, other


# What the stores say


def test_tokens_are_those_that_the_rounds_generated_to_learn_from(tmp_path: Path) -> None:
    sets = ["rounds=2", f"judge.use={SCRIPTED}:Skilful", "judge.model=round"]
    anchors = "[evaluate.anchors]\nprompts = 10\n"
    root, outcome = start(
        scripted_toml(tmp_path, anchors), tmp_path / "runs", [*sets, "filter.use=best_worst"]
    )
    assert outcome.code == 0, outcome.reason
    store = Store(root / "loop.db")
    learning = "JOIN asked ON asked.id = asked_id JOIN round ON round.id = asked.round_id "
    learning += "WHERE number > 0 AND purpose = 'train'"
    (answers,) = store.query(f"SELECT sum(tokens) AS n FROM candidate {learning}")
    (verdicts,) = store.query(
        "SELECT sum(verdict.tokens) AS n FROM verdict "
        f"JOIN candidate ON candidate.id = candidate_id {learning}"
    )
    assert answers["n"] > 0
    assert verdicts["n"] > 0
    assert results.learned_from(store) == answers["n"] + verdicts["n"]
    assert results.learned_from(store) < store.generated_tokens()
    for number, proposed in ((0, 1000), (1, 7)):
        store.ask(store.round(number).id or 0, "own", "train", [], 8, proposed_tokens=proposed)
    assert results.learned_from(store) == answers["n"] + verdicts["n"] + 7
    store.close()


def test_seconds_are_those_of_the_rounds_and_no_pause(tmp_path: Path) -> None:
    root, _ = start(scripted_toml(tmp_path), tmp_path / "runs", ["rounds=2"])
    with sqlite3.connect(root / "loop.db") as database:
        database.execute("UPDATE run SET started = '2000-01-01 00:00:00.000000'")
        stored = database.execute("SELECT seconds FROM round WHERE number > 0").fetchall()
    stages = [json.loads(each) for (each,) in stored]
    own = [value for each in stages for key, value in each.items() if not key.startswith("in ")]
    trial = claims.Trial(claim=(SCORE,), control=("rounds=1",))
    assert 0 < results.Reading.of(root, trial).seconds == pytest.approx(sum(own))


def test_a_claim_says_how_many_values_only_one_side_has() -> None:
    def reading(**ends: float) -> results.Reading:
        return results.Reading(course=[], begins=[{}], ends=[ends], tokens=1, seconds=1.0)

    read = {
        "recipe": [reading(a=1.0, b=0.5), reading(a=1.0, b=1.0)],
        "control": [reading(a=0.0, b=0.5), reading(a=0.5, c=9.0)],
    }
    found = results.claimed(SCORE, 0, read)
    assert (found["items"], found["left_out"]) == (3, 2)
    assert found["ours"] == pytest.approx((0.75 + 1.0) / 2)
    assert found["theirs"] == pytest.approx((0.25 + 0.5) / 2)
    assert found["difference"] == pytest.approx(0.5)
