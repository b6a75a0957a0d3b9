"""Parts that look beyond their own round, in whole runs: what is asked, learned and counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from roles.protocols import History, Policy
from runs import SCRIPTED, loop, scripted_toml, start
from scripted import Sums, write_model
from store.database import Store
from store.errors import UserError
from store.records import Call, Completion, Message, Prompt, Sampling, Split

AGAIN = ["proposer.use=repeated", f'proposer.proposer={{use="{SCRIPTED}:Sums"}}']


class Asking(Sums):
    """Sums that somebody was asked first: what they said is kept in a column."""

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        prompts = super().propose(count, split, history, policy, call)
        if split != "train":
            return prompts
        seeds = [[call.seed_for(each.digest, n) for n in range(20)] for each in prompts]
        said = policy.sample(prompts, sampling=Sampling(temperature=1.0), seeds=seeds)
        return [
            Prompt(
                messages=each.messages,
                reference=each.reference,
                split=split,
                columns={
                    "right": sum(one.text == each.reference for one in own),
                    "tokens": sum(len(one.token_ids) for one in own),
                },
            )
            for each, own in zip(prompts, said, strict=True)
        ]


class Drafting:
    """Two answers, and one before them that nobody gets to see."""

    def generate(self, prompts: Any, policy: Policy, call: Call) -> list[list[Completion]]:
        seeds = [[call.seed_for(each.digest, n) for n in range(3)] for each in prompts]
        said = policy.sample(prompts, sampling=Sampling(temperature=1.0), seeds=seeds)
        return [own[1:] for own in said]


def query(root: Path, sql: str) -> list[dict[str, Any]]:
    store = Store(root / "loop.db")
    found = store.query(sql)
    store.close()
    return found


def test_examples_are_made_of_earlier_rounds_answers_learned_from_and_verified(
    tmp_path: Path,
) -> None:
    sets = [*AGAIN, "rounds=3", "filter.use=diverse", "filter.pairs=4", "generator.n=3"]
    root, outcome = start(scripted_toml(tmp_path), tmp_path / "runs", sets)
    assert outcome.code == 0, outcome.reason
    asked = query(
        root,
        "SELECT number, group_concat(prompt_id) AS prompts FROM asked "
        "JOIN round ON round.id = asked.round_id WHERE purpose = 'train' AND number > 0 "
        "GROUP BY number",
    )
    assert len(asked) == 3
    assert len({each["prompts"] for each in asked}) == 1
    mixed = query(
        root,
        "SELECT example.id AS id, chosen_asked.prompt_id AS prompt, asked.prompt_id AS own "
        "FROM example JOIN asked ON asked.id = example.asked_id "
        "JOIN candidate AS chosen ON chosen.id = example.chosen_id "
        "JOIN asked AS chosen_asked ON chosen_asked.id = chosen.asked_id "
        "WHERE chosen_asked.round_id < asked.round_id",
    )
    assert mixed
    assert all(each["prompt"] == each["own"] for each in mixed)
    learned = query(root, "SELECT example_id FROM trained_on")
    assert {each["id"] for each in mixed} <= {each["example_id"] for each in learned}
    told = json.loads(loop("why", str(mixed[0]["id"]), root, "--json").stdout)
    (chosen,) = [each for each in told["candidates"] if each["side"] == "chosen"]
    assert chosen["answered_in"] < told["example"]["round"]
    assert chosen["judgement"]["score"] == 1.0
    assert chosen["verdicts"]
    said = loop("why", str(mixed[0]["id"]), root).stdout
    assert f"when round {chosen['answered_in']} asked" in said
    for command in (("show", "2"), ("verify",)):
        ended = loop(*command, root)
        assert ended.returncode == 0, ended.stdout + ended.stderr


SMALL = '[{name="chain_sum",min_terms=2,max_terms=2,min_digits=1,max_digits=1}]'


def test_no_track_asks_what_is_held_out_under_another_system_prompt(tmp_path: Path) -> None:
    more = f"""
[warmup]
when = "always"
prompts = 50
trainer = "{SCRIPTED}:Learner"
[warmup.track.good]
proposer = {{ use = "reasoning_gym", tasks = {SMALL}, system = "Take care." }}
[warmup.track.bad]
proposer = {{ use = "reasoning_gym", tasks = {SMALL}, system = "Make mistakes." }}
[track.steered]
proposer = {{ use = "reasoning_gym", tasks = {SMALL}, system = "Take care." }}
"""
    sets = ["rounds=1", "proposer.use=reasoning_gym", f"proposer.tasks={SMALL}"]
    root, outcome = start(scripted_toml(tmp_path, more), tmp_path / "runs", sets)
    assert outcome.code == 0, outcome.reason
    asked = query(
        root,
        "SELECT split, track, purpose, messages FROM asked "
        "JOIN prompt ON prompt.id = asked.prompt_id",
    )
    turns = [json.loads(each["messages"]) for each in asked]
    held = {
        own[-1]["content"]
        for each, own in zip(asked, turns, strict=True)
        if each["split"] != "train"
    }
    assert len(held) == 100
    for track, most in (("good", 50), ("bad", 50), ("main", 24), ("steered", 24)):
        own = [
            said
            for each, said in zip(asked, turns, strict=True)
            if each["track"] == track and each["purpose"] == "train"
        ]
        assert len(own) == most
        assert [said[0]["role"] == "system" for said in own] == [track != "main"] * most
        assert held.isdisjoint(said[-1]["content"] for said in own)
    verified = loop("verify", root)
    assert verified.returncode == 0, verified.stdout


class Leaking(Sums):
    """Trains on what was to be held out, under a system prompt."""

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        if split != "train":
            return super().propose(count, split, history, policy, call)
        system = Message(role="system", content="Take care.")
        return [
            replace(each, id=None, split="train", messages=(system, *each.messages))
            for each in history.prompts("test")[:count]
        ]


def test_a_proposer_that_gives_a_question_that_is_held_out_stops_the_run(tmp_path: Path) -> None:
    sets = [f"proposer.use={__file__}:Leaking", "rounds=1"]
    root, outcome = start(scripted_toml(tmp_path), tmp_path / "runs", sets)
    assert outcome.code == 4
    assert "gave a prompt twice, or a question that is held out: '1 x " in outcome.reason
    assert query(root, "SELECT id FROM prompt WHERE split = 'train'") == []


def test_what_was_answered_wrong_is_asked_again_in_the_next_round(tmp_path: Path) -> None:
    more = f"""
[track.again]
proposer = {{ use = "mistakes", below = 1.0 }}
judge = "{SCRIPTED}:Exact"
filter = "right_wrong"
"""
    root, outcome = start(scripted_toml(tmp_path, more), tmp_path / "runs", ["rounds=2"])
    assert outcome.code == 0, outcome.reason
    rows = query(
        root,
        "SELECT number, track, prompt_id, min(score) AS least FROM asked "
        "JOIN round ON round.id = asked.round_id JOIN candidate ON candidate.asked_id = asked.id "
        "JOIN judgement ON judgement.candidate_id = candidate.id "
        "WHERE purpose = 'train' GROUP BY number, track, prompt_id",
    )
    wrong = {
        each["prompt_id"]
        for each in rows
        if (each["number"], each["track"]) == (1, "main") and each["least"] < 1
    }
    again = [each for each in rows if each["track"] == "again"]
    assert {each["number"] for each in again} == {2}
    assert wrong
    assert {each["prompt_id"] for each in again} == wrong


@pytest.mark.parametrize(
    ("model", "rights"),
    [
        (None, "rising"),
        ("model:teacher", "all"),
        ("base:policy", "few"),
        ("checkpoint:base", "few"),
        ("checkpoint:{folder}/good", "all"),
    ],
)
def test_a_proposer_asks_the_model_that_it_is_told_to(
    tmp_path: Path, model: str | None, rights: str
) -> None:
    write_model(tmp_path / "good", 1.0)
    sets = [f"proposer.use={__file__}:Asking", "rounds=3"]
    if model == "model:teacher":
        sets.append(f"models.teacher.path={tmp_path}/good")
    if model is not None:
        sets.append(f"proposer.model={model.format(folder=tmp_path)}")
    root, outcome = start(scripted_toml(tmp_path), tmp_path / "runs", sets)
    assert outcome.code == 0, outcome.reason
    rows = query(
        root,
        "SELECT number, avg(json_extract(columns, '$.right')) / 20 AS share, "
        "sum(json_extract(columns, '$.tokens')) AS tokens, json_extract(counts, "
        "'$.\"train:main\".proposed_tokens') AS counted FROM round "
        "JOIN asked ON asked.round_id = round.id JOIN prompt ON prompt.id = asked.prompt_id "
        "WHERE purpose = 'train' AND number > 0 GROUP BY number ORDER BY number",
    )
    shares = [each["share"] for each in rows]
    assert all(each["tokens"] == each["counted"] > 0 for each in rows)
    match rights:
        case "all":
            assert shares == [1.0] * 3
        case "few":
            assert all(share == pytest.approx(0.3, abs=0.08) for share in shares)
        case "rising":
            assert shares[0] < shares[1] < shares[2]


def test_what_a_generator_sampled_and_did_not_give_is_counted(tmp_path: Path) -> None:
    sets = [f"generator.use={__file__}:Drafting", "rounds=1"]
    root, outcome = start(scripted_toml(tmp_path), tmp_path / "runs", sets)
    assert outcome.code == 0, outcome.reason
    (hidden,) = query(
        root, "SELECT sum(json_extract(counts, '$.\"train:main\".making_tokens')) AS n FROM round"
    )
    (given,) = query(root, "SELECT sum(tokens) AS n FROM candidate")
    assert hidden["n"] > 0
    store = Store(root / "loop.db")
    assert store.generated_tokens() == given["n"] + hidden["n"]
    store.close()
    verified = loop("verify", root)
    assert verified.returncode == 0, verified.stdout


@pytest.mark.parametrize(
    "proposer",
    [
        '{use="mistakes",track="mane"}',
        '{use="self_instruct",proposer={use="mistakes",track="mane"}}',
        '{use="extending",track="mane"}',
    ],
)
def test_a_track_that_a_proposer_looks_at_and_is_not_there_is_told_at_the_start(
    tmp_path: Path, proposer: str
) -> None:
    sets = [f"track.again.proposer={proposer}"]
    with pytest.raises(UserError, match=r"track 'mane' answered, .* not there; there are: main"):
        start(scripted_toml(tmp_path), tmp_path / "runs", sets)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("judge", ["length", '{use="rubric",model="round"}'])
def test_a_judge_of_the_anchors_asks_a_model_of_the_run(tmp_path: Path, judge: str) -> None:
    sets = ["evaluate.anchors.prompts=10", f"evaluate.anchors.judge={judge}"]
    with pytest.raises(UserError, match=r"its model is one of model:policy, found "):
        start(scripted_toml(tmp_path), tmp_path / "runs", sets)
