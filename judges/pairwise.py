"""Ask a model which of two answers is better, in both orders, and score a group by who won."""

# No `from __future__ import annotations` here: see judges/model_judge.py.

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from judges.choices import TIE, Winner, asked_parts, spelled
from judges.comparing import ComparingJudge, Scoring, Shown
from judges.model_judge import ModelJudge, verdict
from roles.protocols import Policy
from store.records import Call, Completion, Prompt, Reply, Verdict

SIDES = "AB"
"""The letters of the answer that is shown first and of the other."""


@dataclass(kw_only=True)
class Pairwise(ModelJudge, ComparingJudge):
    """A judge that asks a model which of two answers is better, in both orders.

    Only an answer that is preferred in both orders has won; where they disagree, the comparison is
    undecided. A candidate's score is its Bradley-Terry log-strength within its group, in nats
    around 0 (`judges.comparing`); one without a decided comparison abstains. Two answers that read
    the same are not compared.

    prompt_path: a text of your own with {question}, {first} and {second}; {choices} becomes what
    may be chosen, {reference} the right answer.
    comparisons: `all`, or with how many others each answer is compared at most: a tournament in
    rounds, in each of which neighbours by what is known so far meet, and nobody twice.
    ties: whether the model may call two answers equal, which leaves them undecided.
    require_justification: whether something must stand before the choice.
    """

    version: ClassVar[str] = "1"
    scoring: ClassVar[Scoring] = "bradley_terry"
    by_text: ClassVar[bool] = True

    comparisons: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    ties: bool = False
    require_justification: bool = True

    def __post_init__(self) -> None:
        self._take("pairwise", ("question", "first", "second"), ("reference", "choices"))

    def _take(self, name: str, needs: Sequence[str], may: Sequence[str]) -> None:
        self.reading = Winner(SIDES, self.require_justification, self.ties)
        template = self.take_template(name, needs, may, told=" ties" if self.ties else "")
        self.template = spelled(template, "choices", self.reading.form)

    def compare(self, shown: Sequence[Shown], policy: Policy | None, call: Call) -> list[Verdict]:
        """One question for each two that are shown, all asked in one call."""
        questions = [self.question(*each) for each in shown]
        seeds = [[call.seed_for(at.digest, one.index, two.index)] for at, one, two in shown]
        replies = self.ask(policy, questions, seeds, call, self.reading.schema)
        return [
            self._heard(each, question, said)
            for each, question, (said,) in zip(shown, questions, replies, strict=True)
        ]

    def question(self, asked: Prompt, first: Completion, second: Completion) -> Prompt:
        """What the model is asked of two answers, in this order."""
        parts = asked_parts(self.template, asked)
        return self.template.fill(first=first.text, second=second.text, **parts)

    def _heard(self, shown: Shown, question: Prompt, said: Reply) -> Verdict:
        choice, why = self.reading.read(said, question)
        value = {SIDES[0]: 1.0, SIDES[1]: 0.0}.get(choice or "")
        place = {"other_candidate_id": shown.second.id, "order": 0}
        kept = verdict(shown.first.id, question, said, value, why, **place)
        return replace(kept, status="abstained") if choice == TIE else kept
