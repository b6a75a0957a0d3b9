"""Roles without a neural network, loaded as plug-ins: the graph under test is the real one.

A model is a folder with a skill in [0, 1]; its policy answers a sum rightly with that probability,
decided by the seed. A trainer raises the skill by how many examples it got. A whole run takes a
second, so every way of interrupting one can be tried.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from judges import PointwiseJudge
from judges.base import Opinion
from roles.protocols import History, Policy
from store.records import (
    Call,
    Checkpoint,
    Completion,
    Example,
    Message,
    Prompt,
    Sampling,
    Split,
    TokenLogprobs,
    Training,
    TrainingStep,
)


def write_model(into: Path, skill: float, forgot: str | None = None) -> Path:
    """A model folder of this kind. It is wrong on every prompt that begins with `forgot`."""
    into.mkdir(parents=True, exist_ok=True)
    (into / "config.json").write_text(json.dumps({"skill": skill, "forgot": forgot}))
    (into / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return into


def skill_of(folder: Path) -> float:
    return float(json.loads((folder / "config.json").read_text())["skill"])


class ScriptedPolicy:
    def __init__(self, folder: Path) -> None:
        self.skill = skill_of(folder)
        self.forgot = json.loads((folder / "config.json").read_text()).get("forgot")
        self.closed = False

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        assert not self.closed, "asked after it was closed"
        return [
            [self._answer(prompt, sampling, seed) for seed in own if self.room(prompt) > 0]
            for prompt, own in zip(prompts, seeds, strict=True)
        ]

    def _answer(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        chance = random.Random(seed)
        right = int(prompt.reference or 0)
        is_right = self.skill >= 0.5 if sampling.temperature == 0 else chance.random() < self.skill
        if self.forgot and prompt.messages[-1].content.startswith(self.forgot):
            is_right = False
        text = str(right if is_right else right + chance.randint(1, 5))
        logprob = math.log(self.skill if is_right else (1 - self.skill) / 5)
        ids = tuple(text.encode())
        return Completion(text=text, token_ids=ids, logprob=logprob, seed=seed, sampling=sampling)

    def logprobs(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], **_: Any
    ) -> list[TokenLogprobs]:
        return [TokenLogprobs(logprobs=(-1.0,) * len(each.token_ids)) for each in completions]

    def write(self, text: str) -> Completion:
        return Completion(text=text, token_ids=tuple(text.encode()))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return list(prompt.messages[-1].content.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def room(self, prompt: Prompt) -> int:
        return 100 - len(self.prompt_ids(prompt))

    def close(self) -> None:
        self.closed = True


class Engine:
    def open(self, checkpoint: Checkpoint) -> ScriptedPolicy:
        return ScriptedPolicy(checkpoint.path)


class Sums:
    """Sums of two numbers below `below`."""

    def __init__(self, below: int = 1000, times: int = 1) -> None:
        self.below, self.times = below, times

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        chance = random.Random(call.seed_for("sums", split))
        taken, made = set(history.held_out() | history.asked()), []
        while len(made) < count:
            a, b = chance.randrange(self.below), chance.randrange(self.below)
            prompt = Prompt(
                messages=(Message(role="user", content=f"{self.times} x {a} + {b} = ?"),),
                reference=str(self.times * a + b),
                task="sum",
                split=split,
                columns={"terms": [a, b]},
            )
            if prompt.digest not in taken:
                taken.add(prompt.digest)
                made.append(prompt)
        return made


class Learner:
    """Skill grows by `gain`; saves after each step and goes on from its last save."""

    def __init__(
        self,
        gain: float = 0.2,
        steps: int = 4,
        diverge_in: int | None = None,
        spoil_in: int | None = None,
        forget_in: int | None = None,
        seconds_a_step: float = 0.0,
        kill_at: tuple[int, int] | None = None,
        device: str | None = None,
    ) -> None:
        self.device = device
        self.gain, self.steps, self.seconds_a_step = gain, steps, seconds_a_step
        self.diverge_in, self.spoil_in, self.kill_at = diverge_in, spoil_in, kill_at
        self.forget_in = forget_in

    def train(
        self,
        examples: Sequence[Example],
        start: Checkpoint,
        reference: Checkpoint,
        into: Path,
        call: Call,
    ) -> Training:
        saved = into / "save.json"
        before = json.loads(saved.read_text()) if saved.is_file() else {"step": 0, "began": 0}
        gain = -0.9 if call.round == self.spoil_in else self.gain
        for step in range(before["step"] + 1, self.steps + 1):
            time.sleep(self.seconds_a_step)
            made = into / "save.new"
            made.write_text(json.dumps({"step": step, "began": before["began"] + 1}))
            made.replace(saved)
            call.progress(step, self.steps)
            marker = into.parent / "killed"
            if self.kill_at == (call.round, step) and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if call.stopping():
                raise KeyboardInterrupt
        saved.unlink()
        steps = [TrainingStep(step=n + 1, loss=1 / (n + 1)) for n in range(self.steps)]
        held = {each.id: (-1.0, None if each.rejected is None else -2.0) for each in examples}
        if call.round == self.diverge_in:
            return Training(status="diverged", steps=tuple(steps[:1]), reason="loss is nan")
        forgot = "3 x" if call.round == self.forget_in else None
        write_model(into, min(0.95, max(0.05, skill_of(start.path) + gain)), forgot)
        (into / "learned_from.json").write_text(
            json.dumps({"start": start.path.name, "reference": reference.path.name})
        )
        return Training(status="trained", steps=tuple(steps), reference_logprobs=held)


class Exact(PointwiseJudge):
    """Right is 1. `abstain_on` and `fail_in` make it behave badly."""

    def __init__(self, abstain_on: str = "", fail_in: int | None = None) -> None:
        self.abstain_on, self.fail_in = abstain_on, fail_in

    def score(self, prompt: Prompt, completion: Any, policy: Any, call: Call) -> float | None:
        if call.round == self.fail_in:
            raise OSError(28, "No space left on device")
        if self.abstain_on and self.abstain_on in completion.text:
            return None
        return float(completion.text == prompt.reference)


class Forgetful:
    """A judge that loses the last candidate of each batch."""

    def judge(self, groups: Any, policy: Any, call: Call) -> Any:
        return Exact().judge(groups, policy, call)[:-1]


class Skilful(PointwiseJudge):
    """Right is the skill of the model that it asks, wrong 0; it repeats what it reads."""

    def score(self, prompt: Prompt, completion: Any, policy: Any, call: Call) -> Opinion:
        right = completion.text == prompt.reference
        return Opinion(score=policy.skill if right else 0.0, raw=completion.text, tokens=3)


class Thinker(Engine):
    """Its policies think before they answer; some thoughts are cut off."""

    def open(self, checkpoint: Checkpoint) -> ScriptedPolicy:
        return ThinkingPolicy(checkpoint.path)


class ThinkingPolicy(ScriptedPolicy):
    def _answer(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        made = super()._answer(prompt, sampling, seed)
        forms = ("<think>is it 7?</think>\n{}", "is it 7?</think>{}", "<think>a</think>{}<think>b")
        return replace(made, text=forms[seed % 3].format(made.text))
