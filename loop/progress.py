"""How far a stage is, on a terminal as a bar and elsewhere as one line a stage."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """Told by the graph what is being worked on; prints to the error stream."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: Bars | None = None
        self._stage = ""
        self._done = self._total = 0
        self._began = 0.0

    def begin(self, round: int, stage: str, total: int) -> None:
        """A stage begins; `total` 0: how much there is to do is not known yet."""
        self._stage, self._done, self._total = f"round {round}  {stage:<9}", 0, total
        self._began = time.monotonic()
        if self.console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bars.add_task(self._stage, total=total or None, rate="")
            self._bars.start()

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` are done."""
        self._done, self._total = done, total
        if self._bars is not None:
            rate = done / max(1e-9, time.monotonic() - self._began)
            task = self._bars.task_ids[0]
            self._bars.update(task, completed=done, total=total, rate=f"{rate:.1f}/s")

    def advance_by(self, more: int) -> None:
        self.advance(self._done + more, max(self._total, self._done + more))

    def end(self) -> None:
        """The stage is over. One that had nothing left to do is not worth a line."""
        self.abandon()
        seconds = time.monotonic() - self._began
        if self._done:
            rate = self._done / max(1e-9, seconds)
            self.console.print(
                f"{self._stage}  {self._done:>6,} done  {seconds:7.1f} s  {rate:8.1f}/s",
                highlight=False,
            )

    def abandon(self) -> None:
        """Take the bar off the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
