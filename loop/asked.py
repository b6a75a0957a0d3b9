"""Whose model a judge asks: what its names mean, opened when it is asked, remembered where that
pays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from judges.models import Models
from judges.remembered import Remembered
from loop.seat import Seat
from loop.settings import Config, Role, digest
from roles.protocols import Policy
from store import checkpoints
from store.errors import UserError, unknown
from store.records import Checkpoint

if TYPE_CHECKING:
    from loop.context import Context


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


def meant(context: Context, name: str, model: str, tested: Checkpoint | None) -> Checkpoint:
    """The checkpoint that a name means now, asked about `model` with `tested` under test."""
    kind, _, of = name.partition(":")
    match kind:
        case "round":
            return tested or context.store.incumbent(model)
        case "base":
            return context.store.beginning(of)
        case "model":
            if tested is not None and tested.model == of:
                return tested
            # In round 0 what the warm-up made is not accepted yet.
            if len(context.store.rounds()) == 1:
                return context.store.beginning(of)
            return context.store.incumbent(of)
    return context.store.beginning(model) if of == "base" else context.seat.frozen(of)


@dataclass(frozen=True)
class Asking:
    """Where a judge is asked, and what the names mean there that it asks models by."""

    checkpoints: Mapping[str, Checkpoint]
    """Of all names but those of servers, which are the configuration's."""
    fresh: bool = False
    """Whether nothing is remembered: of anchors one wants to know what the model says now."""
    place: str = ""
    """Where in the run it is asked."""

    @classmethod
    def of(
        cls,
        context: Context,
        names: Iterable[str],
        model: str,
        tested: Checkpoint | None,
        **where: Any,
    ) -> Asking:
        """names: of all models that the judge asks."""
        own = (each for each in names if not each.startswith("server:"))
        return cls({name: meant(context, name, model, tested) for name in own}, **where)

    def judging(self, seat: Seat, role: Role, version: str) -> tuple[Models, str | None]:
        """The model that the judge asks, with the way to others, and what it is called."""

        def find(name: str) -> Any:
            return self._named(seat, name, version)

        if role.model is None:
            return Models(None, find), None
        return Models(find(role.model), find), self._identity(seat, role.model)

    def _named(self, seat: Seat, name: str, version: str) -> Any:
        kind, _, of = name.partition(":")
        if kind == "server":
            model: Any = seat.server(of)
        else:
            checkpoint = self._checkpoint(name)
            model = _Opened(lambda: seat.policy(checkpoint))
        when = seat.config.cache.when
        if self.fresh or when == "never" or (when == "server" and kind != "server"):
            return model
        return Remembered(model, self._digest(seat, name), version, seat.memory, self.place)

    def _checkpoint(self, name: str) -> Checkpoint:
        if name not in self.checkpoints:
            raise unknown("model that the judge has in its `models`", name, self.checkpoints)
        return self.checkpoints[name]

    def _identity(self, seat: Seat, name: str) -> str:
        """As the store tells who judged: a checkpoint's path, or the server's model and address."""
        kind, _, of = name.partition(":")
        if kind == "server":
            return str(seat.server(of).identity)
        return str(self._checkpoint(name).path)

    def _digest(self, seat: Seat, name: str) -> str:
        """What tells models apart in all runs: a path may hold other weights tomorrow, and what
        else goes into a server's requests may change every reply."""
        kind, _, of = name.partition(":")
        if kind != "server":
            return self._checkpoint(name).digest
        return f"{self._identity(seat, name)} {digest(seat.config.server[of].extra)[:12]}"


class _Opened:
    """A checkpoint's policy, opened at each use: between two, another may have been."""

    def __init__(self, find: Callable[[], Policy]) -> None:
        self._find = find

    def __getattr__(self, name: str) -> Any:
        return getattr(self._find(), name)
