"""Proposers: prompts that are new, never held out, and the same every time."""

import json
import time
from dataclasses import dataclass

import pytest
from reasoning_gym.factory import DATASETS

from judges.verifier import Verifier
from roles.proposers.dataset import Dataset
from roles.proposers.gym_tasks import COLUMN, REFUSED
from roles.proposers.reasoning_gym import ReasoningGym
from store.errors import UserError
from store.records import Call, Candidate, Group


@dataclass(frozen=True)
class Past:
    """What a run has done so far, as a proposer may ask it."""

    was_asked: frozenset[str] = frozenset()
    was_held_out: frozenset[str] = frozenset()

    def asked(self):
        return self.was_asked

    def held_out(self):
        return self.was_held_out


def digests(prompts):
    return [prompt.digest for prompt in prompts]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(path, count, start=0):
    rows = [{"prompt": f"What is {i} + 1?", "answer": i + 1} for i in range(start, start + count)]
    return write(path, *rows)


def propose(proposer, count, split="train", past=Past(), call=Call(seed=4)):  # noqa: B008
    return proposer.propose(count, split, past, None, call)


# dataset (its formats: test_dataset.py)


def test_a_line_is_a_prompt_with_its_answer_task_and_other_columns(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "1 + 1?", "answer": 2, "task": "sums", "level": 3},
        {
            "prompt": [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}],
            "answer": None,
        },
    )
    first, second = propose(Dataset(path, shuffle=False), 2)
    assert (first.messages[0].role, first.messages[0].content) == ("user", "1 + 1?")
    assert (first.reference, first.task, first.columns) == ("2", "sums", {"level": 3})
    assert [message.role for message in second.messages] == ["system", "user"]
    assert second.reference is None


def test_columns_can_have_other_names_and_there_may_be_no_answer(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "Why?", "gold": "So."})
    (prompt,) = propose(Dataset(path, prompt="question", reference="gold"), 1)
    assert prompt.reference == "So."
    (prompt,) = propose(Dataset(path, prompt="question", reference=""), 1)
    assert (prompt.reference, prompt.columns) == (None, {"gold": "So."})


def test_half_a_character_in_a_line_does_not_stop_a_run(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a\\ud800", "answer": "\\udfff"}')
    (found,) = propose(Dataset(path), 1)
    assert (found.messages[0].content, found.reference) == ("a\ufffd", "\ufffd")
    assert found.digest


def test_a_missing_file_is_the_users_mistake(tmp_path):
    for name in ("none.jsonl", "none"):
        with pytest.raises(UserError, match="No such file"):
            Dataset(tmp_path / name)


def test_training_prompts_are_new_until_all_were_asked_and_then_come_round(tmp_path):
    proposer = Dataset(questions(tmp_path / "a.jsonl", 10))
    asked: frozenset[str] = frozenset()
    rounds = []
    for number in range(1, 6):
        found = digests(propose(proposer, 4, past=Past(asked), call=Call(seed=4, round=number)))
        assert len(set(found)) == 4
        rounds.append(found)
        asked |= set(found)
    assert len(set(rounds[0] + rounds[1])) == 8
    assert set(rounds[2]) - set(rounds[0] + rounds[1])
    assert len(asked) == 10
    assert set(rounds[3]) != set(rounds[4])


def test_the_order_hangs_on_the_runs_seed_and_not_on_the_round(tmp_path):
    proposer = Dataset(questions(tmp_path / "a.jsonl", 30))
    first = propose(proposer, 30, call=Call(seed=4, round=1))
    assert first == propose(proposer, 30, call=Call(seed=4, round=2, stage="propose"))
    assert first != propose(proposer, 30, call=Call(seed=5, round=1))
    unshuffled = propose(Dataset(tmp_path / "a.jsonl", shuffle=False), 3)
    assert [prompt.reference for prompt in unshuffled] == ["1", "2", "3"]


def test_gate_test_and_train_of_one_file_are_disjoint(tmp_path):
    proposer = Dataset(questions(tmp_path / "a.jsonl", 20))
    gate = propose(proposer, 5, "gate")
    test = propose(proposer, 6, "test", Past(was_held_out=frozenset(digests(gate))))
    held_out = frozenset(digests(gate + test))
    train = propose(proposer, 99, past=Past(was_held_out=held_out))
    assert (len(gate), len(test), len(train)) == (5, 6, 9)
    assert len({*held_out, *digests(train)}) == 20
    assert {prompt.split for prompt in gate} == {"gate"}
    assert gate == propose(proposer, 5, "gate", call=Call(seed=99, round=7))


def test_what_is_held_out_does_not_hang_on_the_order_of_lines(tmp_path):
    path = questions(tmp_path / "a.jsonl", 20)
    gate = propose(Dataset(path), 5, "gate")
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert gate == propose(Dataset(path), 5, "gate")


def test_a_file_too_small_to_hold_out_from_says_so_with_numbers(tmp_path):
    proposer = Dataset(questions(tmp_path / "a.jsonl", 5))
    with pytest.raises(UserError, match=r"has 5 different prompts, of which 0 .* holding out 5"):
        propose(proposer, 5, "gate")
    everything = Past(was_held_out=frozenset(digests(propose(proposer, 5))))
    with pytest.raises(UserError, match="none is left to train on"):
        propose(proposer, 1, past=everything)


def test_gate_and_test_can_have_files_of_their_own(tmp_path):
    proposer = Dataset(
        questions(tmp_path / "train.jsonl", 6),
        gate_path=questions(tmp_path / "gate.jsonl", 4, start=4),
        test_path=questions(tmp_path / "test.jsonl", 3, start=7),
    )
    gate = propose(proposer, 4, "gate")
    assert {prompt.reference for prompt in gate} == {"5", "6", "7", "8"}
    held_out = frozenset(digests(gate))
    test = propose(proposer, 9, "test", Past(was_held_out=held_out))
    assert {prompt.reference for prompt in test} == {"9", "10"}
    train = propose(proposer, 9, past=Past(was_held_out=held_out))
    assert {prompt.reference for prompt in train} == {"1", "2", "3", "4"}


def test_anchor_prompts_are_held_out_or_have_a_file_of_their_own_too(tmp_path):
    train = questions(tmp_path / "train.jsonl", 6)
    held_out = propose(Dataset(train), 2, "anchor")
    assert [(len(held_out), prompt.split) for prompt in held_out] == [(2, "anchor")] * 2
    own = Dataset(train, anchor_path=questions(tmp_path / "anchor.jsonl", 3, start=90))
    assert [prompt.reference for prompt in propose(own, 9, "anchor")] == ["91", "92", "93"]


def test_a_prompt_that_is_there_twice_is_asked_once_and_the_file_is_named(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", *[{"prompt": "Hi", "answer": "x"}] * 3)
    assert len(propose(Dataset(path), 5)) == 1
    assert "2 prompts repeat an earlier one" in caplog.text


# reasoning_gym


def test_prompts_are_different_new_and_the_same_every_time():
    proposer = ReasoningGym([{"name": "chain_sum"}, {"name": "gcd", "weight": 3}])
    first = propose(proposer, 200)
    assert first == propose(
        ReasoningGym([{"name": "chain_sum"}, {"name": "gcd", "weight": 3}]), 200
    )
    assert len(set(digests(first))) == 200
    shares = [prompt.task for prompt in first].count("gcd") / 200
    assert 0.65 < shares < 0.85
    past = Past(frozenset(digests(first[:100])), frozenset(digests(first[100:])))
    assert set(digests(propose(proposer, 200, past=past))).isdisjoint(digests(first))


def test_splits_rounds_and_seeds_draw_different_prompts():
    proposer = ReasoningGym([{"name": "chain_sum"}])
    draws = [
        digests(propose(proposer, 20, split, call=call))
        for split in ("train", "gate", "test")
        for call in (Call(seed=1, round=1), Call(seed=1, round=2), Call(seed=2, round=1))
    ]
    assert len({digest for draw in draws for digest in draw}) == 20 * len(draws)


def test_an_instruction_stands_under_the_question():
    proposer = ReasoningGym([{"name": "gcd"}], instruction="Answer with the number alone.")
    (prompt,) = propose(proposer, 1)
    assert prompt.messages[-1].content.endswith("\n\nAnswer with the number alone.")


def test_a_system_prompt_stands_before_the_question():
    (prompt,) = propose(ReasoningGym([{"name": "gcd"}], system="Be brief."), 1)
    assert [(turn.role, turn.content) for turn in prompt.messages[:1]] == [("system", "Be brief.")]
    (without,) = propose(ReasoningGym([{"name": "gcd"}]), 1)
    assert prompt.messages[1:] == without.messages


SMALL = {"name": "chain_sum", "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_what_is_held_out_is_so_under_any_system_prompt(tmp_path):
    path = tmp_path / "a.jsonl"
    for held, given in ((None, "Be brief."), ("Be kind.", "Be brief."), ("Be kind.", None)):
        for make, count in (
            (lambda system: ReasoningGym([SMALL], system=system), 60),
            (lambda system: Dataset(questions(path, 100), system=system), 60),
        ):
            test = propose(make(held), count, "test")
            past = Past(was_held_out=frozenset(one.question_digest for one in test))
            train = propose(make(given), 40, past=past)
            assert len(train) == 40
            asked = {one.messages[-1].content for one in train}
            assert asked.isdisjoint(one.messages[-1].content for one in test)


def test_prompts_of_a_file_that_differ_in_system_prompts_are_in_one_split(tmp_path):
    rows = [
        [{"role": "system", "content": system}, {"role": "user", "content": f"What is {n} + 1?"}]
        for n in range(20)
        for system in ("Be brief.", "Be kind.", "Be right.")
    ]
    proposer = Dataset(write(tmp_path / "a.jsonl", *[{"prompt": turns} for turns in rows]))
    gate = propose(proposer, 10, "gate")
    past = Past(was_held_out=frozenset(one.question_digest for one in gate))
    train = propose(proposer, 99, past=past)
    assert len(gate) == 10
    held = {one.messages[-1].content for one in gate}
    assert len(train) == 3 * (20 - len(held))
    assert held.isdisjoint(one.messages[-1].content for one in train)


def test_a_small_task_gives_every_prompt_and_then_says_that_it_has_run_dry():
    proposer = ReasoningGym([SMALL])
    everything = propose(proposer, 150)
    held_out = Past(was_held_out=frozenset(digests(everything)))
    with pytest.raises(UserError, match=r"'chain_sum' has run dry: 1000 draws .* of 100 train"):
        propose(proposer, 100, past=held_out)


def test_prompts_asked_before_are_asked_again_only_when_no_other_is_left():
    proposer = ReasoningGym([SMALL])
    asked = frozenset(digests(propose(proposer, 150)))
    again = digests(propose(proposer, 150, past=Past(was_asked=asked), call=Call(seed=9)))
    assert len(set(again)) == 150
    repeats = [digest in asked for digest in again]
    assert repeats == sorted(repeats)
    assert not repeats[0]


def test_a_task_that_was_asked_whole_is_asked_again_however_large_it_is():
    """Far more prompts are left than come up while it is tried whether there is a new one."""

    class Everything:
        def __contains__(self, digest):
            return True

    words = {"name": "spell_backward", "min_word_len": 3, "max_word_len": 4}  # 6,592 of them
    again = propose(ReasoningGym([words]), 2500, past=Past(was_asked=Everything()))
    assert len(set(digests(again))) == 2500


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([], "at least one task"),
        ([{"min_terms": 2}], "a table with a name"),
        ([{"name": "chain_sums"}], "did you mean 'chain_sum'"),
        ([{"name": "chain_sum", "min_term": 2}], "did you mean 'min_terms'"),
        ([{"name": "chain_sum", "min_terms": 0}], "min_terms must be positive"),
        ([{"name": "chain_sum", "min_terms": "two"}], "does not accept"),
        ([{"name": "decimal_arithmetic", "max_num_decimal_places": 2}], "makes no entries"),
        ([{"name": "chain_sum", "weight": 0}], "a number above 0"),
        ([{"name": "chain_sum", "seed": 4}], "no option 'seed'"),
        ([{"name": "puzzle24"}], "cannot be used"),
    ],
)
def test_a_task_that_cannot_work_is_refused_at_the_start(tasks, words):
    with pytest.raises(UserError, match=words):
        ReasoningGym(tasks)


def test_a_thousand_simple_prompts_take_less_than_a_second():
    proposer = ReasoningGym([{"name": "chain_sum"}])
    began = time.perf_counter()
    propose(proposer, 1000)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("task", sorted(set(DATASETS) - set(REFUSED)))
def test_the_reference_of_every_task_is_right_after_a_round_trip_through_json(task):
    (prompt,) = propose(ReasoningGym([{"name": task}]), 1)
    assert json.loads(json.dumps(prompt.columns)) == prompt.columns
    candidate = Candidate(id=1, asked_id=1, index=0, text=prompt.reference, token_ids=(1,))
    group = Group(asked_id=1, prompt=prompt, candidates=(candidate,))
    (judgement,) = Verifier(answer="whole").judge([group], None, Call())
    assert (judgement.score, judgement.verdicts[0].raw[-8:]) == (1.0, "is right")


@pytest.mark.parametrize("task", sorted(set(REFUSED) - {"composite", "puzzle24"}))
def test_a_refused_task_still_deserves_it(task):
    dataset_class, options_class = DATASETS[task]
    dataset = dataset_class(options_class(seed=7, size=3))
    entry = dataset[0]
    kept = json.loads(json.dumps(entry, default=str))
    assert kept["answer"] is None or dataset.score_answer(kept["answer"], kept) < 1.0


def test_every_prompt_carries_what_its_scorer_needs():
    (prompt,) = propose(ReasoningGym([{"name": "chain_sum", "max_terms": 3}]), 1)
    assert prompt.columns[COLUMN]["task"] == prompt.task == "chain_sum"
    assert prompt.columns[COLUMN]["options"] == {"max_terms": 3}
