"""Score answers with a reward model: a sequence-classification model that reads a conversation.

It writes nothing, so there is nothing to parse and no verdict to forge; what an answer can do is
persuade it.
"""

# No `from __future__ import annotations` here: plugins and `loop judges list` read the options.

import math
import time
from collections.abc import Sequence
from statistics import pvariance
from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import Field

from roles.policy.devices import Device
from roles.protocols import Policy
from store.errors import UserError
from store.records import ALONE, Call, Candidate, Group, Judgement, Message, Prompt, Verdict

if TYPE_CHECKING:
    from roles.policy.sequence_scores import Dropout, SequenceScores


class RewardModel:
    """A judge that scores each answer with a sequence-classification model: its logit.

    The model reads the conversation as its own chat template writes it, the answer as text and
    whole. `loop judges train` makes such a model of a run's pairs, and so does a run with a model
    whose trainer is `reward`: judge.model names that one, as in model = "model:reward".

    path: a folder or a Hub id; only safetensors are loaded. Left out, judge.model is asked.
    label: which of the model's labels is the score, where it has several.
    batch_tokens: how many tokens a pass takes, padding and what it keeps of prompts included.
    votes: how often an answer is scored with features of the last hidden state dropped (Monte Carlo
    dropout), each a verdict; their variance says how sure the model is, and the score is the one
    without dropout. 0 is none. dropout: the share that is dropped.
    dtype: auto is float32 on a CPU and elsewhere that of the stored weights. In float32 a score
    does not depend on what else is in its batch (to 1e-5); in bfloat16 it does (by 0.03, measured
    where scores reach 7).
    """

    version = "1"

    def __init__(
        self,
        path: str | None = None,
        label: Annotated[int | None, Field(ge=0)] = None,
        batch_tokens: Annotated[int, Field(ge=1)] = 16384,
        votes: Annotated[int, Field(ge=0)] = 0,
        dropout: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        device: Device = "auto",
    ):
        self.batch_tokens = batch_tokens
        self.votes, self.dropout = votes, dropout
        self.own = None if path is None else _loaded(path, label, dtype, device)
        if self.own is not None:
            self.version = f"{type(self).version} {self.own.digest[:12]} label {self.own.label}"
        elif (label, dtype, device) != (None, "auto", "auto"):
            raise UserError(
                "judge 'reward_model' takes label, dtype and device for the model that it loads "
                "from its own `path`; what judge.model names is opened by that model's engine"
            )
        self.asks_model = self.needs_tokens = path is None

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        """Every answer, those of a group after one reading of their prompt."""
        model = self._model(policy)
        judged = [(group.prompt, one) for group in groups for one in group.candidates]
        read = {one.id: model.ids(prompt, one.text) for prompt, one in judged}
        failed = {key: why for key, ids in read.items() if (why := _unfit(model, ids))}
        fitting = {key: ids for key, ids in read.items() if ids and key not in failed}
        began = time.perf_counter()
        conversations = [
            [fitting[one.id] for one in group.candidates if one.id in fitting] for group in groups
        ]
        logits = model.logits(conversations, self.batch_tokens, call, self._dropout(call))
        seconds = (time.perf_counter() - began) / max(len(fitting), 1)
        return [
            _failure(one.id, failed[one.id])
            if one.id in failed
            else _scored(prompt, one, logits[fitting[one.id]], seconds)
            for prompt, one in judged
        ]

    def _dropout(self, call: Call) -> "Dropout | None":
        if not self.votes:
            return None
        from roles.policy.sequence_scores import Dropout

        return Dropout(self.dropout, [call.seed_for("dropout", n) for n in range(self.votes)])

    def _model(self, policy: Policy | None) -> "SequenceScores":
        if self.own is not None:
            return self.own
        found = getattr(policy, "scores", None)
        if found is None:
            raise UserError(
                "judge 'reward_model' has no `path`, and what judge.model names is no reward "
                'model (yet): a model with trainer = "reward" becomes one when it is first trained'
            )
        return cast("SequenceScores", found)

    def close(self) -> None:
        """Free the memory of its own weights; a later call would load them again."""
        if self.own is not None:
            self.own.close()


def _loaded(path: str, label: int | None, dtype: str, device: Device) -> "SequenceScores":
    from roles.policy.sequence_scores import SequenceScores

    return SequenceScores(path, label, dtype, device)


def _unfit(model: "SequenceScores", ids: Sequence[int] | None) -> str | None:
    """Why a conversation cannot be read; None when it can."""
    if ids is None:
        return "the reward model's chat template does not write the answer as it is"
    context = model.context
    if context is not None and len(ids) > context:
        return (
            f"the conversation has {len(ids)} tokens, and the reward model's context holds "
            f"{context}"
        )
    return None


def _scored(
    prompt: Prompt, candidate: Candidate, logits: Sequence[float], seconds: float
) -> Judgement:
    """logits: without dropout, and then of each draw of it."""
    if not all(map(math.isfinite, logits)):
        return _failure(candidate.id, f"the reward model's logit is {logits[0]}")
    answer = Message(role="assistant", content=candidate.text)
    digest = Prompt(messages=(*prompt.messages, answer)).digest
    score, *draws = logits
    verdicts = tuple(
        Verdict(
            candidate_id=candidate.id,
            raw=f"logit {logit:.6g}",
            value=logit,
            vote=vote,
            prompt_digest=digest,
            seconds=seconds / len(logits),
        )
        for vote, logit in enumerate(draws or [score])
    )
    return Judgement(
        candidate_id=candidate.id,
        score=score,
        variance=pvariance(draws) if len(draws) > 1 else None,
        verdicts=verdicts,
    )


def _failure(candidate_id: int, why: str) -> Judgement:
    verdict = Verdict(candidate_id=candidate_id, raw=why, status="failed")
    return Judgement(
        candidate_id=candidate_id, score=None, status="failed", reason=why, verdicts=(verdict,)
    )
