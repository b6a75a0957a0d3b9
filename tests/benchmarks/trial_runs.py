"""The runs of trials: made once, gone on with where they were left, and ended when asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loop import config
from loop.fork import fork
from loop.settings import Config, digest
from loop.trials import Variant
from store.database import Store
from store.errors import UserError

HOME = Path(__file__).resolve().parents[2]
WARM_UPS = "warm-ups"
CODE = ("code", "parts")
"""What of a run's versions says by which code it was made: ours, and that of parts of one's own."""
Versions = Mapping[str, str]


class Ended(Exception):
    """Somebody wants no more runs now."""


@dataclass
class Bench:
    """Where runs are, and the processes that make them."""

    runs: Path
    pool: ThreadPoolExecutor
    now: Mapping[tuple[str, str], Versions] = field(default_factory=dict)
    """Recipe and variant -> the versions that a run of it would have."""
    warmed: dict[str, Future[Path]] = field(default_factory=dict)
    by_other_code: dict[str, list[str]] = field(default_factory=dict)
    """Folder of runs -> those in it that were finished already, by code that is not here now."""
    processes: set[subprocess.Popen[str]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of `processes`. The main thread takes it in `end` alone, so no handler meets its own lock."""
    ended_by: int | None = None

    def end(self, number: int, frame: object = None) -> None:
        """A handler of signals: what runs ends after its batch, as it does when asked by itself."""
        with self.lock:
            self.ended_by = number
            for each in self.processes:
                each.send_signal(signal.SIGTERM)

    def start(
        self, variant: Variant, seed: int, place: Path, warm: Future[Path] | None = None
    ) -> Future[Path]:
        return self.pool.submit(self._run, variant, seed, place, warm)

    def _run(self, variant: Variant, seed: int, place: Path, warm: Future[Path] | None) -> Path:
        """The finished run. What was begun goes on; a run of other settings is left alone, but a
        warm-up is whoever's that has it."""
        wanted = None if warm is None else variant.config(seed)
        found = run_of(place, wanted)
        if found is not None and found.finished:
            self._note(found, place, self.now.get((variant.trial, variant.name), {}))
            return found.root
        if self.ended_by is not None:
            raise Ended
        if found is not None:
            asked = [str(found.root)]
        elif warm is not None and wanted is not None:
            asked = [str(fork(warm.result(), wanted, place, variant.name))]
        else:
            asked = ["--recipe", variant.recipe, "--runs", str(place), "--set", f"seed={seed}"]
            asked += [part for each in variant.sets for part in ("--set", each)]
        self._loop_start(asked)
        made = run_of(place, wanted)
        assert made is not None, asked
        return made.root

    def _loop_start(self, asked: Sequence[str]) -> None:
        command = [sys.executable, "-P", "-m", "loop", "start", *asked]
        found = os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))
        alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": found}
        with self.lock:
            if self.ended_by is not None:
                raise Ended
            # A group of its own: a Ctrl-C would reach it twice, and the second ends it at once.
            process = subprocess.Popen(
                command,
                env=os.environ | alone,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                process_group=0,
            )
            self.processes.add(process)
        _, complaint = process.communicate()
        with self.lock:
            self.processes.discard(process)
        if process.returncode in (0, 3):  # 3: a rule of the run's own ended it
            return
        if self.ended_by is not None:
            raise Ended
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{complaint}")

    def warm_up(self, variant: Variant, seed: int) -> Future[Path]:
        """The run whose round 0 is the variant's, and which has no other."""
        key = warm_up_key(variant.config(seed))
        if key not in self.warmed:
            self.warmed[key] = self._warm_up(variant, seed, self.runs / WARM_UPS / key)
        return self.warmed[key]

    def _warm_up(self, variant: Variant, seed: int, place: Path) -> Future[Path]:
        if (found := run_of(place)) is not None and found.finished:
            now = self.now.get((variant.trial, variant.name), {})
            # Of parts it has another recipe's as well, which a warm-up does not ask.
            self._note(found, place, {key: now[key] for key in now if key != "parts"})
            return self.pool.submit(lambda: found.root)
        # Whatever the warm-up scores is enough, so the run is over before its first round.
        sets = (*variant.said, ("--set", ("gate.target=-1e9",)))
        return self.start(replace(variant, name="warm-up", said=sets), seed, place)

    def _note(self, found: Found, place: Path, now: Versions) -> None:
        stored = found.versions
        if any(stored[key] != now[key] for key in CODE if key in stored and key in now):
            folder, *rest = place.relative_to(self.runs).parts
            self.by_other_code.setdefault(folder, []).append("/".join(rest))

    def tell_of_other_code(self, folder: str) -> None:
        if runs := self.by_other_code.pop(folder, None):
            print(
                f"results.py: {', '.join(sorted(runs))} in {self.runs / folder} were made by other "
                "code than is here now and are taken as they are; remove a folder to run it anew",
                file=sys.stderr,
            )


def warm_up_key(made: Config) -> str:
    """Runs whose round 0 is the same have the same."""
    tables = made.model_dump(mode="json")
    bases = {
        name: [each.path, each.warmup_from, made.trainer(0, name).model_dump(mode="json")]
        for name, each in made.models.items()
    }
    parts = [tables["warmup"], tables["evaluate"], made.seed, made.batch_prompts, bases]
    return digest(parts)[:12]


@dataclass(frozen=True)
class Found:
    root: Path
    finished: bool
    versions: Versions = field(default_factory=dict, compare=False)


def run_of(place: Path, wanted: Config | None = None) -> Found | None:
    """The newest run of these settings, those that may change in a run included, or of any; one
    that is finished, if there is one."""
    newest = None
    for database in sorted(place.glob("*/loop.db"), reverse=True):
        store = Store(database)
        run = store.run()
        store.close()
        if run is not None and (wanted is None or _read(run.config) == wanted):
            found = Found(database.parent, run.status in ("done", "stopped"), run.versions)
            if found.finished:
                return found
            newest = newest or found
    return newest


def _read(settings: Mapping[str, Any]) -> Config | None:
    """A run's settings: what has come to be a setting since is as it is when it is not said."""
    try:
        return config.validate(dict(settings))
    except UserError:  # what it says is no setting any more
        return None
