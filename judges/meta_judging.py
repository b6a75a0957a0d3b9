"""Prompts that ask which of two judgements is better, where that is known, to warm up a meta-judge.

Each is what the judge `meta` asks, word for word, about the right judgement of an answer and one
with a mistake in it.
"""

# No `from __future__ import annotations` here: see judges/model_judge.py.

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from judges.judging import QUESTION, Judging, Questions
from judges.meta import Meta
from roles.generators.demonstrations import with_mistake
from roles.protocols import History, Policy
from roles.template import conversation, substitute
from store.records import Call, Completion, Prompt, Split


class MetaJudging(Judging):
    """proposer, mistakes, worst, low, high, judgement: as `judging` has them, of the judgement that
    is judged.
    prompt, prompt_path, nonce: as the judge `meta` has them.
    said: the right word on two judgements, with places for the right {judgement} and {verdict}, A
    or B. A small model that writes the right judgement first finds which of the two it is.
    """

    def __init__(
        self,
        proposer: dict[str, Any],
        prompt: str | None = None,
        prompt_path: Path | None = None,
        nonce: bool = True,
        mistakes: float = 0.5,
        worst: int = 1,
        low: int = 0,
        high: int = 5,
        judgement: str | None = None,
        said: str = "{judgement}\nWinner: {verdict}",
    ) -> None:
        super().__init__(
            proposer,
            "rubric",
            mistakes=mistakes,
            worst=worst,
            low=low,
            high=high,
            judgement=judgement,
        )
        self.said = said
        self.meta = Meta(prompt=prompt, prompt_path=prompt_path, nonce=nonce)

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        """A prompt for each question of the source; `count` at most."""
        questions = self.proposer.propose(count, split, Questions(history), policy, call)
        held_out, made = history.held_out(), dict[str, Prompt]()
        for question in questions:
            chance = random.Random(call.seed_for(question.digest, "meta"))
            judged = self._prompt([question], chance)
            if judged is None or judged.reference is None:
                continue
            prompt = self._of(judged, judged.reference, chance)
            if prompt.question_digest not in held_out:
                made[prompt.digest] = prompt
        return list(made.values())

    def _of(self, judged: Prompt, right: str, chance: random.Random) -> Prompt:
        wrong = with_mistake(right, chance)
        first = chance.random() < 0.5
        shown = [_said(each) for each in ((right, wrong) if first else (wrong, right))]
        known = {"judgement": right, "verdict": "A" if first else "B"}
        asked = self.meta.question(judged, *shown)
        return replace(
            asked,
            reference=substitute(self.said, known),
            split=judged.split,
            columns={"judged": conversation(judged), QUESTION: judged.columns[QUESTION]},
        )


def _said(text: str) -> Completion:
    return Completion(text=text, token_ids=())
