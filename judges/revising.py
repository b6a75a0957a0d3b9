"""Prompts that ask for a critique of an answer or for its revision, to warm up who does both.

Each is what the generator `revised` asks, word for word, about answers that are the reference or
have mistakes in them; and the right thing to say is known.
"""

# No `from __future__ import annotations` here: see judges/model_judge.py.

import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from judges.judging import QUESTION, Questions, compared, known_by, right_answer
from roles import plugins
from roles.generators.demonstrations import with_mistake
from roles.generators.revised import criticism, revision
from roles.protocols import History, Policy, Proposer
from roles.template import conversation, substitute
from store.records import Call, Prompt, Split


class Revising:
    """proposer: where the questions and their right answers come from: a role's table, as in
    { use = "reasoning_gym", tasks = [...] }.
    of: what is asked for: a `critique`, or what comes after it, the `revision`; or an `extension`
    of an answer that stops early, which is right as far as it goes.
    critique, revise, critique_path, revise_path, nonce: as `revised` has them.
    mistakes: the share of answers that carry mistakes; worst: at most how many. Of answers that are
    to be revised all do.
    longer: by how many characters an extension is longer, at least and at most.
    said: the right critique, with places for {reference}, {comparison} (as `judging` has it) and
    {verdict}, which is good or mend.
    """

    def __init__(
        self,
        proposer: dict[str, Any],
        of: Literal["critique", "revision", "extension"] = "critique",
        critique: str = "critique",
        revise: str = "revise",
        critique_path: Path | None = None,
        revise_path: Path | None = None,
        nonce: bool = True,
        mistakes: Annotated[float, Field(ge=0, le=1)] = 0.5,
        worst: Annotated[int, Field(ge=1)] = 1,
        longer: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 3),
        said: str = "The right answer is {reference}.\nVerdict: {verdict}",
    ) -> None:
        self.proposer: Proposer = plugins.inner("proposer", proposer, "revising's proposer")
        self.of = of
        if of == "critique":
            self.template = criticism(critique, critique_path, nonce)
        else:
            self.template = revision(revise, revise_path, nonce)
        self.mistakes = 1.0 if of == "revision" else mistakes
        self.worst, self.longer, self.said = worst, longer, said

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        """A prompt for each question of the other proposer."""
        questions = self.proposer.propose(count, split, Questions(history), policy, call)
        held_out = history.held_out()
        made = (self._prompt(each, call) for each in questions)
        free = (each for each in made if each.question_digest not in held_out)
        return list({each.digest: each for each in free}.values())

    def _prompt(self, question: Prompt, call: Call) -> Prompt:
        right = right_answer(question)
        chance = random.Random(call.seed_for(question.digest, "revising"))
        if self.of == "extension":
            return self._extension(question, right, chance)
        answer = right
        if chance.random() < self.mistakes:
            for _ in range(chance.randint(1, self.worst)):
                answer = with_mistake(answer, chance)
        known = {
            "reference": right,
            "comparison": compared(right, answer),
            "verdict": "good" if answer == right else "mend",
        }
        critique = substitute(self.said, known)
        parts = {"question": conversation(question), "answer": answer}
        asked = self.template.fill(**parts, critique=critique)
        return replace(
            asked,
            reference=right if self.of == "revision" else critique,
            split=question.split,
            columns=parts | {"reference": right, QUESTION: known_by(question)},
        )

    def _extension(self, question: Prompt, right: str, chance: random.Random) -> Prompt:
        """An answer that stops early; the right thing to say is the same one with more of it."""
        more = chance.randint(*self.longer)
        begun = right[: chance.randint(1, max(1, len(right) - more))]
        parts = {"question": conversation(question), "answer": begun}
        return replace(
            self.template.fill(**parts, critique=""),
            reference=right[: len(begun) + more],
            split=question.split,
            columns=parts | {"reference": right, QUESTION: known_by(question)},
        )
