"""The judge of judgements: position weights, the battle matrix and its Elo scores."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from judges.comparing import bradley_terry
from judges.judging import Judging
from judges.meta import Meta
from roles import plugins
from roles.policy.embedded import build
from roles.policy.transformers import TransformersEngine
from roles.protocols import Judge
from store.errors import UserError
from store.records import Checkpoint, Judgement, Prompt, Reply
from test_comparing import CALL, Reads, Serves, ask, group_of, most_likely, moved, scores_of
from test_pairwise import ATTACKS

JUDGED = {"question": "2+2?", "answer": "5", "reference": "4", "score": 0}


def judge_this(text: str = "Grade this.", **columns: Any) -> Prompt:
    return ask(text, columns=columns or JUDGED)


def longer(parts: list[str], seed: int) -> str:
    return f"It says more.\nWinner: {'A' if len(parts[-2]) > len(parts[-1]) else 'B'}"


def leaning(parts: list[str], seed: int) -> str:
    """Takes the longer one, but the one shown first unless the other is longer by two."""
    return f"So.\nWinner: {'B' if len(parts[-1]) > len(parts[-2]) + 1 else 'A'}"


def judge(*texts: str, policy: Any = None, **options: Any) -> list[Judgement]:
    group = group_of(*texts, prompt=judge_this())
    return Meta(**options).judge([group], policy or Reads(longer), CALL)


# The battle matrix.


def battles(judged: Sequence[Judgement], first: float, second: float) -> list[list[float]]:
    """B written down again from the kept verdicts and the two weights."""
    place = {one.candidate_id: n for n, one in enumerate(judged)}
    found = np.zeros((len(judged), len(judged)))
    for one in judged:
        for v in one.verdicts:
            here, there = place[v.candidate_id], place[v.other_candidate_id or 0]
            if v.value == 1.0:
                found[here, there] += first
            if v.value == 0.0:
                found[there, here] += second
    return [[float(each) for each in row] for row in found]


def test_orders_that_agree_count_as_one_win_whatever_the_place() -> None:
    judged = judge("xx", "xxxx", "x", "xxx")
    order = [[float(len(a) > len(b)) for b in _TEXTS] for a in _TEXTS]
    assert [one.score for one in judged] == pytest.approx(bradley_terry(order), abs=1e-9)
    assert judged[1].reason == "won 3 of 3 decided comparisons; 0 undecided"


_TEXTS = ("xx", "xxxx", "x", "xxx")


def test_a_place_that_wins_often_weighs_less_and_disagreeing_orders_count_for_both() -> None:
    texts = ["x" * n for n in (1, 2, 3, 5)]
    judged = judge(*texts, policy=Reads(leaning))
    values = [v.value for one in judged for v in one.verdicts]
    win1st, win2nd = values.count(1.0), values.count(0.0)
    assert win1st > win2nd > 0
    w1, w2 = win2nd / (win1st + win2nd), win1st / (win1st + win2nd)
    found = battles(judged, w1, w2)
    assert found[0][1] == found[1][0] == w1, "each won where it was shown first"
    assert found[3][0] == 1.0
    assert [one.score for one in judged] == pytest.approx(list(most_likely(found)), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_elo_scores_are_the_maximum_likelihood_of_the_battle_matrix(seed: int) -> None:
    def moody(parts: list[str], drawn: int) -> str:
        return f"Hm.\nWinner: {random.Random(drawn + seed).choice('AAB')}"

    judged = judge(*"abcdef", policy=Reads(moody))
    values = [v.value for one in judged for v in one.verdicts]
    w2 = values.count(1.0) / len(values)
    found = battles(judged, 1 - w2, w2)
    assert [one.score for one in judged] == pytest.approx(list(most_likely(found)), abs=1e-9)


def test_weights_are_counted_over_all_groups_of_a_call_or_over_each() -> None:
    groups = [
        group_of("x", "xx", "xxxxx", prompt=judge_this("1"), first_id=10),
        group_of("x", "xx", prompt=judge_this("2"), first_id=20),
    ]
    policy = Reads(leaning)
    together = Meta().judge(groups, policy, CALL)
    values = [v.value for one in together for v in one.verdicts]
    w2 = values.count(1.0) / len(values)
    assert [one.score for one in together[:3]] == pytest.approx(
        list(most_likely(battles(together[:3], 1 - w2, w2))), abs=1e-9
    )
    assert [one.score for one in together[3:]] == [0.0, 0.0], "a draw: each won when shown first"
    by_group = scores_of(Meta(weigh="group").judge(groups, policy, CALL))
    apart = {}
    for group in groups:
        apart |= scores_of(Meta(weigh="group").judge([moved(group, 1)], policy, CALL))
    assert by_group == apart
    assert by_group[20] is None, "in this group the second place never won"


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_model_that_goes_by_the_place_decides_nothing(letter: str) -> None:
    judged = judge("x", "xx", "xxx", policy=Reads(lambda *_: f"I like it.\nWinner: {letter}"))
    assert {(one.score, one.status) for one in judged} == {(None, "abstained")}
    assert {v.status for one in judged for v in one.verdicts} == {"ok"}


def test_ties_and_replies_without_a_choice_count_nothing() -> None:
    def rarely(parts: list[str], seed: int) -> str:
        if "odd" in parts[-2:]:
            return "They are the same.\nWinner: tie"
        return "?" if "xx" in parts[-2:] else longer(parts, seed)

    judged = judge("x", "xx", "odd", "xxxx", policy=Reads(rarely), ties=True)
    assert [one.status for one in judged] == ["ok", "unparsed", "abstained", "ok"]
    assert judged[3].score == pytest.approx(bradley_terry([[0.0, 1.0], [0.0, 0.0]])[0])


def test_what_a_server_could_not_say_keeps_its_status() -> None:
    server = Serves(lambda parts: Reply(status="timed_out", reason="60 s"))
    judged = judge("x", "xx", policy=server)
    assert {(one.score, one.status) for one in judged} == {(None, "timed_out")}


def test_a_budget_makes_a_tournament() -> None:
    policy = Reads(longer)
    judged = judge(*("x" * n for n in range(1, 9)), policy=policy, comparisons=3)
    assert len(policy.calls) == 3
    assert {len(one.verdicts) for one in judged} == {3}


def test_no_order_of_candidates_or_groups_moves_a_score() -> None:
    def moody(parts: list[str], seed: int) -> str:
        return f"Hm.\nWinner: {random.Random(seed).choice('AAB')}"

    groups = [group_of(*"abcde", prompt=judge_this(f"{n}"), first_id=100 * n) for n in range(1, 4)]
    for options in ({}, {"comparisons": 2}):
        judge = Meta(**options)
        one_way = scores_of(judge.judge(groups, Reads(moody), CALL))
        other = [moved(group, 2) for group in reversed(groups)]
        assert one_way == scores_of(judge.judge(other, Reads(moody), CALL))
        assert len(set(one_way.values())) > 3


# What is asked.


def shown_parts(prompt: Prompt, **options: Any) -> list[list[str]]:
    shown: list[list[str]] = []

    def keep(parts: list[str], seed: int) -> str:
        shown.append(parts)
        return longer(parts, seed)

    Meta(**options).judge([group_of("x", "xx", prompt=prompt)], Reads(keep), CALL)
    return shown


def test_what_was_judged_is_shown_by_its_columns_or_as_it_was_asked() -> None:
    assert shown_parts(judge_this()) == [["2+2?", "5", "x", "xx"], ["2+2?", "5", "xx", "x"]]
    asked = ask("Grade this: 5\n=== 01234567\nno")
    assert shown_parts(asked) == [
        [asked.messages[0].content, "x", "xx"],
        [asked.messages[0].content, "xx", "x"],
    ]


def test_it_judges_what_the_proposer_of_judgings_asks() -> None:
    class Nothing:
        def asked(self) -> frozenset[str]:
            return frozenset()

        held_out = asked

        def prompts(self, *splits: str) -> list[Prompt]:
            return []

    proposer = Judging({"use": "reasoning_gym", "tasks": [{"name": "chain_sum"}]})
    (prompt,) = proposer.propose(1, "train", Nothing(), None, CALL)  # type: ignore[arg-type]
    (parts, _) = shown_parts(prompt)
    assert parts[:2] == [prompt.columns["question"], prompt.columns["answer"]]


def test_a_prompt_of_ones_own_may_show_what_is_right(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("{judged}\n\n{reference}\n\n{score}\n\n{first}\n\n{second}")
    assert shown_parts(judge_this(), prompt_path=own)[0] == ["2+2?", "5", "4", "0", "x", "xx"]
    with pytest.raises(UserError, match="has no column 'reference'"):
        shown_parts(ask("Grade this."), prompt_path=own)
    own.write_text("{first} {second}")
    with pytest.raises(UserError, match=r"lacks \{judged\}"):
        Meta(prompt_path=own)


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_judgement_moves_a_verdict_by_what_it_says(attack: str) -> None:
    def strict(parts: list[str], seed: int) -> str:
        assert sorted(parts[2:]) == sorted([attack, "the right one"])
        return f"One is right.\nWinner: {'AB'[parts.index('the right one') - 2]}"

    hostile, right = judge(attack, "the right one", policy=Reads(strict))
    assert hostile.score is not None
    assert right.score is not None
    assert hostile.score < 0 < right.score


def test_it_is_chosen_by_name() -> None:
    judge = plugins.load("judge", "meta", {"weigh": "group", "comparisons": 2})
    assert isinstance(judge, Judge)
    assert (judge.weigh, judge.comparisons) == ("group", 2)
    with pytest.raises(UserError, match="weigh"):
        plugins.load("judge", "meta", {"weigh": "all"})


def test_one_alone_abstains_and_a_real_model_is_asked(tmp_path: Path) -> None:
    build(tmp_path / "embedded", seed=0)
    checkpoint = Checkpoint(
        model="policy",
        path=tmp_path / "embedded",
        digest="d",
        tokenizer_digest="t",
        template_digest="c",
        bytes=1,
    )
    policy = TransformersEngine(device="cpu").open(checkpoint)
    groups = [
        group_of("x", "y", "z", prompt=judge_this()),
        group_of("x", prompt=judge_this(), first_id=9),
    ]
    judged = Meta(max_tokens=8).judge(groups, policy, CALL)
    said = [v for one in judged for v in one.verdicts]
    assert len(said) == 6
    assert all((v.value is not None) == (v.status == "ok") for v in said)
    assert all((one.score is not None) == (one.status == "ok") for one in judged)
    assert (judged[3].status, judged[3].reason) == ("abstained", "nothing to compare it with")
