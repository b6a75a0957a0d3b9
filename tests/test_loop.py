"""Whole runs on the embedded model, with the real engine, judge, trainers and command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loop.report import rounds as report_rounds
from loop.retention import best_checkpoint
from runs import HERE, loop
from store.database import Store


def decided(root: Path) -> list[tuple[int, str, str]]:
    found = Store(root / "loop.db").query(
        "SELECT number, decision, rule FROM decision JOIN round ON round.id = round_id "
        "WHERE model IS NOT NULL ORDER BY number"
    )
    return [(row["number"], row["decision"], row["rule"]) for row in found]


def only(runs: Path) -> Path:
    [root] = runs.iterdir()
    return root


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make start` runs, whole, with a seed of its own."""
    runs = tmp_path_factory.mktemp("default")
    done = loop("start", "--runs", runs, "--set", "seed=106")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best checkpoint" in done.stdout
    assert "gain on the test split: +0." in done.stdout
    return only(runs)


def test_a_warning_of_our_own_is_said_once_a_run_like_anything_else(tmp_path: Path) -> None:
    small = ["rounds=1", "prompts=8", "warmup.prompts=64", "warmup.generator.n=1"]
    small += ["evaluate.gate_prompts=4", "evaluate.test_prompts=4", "engine.cache_gib=1e-9"]
    done = loop("start", "--runs", tmp_path, *(part for each in small for part in ("--set", each)))
    assert done.returncode in (0, 3), done.stderr
    said = [each for each in done.stderr.splitlines() if "answers are sampled 1 at a time" in each]
    assert len(said) == 1
    assert said[0].startswith("answers are sampled")
    assert "Warning" not in done.stderr


def test_the_default_gets_a_tenth_better_on_the_test_split_in_three_rounds(
    default_run: Path,
) -> None:
    store = Store(default_run / "loop.db")
    means = []
    for checkpoint in (store.checkpoints("policy")[1], store.incumbent("policy")):
        scores = store.scores(checkpoint.id or 0, "test", "verifier")
        means.append(sum(map(sum, scores.values())) / sum(map(len, scores.values())))
    assert means[1] - means[0] >= 0.10
    assert [each.number for each in store.rounds()] == [0, 1, 2, 3]


def test_the_default_run_verifies_and_answers_why(default_run: Path) -> None:
    verified = loop("verify", default_run)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    pair = Store(default_run / "loop.db").query("SELECT max(id) AS id FROM example")[0]["id"]
    why = loop("why", str(pair), default_run)
    assert why.returncode == 0
    for words in ("right_wrong", "verifier", "reference log-prob", "checkpoint"):
        assert words in why.stdout, why.stdout


def test_the_best_checkpoint_loads_with_plain_transformers(default_run: Path) -> None:
    """And says what it said when it was evaluated."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    best = default_run / "checkpoints" / "best"
    tokenizer = AutoTokenizer.from_pretrained(best)
    model = AutoModelForCausalLM.from_pretrained(best)
    store = Store(default_run / "loop.db")
    evaluated = store.query(
        "SELECT messages, text FROM candidate JOIN asked ON asked.id = asked_id "
        "JOIN prompt ON prompt.id = prompt_id "
        "WHERE purpose = 'greedy' AND checkpoint_id = :best LIMIT 20",
        best=best_checkpoint(store, "policy").id,
    )
    for row in evaluated:
        ids = tokenizer.apply_chat_template(
            json.loads(row["messages"]),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        answer = model.generate(**ids, max_new_tokens=8)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(answer, skip_special_tokens=True) == row["text"]
    assert len(evaluated) == 20


def test_the_pairs_were_held_to_the_reference_that_they_were_sampled_from(
    default_run: Path,
) -> None:
    """The engine's own log-probability and the trainer's reference agree on every pair."""
    rows = Store(default_run / "loop.db").query(
        "SELECT candidate.logprob AS sampled, chosen_reference_logprob AS held, tokens "
        "FROM trained_on JOIN example ON example.id = example_id "
        "JOIN candidate ON candidate.id = chosen_id WHERE candidate.logprob IS NOT NULL"
    )
    assert len(rows) > 1000
    assert max(abs(row["sampled"] - row["held"]) for row in rows) < 1e-3


def test_the_time_outside_policy_judge_and_trainer_is_small(default_run: Path) -> None:
    rows = report_rounds(Store(default_run / "loop.db"))["rounds"]
    outside = [row["outside"] for row in rows]
    print("outside policy, judge and trainer:", outside)
    assert max(outside) < 0.15  # seconds on a shared machine: the figure is in the README


@pytest.mark.slow
def test_planted_bad_rounds_are_rejected_and_the_run_goes_on_from_the_incumbent(
    tmp_path: Path,
) -> None:
    """Round 2 trains at a learning rate 100 times too high; that of round 3 gives NaN."""
    config = tmp_path / "loop.toml"
    config.write_text(f"""
rounds = 4
seed = 107
prompts = 320
[warmup.trainer]
epochs = 1.5
[trainer]
use = "{HERE}/planted.py:BadRounds"
bad = [2, 3]
times = [100.0, 1e30]
learning_rate = 6e-5
nll_weight = 2.0
epochs = 2
[gate]
patience = 3
""")
    done = loop("start", "--config", config, "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    root = only(tmp_path / "runs")
    first, *decisions = decided(root)
    assert first == (0, "accept", "first")
    assert decisions[0][1] == "accept", decisions
    assert decisions[1:3] == [(2, "reject", "paired bootstrap"), (3, "reject", "diverged")]
    made = Store(root / "loop.db").checkpoints("policy")
    good, spoilt, diverged, after = made[-4:]
    assert diverged.status == "diverged"
    assert spoilt.parent_id == diverged.parent_id == after.parent_id == good.id
