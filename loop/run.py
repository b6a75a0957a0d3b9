"""From a configuration to a finished run: begin, go on, leave in order.

Everything that can be wrong with what the user gave is checked before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import traceback
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Any, get_args

from sqlalchemy.exc import SQLAlchemyError

from loop import config as configuration
from loop import failures, lease, names, settings, stopping
from loop.casting import load_roles as load_roles
from loop.progress import Progress
from loop.settings import Config
from store import checkpoints, postgres
from store.connect import check_postgres
from store.database import Store
from store.errors import Away, UserError, Waiting
from store.records import Decision, Run, RunStatus

DATABASE = "loop.db"
UNFINISHED: tuple[RunStatus, ...] = ("running", "interrupted", "failed", "waiting")
RETURNS = 3
"""How often a store's server may go away while one stage of a round is under way."""
PACKAGES = ("ratchet-loop", "torch", "transformers", "trl", "langgraph", "sqlmodel")


@dataclass(frozen=True)
class Outcome:
    """How a run left off, and the exit code that says it."""

    code: int
    status: RunStatus
    reason: str
    place: str = ""
    """What was under way, of a run that did not end: "train of round 2". Empty: not known."""
    trace: str = ""
    """Where a failure that is told in a sentence came from: the log has it as well."""


def find_run(given: Path | None, runs: Path) -> Path:
    """The run directory that is meant: the given one, or the newest under `runs`."""
    if given is not None:
        for place in (given, runs / given):
            if is_run(place):
                return place
        raise UserError(f"no run in {given}: it has no {DATABASE}")
    found = all_runs(runs)
    if not found:
        raise UserError(f"no run under {runs}/ yet; `loop start` begins one")
    return found[-1]


def is_run(place: Path) -> bool:
    """Whether a folder has a store, or says where in PostgreSQL it is."""
    return any((place / name).is_file() for name in (DATABASE, postgres.POINTER))


def all_runs(runs: Path, below: str = "*") -> list[Path]:
    """Run directories, the newest last: their names begin with the time they were made."""
    kept = (runs.glob(f"{below}/{name}") for name in (DATABASE, postgres.POINTER))
    return sorted({path.parent for paths in kept for path in paths})


def new_place(config: Config, name: str) -> postgres.Place | None:
    """Where in PostgreSQL a new run is to be kept. None: in a file of its own."""
    url, password_env = config.store.url, config.store.password_env
    return None if url is None else postgres.new_place(url, password_env, name)


def check_store(config: Config) -> None:
    """Raises UserError when no run can be kept where the configuration says."""
    if config.store.url is not None:
        check_postgres(config.store.url, config.store.password_env)


def unfinished(runs: Path, config: Config) -> Path | None:
    """The newest run of equal identity that has not ended."""
    for root in reversed(all_runs(runs)):
        try:
            store = Store(root / DATABASE)
            run = store.run()
            store.close()
        except (UserError, SQLAlchemyError) as error:
            print(f"loop: passed over {root}: {error}", file=sys.stderr)
            continue
        goes_on = run is not None and run.status in UNFINISHED
        if run is None or not goes_on or run.identity != config.identity:
            continue
        if run.config.get("store", {}).get("url") == config.store.url:
            return root
    return None


def stored_config(root: Path) -> Config:
    store = Store(root / DATABASE)
    run = store.run()
    store.close()
    if run is None:
        raise UserError(f"{root} holds no run: it was ended before it began; delete it")
    return configuration.validate(run.config)


def begin(config: Config, runs: Path, name: str, roles: dict[int, Any]) -> Path:
    """Make a run directory with its store. `roles` are those that load_roles made of `config`."""
    root = unused(runs, name)
    new = [each for each in root.parents if not each.exists()]
    now = versions(config, roles)
    try:
        for folder in (root, root / "checkpoints", root / "logs"):
            folder.mkdir(parents=True)
        write_config(root, config)
        store = Store(root / DATABASE, create=True, place=new_place(config, root.name))
        with closing(store):
            store.create_run(
                Run(
                    uuid=str(uuid.uuid4()),
                    name=root.name,
                    config=config.model_dump(mode="json"),
                    identity=config.identity,
                    seed=config.seed,
                    versions=now,
                )
            )
            if store.place is not None:
                store.place.keep(root)
    except (OSError, SQLAlchemyError, UserError) as error:
        shutil.rmtree(root, ignore_errors=True)
        with suppress(OSError):  # somebody else may have begun a run there meanwhile
            for each in new:
                each.rmdir()
        raise UserError(f"cannot make a run directory under {runs}: {error}") from error
    return root


def unused(runs: Path, name: str) -> Path:
    """A directory for a new run, which is not there yet."""
    stem = f"{datetime.now():%Y-%m-%d-%H%M%S}-{name}"
    root, number = runs / stem, 1
    while root.exists():
        number += 1
        root = runs / f"{stem}-{number}"
    return root


def update(root: Path, config: Config) -> list[dict[str, Any]]:
    """Give a run other operational settings. Returns what changed.

    Raises UserError when the change makes another run.
    """
    changes = configuration.differences(stored_config(root), config)
    other = [each for each in changes if not settings.operational(each["key"])]
    if other:
        told = "; ".join(f"{each['key']}: {each['from']} -> {each['to']}" for each in other)
        raise UserError(
            f"{root} is another run than that; these settings cannot change: {told}. "
            "Leave RUN out to begin a new one"
        )
    if changes:
        store = Store(root / DATABASE)
        store.change_config(config.model_dump(mode="json"), changes)
        store.close()
        try:
            write_config(root, config)
        except OSError as error:
            raise UserError(f"cannot write {root / 'config.json'}: {error.strerror}") from error
    return changes


def keep_settings(root: Path, sets: Sequence[str]) -> None:
    """Give a run other operational settings that it had to take on its way."""
    update(root, configuration.change(stored_config(root), sets))


def write_config(root: Path, config: Config) -> None:
    """What a run is, beside its store, for people to read."""
    made = root / "config.json.new"
    made.write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
    made.replace(root / "config.json")


def versions(config: Config, roles: dict[int, Any]) -> dict[str, str]:
    """Of Python, the packages that matter, our own code and, if any, the files of parts of the
    user's own (digests) and, where an engine or a trainer has a device, what multiplies on it."""
    from roles.policy import devices

    home = Path(__file__).resolve().parent.parent
    code = hashlib.sha256()
    for name in names.OURS:
        for file in sorted(file for kind in ("*.py", "*.c") for file in (home / name).rglob(kind)):
            code.update(file.read_bytes())
    found = {package: version(package) for package in PACKAGES}
    parts = [part for model in config.models.values() for part in (model.engine, model.trainer)]
    given = [getattr(roles[id(part)], "device", None) for part in parts]
    # Of a part of the user's own, `device` may mean something else.
    on = [name for name in get_args(devices.Device) if name in given]
    own = hashlib.sha256()
    for file in (files := configuration.own_files(config)):
        own.update(file.read_bytes())
    found |= {"parts": own.hexdigest()[:16]} if files else {}
    return found | {
        "python": platform.python_version(),
        "code": code.hexdigest()[:16],
        "arithmetic": "; ".join(sorted({devices.arithmetic(name) for name in on})),
    }


def drive(root: Path, progress: Progress, roles: dict[int, Any], config: Config) -> Outcome:
    """Drive a run until a rule ends it, somebody stops it or a stage fails.

    `roles` are those that load_roles made of `config`, which is the run's own.
    Raises UserError when what the user gave turns out to be wrong before anything was asked, and
    when another process takes the run over.
    """
    for key in ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING_V2"):
        os.environ[key] = "false"
    with at_work(root, progress, roles, config) as context:
        _refuse_changed_weights(context.store, config)
        now = versions(config, roles)
        if now["arithmetic"]:
            progress.say(now["arithmetic"])
        context.store.note_versions(now)
        context.store.set_status("running")
        return _drive(context)


@contextmanager
def at_work(
    root: Path, progress: Progress, roles: dict[int, Any], config: Config, *, batches: bool = True
) -> Iterator[Any]:
    """The Context of a run that nobody else works on meanwhile: its lease is held.

    batches: an interrupt asks for an end after the batch at hand; off, it comes at once.
    Raises UserError when another process drives the run.
    """
    from loop.context import Context

    store = Store(root / DATABASE)
    try:
        heard = stopping.signals() if batches else nullcontext(stopping.Signals())
        with lease.held(store) as lost, heard as signals:
            context = Context(
                store=store,
                config=config,
                roles=roles,
                progress=progress,
                stopping=stopping.asked(store, lost, signals, progress),
                changed=partial(keep_settings, root),
            )
            try:
                yield context
            finally:
                signals.deaf = True  # leaving takes a moment; a third Ctrl-C must not break it off
                progress.abandon()
                context.close()
    finally:
        store.close()


def _refuse_changed_weights(store: Store, config: Config) -> None:
    """A round that begins from other weights than were measured would be believed for nothing."""
    for model in config.models:
        made = {each.id: each for each in store.checkpoints(model)}
        incumbent = store.incumbent(model) if made else None
        needed = [] if incumbent is None else [incumbent, made.get(incumbent.base_id)]
        for found in needed:
            if found is not None and not checkpoints.intact(found):
                raise UserError(
                    f"{found.path}, from which {store.root} goes on, is missing or not as it was "
                    f"written; put it back (`loop verify {quote(str(store.root))}` says when it "
                    "is right), or delete the run to begin anew"
                )


def _drive(context: Any) -> Outcome:
    from loop import gate, graph, retention

    store, config = context.store, context.config
    try:
        retention.tidy(context)
        _through(context, graph.build())
        ending: Decision | None = gate.ending(store, config)
        if ending is None:
            raise RuntimeError("the graph ended and no rule ended the run")
        status: RunStatus = "done" if gate.is_success(ending) else "stopped"
        store.set_status(status, ending)
        return Outcome(0 if status == "done" else 3, status, ending.reason)
    except KeyboardInterrupt:
        place = _leave(store, "interrupted")
        return Outcome(130, "interrupted", "interrupted; what was committed is kept", place)
    except stopping.TakenOver:
        raise  # how the run stands is for the other process to say
    except Waiting as error:
        return _waits(context, error)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - told or shown whole, code 4
        return _failed(store, config, error)


def _through(context: Any, machine: Any) -> None:
    """Through the graph until it ends. Where the store's server was away, from what it has."""
    from loop import graph

    store, again = context.store, Counter[str]()
    state = graph.State(run=store.run().uuid, round=0)
    while True:
        try:
            machine.invoke(state, {"recursion_limit": graph.NO_STEP_LIMIT}, context=context)
            return
        except Away as away:
            place = _place(store)  # it waits until the server is back, or raises
            again[place] += 1
            if again[place] > RETURNS:
                raise
            context.progress.say(f"{away}; what it does not have of {place} is done again")


def _place(store: Store) -> str:
    rounds = store.rounds()
    return f"{rounds[-1].stage} of round {rounds[-1].number}" if rounds else "opening of round 0"


def _waits(context: Any, error: Waiting) -> Outcome:
    from loop import review

    place = _leave(context.store, "waiting")
    return Outcome(5, "waiting", review.told(context) or str(error), place)


def _failed(store: Store, config: Config, error: BaseException) -> Outcome:
    """What a stage failed of: a sentence where somebody can mend it, else the whole traceback.

    Raises UserError while there is nothing to lose: it is then a mistake like any other.
    """
    trace = "".join(traceback.format_exception(error))
    told = failures.cause(error, store, config)
    if told is not None and not _began(store):
        raise UserError(told) from error
    place = _leave(store, "failed")
    return Outcome(4, "failed", told or trace, place, trace if told else "")


def _leave(store: Store, status: RunStatus) -> str:
    """Say in the store how the run stands, if it can be written. Returns what was under way."""
    with suppress(SQLAlchemyError, UserError):  # a full disk, say; a dead driver tells as much
        store.set_status(status)
    try:
        return _place(store)
    except (SQLAlchemyError, UserError):
        return ""


def _began(store: Store) -> bool:
    """Whether a prompt was asked. What cannot be read may be worth something."""
    try:
        return bool(store.query("SELECT 1 FROM asked LIMIT 1"))
    except (SQLAlchemyError, UserError):
        return True


def discard(root: Path) -> None:
    """Delete a run that never got as far as asking a prompt, unless somebody else drives it."""
    try:
        store = Store(root / DATABASE)
    except (SQLAlchemyError, UserError):
        return
    try:
        found = store.run()
        kept = _began(store) or (found is not None and lease.is_driven(store))
        if not kept:
            store.discard()
    finally:
        store.close()
    if not kept:
        shutil.rmtree(root)


def request_stop(root: Path) -> bool:
    """Ask a run's driver to stop after its batch. False: nobody drives it."""
    store = Store(root / DATABASE)
    try:
        alive = lease.is_driven(store)
        if alive:
            store.request_stop()
        return alive
    finally:
        store.close()


def describe_changes(changes: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{each['key']} {each['from']} -> {each['to']}" for each in changes)
