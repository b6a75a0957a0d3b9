"""Answers that the policy revises itself: answer, critique, revision.

Source: "SELF: Language-Driven Self-Evolution for Large Language Model" (arXiv 2310.00533): feedback
in words, and a refinement by it, in place of a score. Without a critique, as an extender: "Language
Models can Self-Lengthen to Generate Long Texts" (arXiv 2410.23933).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from roles.generators.sampler import Sampler
from roles.generators.steered import alone
from roles.protocols import Policy
from roles.template import Template, conversation
from store.errors import UserError
from store.records import Call, Completion, Prompt, Sampling

_HERE = Path(__file__).parent


class Revised:
    """n answers to each prompt, each with what became of it.

    critique, revise: the texts that the policy is asked with, {question}, {answer} and (in revise)
    {critique} in them; critique_path, revise_path: texts of your own. revise = "extend" asks for
    more of the same; a text without {critique} needs no critique, and none is asked for.
    nonce: whether what is quoted stands between fences that nobody can know beforehand.
    accepts: what in a critique says that there is nothing to mend, as a regular expression.
    n, temperature, top_p, top_k, max_tokens, stop: of the answers, first ones and revised ones.
    critique_tokens: the longest critique.

    An answer that its critique accepts is made as "accepted" and stands alone. Any other is made as
    "first", and followed by its revision: "revised" if a second critique accepts it or none is
    asked for, else "unsettled". They keep the first critique, or what was extended.
    """

    def __init__(
        self,
        critique: str = "critique",
        revise: str = "revise",
        critique_path: Path | None = None,
        revise_path: Path | None = None,
        accepts: str = r"(?m)^Verdict: good$",
        n: Annotated[int, Field(ge=1)] = 4,
        temperature: Annotated[float, Field(ge=0, le=10)] = 1.0,
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
        top_k: Annotated[int, Field(ge=0)] = 0,
        max_tokens: Annotated[int, Field(ge=1)] = 256,
        critique_tokens: Annotated[int, Field(ge=1)] = 256,
        stop: tuple[Annotated[str, Field(min_length=1)], ...] = (),
        nonce: bool = True,
    ) -> None:
        self.first = n
        self.n = 2 * n
        """Of all completions, at most."""
        self.answering = Sampler(n, temperature, top_p, top_k, max_tokens, stop).sampling
        self.criticising = replace(self.answering, max_tokens=critique_tokens, stop=())
        self.revising = revision(revise, revise_path, nonce)
        self.criticism: Template | None = None
        if "critique" in self.revising.places:
            self.criticism = criticism(critique, critique_path, nonce)
        critiques = 0 if self.criticism is None else 2 * critique_tokens
        self.most_tokens = n * (2 * max_tokens + critiques)
        try:
            self.accepts = re.compile(accepts)
        except re.error as error:
            raise UserError(f"revised's accepts, {accepts!r}, is no pattern: {error}") from None

    def generate(
        self, prompts: Sequence[Prompt], policy: Policy, call: Call
    ) -> list[list[Completion]]:
        """Each prompt's n answers, each followed by its revision where it has one; none where a
        question about one of them did not fit."""
        seeds = [[call.seed_for(each.digest, n) for n in range(self.first)] for each in prompts]
        first = policy.sample(prompts, sampling=self.answering, seeds=seeds)
        asked = [(prompt, one) for prompt, own in zip(prompts, first, strict=True) for one in own]
        became = iter(self._revised(asked, policy, call))
        found = [[next(became) for _ in own] for own in first]
        return [[one for some in own for one in some] if all(own) else [] for own in found]

    def _revised(
        self, asked: Sequence[tuple[Prompt, Completion]], policy: Policy, call: Call
    ) -> list[list[Completion]]:
        """Of each answer, itself and what became of it; nothing where a question did not fit."""
        critiques = self._criticised(asked, policy, call, "critique")
        mend = [
            place
            for place, critique in enumerate(critiques)
            if critique is not None and not self._accepted(critique)
        ]
        questions = [
            self.revising.fill(
                question=conversation(asked[place][0]),
                answer=asked[place][1].text,
                critique=critiques[place] or "",
            )
            for place in mend
        ]
        prompts = [asked[place][0] for place in mend]
        written = self._asked(questions, self.answering, policy, call, "revise")
        written = alone(prompts, written, policy)
        new = {place: own[0] for place, own in zip(mend, written, strict=True) if own}
        again = [(asked[place][0], one) for place, one in new.items()]
        checks = dict(zip(new, self._criticised(again, policy, call, "check"), strict=True))
        found: list[list[Completion]] = []
        mended = set(mend)
        for place, ((_, answer), critique) in enumerate(zip(asked, critiques, strict=True)):
            if critique is not None and place not in mended:
                found.append([replace(answer, made_as="accepted", made_with=critique)])
            elif place in new:
                settled = self.criticism is None or self._accepted(checks[place] or "")
                kind = "revised" if settled else "unsettled"
                after = replace(new[place], made_as=kind, made_with=critique or answer.text)
                found.append([replace(answer, made_as="first"), after])
            else:
                found.append([])
        return found

    def _accepted(self, critique: str) -> bool:
        return self.criticism is not None and self.accepts.search(critique) is not None

    def _criticised(
        self,
        asked: Sequence[tuple[Prompt, Completion]],
        policy: Policy,
        call: Call,
        stage: str,
    ) -> list[str | None]:
        """What the policy says of each answer; None where the question was too long."""
        if self.criticism is None:
            return [""] * len(asked)
        questions = [
            self.criticism.fill(question=conversation(prompt), answer=one.text)
            for prompt, one in asked
        ]
        said = self._asked(questions, self.criticising, policy, call, stage)
        return [own[0].text if own else None for own in said]

    def _asked(
        self,
        questions: Sequence[Prompt],
        sampling: Sampling,
        policy: Policy,
        call: Call,
        stage: str,
    ) -> list[list[Completion]]:
        # Equal answers to a prompt are asked about in one text, and are to be told apart.
        count: dict[str, int] = {}
        seeds = []
        for each in questions:
            count[each.digest] = count.get(each.digest, 0) + 1
            seeds.append([call.seed_for(stage, each.digest, count[each.digest])])
        return policy.sample(questions, sampling=sampling, seeds=seeds) if questions else []


def criticism(name: str, path: Path | None, nonce: bool) -> Template:
    """What asks for a critique of an answer."""
    return Template(name, path, ("question", "answer"), nonce=nonce, folder=_HERE)


def revision(name: str, path: Path | None, nonce: bool) -> Template:
    """What asks for a revision of an answer."""
    return Template(name, path, ("question", "answer"), ("critique",), nonce, folder=_HERE)
