"""Demonstrations over the policy's own answers, old and new, and newer answers over older ones.

Source: "Show, Don't Tell: Aligning Language Models with Demonstrated Feedback" (arXiv 2406.00888),
section 3: an expert's demonstration is preferred over what any checkpoint answers, and a later
checkpoint's answer over an earlier one's. The shares of the three kinds are options.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from random import Random
from typing import Annotated, NamedTuple

from pydantic import Field

from roles.filters.eligibility import drop, same
from roles.protocols import History
from store.errors import UserError
from store.records import Call, Candidate, Dropped, Earlier, Example, Group, Judgement, Selection


class _Pair(NamedTuple):
    chosen: Candidate
    rejected: Candidate


class Demonstrated:
    """pairs: at most so many a prompt.
    online, replay, between: the shares of pairs in which a demonstration is preferred over this
    round's answers, over those of earlier rounds, and an answer over one of an earlier round. What
    one kind lacks, as the last two do in the first round, the first gives.

    A demonstration is a candidate that no policy wrote. Scores are not looked at. What earlier
    rounds answered is known where the prompts are asked again, as the proposer `repeated` does.
    """

    rule = "demonstrated"
    gives = "pair"

    def __init__(
        self,
        pairs: Annotated[int, Field(ge=1)] = 10,
        online: Annotated[float, Field(ge=0, le=1)] = 0.7,
        replay: Annotated[float, Field(ge=0, le=1)] = 0.2,
        between: Annotated[float, Field(ge=0, le=1)] = 0.1,
    ) -> None:
        if abs(online + replay + between - 1) > 1e-6:
            raise UserError(
                "demonstrated divides its pairs among online, replay and between, which add up to "
                f"1; found {online:g}, {replay:g} and {between:g}"
            )
        self.pairs = pairs
        self.replay, self.between = replay, between

    def select(
        self,
        groups: Sequence[Group],
        judgements: Sequence[Judgement],
        history: History,
        call: Call,
    ) -> Selection:
        earlier = history.earlier(call)
        examples: list[Example] = []
        dropped: list[Dropped] = []
        for group in groups:
            made = self._pairs(group, earlier.get(group.asked_id, ()), call)
            examples += [_example(group, pair, self.rule) for pair in made]
            if not made:
                few = len(group.candidates) < 2
                dropped.append(drop(group, "too few candidates" if few else "duplicate"))
        return Selection(examples=tuple(examples), dropped=tuple(dropped))

    def _pairs(self, group: Group, earlier: Sequence[Earlier], call: Call) -> list[_Pair]:
        shown = [one for one in group.candidates if one.checkpoint_id is None]
        now = [one for one in group.candidates if one.checkpoint_id is not None]
        then = [each for each in earlier if each.candidate.checkpoint_id is not None]
        before = [each.candidate for each in then]
        chance = Random(call.seed_for(group.prompt.digest))
        replayed = _drawn(shown, before, round(self.replay * self.pairs), chance)
        among = _between(now, then)
        chance.shuffle(among)
        among = among[: round(self.between * self.pairs)]
        online = _drawn(shown, now, self.pairs - len(replayed) - len(among), chance)
        return [*online, *replayed, *among]


def _drawn(
    better: Sequence[Candidate], worse: Sequence[Candidate], count: int, chance: Random
) -> list[_Pair]:
    """Up to `count` pairs that differ in their text."""
    pairs = [_Pair(*pair) for pair in product(better, worse) if not same(*pair)]
    chance.shuffle(pairs)
    return pairs[: max(count, 0)]


def _between(now: Sequence[Candidate], then: Sequence[Earlier]) -> list[_Pair]:
    """Every answer over every one of an earlier round."""
    rounds = [(each.round, each.candidate) for each in then]
    newest = 1 + max((number for number, _ in rounds), default=0)
    known = [*((newest, each) for each in now), *rounds]
    return [
        _Pair(one, other)
        for (late, one), (early, other) in product(known, known)
        if late > early and not same(one, other)
    ]


def _example(group: Group, pair: _Pair, rule: str) -> Example:
    return Example(
        kind="pair",
        asked_id=group.asked_id,
        prompt=group.prompt,
        chosen=pair.chosen,
        rejected=pair.rejected,
        rule=rule,
    )
