"""What a recipe claims, how it is put to the test, and how that is told."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from loop import claims, config
from loop.gain import difference, over_runs
from runs import HERE, scripted_toml, start
from store.database import Store
from store.errors import UserError

sys.path.insert(0, str(HERE / "benchmarks"))

import told

RESULTS = HERE / "benchmarks" / "results.py"
TRIED = [name for name in config.recipes() if name != "default"]
TINY = (
    *("rounds=1", "prompts=24", "trainer.epochs=1", "warmup.prompts=1600", "warmup.generator.n=4"),
    *("evaluate.gate_prompts=16", "evaluate.test_prompts=24", "generator.n=8"),
)


# Verdicts


@pytest.mark.parametrize(
    ("expect", "interval", "verdict"),
    [
        ("more", (0.1, 0.02, 0.2), "confirmed"),
        ("more", (0.1, -0.02, 0.2), "undecided"),
        ("more", (-0.1, -0.2, -0.02), "refuted"),
        ("less", (-0.1, -0.2, -0.02), "confirmed"),
        ("less", (0.1, 0.02, 0.2), "refuted"),
        ("same", (0.0, -0.04, 0.04), "confirmed"),
        ("same", (0.0, -0.06, 0.04), "undecided"),
        ("same", (0.2, 0.06, 0.3), "refuted"),
        ("not less", (-0.02, -0.04, 0.0), "confirmed"),
        ("not less", (0.0, -0.06, 0.06), "undecided"),
        ("not less", (-0.2, -0.3, -0.06), "refuted"),
        ("not more", (0.02, 0.0, 0.04), "confirmed"),
        ("not more", (0.2, 0.06, 0.3), "refuted"),
    ],
)
def test_a_verdict_is_what_the_whole_interval_says(
    expect: str, interval: tuple[float, float, float], verdict: str
) -> None:
    margin = 0.0 if expect in ("more", "less") else 0.05
    told = {"says": "It is so", "metric": "length", "expect": expect, "margin": margin}
    assert claims.Claim.model_validate(told).verdict(interval) == verdict


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"metric": "beauty"}, "no metric 'beauty'"),
        ({}, "a metric or about a query"),
        ({"metric": "length", "query": "SELECT 1"}, "one of them"),
        ({"metric": "length", "expect": "same"}, "do not go together"),
        ({"metric": "length", "margin": 0.1}, "do not go together"),
    ],
)
def test_a_claim_that_cannot_be_tried_is_refused(table: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        claims.Claim.model_validate({"says": "It is so", **table})


def test_a_recipe_of_ones_own_is_a_file_and_without_a_claim_it_runs_and_is_not_tried(
    tmp_path: Path,
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('arena = "spell"\ncontrol = ["rounds=1"]\nrounds = 2\n')
    assert config.read(recipe=str(mine)).rounds == 2
    with pytest.raises(UserError, match=r"mine\.toml', claim: Field required"):
        claims.read(str(mine))


@pytest.mark.parametrize("name", TRIED)
def test_every_recipe_has_a_claim_a_control_and_a_plain_run_on_the_same_questions(
    name: str,
) -> None:
    trial = claims.read(name)
    arena = "default" if trial.arena is None else f"{config.ARENAS}/{trial.arena}"
    ours = config.read(recipe=name, sets=trial.trial)
    control = config.read(recipe=name, sets=[*trial.trial, *trial.control])
    plain = config.read(recipe=arena, sets=[*trial.trial, *trial.plain])
    assert ours.identity != control.identity
    for other in (control, plain):
        for key in ("proposer", "judge", "gate_prompts", "test_prompts", "samples", "max_tokens"):
            assert getattr(other.evaluate, key) == getattr(ours.evaluate, key), key


# Differences


def test_items_that_both_sides_have_are_paired_and_others_are_not() -> None:
    chance = random.Random(0)
    theirs = [{str(n): chance.random() for n in range(40)} for _ in range(5)]
    ours = [{item: value + 0.05 for item, value in run.items()} for run in theirs]
    mean, low, high = difference(ours, theirs)
    assert mean == pytest.approx(0.05)
    assert high - low < 1e-9
    renamed = [{f"other {item}": value for item, value in run.items()} for run in ours]
    mean, low, high = difference(renamed, theirs)
    assert mean == pytest.approx(0.05)
    assert low < 0 < high


def test_a_difference_of_unpaired_items_has_the_interval_of_a_difference() -> None:
    """Held to the textbook's: the roots of the variances of two means add up."""
    chance = random.Random(1)
    ours = [[chance.gauss(1, 2) for _ in range(300)]]
    theirs = [[chance.gauss(0, 1) for _ in range(200)]]
    _, low, high = over_runs(ours, less=theirs)
    wanted = 2 * 1.96 * (4 / 300 + 1 / 200) ** 0.5
    assert high - low == pytest.approx(wanted, rel=0.1)


def test_a_run_without_values_is_compared_with_nothing() -> None:
    with pytest.raises(ValueError, match="nothing to be compared"):
        difference([{}], [{"a": 1.0}])


def test_a_query_is_asked_of_the_store_for_a_checkpoint(tmp_path: Path) -> None:
    root, _ = start(scripted_toml(tmp_path), tmp_path / "runs", ["rounds=2"])
    store = Store(root / "loop.db")
    claim = claims.Claim(
        says="Answers are short",
        query="SELECT id AS item, tokens AS value FROM candidate WHERE checkpoint_id = :checkpoint",
    )
    last = store.incumbent("policy")
    found = claim.values(store, last, "exact")
    (count,) = store.query(
        "SELECT count(*) AS n FROM candidate WHERE checkpoint_id = :id", id=last.id
    )
    assert len(found) == count["n"] > 0
    store.close()


def test_how_well_it_judges_is_a_number_an_anchor(tmp_path: Path) -> None:
    anchors = "[evaluate.anchors]\nprompts = 10\n"
    root, _ = start(scripted_toml(tmp_path, anchors), tmp_path / "runs", ["rounds=1"])
    store = Store(root / "loop.db")
    last = store.incumbent("policy")
    found = claims.Claim(says="It judges well", metric="agreement").values(store, last, "exact")
    (measured,) = [each for each in store.evaluations(last.id or 0) if each.metric == "agreement"]
    assert list(found.values()) == list(measured.items or ())
    assert sum(found.values()) / len(found) == pytest.approx(measured.value)
    store.close()


def test_without_anchors_there_is_no_word_on_how_well_it_judges(tmp_path: Path) -> None:
    root, _ = start(scripted_toml(tmp_path), tmp_path / "runs", ["rounds=1"])
    store = Store(root / "loop.db")
    claim = claims.Claim(says="It judges well", metric="agreement")
    with pytest.raises(UserError, match=r"was not measured; a run .* has \[evaluate.anchors\]"):
        claim.values(store, store.incumbent("policy"), "exact")
    store.close()


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
    tokens = store.generated_tokens()
    store.close()
    first, second = row["claims"]
    assert first["ours"] == pytest.approx(accuracy["value"])
    assert first["low"] <= first["difference"] <= first["high"]
    assert row["variants"]["recipe"]["tokens"] == tokens
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
