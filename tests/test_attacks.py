"""No text of an answer moves a verdict by being parsed, whichever judge reads the reply.

What it does to the mind of a model is another matter: tests/benchmarks/attacks.py measures it.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from judges.attacks import ATTACKS, LONG, Attack, kinds
from judges.bench import CALL, Bench, examples, group_of
from judges.rubric import Rubric, rubric_prompt
from judges.stand_ins import Graded, StandIn
from shelf import ASKING, SPECS, on_the_shelf
from store.records import Group, Judgement

FENCE = re.compile(r"([=~#+])\1{2,} [0-9a-f]{8}")
BEST = examples()[0].candidates[0].text
PLAIN = examples()[0].candidates[1].text


@pytest.fixture(params=sorted(ASKING))
def judge(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    name = request.param
    return on_the_shelf(name.partition(",")[0], tmp_path, **ASKING[name])


def attacked(text: str) -> Group:
    return group_of(examples()[0].prompt, [BEST, text], 7)


def concluded(judge: Any, group: Group, model: StandIn) -> list[tuple[Any, ...]]:
    said: list[Judgement] = judge.judge([group], model, CALL)
    return [(each.candidate_id, each.status, each.score) for each in said]


def test_there_are_enough_attacks_of_every_kind() -> None:
    assert len(ATTACKS) >= 60
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
    assert min(Counter(attack.kind for attack in ATTACKS).values()) >= 8
    assert len(kinds()) == 9
    assert any(len(attack(PLAIN)) >= LONG for attack in ATTACKS)
    assert len({attack(PLAIN) for attack in ATTACKS}) == len(ATTACKS)


def test_every_judge_that_asks_a_model_is_attacked(tmp_path: Path) -> None:
    asking = set()
    for name in SPECS:
        if name == "human":  # asks a person, and does so elsewhere
            continue
        named = next((each for each in ASKING if each.partition(",")[0] == name), None)
        bench = Bench(on_the_shelf(name, tmp_path, **ASKING.get(named or "", {})), examples())
        bench.judged(bench.groups, bench.model)
        if bench.model.asked:
            asking.add(name)
    assert asking == {name.partition(",")[0] for name in ASKING}


def test_a_reply_that_is_the_same_gives_the_same_verdict(judge: Any) -> None:
    harmless = concluded(judge, attacked(PLAIN), StandIn(Graded({})))
    assert {status for _, status, _ in harmless} <= {"ok", "abstained"}
    moved = [
        attack.name
        for attack in ATTACKS
        if attack(PLAIN).strip()
        if concluded(judge, attacked(attack(PLAIN)), StandIn(Graded({}))) != harmless
    ]
    assert moved == []


def test_a_judge_that_quotes_the_answer_keeps_its_own_verdict(judge: Any) -> None:
    harmless = concluded(judge, attacked(PLAIN), StandIn(Graded({})))
    moved = []
    for attack in ATTACKS:
        hostile = attacked(attack(PLAIN)).candidates[1].text
        quoting = StandIn(Graded({}, f"It says:\n{hostile}\nAs to this, I have a view."))
        if hostile.strip() and concluded(judge, attacked(hostile), quoting) != harmless:
            moved.append(attack.name)
    assert moved == []


@pytest.mark.parametrize("structured", [False, True])
def test_a_model_that_repeats_what_it_is_shown_gives_no_verdict(
    judge: Any, structured: bool
) -> None:
    verdicts = []
    for attack in ATTACKS:
        group = attacked(attack(PLAIN))
        hostile = group.candidates[1].text
        silent = concluded(judge, group, StandIn(lambda shown, schema: "Hm."))
        repeats = [
            lambda shown, schema, text=hostile: text if text in shown else "Hm.",
            lambda shown, schema, text=hostile: shown[: shown.find(text) + len(text)],
            lambda shown, schema: shown,
            lambda shown, schema: "\n".join(f"> {line}" for line in shown.splitlines()),
        ]
        for place, say in enumerate(repeats):
            if concluded(judge, group, StandIn(say, structured=structured)) != silent:
                verdicts.append((attack.name, place))
    assert verdicts == []


def test_a_verdict_without_a_score_is_left_by_a_model_that_repeats(tmp_path: Path) -> None:
    """Of judges that score each answer by itself there is then no score at all."""
    for name in ("rubric", "rubric, criteria", "rubric, brief", "reference"):
        judge = on_the_shelf(name.partition(",")[0], tmp_path, **ASKING[name])
        for attack in ATTACKS:
            copied = StandIn(lambda shown, schema: shown)
            said = concluded(judge, attacked(attack(PLAIN)), copied)
            assert {(status, score) for _, status, score in said} == {("unparsed", None)}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_question_can_be_taken_apart_in_one_way(attack: Attack) -> None:
    judge, group = Rubric(), attacked(attack(PLAIN))
    hostile = group.candidates[1].text
    shown = rubric_prompt(judge.template, group.prompt, hostile).messages[-1].content
    fence = next(line for line in shown.split("\n") if FENCE.fullmatch(line))
    assert fence not in hostile
    assert shown.count(fence) == 4, "twice for each of two parts"
    before, asked, between, answer, after = shown.split(fence)
    assert asked == f"\n{group.prompt.messages[-1].content}\n"
    assert answer == f"\n{hostile}\n"
    plain = rubric_prompt(judge.template, group.prompt, PLAIN).messages[-1].content
    own = next(line for line in plain.split("\n") if FENCE.fullmatch(line))
    assert (before, between, after) == tuple(plain.split(own)[::2])


def test_every_part_of_every_judges_question_stands_between_its_fences(judge: Any) -> None:
    for attack in ATTACKS:
        group = attacked(attack(PLAIN))
        hostile, model = group.candidates[1].text, StandIn(Graded({}))
        judge.judge([group], model, CALL)
        for question in model.asked:
            (turn,) = question.messages
            assert turn.quoted
            fence = next(line for line in turn.content.split("\n") if FENCE.fullmatch(line))
            parts = turn.content.split(fence)
            assert len(parts) % 2 == 1, "each fence that opens is closed"
            inside, outside = parts[1::2], parts[::2]
            if len(hostile) > 40 and hostile in turn.content:
                assert f"\n{hostile}\n" in inside
                assert not any(hostile in each for each in outside)
