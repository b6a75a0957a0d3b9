"""Whose model a judge asks: found by name, opened when it is asked, remembered where that pays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from judges.models import Models
from judges.remembered import Remembered
from loop.context import Context
from loop.settings import Config, Role, digest
from roles.protocols import Policy
from store import checkpoints
from store.errors import UserError
from store.records import Checkpoint


def check_model(config: Config, role: str, use: str, name: str, *, weights: bool = True) -> None:
    """Raises UserError for a model that cannot be asked in this run. role: who asks it. weights:
    whether those of a model on the Hub are fetched."""
    known = ["round", *(f"model:{each}" for each in config.models), "checkpoint:base"]
    known += [f"base:{each}" for each in config.models]
    known += [f"server:{each}" for each in config.server]
    kind, _, path = name.partition(":")
    if kind == "checkpoint" and path not in ("", "base"):
        checkpoints.locate(path, weights=weights)
    elif name not in known:
        there = ", ".join([*known, "checkpoint:PATH"])
        hint = ""
        if kind == "server":
            hint = f"; a table [server.{path or 'NAME'}] with its url makes one"
        raise UserError(f"{role} {use!r} asks the model {name!r}; there are: {there}{hint}")


@dataclass(frozen=True)
class Asking:
    """Where a judge is asked: of which run, about which model and which checkpoint under test."""

    context: Context
    model: str
    tested: Checkpoint | None
    fresh: bool = False
    """Whether nothing is remembered: of anchors one wants to know what the model says now."""
    place: str = ""
    """Where in the run it is asked."""

    def judging(self, role: Role, version: str) -> tuple[Models, str | None]:
        """The model that the judge asks, with the way to others, and what it is called."""

        def find(name: str) -> Any:
            return self._named(name, version)

        if role.model is None:
            return Models(None, find), None
        return Models(find(role.model), find), self._identity(role.model)

    def proposing(self, role: Role) -> Policy:
        """The model that a proposer asks, where that is not the policy itself."""
        name = cast(str, role.model)
        return cast(Policy, _Opened(lambda: self.context.policy(self._checkpoint(name))))

    def _named(self, name: str, version: str) -> Any:
        kind, _, of = name.partition(":")
        if kind == "server":
            model: Any = self.context.server(of)
        else:
            model = _Opened(lambda: self.context.policy(self._checkpoint(name)))
        when = self.context.config.cache.when
        if self.fresh or when == "never" or (when == "server" and kind != "server"):
            return model
        return Remembered(model, self._digest(name), version, self.context.memory, self.place)

    def _checkpoint(self, name: str) -> Checkpoint:
        kind, _, of = name.partition(":")
        match kind:
            case "round":
                return self.tested or self.context.store.incumbent(self.model)
            case "base":
                return self.context.store.beginning(of)
            case "model":
                if self.tested is not None and self.tested.model == of:
                    return self.tested
                # In round 0 what the warm-up made is not accepted yet.
                if len(self.context.store.rounds()) == 1:
                    return self.context.store.beginning(of)
                return self.context.store.incumbent(of)
        return self.context.store.beginning(self.model) if of == "base" else self.context.frozen(of)

    def _identity(self, name: str) -> str:
        """As the store tells who judged: a checkpoint's path, or the server's model and address."""
        kind, _, of = name.partition(":")
        if kind == "server":
            return cast(str, self.context.server(of).identity)
        return str(self._checkpoint(name).path)

    def _digest(self, name: str) -> str:
        """What tells models apart in all runs: a path may hold other weights tomorrow, and what
        else goes into a server's requests may change every reply."""
        kind, _, of = name.partition(":")
        if kind != "server":
            return self._checkpoint(name).digest
        return f"{self._identity(name)} {digest(self.context.config.server[of].extra)[:12]}"


class _Opened:
    """A checkpoint's policy, opened at each use: between two, another may have been."""

    def __init__(self, find: Callable[[], Policy]) -> None:
        self._find = find

    def __getattr__(self, name: str) -> Any:
        return getattr(self._find(), name)
