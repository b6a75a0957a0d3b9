"""Comparisons two at a time: which are made, what they count, and the scores made of them."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from judges import PairwiseJudge, Preference
from judges.comparing import DRAWS, Board, Wins, bradley_terry, neighbours, share_won
from scripted import ScriptedPolicy
from store.records import (
    Call,
    Candidate,
    Completion,
    Group,
    Judgement,
    Message,
    Prompt,
    Reply,
    Sampling,
)

CALL = Call(seed=1, stage="judge")
FENCE = re.compile(r"([=~#+])\1{2,} [0-9a-f]{8}")


def ask(text: str = "Say a lot.", **rest: Any) -> Prompt:
    return Prompt(messages=(Message(role="user", content=text),), **rest)


def group_of(*texts: str, prompt: Prompt | None = None, first_id: int = 1) -> Group:
    return Group(
        asked_id=first_id,
        prompt=prompt or ask(),
        candidates=tuple(
            Candidate(id=first_id + n, asked_id=first_id, index=n, text=text, token_ids=(n,))
            for n, text in enumerate(texts)
        ),
    )


def scores_of(judgements: Sequence[Judgement]) -> dict[int, float | None]:
    return {one.candidate_id: one.score for one in judgements}


def moved(group: Group, seed: int) -> Group:
    """The same group with its candidates in another order."""
    shuffled = random.Random(seed).sample(group.candidates, len(group.candidates))
    return replace(group, candidates=tuple(shuffled))


def parts_of(shown: str) -> list[str]:
    """What stands between fences, as a model that knows what a fence is reads it."""
    fence = next(line for line in shown.splitlines() if FENCE.fullmatch(line))
    return f"\n{shown}\n".split(f"\n{fence}\n")[1::2]


class Reads(ScriptedPolicy):
    """Says what `answer` makes of the parts of the prompt and the seed."""

    def __init__(self, answer: Callable[[list[str], int], str], finish: Any = "stop") -> None:
        self.answer, self.finish = answer, finish
        self.calls: list[tuple[list[Prompt], Sequence[Sequence[int]]]] = []

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        self.calls.append((list(prompts), seeds))
        return [
            [self._said(parts_of(prompt.messages[-1].content), seed) for seed in own]
            for prompt, own in zip(prompts, seeds, strict=True)
        ]

    def _said(self, parts: list[str], seed: int) -> Completion:
        text = self.answer(parts, seed)
        ids = tuple(text.encode())
        return Completion(text=text, token_ids=ids, finish_reason=self.finish, seed=seed)


class Serves:
    """A server whose replies are what `answer` makes of the parts of the prompt."""

    def __init__(self, answer: Callable[[list[str]], Reply]) -> None:
        self.answer = answer
        self.schemas: list[Any] = []

    def ask(self, questions: Sequence[Prompt], **rest: Any) -> list[list[Reply]]:
        self.schemas.append(rest["schema"])
        return [[self.answer(parts_of(each.messages[-1].content))] for each in questions]


# Scores.


def most_likely(wins: Wins) -> np.ndarray:
    """The maximum of the penalised likelihood by Newton's method, which shares nothing with MM."""
    n = len(wins)
    w = np.array(wins, dtype=np.float64) + DRAWS / 2 / (n - 1)
    np.fill_diagonal(w, 0.0)
    scores = np.zeros(n)
    for _ in range(200):
        p = 1 / (1 + np.exp(scores[None, :] - scores[:, None]))
        gradient = (w * (1 - p)).sum(1) - (w.T * p).sum(1)
        met = (w + w.T) * p * (1 - p)
        curvature = np.diag(met.sum(1)) - met + 1 / n
        step = np.linalg.solve(curvature, gradient)
        scores = scores + step * min(1.0, 1.0 / np.abs(step).max(initial=1e-300))
    assert np.abs(gradient).max() < 1e-12
    return scores - scores.mean()


def some_wins(n: int, seed: int, parts: bool = False) -> Wins:
    """Everybody met everybody, now and then twice; `parts`: a win counts what it may."""
    chance = random.Random(seed)
    wins = [[0.0] * n for _ in range(n)]
    for one, other in combinations(range(n), 2):
        for _ in range(chance.randint(1, 2)):
            winner, loser = (one, other) if chance.random() < 0.7 else (other, one)
            wins[winner][loser] += chance.random() if parts else 1.0
    return wins


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("n", [2, 3, 5, 9, 16])
def test_bradley_terry_is_the_maximum_likelihood(n: int, parts: bool) -> None:
    for seed in range(5):
        wins = some_wins(n, seed, parts)
        assert np.allclose(bradley_terry(wins), most_likely(wins), atol=1e-9)


def test_one_who_never_lost_or_never_won_stays_finite() -> None:
    order = [[float(i < j) for j in range(8)] for i in range(8)]
    scores = bradley_terry(order)
    assert np.allclose(scores, most_likely(order), atol=1e-9)
    assert scores == sorted(scores, reverse=True)
    assert scores[0] < 10


def test_two_scores_differ_by_the_log_of_their_odds() -> None:
    one, other = bradley_terry([[0.0, 3.0], [1.0, 0.0]])
    assert one - other == pytest.approx(np.log((3 + DRAWS / 2) / (1 + DRAWS / 2)), abs=1e-11)
    assert one + other == 0


def test_the_order_of_the_rows_does_not_move_a_score_by_a_bit() -> None:
    wins = some_wins(9, 3, parts=True)
    places = random.Random(4).sample(range(9), 9)
    shuffled = [[wins[i][j] for j in places] for i in places]
    assert bradley_terry(shuffled) == [bradley_terry(wins)[i] for i in places]


def test_who_neither_won_nor_lost_has_no_score_and_moves_none() -> None:
    assert bradley_terry([[0.0]]) == [None]
    assert bradley_terry([]) == []
    apart = [[0.0, 0.0, 2.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    one, nobody, other = bradley_terry(apart)
    assert nobody is None
    assert [one, other] == bradley_terry([[0.0, 2.0], [1.0, 0.0]])
    assert share_won(apart) == [pytest.approx(2 / 3), None, pytest.approx(1 / 3)]


# Which comparisons are made.


def test_neighbours_are_paired_from_the_top_and_nobody_twice() -> None:
    left = set(combinations(range(6), 2))
    assert neighbours([3, 1, 0, 5, 2, 4], left) == [(1, 3), (0, 5), (2, 4)]
    assert neighbours([3, 1, 0, 5, 2, 4], left - {(1, 3)}) == [(0, 3), (1, 5), (2, 4)]
    assert neighbours([0, 1, 2], set()) == []


def test_two_who_are_left_over_and_have_met_break_up_a_pair() -> None:
    left = set(combinations(range(4), 2)) - {(2, 3)}
    assert sorted(neighbours([0, 1, 2, 3], left)) == [(0, 2), (1, 3)]


class Longer(PairwiseJudge):
    async def prefer(self, prompt, first, second, policy, call):
        return int(len(second.text) > len(first.text)) if first.text != second.text else None


class Rounds(Longer):
    """Keeps what it was shown, round by round."""

    def __init__(self, comparisons):
        self.comparisons = comparisons
        self.rounds = []

    def compare(self, shown, policy, call):
        self.rounds.append([(first.index, second.index) for _, first, second in shown])
        return super().compare(shown, policy, call)


@pytest.mark.parametrize("n", range(2, 14))
def test_a_budget_is_kept_and_spent_in_rounds(n: int) -> None:
    for budget in range(1, n + 2):
        judge = Rounds(budget)
        judge.judge([group_of(*("x" * (1 + k) for k in range(n)))], None, CALL)
        pairs = [tuple(sorted(pair)) for drawn in judge.rounds for pair in drawn]
        assert set(Counter(pairs).values()) == {2}, "each pair once, in both orders"
        met = Counter(one for pair in set(pairs) for one in pair)
        assert max(met.values()) <= budget
        if budget >= n - 1:
            assert len(judge.rounds) == 1
            assert set(pairs) == set(combinations(range(n), 2))
            continue
        for drawn in judge.rounds:
            assert max(Counter(one for one, _ in drawn).values()) == 1, "one pair each a round"
        if n % 2 == 0 and budget <= n // 2:
            assert set(met.values()) == {budget}
            assert len(judge.rounds) == budget
        # Near the end of all pairs those who have something left may all have met.
        assert min(met.values()) >= budget - (1 if budget <= n // 2 else 2)


def test_the_winners_of_a_round_meet_in_the_next() -> None:
    judge = Rounds(2)
    judge.judge([group_of(*("x" * (1 + n) for n in range(16)))], None, CALL)
    winners = {max(pair) for pair in judge.rounds[0]}
    assert all((one in winners) == (other in winners) for one, other in judge.rounds[1])


def test_a_tournament_ranks_with_a_quarter_of_the_comparisons() -> None:
    class Tournament(Longer):
        scoring = "bradley_terry"
        comparisons = 6

    found = []
    for seed in range(5):
        lengths = random.Random(seed).sample(range(1, 25), 24)
        judged = Tournament().judge(
            [group_of(*("x" * n for n in lengths))], None, replace(CALL, seed=seed)
        )
        assert sum(len(one.verdicts) for one in judged) == 24 * 6
        found.append(rank_correlation(lengths, [one.score for one in judged]))
    assert np.mean(found) > 0.85, found


def rank_correlation(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Spearman's, of values without ties in `one`; equals in `other` share their rank."""
    ranks = [
        [sum(a < b for a in all_) + (all_.count(b) - 1) / 2 for b in all_]
        for all_ in (list(one), list(other))
    ]
    return float(np.corrcoef(ranks)[0, 1])


def test_rounds_and_lots_hang_on_no_order_of_candidates_or_groups() -> None:
    class Tournament(Longer):
        scoring = "bradley_terry"
        comparisons = 3

    groups = [
        group_of(*("x" * (n * 7 % 11) for n in range(1, 9)), prompt=ask(f"{k}?"), first_id=k * 50)
        for k in range(1, 4)
    ]
    together = scores_of(Tournament().judge(groups, None, CALL))
    apart = {}
    for group in reversed(groups):
        apart |= scores_of(Tournament().judge([moved(group, 5)], None, CALL))
    assert together == apart
    assert together != scores_of(Tournament().judge(groups, None, replace(CALL, seed=9)))


# Judges of users.


def test_a_users_judge_takes_bradley_terry_by_a_class_attribute() -> None:
    class Strength(Longer):
        scoring = "bradley_terry"

    group = group_of("x", "xxx", "xx")
    judged = Strength().judge([group], None, CALL)
    order = bradley_terry([[0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert [one.score for one in judged] == order
    assert judged[1].reason == "won 2 of 2 decided comparisons; 0 undecided"
    assert [one.score for one in Longer().judge([group], None, CALL)] == [0.0, 1.0, 0.5]


def test_what_most_comparisons_lack_is_the_status_of_one_without_a_score() -> None:
    class Fails(PairwiseJudge):
        def prefer(self, prompt, first, second, policy, call):
            if "t" in first.text + second.text:
                return Preference(choice=None, raw="", status="timed_out")
            if "r" in (first.text + second.text) and first.text < second.text:
                return Preference(choice=None, raw="I will not.", status="refused")
            return 0

    for seed in range(4):
        judged = Fails().judge([moved(group_of("a", "b", "c", "t", "r"), seed)], None, CALL)
        assert {one.candidate_id: one.status for one in judged} == {
            1: "abstained",
            2: "abstained",
            3: "abstained",
            4: "timed_out",
            5: "refused",
        }
    assert all(one.reason == "won 0 of 0 decided comparisons; 4 undecided" for one in judged)


def test_an_order_that_failed_leaves_its_comparison_undecided() -> None:
    class HalfDeaf(PairwiseJudge):
        def prefer(self, prompt, first, second, policy, call):
            if len(first.text) < len(second.text):
                return Preference(choice=None, raw="", status="failed")
            return 0

    judged = HalfDeaf().judge([group_of("x", "xx")], None, CALL)
    assert {(one.score, one.status) for one in judged} == {(None, "failed")}
    assert [one.verdicts[0].value for one in judged] == [None, 1.0]


def test_no_groups_and_empty_groups_have_no_judgements() -> None:
    assert Longer().judge([], None, CALL) == []
    assert Longer().judge([group_of()], None, CALL) == []


def test_a_board_says_which_places_are_shown() -> None:
    board = Board(group_of("a", "b"), "all", False, CALL)
    assert board.draw([None, None]) == [(0, 1)]
    assert board.draw([None, None]) == []
    assert [each.text for each in board.shown(1, 0)[1:]] == ["b", "a"]
