"""Tasks in a process of their own, one for each stage: what crashes there does not end the run.

The process ends with its stage, so the memory it held really returns. It reads no store: what it
is to do it is sent, and what came of it is committed here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast, get_args

from loop import config as configuration
from loop.outcome import Lost, heard
from loop.settings import Config, Isolated, Role, Stage
from loop.tasks import PolicyCall, Task
from roles.processes import python_path
from roles.protocols import Policy
from store.errors import UserError
from store.records import ALONE, Checkpoint, Completion, Prompt, Sampling, TokenLogprobs

POLLED_S = 0.2
LEAVE_S = 10.0
"""What a child with nothing to do is given to close what it holds."""
SHOWN = 300
"""Characters of a log in an error."""


class Child:
    """One process and the connection to it."""

    def __init__(self, config: Config, root: Path, stage: str, own: Isolated) -> None:
        self._log = root / "logs" / f"{stage}.log"
        self._timeout_s = own.timeout_s
        self._log.parent.mkdir(exist_ok=True)
        ours, theirs = socket.socketpair()
        seen = {} if own.devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(own.devices)}
        with theirs, self._log.open("ab") as log:
            # In a session of its own: a Ctrl-C asks the run to stop after its batch.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "loop.child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                env=os.environ | python_path() | seen,
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._busy = False
        self._send("begin", (config.model_dump(mode="json"), str(root)))

    def _send(self, kind: str, content: Any) -> None:
        try:
            self._connection.send((kind, content))
        except OSError:
            raise self._ending() from None

    def perform(self, task: Task, say: Callable[[str], None]) -> Any:
        """What came of the task. Raises Lost, and what it raised there."""
        self._busy = True
        self._send("task", task)
        kind, *content = self._outcome(task, say)
        self._busy = False
        return heard(kind, *content, where=f"{self._log.stem}, {self._log}")

    def _outcome(self, task: Task, say: Callable[[str], None]) -> tuple[Any, ...]:
        """What the child says at the end of a task. Raises Lost where it says nothing."""
        last, asked = time.monotonic(), False
        while True:
            if self._connection.poll(POLLED_S):
                try:
                    kind, *content = self._connection.recv()
                except (EOFError, OSError):
                    raise self._ending() from None
                last = time.monotonic()
                match kind:
                    case "progress":
                        task.call.progress(*content)
                    case "say":
                        say(*content)
                    case "warn":
                        warnings.warn(str(content[0]), stacklevel=1)
                    case _:
                        return kind, *content
            elif self._process.poll() is not None and not self._connection.poll():
                raise self._ending()  # what it began may still hold the connection
            elif self._timeout_s is not None and time.monotonic() - last > self._timeout_s:
                raise Lost(f"said nothing for its timeout_s, {self._timeout_s:g} s")
            if not asked and task.call.stopping():
                asked = True
                self._send("stop", None)

    def _ending(self) -> Lost:
        """How the process ended."""
        code = self._process.wait()
        said = " ".join(self._log.read_text(errors="replace").split())[-SHOWN:]
        how = f"ended with exit status {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        # So a kernel without memory ends the process that has most of it.
        memory = None if code == -signal.SIGKILL else False
        log = f"its log, {self._log}, ends with: {said}" if said else f"{self._log} is empty"
        return Lost(f"{how}; {log}", memory=memory)

    def close(self) -> None:
        """End it: with leave if it has nothing to do, at once if it is busy."""
        with suppress(OSError, subprocess.TimeoutExpired):
            self._connection.send(("task", None))
            self._process.wait(timeout=0 if self._busy else LEAVE_S)
        self._process.kill()
        self._process.wait()
        self._connection.close()


class Apart:
    """Performs tasks in children, one at a time: that of the stage at hand.

    changed: is told the settings by which less had to be in memory at once.
    """

    def __init__(
        self,
        config: Config,
        made: Callable[[Role], Any],
        root: Path,
        say: Callable[[str], None],
        changed: Callable[[Sequence[str]], object],
    ) -> None:
        self._given = self._config = config
        self._made = made
        self._root = root
        self._say = say
        self._changed = changed
        self._stage = ""
        self._child: Child | None = None

    def begin(self, stage: str) -> None:
        if stage != self._stage:
            self.rest()
            self._stage = stage

    def perform(self, task: Task) -> Any:
        """Raises UserError when the task was lost as often as it may be."""
        own = self._config.stage.get(cast(Stage, self._stage), Isolated())
        for left in range(own.retries, -1, -1):
            try:
                if self._child is None:
                    self._child = Child(self._config, self._root, self._stage, own)
                return self._child.perform(task, self._say)
            except Lost as lost:
                self.rest()
                less = []
                if lost.memory is not False:
                    less = smaller(task, self._config, self._given, self._made)
                told = f"the process of stage {self._stage!r} {lost}"
                if not left or (lost.memory and not less):
                    raise UserError(told) from lost
                how = f" with {', '.join(less)}" if less else ""
                self._say(f"{told}; what it was doing is done again{how}")
                if less:
                    self._config = configuration.change(self._config, less)
                    self._changed(less)
        raise AssertionError("a task is done or lost")

    def perform_each(self, tasks: Iterator[Task]) -> Iterator[Any]:
        return map(self.perform, tasks)

    def policy(self, checkpoint: Checkpoint) -> Policy:
        return Away(self, checkpoint)

    def rest(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def close(self) -> None:
        self.rest()


@dataclass(frozen=True)
class Away:
    """A policy that is asked in the process of its stage."""

    hands: Apart
    checkpoint: Checkpoint

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        made: list[list[Completion]] = self._ask("sample", prompts, sampling=sampling, seeds=seeds)
        return made

    def logprobs(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        dropout_seed: int | None = None,
    ) -> list[TokenLogprobs]:
        made: list[TokenLogprobs] = self._ask(
            "logprobs", prompts, completions, dropout_seed=dropout_seed
        )
        return made

    def write(self, text: str) -> Completion:
        made: Completion = self._ask("write", text)
        return made

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        made: list[int] = self._ask("prompt_ids", prompt)
        return made

    def room(self, prompt: Prompt) -> int:
        made: int = self._ask("room", prompt)
        return made

    def decode(self, token_ids: Sequence[int]) -> str:
        made: str = self._ask("decode", token_ids)
        return made

    def close(self) -> None:
        """The process of the stage has it open, and closes it."""

    def _ask(self, method: str, *arguments: Any, **settings: Any) -> Any:
        asked = PolicyCall(self.checkpoint, method, arguments, settings, ALONE)
        return self.hands.perform(asked)


def smaller(task: Task, config: Config, given: Config, made: Callable[[Role], Any]) -> list[str]:
    """Settings by which a task has less in memory at once; none where it cannot be less.

    config: as it is by now. given: that of which the roles were made.
    """
    found = []
    for place in task.uses:
        role, options = made(given.role(place)), config.role(place).options
        if hasattr(role, "rows_at_once"):
            option, at_once, of = "micro_batch_size", role.rows_at_once, role.batch_size
        else:
            option, at_once, of = "batch_size", getattr(role, "batch_size", 1), None
        most = options.get(option, at_once) // 2
        fits = [n for n in range(most, 0, -1) if of is None or of % n == 0]
        found += [f"{place}.{option}={n}" for n in fits[:1]]
    return found


def isolates(config: Config, made: Callable[[Role], Any]) -> bool:
    """Whether stages have processes of their own."""
    if config.isolation != "auto":
        return config.isolation == "process"
    from roles.policy import devices

    parts = [part for model in config.models.values() for part in (model.engine, model.trainer)]
    named = [getattr(made(part), "device", None) for part in parts]
    # Of a part of the user's own, `device` may mean something else.
    known = [name for name in get_args(devices.Device) if name in named]
    return any(devices.find(name).type != "cpu" for name in known)
