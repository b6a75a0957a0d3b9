"""Recipes: each says what it is and names parts that are there, and runs as it is typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from loop import claims, config, run
from runs import loop
from store.database import Store

RECIPES = config.recipes()
PUBLISHED = [name for name in RECIPES if name != "default"]  # default is of no paper
HEADINGS = ("Paper", "Mechanism", "Differs here, and why")

SMALL = (
    # A task whose answers a model of 16 steps gets right now and then, so that there are pairs.
    'proposer.tasks=[{name="letter_counting",min_words=1,max_words=3}]',
    *("prompts=16", "rounds=1", "evaluate.gate_prompts=16", "evaluate.test_prompts=16"),
    *("warmup.prompts=256", "warmup.generator.n=1"),
    *("warmup.trainer.epochs=2", "warmup.trainer.batch_size=32", "trainer.epochs=1"),
)


SMALL_SELF_REWARDING = (
    *("rounds=1", "prompts=32", "evaluate.gate_prompts=16", "evaluate.test_prompts=16"),
    *("evaluate.anchors.prompts=16", "warmup.prompts=64", "warmup.generator.n=1"),
    *("warmup.track.judging.prompts=600", "warmup.track.proposing.prompts=150"),
    *("warmup.trainer.epochs=4", "warmup.trainer.batch_size=32", "trainer.epochs=1"),
)


def heading(name: str) -> str:
    """The comment that a recipe opens with, its paragraphs on a line each."""
    lines = config.recipe_path(name).read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    paragraphs = "\n".join(line.removeprefix("#").strip() for line in lines[:end]).split("\n\n")
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def test_there_is_the_default_and_irpo() -> None:
    assert {"default", "irpo"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_parts_and_options_that_are_there(name: str) -> None:
    assert run.load_roles(config.read(recipe=name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_opens_with_paper_mechanism_and_differences(name: str) -> None:
    told = heading(name)
    found = [re.search(rf"^{each}: \S", told, re.M) for each in HEADINGS]
    assert all(found), f"{name} lacks one of {HEADINGS}"
    places = [each.start() for each in found if each]
    assert places == sorted(places)
    assert re.search(r"^Paper: .+\(.+, \d{4}, arXiv \d{4}\.\d{5}\)\.$", told, re.M)


def test_a_recipe_is_listed_with_a_whole_sentence() -> None:
    listed = {each["name"]: each["about"] for each in json.loads(loop("recipes", "--json").stdout)}
    assert listed["irpo"] == heading("irpo").split("\n")[0]


def test_irpo_is_the_papers_loss_on_the_papers_pairs() -> None:
    found = config.read(recipe="irpo")
    trainer, track = found.models["policy"].trainer, found.track["main"]
    assert (trainer.use, track.judge.use, track.filter.use) == (
        "preference",
        "verifier",
        "right_wrong",
    )
    assert {key: trainer.options[key] for key in ("loss", "beta", "nll_weight", "nll")} == {
        "loss": "sigmoid",
        "beta": 0.1,
        "nll_weight": 1.0,
        "nll": "sequence",
    }
    assert track.generator.options["n"] / track.filter.options["pairs"] == 30 / 10


def test_irpo_runs_and_holds_each_pair_to_the_checkpoint_the_round_began_from(
    tmp_path: Path,
) -> None:
    sets = [part for each in SMALL for part in ("--set", each)]
    done = loop("start", "--recipe", "irpo", "--runs", tmp_path, *sets)
    assert done.returncode == 0, done.stdout + done.stderr
    (root,) = tmp_path.iterdir()
    assert root.name.endswith("-irpo")
    store = Store(root / run.DATABASE)
    pairs = store.query(
        "SELECT example.asked_id AS prompt, rule, candidate.logprob AS before,"
        " chosen_reference_logprob AS held_to FROM trained_on"
        " JOIN example ON example.id = trained_on.example_id"
        " JOIN candidate ON candidate.id = example.chosen_id WHERE kind = 'pair'"
    )
    store.close()
    assert {pair["rule"] for pair in pairs} == {"right_wrong"}
    assert 1 < len(pairs) / len({pair["prompt"] for pair in pairs}) <= 5
    assert all(abs(pair["before"] - pair["held_to"]) < 1e-3 for pair in pairs)
    verified = loop("verify", root)
    assert verified.returncode == 0, verified.stdout


def test_self_rewarding_learns_from_its_own_judgements_of_answers_to_its_own_prompts(
    tmp_path: Path,
) -> None:
    sets = [part for each in SMALL_SELF_REWARDING for part in ("--set", each)]
    done = loop("start", "--recipe", "self-rewarding", "--runs", tmp_path, *sets)
    assert done.returncode == 0, done.stdout + done.stderr
    (root,) = tmp_path.iterdir()
    store = Store(root / run.DATABASE)
    (began,) = store.query("SELECT path FROM checkpoint WHERE path LIKE '%round-0000%'")
    proposed = store.query(
        "SELECT origin, count(*) AS n FROM prompt JOIN asked ON asked.prompt_id = prompt.id "
        "JOIN round ON round.id = round_id WHERE number = 1 AND purpose = 'train' GROUP BY origin"
    )
    votes = store.query(
        "SELECT count(*) AS votes, judgement.score, judgement.variance, judgement.status, "
        "avg(verdict.value) AS mean, max(judge_model) AS by FROM verdict "
        "JOIN judgement USING (candidate_id, judge, round_id) "
        "JOIN candidate ON candidate.id = candidate_id JOIN asked ON asked.id = asked_id "
        "JOIN round ON round.id = asked.round_id "
        "WHERE number = 1 AND purpose = 'train' AND judge LIKE 'rubric%' GROUP BY candidate_id"
    )
    told = {
        (row["number"], row["metric"])
        for row in store.query(
            "SELECT number, metric FROM evaluation JOIN round ON round.id = round_id "
            "WHERE suite = 'judge'"
        )
    }
    (pairs,) = store.query("SELECT count(*) AS n FROM example WHERE kind = 'pair'")
    store.close()
    assert {row["origin"]: row["n"] for row in proposed} == {"proposed": 8, "seed": 24}
    assert len(votes) == 32 * 8
    assert {row["votes"] for row in votes} == {3}
    assert all(row["by"].endswith(began["path"]) for row in votes)
    scored = [row for row in votes if row["status"] == "ok"]
    assert len(scored) > 200
    assert all(abs(row["score"] - row["mean"]) < 1e-9 for row in scored)
    assert any(row["variance"] > 0 for row in scored if row["variance"] is not None)
    assert told >= {(n, metric) for n in (0, 1) for metric in ("agreement", "variance", "modal")}
    assert pairs["n"] > 10
    verified = loop("verify", root)
    assert verified.returncode == 0, verified.stdout


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_there_is_to_know_about_a_recipe_is_told(name: str) -> None:
    told = json.loads(loop("recipes", name, "--json").stdout)
    assert set(told) == {
        *("name", "about", "paper", "mechanism", "differs", "path", "parts", "settings"),
        *("trial", "claims", "result"),
    }
    assert told["about"] == heading(name).split("\n")[0]
    assert "arXiv" in told["paper"]
    made = config.read(recipe=name)
    assert told["parts"]["judge"] == made.track["main"].judge.use
    assert len(told["claims"]) == len(claims.read(name).claim)
    assert all(each["says"] for each in told["claims"])
    assert told["trial"]["control"] == list(claims.read(name).control)
    assert None not in told["settings"].values()


def test_a_recipe_is_told_in_words_and_its_file_can_be_had() -> None:
    said = loop("recipes", "irpo").stdout
    assert "paper: Iterative Reasoning Preference Optimization" in said
    assert "parts: proposer reasoning_gym, generator sampler, judge verifier" in said
    assert "  track.main.generator.n = 15" in said
    assert "trial: in the arena spell" in said
    assert "  its control, the claimed ingredient off: trainer.nll_weight=0" in said
    assert "claim: With the likelihood term" in said
    file = loop("recipes", "irpo", "--toml").stdout
    assert file.rstrip() == config.recipe_path("irpo").read_text().rstrip()
    assert loop("recipes", "nonsense").returncode == 2


@pytest.mark.parametrize("key", ["control", "plain", "trial"])
def test_a_recipes_page_is_not_told_of_a_trial_that_names_what_is_not_there(
    tmp_path: Path, key: str
) -> None:
    mine = tmp_path / "raft.toml"
    lists = {"control": ["rounds=2"], key: ["generater.n=2"]}
    said = "".join(f"{name} = {json.dumps(sets)}\n" for name, sets in lists.items())
    mine.write_text(f'# Mine.\nrounds = 1\n{said}[[claim]]\nsays = "x"\nmetric = "score"\n')
    ended = loop("recipes", "raft.toml", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    right = "no setting named 'generater'; did you mean 'generator'?"
    assert ended.stderr == f"loop: raft.toml, {key}: {right}\n"
