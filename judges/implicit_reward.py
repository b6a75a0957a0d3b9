"""How much likelier a trained model finds an answer than its reference does: a reward for free.

Whatever was trained toward good answers from a reference holds a reward, which is read off both
models' log-probabilities. Nothing is asked in words, so nothing an answer says can talk to it.
"""

# No `from __future__ import annotations` here: plugins and `loop judges list` read the options.

import json
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field

from judges.asking import stop_when_told
from judges.models import other_model
from roles.protocols import Policy
from store.errors import UserError
from store.records import ALONE, Call, Candidate, Group, Judgement, Prompt, Verdict

PLACES = 5
"""Decimal places that are kept of each token's or step's reward."""


@dataclass(kw_only=True)
class ImplicitReward:
    """A judge that scores an answer by beta * log(p(answer) / p_reference(answer)).

    What it asks is judge.model, a model that was trained toward good answers. Answers to one prompt
    can be compared, those to different prompts cannot: a term of the prompt alone is unknown.
    Source: "Direct Preference Optimization" (arXiv 2305.18290), equation 5; as a judge, DICE
    (arXiv 2406.09760); per token and step, "Free Process Rewards without Process Labels"
    (arXiv 2412.01981), proposition 3.1.

    reference: what the model was trained from, as judge.model names models.
    beta: that of the training; it scales every score.
    by: `sequence`, or a reward for each `token` or `step`, of which aggregate makes the score.
    step_separator: what ends a step; blank steps belong to the one before them.
    length_weight: what a token costs, taken off the sum (DICE's alpha, against long answers).
    """

    asks_model: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = True
    version: ClassVar[str] = "1"

    reference: str = "checkpoint:base"
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    by: Literal["sequence", "token", "step"] = "sequence"
    aggregate: Literal["sum", "mean", "min", "last"] = "sum"
    step_separator: Annotated[str, Field(min_length=1)] = "\n"
    length_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    def __post_init__(self) -> None:
        if self.by == "sequence" and self.aggregate != "sum":
            raise UserError(
                f"judge 'implicit_reward' has aggregate {self.aggregate!r}, and by = \"sequence\" "
                'is one reward; set by = "token" or "step"'
            )
        if self.length_weight and self.aggregate != "sum":
            raise UserError(
                "judge 'implicit_reward' takes length_weight off a sum, and aggregate is "
                f"{self.aggregate!r}"
            )
        self.models: tuple[str, ...] = (self.reference,)

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        """Every answer under the model, then every one under the reference: never two in memory."""
        policy = _open_to_see(policy, "judge.model")
        began = time.perf_counter()
        judged = [(group.prompt, one) for group in groups for one in group.candidates]
        prompts = {prompt.digest: prompt for prompt, _ in judged}
        written = {digest: policy.prompt_ids(prompt) for digest, prompt in prompts.items()}
        failed = _unfit(policy, prompts, judged)
        scored = [each for each in judged if each[1].id not in failed]
        ends = {one.id: self._ends(policy, one) for _, one in scored}
        own = _logprobs(policy, scored, call)
        reference = _open_to_see(other_model(policy, self.reference), self.reference)
        if any(reference.prompt_ids(prompts[digest]) != ids for digest, ids in written.items()):
            raise UserError(
                f"judge 'implicit_reward' compares the model with {self.reference!r}, which writes "
                "prompts in other tokens; both need one tokenizer and chat template"
            )
        failed |= _unfit(reference, prompts, scored)
        scored = [each for each in scored if each[1].id not in failed]
        held = _logprobs(reference, scored, call)
        seconds = (time.perf_counter() - began) / max(len(judged), 1)
        return [
            self._concluded(one, own[one.id], held[one.id], ends[one.id], seconds)
            if one.id not in failed
            else _failure(one, failed[one.id], seconds)
            for _, one in judged
        ]

    def _ends(self, policy: Policy, candidate: Candidate) -> list[int]:
        """Where each part of the answer that has a reward ends, in tokens."""
        tokens = len(candidate.token_ids)
        if self.by == "step":
            return step_ends(candidate.token_ids, policy.decode, self.step_separator)
        return [tokens] if self.by == "sequence" else list(range(1, tokens + 1))

    def _concluded(
        self,
        candidate: Candidate,
        own: Sequence[float],
        held: Sequence[float],
        ends: Sequence[int],
        seconds: float,
    ) -> Judgement:
        mask = candidate.trained_mask or (True,) * len(own)
        if not all(map(math.isfinite, (*own, *held))):
            return _failure(candidate, "a model gives the answer no finite probability", seconds)
        ratios = [a - b if on else 0.0 for a, b, on in zip(own, held, mask, strict=True)]
        # A part of which the model wrote nothing, as what a tool said, has no reward.
        parts = [(a, b) for a, b in pairwise([0, *ends]) if any(mask[a:b])]
        rewards = [self.beta * math.fsum(ratios[a:b]) for a, b in parts]
        score = self._aggregated(rewards) - self.length_weight * sum(mask)
        kept: dict[str, Any] = {
            "model": round(math.fsum(_on(own, mask)), PLACES),
            "reference": round(math.fsum(_on(held, mask)), PLACES),
            "reward": round(score, PLACES),
            "tokens": sum(mask),
        }
        if self.by != "sequence":
            kept |= {"by": self.by, "rewards": [round(each, PLACES) for each in rewards]}
        if self.by == "step":
            kept |= {"ends": [end for _, end in parts]}
        raw = json.dumps(kept, separators=(",", ":"))
        verdict = Verdict(candidate_id=candidate.id, raw=raw, value=score, seconds=seconds)
        return Judgement(candidate_id=candidate.id, score=score, verdicts=(verdict,))

    def _aggregated(self, rewards: Sequence[float]) -> float:
        match self.aggregate:
            case "sum":
                return math.fsum(rewards)
            case "mean":
                return fmean(rewards)
            case "min":
                return min(rewards)
        return rewards[-1]


def step_ends(
    token_ids: Sequence[int], decode: Callable[[Sequence[int]], str], separator: str
) -> list[int]:
    """Where each step ends, in tokens: rising, the last len(token_ids); no step is without tokens.

    A token in which a step ends belongs to that step, whatever else it holds.
    """
    pieces = decode(token_ids).split(separator)
    filled = [place for place, piece in enumerate(pieces) if piece.strip()]
    ends = [
        # Counted, because an unfinished character decodes to marks of replacement: the text of a
        # longer prefix may be shorter, but never has fewer separators.
        bisect_left(
            range(len(token_ids)), place, key=lambda n: decode(token_ids[:n]).count(separator)
        )
        for place in filled[1:]
    ]
    return sorted({*ends, len(token_ids)})


def _open_to_see(model: Policy | None, name: str) -> Policy:
    """The model, if it says how likely it finds an answer."""
    if getattr(model, "logprobs", None) is None:
        raise UserError(
            f"judge 'implicit_reward' needs log-probabilities, and {name} gives none, as a server "
            'does not; set a checkpoint, as in judge.model = "round"'
        )
    return cast(Policy, model)


def _unfit(
    policy: Policy, prompts: Mapping[str, Prompt], judged: Sequence[tuple[Prompt, Candidate]]
) -> dict[int, str]:
    """Candidate id -> why it cannot be scored, of those that cannot. prompts: by their digests."""
    rooms = {digest: policy.room(prompt) for digest, prompt in prompts.items()}
    found = {one.id: _too_little_or_much(one, rooms[prompt.digest]) for prompt, one in judged}
    return {key: why for key, why in found.items() if why}


def _too_little_or_much(candidate: Candidate, room: int) -> str | None:
    mask = candidate.trained_mask
    if not candidate.token_ids or (mask is not None and not any(mask)):
        return "the answer has no token that a model wrote"
    if mask is not None and len(mask) != len(candidate.token_ids):
        raise ValueError(
            f"candidate {candidate.id}: {len(candidate.token_ids)} tokens, a mask of {len(mask)}"
        )
    if (more := len(candidate.token_ids) - room) > 0:
        return f"prompt and answer are {more} tokens too long for the context"
    return None


def _logprobs(
    policy: Policy, judged: Sequence[tuple[Prompt, Candidate]], call: Call
) -> dict[int, tuple[float, ...]]:
    """Candidate id -> the log-probability of each of its tokens, in nats."""
    stop_when_told(call)
    found = policy.logprobs([prompt for prompt, _ in judged], [one for _, one in judged])
    return {one.id: each.logprobs for (_, one), each in zip(judged, found, strict=True)}


def _on(values: Sequence[float], mask: Sequence[bool]) -> list[float]:
    return [value for value, on in zip(values, mask, strict=True) if on]


def _failure(candidate: Candidate, why: str, seconds: float) -> Judgement:
    return Judgement(
        candidate_id=candidate.id,
        score=None,
        status="failed",
        reason=why,
        verdicts=(Verdict(candidate_id=candidate.id, raw=why, status="failed", seconds=seconds),),
    )
