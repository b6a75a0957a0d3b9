"""A run that begins where another one stands, under other settings.

The whole run is copied, store and checkpoints, so that the new one has the old one's lineage and
touches nothing of it. Rounds that are over stay as they were made.
"""

from __future__ import annotations

import shutil
import uuid
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from loop import config as configuration
from loop import lease
from loop.run import DATABASE, new_place, unused, write_config
from loop.settings import Config, operational
from store.database import Store
from store.errors import UserError
from store.postgres import Place
from store.records import Run

FIXED = ("seed", "evaluate.", "batch_prompts")
"""Settings without which the rounds so far would not be the new run's: what is measured, on which
prompts, and what every random choice hangs on."""

COPYING = "loop.db.copying"
"""The store until it is the new run's own. A folder without a store under its name is no run."""


def fork(root: Path, config: Config, runs: Path, name: str) -> Path:
    """The run directory of a run that goes on with `config` where the run in `root` ended a round.

    Raises UserError while a round is under way there, and for settings that have to stay.
    """
    store = Store(root / DATABASE)
    try:
        run, rounds = store.run(), store.rounds()
        if run is None or not rounds:
            raise UserError(f"{root} has no round yet, so there is nothing to go on from")
        if lease.is_driven(store) or rounds[-1].status == "running":
            raise UserError(
                f"round {rounds[-1].number} of {root} is not over; "
                f"`loop start {root}` ends it, then it can be forked"
            )
        before = configuration.validate(run.config)
        changes = configuration.differences(before, config)
        _refuse(changes, before, config)
        into = unused(runs, name)
        forked = replace(
            run,
            uuid=str(uuid.uuid4()),
            name=into.name,
            config=config.model_dump(mode="json"),
            identity=config.identity,
            parent_uuid=run.uuid,
            parent_path=str(root.resolve()),
        )
        try:
            (into / "logs").mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot make a run directory under {runs}: {error}") from error
        try:
            write_config(into, config)
            _copy(store, into, new_place(config, into.name), forked, changes)
        except OSError as error:
            shutil.rmtree(into, ignore_errors=True)
            raise UserError(f"cannot copy {root} to {into}: {error}") from error
    finally:
        store.close()
    return into


def _copy(
    store: Store,
    into: Path,
    place: Place | None,
    forked: Run,
    changes: list[dict[str, Any]],
) -> None:
    left = shutil.ignore_patterns("*.part", "*.gone")  # by a kill
    shutil.copytree(store.root / "checkpoints", into / "checkpoints", symlinks=True, ignore=left)
    with closing(store.copy_to(into / COPYING, place)) as copy:
        copy.fork_run(forked, changes)
    if place is None:
        (into / COPYING).rename(into / DATABASE)
    else:
        place.keep(into)


def _refuse(changes: list[dict[str, Any]], before: Config, after: Config) -> None:
    if before.models.keys() != after.models.keys():
        raise UserError(
            f"the run has the models {', '.join(before.models)}, and a fork of it has them too; "
            f"found {', '.join(after.models)}"
        )
    bases = [f"models.{name}.{key}" for name in before.models for key in ("path", "template_path")]
    for each in changes:
        key = each["key"]
        if key in bases or (key.startswith(FIXED) and not operational(key)):
            raise UserError(
                f"{key} stays what it was in a fork, or its rounds could not be compared: "
                f"{each['from']}, found {each['to']}; begin a new run for another"
            )
