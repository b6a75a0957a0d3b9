"""Score a problem by how often it is solved: too easy and too hard teach nothing.

The candidates are problems whose right answer can be read from their own text. The policy tries
each several times.

Source: "STP: Self-play LLM Theorem Provers with Iterative Conjecturing and Proving" (arXiv
2502.00212): the conjecturer is rewarded for conjectures that the prover barely proves.
"""

# No `from __future__ import annotations` here: see judges/model_judge.py.

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from judges.answers import Place, final_answer
from judges.models import ask_model
from judges.numbers import read_number
from roles.arithmetic import value_of
from roles.protocols import Policy
from store.records import (
    ALONE,
    Call,
    Candidate,
    Group,
    Judgement,
    Message,
    Prompt,
    Sampling,
    Verdict,
)


class Solvable:
    """A judge of arithmetic problems: 1 for one that the policy solves now and then, else 0.

    attempts: at each problem, all of them sampled. low, high: a problem is barely solvable if its
    share of right attempts is above low and at most high.
    answer: where an attempt's final answer is (`judges.answers`).
    """

    asks_model: ClassVar[bool] = True
    version: ClassVar[str] = "1"

    def __init__(
        self,
        attempts: Annotated[int, Field(ge=2)] = 8,
        low: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        high: Annotated[float, Field(gt=0, le=1)] = 0.5,
        answer: Place = "auto",
        temperature: Annotated[float, Field(gt=0, le=10)] = 1.0,
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
        max_tokens: Annotated[int, Field(ge=1)] = 64,
    ) -> None:
        self.attempts, self.low, self.high = attempts, low, high
        self.place: Place = answer
        self.sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens)

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        """Every problem. What has no value is no problem and scores 0."""
        found: dict[int, Judgement] = {}
        tried: list[tuple[Candidate, Prompt, str]] = []
        for group in groups:
            for one in group.candidates:
                value = value_of(one.text)
                if value is None:
                    found[one.id] = _said(one, 0.0, "no arithmetic problem", None)
                else:
                    asked = Prompt(messages=(Message(role="user", content=one.text.strip()),))
                    tried.append((one, asked, value))
        seeds = [
            [call.seed_for(asked.digest, one.index, n) for n in range(self.attempts)]
            for one, asked, _ in tried
        ]
        replies = ask_model(
            policy, [asked for _, asked, _ in tried], sampling=self.sampling, seeds=seeds, call=call
        )
        for (one, asked, value), said in zip(tried, replies, strict=True):
            right = [self._is_right(each.text, value) for each in said if each.status == "ok"]
            share = sum(right) / len(right) if right else 0.0
            score = float(self.low < share <= self.high)
            told = f"{sum(right)} of {len(right)} attempts come to {value}"
            tokens = sum(each.tokens or 0 for each in said)
            found[one.id] = _said(one, score, told, asked.digest, share, tokens)
        return [found[one.id] for group in groups for one in group.candidates]

    def _is_right(self, text: str, value: str) -> bool:
        answer = final_answer(text, self.place)
        wanted = read_number(value)
        return answer is not None and wanted is not None and read_number(answer) == wanted


def _said(
    one: Candidate,
    score: float,
    told: str,
    digest: str | None,
    share: float | None = None,
    tokens: int | None = None,
) -> Judgement:
    verdict = Verdict(
        candidate_id=one.id, raw=told, value=share, prompt_digest=digest, tokens=tokens
    )
    return Judgement(candidate_id=one.id, score=score, reason=told, verdicts=(verdict,))
