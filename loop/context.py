"""What the nodes of the graph work with: the store, the roles, and one policy at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from loop.memory import RunMemory
from loop.progress import Progress
from loop.settings import Config, Role
from roles.protocols import Engine, Policy
from store import checkpoints
from store.database import Store
from store.records import (
    Call,
    Checkpoint,
    Completion,
    Earlier,
    Group,
    Judgement,
    Prompt,
    Purpose,
    Round,
    Run,
    Split,
)

CACHE = "judged.db"
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
    seconds: dict[str, float] = field(default_factory=dict)
    _open: tuple[Path, Policy] | None = None
    _frozen: dict[str, Checkpoint] = field(default_factory=dict)
    _servers: dict[str, Any] = field(default_factory=dict)
    _memory: RunMemory | None = None

    @property
    def root(self) -> Path:
        return self.store.root

    @cached_property
    def uuid(self) -> str:
        return cast(Run, self.store.run()).uuid

    def role(self, role: Role) -> Any:
        return self.roles[id(role)]

    def policy(self, checkpoint: Checkpoint) -> Policy:
        """The checkpoint as a policy; the one that was open before is closed."""
        if self._open is None or self._open[0] != checkpoint.path:
            self.close_policy()
            engine = cast(Engine, self.role(self.config.models[checkpoint.model].engine))
            policy = engine.open(checkpoint)
            if not isinstance(policy, Policy):
                raise RuntimeError(f"engine {type(engine).__name__} opened {policy!r}, no policy")
            self._open = (checkpoint.path, policy)
        return self._open[1]

    def writes(self, model: str) -> bool:
        """Whether a model answers prompts. A reward model judges answers and has none."""
        return getattr(self.role(self.config.models[model].trainer), "makes", "policy") == "policy"

    def frozen(self, path: str) -> Checkpoint:
        """A judge's model that the run does not improve; the first model's engine opens it."""
        if path not in self._frozen:
            model = next(iter(self.config.models))
            self._frozen[path] = checkpoints.measure(checkpoints.locate(path), model)
        return self._frozen[path]

    def server(self, name: str) -> Any:
        """A server of the configuration. It holds no memory of ours, so it stays open."""
        if name not in self._servers:
            from roles.policy.server import ChatServer

            self._servers[name] = ChatServer(**self.config.server[name].model_dump())
        return self._servers[name]

    @property
    def memory(self) -> RunMemory:
        """What judges' models said before."""
        if self._memory is None:
            path = self.config.cache.path
            place = Path(path) if path else self.root.parent / CACHE
            self._memory = RunMemory(place, self.progress)
        return self._memory

    def close(self) -> None:
        self.close_policy()
        for server in self._servers.values():
            server.close()
        if self._memory is not None:
            self._memory.close()

    def close_policy(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

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
