"""Ask a model to grade each answer by a rubric: the policy itself, a frozen model or a server.

The judge's own reply is all that is read, and of it the end. Whatever cannot be read as a grade
there is `unparsed`, never a low score.
"""

# No `from __future__ import annotations` here: see judges/model_judge.py.

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from statistics import fmean, pvariance
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag
from pydantic.dataclasses import dataclass as checked

from judges.choices import asked_parts, spelled
from judges.model_judge import ModelJudge, told, verdict, without_score
from judges.prompts import prompt_of
from judges.reading import SCORE_LINE, Reading, object_schema
from roles.protocols import Policy
from roles.template import Template
from store.errors import UserError
from store.records import ALONE, STRICT, Call, Candidate, Group, Judgement, Prompt, Reply

HOLDS_LINE = (
    r"[*_]{0,3}holds?[*_]{0,3}:[*_]{0,3}\s*(none|[0-9]+(?:\s*,\s*[0-9]+)*)[*_]{0,3}\.?[*_]{0,3}"
)


@checked(frozen=True, kw_only=True, config=STRICT)
class Criterion:
    """One thing that is wanted of an answer, and what it is worth."""

    text: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


_Listed = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")] | Annotated[Criterion, Tag("table")],
    Discriminator(lambda each: "text" if isinstance(each, str) else "table"),
]


@dataclass(frozen=True)
class Checklist(Reading):
    """How the criteria that hold are read: their numbers, on the last line; worth their weights."""

    field: ClassVar[str] = "holds"

    weights: tuple[float, ...]

    @property
    def schema(self) -> dict[str, Any]:
        number = {"type": "integer", "minimum": 1, "maximum": len(self.weights)}
        says = "the numbers of the criteria that hold"
        held = {"type": "array", "items": number, "description": says}
        return object_schema(**{self.field: held})

    def _within(self, written: str) -> tuple[float | None, str]:
        listed = written.strip("[]")
        if listed.lower() in ("", "none"):
            return 0.0, ""
        numbers = {each.strip() for each in listed.split(",")}
        known = {str(n): weight for n, weight in enumerate(self.weights, start=1)}
        if strange := sorted(numbers - known.keys()):
            return None, f"{strange[0]!r} is no number of the {len(known)} criteria"
        return fsum(known[number] for number in numbers), ""


@dataclass(kw_only=True)
class Grader(ModelJudge, ABC):
    """The options of a judge that asks a model for a justification and a score, several times.

    votes, min_votes: judgements sampled of each answer, and how many must give a score.
    low, high: what a score lies within; fractions: whether it may be no whole number.
    pattern: what the judgement's last line is in full, letter case aside; its one group is the
    number. require_justification: whether something must stand before it.
    """

    votes: Annotated[int, Field(ge=1)] = 3
    min_votes: Annotated[int, Field(ge=1)] = 1
    low: int = 0
    high: int = 5
    fractions: bool = False
    pattern: str = SCORE_LINE
    require_justification: bool = True

    def __post_init__(self) -> None:
        if self.min_votes > self.votes:
            raise UserError(
                f"the judge has {self.votes} votes and min_votes wants {self.min_votes}"
            )
        if self.votes > 1 and self.temperature == 0:
            raise UserError(
                f"a judge at temperature 0 says the same {self.votes} times; set votes = 1"
            )
        self.reading = Reading(
            self.pattern, self.low, self.high, self.fractions, self.require_justification
        )
        self.template = self._template()

    @abstractmethod
    def _template(self) -> Template:
        """The text to ask, taken when the reading is made and may yet be replaced."""

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        """Every vote on every candidate, asked in one call."""
        judged = [(group.prompt, one) for group in groups for one in group.candidates]
        questions = [rubric_prompt(self.template, asked, one.text) for asked, one in judged]
        seeds = [
            [call.seed_for(asked.digest, one.index, vote) for vote in range(self.votes)]
            for asked, one in judged
        ]
        replies = self.ask(policy, questions, seeds, call, self.reading.schema)
        return [
            self._concluded(one, question, said)
            for (_, one), question, said in zip(judged, questions, replies, strict=True)
        ]

    def _concluded(
        self, candidate: Candidate, question: Prompt, said: Sequence[Reply], **place: Any
    ) -> Judgement:
        """place: what else its verdicts say of where they were asked, as other_candidate_id."""
        read = [self.reading.read(one, question) for one in said]
        verdicts = tuple(
            verdict(candidate.id, question, one, value, why, vote=vote, **place)
            for vote, (one, (value, why)) in enumerate(zip(said, read, strict=True))
        )
        values = [value for value, _ in read if value is not None]
        enough = len(values) >= self.min_votes
        return Judgement(
            candidate_id=candidate.id,
            score=fmean(values) if enough else None,
            status="ok" if enough else without_score(verdicts),
            reason=told([why for value, why in read if value is None], self.votes),
            variance=pvariance(values) if enough and len(values) > 1 else None,
            verdicts=verdicts,
        )


@dataclass(kw_only=True)
class Rubric(Grader):
    """A judge that asks a model for a justification and a score, several times.

    A candidate's score is the mean of its votes. Source: "Self-Rewarding Language Models"
    (arXiv 2401.10020), section 2: additive score in 0..5, justification first, votes averaged.

    criteria: your own in place of the five of the additive score: a list of sentences, or of
    { text = "...", weight = 2 }. The model names those that hold, and the score is the sum of
    their weights, which are 1 where none is given.
    prompt: left out it is `rubric`, or `criteria` where there are some; `rubric_brief` is for a
    very small model. prompt_path: a text of your own with {question} and {answer}, {criteria} where
    there are some, and {reference} if it wants the right answer.
    """

    version: ClassVar[str] = "2"

    criteria: tuple[_Listed, ...] = ()

    def _template(self) -> Template:
        if not self.criteria:
            template = self.take_template("rubric", ("question", "answer"), ("reference",))
            if "{criteria}" in template.text:
                raise UserError(
                    "the judge's prompt shows {criteria}, and the judge has none: set criteria, "
                    'as in judge.criteria = ["It is short."]'
                )
            return template
        listed = [Criterion(text=each) if isinstance(each, str) else each for each in self.criteria]
        self._take_reading(listed)
        needs = ("question", "answer", "criteria")
        template = self.take_template("criteria", needs, ("reference",), told=_told(listed))
        # They are the user's own words as the rest of the text is, and stand in it without a fence.
        shown = "\n".join(f"{n}. {each.text}" for n, each in enumerate(listed, start=1))
        return spelled(template, "criteria", shown)

    def _take_reading(self, listed: Sequence[Criterion]) -> None:
        plain = Reading(SCORE_LINE, 0, 5, False, self.require_justification)
        if self.reading != plain:
            raise UserError(
                "the score of a judge with criteria is the sum of their weights; "
                "leave out low, high, fractions and pattern"
            )
        for each in listed:
            if found := re.search(r"\{(question|answer|reference|criteria)\}", each.text):
                raise UserError(
                    f"the criterion {each.text[:60]!r} spells {found[0]}, which is a place of the "
                    "judge's prompt; write it without braces"
                )
        self.reading = Checklist(
            HOLDS_LINE,
            0,
            len(listed),
            False,
            self.require_justification,
            tuple(each.weight for each in listed),
        )


def _told(criteria: Sequence[Criterion]) -> str:
    said = json.dumps([[each.text, each.weight] for each in criteria])
    return f" {hashlib.sha256(said.encode()).hexdigest()[:12]}"


def rubric_template(prompt: str, prompt_path: Path | None, nonce: bool = True) -> Template:
    return prompt_of(prompt, prompt_path, ("question", "answer"), ("reference",), nonce)


def rubric_prompt(template: Template, asked: Prompt, answer: str) -> Prompt:
    """What a judge is asked of one answer: a function of the question and the answer alone."""
    return template.fill(**asked_parts(template, asked), answer=answer)
