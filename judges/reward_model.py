"""Score answers with a reward model: a sequence-classification model that reads a conversation.

It writes nothing, so there is nothing to parse and no verdict to forge; what an answer can do is
persuade it.
"""

# No `from __future__ import annotations` here: plugins and `loop judges list` read the options.

import math
import time
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from roles.policy.devices import Device
from roles.protocols import Policy
from store.records import ALONE, Call, Candidate, Group, Judgement, Message, Prompt, Verdict


class RewardModel:
    """A judge that scores each answer with a sequence-classification model: its logit.

    The model reads the conversation as its own chat template writes it, the answer as text and
    whole. `loop judges train` makes such a model of a run's pairs.

    path: a folder or a Hub id; only safetensors are loaded.
    label: which of the model's labels is the score, where it has several.
    batch_tokens: how many tokens a pass takes, padding and what it keeps of prompts included.
    dtype: auto is float32 on a CPU and elsewhere that of the stored weights. In float32 a score
    does not depend on what else is in its batch (to 1e-5); in bfloat16 it does (by 0.03, measured
    where scores reach 7).
    """

    version = "1"

    def __init__(
        self,
        path: str,
        label: Annotated[int | None, Field(ge=0)] = None,
        batch_tokens: Annotated[int, Field(ge=1)] = 16384,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        device: Device = "auto",
    ):
        from judges.sequence_scores import SequenceScores

        self.batch_tokens = batch_tokens
        self.model = SequenceScores(path, label, dtype, device)
        self.version = f"{type(self).version} {self.model.digest[:12]} label {self.model.label}"

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        """Every answer, those of a group after one reading of their prompt; the policy is not
        asked."""
        judged = [(group.prompt, one) for group in groups for one in group.candidates]
        read = {one.id: self.model.ids(prompt, one.text) for prompt, one in judged}
        failed = {key: why for key, ids in read.items() if (why := self._unfit(ids))}
        fitting = {key: ids for key, ids in read.items() if ids and key not in failed}
        began = time.perf_counter()
        conversations = [
            [fitting[one.id] for one in group.candidates if one.id in fitting] for group in groups
        ]
        logits = self.model.logits(conversations, self.batch_tokens, call)
        seconds = (time.perf_counter() - began) / max(len(fitting), 1)
        return [
            _failure(one.id, failed[one.id])
            if one.id in failed
            else _scored(prompt, one, logits[fitting[one.id]], seconds)
            for prompt, one in judged
        ]

    def _unfit(self, ids: Sequence[int] | None) -> str | None:
        """Why a conversation cannot be read; None when it can."""
        if ids is None:
            return "the reward model's chat template does not write the answer as it is"
        context = self.model.context
        if context is not None and len(ids) > context:
            return (
                f"the conversation has {len(ids)} tokens, and the reward model's context holds "
                f"{context}"
            )
        return None

    def close(self) -> None:
        """Free the memory of the weights; a later call would load them again."""
        self.model.close()


def _scored(prompt: Prompt, candidate: Candidate, logit: float, seconds: float) -> Judgement:
    if not math.isfinite(logit):
        return _failure(candidate.id, f"the reward model's logit is {logit}")
    answer = Message(role="assistant", content=candidate.text)
    verdict = Verdict(
        candidate_id=candidate.id,
        raw=f"logit {logit:.6g}",
        value=logit,
        prompt_digest=Prompt(messages=(*prompt.messages, answer)).digest,
        seconds=seconds,
    )
    return Judgement(candidate_id=candidate.id, score=logit, verdicts=(verdict,))


def _failure(candidate_id: int, why: str) -> Judgement:
    verdict = Verdict(candidate_id=candidate_id, raw=why, status="failed")
    return Judgement(
        candidate_id=candidate_id, score=None, status="failed", reason=why, verdicts=(verdict,)
    )
