"""Work of a stage, said whole: what it needs is in it, and what comes of it is records.

So it can be done at any seat: in the driver's own process, in one that it started, or elsewhere.
A role is called by its place (`Config.place`); the process that made the task keeps the
callbacks of its call, and whoever performs it gives it others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loop.asked import Asking
from loop.seat import Seat
from roles.protocols import Policy
from store import checkpoints
from store.errors import UserError
from store.records import (
    Call,
    Checkpoint,
    Completion,
    Example,
    Group,
    Judgement,
    Prompt,
    Sampling,
    Training,
)

RETRIES = 2
"""How often a training goes on of which a process was lost."""
TOO_LONG, NO_CANDIDATE = "longer than the context", "no candidate fits the context"


class Task(Protocol):
    @property
    def call(self) -> Call: ...

    @property
    def uses(self) -> list[str]:
        """Places of the roles that hold memory for it."""
        ...

    def perform(self, seat: Seat) -> Any: ...


@dataclass
class Counted:
    """A policy, and how many tokens it has sampled since."""

    policy: Policy
    tokens: int = 0

    def sample(self, *prompts: Any, **settings: Any) -> list[list[Completion]]:
        answers = self.policy.sample(*prompts, **settings)
        self.tokens += sum(len(one.token_ids) for group in answers for one in group)
        return answers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)


@dataclass(frozen=True)
class Sampled:
    """A generator of the loop's own: plain samples, as checkpoints are measured by."""

    sampling: Sampling
    count: int

    def generate(
        self, prompts: Sequence[Prompt], policy: Policy, call: Call
    ) -> list[list[Completion]]:
        seeds = [[call.seed_for(each.digest, n) for n in range(self.count)] for each in prompts]
        return policy.sample(prompts, sampling=self.sampling, seeds=seeds)


@dataclass(frozen=True)
class Answers:
    answers: list[list[Completion]]
    """Of each prompt, in order."""
    lost: Mapping[int, str]
    """Place of a prompt that has none -> why."""
    tokens: int
    """Sampled for them, what was thrown away included."""


@dataclass(frozen=True)
class Answering:
    """A writer's answers to a batch of prompts."""

    writer: Checkpoint
    generator: str | Sampled
    prompts: tuple[Prompt, ...]
    call: Call

    @property
    def uses(self) -> list[str]:
        return [f"models.{self.writer.model}.engine"]

    def perform(self, seat: Seat) -> Answers:
        policy: Any = Counted(seat.policy(self.writer))
        own = self.generator
        generator = own if isinstance(own, Sampled) else seat.made(seat.config.role(own))
        answers = generator.generate(list(self.prompts), policy, self.call)
        if len(answers) != len(self.prompts):
            raise RuntimeError(f"asked {len(self.prompts)} prompts, got answers to {len(answers)}")
        lost = {
            place: TOO_LONG if policy.room(prompt) < 1 else NO_CANDIDATE
            for place, prompt in enumerate(self.prompts)
            if not answers[place]
        }
        return Answers(answers, lost, policy.tokens)


@dataclass(frozen=True)
class Judging:
    """What a judge concludes on a batch of groups, and what the model is called that it asked."""

    judge: str
    version: str
    groups: tuple[Group, ...]
    asking: Asking
    call: Call

    @property
    def uses(self) -> list[str]:
        models = dict.fromkeys(each.model for each in self.asking.checkpoints.values())
        return [f"models.{model}.engine" for model in models]

    def perform(self, seat: Seat) -> tuple[list[Judgement], str | None]:
        role = seat.config.role(self.judge)
        judge = seat.made(role)
        asked, by = self.asking.judging(seat, role, self.version)
        alone = role.model is None and not getattr(judge, "models", ())
        return judge.judge(list(self.groups), None if alone else asked, self.call), by


@dataclass(frozen=True)
class Learning:
    """A training into a folder."""

    trainer: str
    examples: tuple[Example, ...]
    start: Checkpoint
    reference: Checkpoint
    into: Path
    call: Call

    @property
    def uses(self) -> list[str]:
        return [self.trainer]

    def perform(self, seat: Seat) -> Training:
        seat.close_policy()
        for each in (self.start, self.reference):
            checkpoints.check(each)
        trainer = seat.made(seat.config.role(self.trainer))
        for left in range(RETRIES, -1, -1):
            try:
                made: Training = trainer.train(
                    list(self.examples), self.start, self.reference, self.into, self.call
                )
            except ChildProcessError as error:
                if not left:
                    raise UserError(str(error)) from error
                seat.say(f"{error}; the training goes on from its last save")
            else:
                return made
        raise AssertionError("a training is done or lost")


@dataclass(frozen=True)
class PolicyCall:
    """A question to a policy itself, for roles that stay with the driver: proposers."""

    checkpoint: Checkpoint
    method: str
    arguments: tuple[Any, ...]
    settings: Mapping[str, Any]
    call: Call

    @property
    def uses(self) -> list[str]:
        return [f"models.{self.checkpoint.model}.engine"]

    def perform(self, seat: Seat) -> Any:
        return getattr(seat.policy(self.checkpoint), self.method)(*self.arguments, **self.settings)
