"""Where a judge is tried: examples, a model to ask, and what it concludes if that is in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from judges.stand_ins import Graded, Say, StandIn
from roles.protocols import Judge
from store.records import Call, Candidate, Group, Judgement, Message, Prompt

Judged = dict[int, Judgement]
"""By candidate."""

CALL = Call(seed=1, stage="judge")
WORTH = (5, 1, 3)
"""What a stand-in thinks of the answers of an example, by their place."""


class Breach(Exception):
    """The judge did what it may not; the message says what."""


class Excused(Exception):
    """What is tried is about something that the judge does not do."""


def examples() -> list[Group]:
    """Three questions, each with a right answer and two others."""
    asked = [
        ("Spell this word backward (example: sun -> nus): akee", "eeka", "akke", "keea"),
        ("What is 12 + 30?", "42", "41", "1230"),
        ("Which city is the capital of France?", "Paris", "Lyon", "Marseille"),
    ]
    groups = []
    for n, (question, *answers) in enumerate(asked):
        prompt = Prompt(
            messages=(Message(role="user", content=question),),
            reference=answers[0],
            columns={"tests": f"assert answer == {answers[0]!r}"},  # of a program, for `code`
        )
        groups.append(group_of(prompt, [f"I think it is {one}." for one in answers], 100 * n + 17))
    return groups


def group_of(asked: Prompt | str, texts: Sequence[str], first_id: int = 1) -> Group:
    """A question and answers to it, whose ids are no places."""
    prompt = asked
    if isinstance(prompt, str):
        prompt = Prompt(messages=(Message(role="user", content=prompt),))
    candidates = tuple(
        Candidate(
            id=first_id + 3 * n,
            asked_id=first_id,
            index=n,
            text=text,
            token_ids=tuple(text.encode(errors="replace")),
        )
        for n, text in enumerate(texts)
    )
    return Group(asked_id=first_id, prompt=prompt, candidates=candidates)


def only(group: Group, place: int) -> Group:
    """The group with one of its candidates alone."""
    return replace(group, candidates=group.candidates[place : place + 1])


class Bench:
    """A judge, the groups that it is tried on and what it said of them."""

    def __init__(self, judge: Judge, groups: list[Group]) -> None:
        self.judge = judge
        self.groups = groups
        self.good = Graded(
            {
                one.text: WORTH[n % len(WORTH)]
                for group in groups
                for n, one in enumerate(group.candidates)
            }
        )
        self.model = StandIn(self.good)
        self.plain: Judged = {}

    @property
    def answer(self) -> str:
        """One that is not the best."""
        return self.groups[0].candidates[1].text

    def beside_the_best(self, text: str) -> Group:
        """The first group with `text` for an answer, after its best."""
        group = self.groups[0]
        return group_of(group.prompt, [group.candidates[0].text, text], 7)

    def heard(self, groups: Sequence[Group], model: StandIn | Say) -> Judged:
        """What the judge concludes, be it complete or not."""
        return {each.candidate_id: each for each in self._said(groups, model)}

    def _said(self, groups: Sequence[Group], model: StandIn | Say | None) -> list[Judgement]:
        asked = self.good if model is None else model
        handed: Any = asked if isinstance(asked, StandIn) else StandIn(asked)
        said = self.judge.judge(groups, handed, CALL)
        if strange := [each for each in said if not isinstance(each, Judgement)]:
            raise Breach(f"it returned {strange[0]!r:.80}, which is no Judgement")
        return said

    def judged(self, groups: Sequence[Group], model: StandIn | Say | None = None) -> Judged:
        """What the judge concludes, if that is one judgement of each candidate."""
        said = self._said(groups, model)
        wanted = sorted(one.id for group in groups for one in group.candidates)
        named = sorted(each.candidate_id for each in said)
        if named != wanted:
            lost, odd = sorted({*wanted} - {*named}), sorted({*named} - {*wanted})
            twice = sorted({each for each in named if named.count(each) > 1})
            raise Breach(
                f"{len(wanted)} candidates, {len(named)} judgements; without one: {lost}; "
                f"not asked for: {odd}; more than one: {twice}"
            )
        return {each.candidate_id: each for each in said}

    def asks(self) -> None:
        """Raises Excused where the judge asks no model anything."""
        if not self.model.asked:
            raise Excused("it asks no model")

    def repeats(self) -> None:
        """Raises Excused where nothing can be learnt from asking the judge twice."""
        if not same(self.plain, self.judged(self.groups)):
            raise Excused("it does not say the same of the same twice")

    def expect_plain(self, found: Judged, when: str) -> None:
        """Raises Breach where something else was found than at first."""
        for one, judgement in found.items():
            if not alike(judgement, self.plain[one]):
                raise Breach(f"{when}, {told(self.plain[one])} becomes {told(judgement)}")


def same(one: Judged, other: Judged) -> bool:
    """Whether two say the same of each candidate of the first."""
    return all(each in other and alike(one[each], other[each]) for each in one)


def alike(one: Judgement, other: Judgement) -> bool:
    """Whether two say the same, but for rounding: batches of other sizes round differently."""
    if one.score is None or other.score is None:
        return (one.score, one.status) == (other.score, other.status)
    return math.isclose(one.score, other.score, rel_tol=1e-4, abs_tol=1e-6)


def told(judgement: Judgement) -> str:
    return judgement.status if judgement.score is None else f"{judgement.score:.4g}"
