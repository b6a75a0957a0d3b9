"""Two runs, or two recipes over their seeds, side by side: what meets and who is better."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from loop import config as configuration
from loop import gain, lease, measure, run
from runs import scripted_toml, start
from store.database import Store
from store.records import Checkpoint
from test_cli import answered, refused, type_
from test_report import Builder, build, change, copied, finished

__all__ = ["copied", "finished"]


class Careless(Builder):
    """Every other answer of its checkpoints is wrong, in all rounds."""

    def evaluate(self, round_id: int, checkpoint: Checkpoint, wrong_every: int) -> None:
        super().evaluate(round_id, checkpoint, 2)


def made(
    runs: Path, recipe: str, *sets: str, builder: type[Builder] = Builder, finish: bool = True
) -> Path:
    """A run of two rounds made from a recipe."""
    config = configuration.read(recipe=recipe, sets=["rounds=2", *sets])
    root = run.begin(config, runs, recipe, run.load_roles(config))
    builder(root, config).fill()
    if not finish:
        change(root, "UPDATE run SET status = 'interrupted'")
    return root


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """default with seeds 0, 1 and 2, irpo with 0 and 1, which is better; and others."""
    runs = tmp_path_factory.mktemp("recipes") / "runs"
    for seed in (0, 1, 2):
        made(runs, "default", f"seed={seed}", builder=Careless)
    for seed in (0, 1):
        made(runs, "irpo", f"seed={seed}")
    made(runs, "irpo", "seed=1", "trainer.beta=0.2")
    made(runs, "irpo", "seed=2", finish=False)
    return runs


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that learns nothing and one that learns much, of the same seed."""
    folder = tmp_path_factory.mktemp("scripted")
    file = scripted_toml(folder)
    settings = ("rounds=2", "gate.undecided=keep", "gate.patience=0")
    dull, _ = start(file, folder / "dull", [*settings, "trainer.gain=0.0"])
    bright, _ = start(file, folder / "bright", [*settings, "trainer.gain=0.3"])
    return dull, bright


def compared(*arguments: object) -> Any:
    return answered("compare", *arguments)


# The statistic


def test_values_by_prompt_average_to_what_was_measured(finished: Path) -> None:
    store = Store(finished / run.DATABASE)
    for checkpoint in (2, 3, 4):
        values = gain.by_prompt(store, checkpoint, "verifier")
        stored = [each for each in store.evaluations(checkpoint) if each.split == "test"]
        assert {each.metric for each in stored} == set(values) == set(gain.METRICS)
        for each in stored:
            assert len(values[each.metric]) == each.n
            assert statistics.fmean(values[each.metric].values()) == pytest.approx(each.value)
    assert gain.by_prompt(store, 2, "another judge") == {}
    store.close()


def test_of_one_run_the_interval_is_that_over_prompts() -> None:
    chance = random.Random(5)
    values = [chance.gauss(0.1, 1) for _ in range(300)]
    found = gain.over_runs([values])
    assert found == pytest.approx(measure.bootstrap(values, 10_000, seed=1), abs=0.01)


def test_runs_are_drawn_and_within_them_prompts() -> None:
    """Against the plain loops, and against the variance that theory gives."""
    chance = random.Random(7)
    runs = [[chance.gauss(mean, 1.0) for _ in range(40)] for mean in (0.0, 0.3, 0.9, 1.0)]
    drawn = sorted(
        statistics.fmean(
            statistics.fmean(chance.choices(own, k=len(own))) for own in chance.choices(runs, k=4)
        )
        for _ in range(10_000)
    )
    mean, low, high = gain.over_runs(runs)
    assert mean == pytest.approx(statistics.fmean(map(statistics.fmean, runs)))
    assert (low, high) == pytest.approx((drawn[250], drawn[9750]), abs=0.03)
    between = statistics.pvariance(map(statistics.fmean, runs))
    within = statistics.fmean(statistics.pvariance(own) / 40 for own in runs)
    assert (high - low) / 3.92 == pytest.approx(math.sqrt((between + within) / 4), rel=0.05)


# Two runs


def test_a_run_and_itself_are_not_told_apart(finished: Path) -> None:
    found = compared(finished, finished)
    assert found["better"] is None
    assert found["paired"] == {"runs": 1, "seeds": [[0, 0]], "prompts": 6}
    assert (found["settings"], found["warnings"]) == ([], [])
    for row in [*found["metrics"], *found["rounds"]]:
        assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)
        assert row["a"] == row["b"]
    said = type_("compare", finished, finished).stdout
    assert "the settings are the same" in said
    assert said.endswith("not told apart: B - A is +0.000 [+0.000, +0.000] in score\n")


def test_the_better_side_is_named_with_the_paired_difference(scripted: tuple[Path, Path]) -> None:
    dull, bright = scripted
    found = compared(dull, bright)
    assert found["better"] == "b"
    assert found["paired"]["prompts"] == 40
    means = []
    for root in scripted:
        store = Store(root / run.DATABASE)
        label = configuration.validate(store.run().config).evaluate.judge.label
        path = Path(found["ab"[len(means)]]["best"][0]["path"])
        best = next(each for each in store.checkpoints() if each.path == path)
        scores = store.scores(best.id, "test", label)
        means.append(statistics.fmean(map(statistics.fmean, scores.values())))
        store.close()
    score = found["metrics"][0]
    assert score["metric"] == "score"
    assert (score["a"], score["b"]) == pytest.approx(means)
    assert score["difference"] == pytest.approx(means[1] - means[0])
    assert 0 < score["low"] < score["difference"] < score["high"]
    assert score["a_base"] == score["b_base"]
    assert [each["key"] for each in found["settings"]] == ["models.policy.trainer.gain"]
    assert re.search(r"^B is better by \+0\.\d{3} \[\+0", type_("compare", *scripted).stdout, re.M)
    other = compared(bright, dull)
    assert other["better"] == "a"
    assert other["metrics"][0]["difference"] == pytest.approx(-score["difference"])
    assert re.search(
        r"^A is better by \+0\.\d{3} \[\+0", type_("compare", bright, dull).stdout, re.M
    )


def test_what_a_side_took_is_what_its_rounds_took(scripted: tuple[Path, Path]) -> None:
    found = compared(*scripted)
    for side, root in zip("ab", scripted, strict=True):
        rounds = answered("rounds", root)["rounds"]
        for key in ("prompts", "examples", "generated_tokens"):
            assert found[side][key] == sum(each[key] for each in rounds)
        took = sum(sum(each["seconds"].values()) for each in rounds)
        assert found[side]["seconds"] == pytest.approx(took)
        inside = sum(found[side][f"in_{role}"] for role in ("policy", "judge", "trainer"))
        assert 0 < inside < took
        assert found[side]["rounds"] == 2
        decided = [each["models"][0]["decision"] for each in rounds[1:]]
        assert found[side]["accepted"] == decided.count("accept")
        by_round = [row[f"{side}_tokens"] for row in found["rounds"]]
        tokens = [each["generated_tokens"] for each in rounds]
        assert by_round == [sum(tokens[: n + 1]) for n in range(3)]


def test_a_run_that_ended_earlier_stands_as_it_ended(tmp_path: Path) -> None:
    short, long = build(tmp_path / "a", "rounds=1"), build(tmp_path / "b")
    found = compared(short, long)
    assert [row["round"] for row in found["rounds"]] == [0, 1, 2]
    one, two = found["rounds"][1:]
    assert (one["a"], one["a_tokens"]) == (two["a"], two["a_tokens"])
    assert one["b_tokens"] < two["b_tokens"]
    assert [each["key"] for each in found["settings"]] == ["rounds"]


def test_a_rejected_checkpoint_is_not_where_a_run_stands(copied: Path) -> None:
    before = compared(copied, copied)["rounds"]
    change(copied, "UPDATE decision SET decision = 'reject' WHERE model IS NOT NULL AND id > 1")
    after = compared(copied, copied)["rounds"]
    assert before[1]["a"] != before[0]["a"]
    assert [row["a"] for row in after] == [before[0]["a"]] * 3


def test_a_comparison_fits_eighty_columns(scripted: tuple[Path, Path]) -> None:
    tables = type_("compare", *scripted).stdout.split("\n\n")[1:4]
    assert all(len(line.rstrip()) <= 80 for table in tables for line in table.splitlines())
    assert re.search(r"^generated tokens +[\d,]+ +[\d,]+", tables[0], re.M)
    assert re.search(r"^accuracy_greedy +0\.\d{3} +\d\.\d{3} +", tables[1], re.M)
    assert re.search(r"^ +2 +0\.\d{3} +0\.\d{3} +\+0\.\d{3} \[", tables[2], re.M)


def test_a_live_run_is_compared_as_far_as_it_is(copied: Path, finished: Path) -> None:
    change(copied, "UPDATE run SET status = 'running'")
    change(copied, "UPDATE round SET status = 'running', stage = 'train' WHERE number = 2")
    store = Store(copied / run.DATABASE)
    with lease.held(store):
        found = compared(finished, copied)
    store.close()
    assert (found["a"]["rounds"], found["b"]["rounds"]) == (2, 1)
    change(copied, "UPDATE round SET status = 'running'")
    assert "has measured nothing yet: its round 0 is not over" in refused(
        "compare", finished, copied
    )


# What cannot be compared


def test_runs_of_different_prompts_are_refused(copied: Path, finished: Path) -> None:
    change(copied, "UPDATE prompt SET digest = 'x' || digest")
    said = refused("compare", finished, copied)
    assert "were measured on different prompts: of 6 and 6 test prompts none is the same" in said
    assert "give both the same seed and [evaluate]" in said


def test_few_prompts_in_common_are_said(copied: Path, finished: Path) -> None:
    change(copied, "UPDATE prompt SET digest = 'x' || digest WHERE id % 3 > 0")
    found = compared(finished, copied)
    assert found["paired"]["prompts"] == 2
    assert found["warnings"] == [
        "2 of 6 and 6 test prompts are the same, and the others are left out"
    ]


def test_runs_of_different_judges_are_refused(finished: Path, tmp_path: Path) -> None:
    other = build(tmp_path, "evaluate.judge.use=verifier", "evaluate.judge.partial=true")
    said = refused("compare", finished, other)
    assert "was measured by judge 'verifier'" in said
    assert "give both the same [evaluate]" in said


def test_answers_that_were_sampled_unlike_are_a_warning(finished: Path, tmp_path: Path) -> None:
    other = build(tmp_path, "evaluate.temperature=0.5")
    change(other, "UPDATE judgement SET judge_version = '2'")
    said = type_("compare", finished, other).stdout
    assert "warning: answers were sampled unlike: evaluate.temperature 1.0 and 0.5" in said
    assert "warning: the judge was of versions 1 and 2" in said


def test_a_name_that_stands_for_nothing(recipes: Path) -> None:
    said = refused("compare", "irpoo", "default", "--runs", recipes)
    assert "no run, folder of runs or recipe named 'irpoo'; did you mean 'irpo'?" in said


# Recipes and folders


def test_a_recipe_stands_for_its_finished_runs_seed_by_seed(recipes: Path) -> None:
    found = compared("default", "irpo", "--runs", recipes)
    assert (found["a"]["kind"], found["a"]["seeds"], found["b"]["seeds"]) == (
        "recipe",
        [0, 1],
        [0, 1],
    )
    assert found["paired"] == {"runs": 2, "seeds": [[0, 0], [1, 1]], "prompts": 12}
    assert [each["why"] for each in found["a"]["left_out"]] == ["irpo has no run of its seed, 2"]
    assert [each["why"] for each in found["b"]["left_out"]] == ["it is interrupted"]
    assert found["better"] == "b"
    assert "models.policy.trainer.learning_rate" in [each["key"] for each in found["settings"]]
    said = type_("compare", "default", "irpo", "--runs", recipes).stdout
    assert said.startswith("A  recipe default, seed 0, 1\n")
    assert "over 2 pairs of runs and their prompts" in said


def test_a_recipe_whose_settings_were_changed_is_not_its_run(finished: Path, copied: Path) -> None:
    said = refused("compare", "default", finished, "--runs", copied.parent)
    assert said == (
        f"loop: no finished run of recipe 'default' under {copied.parent}/; "
        "`loop start --recipe default` makes one\n"
    )


def test_of_two_runs_of_a_seed_the_newer_stands(recipes: Path, tmp_path: Path) -> None:
    runs = Path(shutil.copytree(recipes, tmp_path / "runs", symlinks=True))
    [old] = [each for each in runs.glob("*-default") if stored_seed(each) == 0]
    new = made(runs, "default", "seed=0")
    new = new.rename(runs / new.name.replace("20", "30", 1))
    found = compared("default", "irpo", "--runs", runs)
    assert found["a"]["runs"][0] == str(new)
    assert {"path": str(old), "why": f"{new} is newer and has its seed"} in found["a"]["left_out"]


def stored_seed(root: Path) -> int:
    return int(json.loads((root / "config.json").read_text())["seed"])


def test_a_folder_stands_for_the_runs_in_it(recipes: Path, tmp_path: Path) -> None:
    for root in recipes.glob("*-irpo*"):
        if answered("status", root)["status"] == "done":
            shutil.copytree(root, tmp_path / "mine" / root.name, symlinks=True)
    said = refused("compare", "default", tmp_path / "mine", "--runs", recipes)
    assert "holds runs of different settings: " in said
    assert "differ in models.policy.trainer.beta; name one run, or a folder" in said
    for root in (tmp_path / "mine").iterdir():
        trainer = json.loads((root / "config.json").read_text())["models"]["policy"]["trainer"]
        if trainer["beta"] == 0.2:
            shutil.rmtree(root)
    found = compared("default", tmp_path / "mine", "--runs", recipes)
    assert (found["b"]["kind"], found["b"]["seeds"]) == ("folder", [0, 1])


def test_runs_of_no_common_seed_are_refused(recipes: Path, tmp_path: Path) -> None:
    alone = made(tmp_path, "irpo", "seed=7")
    said = refused("compare", "default", alone, "--runs", recipes)
    assert "no run of default (seeds 0, 1, 2) has the seed of one of" in said
    assert "(seeds 7)" in said
