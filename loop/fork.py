"""A run that begins where another one stands, under other settings.

The whole run is copied, store and checkpoints, so that the new one has the old one's lineage and
touches nothing of it. Rounds that are over stay as they were made.
"""

from __future__ import annotations

import shutil
import uuid
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from loop import config as configuration
from loop import lease
from loop.run import DATABASE, all_runs, write_config
from loop.settings import Config
from store import checkpoints
from store.database import Store
from store.errors import UserError

FIXED = ("seed", "evaluate.", "batch_prompts")
"""Settings without which the rounds so far would not be the new run's: what is measured, on which
prompts, and what every random choice hangs on."""


def fork(root: Path, config: Config, runs: Path, name: str) -> Path:
    """The run directory of a run that goes on with `config` where the run in `root` ended a round.

    Raises UserError while a round is under way there, and for settings that have to stay.
    """
    store = Store(root / DATABASE)
    try:
        run, rounds = store.run(), store.rounds()
        if run is None or not rounds:
            raise UserError(f"{root} has no round yet, so there is nothing to go on from")
        if lease.is_alive(run) or rounds[-1].status == "running":
            raise UserError(
                f"round {rounds[-1].number} of {root} is not over; "
                f"`loop start {root}` ends it, then it can be forked"
            )
        before = configuration.validate(run.config)
        changes = configuration.differences(before, config)
        _refuse(changes, before, config)
        final = _place(runs, name)
        part = checkpoints.aside(final)
        try:
            (part / "logs").mkdir(parents=True)
            store.copy_to(part / DATABASE)
            shutil.copytree(root / "checkpoints", part / "checkpoints", symlinks=True)
            write_config(part, config)
            copy = Store(part / DATABASE)
            forked = replace(
                run,
                uuid=str(uuid.uuid4()),
                name=final.name,
                config=config.model_dump(mode="json"),
                identity=config.identity,
                parent_uuid=run.uuid,
                parent_path=str(root.resolve()),
            )
            copy.fork_run(forked, changes)
            copy.close()
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise UserError(f"cannot copy {root} to {final}: {error}") from error
        part.rename(final)
    finally:
        store.close()
    return final


def _refuse(changes: list[dict[str, object]], before: Config, after: Config) -> None:
    if before.models.keys() != after.models.keys():
        raise UserError(
            f"the run has the models {', '.join(before.models)}, and a fork of it has them too; "
            f"found {', '.join(after.models)}"
        )
    bases = [f"models.{name}.{key}" for name in before.models for key in ("path", "template_path")]
    for each in changes:
        key = str(each["key"])
        if key in bases or key.startswith(FIXED):
            raise UserError(
                f"{key} stays what it was in a fork, or its rounds could not be compared: "
                f"{each['from']}, found {each['to']}; begin a new run for another"
            )


def _place(runs: Path, name: str) -> Path:
    """A name that no run has: another process may be forking into the same folder."""
    stem = f"{datetime.now():%Y-%m-%d-%H%M%S}-{name}"
    taken = {root.name for root in all_runs(runs)}
    number, found = 1, stem
    while found in taken or (runs / found).exists() or checkpoints.aside(runs / found).exists():
        number += 1
        found = f"{stem}-{number}"
    return runs / found
