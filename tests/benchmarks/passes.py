"""Compare variants of one piece of work by time and memory: fairly, or not at all.

A variant is a function that sets the work up and returns a `Pass`:

    import passes

    def ours(vocabulary: int) -> passes.Pass:
        ...                                     # model and batch, from a fixed seed
        def run() -> None: ...                  # what is timed: one pass, its gradients included
        def agreement() -> passes.Figures:      # not timed: what the pass computed
            return {"loss": ..., "grad_norm": ...}      # or {"tokens": [5, 17, ...]}
        return passes.Pass(run, agreement)

    def tables(settings: passes.Settings) -> Iterator[passes.Table]:
        of = {"vocabulary": 32_000}
        yield passes.compare(
            "head, V 32k",
            {"ours": (ours, of), "TRL": (trl, of), "bare matmuls": (limit, of)},
            baseline="ours", agree={"loss": 1e-3, "grad_norm": 1e-2}, settings=settings,
            quoted={"TRL": "ours"},     # the README has it, beside this row of ours
        )

    if __name__ == "__main__":
        passes.main(tables)         # --passes 7 --threads 1 --json FILE

Each variant lives in a process of its own (worker.py) with its own thread count; after a warm-up,
pass by pass they take turns. Memory is the peak of the process during passes beyond what it held
before the first, which is told beside it: a second model is there from its set-up on. What may be
said of them is table.py's to decide: where figures disagree there is no ratio, and the command ends
with 1. `Pass(run)` without figures is a limit. A variant that cannot be had here raises
`Unavailable`; one that passes `limit_s` is stopped and shown so.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kept import keep
from table import Figures, Row, Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Pass:
    """What a variant's set-up leaves: one pass, and what it computed."""

    run: Callable[[], object]
    agreement: Callable[[], Figures] | None = None


class Unavailable(Exception):
    """The variant cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class Settings:
    passes: int = 5
    threads: int = 1
    limit_s: float | None = None
    """Seconds for each pass, the warm-up included; None: no limit."""
    enough_s: float | None = None
    """Once all passes together took so long, no further turn begins; None: all turns are taken."""


Setup = Callable[..., Pass] | tuple[Callable[..., Pass], Mapping[str, Any]]


def compare(
    title: str,
    variants: Mapping[str, Setup],
    *,
    baseline: str,
    agree: Mapping[str, float],
    settings: Settings | None = None,
    quoted: Mapping[str, str] | None = None,
    **changed: Any,
) -> Table:
    """Run the variants and hold each to the baseline.

    variants: name -> set-up function, or (function, options); the function stands at the top of
    its file, the options can be written as JSON.
    agree: figure -> relative tolerance.
    changed: fields of `settings`, where they differ.
    """
    settings = replace(settings or Settings(), **changed)
    rows = {name: Row(name) for name in variants}
    before = os.getloadavg()[0]
    with ExitStack() as opened:
        workers = {}
        for name, setup in variants.items():
            function, options = setup if isinstance(setup, tuple) else (setup, {})
            where = [str(Path(inspect.getfile(function)).resolve()), function.__qualname__]
            workers[name] = opened.enter_context(_Worker(rows[name], settings))
            workers[name].tell("set_up", [*where, options])  # all at once, which is not timed
        for name in variants:
            if workers[name].answer() is None:
                del workers[name]
        for name in list(workers):
            if workers[name].ask("warm_up") is None:  # with nothing beside
                del workers[name]
        _take_turns(workers, rows, settings)
        for name, worker in workers.items():
            row = rows[name]
            row.memory_mib, row.held_mib, row.memory_by = worker.ask("memory")
            rows[name].figures = worker.ask("figures")
    for row in rows.values():
        row.hold(rows[baseline], agree)
    load = (before, os.getloadavg()[0])
    told = dict(quoted or {})
    return Table(title, baseline, settings.threads, load, list(rows.values()), told)


def _take_turns(workers: dict[str, _Worker], rows: Mapping[str, Row], settings: Settings) -> None:
    together = 0.0
    for turn in range(settings.passes):
        if settings.enough_s is not None and together >= settings.enough_s:
            break
        # There and back, so that nobody always runs behind the same neighbour.
        for name in list(workers)[:: 1 if turn % 2 == 0 else -1]:
            took = workers[name].ask("run")
            if took is None:
                rows[name].seconds.clear()
                del workers[name]
            else:
                rows[name].seconds.append(took)
                together += took


def parser(passes: int = 5, limit_s: float | None = None) -> argparse.ArgumentParser:
    """The options that every benchmark of passes has, with these defaults."""
    made = argparse.ArgumentParser()
    made.add_argument("--passes", type=int, default=passes)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument(
        "--limit-s", type=float, default=limit_s, help="stop a variant whose pass takes longer"
    )
    made.add_argument("--json", type=Path, help="a file for the tables and every pass")
    return made


def show(tables: Iterable[Any], path: Path | None) -> None:
    """Print the tables and keep them; exit with 1 where figures disagree."""
    found = []
    for table in tables:
        found.append(table)
        print(table.markdown(), end="\n\n", flush=True)
        if path:  # after each table: a long command that is stopped leaves the others
            keep(path, found)
    sys.exit(0 if all(table.agreed for table in found) else 1)


def main(tables: Callable[[Settings], Iterable[Table]]) -> None:
    asked = parser().parse_args()
    show(tables(Settings(asked.passes, asked.threads, asked.limit_s)), asked.json)


class _Worker:
    """The process of one variant, seen from outside. Where it has no answer, its row says why."""

    def __init__(self, row: Row, settings: Settings) -> None:
        threads = str(settings.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if settings.threads > 1:  # spinning threads of a worker that waits would slow the others
            environment["OMP_WAIT_POLICY"] = "PASSIVE"
        self._row, self._limit_s = row, settings.limit_s
        self._told = ""
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), threads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def ask(self, name: str) -> Any:
        """What the worker's method returned; None where there will be no answer."""
        self.tell(name)
        return self.answer()

    def tell(self, name: str, told: Any = None) -> None:
        assert self._process.stdin is not None
        self._told = name
        self._process.stdin.write(json.dumps([name, told]).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        limit_s = self._limit_s if self._told in ("warm_up", "run") else None
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            self._process.kill()
            self._row.note = f"stopped after {self._limit_s:g} s"
            return None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self._row.variant}: its process ended with {self._process.wait()}"
            )
        answer = json.loads(line)
        if "unavailable" in answer:
            self._row.note = f"not to be had here: {answer['unavailable']}"
            return None
        if "error" in answer:
            raise RuntimeError(f"{self._row.variant}, {self._told}:\n{answer['error']}")
        return answer["value"]
