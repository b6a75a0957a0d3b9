"""How far a stage is: on a terminal a bar, elsewhere one line a stage, and the line in the log.

The graph tells it what is being worked on and nothing else about the screen.
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

UNITS = {
    "propose": "tracks",
    "generate": "prompts",
    "judge": "prompts",
    "filter": "tracks",
    "train": "steps",
    "evaluate": "passes",
    "gate": "models",
}
"""What is counted in each stage. Evaluation passes over its prompts to answer and to judge."""
WORTH_A_LINE_S = 1.0


class Progress:
    """Told by the graph what is being worked on; prints to `console` and writes to `log`."""

    def __init__(self, console: Console, log: Console | None = None) -> None:
        self.console = console
        self.log = log
        self._bars: Bars | None = None
        self._stage = self._unit = ""
        self._done = self._total = 0
        self._began = 0.0

    def begin(self, round: int, stage: str, total: int) -> None:
        """A stage begins; `total` 0: how much there is to do is not known yet."""
        self._stage, self._unit = f"round {round}  {stage:<8}", UNITS.get(stage, "")
        self._done, self._total = 0, total
        self._began = time.monotonic()
        if self.console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[counted]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=self.console,
                transient=True,
                refresh_per_second=4,
            )
            self._bars.add_task(self._stage, total=total or None, counted="")
            self._bars.start()

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` are done."""
        self._done, self._total = done, total
        if self._bars is not None:
            counted = f"{done:,}/{total:,} {self._unit}  {self._rate()}"
            task = self._bars.task_ids[0]
            self._bars.update(task, completed=done, total=total, counted=counted)

    def advance_by(self, more: int) -> None:
        self.advance(self._done + more, max(self._total, self._done + more))

    def end(self) -> None:
        """The stage is over. One that had nothing left to do is not worth a line."""
        self.abandon()
        seconds = time.monotonic() - self._began
        if self._done:
            counted = f"{self._done:>7,} {self._unit:<7}"
            self.say(f"{self._stage}  {counted}  {seconds:8.1f} s  {self._rate():>16}")
        elif seconds >= WORTH_A_LINE_S:
            self.say(f"{self._stage}  {'':15}  {seconds:8.1f} s")

    def _rate(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._began)
        return f"{self._done / seconds:,.1f} {self._unit}/s"

    def say(self, line: str) -> None:
        """A line for whoever watches, and for the log."""
        for console in (self.console, self.log):
            if console is not None:
                console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def abandon(self) -> None:
        """Take the bar off the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
