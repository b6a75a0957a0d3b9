"""The process of one variant, from inside: it is told, a line each, what to do, and answers.

passes.py starts it as `worker.py THREADS`. A line is a method's name and what to tell it; the
answer is what it returned, or why there is nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from passes import ROOT, Pass, Unavailable
from table import Figures


class Worker:
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

    def memory(self, _: None) -> tuple[float, float, str]:
        """MiB that passes needed beyond what was held before them, that, and who says so."""
        cuda = _cuda()
        if cuda:
            peak = cuda.max_memory_allocated() / 2**20
        else:
            peak = _status("VmHWM") if self.by == "VmHWM" else _max_rss()
        return peak - self.held, self.held, self.by

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


def main(threads: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a variant prints shall not be taken for an answer
    worker = Worker(threads)
    for line in sys.stdin:
        name, told = json.loads(line)
        try:
            answer = {"value": getattr(worker, name)(told)}
        except Unavailable as error:
            answer = {"unavailable": str(error)}
        except Exception:  # noqa: BLE001  (raised again by whoever asked)
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
