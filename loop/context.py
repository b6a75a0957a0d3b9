"""What the nodes of the graph work with: the store, the roles, and one policy at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from loop.apart import Apart, isolates
from loop.hands import Hands, Inline
from loop.progress import Progress
from loop.seat import Seat
from loop.settings import Config, Role
from loop.spread import Spread
from loop.tasks import Task
from roles.protocols import Policy
from store.database import Store
from store.records import (
    Call,
    Checkpoint,
    Earlier,
    Group,
    Judgement,
    Prompt,
    Purpose,
    Round,
    Run,
    Split,
)

Key = TypeVar("Key")
STAGES = ("propose", "generate", "judge", "filter", "train", "evaluate", "gate")


@dataclass
class Context:
    """What the nodes work with. One policy at most is in memory, and none while training."""

    store: Store
    config: Config
    roles: dict[int, Any]
    """id() of a Role in the configuration -> the role."""
    progress: Progress
    stopping: Callable[[], bool]
    changed: Callable[[Sequence[str]], object]
    """Told the settings, as for --set, that had to change for the run to go on."""
    seconds: dict[str, float] = field(default_factory=dict)
    _own_hands: Hands | None = None
    """Made when a task or a policy is first asked for: it has to know the devices."""

    @property
    def root(self) -> Path:
        return self.store.root

    @cached_property
    def uuid(self) -> str:
        return cast(Run, self.store.run()).uuid

    def role(self, role: Role) -> Any:
        return self.roles[id(role)]

    @cached_property
    def seat(self) -> Seat:
        """This process's own."""
        return Seat(self.config, self.role, self.root, self.progress.say)

    @property
    def _hands(self) -> Hands:
        if self._own_hands is None:
            say = self.progress.say
            if isolates(self.config, self.role):
                self._own_hands = Apart(self.config, self.role, self.root, say, self.changed)
            else:
                self._own_hands = Inline(self.seat)
            if self.config.cluster.workers:
                with_less = (self.role, self.changed)
                self._own_hands = Spread(self._own_hands, self.config, self.root, say, *with_less)
        return self._own_hands

    def policy(self, checkpoint: Checkpoint) -> Policy:
        """The checkpoint as a policy, for a role that stays with this process."""
        return self._hands.policy(checkpoint)

    def perform(self, task: Task) -> Any:
        """What comes of the task, wherever it is done."""
        return self._hands.perform(task)

    def performed(self, what: str, tasks: Iterator[tuple[Key, Task]]) -> Iterator[tuple[Key, Any]]:
        """What comes of each task with what it goes by, in order, several of them at a time where
        there are hands for it. what: that the time is spent on."""
        keys: deque[Key] = deque()

        def given() -> Iterator[Task]:
            for key, task in tasks:
                keys.append(key)
                yield task

        done: Any = self._hands.perform_each(given())
        try:
            while True:
                with self.timed(what):
                    made = next(done, None)
                if made is None:
                    return
                yield keys.popleft(), made
        finally:
            getattr(done, "close", bool)()  # what is under way is not wanted any more

    def writes(self, model: str) -> bool:
        """Whether a model answers prompts. A reward model judges answers and has none."""
        return getattr(self.role(self.config.models[model].trainer), "makes", "policy") == "policy"

    def close(self) -> None:
        if self._own_hands is not None:
            self._own_hands.close()
        self.seat.close()

    def close_policy(self) -> None:
        """Give back what memory policies hold."""
        self._hands.rest()

    def call(self, round: Round, track: str, stage: str) -> Call:
        """Where a role is called. Only a trainer reports its steps: the rest goes by batches."""
        return Call(
            seed=self.config.seed,
            round=round.number,
            track=track,
            stage=stage,
            stopping=self.stopping,
            **({"progress": self.progress.advance} if stage == "train" else {}),
        )

    def check(self) -> None:
        """Between two batches: leave if somebody asked for it."""
        if self.stopping():
            raise KeyboardInterrupt

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - began

    @contextmanager
    def stage(self, round: Round, stage: str, total: int) -> Iterator[None]:
        """A stage's work: announced, timed, and where the round stands is stored."""
        if STAGES.index(stage) > STAGES.index(round.stage):
            self.store.set_stage(cast(int, round.id), stage)
        self._hands.begin(stage)
        self.progress.begin(round.number, stage, total)
        try:
            with self.timed(stage):
                yield
        finally:
            self.store.add_seconds(cast(int, round.id), self.seconds)
            self.seconds.clear()
        self.progress.end()

    def spent(self) -> bool:
        """Whether the budget is used up."""
        limit = self.config.budget.generated_tokens
        return 0 < limit <= self.store.generated_tokens() or self.overpaid()

    def overpaid(self) -> bool:
        """Whether judges have cost what they may."""
        return 0 < self.config.budget.cost <= self.store.judge_cost()


@dataclass(frozen=True)
class Rows:
    """The asked rows that a piece of work is about."""

    round: Round
    track: str
    purpose: Purpose

    @property
    def key(self) -> tuple[int, str, Purpose]:
        return cast(int, self.round.id), self.track, self.purpose


@dataclass(frozen=True)
class StoredHistory:
    """What roles may ask of earlier rounds."""

    store: Store
    config: Config

    def asked(self) -> frozenset[str]:
        return self.store.asked_digests()

    def held_out(self) -> frozenset[str]:
        return self.store.held_out_digests()

    def prompts(self, *splits: Split) -> list[Prompt]:
        return [prompt for split in splits for prompt in self.store.prompts(split)]

    def asked_in(self, call: Call) -> list[Prompt]:
        return self.store.asked_prompts(self._round(call), call.track)

    def _round(self, call: Call) -> int:
        return cast(int, self.store.round(call.round).id)

    def judged(self, call: Call) -> list[tuple[Group, list[Judgement]]]:
        label = self.config.tracks(call.round)[call.track].judge.label
        rows = Rows(self.store.round(call.round), call.track, "train").key
        known: dict[int, list[Judgement]] = {}
        for each in self.store.judgements(*rows, label):
            known.setdefault(each.candidate_id, []).append(each)
        return [
            (group, [said for one in group.candidates for said in known.get(one.id, ())])
            for group in self.store.groups(*rows)
        ]

    def earlier(self, call: Call) -> dict[int, list[Earlier]]:
        judge = self.config.tracks(call.round)[call.track].judge.label
        return self.store.earlier(self._round(call), call.track, judge)
