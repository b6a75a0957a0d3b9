"""Check the final answer against what is known to be right.

The answer is found first and scored alone, so a text that sprays guesses has made one. Right is
exactly 1.0; nearly right is 0.0 unless `partial` asks for more.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from judges.answers import Place, final_answer
from judges.base import Opinion, PointwiseJudge
from judges.guard import LONGEST_ANSWER
from judges.gym import has_entry, score_entry
from judges.numbers import read_number
from roles.protocols import Policy
from store.errors import UserError
from store.records import Call, Completion, Prompt

Scorer = Literal["auto", "reasoning_gym", "exact", "prefix", "numeric", "regex", "boxed"]


class Verifier(PointwiseJudge):
    """A judge of answers that can be right or wrong.

    scorer: `reasoning_gym` is the scorer of the task that made the prompt; `exact` the same
    characters as the reference, white space around them aside; `prefix` the reference or a part of
    it from its beginning, for answers that may stop early; `numeric` the same number within
    `tolerance` (relative to references beyond 1); `regex` a full match of `pattern`, or of the
    reference; `boxed` exact, both sides in \\boxed{}. `auto` is the first that the prompt has
    the columns for, else exact.
    answer: where the final answer is (`judges.answers`).
    """

    def __init__(
        self,
        scorer: Scorer = "auto",
        answer: Place = "auto",
        pattern: str | None = None,
        partial: bool = False,
        tolerance: float = 1e-6,
    ):
        if pattern is not None and scorer != "regex":
            raise UserError(f"the verifier's pattern needs scorer 'regex'; scorer is {scorer!r}")
        if not 0 <= tolerance < 1:
            raise UserError(f"the verifier's tolerance is in [0, 1); found {tolerance}")
        self.scorer = scorer
        self.place: Place = "boxed" if scorer == "boxed" and answer == "auto" else answer
        self.pattern = None if pattern is None else _compiled(pattern, "the verifier's pattern")
        self.partial = partial
        self.tolerance = tolerance

    def score(
        self, prompt: Prompt, completion: Completion, policy: Policy | None, call: Call
    ) -> Opinion:
        scorer = self._scorer_for(prompt)
        answer = final_answer(completion.text, self.place)
        if answer is None:
            return Opinion(score=0.0, raw=f"no final answer: looked for {self.place!r}")
        value, words = self._check(scorer, prompt, answer)
        if value == 1.0:
            return Opinion(score=1.0, raw=f"answer {_short(answer)} is right")
        right = self.pattern.pattern if self.pattern else prompt.reference or ""
        raw = f"answer {_short(answer)} is not {_short(right)}" + (f"; {words}" if words else "")
        return Opinion(score=value if self.partial else 0.0, raw=raw)

    def _scorer_for(self, prompt: Prompt) -> Scorer:
        scorer = self.scorer
        if scorer == "auto":
            scorer = "reasoning_gym" if has_entry(prompt) else "exact"
        if scorer == "reasoning_gym" and not has_entry(prompt):
            raise _lacks(prompt, scorer, "the column 'reasoning_gym' and a reference answer")
        if prompt.reference is None and self.pattern is None:
            raise _lacks(prompt, scorer, "a reference answer")
        return scorer

    def _check(self, scorer: Scorer, prompt: Prompt, answer: str) -> tuple[float, str]:
        """The value in [0, 1] and what there is to say of it."""
        if scorer == "reasoning_gym":
            return score_entry(prompt, answer)
        reference = prompt.reference or ""
        limit = max(LONGEST_ANSWER, 2 * len(reference))
        if len(answer) > limit:
            return 0.0, f"it has {len(answer)} characters, more than {limit}"
        match scorer:
            case "numeric":
                return self._check_number(prompt, reference, answer)
            case "prefix":
                begun = bool(answer) and reference.strip().startswith(answer)
                return float(begun), "as its beginning"
            case "regex":
                pattern = self.pattern or _compiled(reference, f"the reference of {_named(prompt)}")
                return float(pattern.fullmatch(answer) is not None), "as a pattern"
            case "boxed":
                right = final_answer(reference, "boxed")
                return float(answer == (reference.strip() if right is None else right)), ""
        return float(answer == reference.strip()), ""

    def _check_number(self, prompt: Prompt, reference: str, answer: str) -> tuple[float, str]:
        right = read_number(reference)
        if right is None:
            raise _lacks(prompt, "numeric", f"a number for its reference, not {reference!r}")
        found = read_number(answer)
        if found is None:
            return 0.0, "it is not a number"
        allowed = Fraction(self.tolerance) * max(Fraction(1), abs(right))
        return float(abs(found - right) <= allowed), ""


def _compiled(pattern: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"{what}, {pattern!r}, is not a regular expression: {error}") from None


def _lacks(prompt: Prompt, scorer: str, what: str) -> UserError:
    return UserError(
        f"the verifier's scorer {scorer!r} needs {what}, and {_named(prompt)} has not got it; "
        "give the prompts one, or choose another scorer or judge"
    )


def _named(prompt: Prompt) -> str:
    return f"prompt {prompt.digest[:12]} ({_short(prompt.messages[-1].content, 60)})"


def _short(text: str, longest: int = 200) -> str:
    return repr(text if len(text) <= longest else text[:longest] + "…")
