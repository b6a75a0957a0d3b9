"""Ask a weak model whether an answer is better than others whose worth is known.

Whether one answer is right may be more than a small model can tell. Whether it is better than an
answer to another question is easier, and a few such comparisons say the first.
"""

# No `from __future__ import annotations` here: see judges/model_judge.py.

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pvariance
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from judges.choices import TIE, Winner
from judges.model_judge import ModelJudge, told, verdict, without_score
from roles.proposers.rows import read_rows
from roles.protocols import Policy
from roles.template import conversation
from store.errors import UserError
from store.records import ALONE, Call, Candidate, Group, Judgement, Prompt, Reply, Verdict

LABELS: dict[Any, bool] = {True: True, False: False, "right": True, "wrong": False}


class Labelled(NamedTuple):
    """A question with an answer that is known to be right or wrong."""

    question: str
    answer: str
    right: bool


class _Comparison(NamedTuple):
    """A candidate against a reference: shown first, and shown second."""

    candidate: Candidate
    place: int
    reference: Labelled
    questions: tuple[Prompt, Prompt]
    seeds: tuple[int, int]


class _Heard(NamedTuple):
    """What one comparison came to in its two orders, and what their replies lacked."""

    verdicts: list[Verdict]
    lacking: list[str]

    @property
    def vote(self) -> float | None:
        """What both orders say, None where they do not agree."""
        first, second = (each.value for each in self.verdicts)
        return first if first == second else None


@dataclass(kw_only=True)
class MetaRanking(ModelJudge):
    """A judge that asks a weak model to compare each answer with some that are labelled.

    The model sees the candidate with its question and a reference with its own, in both orders,
    and says which answer is better, or that neither is. It is told no label. An answer that is no
    worse than a right one, or better than a wrong one, has a vote of 1 for being right; one that
    is worse than a right one, or no better than a wrong one, has a vote of -1. Where the votes of
    the two orders differ there is none. The score is the mean of the votes, in [-1, 1].

    Source: "Meta Ranking: Less Capable Language Models are Capable for Single Response Judgement"
    (arXiv 2402.12146): comparisons across questions with five references. Both orders, and a mean
    of equal votes, are ours.

    references_path: a file of rows with `question`, `answer` and `label`, which is true or false
    (or "right" or "wrong"); JSON lines, or what else a data set may be.
    k: how many references an answer is compared with; among them are right ones and wrong ones.
    draw: `first` takes the first k of the file for all, `seed` draws k for each candidate.
    min_votes: of how many references there must be a vote.
    prompt_path: a text of your own with {question_a}, {answer_a}, {question_b}, {answer_b}.
    """

    references_path: Path
    k: Annotated[int, Field(ge=2)] = 5
    draw: Literal["first", "seed"] = "first"
    min_votes: Annotated[int, Field(ge=1)] = 1
    require_justification: bool = True

    needs: ClassVar[tuple[str, ...]] = ("question_a", "answer_a", "question_b", "answer_b")

    def __post_init__(self) -> None:
        if self.min_votes > self.k:
            raise UserError(
                f"judge 'meta_ranking' has k = {self.k} and min_votes wants {self.min_votes}"
            )
        known = _read(self.references_path)
        self.labelled = known if self.draw == "seed" else known[: self.k]
        self._check(len(known))
        said = hashlib.sha256(json.dumps(self.labelled).encode()).hexdigest()
        self.template = self.take_template("meta_ranking", self.needs, told=f" {said[:12]}")
        self.reading = Winner("AB", self.require_justification, ties=True)

    def _check(self, found: int) -> None:
        place, kinds = str(self.references_path), {each.right for each in self.labelled}
        if found < self.k:
            raise UserError(
                f"judge 'meta_ranking' compares with k = {self.k} references, and {place!r} has "
                f"{found}; give it more, or set k"
            )
        if len(kinds) < 2:
            where = f"the first {self.k} of {place!r}" if self.draw == "first" else repr(place)
            raise UserError(
                f"judge 'meta_ranking' needs right and wrong references, and {where} are all "
                f'{"right" if True in kinds else "wrong"}; mix them, or set draw = "seed"'
            )

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        """Every comparison of every candidate, in both orders, asked in one call."""
        made = [
            each
            for group in groups
            for one in group.candidates
            for each in self._comparisons(group.prompt, one, call)
        ]
        questions = [question for each in made for question in each.questions]
        seeds = [[seed] for each in made for seed in each.seeds]
        replies = self.ask(policy, questions, seeds, call, self.reading.schema)
        said = [reply for (reply,) in replies]
        heard: dict[int, list[_Heard]] = {}
        for each, both in zip(made, zip(said[::2], said[1::2], strict=True), strict=True):
            heard.setdefault(each.candidate.id, []).append(self._heard(each, both))
        return [self._concluded(one, heard[one.id]) for group in groups for one in group.candidates]

    def _comparisons(self, prompt: Prompt, one: Candidate, call: Call) -> list[_Comparison]:
        own, made = (conversation(prompt), one.text), []
        for place, reference in enumerate(self._references(prompt, one, call)):
            other = (reference.question, reference.answer)
            shown = ((*own, *other), (*other, *own))
            first, second = (
                self.template.fill(**dict(zip(self.needs, each, strict=True))) for each in shown
            )
            seeds = [call.seed_for(prompt.digest, one.index, place, order) for order in (0, 1)]
            made.append(_Comparison(one, place, reference, (first, second), (seeds[0], seeds[1])))
        return made

    def _references(self, prompt: Prompt, one: Candidate, call: Call) -> list[Labelled]:
        """One of each label, drawn, and the rest from all that are left."""
        if self.draw == "first":
            return self.labelled
        chance = random.Random(call.seed_for(prompt.digest, one.index, "references"))
        mixed = chance.sample(range(len(self.labelled)), len(self.labelled))
        sure = [
            next(n for n in mixed if self.labelled[n].right is right) for right in (True, False)
        ]
        rest = [n for n in mixed if n not in sure]
        return [self.labelled[n] for n in (sure + rest)[: self.k]]

    def _heard(self, asked: _Comparison, said: Sequence[Reply]) -> _Heard:
        verdicts: list[Verdict] = []
        lacking: list[str] = []
        for order, (question, reply) in enumerate(zip(asked.questions, said, strict=True)):
            choice, why = self.reading.read(reply, question)
            value = None if choice is None else _vote(choice, order, asked.reference.right)
            if value is None:
                lacking.append(why)
            place = {"order": order, "vote": asked.place}
            verdicts.append(verdict(asked.candidate.id, question, reply, value, why, **place))
        return _Heard(verdicts, lacking)

    def _concluded(self, one: Candidate, heard: Sequence[_Heard]) -> Judgement:
        votes = [vote for each in heard if (vote := each.vote) is not None]
        verdicts = [said for each in heard for said in each.verdicts]
        lacking = [why for each in heard for why in each.lacking]
        split = sum(each.vote is None and not each.lacking for each in heard)
        reason = f"{votes.count(1.0)} votes for right, {votes.count(-1.0)} for wrong"
        reason += f"; the order decided {split}" if split else ""
        reason += f"; {told(lacking, len(verdicts))}" if lacking else ""
        enough = len(votes) >= self.min_votes
        return Judgement(
            candidate_id=one.id,
            score=fmean(votes) if enough else None,
            status="ok" if enough else without_score(verdicts),
            reason=reason,
            variance=pvariance(votes) if enough and len(votes) > 1 else None,
            verdicts=tuple(verdicts),
        )


def _vote(choice: str, order: int, right: bool) -> float:
    """1 for the candidate being right, -1 for its being wrong. right: whether the reference is."""
    if choice == TIE:
        return 1.0 if right else -1.0
    return 1.0 if (choice == "A") == (order == 0) else -1.0


def _read(path: Path) -> list[Labelled]:
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r} to take labelled references from")
    found = []
    for place, row in read_rows(path):
        question, answer, label = (row.get(name) for name in ("question", "answer", "label"))
        if not isinstance(question, str) or not isinstance(answer, str):
            raise UserError(
                f"{place}: a labelled reference has texts `question` and `answer`; "
                f"found {question!r} and {answer!r}"
            )
        if isinstance(label, str):
            label = {"true": True, "false": False}.get(label.lower(), label)
        if not isinstance(label, bool | str | int) or label not in LABELS:
            raise UserError(
                f'{place}: a label is true or false, "right" or "wrong"; found {label!r}'
            )
        found.append(Labelled(question, answer, LABELS[label]))
    return found
