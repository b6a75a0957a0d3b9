"""Ask a model to rank all answers of a group at once, in several orders."""

# No `from __future__ import annotations` here: see judges/model_judge.py.

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pvariance
from typing import Annotated, ClassVar

from pydantic import Field

from judges.choices import LETTERS, Ranking, asked_parts, spelled
from judges.model_judge import ModelJudge, told, verdict, without_score
from roles.protocols import Policy
from roles.template import Template
from store.errors import UserError
from store.records import ALONE, Call, Candidate, Group, Judgement, Prompt, Reply, Verdict


@dataclass(frozen=True)
class Lineup:
    """The different texts of a group in the order in which they are shown, A first."""

    texts: tuple[str, ...]
    question: Prompt
    seed: int
    reading: Ranking
    teller_id: int
    """The candidate whose verdict says what the reply took."""

    def values(self, said: Reply) -> tuple[Mapping[str, float], str]:
        """Text -> its share of the others that it is ranked above; none, and why, unread."""
        ranking, why = self.reading.read(said, self.question)
        if ranking is None:
            return {}, why
        below = len(ranking) - 1
        placed = (self.texts[LETTERS.index(letter)] for letter in ranking)
        return {text: (below - place) / below for place, text in enumerate(placed)}, ""


@dataclass(kw_only=True)
class Listwise(ModelJudge):
    """A judge that asks a model to rank all answers of a group, in several orders.

    A candidate's score is the mean, over the orders, of the share of the others that it is ranked
    above (its Borda count, normalised to [0, 1]); their variance is kept. Every second order is
    the one before it backwards, so with an even number of orders a model that goes by the place
    alone gives everyone 0.5.
    Answers that read the same are shown once and get one score; a group of nothing else abstains.

    A ranking is one reply and is kept as a verdict of each candidate, with the candidate's own
    value and the order's number as its vote. Tokens, seconds and cost are told by one of them, the
    answer that was shown first, so that their sum is what was spent.

    prompt_path: a text of your own with {question} and {answers}; {letters} becomes the letters to
    rank, {reference} the right answer.
    orders, min_orders: rankings asked of each group, and how many must be readable; None is all,
    as one order alone would score places.
    most: candidates that a group may have. A longer one is refused, as models lose track of long
    lists: for these take `pairwise` with a budget of comparisons.
    require_justification: whether something must stand before the ranking.
    """

    version: ClassVar[str] = "1"

    orders: Annotated[int, Field(ge=1)] = 2
    min_orders: Annotated[int, Field(ge=1)] | None = None
    most: Annotated[int, Field(ge=2, le=len(LETTERS))] = 8
    require_justification: bool = True

    def __post_init__(self) -> None:
        if (self.min_orders or 0) > self.orders:
            raise UserError(
                f"judge 'listwise' has {self.orders} orders and min_orders wants {self.min_orders}"
            )
        self.template = self.take_template(
            "listwise", ("question", "answers"), ("reference", "letters")
        )

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        """Every order of every group, asked in one call."""
        lineups = [self._lineups(group, call) for group in groups]
        asked = [each for own in lineups for each in own]
        # One call has one schema, whatever the sizes of its groups.
        schema = Ranking(LETTERS[: self.most], self.require_justification).schema
        questions = [each.question for each in asked]
        seeds = [[each.seed] for each in asked]
        replies = iter(self.ask(policy, questions, seeds, call, schema))
        return [
            judgement
            for group, own in zip(groups, lineups, strict=True)
            for judgement in self._concluded(group, own, [next(replies)[0] for _ in own])
        ]

    def _lineups(self, group: Group, call: Call) -> list[Lineup]:
        """The orders in which a group is shown; none where there is nothing to rank."""
        if len(group.candidates) > self.most:
            raise UserError(
                f"judge 'listwise' ranks up to {self.most} answers at once and a group has "
                f"{len(group.candidates)}; set most (up to {len(LETTERS)}), or take the judge "
                "'pairwise' with comparisons = 4"
            )
        by_index = sorted(group.candidates, key=lambda one: one.index)
        ids = {one.text: one.id for one in reversed(by_index)}
        texts = list(dict.fromkeys(one.text for one in by_index))
        if len(texts) < 2:
            return []
        letters = LETTERS[: len(texts)]
        reading = Ranking(letters, self.require_justification)
        template = lettered(self.template, reading)
        parts = asked_parts(template, group.prompt)
        lineups = []
        for number in range(self.orders):
            shown = list(texts)
            random.Random(call.seed_for(group.prompt.digest, "order", number // 2)).shuffle(shown)
            ordered = tuple(reversed(shown) if number % 2 else shown)
            answers = {
                place_of(letter): text for letter, text in zip(letters, ordered, strict=True)
            }
            question = template.fill(**answers, **parts)
            seed = call.seed_for(group.prompt.digest, "ranking", number)
            lineups.append(Lineup(ordered, question, seed, reading, ids[ordered[0]]))
        return lineups

    def _concluded(
        self, group: Group, lineups: Sequence[Lineup], replies: Sequence[Reply]
    ) -> list[Judgement]:
        heard = [
            (lineup, said, *lineup.values(said))
            for lineup, said in zip(lineups, replies, strict=True)
        ]
        lacking = told([why for *_, values, why in heard if not values], self.orders)
        return [
            self._judgement(
                one,
                lacking if heard else "nothing to compare it with",
                tuple(
                    _kept(one, lineup, said, values.get(one.text), why, vote)
                    for vote, (lineup, said, values, why) in enumerate(heard)
                ),
            )
            for one in group.candidates
        ]

    def _judgement(
        self, candidate: Candidate, reason: str | None, verdicts: tuple[Verdict, ...]
    ) -> Judgement:
        values = [each.value for each in verdicts if each.value is not None]
        enough = len(values) >= (self.min_orders or self.orders)
        return Judgement(
            candidate_id=candidate.id,
            score=fmean(values) if enough else None,
            status="ok" if enough else without_score(verdicts),
            reason=reason,
            variance=pvariance(values) if enough and len(values) > 1 else None,
            verdicts=verdicts,
        )


def lettered(template: Template, reading: Ranking) -> Template:
    """The template with a place for each answer, so that each is fenced by itself."""
    listed = "\n\n".join(f"Answer {letter}:\n{{{place_of(letter)}}}" for letter in reading.letters)
    places = [place_of(letter) for letter in reading.letters]
    return spelled(spelled(template, "letters", reading.form), "answers", listed, *places)


def place_of(letter: str) -> str:
    return f"answer_{letter}"


def _kept(
    one: Candidate, lineup: Lineup, said: Reply, value: float | None, why: str, vote: int
) -> Verdict:
    kept = verdict(one.id, lineup.question, said, value, why, vote=vote)
    if one.id == lineup.teller_id:
        return kept
    return replace(kept, seconds=None, tokens=None, cost=None)
