"""Prompts that ask for a judgement whose right one is known, to warm up or train a judge.

Each is what the judge `rubric` asks about an answer that is the reference or has mistakes in it.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from judges.rubric import rubric_prompt, rubric_template
from judges.template import TASK, conversation, substitute
from roles import plugins
from roles.generators.demonstrations import with_mistake
from roles.protocols import History, Policy, Proposer
from store.errors import UserError
from store.records import Call, Prompt, Split

QUESTION = "question_digest"
"""The column of what `Prompt.digest` of the question was."""


class Judging:
    """proposer: where the questions and their right answers come from: a role's table, as in
    { use = "reasoning_gym", tasks = [...] }.
    prompt, prompt_path, low, high: as the judge `rubric` has them.
    answers: how many of each question; mistakes: the share of them that carry mistakes; worst: at
    most how many.
    judgement: the right judgement, with places for {reference}, {score} and {comparison}, which is
    reference and answer side by side, a character at a time: `c:c+ a:o- t:t+`. A small model that
    writes it finds each difference in what it just wrote.

    The score of an answer is `high` where it is the reference, and else the share of its characters
    that stand where they should, of the way from `low` to `high`, but below `high`.
    """

    def __init__(
        self,
        proposer: dict[str, Any],
        prompt: str = "rubric",
        prompt_path: Path | None = None,
        answers: Annotated[int, Field(ge=1)] = 1,
        mistakes: Annotated[float, Field(ge=0, le=1)] = 0.5,
        worst: Annotated[int, Field(ge=1)] = 1,
        low: int = 0,
        high: int = 5,
        judgement: str = "The right answer is {reference}.\nScore: {score}",
    ) -> None:
        options = dict(proposer)
        use = options.pop("use", None)
        if not isinstance(use, str):
            raise UserError(
                "proposer 'judging' takes its questions from another: "
                f'proposer = {{ use = "reasoning_gym", ... }}; found {proposer}'
            )
        if not low < high:
            raise UserError(f"the lowest score, {low}, is not below the highest, {high}")
        self.proposer: Proposer = plugins.load("proposer", use, options)
        self.template = rubric_template(prompt, prompt_path)
        self.answers = answers
        self.mistakes = mistakes
        self.worst = worst
        self.low = low
        self.high = high
        self.judgement = judgement

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        """`answers` prompts for each question of the other proposer, fewer where answers are alike;
        `count` in all."""
        wanted = -(-count // self.answers)
        questions = self.proposer.propose(wanted, split, _Questions(history), policy, call)
        held_out = history.held_out()
        asked = (self._prompt(each, n, call) for n in range(self.answers) for each in questions)
        made = {one.digest: one for one in asked if one.digest not in held_out}
        return list(made.values())[:count]

    def _prompt(self, question: Prompt, number: int, call: Call) -> Prompt:
        right = question.reference
        if right is None:
            raise UserError(
                "proposer 'judging' needs questions with a right answer, and "
                f"{question.messages[-1].content[:60]!r} has none"
            )
        answer = self._answer(right, random.Random(call.seed_for(question.digest, TASK, number)))
        score = self.score(answer, right)
        asked = rubric_prompt(self.template, question, answer)
        return replace(
            asked,
            reference=substitute(
                self.judgement,
                {
                    "reference": right,
                    "score": str(score),
                    "comparison": compared(right, answer),
                },
            ),
            split=question.split,
            columns={
                "question": conversation(question),
                "answer": answer,
                "reference": right,
                "score": score,
                QUESTION: question.digest,
            },
        )

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


class _Questions:
    """A history in which a prompt made here also stands for the question inside it.

    A question whose judgement is held out then stays out of training, whatever answer it gets.
    """

    def __init__(self, history: History) -> None:
        self._history = history

    def asked(self) -> frozenset[str]:
        return self._history.asked() | self._inside("train")

    def held_out(self) -> frozenset[str]:
        return self._history.held_out() | self._inside("gate", "test", "anchor")

    def prompts(self, *splits: Split) -> list[Prompt]:
        return self._history.prompts(*splits)

    def _inside(self, *splits: Split) -> frozenset[str]:
        columns = (prompt.columns for prompt in self._history.prompts(*splits))
        return frozenset(each[QUESTION] for each in columns if QUESTION in each)
