"""Ask a model to grade each answer by a rubric: the policy itself, or a frozen checkpoint.

The judge's own completion is all that is read, and of it the last line. Whatever cannot be read
as a grade there is `unparsed`, never a low score.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pvariance
from typing import Annotated

from pydantic import Field

from judges.asking import stop_when_told
from judges.template import Template, conversation
from roles.protocols import Policy
from store.errors import UserError
from store.records import Call, Candidate, Completion, Group, Judgement, Prompt, Sampling, Verdict

SCORE_LINE = r"[*_]{0,3}score[*_]{0,3}:[*_]{0,3}\s*([^\s*_]+)[*_]{0,3}"
_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?")
_QUOTATION = " \t>\"'`“”‘’«»*_=~#+"


class Rubric:
    """A judge that asks a model for a justification and a score, several times.

    A candidate's score is the mean of its votes. Source: "Self-Rewarding Language Models"
    (arXiv 2401.10020), section 2: additive score in 0..5, justification first, votes averaged.

    prompt: `rubric`, or `rubric_brief` for a very small model; prompt_path: a text of your own
    with {question} and {answer}, and {reference} if it wants the right answer.
    votes, min_votes: judgements sampled of each answer, and how many must give a score.
    low, high: what a score lies within; fractions: whether it may be no whole number.
    pattern: what the judgement's last line is in full, letter case aside; its one group is the
    number. require_justification: whether something must stand before it.
    """

    version = "1"
    asks_model = True

    def __init__(
        self,
        prompt: str = "rubric",
        prompt_path: Path | None = None,
        votes: Annotated[int, Field(ge=1)] = 3,
        min_votes: Annotated[int, Field(ge=1)] = 1,
        low: int = 0,
        high: int = 5,
        fractions: bool = False,
        pattern: str = SCORE_LINE,
        require_justification: bool = True,
        temperature: Annotated[float, Field(ge=0, le=10)] = 0.7,
        top_p: Annotated[float, Field(gt=0, le=1)] = 0.9,
        max_tokens: Annotated[int, Field(ge=1)] = 256,
        stop: tuple[Annotated[str, Field(min_length=1)], ...] = (),
    ) -> None:
        if min_votes > votes:
            raise UserError(f"judge 'rubric' has {votes} votes and min_votes wants {min_votes}")
        if votes > 1 and temperature == 0:
            raise UserError(
                f"judge 'rubric' at temperature 0 says the same {votes} times; set votes = 1"
            )
        self.template = rubric_template(prompt, prompt_path)
        self.version = f"{Rubric.version} {self.template.digest[:12]}"
        self.reading = Reading(pattern, low, high, fractions, require_justification)
        self.votes = votes
        self.min_votes = min_votes
        self.sampling = Sampling(
            temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=stop
        )

    def judge(self, groups: Sequence[Group], policy: Policy | None, call: Call) -> list[Judgement]:
        """Every vote on every candidate, sampled in one call."""
        if policy is None:
            raise UserError("judge 'rubric' asks a model: set judge.model = \"round\"")
        stop_when_told(call)
        judged = [(group.prompt, one) for group in groups for one in group.candidates]
        prompts = [rubric_prompt(self.template, asked, one.text) for asked, one in judged]
        seeds = [
            [call.seed_for(asked.digest, one.index, vote) for vote in range(self.votes)]
            for asked, one in judged
        ]
        began = time.perf_counter()
        said = policy.sample(prompts, sampling=self.sampling, seeds=seeds)
        seconds = (time.perf_counter() - began) / max(sum(map(len, said)), 1)
        call.progress(len(judged), len(judged))
        return [
            self._concluded(one, prompt, completions, seconds)
            if completions
            else _too_long(one, policy.room(prompt))
            for (_, one), prompt, completions in zip(judged, prompts, said, strict=True)
        ]

    def _concluded(
        self, candidate: Candidate, prompt: Prompt, said: Sequence[Completion], seconds: float
    ) -> Judgement:
        read = [self.reading.read(one, prompt) for one in said]
        values = [value for value, _ in read if value is not None]
        enough = len(values) >= self.min_votes
        return Judgement(
            candidate_id=candidate.id,
            score=fmean(values) if enough else None,
            status="ok" if enough else "unparsed",
            reason=_why([why for value, why in read if value is None], self.votes),
            variance=pvariance(values) if enough and len(values) > 1 else None,
            verdicts=tuple(
                Verdict(
                    candidate_id=candidate.id,
                    raw=one.text,
                    status="unparsed" if value is None else "ok",
                    value=value,
                    vote=vote,
                    prompt_digest=prompt.digest,
                    seed=one.seed,
                    seconds=seconds,
                    tokens=len(one.token_ids),
                )
                for vote, (one, (value, _)) in enumerate(zip(said, read, strict=True))
            ),
        )


def rubric_template(prompt: str, prompt_path: Path | None) -> Template:
    return Template(prompt, prompt_path, needs=("question", "answer"), may=("reference",))


def rubric_prompt(template: Template, asked: Prompt, answer: str) -> Prompt:
    """What a judge is asked of one answer: a function of the question and the answer alone."""
    parts = {"question": conversation(asked), "answer": answer}
    if "reference" in template.places:
        if asked.reference is None:
            raise UserError(
                "the judge's prompt shows {reference}, and the prompt "
                f"{asked.messages[-1].content[:60]!r} has no reference answer"
            )
        parts["reference"] = asked.reference
    return template.fill(**parts)


@dataclass(frozen=True)
class Reading:
    """How a score is read from a judgement: from its last line, which holds nothing else.

    A judge that only copies what it was shown would let an answer grade itself. So a score is
    refused when a line of the prompt reads as the same score *and* the judge wrote nothing of its
    own before it; words that the prompt has too are not its own, nor is a line that ends in a
    colon and so announces what follows. Both must hold, which leaves the honest judge alone: it
    may quote, and may give the score that an answer asks for, if it says anything about it.
    """

    pattern: str
    low: int
    high: int
    fractions: bool
    require_justification: bool

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UserError(f"the lowest score, {self.low}, is not below the highest, {self.high}")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise UserError(
                f"the judge's pattern {self.pattern!r} is not a regular expression: {error}"
            ) from None
        if groups != 1:
            raise UserError(
                f"the judge's pattern {self.pattern!r} has {groups} groups; it needs one, "
                "around the number"
            )

    def read(self, said: Completion, prompt: Prompt) -> tuple[float | None, str]:
        """The score, or None and in words why there is none.

        A judgement that was cut off has none: what looks like its last line may be the middle.
        """
        if said.finish_reason == "length":
            return None, f"cut off at {len(said.token_ids)} tokens"
        lines = [line for each in said.text.splitlines() if (line := each.strip())]
        if not lines:
            return None, "the judge said nothing"
        value, why = self._score(lines[-1])
        if value is None:
            return None, why
        if self.require_justification and len(lines) == 1:
            return None, "a score without a justification"
        if self._is_copied(value, lines[:-1], prompt.messages[-1].content):
            return None, "the score and all before it is copied from what the judge was shown"
        return value, ""

    def _score(self, line: str) -> tuple[float | None, str]:
        found = re.fullmatch(self.pattern, line, re.IGNORECASE)
        if found is None:
            return None, "the last line is no score"
        if not _NUMBER.fullmatch(found[1] or ""):
            return None, f"the score {found[1]!r} is no number"
        value = float(found[1])
        if not self.low <= value <= self.high:
            return None, f"the score {found[1]} is not within {self.low} to {self.high}"
        if not self.fractions and not value.is_integer():
            return None, f"the score {found[1]} is no whole number"
        return value, ""

    def _is_copied(self, value: float, before: Sequence[str], shown: str) -> bool:
        if all(self._score(line.strip())[0] != value for line in shown.splitlines()):
            return False
        known = _squeezed(shown)
        return all(line.endswith(":") or _squeezed(line) in known for line in before)


def _squeezed(text: str) -> str:
    """Without white space and marks of quotation, so that a quotation is found in its source."""
    return "".join(text.strip(_QUOTATION).split()).casefold()


def _too_long(candidate: Candidate, room: int) -> Judgement:
    return Judgement(
        candidate_id=candidate.id,
        score=None,
        status="failed",
        reason=f"the judge's prompt is {1 - room} tokens too long for its context",
    )


def _why(reasons: Sequence[str], votes: int) -> str | None:
    """What the votes without a score lacked; None when all have one."""
    if not reasons:
        return None
    if votes == 1:
        return reasons[0]
    counted = "; ".join(f"{why} ({times})" for why, times in Counter(reasons).most_common())
    return f"{votes - len(reasons)} of {votes} votes gave a score: {counted}"
