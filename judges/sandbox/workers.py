"""Confined children that are asked again and again, and killed when a question takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import time
import weakref
from collections.abc import Mapping
from typing import Any

from judges.sandbox.children import Child, Limits

_READY_WITHIN_S = 120.0
_QUESTIONS = 1000
"""After how many a worker is replaced: what libraries remember of them fills its memory."""


class WorkerError(Exception):
    """A worker could not be started, or ended by itself."""


class Worker:
    """One child. Raises WorkerError where it cannot be started."""

    def __init__(self, role: str, limits: Limits) -> None:
        self.asked = 0
        given, self._to_child = os.pipe()
        try:
            self._child = Child(role, {}, limits, stdin=given, packages=True, streams=False)
        except OSError as error:
            os.close(self._to_child)
            raise WorkerError(str(error)) from error
        finally:
            os.close(given)
        self.pid = self._child.pid
        try:
            if "lacks" in (first := self._heard(_READY_WITHIN_S) or {}):
                raise WorkerError(first["lacks"])
            if self._heard(_READY_WITHIN_S) is None:
                raise WorkerError(f"it was not ready within {_READY_WITHIN_S:g} s")
        except WorkerError:
            self.close()
            raise

    def ask(self, question: Mapping[str, Any], time_s: float) -> dict[str, Any] | None:
        """Its answer, or None after this many seconds; it is of no more use then."""
        self.asked += 1
        line = json.dumps({**question, "time_s": time_s}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):
            os.write(self._to_child, line)
        return self._heard(time_s)

    def _heard(self, within_s: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + within_s
        said = self._child.report
        while b"\n" not in said:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            if select.select([self._child.report_at], [], [], left)[0] and not self._child.hear(
                self._child.report_at
            ):
                break
        line, _, rest = bytes(said).partition(b"\n")
        said[:] = rest
        if not line:
            raise WorkerError("the process that reads expressions ended")
        return dict(json.loads(line))

    def close(self) -> None:
        self._child.close()
        os.close(self._to_child)


class Workers:
    """As many workers as are asked at once, each started when it is needed.

    They are killed by `close`, and at the latest when this object or the interpreter is gone.
    """

    def __init__(self, role: str, limits: Limits) -> None:
        self._role, self._limits = role, limits
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        weakref.finalize(self, _close_all, self._idle)

    def ask(self, question: Mapping[str, Any], time_s: float) -> dict[str, Any] | None:
        """A worker's answer; None when it took more than this many seconds and was killed.

        Raises WorkerError where there is no worker to be had, or it ended by itself.
        """
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = Worker(self._role, self._limits)
        usable = False
        try:
            answer = worker.ask(question, time_s)
            usable = answer is not None and worker.asked < _QUESTIONS
            return answer
        finally:
            if usable:
                self._idle.put(worker)
            else:
                worker.close()

    def pids(self) -> list[int]:
        """The process ids of those that wait to be asked."""
        waiting = []
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.append(self._idle.get_nowait())
        for worker in waiting:
            self._idle.put(worker)
        return [worker.pid for worker in waiting]

    def close(self) -> None:
        _close_all(self._idle)


def _close_all(idle: queue.SimpleQueue[Worker]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            idle.get_nowait().close()
