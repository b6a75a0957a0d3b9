"""Compare answers two at a time and make scores of who won: the schedule, the count, the scores.

Every two answers are shown in both orders, and only an answer that is preferred in both has won:
what changes with the order says something about the judge, not about the answers. A comparison
without such a winner is undecided, and counts for neither side.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import combinations
from typing import ClassVar, Literal, NamedTuple

from judges.model_judge import without_score
from roles.protocols import Policy
from store.records import ALONE, Call, Candidate, Group, Judgement, Prompt, Status, Verdict

Scoring = Literal["share_won", "bradley_terry"]
Pair = tuple[int, int]
Wins = list[list[float]]
"""wins[i][j]: how often the i-th won against the j-th; a win may count in part."""

DRAWS = 1.0
"""Of each one with all others together, on top of what was heard."""
CLOSE = 1e-12
"""In nats: scores that move less in a step have arrived."""


class Shown(NamedTuple):
    """Two answers in the order in which a judge sees them."""

    prompt: Prompt
    first: Candidate
    second: Candidate


def share_won(wins: Wins) -> list[float | None]:
    """Of the comparisons that each one decided, the share it won; None where it decided none."""
    won = [math.fsum(row) for row in wins]
    lost = [math.fsum(column) for column in zip(*wins, strict=True)]
    return [
        own / (own + other) if own + other else None for own, other in zip(won, lost, strict=True)
    ]


def bradley_terry(wins: Wins) -> list[float | None]:
    """Log-strengths in nats with mean 0; None for one that neither won nor lost.

    The i-th beats the j-th with probability 1 / (1 + exp(score j - score i)). So that one who
    never lost stays finite, each also drew `DRAWS` times, spread evenly over all the others. The
    result is the maximum likelihood, and to the last bit the same in any order of the rows.

    Source: Hunter, "MM algorithms for generalized Bradley-Terry models" (Annals of Statistics
    32(1), 2004), equation 3; the draws are ours.
    """
    played = [n for n, row in enumerate(wins) if any(row) or any(other[n] for other in wins)]
    if not played:
        return [None] * len(wins)
    drawn = DRAWS / (len(played) - 1)
    won = [math.fsum([*wins[one], DRAWS / 2]) for one in played]
    met = [[wins[one][other] + wins[other][one] + drawn for other in played] for one in played]
    scores, moved = [0.0] * len(played), math.inf
    while moved > CLOSE:
        before, scores = scores, _improved(scores, won, met)
        moved = max(abs(now - then) for now, then in zip(scores, before, strict=True))
    found = dict(zip(played, scores, strict=True))
    return [found.get(n) for n in range(len(wins))]


def _improved(scores: list[float], won: list[float], met: Wins) -> list[float]:
    strengths = [math.exp(score) for score in scores]
    logs = []
    for n, own in enumerate(strengths):
        # fsum is exact, so no order of adding up can be seen in what it gives.
        expected = math.fsum(
            times / (own + other)
            for m, (times, other) in enumerate(zip(met[n], strengths, strict=True))
            if m != n
        )
        logs.append(math.log(won[n] / expected))
    mean = math.fsum(logs) / len(logs)
    return [log - mean for log in logs]


SCORINGS: dict[Scoring, Callable[[Wins], list[float | None]]] = {
    "share_won": share_won,
    "bradley_terry": bradley_terry,
}


class ComparingJudge(ABC):
    """A judge that compares two answers; a subclass says how two that are shown compare."""

    scoring: ClassVar[Scoring] = "share_won"
    """`share_won`: of its decided comparisons, in [0, 1]; `bradley_terry`: a log-strength."""
    comparisons: int | Literal["all"] = "all"
    """With how many others an answer is compared at most."""
    by_text: ClassVar[bool] = False
    """Whether two answers that read the same are the same to the judge. It then compares neither
    with the other: what it said would be chance."""

    @abstractmethod
    def compare(self, shown: Sequence[Shown], policy: Policy | None, call: Call) -> list[Verdict]:
        """What the judge says of each two, in order, as a verdict on the one shown first.

        Its value is 1 where the first is better, 0 where the second is, None where neither was
        said to be.
        """

    def tally(self, boards: Sequence[Board]) -> list[Wins]:
        """What the comparisons heard so far count, for each board."""
        return [board.wins() for board in boards]

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        """The comparisons of all groups that can be made at once are one call of `compare`."""
        boards = [Board(group, self.comparisons, self.by_text, call) for group in groups]
        while drawn := [
            (board, one, other)
            for board, scores in zip(boards, self._scores(boards), strict=True)
            for pair in board.draw(scores)
            for one, other in (pair, pair[::-1])
        ]:
            shown = [board.shown(one, other) for board, one, other in drawn]
            verdicts = self.compare(shown, policy, call)
            for (board, one, other), verdict in zip(drawn, verdicts, strict=True):
                board.heard[one, other] = verdict
        return [
            judgement
            for board, scores in zip(boards, self._scores(boards), strict=True)
            for judgement in board.judgements(scores)
        ]

    def _scores(self, boards: Sequence[Board]) -> list[list[float | None]]:
        return [SCORINGS[self.scoring](wins) for wins in self.tally(boards)]


class Board:
    """The comparisons of one group: those that were heard, and which to make next.

    Candidates are named by their place in the group; heard[i, j] showed the i-th first.
    """

    def __init__(
        self, group: Group, comparisons: int | Literal["all"], by_text: bool, call: Call
    ) -> None:
        self.heard: dict[Pair, Verdict] = {}
        self._group = group
        self._candidates = group.candidates
        self.size = len(group.candidates)
        self._left = {
            (one, other)
            for one, other in combinations(range(self.size), 2)
            if not by_text or self._candidates[one].text != self._candidates[other].text
        }
        most = self.size - 1
        self._budget = most if comparisons == "all" else min(comparisons, most)
        self._all_at_once = self._budget == most
        self._lots = [
            call.seed_for(group.prompt.digest, "lot", one.index) for one in self._candidates
        ]

    def shown(self, one: int, other: int) -> Shown:
        return Shown(self._group.prompt, self._candidates[one], self._candidates[other])

    def draw(self, scores: Sequence[float | None]) -> list[Pair]:
        """The pairs to compare next, none of them a second time; none when all is done.

        With a budget these are the pairs of one round: each in one at most, and neighbours by
        `scores`, in which equals and those without one are in an order drawn from the seed.
        """
        drawn = sorted(self._left) if self._all_at_once else self._round(scores)
        self._left.difference_update(drawn)
        return drawn

    def _round(self, scores: Sequence[float | None]) -> list[Pair]:
        played = Counter(one for one, _ in self.heard)
        able = [n for n in range(self.size) if played[n] < self._budget]
        ranked = sorted(able, key=lambda n: (-(scores[n] or 0.0), self._lots[n]))
        if len(ranked) % 2 == 0:
            return neighbours(ranked, self._left)
        # One sits out: of those who played most the weakest, so that it is another each time.
        resting = max(reversed(ranked), key=lambda n: played[n])
        playing = [n for n in ranked if n != resting]
        return neighbours(playing, self._left) or neighbours(ranked, self._left)

    def winner_first(self, one: int, other: int) -> bool | None:
        """Whether the first of two won in both orders; None where no order-free winner is."""
        shown_first, shown_second = self.heard[one, other].value, self.heard[other, one].value
        if shown_first is None or shown_second is None or shown_first == shown_second:
            return None
        return shown_first == 1.0

    def wins(self) -> Wins:
        places = range(self.size)
        return [
            [
                float((one, other) in self.heard and self.winner_first(one, other) is True)
                for other in places
            ]
            for one in places
        ]

    def judgements(self, scores: Sequence[float | None]) -> list[Judgement]:
        return [self._judgement(n, score) for n, score in enumerate(scores)]

    def _judgement(self, place: int, score: float | None) -> Judgement:
        others = [n for n in range(self.size) if (place, n) in self.heard]
        outcomes = [self.winner_first(place, other) for other in others]
        decided = len(outcomes) - outcomes.count(None)
        words = (
            f"won {outcomes.count(True)} of {decided} decided comparisons; "
            f"{len(outcomes) - decided} undecided"
        )
        return Judgement(
            candidate_id=self._candidates[place].id,
            score=score,
            status="ok" if score is not None else self._without_score(place, others),
            reason=words if others else "nothing to compare it with",
            verdicts=tuple(self.heard[place, other] for other in others),
        )

    def _without_score(self, place: int, others: Sequence[int]) -> Status:
        """What most of its comparisons lack; one heard in both orders lacks a winner alone."""
        lacking = Counter(
            without_score([self.heard[place, other], self.heard[other, place]]) for other in others
        )
        # By name where as many lack one as another, so that no order of candidates can be seen.
        return max(sorted(lacking), key=lambda status: lacking[status], default="abstained")


def neighbours(ranked: Sequence[int], left: Collection[Pair]) -> list[Pair]:
    """Pairs of neighbours in `ranked`, all of them in `left`: each with the next it may meet."""
    waiting, pairs, alone = list(ranked), [], []
    while waiting:
        one = waiting.pop(0)
        other = next((each for each in waiting if _pair(one, each) in left), None)
        if other is None:
            alone.append(one)
        else:
            waiting.remove(other)
            pairs.append((one, other))
    while (mended := _mended(pairs, alone, left)) is not None:
        pairs, alone = mended
    return [_pair(*each) for each in pairs]


def _mended(
    pairs: list[Pair], alone: list[int], left: Collection[Pair]
) -> tuple[list[Pair], list[int]] | None:
    """Two who are left over and have met already break up a pair and take one side each."""
    for one, other in combinations(alone, 2):
        for pair in reversed(pairs):
            # Sides go by rank, never by place, which says in what order the candidates came.
            for here, there in (pair, pair[::-1]):
                if _pair(one, here) in left and _pair(other, there) in left:
                    kept = [each for each in pairs if each != pair]
                    made = [(here, one), (there, other)]
                    return kept + made, [n for n in alone if n not in (one, other)]
    return None


def _pair(one: int, other: int) -> Pair:
    return (one, other) if one < other else (other, one)
