"""Filters that look further than a group: over rounds, a judge's votes, a whole round."""

from __future__ import annotations

from dataclasses import replace

import pytest

from roles.filters.best_worst import BestWorst
from roles.filters.demonstrated import Demonstrated
from roles.filters.diverse import Diverse
from roles.filters.everything import Everything
from roles.filters.right_wrong import RightWrong
from roles.filters.surest import Surest
from store.errors import UserError
from store.records import Call, Candidate, Earlier, Group, Judgement, Selection, Verdict
from test_filters import CALL, NoHistory, case, texts

THIRD = Call(seed=3, round=3)


class Before(NoHistory):
    """What earlier rounds answered to the prompt of asked id 1: (round, score, text)."""

    def __init__(self, *rows: tuple[int, float, str]) -> None:
        self.found = []
        for number, (round, score, text) in enumerate(rows):
            answer = Candidate(
                id=5000 + number,
                asked_id=90 + round,
                index=number,
                text=text,
                token_ids=tuple(text.encode()),
                checkpoint_id=round,
            )
            judged = Judgement(candidate_id=answer.id, score=score, id=6000 + number)
            self.found.append(Earlier(round, answer, judged))

    def earlier(self, call: Call) -> dict[int, list[Earlier]]:
        return {1: self.found}


def by_policy(group: Group, *indexes: int) -> Group:
    """The group with these candidates written by a policy, the others being demonstrations."""
    return replace(
        group,
        candidates=tuple(
            replace(each, checkpoint_id=7) if each.index in indexes else each
            for each in group.candidates
        ),
    )


def select(filter_, *rows, history=None, call=THIRD) -> Selection:  # type: ignore[no-untyped-def]
    group, judgements = case(*rows)
    return filter_.select([group], judgements, history or Before(), call)


# Everything, where it chooses


def test_everything_can_take_the_good_ones_alone_and_draws_among_them_by_the_seed() -> None:
    rows = [(1.0, "a"), (0.0, "b"), (1.0, "c"), (1.0, "a"), (None, "d")]
    assert [one for one, _ in texts(select(Everything(min_score=1.0), *rows))] == ["a", "c", "a"]
    different = Everything(min_score=1.0, different=True)
    assert [one for one, _ in texts(select(different, *rows))] == ["a", "c"]
    assert len(select(Everything(min_score=1.0, most=2), *rows).examples) == 2
    (dropped,) = select(Everything(min_score=2.0), *rows).dropped
    assert dropped.reason == "all wrong"


# Diverse


def test_diverse_takes_right_answers_that_are_least_alike() -> None:
    rows = [(1.0, "abcdef"), (1.0, "abcdeg"), (1.0, "zyxwvu"), (0.0, "wrong")]
    for seed in range(8):  # whichever is drawn first, the second is not its neighbour
        found = select(Diverse(pairs=2, by="letters"), *rows, call=Call(seed=seed))
        assert "zyxwvu" in {chosen for chosen, _ in texts(found)}
        assert {rejected for _, rejected in texts(found)} == {"wrong"}


def test_diverse_pools_what_earlier_rounds_answered_to_the_same_prompt() -> None:
    before = Before((1, 1.0, "old right"), (2, 0.0, "old wrong"), (2, 1.0, "right"))
    rows = [(1.0, "right"), (0.0, "wrong")]
    found = texts(select(Diverse(pairs=9), *rows, history=before))
    assert set(found) == {
        ("right", "wrong"),
        ("right", "old wrong"),
        ("old right", "wrong"),
        ("old right", "old wrong"),
    }
    # What was said in this round is this round's candidate, whoever said it before.
    assert {each.chosen.asked_id for each in select(Diverse(), *rows, history=before).examples} <= {
        1,
        91,
    }
    assert set(texts(select(Diverse(pairs=9, pool=2), *rows, history=before))) == {
        ("right", "wrong"),
        ("right", "old wrong"),
    }
    assert texts(select(Diverse(pairs=9, pool=1), *rows, history=before)) == [("right", "wrong")]


def test_a_prompt_that_only_the_pool_has_right_answers_to_gives_pairs() -> None:
    rows = [(0.0, "no"), (0.0, "wrong")]
    assert not select(RightWrong(), *rows).examples
    found = select(Diverse(pairs=2), *rows, history=Before((1, 1.0, "right")))
    assert {chosen for chosen, _ in texts(found)} == {"right"}
    assert {each.asked_id for each in found.examples} == {1}
    (dropped,) = select(Diverse(), *rows).dropped
    assert dropped.reason == "all wrong"


# Demonstrated


def test_a_demonstration_is_preferred_over_this_rounds_answers_and_over_earlier_ones() -> None:
    group, judgements = case((None, "shown"), (None, "mine"), (None, "shown"), (None, "other"))
    before = Before((1, 0.0, "first"), (2, 0.0, "second"))
    found = Demonstrated(pairs=10).select([by_policy(group, 1, 2, 3)], judgements, before, THIRD)
    pairs = set(texts(found))
    assert {("shown", "mine"), ("shown", "other")} <= pairs
    assert {("shown", "first"), ("shown", "second")} <= pairs
    assert ("shown", "shown") not in pairs
    between = pairs - {("shown", each) for each in ("mine", "other", "first", "second")}
    assert len(between) == 1
    ages = {"first": 1, "second": 2, "mine": 3, "other": 3, "shown": 3}
    assert all(ages[chosen] > ages[rejected] for chosen, rejected in between)


def test_without_earlier_rounds_all_pairs_are_with_this_rounds_answers() -> None:
    group, judgements = case((None, "shown"), *((None, f"mine {n}") for n in range(12)))
    found = Demonstrated(pairs=10).select(
        [by_policy(group, *range(1, 13))], judgements, Before(), THIRD
    )
    assert len(found.examples) == 10
    assert {chosen for chosen, _ in texts(found)} == {"shown"}


def test_a_group_without_a_demonstration_or_without_another_answer_is_dropped() -> None:
    group, judgements = case((None, "shown"), (None, "shown"))
    (dropped,) = Demonstrated().select([by_policy(group, 1)], judgements, Before(), CALL).dropped
    assert dropped.reason == "duplicate"
    group, judgements = case((None, "shown"))
    (dropped,) = Demonstrated().select([group], judgements, Before(), CALL).dropped
    assert dropped.reason == "too few candidates"


def test_shares_of_demonstrated_pairs_add_up_to_one() -> None:
    with pytest.raises(UserError, match=r"add up to 1; found 0.5, 0.2 and 0.1"):
        Demonstrated(online=0.5)


# Surest


def voted(number: int, *candidates: tuple[str, list[float]]) -> tuple[Group, list[Judgement]]:
    """A group whose candidates got these votes; a score is their mean."""
    group, _ = case(*((0.0, text) for text, _ in candidates), number=number)
    judgements = [
        Judgement(
            candidate_id=one.id,
            score=sum(votes) / len(votes),
            id=1000 + one.id,
            verdicts=tuple(
                Verdict(candidate_id=one.id, raw="", value=value, vote=vote)
                for vote, value in enumerate(votes)
            ),
        )
        for one, (_, votes) in zip(group.candidates, candidates, strict=True)
    ]
    return group, judgements


def surest(filter_: Surest) -> Selection:
    steady = voted(1, ("a", [1.0, 1.1, 0.9]), ("b", [0.5, 0.6, 0.4]))
    shaky = voted(2, ("c", [5.0, -2.0, 3.0]), ("d", [0.0, 1.0, -1.0]))
    tied = voted(3, ("e", [1.0, 1.0]), ("f", [1.0, 1.0]))
    groups, judged = zip(steady, shaky, tied, strict=True)
    everything = [each for own in judged for each in own]
    return filter_.select(list(groups), everything, NoHistory(), CALL)


def test_by_votes_the_pair_is_kept_on_which_they_agree_and_by_margin_the_widest() -> None:
    by_votes = surest(Surest(keep=0.5))
    assert texts(by_votes) == [("a", "b")]
    assert {each.asked_id: each.reason for each in by_votes.dropped} == {2: "unsure", 3: "tie"}
    assert texts(surest(Surest(keep=0.5, by="margin"))) == [("c", "d")]


def test_of_all_pairs_each_is_kept_and_may_weigh_by_how_sure_it_is() -> None:
    found = surest(Surest(keep=1.0, weigh=True))
    weights = {each.chosen.text: each.weight for each in found.examples}
    assert weights["a"] > 1 > weights["c"] > 0
    assert sum(weights.values()) == pytest.approx(len(weights))


def test_surest_needs_votes_and_says_where_they_come_from() -> None:
    group, judgements = case((1.0, "a"), (0.0, "b"))
    with pytest.raises(UserError, match=r"votes, and there are 0 on both .* by = \"margin\""):
        Surest().select([group], judgements, NoHistory(), CALL)


# Best against worst, where length counts


def test_within_the_window_the_shortest_is_chosen_and_the_longest_rejected() -> None:
    rows = [
        (1.0, "very long"),
        (0.95, "short"),
        (0.5, "x"),
        (0.05, "y"),
        (0.0, "zz"),
        (0.08, "zzz"),
    ]
    assert texts(select(BestWorst(), *rows)) == [("very long", "zz")]
    assert texts(select(BestWorst(window=0.1), *rows)) == [("short", "zzz")]
    tie = [(0.5, "a"), (0.5, "b")]
    (dropped,) = select(BestWorst(window=0.1), *tie).dropped
    assert dropped.reason == "tie"


def test_an_answer_that_the_policy_would_hardly_write_is_not_picked() -> None:
    group, judgements = case((1.0, "odd"), (0.9, "likely"), (0.0, "bad"), (0.1, "shown"))
    logprobs = {"odd": -30.0, "likely": -1.0, "bad": -2.0, "shown": None}
    group = replace(
        group,
        candidates=tuple(replace(one, logprob=logprobs[one.text]) for one in group.candidates),
    )
    found = BestWorst(min_logprob=-2.0).select([group], judgements, Before(), THIRD)
    assert texts(found) == [("likely", "bad")]
    alone = replace(group, candidates=group.candidates[:1])
    (dropped,) = BestWorst(min_logprob=-2.0).select([alone], judgements, Before(), THIRD).dropped
    assert dropped.reason == "unlikely"
