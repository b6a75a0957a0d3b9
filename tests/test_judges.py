"""Judges: the two bases, the verifier, and what hostile answers get from it."""

import asyncio
import json
import math
import time
from dataclasses import replace

import pytest
from reasoning_gym.factory import DATASETS

from judges import Opinion, PairwiseJudge, PointwiseJudge, Preference
from judges.answers import final_answer
from judges.guard import objection
from judges.numbers import read_number
from judges.verifier import Verifier
from roles import plugins
from roles.proposers.gym_tasks import COLUMN, REFUSED, make_dataset
from store.errors import UserError
from store.records import Call, Candidate, Group, Judgement, Message, Prompt

CALL = Call(seed=1)


def group_of(*texts, prompt=None, first_id=1):
    prompt = prompt or Prompt(messages=(Message(role="user", content="2 + 2?"),), reference="4")
    candidates = tuple(
        Candidate(
            id=first_id + index,
            asked_id=first_id,
            index=index,
            text=text,
            token_ids=tuple(text.encode()),
        )
        for index, text in enumerate(texts)
    )
    return Group(asked_id=first_id, prompt=prompt, candidates=candidates)


def judge_one(judge, text, prompt=None) -> Judgement:
    (judgement,) = judge.judge([group_of(text, prompt=prompt)], None, CALL)
    return judgement


def asked(question="?", reference=None, **columns):
    message = Message(role="user", content=question)
    return Prompt(messages=(message,), reference=reference, columns=columns)


def entry_of(task, index=0, **options):
    entry = make_dataset(task, options, seed=5, size=20)[index]
    column = {"task": task, "options": options, "metadata": entry["metadata"]}
    column = json.loads(json.dumps(column))
    return asked(entry["question"], entry["answer"], **{COLUMN: column})


# The ten-line judge, as the design and the README print it.


class Brevity(PointwiseJudge):
    def __init__(self, limit: int = 400):
        self.limit = limit

    def score(self, prompt, completion, policy, call):  # may be async; None = no verdict
        return max(0.0, 1 - len(completion.text) / self.limit)


def test_the_ten_line_judge_scores_every_candidate_and_names_it():
    judgements = Brevity(limit=10).judge(
        [group_of("", "12345"), group_of("1" * 20, first_id=9)], None, CALL
    )
    assert {one.candidate_id: one.score for one in judgements} == {1: 1.0, 2: 0.5, 9: 0.0}
    assert [one.verdicts[0].raw for one in judgements] == ["1.0", "0.5", "0.0"]
    assert all(one.status == "ok" and one.verdicts[0].value == one.score for one in judgements)


def test_the_ten_line_judge_written_to_a_file_loads_as_a_plug_in(tmp_path):
    source = tmp_path / "brevity.py"
    source.write_text(
        "from judges import PointwiseJudge\n\n"
        "class Brevity(PointwiseJudge):\n"
        "    def __init__(self, limit: int = 400):\n"
        "        self.limit = limit\n\n"
        "    def score(self, prompt, completion, policy, call):\n"
        "        return max(0.0, 1 - len(completion.text) / self.limit)\n"
    )
    judge = plugins.load("judge", f"{source}:Brevity", {"limit": 8})
    assert judge_one(judge, "1234").score == 0.5
    assert judge.version == "1"


class Says(PointwiseJudge):
    def __init__(self, answer):
        self.answer = answer

    def score(self, prompt, completion, policy, call):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_none_is_an_abstention_with_a_reason_and_never_a_score():
    judgement = judge_one(Says(None), "x")
    assert (judgement.score, judgement.status) == (None, "abstained")
    assert judgement.reason
    assert judgement.verdicts[0].raw == "None"


def test_an_opinion_brings_its_own_words_status_and_cost():
    judgement = judge_one(Says(Opinion(score=None, raw="I'd say 7", status="unparsed")), "x")
    assert (judgement.status, judgement.verdicts[0].raw) == ("unparsed", "I'd say 7")
    judgement = judge_one(Says(Opinion(score=3, raw="Score: 3", tokens=9, cost=0.5)), "x")
    assert (judgement.score, judgement.verdicts[0].tokens) == (3.0, 9)


@pytest.mark.parametrize(
    ("answer", "error"),
    [("high", TypeError), ([1.0], TypeError), (math.nan, ValueError), (math.inf, ValueError)],
)
def test_what_is_no_finite_number_is_a_bug_that_names_the_judge(answer, error):
    with pytest.raises(error, match=r"Says\.score"):
        judge_one(Says(answer), "x")


def test_an_exception_in_score_is_not_caught():
    with pytest.raises(ZeroDivisionError):
        judge_one(Says(ZeroDivisionError()), "x")


class Waits(PointwiseJudge):
    concurrency = 3

    def __init__(self):
        self.now = self.most = 0

    async def score(self, prompt, completion, policy, call):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.01 * (5 - len(completion.text)))
        self.now -= 1
        if completion.text == "xxxxx":
            raise OSError("no route")
        return len(completion.text)


def test_async_scores_run_together_up_to_the_limit_and_keep_their_candidates():
    judge = Waits()
    done = []
    call = replace(CALL, progress=lambda n, total: done.append((n, total)))
    judgements = judge.judge([group_of("x", "xx", "xxx", "xxxx")], None, call)
    assert {one.candidate_id: one.score for one in judgements} == {1: 1, 2: 2, 3: 3, 4: 4}
    assert judge.most == 3
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_async_judge_works_inside_a_running_event_loop():
    async def inside():
        return judge_one(Waits(), "xx")

    assert asyncio.run(inside()).score == 2


def test_an_exception_in_an_async_score_is_not_caught():
    with pytest.raises(OSError, match="no route"):
        Waits().judge([group_of("x", "xxxxx", "xx")], None, CALL)


def test_judging_stops_when_the_run_was_asked_to_stop():
    with pytest.raises(KeyboardInterrupt):
        Brevity().judge([group_of("x")], None, replace(CALL, stopping=lambda: True))


class Longer(PairwiseJudge):
    async def prefer(self, prompt, first, second, policy, call):
        await asyncio.sleep(0)
        if len(first.text) == len(second.text):
            return None
        return int(len(second.text) > len(first.text))


class First(PairwiseJudge):
    def prefer(self, prompt, first, second, policy, call):
        return Preference(choice=0, raw="The first, clearly.")


def test_a_pairwise_score_is_the_share_of_decided_comparisons_won():
    judgements = Longer().judge([group_of("x", "xxx", "xx", "yy")], None, CALL)
    scores = {one.candidate_id: one.score for one in judgements}
    assert scores == {1: 0.0, 2: 1.0, 3: 0.5, 4: 0.5}
    assert sum(len(one.verdicts) for one in judgements) == 4 * 3


def test_both_orders_of_every_pair_are_asked_and_kept_once():
    judgements = Longer().judge([group_of("x", "xx"), group_of("y", "yy", first_id=5)], None, CALL)
    shown = [
        (verdict.candidate_id, verdict.other_candidate_id, verdict.order)
        for one in judgements
        for verdict in one.verdicts
    ]
    assert sorted(shown) == [(1, 2, 0), (2, 1, 0), (5, 6, 0), (6, 5, 0)]
    assert all(v.candidate_id == one.candidate_id for one in judgements for v in one.verdicts)


def test_a_judge_that_always_takes_the_first_shown_has_said_nothing():
    judgements = First().judge([group_of("x", "xx", "xxx")], None, CALL)
    assert {(one.score, one.status) for one in judgements} == {(None, "abstained")}
    assert judgements[0].verdicts[0].raw == "The first, clearly."


def test_a_candidate_alone_in_its_group_is_not_scored():
    (judgement,) = First().judge([group_of("x")], None, CALL)
    assert (judgement.status, judgement.reason) == ("abstained", "nothing to compare it with")


@pytest.mark.parametrize("answer", [2, True, "first", 0.5])
def test_a_preference_that_is_neither_side_is_a_bug_that_names_the_judge(answer):
    class Odd(PairwiseJudge):
        def prefer(self, prompt, first, second, policy, call):
            return answer

    with pytest.raises(ValueError, match=r"Odd\.prefer"):
        Odd().judge([group_of("x", "y")], None, CALL)


# The final answer.


@pytest.mark.parametrize(
    ("text", "place", "answer"),
    [
        ("<answer>1</answer> no, <answer> 2 </answer> bye", "auto", "2"),
        ("<answer>1</answer> <answer>2", "tag", "1"),
        ("<answer><answer>1</answer>", "tag", "1"),
        ("\\boxed{1} and \\boxed{\\frac{3}{4}}.", "auto", "\\frac{3}{4}"),
        ("\\boxed{1} and \\boxed{2", "auto", "1"),
        ("\\boxed{\\{1, 2\\}}", "boxed", "\\{1, 2\\}"),
        ("Answer: 1\n... Answer: 2", "auto", "2"),
        ("so\n#### 42\n", "auto", "42"),
        ("**Answer:** 7", "marker", "7"),
        (" 42 \n", "auto", "42"),
        ("Answer: 1\n<answer>2</answer>", "whole", "Answer: 1\n<answer>2</answer>"),
        ("a\n b \n\n", "last_line", "b"),
        ("42", "tag", None),
        ("42", "boxed", None),
        ("42", "marker", None),
        ("\n", "last_line", None),
    ],
)
def test_the_final_answer_is_the_last_at_its_place(text, place, answer):
    assert final_answer(text, place) == answer


def test_a_text_of_nothing_but_opening_boxes_is_read_in_one_pass():
    began = time.perf_counter()
    assert final_answer("\\boxed{" * 50_000, "boxed") is None
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-1,234,567.50", -1234567.5),
        ("3/4", 0.75),
        ("\\frac{3}{4}", 0.75),
        ("$12", 12),
        ("−5", -5),
        ("1e3", 1000),
        (".5", 0.5),
        ("42.", 42),
        ("-$3", -3),
    ],
)
def test_numbers_are_read_as_people_write_them(text, value):
    assert read_number(text) == value


@pytest.mark.parametrize(
    "text", ["", "12,34", "1/0", "1e999999999", "9" * 5000, "nan", "inf", "4 or 5", "--1", "٤", "."]
)
def test_what_is_no_number_is_none(text):
    assert read_number(text) is None


# The verifier.


@pytest.mark.parametrize(
    ("options", "reference", "text", "score"),
    [
        ({}, "42", "I think <answer>42</answer>", 1.0),
        ({}, "42", "42 41", 0.0),
        ({"scorer": "exact"}, "Paris", "paris", 0.0),
        ({"scorer": "exact"}, " Paris\n", "Paris ", 1.0),
        ({"scorer": "prefix"}, "drawer", "draw", 1.0),
        ({"scorer": "prefix"}, "drawer", " drawer\n", 1.0),
        ({"scorer": "prefix"}, "drawer", "drawers", 0.0),
        ({"scorer": "prefix"}, "drawer", "rawer", 0.0),
        ({"scorer": "prefix"}, "drawer", " ", 0.0),
        ({"scorer": "numeric"}, "1,000", "Answer: 1000.0000001", 1.0),
        ({"scorer": "numeric"}, "0.3333333", "1/3", 1.0),
        ({"scorer": "numeric"}, "0.75", "3/4", 1.0),
        ({"scorer": "numeric"}, "42", "forty-two", 0.0),
        ({"scorer": "numeric", "tolerance": 0.1}, "100", "109", 1.0),
        ({"scorer": "regex", "pattern": "(yes|ja)"}, None, "ja", 1.0),
        ({"scorer": "regex", "pattern": "(yes|ja)"}, None, "yes, ja", 0.0),
        ({"scorer": "regex"}, "[ab]+", "abba", 1.0),
        ({"scorer": "boxed"}, "\\boxed{7}", "so \\boxed{7}", 1.0),
        ({"scorer": "boxed"}, "7", "7", 0.0),
        ({"answer": "tag"}, "7", "7", 0.0),
    ],
)
def test_right_is_one_and_everything_else_is_nothing(options, reference, text, score):
    assert judge_one(Verifier(**options), text, asked("?", reference)).score == score


def test_the_verdict_says_in_words_what_happened():
    raws = [
        judge_one(Verifier(**options), text).verdicts[0].raw
        for options, text in [
            ({}, "<answer>41</answer>"),
            ({}, "4"),
            ({"scorer": "numeric"}, "four"),
            ({"answer": "boxed"}, "4"),
        ]
    ]
    assert raws == [
        "answer '41' is not '4'",
        "answer '4' is right",
        "answer 'four' is not '4'; it is not a number",
        "no final answer: looked for 'boxed'",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "41, 42, 43",
        "41 or 42",
        "<answer>42</answer> <answer>41</answer>",
        "\\boxed{42} \\boxed{41}",
        "Answer: 42 Answer: 41",
        "<answer>41, 42</answer>",
        "42\n43",
    ],
)
@pytest.mark.parametrize("scorer", ["exact", "numeric", "reasoning_gym"])
def test_spraying_guesses_does_not_pay(text, scorer):
    prompt = entry_of("chain_sum")
    prompt = replace(prompt, reference="42")
    assert judge_one(Verifier(scorer=scorer), text, prompt).score == 0.0


def test_partial_credit_is_nothing_unless_asked_for():
    prompt = replace(entry_of("chain_sum"), reference="42")
    assert judge_one(Verifier(), "41, 42, 43", prompt).score == 0.0
    assert judge_one(Verifier(partial=True), "42 or 41", prompt).score == 0.25


def test_a_reasoning_gym_prompt_is_scored_by_its_own_task():
    prompt = replace(entry_of("chain_sum"), reference="1000")
    assert judge_one(Verifier(), "+1,000.00", prompt).score == 1.0
    assert judge_one(Verifier(scorer="exact"), "+1,000.00", prompt).score == 0.0


def test_a_scorer_sees_the_options_its_prompt_was_made_with():
    coarse = entry_of("decimal_arithmetic", min_num_decimal_places=1, max_num_decimal_places=1)
    fine = entry_of("decimal_arithmetic")
    for prompt, score in ((coarse, 1.0), (fine, 0.0)):
        nearly = str(float(prompt.reference) + 0.05)
        assert judge_one(Verifier(), nearly, prompt).score == score


def test_a_scorer_that_chokes_means_wrong_and_the_reason_is_kept():
    prompt = entry_of("prime_factorization")
    judgement = judge_one(Verifier(), "no idea", prompt)
    assert judgement.score == 0.0
    assert "could not read it: ValueError" in judgement.verdicts[0].raw


@pytest.mark.parametrize(
    ("options", "prompt", "words"),
    [
        ({}, asked("Who?"), "a reference answer"),
        ({"scorer": "reasoning_gym"}, asked("Who?", "I"), "reasoning_gym"),
        ({"scorer": "numeric"}, asked("Who?", "I"), "a number"),
        ({"scorer": "regex"}, asked("Who?", "("), "regular expression"),
    ],
)
def test_a_prompt_without_what_the_scorer_needs_is_the_users_mistake(options, prompt, words):
    with pytest.raises(UserError, match=words) as caught:
        judge_one(Verifier(**options), "x", prompt)
    assert prompt.digest[:12] in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"pattern": "a"}, {"scorer": "regex", "pattern": "("}, {"tolerance": -1}],
)
def test_options_that_cannot_work_are_refused_at_the_start(options):
    with pytest.raises(UserError):
        Verifier(**options)


def test_an_answer_longer_than_any_right_one_is_wrong_unread():
    judgement = judge_one(Verifier(), "4" * 20_000)
    assert judgement.score == 0.0
    assert "20000 characters" in judgement.verdicts[0].raw


# Hostile answers to scorers that would run them.

SCORED = sorted(set(DATASETS) - set(REFUSED) - {"knight_swap", "futoshiki"})
HOSTILE = [
    "__import__('pathlib').Path('pwned').touch()",
    "9**9**9**9",
    "[1]*10**10",
    "1e999999999",
    "nan",
    "0",
    "[" * 9000,
    "9" * 9000,
    "",
    "x\x00",
]


@pytest.mark.filterwarnings("ignore:loadtxt:UserWarning")  # numpy, of an empty matrix
@pytest.mark.parametrize("task", SCORED)
def test_no_scorer_runs_hangs_on_or_falls_for_a_hostile_answer(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = entry_of(task, index=1)
    judgements = Verifier(answer="whole").judge([group_of(*HOSTILE, prompt=prompt)], None, CALL)
    fooled = [
        hostile
        for hostile, judgement in zip(HOSTILE, judgements, strict=True)
        if judgement.score and hostile != prompt.reference
    ]
    assert fooled == []
    assert max(one.verdicts[0].seconds for one in judgements) < 2
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "answer", ["2*x**3/3 + C", "-(x + 1)**(3/2)", "sin(x)*exp(2*x)", "log(sin(x))", "1.5*pi"]
)
def test_formulas_pass_the_guard(answer):
    assert objection("simple_integration", answer, "x") is None


@pytest.mark.parametrize(
    "answer",
    [
        "x.diff()",
        "f(x)",
        "sin(x, 2)",
        "2**x",
        "9**9**9",
        "x**99",
        "5 or 6",
        "1 # 2 3",
        "'a'*9",
        "[x]",
        "lambda: 0",
        "Integral(x, x)",
        "sin(" * 90,
    ],
)
def test_what_is_no_formula_does_not(answer):
    assert objection("simple_integration", answer, "x") is not None


@pytest.mark.parametrize(
    ("task", "wrong"),
    [
        ("game_of_life_halting", lambda right: "no idea"),
        ("coin_flip", lambda right: right[:1]),
        ("spell_backward", lambda right: right + " or what"),
        ("letter_jumble", lambda right: right + " or what"),
        ("word_sorting", lambda right: right + ", zebra"),
        ("complex_arithmetic", lambda right: "nan"),
    ],
)
def test_answers_that_fool_reasoning_gyms_own_scorer_are_wrong_here(task, wrong):
    prompts = [entry_of(task, index) for index in range(8)]
    prompt = next(one for one in prompts if wrong(one.reference) != one.reference)
    assert judge_one(Verifier(), wrong(prompt.reference), prompt).score == 0.0
    assert judge_one(Verifier(), prompt.reference, prompt).score == 1.0
