"""Prompts that ask for a judgement whose right one is known, to warm up or train a judge.

Each is what one of the judges asks, word for word, about answers that are the reference or have
mistakes in them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from judges.choices import LETTERS, TIE, Ranking, Winner, asked_parts, spelled
from judges.listwise import lettered, place_of
from judges.meta_ranking import MetaRanking
from judges.prompts import prompt_of
from roles import plugins
from roles.generators.demonstrations import with_mistake
from roles.protocols import History, Policy, Proposer
from roles.template import TASK, conversation, substitute
from store.errors import UserError
from store.records import Call, Prompt, Split

QUESTION = "question_digest"
"""The column of what the question is `known_by`."""

Form = Literal["rubric", "reference", "pairwise", "listwise", "consistency", "meta_ranking"]
LONGEST_DRAW = 20
"""Draws after which two answers that are to differ in worth count as alike."""


@dataclass(frozen=True)
class Shape:
    """What the judge of a form shows, and how the right judgement of it ends."""

    needs: tuple[str, ...]
    last_line: str
    answers: tuple[str, ...] = ()
    """The places of the answers; none where each has a letter."""
    may: tuple[str, ...] = ()
    first_line: str = "The right answer is {reference}.\n"


SHAPES: dict[Form, Shape] = {
    "rubric": Shape(("question", "answer"), "Score: {verdict}", ("answer",), may=("reference",)),
    "reference": Shape(("question", "answer", "reference"), "Score: {verdict}", ("answer",)),
    "pairwise": Shape(
        ("question", "first", "second"),
        "Winner: {verdict}",
        ("first", "second"),
        may=("reference", "choices"),
    ),
    "listwise": Shape(("question", "answers"), "Ranking: {verdict}", may=("reference", "letters")),
    "consistency": Shape(
        ("question", "first", "second"),
        "Same: {verdict}",
        ("first", "second"),
        first_line="{comparison}\n",
    ),
    "meta_ranking": Shape(MetaRanking.needs, "Winner: {verdict}", ("answer_a", "answer_b")),
}


class Judging:
    """proposer: where the questions and their right answers come from: a role's table, as in
    { use = "reasoning_gym", tasks = [...] }.
    form: the judge that asks: rubric, reference (as mbr does too), pairwise, listwise, consistency
    (with by = "model") or meta_ranking. prompt: the text that it asks, its own if left out;
    prompt_path, nonce: as the judge has them. low, high: the ends of a score. shown: how many
    answers `listwise` ranks, fewer where some are alike.
    answers: how many prompts of each question; mistakes: the share of answers that carry mistakes;
    worst: at most how many.
    judgement: the right judgement, with places for {reference}, {comparison} and {verdict}, which
    is what its last line concludes (of a score also {score}). A comparison is the right answer and
    a given one side by side, a character at a time: `c:c+ a:o- t:t+`; several are a line each. A
    small model that writes it finds each difference in what it just wrote.
    expects: what the prompt's reference is: the `judgement`, to be imitated, or its last line, the
    `verdict`, by which the judge `verifier` with answer = "last_line" tells right judgements.

    The score of an answer is `high` where it is the reference, and else the share of its characters
    that stand where they should, of the way from `low` to `high`, but below `high`. Of two answers
    the one with the higher score wins, and they always differ in it; answers rank by it, equals in
    the order shown. In `meta_ranking`, one that is right wins against one that is not.
    """

    def __init__(
        self,
        proposer: dict[str, Any],
        form: Form = "rubric",
        prompt: str | None = None,
        prompt_path: Path | None = None,
        nonce: bool = True,
        answers: Annotated[int, Field(ge=1)] = 1,
        mistakes: Annotated[float, Field(ge=0, le=1)] = 0.5,
        worst: Annotated[int, Field(ge=1)] = 1,
        shown: Annotated[int, Field(ge=2, le=len(LETTERS))] = 4,
        low: int = 0,
        high: int = 5,
        judgement: str | None = None,
        expects: Literal["judgement", "verdict"] = "judgement",
    ) -> None:
        if not low < high:
            raise UserError(f"the lowest score, {low}, is not below the highest, {high}")
        self.proposer: Proposer = plugins.inner("proposer", proposer, "judging's proposer")
        self.form, self.shape = form, SHAPES[form]
        self.template = prompt_of(
            form if prompt is None else prompt,
            prompt_path,
            self.shape.needs,
            self.shape.may,
            nonce,
        )
        self.answers = answers
        self.mistakes = mistakes
        self.worst = worst
        self.shown = len(self.shape.answers) or shown
        self.low = low
        self.high = high
        if judgement is None:
            judgement = self.shape.first_line + self.shape.last_line
        self.judgement = judgement
        self.expects = expects

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        """`answers` prompts for each question of the other proposer, fewer where answers are alike;
        `count` in all."""
        wanted = -(-count // self.answers)
        questions = self.proposer.propose(wanted, split, Questions(history), policy, call)
        held_out = history.held_out()
        made: dict[str, Prompt] = {}
        for number in range(self.answers):
            for place, question in enumerate(questions):
                chance = random.Random(call.seed_for(question.digest, TASK, number))
                # Of a judge that compares across questions, the other one.
                both = [question, questions[place - 1]] if self._across else [question]
                prompt = self._prompt(both, chance)
                if prompt is not None and prompt.question_digest not in held_out:
                    made[prompt.digest] = prompt
        return list(made.values())[:count]

    @property
    def _across(self) -> bool:
        return self.form == "meta_ranking"

    def _prompt(self, questions: Sequence[Prompt], chance: random.Random) -> Prompt | None:
        """What the judge asks of answers to it; None where they differ in too little."""
        rights = [right_answer(question) for question in questions]
        per_answer = rights if self._across else rights * self.shown
        answers = self._drawn(per_answer, chance)
        if answers is None:
            return None
        scores = [self.score(*each) for each in zip(answers, per_answer, strict=False)]
        comparison = self._compared(answers, per_answer)
        verdict = self._verdict(scores, alike=len(set(answers)) == 1)
        known = {"reference": "\n".join(rights), "comparison": comparison, "verdict": verdict}
        if self.form in ("rubric", "reference"):
            known["score"] = verdict
        first = questions[0]
        columns: dict[str, Any] = {
            "question": conversation(first),
            "answer": answers[0],
            "reference": rights[0],
            "score": scores[0],
            QUESTION: known_by(first),
        }
        if len(answers) > 1:
            columns |= {"answers": list(answers), "scores": scores}
        wanted = self.judgement if self.expects == "judgement" else self.shape.last_line
        return replace(
            self._asked(questions, answers),
            reference=substitute(wanted, known),
            split=first.split,
            columns=columns,
        )

    def _drawn(self, rights: Sequence[str], chance: random.Random) -> list[str] | None:
        for _ in range(LONGEST_DRAW):
            answers = [self._answer(right, chance) for right in rights]
            if self.form == "listwise":
                answers = list(dict.fromkeys(answers))
            if self.form == "consistency" and chance.random() < 0.5:
                answers[1] = answers[0]
            scores = {self.score(*each) for each in zip(answers, rights, strict=False)}
            alike = len(answers) < min(2, self.shown)
            if not alike and (self.form != "pairwise" or len(scores) > 1):
                return answers
        return None

    def _asked(self, questions: Sequence[Prompt], answers: Sequence[str]) -> Prompt:
        """The prompt of the judge itself."""
        template = self.template
        if self._across:
            asked = map(conversation, questions)
            texts = [each for pair in zip(asked, answers, strict=True) for each in pair]
            return template.fill(**dict(zip(self.shape.needs, texts, strict=True)))
        places = self.shape.answers
        if self.form == "pairwise":
            template = spelled(template, "choices", Winner("AB", True).form)
        if self.form == "listwise":
            letters = LETTERS[: len(answers)]
            template = lettered(template, Ranking(letters, True))
            places = tuple(map(place_of, letters))
        shown = dict(zip(places, answers, strict=True))
        return template.fill(**asked_parts(template, questions[0]), **shown)

    def _compared(self, answers: Sequence[str], rights: Sequence[str]) -> str:
        if self.form == "consistency":
            return compared(*answers)
        pairs = zip(rights, answers, strict=False)
        return "\n".join(compared(right, answer) for right, answer in pairs)

    def _verdict(self, scores: Sequence[int], *, alike: bool) -> str:
        """What the right judgement concludes of answers with these scores."""
        match self.form:
            case "consistency":
                return "yes" if alike else "no"
            case "pairwise":
                return "A" if scores[0] > scores[1] else "B"
            case "meta_ranking":
                first, second = (score == self.high for score in scores)
                return TIE if first == second else "A" if first else "B"
            case "listwise":
                ranked = sorted(range(len(scores)), key=lambda n: -scores[n])
                return " > ".join(LETTERS[n] for n in ranked)
        return str(scores[0])

    def _answer(self, right: str, chance: random.Random) -> str:
        answer = right
        if chance.random() < self.mistakes:
            for _ in range(chance.randint(1, self.worst)):
                answer = with_mistake(answer, chance)
        return answer

    def score(self, answer: str, right: str) -> int:
        """What the right judgement of `answer` gives it."""
        if answer == right:
            return self.high
        alike = sum(map(str.__eq__, answer, right)) / max(len(answer), len(right))
        return min(round(self.low + (self.high - self.low) * alike), self.high - 1)


def compared(right: str, answer: str) -> str:
    """The two side by side, a character at a time; where one has none there is a `_`."""
    pairs = zip_longest(right, answer, fillvalue="_")
    return " ".join(f"{one}:{other}{'+' if one == other else '-'}" for one, other in pairs)


def right_answer(question: Prompt) -> str:
    if question.reference is None:
        raise UserError(
            "proposer 'judging' needs questions with a right answer, and "
            f"{question.messages[-1].content[:60]!r} has none"
        )
    return question.reference


def known_by(question: Prompt) -> str:
    """The digest that a history has of it: prompts are asked, and questions are held out."""
    return question.digest if question.split == "train" else question.question_digest


class Questions:
    """A history in which a prompt made here also stands for the question inside it.

    A question whose judgement is held out then stays out of training, whatever answer it gets.
    """

    def __init__(self, history: History) -> None:
        self._history = history

    def asked(self) -> frozenset[str]:
        return self._history.asked() | self._inside("train")

    def held_out(self) -> frozenset[str]:
        return self._history.held_out() | self._inside("gate", "test", "anchor")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._history, name)

    def _inside(self, *splits: Split) -> frozenset[str]:
        columns = (prompt.columns for prompt in self._history.prompts(*splits))
        return frozenset(each[QUESTION] for each in columns if QUESTION in each)
