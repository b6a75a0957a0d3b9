"""A reward model that the run itself trains: its warm-up, its lineage, who asks it, its gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loop import config, gate, run
from runs import loop, scripted_toml, start
from store import checkpoints
from store.database import Store

SMALL = (
    *("rounds=2", "prompts=24", "warmup.prompts=1600", "warmup.generator.n=4"),
    *("warmup.track.reward.prompts=100", "track.reward.prompts=24", "trainer.epochs=1"),
    *("evaluate.gate_prompts=8", "evaluate.test_prompts=8"),
    "evaluate.anchors.prompts=20",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of the recipe in which both models learn."""
    runs = tmp_path_factory.mktemp("coevolve")
    sets = [part for each in SMALL for part in ("--set", each)]
    done = loop("start", "--recipe", "rm-sft-coevolve", "--runs", runs, *sets)
    assert done.returncode == 0, done.stdout + done.stderr
    (root,) = runs.iterdir()
    return root


def made(store: Store, model: str) -> list[Any]:
    return store.query(
        "SELECT checkpoint.id AS id, number, path, parent_id AS parent, checkpoint.status AS status"
        " FROM checkpoint JOIN round ON round.id = round_id WHERE model = :model"
        " ORDER BY number, checkpoint.id",
        model=model,
    )


def test_it_has_a_lineage_of_its_own_that_begins_at_the_policys_warm_up(trained: Path) -> None:
    store = Store(trained / run.DATABASE)
    policy, reward = made(store, "policy"), made(store, "reward")
    store.close()
    base, warm, first, second = reward
    assert base["parent"] is None
    assert warm["parent"] == policy[1]["id"]
    assert policy[1]["number"] == warm["number"] == 0
    assert first["parent"] == warm["id"]
    accepted = [each["id"] for each in (warm, first) if each["status"] in ("accepted", "pruned")]
    assert second["parent"] == accepted[-1]
    assert checkpoints.is_reward_model(trained / second["path"])
    assert not checkpoints.is_reward_model(trained / policy[-1]["path"])


def test_the_policys_answers_are_judged_by_the_reward_model_that_was_accepted_last(
    trained: Path,
) -> None:
    store = Store(trained / run.DATABASE)
    asked = store.query(
        "SELECT DISTINCT number, judge_model FROM verdict "
        "JOIN candidate ON candidate.id = candidate_id JOIN asked ON asked.id = asked_id "
        "JOIN round ON round.id = asked.round_id "
        "WHERE track = 'main' AND purpose = 'train' AND judge LIKE 'reward_model%' ORDER BY number"
    )
    reward = made(store, "reward")
    store.close()
    assert [row["number"] for row in asked] == [1, 2]
    assert asked[0]["judge_model"].endswith(reward[1]["path"])
    kept = reward[2] if reward[2]["status"] in ("accepted", "pruned") else reward[1]
    assert asked[1]["judge_model"].endswith(kept["path"])


def test_its_examples_are_answers_of_the_policy_that_the_verifier_told_apart(
    trained: Path,
) -> None:
    store = Store(trained / run.DATABASE)
    pairs = store.query(
        "SELECT writer.model AS writer, chosen.text AS chosen, rejected.text AS rejected, "
        "prompt.reference AS reference FROM trained_on "
        "JOIN checkpoint AS learner ON learner.id = trained_on.checkpoint_id "
        "JOIN example ON example.id = example_id JOIN asked ON asked.id = example.asked_id "
        "JOIN round ON round.id = asked.round_id JOIN prompt ON prompt.id = asked.prompt_id "
        "JOIN candidate AS chosen ON chosen.id = chosen_id "
        "JOIN candidate AS rejected ON rejected.id = rejected_id "
        "JOIN checkpoint AS writer ON writer.id = chosen.checkpoint_id "
        "WHERE learner.model = 'reward' AND number > 0"
    )
    store.close()
    assert pairs
    assert {row["writer"] for row in pairs} == {"policy"}
    assert all(row["chosen"] == row["reference"] != row["rejected"] for row in pairs)


def test_it_is_measured_on_anchors_by_what_it_says_of_them_and_never_asked_to_answer(
    trained: Path,
) -> None:
    store = Store(trained / run.DATABASE)
    found = store.query(
        "SELECT number, metric, value, evaluation.items AS items FROM evaluation "
        "JOIN round ON round.id = evaluation.round_id WHERE model = 'reward' ORDER BY number"
    )
    asked = store.query("SELECT DISTINCT track, purpose FROM asked WHERE track LIKE 'reward%'")
    decided = store.query(
        "SELECT number, rule, json_extract(numbers, '$.prompts') AS prompts FROM decision "
        "JOIN round ON round.id = decision.round_id WHERE model = 'reward' AND number > 0"
    )
    store.close()
    agreement = {row["number"]: row["value"] for row in found if row["metric"] == "agreement"}
    assert set(agreement) == {0, 1, 2}
    assert not {"accuracy_sampled", "score_sampled"} & {row["metric"] for row in found}
    assert {(row["track"], row["purpose"]) for row in asked} == {
        ("reward", "train"),
        ("reward:anchors", "anchor"),
    }
    assert {row["rule"] for row in decided} == {"paired bootstrap"}
    assert all(row["prompts"] > 10 for row in decided)


def test_the_run_verifies(trained: Path) -> None:
    verified = loop("verify", trained)
    assert verified.returncode == 0, verified.stdout


@pytest.mark.slow
def test_without_anchors_it_is_taken_as_it_comes_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    text = loop("recipes", "rm-sft-coevolve", "--toml").stdout
    file.write_text(text)
    small = [each for each in SMALL if not each.startswith(("evaluate.anchors", "rounds"))]
    sets = [part for each in (*small, "rounds=1") for part in ("--set", each)]
    done = loop("start", "--recipe", file, "--runs", tmp_path / "runs", *sets)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert "reward: accept, a reward model is measured on [evaluate.anchors]" in said


@pytest.mark.slow
def test_a_reward_model_that_no_judge_of_the_rounds_asks_is_measured_by_one_of_the_anchors(
    tmp_path: Path,
) -> None:
    sets = [*SMALL, "rounds=1", 'judge={use="verifier"}']
    sets += ['evaluate.anchors.judge={use="reward_model",model="model:reward"}']
    told = [part for each in sets for part in ("--set", each)]
    done = loop("start", "--recipe", "rm-sft-coevolve", "--runs", tmp_path, *told)
    assert done.returncode == 0, done.stdout + done.stderr
    (root,) = tmp_path.iterdir()
    store = Store(root / run.DATABASE)
    found = store.query(
        "SELECT metric FROM evaluation WHERE model = 'reward' AND metric = 'agreement'"
    )
    decided = store.query("SELECT rule FROM decision WHERE model = 'reward' ORDER BY id")
    store.close()
    assert len(found) == 2
    assert decided[-1]["rule"] == "paired bootstrap"


def test_a_policy_without_scores_is_not_heard_by_how_well_its_judge_judges(tmp_path: Path) -> None:
    anchors = "[evaluate.anchors]\nprompts = 10\n"
    root, _ = start(scripted_toml(tmp_path, anchors), tmp_path / "runs", ["rounds=1"])
    store = Store(root / run.DATABASE)
    policy = store.incumbent("policy")
    assert "agreement" in {each.metric for each in store.evaluations(policy.id or 0)}
    ours = run.stored_config(root)
    assert gate.heard(store, ours, policy)
    unheard = config.change(ours, ["evaluate.judge=verifier"])
    assert gate.heard(store, unheard, policy) == {}
    measured = store.evaluations(policy.id or 0)
    items = next(each.items for each in measured if each.metric == "agreement")
    assert items
    assert len(gate.heard(store, ours, policy, writes=False)) == len(items)
    store.close()


def test_a_policy_that_is_asked_for_scores_before_it_was_trained_to_judge_says_so(
    tmp_path: Path,
) -> None:
    sets = ["rounds=1", "prompts=8", "warmup.when=never", "evaluate.gate_prompts=4"]
    sets += ["evaluate.test_prompts=4"]
    done = loop(
        *("start", "--recipe", "online-iterative-dpo", "--runs", tmp_path),
        *(part for each in sets for part in ("--set", each)),
    )
    assert done.returncode in (2, 4)
    assert "no reward model (yet)" in done.stderr
