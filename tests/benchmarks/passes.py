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
        )

    if __name__ == "__main__":
        passes.main(tables)         # --passes 7 --threads 1 --json FILE

Each variant lives in a process of its own with its own thread count; after a warm-up, pass by pass
they take turns. A time ratio is the quotient of the shortest passes, a variant's over the
baseline's ("how many times what the baseline takes"), with the quotient of the medians and the
range over passes taken one after the other. Memory is the peak of the process during passes beyond
what it held before the first. A variant whose figures differ from the baseline's by more than the
relative tolerance (a list: in any entry, if the tolerance is 0) is given no ratio, and the command
ends with 1. `Pass(run)` without figures is a limit, not a peer: it is marked as such. A variant
that cannot be had here raises `Unavailable`; one that passes `limit_s` is stopped and shown so.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import inspect
import json
import math
import os
import resource
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Figures = dict[str, Any]
"""Name -> a number, or a list of numbers such as token ids."""


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


Setup = Callable[..., Pass] | tuple[Callable[..., Pass], Mapping[str, Any]]


@dataclass
class Row:
    """One variant. No seconds: it was unavailable or stopped, as `note` says."""

    variant: str
    seconds: list[float] = field(default_factory=list)
    memory_mib: float = math.nan
    memory_by: str = ""
    figures: Figures | None = None
    note: str = ""
    ratio: float | None = None
    ratio_of_medians: float | None = None
    ratio_range: tuple[float, float] | None = None
    memory_ratio: float | None = None
    disagrees: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    baseline: str
    threads: int
    load: tuple[float, float]
    """The machine's load over a minute, before and after."""
    rows: list[Row]

    @property
    def agreed(self) -> bool:
        return not any(row.disagrees for row in self.rows)

    @property
    def noisy(self) -> bool:
        return max(self.load) > self.threads + 0.5

    def markdown(self) -> str:
        before, after = self.load
        noise = ", NOISY: other work ran beside it" if self.noisy else ""
        lines = [
            f"**{self.title}** ({self.threads} thread{'s' * (self.threads > 1)}, "
            f"load {before:.1f} before, {after:.1f} after{noise})",
            "",
            f"| variant | time | time / {self.baseline} | medians; pairs | peak MiB | "
            f"memory / {self.baseline} | |",
            "|---|--:|--:|--:|--:|--:|---|",
        ]
        return "\n".join([*lines, *map(_line, self.rows)])


def compare(
    title: str,
    variants: Mapping[str, Setup],
    *,
    baseline: str,
    agree: Mapping[str, float],
    settings: Settings | None = None,
    **changed: Any,
) -> Table:
    """Run the variants and hold each to the baseline.

    variants: name -> set-up function, or (function, options); the function stands at the top of
    its file, the options can be written as JSON.
    agree: figure -> relative tolerance.
    changed: passes, threads or limit_s, where they differ from `settings`.
    """
    settings = replace(settings or Settings(), **changed)
    rows = {name: Row(name) for name in variants}
    before = os.getloadavg()[0]
    with ExitStack() as opened:
        workers = {}
        for name, setup in variants.items():
            worker = opened.enter_context(_Worker(settings))
            function, options = setup if isinstance(setup, tuple) else (setup, {})
            where = [str(Path(inspect.getfile(function)).resolve()), function.__qualname__]
            if worker.ask(rows[name], "set_up", [*where, options]) is not None:
                workers[name] = worker  # set up one after the other, warmed up with nothing beside
        for name in list(workers):
            if workers[name].ask(rows[name], "warm_up") is None:
                del workers[name]
        for turn in range(settings.passes):
            # There and back, so that nobody always runs behind the same neighbour.
            for name in list(workers)[:: 1 if turn % 2 == 0 else -1]:
                took = workers[name].ask(rows[name], "run")
                if took is None:
                    rows[name].seconds.clear()
                    del workers[name]
                else:
                    rows[name].seconds.append(took)
        for name, worker in workers.items():
            rows[name].memory_mib, rows[name].memory_by = worker.ask(rows[name], "memory")
            rows[name].figures = worker.ask(rows[name], "figures")
    for row in rows.values():
        hold(row, rows[baseline], agree)
    load = (before, os.getloadavg()[0])
    return Table(title, baseline, settings.threads, load, list(rows.values()))


def main(tables: Callable[[Settings], Iterable[Table]]) -> None:
    """Print the tables; exit with 1 where figures disagree."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-s", type=float, help="stop a variant whose pass takes longer")
    parser.add_argument("--json", type=Path, help="a file for the tables and every pass")
    asked = parser.parse_args()
    found = []
    for table in tables(Settings(asked.passes, asked.threads, asked.limit_s)):
        found.append(table)
        print(table.markdown(), end="\n\n", flush=True)
        if asked.json:  # after each table: a long command that is stopped leaves the others
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            written = [asdict(each) | {"noisy": each.noisy} for each in found]
            asked.json.write_text(json.dumps(written, indent=1))
    sys.exit(0 if all(table.agreed for table in found) else 1)


def hold(row: Row, baseline: Row, agree: Mapping[str, float]) -> None:
    """Fill in the row's ratios, if it did the same work as the baseline."""
    if not row.seconds or not baseline.seconds:
        return
    if row.figures is None:
        row.note = "a limit: no figures to agree in"
    elif baseline.figures is None:
        raise ValueError(f"the baseline {baseline.variant!r} has no figures to agree with")
    else:
        off = list(_differences(row.figures, baseline.figures, agree))
        row.disagrees, row.note = bool(off), "; ".join(off)
    if row.disagrees:
        return
    pairs = [a / b for a, b in zip(row.seconds, baseline.seconds, strict=True)]
    row.ratio = min(row.seconds) / min(baseline.seconds)
    row.ratio_of_medians = median(row.seconds) / median(baseline.seconds)
    row.ratio_range = (min(pairs), max(pairs))
    if baseline.memory_mib > 0:
        row.memory_ratio = row.memory_mib / baseline.memory_mib


def _differences(own: Figures, wanted: Figures, agree: Mapping[str, float]) -> Iterator[str]:
    for name, tolerance in agree.items():
        a, b = own[name], wanted[name]
        many, others = (a, b) if isinstance(a, list) else ([a], [b])
        if len(many) != len(others):
            yield f"DISAGREES: {len(many)} {name}, the baseline has {len(others)}"
        far = [
            (x, y)
            for x, y in zip(many, others, strict=False)
            if not abs(x - y) <= tolerance * max(abs(y), 1e-12)
        ]
        if far:
            x, y = far[0]
            of = f" at {len(far)} of {len(many)} places, first" if len(many) > 1 else ""
            yield f"DISAGREES: {name}{of} {x:.6g}, the baseline has {y:.6g}"


def _line(row: Row) -> str:
    cells = [_took(min(row.seconds)) if row.seconds else "-"]
    if row.ratio is None or row.ratio_of_medians is None or row.ratio_range is None:
        cells += ["-", "-"]
    else:
        low, high = row.ratio_range
        cells += [f"{row.ratio:.2f}×", f"{row.ratio_of_medians:.2f}; {low:.2f} to {high:.2f}"]
    cells.append("-" if math.isnan(row.memory_mib) else f"{row.memory_mib:.1f}")
    cells.append("-" if row.memory_ratio is None else f"{row.memory_ratio:.2f}×")
    by = "" if row.memory_by in ("", "VmHWM") else f"memory by {row.memory_by}"
    return f"| {row.variant} | {' | '.join(cells)} | {'; '.join(filter(None, [row.note, by]))} |"


def _took(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1000 * seconds:.2f} ms"


class _Worker:
    """The process of one variant, seen from outside."""

    def __init__(self, settings: Settings) -> None:
        threads = str(settings.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if settings.threads > 1:  # spinning threads of a worker that waits would slow the others
            environment["OMP_WAIT_POLICY"] = "PASSIVE"
        self._limit_s = settings.limit_s
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", threads],
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

    def ask(self, row: Row, name: str, told: Any = None) -> Any:
        """The worker's answer; None, with a note in the row, where there will be none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, told]).encode() + b"\n")
        self._process.stdin.flush()
        limit_s = self._limit_s if name in ("warm_up", "run") else None
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            self._process.kill()
            row.note = f"stopped after {self._limit_s:g} s"
            return None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{row.variant}: its process ended with {self._process.wait()}")
        answer = json.loads(line)
        if "unavailable" in answer:
            row.note = f"not to be had here: {answer['unavailable']}"
            return None
        if "error" in answer:
            raise RuntimeError(f"{row.variant}, {name}:\n{answer['error']}")
        return answer["value"]


class _Served:
    """The process of one variant, from inside."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.held, self.by = 0.0, "VmHWM"

    def set_up(self, told: tuple[str, str, dict[str, Any]]) -> bool:
        path, name, options = told
        # A benchmark's folder after the repository: a file there may be named as a package is.
        sys.path[:0] = [str(ROOT), str(Path(path).parent)]
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._limit_threads()
        self.passed: Pass = getattr(module, name)(**options)
        self._limit_threads()  # where it is the function that imports torch
        return True

    def _limit_threads(self) -> None:
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self.threads)

    def warm_up(self, _: None) -> float:
        """The first pass: from here on memory is watched."""
        cuda = _cuda()
        if cuda:
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
            self.held, self.by = cuda.memory_allocated() / 2**20, "torch.cuda"
            return self.run(None)
        # What set-up freed goes back to the system, or passes would find it there for nothing.
        if hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.held = _status("VmRSS")
        except OSError:
            self.held, self.by = _max_rss(), "ru_maxrss, set-up's peak included"
        return self.run(None)

    def run(self, _: None) -> float:
        began = time.perf_counter()
        self.passed.run()
        cuda = _cuda()
        if cuda:
            cuda.synchronize()
        return time.perf_counter() - began

    def memory(self, _: None) -> tuple[float, str]:
        cuda = _cuda()
        if cuda:
            peak = cuda.max_memory_allocated() / 2**20
        else:
            peak = _status("VmHWM") if self.by == "VmHWM" else _max_rss()
        return peak - self.held, self.by

    def figures(self, _: None) -> Figures | None:
        return None if self.passed.agreement is None else self.passed.agreement()


def _cuda() -> Any:
    """torch.cuda where the variant uses it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _status(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {name}")


def _max_rss() -> float:
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found / (2**20 if sys.platform == "darwin" else 2**10)


def _serve(threads: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a variant prints shall not be taken for an answer
    served = _Served(threads)
    # The variant's file imports this module by name, and shall find the classes made here.
    sys.modules["passes"] = sys.modules["__main__"]
    for line in sys.stdin:
        name, told = json.loads(line)
        try:
            answer = {"value": getattr(served, name)(told)}
        except Unavailable as error:
            answer = {"unavailable": str(error)}
        except Exception:  # noqa: BLE001  (raised again by whoever asked)
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[2]))
