"""Where roles are at work: one process's roles, servers and memory, and one policy at a time.

A seat knows nothing of a store: what is done at it is said whole in a task (loop/tasks.py), so the
driver of a run can have it done by itself or by a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from loop.memory import RunMemory
from loop.settings import Config, Role
from roles.protocols import Engine, Policy
from store import checkpoints
from store.records import Checkpoint

CACHE = "judged.db"


@dataclass
class Seat:
    """Roles at work. One policy at most is in memory."""

    config: Config
    made: Callable[[Role], Any]
    """What fills a role of the configuration."""
    root: Path
    say: Callable[[str], None]
    _open: tuple[Path, Policy] | None = None
    _engine: Engine | None = None
    """What opened it."""
    _engines: list[Engine] = field(default_factory=list)
    """All that opened one: what rests between policies ends when the seat is left."""
    _frozen: dict[str, Checkpoint] = field(default_factory=dict)
    _servers: dict[str, Any] = field(default_factory=dict)
    _memory: RunMemory | None = None

    def policy(self, checkpoint: Checkpoint) -> Policy:
        """The checkpoint as a policy; the one that was open before is closed."""
        if self._open is None or self._open[0] != checkpoint.path:
            engine = cast(Engine, self.made(self.config.models[checkpoint.model].engine))
            self._close(rests=engine is not self._engine)
            checkpoints.check(checkpoint)
            policy = engine.open(checkpoint)
            if not isinstance(policy, Policy):
                raise RuntimeError(f"engine {type(engine).__name__} opened {policy!r}, no policy")
            self._open, self._engine = (checkpoint.path, policy), engine
            if engine not in self._engines:
                self._engines.append(engine)
        return self._open[1]

    def frozen(self, path: str) -> Checkpoint:
        """A judge's model that the run does not improve; the first model's engine opens it."""
        if path not in self._frozen:
            model = next(iter(self.config.models))
            self._frozen[path] = checkpoints.as_it_is(checkpoints.locate(path), model)
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
            self._memory = RunMemory(place, self.say)
        return self._memory

    def close(self) -> None:
        self.close_policy()
        for engine in self._engines:
            getattr(engine, "end", bool)()
        for server in self._servers.values():
            server.close()
        if self._memory is not None:
            self._memory.close()

    def close_policy(self) -> None:
        """Other models need the memory now."""
        self._close(rests=True)

    def _close(self, *, rests: bool) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None
        if rests:
            getattr(self._engine, "rest", bool)()
            self._engine = None
