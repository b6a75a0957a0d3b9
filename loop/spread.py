"""Answers and judgements by other processes, on this machine or on others: tasks are sent out by
Ray, several at a time, and what comes of them is committed by the driver, in their order.

A worker has a seat as the driver has, and keeps nothing that is not in its task: if it dies,
another does its batch again. Trainings, and what proposers ask, stay with the driver.
"""

from __future__ import annotations

import os
import socket
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop import config as configuration
from loop import names
from loop.apart import smaller
from loop.child import maker
from loop.hands import Hands
from loop.outcome import Lost, heard, told
from loop.seat import CACHE, Seat
from loop.settings import Cluster, Config, Role
from loop.tasks import Answering, Judging, Task
from roles.processes import python_path
from roles.protocols import Policy
from store.errors import UserError
from store.records import Checkpoint

OBJECTS_BYTES = 1 << 28
"""Of what is on its way, in a cluster of our own."""
ANSWER_S = 10.0
"""For a cluster's address to answer."""
AHEAD = 2
"""Tasks that a worker has at a time: while it does one the next is on its way."""


class Worker:
    """A process that performs tasks, as Ray runs it."""

    def __init__(self, tables: dict[str, Any], root: str) -> None:
        self._root = Path(root)
        config = configuration.validate(tables)
        if config.cluster.address is not None and config.cache.path is None:
            # Several machines cannot write one SQLite file on a disk that they share.
            self._own = tempfile.TemporaryDirectory(prefix="ratchet-worker-")
            config = configuration.change(config, [f"cache.path={self._own.name}/{CACHE}"])
        self._said: list[str] = []
        self._seat = Seat(config, maker(config), self._root, self._said.append)
        warnings.showwarning = self._warned

    def perform(self, task: Task) -> tuple[tuple[Any, ...], list[str]]:
        """What came of it, as loop.outcome has it, and what was said meanwhile."""
        self._said.clear()
        try:
            if not self._root.is_dir():
                raise UserError(
                    f"{self._root} is not to be seen on {os.uname().nodename}; workers read "
                    "checkpoints, so the run's directory lies on a disk that all machines share"
                )
            outcome: tuple[Any, ...] = ("done", task.perform(self._seat))
        except BaseException as error:  # noqa: BLE001 - told to the driver, who raises it
            outcome = told(error)
        return outcome, list(self._said)

    def _warned(self, message: Any, category: Any, filename: str, *_: Any, **__: Any) -> None:
        if names.is_ours(filename):
            self._said.append(str(message))


@dataclass
class _Sent:
    task: Task
    worker: int
    answer: Any
    """Ray's word for what will come."""
    lost: int = 0
    """How often its worker ended."""


class Spread:
    """Hands that send answers and judgements out, and leave the rest to others.

    changed: is told the settings by which less had to be in memory at once.
    """

    def __init__(
        self,
        rest: Hands,
        config: Config,
        root: Path,
        say: Callable[[str], None],
        made: Callable[[Role], Any],
        changed: Callable[[Sequence[str]], object],
    ) -> None:
        self._rest, self._root, self._say = rest, root, say
        self._given = self._config = config
        self._made, self._changed = made, changed
        self._own = config.cluster
        self._workers: list[Any] = []
        self._stage = ""
        self._connected = False

    def begin(self, stage: str) -> None:
        self._stage = stage
        self._rest.begin(stage)

    def perform(self, task: Task) -> Any:
        if not isinstance(task, Answering | Judging):
            return self._rest.perform(task)
        (made,) = self.perform_each(iter([task]))
        return made

    def perform_each(self, tasks: Iterator[Task]) -> Iterator[Any]:
        sent: deque[_Sent] = deque()
        whole = False
        try:
            while True:
                while not whole and len(sent) < AHEAD * self._own.workers:
                    task = next(tasks, None)
                    if task is None:
                        whole = True
                    else:
                        sent.append(self._send(task, sent))
                if not sent:
                    return
                made = self._received(sent)
                sent.popleft()
                yield made
        finally:
            if sent:  # what is under way is not wanted any more
                self._end()

    def policy(self, checkpoint: Checkpoint) -> Policy:
        return self._rest.policy(checkpoint)

    def rest(self) -> None:
        self._end()
        self._rest.rest()

    def close(self) -> None:
        self._end()
        self._rest.close()
        if self._connected:
            _ray().shutdown()

    def _send(self, task: Task, sent: deque[_Sent]) -> _Sent:
        """To the worker with least to do."""
        if not self._workers:
            self._workers = [self._started() for _ in range(self._own.workers)]
        busy = [each.worker for each in sent]
        worker = min(range(len(self._workers)), key=busy.count)
        return _Sent(task, worker, self._workers[worker].perform.remote(task))

    def _received(self, sent: deque[_Sent]) -> Any:
        """What came of the first task. Where its worker has ended, all that it had is sent anew."""
        ray = _ray()
        first = sent[0]
        while True:
            try:
                outcome, said = ray.get(first.answer)
            except ray.exceptions.RayTaskError:
                raise  # a bug: what a task raises comes as its outcome
            except ray.exceptions.RayError as error:  # it, its machine or what it said is gone
                self._replace(first, sent, " ".join(str(error).split()))
                continue
            for line in said:
                self._say(line)
            try:
                return heard(*outcome, where=f"a worker of stage {self._stage!r}")
            except Lost as lost:
                self._go_on_with_less(sent, lost)

    def _go_on_with_less(self, sent: deque[_Sent], lost: Lost) -> None:
        """Send everything anew to workers that have less in memory at once. Raises UserError."""
        less = smaller(sent[0].task, self._config, self._given, self._made)
        why = f"a worker of stage {self._stage!r} {lost}"
        if not less:
            raise UserError(why) from lost
        self._say(f"{why}; its batches are done again with {', '.join(less)}")
        self._config = configuration.change(self._config, less)
        self._changed(less)
        self._end()
        self._workers = [self._started() for _ in range(self._own.workers)]
        for each in sent:
            each.answer = self._workers[each.worker].perform.remote(each.task)

    def _replace(self, lost: _Sent, sent: deque[_Sent], why: str) -> None:
        lost.lost += 1
        gone = f"a worker of stage {self._stage!r} has ended ({why[:300]})"
        if lost.lost > self._own.retries:
            raise UserError(gone)
        self._say(f"{gone}; its batches are done again")
        _ray().kill(self._workers[lost.worker])  # where only what it said is gone
        self._workers[lost.worker] = self._started()
        for each in sent:
            if each.worker == lost.worker:
                each.answer = self._workers[each.worker].perform.remote(each.task)

    def _started(self) -> Any:
        ray = _begun(self._own)
        self._connected = True
        made = ray.remote(Worker).options(num_cpus=self._own.cpus, num_gpus=self._own.gpus)
        return made.remote(self._config.model_dump(mode="json"), str(self._root.resolve()))

    def _end(self) -> None:
        """End the workers: others need the memory that they hold."""
        for worker in self._workers:
            _ray().kill(worker)
        self._workers = []


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError(
            "a cluster is asked through Ray, which is not installed; right is: "
            "pip install 'ratchet-loop[ray]'"
        ) from None
    return ray


def _begun(own: Cluster) -> Any:
    """Ray, connected. Raises UserError where there is no such cluster, or it is too small."""
    ray = _ray()
    if ray.is_initialized():
        return ray
    _check_there(own.address)
    given: dict[str, Any] = {"address": own.address}
    if own.address is None:
        given = {
            "address": "local",
            "num_cpus": max(1, round(own.workers * own.cpus)),
            "include_dashboard": False,
            "object_store_memory": OBJECTS_BYTES,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        with _environment():
            ray.init(**given, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"no Ray cluster at {own.address or 'this machine'}: {said}") from error
    there = ray.cluster_resources()
    for what, each in (("CPU", own.cpus), ("GPU", own.gpus)):
        if there.get(what, 0.0) < own.workers * each:
            ray.shutdown()
            raise UserError(
                f"the cluster has {there.get(what, 0.0):g} {what}s, and {own.workers} workers with "
                f"{each:g} each need {own.workers * each:g}; lower cluster.workers"
            )
    return ray


def _check_there(address: str | None) -> None:
    """Raises UserError where nobody answers: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise UserError(f"no Ray cluster at {address}: {error}") from None


@contextmanager
def _environment() -> Iterator[None]:
    """What processes of a cluster of our own inherit: where Ratchet is, and nothing is reported."""
    before = dict(os.environ)
    os.environ.update(python_path() | {"RAY_USAGE_STATS_ENABLED": "0"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
