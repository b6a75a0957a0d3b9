"""Who performs a run's tasks: this process itself, or one that it starts for a stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from loop.seat import Seat
from loop.tasks import Task
from roles.protocols import Policy
from store.records import Checkpoint


class Hands(Protocol):
    def begin(self, stage: str) -> None:
        """What comes now is work of this stage."""
        ...

    def perform(self, task: Task) -> Any:
        """What comes of the task. Raises what it raises, wherever it is done."""
        ...

    def perform_each(self, tasks: Iterator[Task]) -> Iterator[Any]:
        """What comes of each task, in order. Some may be under way before they are asked for."""
        ...

    def policy(self, checkpoint: Checkpoint) -> Policy:
        """The checkpoint as a policy, for a role that stays with the driver."""
        ...

    def rest(self) -> None:
        """Give back what memory models hold."""
        ...

    def close(self) -> None:
        """Give back all there is, for good."""
        ...


class Inline:
    """The driver's own process."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat

    def begin(self, stage: str) -> None:
        pass

    def perform(self, task: Task) -> Any:
        return task.perform(self._seat)

    def perform_each(self, tasks: Iterator[Task]) -> Iterator[Any]:
        return map(self.perform, tasks)

    def policy(self, checkpoint: Checkpoint) -> Policy:
        return self._seat.policy(checkpoint)

    def rest(self) -> None:
        self._seat.close_policy()

    def close(self) -> None:
        self.rest()
