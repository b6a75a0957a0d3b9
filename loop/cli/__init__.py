"""The commands. Each reads its arguments, asks another module and prints the answer.

Only what every command needs is imported at the top, because `loop --help` must be quick.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping

import typer

from loop.cli import asking, judging, starting, working
from loop.cli.answering import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Improve a language model in rounds: generate, judge, filter, train, gate.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
judges = typer.Typer(no_args_is_help=True, help="What answers can be judged by.")
app.add_typer(judges, name="judges")

COMMANDS: Mapping[str, Callable[..., None]] = {
    "init": starting.init,
    "plan": starting.plan,
    "doctor": starting.doctor,
    "start": starting.start,
    "fork": starting.fork_run,
    "stop": starting.stop,
    "status": asking.status,
    "rounds": asking.rounds,
    "show": asking.show,
    "why": asking.why,
    "review": working.review,
    "rejudge": working.rejudge,
    "diff": asking.diff,
    "compare": asking.compare,
    "sample": working.sample,
    "export": working.export,
    "verify": asking.verify,
    "recipes": asking.recipes,
}
JUDGES: Mapping[str, Callable[..., None]] = {
    "new": judging.new_judge,
    "test": judging.try_judge,
    "show": judging.show_judge,
    "list": judging.list_judges,
    "train": judging.train_judge,
}
for group, commands in ((app, COMMANDS), (judges, JUDGES)):
    for name, command in commands.items():
        group.command(name)(command)


def main() -> None:
    """The command `loop`, and `ratchet`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the screen cannot show
    app()
