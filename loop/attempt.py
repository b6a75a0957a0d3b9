"""One attempt at a run, as `loop start` makes it: which run, its log, and what to say at the end.

Nothing is written before everything that the user gave has been checked.
"""

from __future__ import annotations

import io
import re
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from loop import config as configuration
from loop import lease, names, report, run, space, views
from loop.progress import Progress
from loop.report import Table
from loop.screen import line
from loop.settings import Config
from store.database import NOBODY, Store
from store.errors import UserError

LOG_WIDTH = 100
LEFT = ("failed", "interrupted", "waiting")


@dataclass(frozen=True)
class Wish:
    """What `loop start` was told."""

    run: Path | None = None
    file: Path | None = None
    recipe: str | None = None
    sets: Sequence[str] = ()
    runs: Path = Path("runs")
    name: str | None = None


def start(wish: Wish, out: Console, err: Console) -> int:
    """Begin a run or go on with one, to its end. Returns the exit code. Raises UserError."""
    names.check()
    if wish.name is not None and not re.fullmatch(r"[\w.-]+", wish.name):
        raise UserError(f"a run's name has letters, digits and . _ -, found {wish.name!r}")
    root, config = _choose(wish)
    roles = run.load_roles(config)
    fresh = root is None
    if root is None:
        space.check(config, roles, wish.runs)
        run.check_store(config)
        name = wish.name or _stem(wish.file if wish.recipe is None else Path(wish.recipe))
        root = run.begin(config, wish.runs, name, roles)
        said = f"begins a new run, {root}"
    else:
        said = f"goes on with {root}"
        if changes := run.update(root, config):
            said += f" ({run.describe_changes(changes)})"
    try:
        with _log(root, err) as log:
            progress = Progress(err, log)
            try:
                progress.say(said)
                with _warnings_said(progress):
                    outcome = run.drive(root, progress, roles, config)
            except UserError as error:
                told = UserError(f"{error}{_kept(root)}")
                line(log, f"loop: {told}")
                raise told from error
            if outcome.status in LEFT:
                _leave(root, outcome, err, log)
                return outcome.code
            for console in (out, log):
                _report(root, config, outcome, console)
    except UserError:
        if fresh:
            run.discard(root)
        raise
    return outcome.code


@contextmanager
def _warnings_said(progress: Progress) -> Iterator[None]:
    """What our own parts warn of is said like anything else, once a run; others' as ever."""
    shown, said = warnings.showwarning, set[str]()

    def show(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
        if not names.is_ours(filename):
            shown(message, category, filename, *rest, **more)
        elif str(message) not in said:
            said.add(str(message))
            progress.say(str(message))

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def _kept(root: Path) -> str:
    """What to add to a mistake that was found when the run had something to lose."""
    try:
        store = Store(root / run.DATABASE)
        try:
            asked = store.query("SELECT 1 FROM asked LIMIT 1")
            status = report.the_run(store).status
        finally:
            store.close()
    except (UserError, SQLAlchemyError):  # it is the database that the mistake is about
        return ""
    if not asked or status != "failed":
        return ""
    return f"; what was committed is kept, and `loop start {_quoted(root)}` goes on from there"


def _quoted(path: Path | str) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def _stem(file: Path | None) -> str:
    return "default" if file is None else re.sub(r"[^\w.-]", "-", file.stem)


def _choose(wish: Wish) -> tuple[Path | None, Config]:
    """The run to go on with, None for a new one, and its configuration."""
    told = wish.file is not None or wish.recipe is not None
    if wish.run is None:
        config = configuration.read(wish.file, wish.recipe, wish.sets)
        root = run.unfinished(wish.runs, config)
    else:
        if wish.name is not None:
            raise UserError(f"--name is for a new run, and {wish.run} is to be gone on with")
        root = run.find_run(wish.run, wish.runs)
        if told:
            config = configuration.read(wish.file, wish.recipe, wish.sets)
        else:
            config = configuration.change(run.stored_config(root), wish.sets)
    if root is not None:
        _refuse_driven(root)
    return root, config


def _refuse_driven(root: Path) -> None:
    """Before its settings change under its driver. The lease decides when two come at once."""
    store = Store(root / run.DATABASE)
    try:
        found, driven = report.the_run(store), lease.is_driven(store)
    finally:
        store.close()
    if driven:
        raise lease.driven(root, found.driver or NOBODY)


class Log(io.TextIOWrapper):
    """A file that a full disk does not stop a run by: what cannot be written is left out."""

    failure: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.failure = error
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.failure = error

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:
            self.failure = error


@contextmanager
def _log(root: Path, err: Console) -> Iterator[Console]:
    """The log of this attempt: attempt-1.log, attempt-2.log, ..."""
    folder = root / "logs"
    found = [re.fullmatch(r"attempt-(\d+)\.log", each.name) for each in folder.glob("*.log")]
    path = folder / f"attempt-{max((int(each[1]) for each in found if each), default=0) + 1}.log"
    try:
        folder.mkdir(exist_ok=True)
        opened = path.open("wb")
    except OSError as error:
        raise UserError(f"cannot make the log {path}: {error.strerror}") from error
    file = Log(opened, encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        yield Console(file=file, width=LOG_WIDTH, color_system=None, force_terminal=False)
    finally:
        file.close()
        if file.failure is not None:
            line(err, f"{path} is not complete: {file.failure.strerror}")


def _report(root: Path, config: Config, outcome: run.Outcome, out: Console) -> None:
    from loop.gain import achieved

    store = Store(root / run.DATABASE)
    try:
        line(out)
        views.rounds(out, report.rounds(store))
        line(out)
        views.ending(out, achieved(store, config))
        line(out, f"ended: {outcome.reason}")
        line(out, f"next: {next_step(report.status(store, alive=False))}")
        line(out, f"look closer: loop rounds, loop show 1, loop why {_a_pair(store)}")
        compare = f"loop compare {_quoted(root)} OTHER"
        line(out, f'use it: loop sample "PROMPT", {compare}, loop export FOLDER')
    finally:
        store.close()


def _leave(root: Path, outcome: run.Outcome, err: Console, log: Console) -> None:
    """Say where a run was left that neither ended nor was ended by a rule, and why.

    The store is not asked: it may be what failed.
    """
    place = outcome.place or "a stage"
    what = f"interrupted: {place} was under way"
    on = f"`loop start {_quoted(root)}` goes on from there"
    if outcome.status == "waiting":
        what = outcome.reason
        on = f"{asks_for_them(root)}; then `loop start {_quoted(root)}` goes on"
    if outcome.status == "failed":
        what = f"{place} failed"
        line(err, outcome.reason)
        line(log, outcome.trace + outcome.reason)
    for console in (err, log):
        line(console, f"{what}; every committed batch is intact, and {on}")


def asks_for_them(root: Path | str) -> str:
    """What to type when a run waits for a person."""
    return f"`loop review {_quoted(root)}` asks for the scores that are missing"


def _a_pair(store: Store) -> int:
    """An example worth asking about: the first pair, or whatever there is."""
    found = store.query("SELECT id FROM example ORDER BY kind = 'pair' DESC, id LIMIT 1")
    return int(found[0]["id"]) if found else 1


MORE = {
    "rounds": "--set rounds=N` extends it",
    "target": "--set gate.target=X` goes on to a higher one",
    "budget": "--set budget.generated_tokens=N` goes on with a larger budget",
    "cost": "--set budget.cost=X` goes on with more money",
    "alarm": "--set alarms.BOUND=X` goes on with another bound, `--set alarms.stop=[]` with none",
    "patience": "--set gate.patience=N` goes on with more patience",
}


def next_step(found: Table) -> str:
    """What to type next, from what `report.status` gave."""
    path = _quoted(found["path"])
    if found["alive"]:
        return f"`loop stop {path}` ends it after its batch"
    if found["status"] == "running":
        return f"its driver is gone; `loop start {path}` goes on"
    if found["status"] == "waiting":
        return f"{asks_for_them(found['path'])}; then `loop start {path}` goes on"
    if found["status"] in ("interrupted", "failed"):
        return f"`loop start {path}` goes on"
    rule = (found["decision"] or {}).get("rule")
    if rule in MORE:
        return f"`loop start {path} {MORE[rule]}"
    return "the run cannot go on as it is configured; `loop start` with other settings begins anew"
