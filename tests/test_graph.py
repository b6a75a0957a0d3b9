"""The state machine on scripted roles: stages, edges, tracks, models, rules, interruptions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loop import config, graph, retention, run
from runs import HERE, SCRIPTED, everything, scripted_toml, start
from store.database import Store
from store.errors import UserError

TWO = f"""
[generator]
n = 4
[track.critic]
model = "critic"
prompts = 16
[track.critic.proposer]
times = 2
[track.second]
prompts = 8
[track.second.filter]
use = "best_worst"
[models.critic]
path = "critic"
[models.critic.trainer]
use = "{SCRIPTED}:Learner"
gain = 0.1
"""


def store_of(root: Path) -> Store:
    return Store(root / "loop.db")


def test_three_rounds_improve_a_model_and_every_prompt_is_accounted_for(tmp_path: Path) -> None:
    root, outcome = start(scripted_toml(tmp_path), tmp_path / "runs")
    assert (outcome.code, outcome.status) == (0, "done")
    store = store_of(root)
    rounds = store.rounds()
    assert [(each.number, each.status, each.stage) for each in rounds] == [
        (number, "done", "done") for number in range(4)
    ]
    made = store.checkpoints("policy")
    assert [each.parent_id for each in made] == [None, *(each.id for each in made[:-1])]
    scores = [store.scores(each.id or 0, "test", f"{SCRIPTED}:Exact") for each in made]
    means = [sum(map(sum, each.values())) / sum(map(len, each.values())) for each in scores]
    assert means == sorted(means)
    assert means[-1] > means[0] + 0.3
    assert store.count_unaccounted() == 0
    for each in rounds[1:]:
        counts = each.counts["train:main"]
        assert counts["asked"] == 24
        assert counts["candidates"] == counts["judged"] == 24 * 8
        kept = store.query(
            "SELECT count(DISTINCT asked_id) AS n FROM example JOIN asked ON asked.id = asked_id "
            "WHERE round_id = :round",
            round=each.id,
        )[0]["n"]
        assert kept + counts["dropped"] == 24


def test_two_tracks_and_two_models_are_trained_judged_and_gated_apart(tmp_path: Path) -> None:
    from scripted import write_model

    write_model(tmp_path / "critic", 0.2)
    root, outcome = start(scripted_toml(tmp_path, TWO), tmp_path / "runs", ["rounds=2"])
    assert outcome.code == 0, outcome.reason
    store = store_of(root)
    for each in store.rounds()[1:]:
        assert {key: counts["asked"] for key, counts in each.counts.items()} == {
            "train:main": 24,
            "train:critic": 16,
            "train:second": 8,
            "sampled:policy": 100,
            "greedy:policy": 100,
            "sampled:critic": 100,
            "greedy:critic": 100,
        }
    learned = store.query(
        "SELECT model, track, count(*) AS n FROM trained_on "
        "JOIN checkpoint ON checkpoint.id = checkpoint_id "
        "JOIN example ON example.id = example_id JOIN asked ON asked.id = asked_id "
        "GROUP BY model, track"
    )
    assert {(row["model"], row["track"]) for row in learned} == {
        ("policy", "main"),
        ("policy", "second"),
        ("critic", "critic"),
    }
    wrote = store.query(
        "SELECT DISTINCT track, model FROM candidate JOIN asked ON asked.id = asked_id "
        "JOIN checkpoint ON checkpoint.id = checkpoint_id WHERE purpose = 'train'"
    )
    assert {(row["track"], row["model"]) for row in wrote} == {
        ("main", "policy"),
        ("second", "policy"),
        ("critic", "critic"),
    }
    decided = store.query("SELECT number, model FROM decision JOIN round ON round.id = round_id")
    per_round = {(row["number"], row["model"]) for row in decided if row["model"]}
    assert per_round == {(n, model) for n in range(3) for model in ("policy", "critic")}


def test_a_bad_round_is_rejected_and_the_run_goes_on_from_the_incumbent(tmp_path: Path) -> None:
    file = scripted_toml(tmp_path, skill=0.4)
    root, outcome = start(file, tmp_path / "runs", ["trainer.spoil_in=2"])
    assert outcome.code == 0
    store = store_of(root)
    made = store.checkpoints("policy")
    assert [each.status for each in made[-3:]] == ["accepted", "rejected", "accepted"]
    assert made[-1].parent_id == made[-3].id
    [row] = store.query("SELECT * FROM decision JOIN round ON round.id=round_id WHERE number=2")
    assert row["decision"] == "reject"
    assert "worse than the incumbent" in row["reason"]


def test_a_diverged_training_is_rejected_and_the_run_goes_on(tmp_path: Path) -> None:
    file = scripted_toml(tmp_path, skill=0.4)
    root, outcome = start(file, tmp_path / "runs", ["trainer.diverge_in=2"])
    assert outcome.code == 0
    made = store_of(root).checkpoints("policy")
    assert [each.status for each in made[-3:]] == ["accepted", "diverged", "accepted"]
    assert made[-1].parent_id == made[-3].id


def test_patience_stops_a_run_that_gets_no_better(tmp_path: Path) -> None:
    file = scripted_toml(tmp_path, skill=0.6)
    root, outcome = start(file, tmp_path / "runs", ["trainer.gain=-0.5", "rounds=9"])
    assert (outcome.code, outcome.status) == (3, "stopped")
    assert "gate.patience is 2" in outcome.reason
    assert len(store_of(root).rounds()) == 3


@pytest.mark.parametrize(("rule", "kept"), [("keep", "accepted"), ("revert", "rejected")])
def test_an_undecided_checkpoint_is_kept_or_not_as_declared(
    tmp_path: Path, rule: str, kept: str
) -> None:
    sets = ["trainer.gain=0.0", "rounds=1", f"gate.undecided={rule}"]
    root, _ = start(scripted_toml(tmp_path, skill=0.5), tmp_path / "runs", sets)
    store = store_of(root)
    row = next(row for row in everything(root)["decision"] if row["rule"] == "paired bootstrap")
    assert row["decision"] == "undecided"
    assert store.checkpoints("policy")[-1].status == kept


def test_the_budget_ends_a_run_and_a_larger_one_goes_on_where_it_was(tmp_path: Path) -> None:
    file = scripted_toml(tmp_path)
    undisturbed, _ = start(file, tmp_path / "undisturbed")
    root, outcome = start(file, tmp_path / "runs", ["budget.generated_tokens=2500"])
    assert (outcome.code, outcome.status) == (3, "stopped")
    spent = store_of(root).generated_tokens()
    assert 2500 <= spent < 2500 + 8 * 8 * 8
    settings = config.change(run.stored_config(root), ["budget.generated_tokens=0"])
    assert [each["key"] for each in run.update(root, settings)] == ["budget.generated_tokens"]
    from runs import go_on

    assert go_on(root, settings, run.load_roles(settings)).code == 0
    one, other = everything(undisturbed), everything(root)
    for table in set(one) - {"run", "decision"}:
        assert one[table] == other[table], table


def test_the_target_ends_a_run(tmp_path: Path) -> None:
    root, outcome = start(scripted_toml(tmp_path), tmp_path / "runs", ["gate.target=0.4"])
    assert outcome.code == 0
    assert "target 0.4" in outcome.reason
    assert len(store_of(root).rounds()) < 4


def test_a_round_without_examples_is_closed_and_counts_against_patience(tmp_path: Path) -> None:
    root, outcome = start(scripted_toml(tmp_path, skill=1.0), tmp_path / "runs")
    assert outcome.code == 3
    store = store_of(root)
    assert [each.status for each in store.rounds()] == ["done", "no_examples", "no_examples"]
    reasons = store.query("SELECT DISTINCT reason FROM dropped")
    assert {row["reason"] for row in reasons} <= {"all right", "duplicate"}
    assert store.count_unaccounted() == 0


def test_a_judge_that_loses_a_candidate_stops_the_run_with_what_it_lost(tmp_path: Path) -> None:
    root, outcome = start(
        scripted_toml(tmp_path), tmp_path / "runs", [f"judge.use={SCRIPTED}:Forgetful"]
    )
    assert outcome.code == 4
    assert "was given 32 candidates and gave 31 judgements" in outcome.reason
    assert store_of(root).run().status == "failed"  # type: ignore[union-attr]


def test_a_stage_that_fails_keeps_what_was_committed_and_goes_on(tmp_path: Path) -> None:
    file = scripted_toml(tmp_path)
    undisturbed, _ = start(file, tmp_path / "undisturbed")
    settings = config.read(file)
    roles = run.load_roles(settings)
    judge = roles[id(settings.track["main"].judge)]
    judge.fail_in = 2
    root = run.begin(settings, tmp_path / "runs", "test", roles)
    from runs import go_on

    failed = go_on(root, settings, roles)
    assert failed.code == 4
    assert "No space left" in failed.reason
    judge.fail_in = None
    assert go_on(root, settings, roles).code == 0
    assert everything(undisturbed) == everything(root)


def test_scores_that_are_missing_train_nothing_and_are_counted(tmp_path: Path) -> None:
    root, outcome = start(
        scripted_toml(tmp_path), tmp_path / "runs", ["judge.abstain_on='7'", "rounds=1"]
    )
    assert outcome.code == 0
    store = store_of(root)
    assert store.rounds()[1].counts["train:main"]["unscored"] > 0
    used = store.query(
        "SELECT status FROM example JOIN judgement ON judgement.id IN "
        "(chosen_judgement_id, rejected_judgement_id)"
    )
    assert {row["status"] for row in used} == {"ok"}


def test_retention_keeps_the_incumbent_the_best_and_the_last(tmp_path: Path) -> None:
    file = scripted_toml(tmp_path, skill=0.2)
    sets = ["trainer.gain=0.15", "rounds=4", "checkpoints.keep_last=1"]
    root, _ = start(file, tmp_path / "runs", sets)
    store = store_of(root)
    made = store.checkpoints("policy")
    kept = {path.name for path in (root / "checkpoints").iterdir() if not path.is_symlink()}
    assert kept == {each.path.name for each in made[1:] if each.status != "pruned"}
    best = retention.best_checkpoint(store, "policy")
    assert (root / "checkpoints" / "best").resolve() == best.path.resolve()
    assert any(each.status == "pruned" for each in made)


def test_an_unbounded_run_does_not_meet_the_step_limit_of_langgraph(tmp_path: Path) -> None:
    """With LangGraph's own limit lowered to 20 steps, rounds without end go on past it."""
    file = scripted_toml(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from pathlib import Path\n"
        "from runs import start\n"
        f"root, outcome = start(Path({str(file)!r}), Path({str(tmp_path / 'runs')!r}), "
        "['rounds=0', 'gate.target=0.9', 'trainer.gain=0.06', 'gate.patience=0', "
        "'gate.undecided=keep'])\n"
        "from store.database import Store\n"
        "print(outcome.code, len(Store(root / 'loop.db').rounds()))"
    )
    limit = {"LANGGRAPH_DEFAULT_RECURSION_LIMIT": "20"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | limit,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    outcome, rounds = done.stdout.split()[-2:]
    assert outcome == "0"
    assert int(rounds) * 8 > 20 * 3


def test_equal_seeds_give_equal_runs_and_another_seed_another(tmp_path: Path) -> None:
    file = scripted_toml(tmp_path)
    one, _ = start(file, tmp_path / "one", ["rounds=1"])
    two, _ = start(file, tmp_path / "two", ["rounds=1"])
    three, _ = start(file, tmp_path / "three", ["rounds=1", "seed=7"])
    assert everything(one) == everything(two)
    assert everything(one)["candidate"] != everything(three)["candidate"]


def test_a_change_of_identity_is_refused_with_the_differences(tmp_path: Path) -> None:
    root, _ = start(scripted_toml(tmp_path), tmp_path / "runs", ["rounds=1"])
    other = config.change(run.stored_config(root), ["generator.n=4", "rounds=2"])
    with pytest.raises(UserError, match=r"track\.main\.generator\.n: .* -> 4"):
        run.update(root, other)
    more = config.change(run.stored_config(root), ["rounds=2"])
    assert run.update(root, more) == [{"key": "rounds", "from": 1, "to": 2}]
    [change] = store_of(root).run().changes  # type: ignore[union-attr]
    assert (change["key"], change["from"], change["to"]) == ("rounds", 1, 2)


def test_the_state_of_the_graph_is_ids_only() -> None:
    assert set(graph.State.__annotations__) == {"run", "round"}


def test_the_test_split_decides_nothing(tmp_path: Path) -> None:
    """Two runs that differ in their test prompts alone decide and train the same."""
    file = scripted_toml(tmp_path)
    one, _ = start(file, tmp_path / "one")
    two, _ = start(file, tmp_path / "two", ["evaluate.test_prompts=90"])
    decided = [
        [(row["decision"], row["numbers"]) for row in everything(root)["decision"]]
        for root in (one, two)
    ]
    assert decided[0] == decided[1]
