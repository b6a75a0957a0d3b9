"""Filters: what becomes an example, and the word for why nothing did."""

from dataclasses import replace
from typing import get_args

import pytest

from roles import plugins
from roles.filters.best_only import BestOnly
from roles.filters.best_worst import BestWorst
from roles.filters.eligibility import Reason
from roles.filters.everything import Everything
from roles.filters.labelled import Labelled
from roles.filters.right_wrong import RightWrong
from store.errors import UserError
from store.records import Call, Candidate, Group, Judgement, Message, Prompt

CALL = Call(seed=3)


class NoHistory:
    def prompts(self, *splits: str) -> list[Prompt]:
        return []

    def asked(self):
        return frozenset()

    def held_out(self):
        return frozenset()

    def asked_in(self, call):
        return []

    def earlier(self, call):
        return {}

    def judged(self, call):
        return []


def case(*rows, number=1):
    """A group and its judgements from (score or None, text[, finish reason])."""
    candidates, judgements = [], []
    for index, (score, text, *finish) in enumerate(rows):
        candidate = Candidate(
            id=100 * number + index,
            asked_id=number,
            index=index,
            text=text,
            token_ids=tuple(text.encode()),
            finish_reason=finish[0] if finish else "stop",
        )
        candidates.append(candidate)
        judgements.append(
            Judgement(
                candidate_id=candidate.id,
                score=score,
                status="unparsed" if score is None else "ok",
                id=1000 + candidate.id,
            )
        )
    prompt = Prompt(messages=(Message(role="user", content=f"question {number}"),))
    return Group(asked_id=number, prompt=prompt, candidates=tuple(candidates)), judgements


def select(filter_, *rows, call=CALL):
    group, judgements = case(*rows)
    return filter_.select([group], judgements, NoHistory(), call)


def texts(selection):
    return [
        (example.chosen.text, example.rejected and example.rejected.text)
        for example in selection.examples
    ]


def reason(selection):
    assert selection.examples == ()
    (dropped,) = selection.dropped
    assert dropped.reason in get_args(Reason)
    return dropped.reason


def test_best_worst_takes_the_highest_against_the_lowest():
    selection = select(BestWorst(), (0.2, "a"), (0.9, "b"), (0.1, "c"), (0.5, "d"))
    (example,) = selection.examples
    assert texts(selection) == [("b", "c")]
    assert example.margin == pytest.approx(0.8)
    assert (example.rule, example.weight, example.kind) == ("best_worst", 1.0, "pair")
    assert (example.chosen_judgement_id, example.rejected_judgement_id) == (1101, 1102)


def test_judgements_are_matched_by_the_candidate_they_name():
    group, judgements = case((0.0, "a"), (1.0, "b"))
    selection = BestWorst().select([group], judgements[::-1], NoHistory(), CALL)
    assert texts(selection) == [("b", "a")]


def test_a_judgement_that_is_not_stored_has_no_id_to_name():
    group, judgements = case((0.0, "a"), (1.0, "b"))
    unstored = [replace(one, id=None) for one in judgements]
    (example,) = BestWorst().select([group], unstored, NoHistory(), CALL).examples
    assert example.chosen_judgement_id is None


@pytest.mark.parametrize(
    ("filter_", "rows", "why"),
    [
        (BestWorst(), [(0.5, "a"), (0.5, "b")], "tie"),
        (BestWorst(min_margin=0.2), [(0.5, "a"), (0.6, "b")], "margin"),
        (BestWorst(), [(None, "a"), (0.6, "b")], "unjudged"),
        (BestWorst(), [(0.1, "a", "length"), (0.6, "b")], "truncated"),
        (BestWorst(), [(0.1, "a"), (0.6, "a")], "duplicate"),
        (BestWorst(min_tokens=2), [(0.1, "a"), (0.6, "b")], "length"),
        (BestWorst(max_tokens=2), [(0.1, "aaa"), (0.6, "b")], "length"),
        (BestWorst(), [(0.6, "b")], "too few candidates"),
        (BestWorst(), [], "too few candidates"),
        (BestWorst(), [(None, "a"), (0.1, "b", "length"), (0.2, "c", "length")], "truncated"),
        (RightWrong(), [(1.0, "a"), (1.0, "b")], "all right"),
        (RightWrong(), [(0.0, "a"), (0.5, "b")], "all wrong"),
        (RightWrong(), [(1.0, "a"), (1.0, "a")], "all right"),
        (RightWrong(), [(1.0, "a"), (0.0, "b", "length")], "truncated"),
        (RightWrong(), [(None, "a"), (None, "b")], "unjudged"),
        (RightWrong(), [(1.0, "a")], "too few candidates"),
        (RightWrong(min_margin=0.9), [(1.0, "a"), (0.5, "b")], "margin"),
        (BestOnly(), [(None, "a")], "unjudged"),
        (BestOnly(min_score=0.5), [(0.4, "a"), (0.1, "b")], "all wrong"),
        (BestOnly(), [], "too few candidates"),
        (Everything(), [], "too few candidates"),
        (Labelled(), [(0.5, "a"), (0.9, "b")], "margin"),
        (Labelled(), [(None, "a"), (None, "b")], "unjudged"),
        (Labelled(), [(1.0, "a", "length")], "truncated"),
        (Labelled(min_tokens=2), [(1.0, "a")], "length"),
        (Labelled(), [], "too few candidates"),
    ],
)
def test_a_group_that_gives_nothing_says_why(filter_, rows, why):
    assert reason(select(filter_, *rows)) == why


def test_a_margin_that_is_met_exactly_is_enough():
    assert texts(select(BestWorst(min_margin=0.5), (0.5, "a"), (1.0, "b"))) == [("b", "a")]


def test_a_truncated_candidate_is_picked_only_when_allowed():
    rows = [(1.0, "a", "length"), (0.5, "b"), (0.0, "c")]
    assert texts(select(BestWorst(), *rows)) == [("b", "c")]
    assert texts(select(BestWorst(truncated=True), *rows)) == [("a", "c")]


def test_of_equal_texts_the_first_that_is_eligible_counts():
    rows = [(0.0, "a", "length"), (1.0, "a"), (0.0, "a"), (0.5, "b")]
    assert texts(select(BestWorst(), *rows)) == [("a", "b")]


def test_right_wrong_spreads_its_pairs_over_both_sides():
    rows = [(1.0, "r1"), (1.0, "r2"), (0.0, "w1"), (0.0, "w2"), (0.0, "w3")]
    found = texts(select(RightWrong(pairs=3), *rows))
    assert len(set(found)) == 3
    assert {chosen for chosen, _ in found} == {"r1", "r2"}
    assert {rejected for _, rejected in found} == {"w1", "w2", "w3"}


@pytest.mark.parametrize(("right", "wrong"), [(1, 1), (2, 4), (3, 3), (4, 6), (3, 5)])
def test_right_wrong_gives_every_pair_once_when_asked_for_more_than_there_are(right, wrong):
    rows = [(1.0, f"r{i}") for i in range(right)] + [(0.0, f"w{i}") for i in range(wrong)]
    found = texts(select(RightWrong(pairs=99), *rows))
    assert len(found) == len(set(found)) == right * wrong


def test_right_wrong_draws_from_the_seed_and_the_prompt_alone():
    rows = [(float(i % 2), f"t{i}") for i in range(16)]
    group, judgements = case(*rows)
    other, others = case(*rows, number=2)
    filter_ = RightWrong(pairs=2)
    alone = filter_.select([group], judgements, NoHistory(), CALL)
    both = filter_.select([other, group], others + judgements, NoHistory(), CALL)
    assert alone.examples == tuple(one for one in both.examples if one.asked_id == 1)
    drawn = {tuple(texts(select(filter_, *rows, call=Call(seed=seed)))) for seed in range(5)}
    assert len(drawn) > 1


def test_the_threshold_says_what_is_right():
    assert texts(select(RightWrong(threshold=0.5), (0.6, "a"), (0.4, "b"))) == [("a", "b")]


def test_best_only_gives_one_demonstration_and_the_earlier_of_equals():
    selection = select(BestOnly(min_score=0.5), (0.2, "a"), (0.9, "b"), (0.9, "c"))
    (example,) = selection.examples
    assert (example.kind, example.chosen.text, example.rejected) == ("demonstration", "b", None)
    assert (example.rule, example.margin, example.chosen_judgement_id) == ("best_only", None, 1101)


def test_everything_takes_every_candidate_with_no_judge():
    group, judgements = case((None, "a"), (0.0, "b", "length"))
    bare = Everything().select([group], [], NoHistory(), CALL)
    assert texts(bare) == [("a", None), ("b", None)]
    judged = Everything().select([group], judgements, NoHistory(), CALL)
    assert [example.chosen_judgement_id for example in judged.examples] == [1100, 1101]


def labels(selection):
    return [(example.chosen.text, example.label) for example in selection.examples]


def test_labelled_takes_what_is_wanted_and_what_is_not_and_nothing_between():
    rows = [(0.5, "a"), (1.0, "b"), (0.0, "c"), (-1.0, "d"), (2.0, "e")]
    selection = select(Labelled(), *rows)
    assert labels(selection) == [("b", True), ("c", False), ("d", False), ("e", True)]
    example = selection.examples[0]
    assert (example.kind, example.rule, example.rejected) == ("labelled", "labelled", None)
    assert (example.margin, example.chosen_judgement_id) == (None, 1101)
    moved = select(Labelled(wanted=0.5, unwanted=-0.5), *rows)
    assert labels(moved) == [("a", True), ("b", True), ("d", False), ("e", True)]


def test_labelled_needs_no_answer_of_the_other_label():
    assert labels(select(Labelled(), (1.0, "a"), (1.0, "b"))) == [("a", True), ("b", True)]
    assert labels(select(Labelled(), (0.0, "a"), (0.5, "b"))) == [("a", False)]


def test_labelled_draws_at_most_so_many_of_each_label_from_the_seed():
    rows = [(1.0, f"r{index}") for index in range(6)] + [(0.0, "w0"), (0.0, "w1")]
    filter_ = Labelled(per_label=3)
    found = labels(select(filter_, *rows))
    assert [label for _, label in found] == [True] * 3 + [False] * 2
    assert found == labels(select(filter_, *rows))
    assert found == sorted(found), "in the order they were written"
    drawn = {tuple(labels(select(filter_, *rows, call=Call(seed=seed)))) for seed in range(5)}
    assert len(drawn) > 1


@pytest.mark.parametrize(
    "name",
    ["best_worst", "right_wrong", "best_only", "everything", "roles.filters.labelled:Labelled"],
)
def test_every_group_ends_as_examples_or_as_one_dropped(name):
    filter_ = plugins.load("filter", name, {})
    cases = [
        case((1.0, "a"), (0.0, "b"), number=1),
        case((None, "a"), (None, "b"), number=2),
        case((1.0, "a"), (1.0, "b"), number=3),
        case(number=4),
    ]
    groups = [group for group, _ in cases]
    judgements = [one for _, several in cases for one in several]
    selection = filter_.select(groups, judgements, NoHistory(), CALL)
    used = {example.asked_id for example in selection.examples}
    dropped = [one.asked_id for one in selection.dropped]
    assert used.isdisjoint(dropped)
    assert sorted([*used, *dropped]) == [1, 2, 3, 4]
    assert {example.rule for example in selection.examples} == {filter_.rule}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (BestWorst, {"min_margin": -0.1}),
        (BestWorst, {"min_margin": float("nan")}),
        (BestWorst, {"min_tokens": 5, "max_tokens": 4}),
        (BestOnly, {"min_tokens": -1}),
        (RightWrong, {"pairs": 0}),
        (Labelled, {"wanted": 0.0}),
        (Labelled, {"unwanted": float("nan")}),
        (Labelled, {"per_label": 0}),
    ],
)
def test_options_that_cannot_work_are_refused_at_the_start(make, options):
    with pytest.raises(UserError):
        make(**options)
