"""Processes that train together: each holds the whole model and does its share of every step.

A step's micro-batches are dealt out to the processes in turn. What each adds to the gradient is
summed before the optimizer steps, so all take the same step, and it is the step of one process that
does all micro-batches: only the order of a sum is another. Every process believes that it trains
alone; what has to be agreed on goes through its Team.

The process that was asked to train leads. It starts the others on this machine, one for each
further GPU or on the CPU, and ends them.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from roles.processes import python_path
from store.errors import UserError

Found = TypeVar("Found")
BUCKET_BYTES = 1 << 26
WAIT = timedelta(hours=2)
"""How long one waits for another: saving a large model takes its time."""
LEAVE_S = 30.0
SHOWN = 400
_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


class Team:
    """One process's place among those that train together."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written."""
        return self.rank == 0

    def owns(self, place: int) -> bool:
        """Whether the piece of work at this place is this process's."""
        return place % self.size == self.rank

    def gathered(self, own: Found) -> list[Found]:
        """What each has, in the order of the processes. To be called by all of them."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own)
        return found

    def told(self, own: Found) -> Found:
        """What the one that leads says. To be called by all of them."""
        return self.gathered(own)[0]

    def add_gradients(self, parameters: Iterator[Any]) -> None:
        """Give every process the sum of all processes' gradients."""
        if self.size == 1:
            return
        trained = [each for each in parameters if each.requires_grad]
        has = [each.grad is not None for each in trained]
        anywhere = [any(each) for each in zip(*self.gathered(has), strict=True)]
        there = [each for each, is_there in zip(trained, anywhere, strict=True) if is_there]
        for each in there:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
        for bucket in _buckets([each.grad for each in there]):
            flat = torch.cat([each.reshape(-1) for each in bucket])
            dist.all_reduce(flat)
            first = 0
            for each in bucket:
                each.copy_(flat[first : first + each.numel()].view_as(each))
                first += each.numel()


def dealt(parts: Sequence[Sequence[Found]]) -> list[Found]:
    """What each process has of its share of some work, in the order of the whole."""
    missing: Any = object()
    rounds = zip_longest(*parts, fillvalue=missing)
    return [each for one in rounds for each in one if each is not missing]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    held = 0
    for each in tensors:
        size = each.numel() * each.element_size()
        if bucket and (held + size > BUCKET_BYTES or each.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(each)
        held += size
    if bucket:
        yield bucket


_member: Team | None = None
"""The place of a process that another one started."""


@contextmanager
def together(size: int, device: str, trainer: Any, *arguments: Any) -> Iterator[Team]:
    """The team that trains: of this process, and of those that it starts to call `trainer.train`
    with the same arguments.

    Raises ChildProcessError when one of them has ended before its time.
    """
    if _member is not None or size == 1:
        yield _member or Team()
        return
    gpus = _gpus(size) if device == "cuda" else None
    if device == "mps":
        raise UserError(f"processes is {size}, and the GPU of a Mac is for one; leave it out")
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="ratchet-team-") as folder:
        task = Path(folder) / "task"
        task.write_bytes(pickle.dumps((size, device, trainer, arguments)))
        others: list[_Other] = []
        try:
            for rank in range(1, size):
                env = {"OMP_NUM_THREADS": str(max(1, threads // size))}
                env |= {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus[rank]}
                others.append(_Other(task, rank, env))
            torch.set_num_threads(max(1, threads // size))
            for other in others:
                other.arrive()
            _join(Path(folder), 0, size, device)
            if gpus is not None:
                threading.Thread(target=_abort_without, args=(others,), daemon=True).start()
            yield Team(0, size)
            for other in others:
                other.wait()
        except (RuntimeError, dist.DistError) as error:
            gone = next((said for other in others if (said := other.gone())), None)
            if gone is None:
                raise
            raise ChildProcessError(gone) from error
        finally:
            torch.set_num_threads(threads)
            if dist.is_initialized():
                dist.destroy_process_group()
            for other in others:
                other.end()


def _gpus(size: int) -> list[str]:
    """What each process sees of the GPUs that this one sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = torch.cuda.device_count()
    if there < size:
        raise UserError(
            f"processes is {size}, one for each GPU, and {there} can be seen; lower it, or give "
            "the stage more devices"
        )
    return named.split(",") if named else [str(number) for number in range(there)]


def _join(folder: Path, rank: int, size: int, device: str) -> None:
    # Through files, and past the network: nobody else is to be reached or to reach us.
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = _LOOPBACK
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=dist.FileStore(str(folder / "meeting"), size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=WAIT,
    )


def _arrived(folder: Path, rank: int) -> Path:
    """A file that says that a process is about to join."""
    return folder / f"arrived-{rank}"


def _abort_without(others: Sequence[_Other]) -> None:
    """Break off what waits for one that was lost, which NCCL would not notice."""
    while dist.is_initialized():
        if any(other.lost() for other in others):
            dist.group.WORLD.abort()  # type: ignore[union-attr]
            return
        time.sleep(1.0)


class _Other:
    """A process that was started to train along."""

    def __init__(self, task: Path, rank: int, env: dict[str, str]) -> None:
        self._rank = rank
        self._log = task.with_name(f"log-{rank}")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "roles.trainers.team", str(task), str(rank)],
                env={**os.environ, **python_path(), **env},
                stdin=subprocess.PIPE,  # it ends when this process does
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def arrive(self) -> None:
        """Wait until it is about to join. Who waits for one that has ended waits for long."""
        while not _arrived(self._log.parent, self._rank).exists():
            if self._process.poll() is not None:
                raise RuntimeError(f"process {self._rank} ended before it joined")
            time.sleep(0.05)

    def gone(self) -> str | None:
        """How it ended, if it did so before its time."""
        try:
            code = self._process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            return None
        if code == 0:
            return None
        said = " ".join(self._log.read_text(errors="replace").split())[-SHOWN:]
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"process {self._rank} of those that train together {how}: {said}"

    def lost(self) -> bool:
        return self._process.poll() not in (None, 0)

    def wait(self) -> None:
        code = self._process.wait()
        if code:
            raise RuntimeError(f"process {self._rank} ended with code {code}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def main(task: Path, rank: int) -> None:
    """Train along with the process that wrote the task."""
    # `-m` runs this file under another name than the trainers import it by.
    from roles.trainers import team

    threading.Thread(target=_end_with_leader, daemon=True).start()
    size, device, trainer, arguments = pickle.loads(task.read_bytes())
    _arrived(task.parent, rank).touch()
    _join(task.parent, rank, size, device)
    team._member = Team(rank, size)
    with suppress(KeyboardInterrupt):  # the run was asked to stop, and the leader has saved
        trainer.train(*arguments)
    dist.destroy_process_group()


def _end_with_leader() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
