"""What the reading commands are told: a run's store and settings, a model, a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from sqlalchemy.exc import DatabaseError

from loop import config as configuration
from loop import retention
from loop.report import the_run
from loop.run import DATABASE
from loop.settings import Config
from store.database import Store
from store.errors import UserError, unknown
from store.records import Checkpoint


@contextmanager
def opened(root: Path) -> Iterator[Store]:
    """The store of a run. Raises UserError where it cannot be read."""
    try:
        store = Store(root / DATABASE)
        try:
            yield store
        finally:
            store.close()
    except DatabaseError as error:
        raise UserError(f"{root / DATABASE} cannot be read: {error.orig}") from error


def config_of(store: Store) -> Config:
    """The settings of a run. Raises UserError where they are not settings any more."""
    try:
        return configuration.validate(the_run(store).config)
    except UserError as error:
        raise UserError(f"the settings of {store.root} cannot be read: {error}") from error


def model(config: Config, name: str | None) -> str:
    """The model of that name; told none, the first."""
    if name is not None and name not in config.models:
        raise unknown("model", name, config.models)
    return name or next(iter(config.models))


def checkpoint(store: Store, model: str, which: str) -> Checkpoint:
    """ "best", "base" (what the rounds began from), "given" (before any warm-up), or the one that
    the round of a number made. Raises UserError when it is not there, or its weights are not.
    """
    made = store.checkpoints(model)
    if not made:
        raise UserError(f"{store.root} has no checkpoint of {model} yet")
    if which == "best":
        found = retention.best_checkpoint(store, model)
    elif which == "base":
        found = store.beginning(model)
    elif which == "given":
        found = made[0]
    elif which.isdecimal():
        own = store.checkpoints(model, store.round(int(which)).id)
        if not own:
            raise UserError(f"round {which} of {store.root} made no checkpoint of {model}")
        found = own[-1]
    else:
        raise UserError(
            f"a checkpoint is best, base, given or the number of a round, found {which!r}"
        )
    _refuse_gone(store, found)
    return found


def _refuse_gone(store: Store, found: Checkpoint) -> None:
    why = gone(found)
    if why is not None:
        numbers, made = rounds_of(store), store.checkpoints(found.model)
        left = sorted({numbers[cast(int, each.id)] for each in made if gone(each) is None})
        raise UserError(
            f"{found.path} cannot be used: {why}; there are those of the rounds "
            f"{', '.join(map(str, left))}"
        )


def gone(found: Checkpoint) -> str | None:
    """Why there are no weights to use. None when there are."""
    if found.status == "pruned":
        return "its weights were deleted when newer ones came (checkpoints.keep_last)"
    if found.status == "diverged":
        return "its training met a number that is not finite"
    return None if found.path.is_dir() else "its folder is not there"


def rounds_of(store: Store) -> dict[int, int]:
    """Checkpoint id -> number of the round that made or took it."""
    found = store.query(
        "SELECT checkpoint.id AS id, number FROM checkpoint "
        "JOIN round ON round.id = checkpoint.round_id WHERE checkpoint.run_id = :run"
    )
    return {cast(int, row["id"]): cast(int, row["number"]) for row in found}
