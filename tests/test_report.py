"""What the store says of a run: its rounds, an example's lineage, and whether it is sound."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from loop import config as configuration
from loop import gate, lineage, measure, plan, report, run, space
from loop.settings import Config
from loop.verify import verify
from roles.policy.embedded import build as build_model
from store import checkpoints
from store.database import Store
from store.errors import UserError
from store.records import (
    Candidate,
    Checkpoint,
    Completion,
    Decision,
    Dropped,
    Example,
    Group,
    Judgement,
    Message,
    Prompt,
    Sampling,
    Selection,
    Training,
    TrainingStep,
    Verdict,
)

SMALL = (
    "rounds=2",
    "prompts=6",
    "warmup.prompts=4",
    "generator.n=4",
    "generator.max_tokens=16",
    "batch_prompts=4",
    "evaluate.gate_prompts=5",
    "evaluate.test_prompts=6",
    "evaluate.samples=2",
    "evaluate.max_tokens=16",
)
SAMPLING = Sampling(temperature=1.0, max_tokens=16)
WRONG = {1: 9, 2: 2}
"""Round -> every so manieth answer of its checkpoint is wrong."""


def prompts(split: str, first: int, count: int) -> list[Prompt]:
    return [
        Prompt(
            messages=(Message(role="user", content=f"What is {n} + 1?"),),
            reference=str(n + 1),
            task="chain_sum",
            split=split,
        )
        for n in range(first, first + count)
    ]


class Builder:
    """Fills a store as the graph would, with the store's own methods."""

    def __init__(self, root: Path, config: Config) -> None:
        self.root, self.config, self.store = root, config, Store(root / run.DATABASE)
        self.judge = config.evaluate.judge.label

    def fill(self) -> None:
        self.warm_up()
        for number in range(1, self.config.rounds + 1):
            self.turn(number)
        ending = Decision(decision="stop", rule="rounds", reason="2 rounds are done")
        self.store.set_status("done", ending)
        checkpoints.link_best(self.root, self.store.incumbent("policy").path)
        self.store.close()

    def warm_up(self) -> None:
        store = self.store
        round = store.open_round(0, "propose")
        base = self.weights(self.root / "checkpoints" / "embedded-policy", b"base")
        base = store.add_checkpoint(round.id, replace(base, status="accepted"))
        store.add_prompts(prompts("gate", 1000, 5))
        store.add_prompts(prompts("test", 2000, 6))
        rows = (round.id, "warmup", "train")
        store.ask(*rows, prompts("train", 0, 4), 4)
        groups = store.groups(*rows)
        answers = {
            each.asked_id: [Completion(text=each.prompt.reference, token_ids=(5, 6))]
            for each in groups
        }
        store.add_candidates(*rows, None, answers)
        self.conclude(rows)
        made = [
            Example(
                kind="demonstration",
                asked_id=each.asked_id,
                prompt=each.prompt,
                chosen=each.candidates[0],
                rule="everything",
            )
            for each in store.groups(*rows)
        ]
        store.add_selection(round.id, "warmup", Selection(examples=tuple(made), dropped=()))
        checkpoint = self.train(round.id, 0, base, ["warmup"])
        self.evaluate(round.id, checkpoint, wrong_every=2)
        decision = gate.first(checkpoint, base)
        self.close(round.id, decision)

    def turn(self, number: int) -> None:
        store = self.store
        round = store.open_round(number, "propose")
        incumbent = store.incumbent("policy")
        rows = (round.id, "main", "train")
        store.ask(*rows, prompts("train", 100 * number, 6), 4)
        for batch in store.unsampled(*rows):
            groups = store.groups(*rows, batch)
            answers = {each.asked_id: self.answers(each, 4, number, 3) for each in groups}
            store.add_candidates(*rows, incumbent.id, answers)
        self.conclude(rows)
        self.select(round.id)
        checkpoint = self.train(round.id, number, incumbent, ["main"])
        self.evaluate(round.id, checkpoint, WRONG[number])
        new, old = (store.scores(each.id, "gate", self.judge) for each in (checkpoint, incumbent))
        self.close(
            round.id, gate.decide(self.config.gate, checkpoint, incumbent, new, old, seed=number)
        )

    def answers(self, group: Group, count: int, seed: int, wrong_every: int) -> list[Completion]:
        found = []
        for index in range(count):
            wrong = (int(group.prompt.reference) + index) % wrong_every == 0
            text = "never" if wrong else group.prompt.reference
            ids = (7, 8 + index, 9) if wrong else (3, 4 + index)
            sampled = {"seed": seed * 100 + index, "sampling": SAMPLING, "logprob": -1.25 - index}
            found.append(Completion(text=text, token_ids=ids, **sampled))
        return found

    def conclude(self, rows: tuple[int, str, str]) -> None:
        for batch in self.store.unjudged(*rows, self.judge):
            groups = self.store.groups(*rows, batch)
            made = [self.judgement(group, one) for group in groups for one in group.candidates]
            self.store.add_judgements(*rows, self.judge, "1", None, made)

    def judgement(self, group: Group, candidate: Candidate) -> Judgement:
        said = {"candidate_id": candidate.id, "raw": f"the answer {candidate.text!r}"}
        if candidate.index == 3 and group.prompt.reference.endswith("3"):
            verdict = Verdict(**said, status="unparsed")
            reason = "no answer found"
            return Judgement(
                candidate_id=candidate.id,
                score=None,
                status="unparsed",
                reason=reason,
                verdicts=(verdict,),
            )
        score = float(candidate.text == group.prompt.reference)
        return Judgement(
            candidate_id=candidate.id,
            score=score,
            verdicts=(Verdict(**said, value=score, seconds=0.001),),
        )

    def select(self, round_id: int) -> None:
        rows = (round_id, "main", "train")
        judged = {each.candidate_id: each for each in self.store.judgements(*rows, self.judge)}
        made, dropped = [], []
        for group in self.store.groups(*rows):
            scored = [each for each in group.candidates if judged[each.id].score is not None]
            right = [each for each in scored if judged[each.id].score == 1.0]
            wrong = [each for each in scored if judged[each.id].score == 0.0]
            if not right or not wrong:
                dropped.append(Dropped(asked_id=group.asked_id, reason="all right"))
                continue
            made.append(
                Example(
                    kind="pair",
                    asked_id=group.asked_id,
                    prompt=group.prompt,
                    chosen=right[0],
                    rejected=wrong[0],
                    margin=1.0,
                    rule="right_wrong",
                    chosen_judgement_id=judged[right[0].id].id,
                    rejected_judgement_id=judged[wrong[0].id].id,
                )
            )
        if len(made) > 4:  # so that there is always one that was dropped
            dropped += [Dropped(asked_id=each.asked_id, reason="margin") for each in made[4:]]
            made = made[:4]
        self.store.add_selection(
            round_id, "main", Selection(examples=tuple(made), dropped=tuple(dropped))
        )

    def weights(self, final: Path, content: bytes, parent: Checkpoint | None = None) -> Checkpoint:
        part = checkpoints.aside(final)
        part.mkdir(parents=True)
        (part / "model.safetensors").write_bytes(content)
        (part / "config.json").write_text("{}")
        checkpoints.publish(final)
        return checkpoints.measure(final, "policy", parent_id=None if parent is None else parent.id)

    def train(self, round_id: int, number: int, start: Checkpoint, tracks: list[str]) -> Checkpoint:
        examples = self.store.examples(round_id, tracks)
        steps = tuple(
            TrainingStep(
                step=step,
                loss=0.7 - 0.01 * step,
                metrics={"rewards/margins": 0.01 * step, "grad_norm": 1.0},
            )
            for step in range(1, 21)
        )
        held_to = {each.id: (-1.5, None if each.rejected is None else -2.5) for each in examples}
        training = Training(status="trained", steps=steps, reference_logprobs=held_to)
        made = self.weights(
            checkpoints.folder(self.root, number, "policy"), b"weights %d" % number, start
        )
        return self.store.add_checkpoint(round_id, made, training, examples)

    def evaluate(self, round_id: int, checkpoint: Checkpoint, wrong_every: int) -> None:
        store = self.store
        held_out = [*store.prompts("gate"), *store.prompts("test")]
        for purpose, count in (("sampled", 2), ("greedy", 1)):
            rows = (round_id, "policy", purpose)
            store.ask(*rows, held_out, 4)
            answers = {
                each.asked_id: self.answers(each, count, 7, wrong_every)
                for each in store.groups(*rows)
            }
            store.add_candidates(*rows, checkpoint.id, answers)
            self.conclude(rows)
        given = store.answers(round_id, "policy", self.judge)
        for split in ("gate", "test"):
            evaluations = measure.measure("policy", split, given, self.judge, seed=1)
            store.add_evaluations(round_id, checkpoint.id, evaluations)

    def close(self, round_id: int, decision: Decision) -> None:
        spent = {"generate": 6.0, "in policy": 5.5, "judge": 1.0, "in judge": 0.9, "train": 3.0}
        self.store.add_seconds(round_id, spent | {"in trainer": 2.6})
        status = gate.status_after(self.config.gate, decision)
        self.store.close_round(round_id, "done", [decision], {decision.checkpoint_id: status})


def build(runs: Path, *sets: str) -> Path:
    """A finished run of a warm-up and two rounds."""
    config = configuration.read(sets=[*SMALL, *sets])
    root = run.begin(config, runs, "built", run.load_roles(config))
    Builder(root, config).fill()
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, do not change it."""
    return build(tmp_path_factory.mktemp("finished") / "runs")


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / finished.name, symlinks=True))


@pytest.fixture
def store(finished: Path):
    opened = Store(finished / run.DATABASE)
    yield opened
    opened.close()


# Rounds


def test_rounds_say_what_the_rows_say(store: Store) -> None:
    found = report.rounds(store)
    assert [each["number"] for each in found["rounds"]] == [0, 1, 2]
    for each in found["rounds"][1:]:
        asked = "FROM asked JOIN round ON round.id = round_id WHERE number = :number"
        train = f"{asked} AND purpose = 'train'"
        counted = {
            "prompts": f"SELECT count(*) {train}",
            "candidates": "SELECT count(*) FROM candidate WHERE asked_id IN "
            f"(SELECT asked.id {train})",
            "unscored": "SELECT count(*) FROM judgement WHERE score IS NULL AND candidate_id IN "
            f"(SELECT id FROM candidate WHERE asked_id IN (SELECT asked.id {train}))",
            "examples": f"SELECT count(*) FROM example WHERE asked_id IN (SELECT asked.id {train})",
            "generated_tokens": "SELECT sum(tokens) FROM candidate WHERE asked_id IN "
            f"(SELECT asked.id {asked})",
        }
        for name, sql in counted.items():
            assert each[name] == store.query(sql, number=each["number"])[0].popitem()[1], name
        assert each["prompts"] == each["dropped"] + each["examples"]
        assert sum(each["reasons"].values()) == each["dropped"] > 0
        model = each["models"][0]
        assert model["gate"]["accuracy_sampled"]["n"] == 5
        assert model["test"]["accuracy_greedy"]["n"] == 6
        assert model["decision"] in ("accept", "undecided", "reject")
        assert model["numbers"]["prompts"] == 5


def test_time_outside_the_roles_is_not_counted_twice_for_the_judge_stage(store: Store) -> None:
    found = report.rounds(store)["rounds"][1]
    assert found["seconds"] == {"generate": 6.0, "judge": 1.0, "train": 3.0}
    assert found["outside"] == pytest.approx(0.1)


def test_a_round_without_times_has_no_share() -> None:
    assert report.outside({}) is None


def test_one_round_in_depth(store: Store) -> None:
    found = report.show(store, 2)
    assert found["tracks"]["main"]["asked"] == 6
    assert set(found["evaluating"]) == {"sampled:policy", "greedy:policy"}
    assert [each["decision"] for each in found["decisions"]][-1] == "stop"
    training = found["training"][0]
    assert (training["steps"], training["first_loss"]) == (20, pytest.approx(0.69))
    assert [step["step"] for step in training["curve"]][:: len(training["curve"]) - 1] == [1, 20]
    assert training["curve"][0]["metrics"]["rewards/margins"] == pytest.approx(0.01)
    assert training["examples"] == found["examples"]
    sample = found["samples"][0]
    assert (sample["chosen_score"], sample["rejected_score"], sample["margin"]) == (1.0, 0.0, 1.0)
    assert sample["messages"][0]["content"].startswith("What is 20")
    with pytest.raises(UserError, match="no round 9; the run has 3 rounds, from 0"):
        report.show(store, 9)


def test_what_is_reported_is_json(store: Store) -> None:
    for found in (
        report.rounds(store),
        report.show(store, 1),
        report.status(store, alive=False),
        lineage.why(store, 5),
        verify(store),
    ):
        assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("propose", (1, 1, "tracks")),
        ("generate", (4, 6, "prompts")),
        ("judge", (0, 16, "candidates")),
        ("filter", (0, 1, "tracks")),
        ("train", (0, 1, "models")),
        ("evaluate", (0, 33, "candidates")),
        ("gate", (None, None, None)),
    ],
)
def test_status_says_how_far_a_stage_is(
    copied: Path, stage: str, expected: tuple[int | None, int | None, str | None]
) -> None:
    store = Store(copied / run.DATABASE)
    builder = Builder(copied, configuration.validate(store.run().config))
    round = store.open_round(3, "propose")
    rows = (round.id, "main", "train")
    store.ask(*rows, prompts("train", 300, 6), 4)
    first = store.groups(*rows, 0)
    answers = {each.asked_id: builder.answers(each, 4, 3, 3) for each in first}
    store.add_candidates(*rows, store.incumbent("policy").id, answers)
    store.set_stage(round.id, stage)
    found = report.status(store, alive=True)
    assert (found["done"], found["total"], found["unit"]) == expected
    assert (found["round"], found["stage"], found["rounds_done"]) == (3, stage, 2)
    builder.store.close()
    store.close()


# Lineage


def test_a_pair_leads_back_to_its_prompt_and_on_to_the_checkpoint(store: Store) -> None:
    pair = store.query("SELECT min(id) AS id FROM example WHERE kind = 'pair'")[0]["id"]
    found = lineage.why(store, pair)
    assert found["example"]["rule"] == "right_wrong"
    assert found["prompt"]["messages"][0]["content"].startswith("What is 10")
    chosen, rejected = found["candidates"]
    assert (chosen["text"], chosen["judgement"]["score"]) == (found["prompt"]["reference"], 1.0)
    assert (rejected["text"], rejected["judgement"]["score"]) == ("never", 0.0)
    assert rejected["verdicts"][0]["raw"] == "the answer 'never'"
    assert chosen["written_by"] == {
        "checkpoint": 2,
        "model": "policy",
        "round": 0,
        "path": "checkpoints/round-0000-policy",
        "status": "accepted",
    }
    assert chosen["sampling"]["max_tokens"] == 16
    learner = found["learned_by"][0]
    assert (learner["checkpoint"], learner["chosen_reference_logprob"]) == (3, -1.5)
    assert learner["decisions"][0]["rule"] == "paired bootstrap"


def test_a_demonstration_was_written_by_nobody(store: Store) -> None:
    found = lineage.why(store, 1)
    assert found["example"]["kind"] == "demonstration"
    assert [each["written_by"] for each in found["candidates"]] == [None]
    assert found["candidates"][0]["judgement"] is None
    assert found["candidates"][0]["judgements"][0]["score"] == 1.0


def test_a_comparison_is_shown_on_both_sides(copied: Path) -> None:
    store = Store(copied / run.DATABASE)
    pair = store.query("SELECT * FROM example WHERE kind = 'pair' LIMIT 1")[0]
    store.close()
    change(
        copied,
        "INSERT INTO verdict (candidate_id, other_candidate_id, round_id, judge, judge_version, "
        f'raw, status, value, "order", vote) VALUES ({pair["chosen_id"]}, {pair["rejected_id"]}, '
        "2, 'pairwise', '1', 'the first is better', 'ok', 1.0, 0, 0)",
    )
    store = Store(copied / run.DATABASE)
    for side in lineage.why(store, pair["id"])["candidates"]:
        assert side["verdicts"][-1]["raw"] == "the first is better"
    store.close()


def test_an_unknown_example_is_answered_with_those_there_are(store: Store) -> None:
    with pytest.raises(UserError, match=r"no example 999; .* has examples 1 to \d+"):
        lineage.why(store, 999)
    for beyond in (2**63, -(2**63) - 1):
        with pytest.raises(UserError, match=rf"no example {beyond}; "):
            lineage.why(store, beyond)


@pytest.mark.parametrize(
    "sql",
    [
        *(
            value
            for value in vars(lineage).values()
            if isinstance(value, str) and "SELECT" in value
        ),
        report.EXAMPLES,
        report.ANSWERED,
        report.TRAINING_STEPS,
    ],
)
def test_no_question_of_a_reading_command_reads_a_whole_table(store: Store, sql: str) -> None:
    named = ("example", "prompt", "candidate", "asked", "round", "checkpoint", "track", "count")
    steps = store.query(f"EXPLAIN QUERY PLAN {sql}", **dict.fromkeys(named, 1))
    small = ("SCAN decision", "SCAN round", "SCAN checkpoint", "SCAN made")
    read_whole = [
        step["detail"]
        for step in steps
        if step["detail"].startswith("SCAN ") and not step["detail"].startswith(small)
    ]
    assert read_whole in ([], ["SCAN CONSTANT ROW"])


# Plan


def test_the_gate_tells_what_the_design_says_it_tells() -> None:
    assert plan.detectable(270, 4) == pytest.approx(0.05, abs=0.0005)
    assert plan.detectable(1670, 4) == pytest.approx(0.02, abs=0.0002)


def test_a_plan_bounds_the_tokens(tmp_path: Path) -> None:
    config = configuration.read(sets=SMALL)
    found = plan.plan(config, run.load_roles(config))
    main, evaluation = found["tracks"][0], found["evaluation"]
    (warmup,), own = found["warmup"], config.tracks(0)["warmup"].generator.options
    assert (warmup["candidates"], warmup["generated_tokens"]) == (4 * own.get("n", 1), 0)
    assert (main["candidates"], main["generated_tokens"]) == (6 * 4, 6 * 4 * 16)
    assert (evaluation["candidates"], evaluation["generated_tokens"]) == (33, 33 * 16)
    assert found["generated_tokens"] == {
        "warmup": 33 * 16,
        "round": (24 + 33) * 16,
        "run": (33 + 2 * (24 + 33)) * 16,
    }
    assert found["disk"] == space.needed(config, run.load_roles(config)).total


def test_a_plan_does_not_guess_what_a_generator_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Mine:\n    def generate(self, prompts, policy, call):\n        return []\n"
    )
    build_model(tmp_path / "model", seed=0)
    sets = [f"generator.use={tmp_path}/mine.py:Mine", f"model.path={tmp_path}/model"]
    small = [each for each in SMALL if not each.startswith("generator.")]
    config = configuration.read(sets=[*small, *sets])
    found = plan.plan(config, run.load_roles(config))
    assert found["warmup"] == []
    assert found["tracks"][0]["generated_tokens"] is None
    assert found["generated_tokens"]["run"] is None
    assert found["disk"] > 4 * (tmp_path / "model/model.safetensors").stat().st_size


# Verify


def change(root: Path, *statements: str) -> None:
    """Write past the store and every key."""
    connection = sqlite3.connect(root / run.DATABASE)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def problems(root: Path) -> dict[str, list[str]]:
    store = Store(root / run.DATABASE)
    found = verify(store)
    store.close()
    wrong = {each["check"]: each["problems"] for each in found["checks"] if each["problems"]}
    assert found["ok"] == (not wrong)
    return wrong


def test_a_run_as_the_loop_leaves_it_is_sound(store: Store) -> None:
    found = verify(store)
    assert [each for each in found["checks"] if each["problems"]] == []
    assert all(each["rows"] > 0 for each in found["checks"])


PAIR = "(SELECT min(id) FROM example WHERE kind = 'pair')"
PLANTED = {
    "every key names a row": ("UPDATE candidate SET checkpoint_id = 999 WHERE id = 20",),
    "counts of rounds": ("DELETE FROM verdict WHERE id = 30",),
    "every prompt an example or dropped": ("DELETE FROM dropped WHERE id = 1",),
    "no prompt both an example and dropped": (
        "INSERT INTO dropped (asked_id, reason) SELECT asked_id, 'tie' FROM example LIMIT 1",
    ),
    "every asked prompt is answered": (
        "INSERT INTO asked (round_id, prompt_id, track, purpose, batch) "
        "VALUES (1, 20, 'main', 'train', 0)",
    ),
    "numbered 0 to n-1": ('UPDATE candidate SET "index" = 17 WHERE id = 20',),
    "token ids as many as said": ("UPDATE candidate SET tokens = tokens + 1 WHERE id = 20",),
    "judged at most once": (
        "INSERT INTO judgement (candidate_id, round_id, judge, judge_version, score, status) "
        "SELECT candidate_id, 3, judge, '1', 0.5, 'ok' FROM judgement WHERE id = 1",
    ),
    "a score exactly when": ("UPDATE judgement SET score = NULL WHERE id = 1",),
    "trained on train prompts": (
        "UPDATE prompt SET split = 'test' WHERE id = "
        "(SELECT prompt_id FROM asked WHERE purpose = 'train' LIMIT 1)",
    ),
    "sides of an example": (f"UPDATE example SET rejected_id = chosen_id WHERE id = {PAIR}",),
    "made of answers of a later round": (
        f"UPDATE example SET chosen_id = (SELECT max(id) FROM candidate) WHERE id = {PAIR}",
    ),
    "margins are": (f"UPDATE example SET margin = 0.5 WHERE id = {PAIR}",),
    "same or earlier rounds": (
        "INSERT INTO trained_on SELECT 3, max(id), -1.0, -2.0 FROM example",
    ),
    "parents of checkpoints": ("UPDATE checkpoint SET parent_id = NULL WHERE id = 3",),
    "digests of prompts": (
        "UPDATE prompt SET messages = replace(messages, 'What', 'that') WHERE id = 2",
    ),
}


@pytest.mark.parametrize("check", PLANTED)
def test_verify_finds_what_was_planted(copied: Path, check: str) -> None:
    change(copied, *PLANTED[check])
    found = problems(copied)
    assert [name for name in found if check in name], found


def test_verify_finds_a_question_that_two_splits_ask_under_different_system_prompts(
    copied: Path,
) -> None:
    store = Store(copied / run.DATABASE)
    held = store.prompts("test")[0]
    turns = (Message(role="system", content="Take care."), *held.messages)
    store.add_prompts([replace(held, id=None, split="train", messages=turns)])
    store.close()
    (found,) = problems(copied).items()
    assert found[0] == "splits have no question in common"
    assert re.fullmatch(rf"prompt \d+: of train, asks what {held.id} of test asks", found[1][0])


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (f"UPDATE example SET chosen_id = 1 WHERE id = {PAIR}", "sides of an example"),
        (f"UPDATE example SET chosen_judgement_id = 1 WHERE id = {PAIR}", "margins are"),
        ("UPDATE round SET counts = '{}' WHERE number = 1", "counts of rounds"),
        ("DELETE FROM candidate WHERE asked_id = 12", "every asked prompt is answered"),
        ("DELETE FROM checkpoint WHERE id = 4", "every key names a row"),
        ("UPDATE prompt SET messages = '[1' WHERE id = 2", "digests of prompts"),
        ("UPDATE candidate SET trained_mask = x'01' WHERE id = 20", "token ids"),
    ],
)
def test_verify_finds_other_ways_to_be_wrong(copied: Path, statement: str, words: str) -> None:
    change(copied, statement)
    assert [name for name in problems(copied) if words in name]


def test_verify_finds_weights_that_changed_or_are_gone(copied: Path) -> None:
    (copied / "checkpoints/round-0001-policy/model.safetensors").write_bytes(b"others")
    shutil.rmtree(copied / "checkpoints/round-0002-policy")
    (found,) = problems(copied).values()
    assert "round-0001-policy is not what was recorded" in found[0]
    assert "round-0002-policy is not there" in found[1]


def test_pruned_weights_may_be_gone(copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints/round-0001-policy")
    change(copied, "UPDATE checkpoint SET status = 'pruned' WHERE id = 3")
    assert problems(copied) == {}


def test_verify_finds_what_a_finished_round_left_over(copied: Path) -> None:
    (copied / "checkpoints/round-0001-policy.part").mkdir()
    (copied / "checkpoints/round-0003-policy.part").mkdir()  # of a round that is to come
    (found,) = problems(copied).values()
    assert found == ["checkpoints/round-0001-policy.part: left over in a finished round"]


def test_verify_finds_a_damaged_file_and_says_no_more(copied: Path) -> None:
    connection = sqlite3.connect(copied / run.DATABASE)
    page = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'verdict'")
    size = connection.execute("PRAGMA page_size").fetchone()[0]
    at = (page.fetchone()[0] - 1) * size
    connection.close()
    with (copied / run.DATABASE).open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 200)
    assert list(problems(copied)) == ["the database file is sound"]


def test_verify_names_a_hundred_problems_and_counts_the_rest(copied: Path) -> None:
    change(copied, "UPDATE candidate SET tokens = 0")
    store = Store(copied / run.DATABASE)
    check = next(each for each in verify(store)["checks"] if each["check"].startswith("token"))
    assert len(check["problems"]) == 100
    assert check["more"] == check["rows"] - 100
    store.close()


def test_a_run_that_is_being_driven_is_not_called_unsound(copied: Path) -> None:
    """Verifying takes many questions, between which a driver commits."""
    store, done = Store(copied / run.DATABASE), threading.Event()
    builder = Builder(copied, configuration.validate(store.run().config))
    round = builder.store.open_round(3, "propose")

    def drive() -> None:
        writer, rows = builder.store.incumbent("policy").id, (round.id, "main", "train")
        builder.store.ask(*rows, prompts("train", 5000, 300), 2)
        for batch in builder.store.unsampled(*rows):
            if done.is_set():
                return
            groups = builder.store.groups(*rows, batch)
            answers = {each.asked_id: builder.answers(each, 4, 3, 3) for each in groups}
            builder.store.add_candidates(*rows, writer, answers)
            builder.conclude(rows)

    driver = threading.Thread(target=drive)
    driver.start()
    try:
        while driver.is_alive():
            assert [each for each in verify(store)["checks"] if each["problems"]] == []
    finally:
        done.set()
        driver.join()
        builder.store.close()
        store.close()
