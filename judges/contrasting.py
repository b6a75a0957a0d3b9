"""Prompts that ask which of two answers is better, where that is known by how they were made.

One answer was written to the question, the other to a question that is like it. So a judge can be
trained on those of its own judgements that agree with a label which nobody gave.

Source: "Self-Taught Evaluators" (arXiv 2408.02666). There the policy writes the other question;
here it is another one of the source, the one most like it.
"""

# No `from __future__ import annotations` here: see judges/model_judge.py.

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from judges.judging import QUESTION, Judging, Questions, known_by
from roles.proposers.self_instruct import last_asked
from roles.proposers.similarity import common_words
from roles.protocols import History, Policy
from roles.template import conversation, substitute
from store.records import Call, Prompt, Sampling, Split

AMONG = 200
"""Of so many other questions, drawn for each, the one most like it is taken."""


class Contrasting(Judging):
    """proposer: where the questions come from: a role's table, as in
    { use = "reasoning_gym", tasks = [...] }. Their right answers are not looked at.
    prompt, prompt_path, nonce: as the judge `pairwise` has them.
    by: whether questions are alike in `words` or in `letters`.
    temperature, top_p, max_tokens, stop: how the policy answers them.

    The prompt's reference is the last line of the right judgement, as "Winner: A", by which the
    judge `verifier` with answer = "last_line" tells right judgements. Which answer stands first is
    drawn. A question whose two answers read the same gives no prompt.
    """

    def __init__(
        self,
        proposer: dict[str, Any],
        prompt: str | None = None,
        prompt_path: Path | None = None,
        nonce: bool = True,
        by: Literal["words", "letters"] = "words",
        temperature: Annotated[float, Field(ge=0, le=10)] = 0.7,
        top_p: Annotated[float, Field(gt=0, le=1)] = 0.9,
        max_tokens: Annotated[int, Field(ge=1)] = 256,
        stop: tuple[Annotated[str, Field(min_length=1)], ...] = (),
    ) -> None:
        super().__init__(proposer, "pairwise", prompt, prompt_path, nonce=nonce, expects="verdict")
        self.parts = _letters if by == "letters" else str.split
        self.sampling = Sampling(
            temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=stop
        )

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        """A prompt for each question of the source whose two answers differ; `count` at most."""
        questions = self.proposer.propose(count, split, Questions(history), policy, call)
        others = [self._like(place, questions, call) for place in range(len(questions))]
        asked = list({each.digest: each for each in [*questions, *others]}.values())
        seeds = [[call.seed_for(each.digest, "contrast")] for each in asked]
        said = policy.sample(asked, sampling=self.sampling, seeds=seeds)
        answers = {each.digest: own[0].text for each, own in zip(asked, said, strict=True) if own}
        held_out = history.held_out()
        made: dict[str, Prompt] = {}
        for question, other in zip(questions, others, strict=True):
            both = [answers.get(each.digest) for each in (question, other)]
            if None in both or both[0] == both[1]:
                continue
            prompt = self._contrast(question, str(both[0]), str(both[1]), call)
            if prompt.question_digest not in held_out:
                made[prompt.digest] = prompt
        return list(made.values())

    def _like(self, place: int, questions: Sequence[Prompt], call: Call) -> Prompt:
        """The question most like the one at `place`, of those that are not it."""
        own = questions[place]
        others = [each for each in questions if each.digest != own.digest]
        if len(others) > AMONG:
            others = random.Random(call.seed_for(own.digest, "others")).sample(others, AMONG)
        words = self.parts(last_asked(own))
        near = [common_words(words, self.parts(last_asked(each))) for each in others]
        return others[near.index(max(near))] if others else own

    def _contrast(self, question: Prompt, good: str, bad: str, call: Call) -> Prompt:
        first = random.Random(call.seed_for(question.digest, "order")).random() < 0.5
        answers = (good, bad) if first else (bad, good)
        verdict = "A" if first else "B"
        asked = self._asked([question], answers)
        return Prompt(
            messages=asked.messages,
            reference=substitute(self.shape.last_line, {"verdict": verdict}),
            task=asked.task,
            origin="derived",
            split=question.split,
            columns={
                "question": conversation(question),
                "answers": list(answers),
                QUESTION: known_by(question),
            },
            parent_prompt_id=question.id,
        )


def _letters(text: str) -> list[str]:
    return list(text)
