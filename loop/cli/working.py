"""Commands that do something with what a run has made."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from loop.cli.answering import WAITING, answer, opened, say
from loop.cli.options import RUNS, Checkpoint, Json, Model, RunArgument, Runs, Sets, Track
from store.errors import UserError

if TYPE_CHECKING:
    from loop.review import Person


def review(
    given: RunArgument = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Write what waits as a table.", show_default=False),
    ] = None,
    taken: Annotated[
        Path | None,
        typer.Option(
            "--import", metavar="FILE.csv", help="Take its scores, all or none.", show_default=False
        ),
    ] = None,
    runs: Runs = RUNS,
) -> None:
    """Judge the answers that wait for a person. Exit code 5 while some still do."""
    from loop import review as reviewing
    from loop import run
    from loop.progress import Progress

    if export is not None and taken is not None:
        raise UserError("--export writes a table and --import takes one; choose one of them")
    root, progress = run.find_run(given, runs), Progress(Console(stderr=True))
    if export is not None:
        say(reviewing.export(root, export, progress))
    elif taken is not None:
        say(reviewing.take(root, taken, progress))
    elif reviewing.review(root, _person(), progress):
        raise typer.Exit(WAITING)


def _person() -> Person:
    """Whoever types, or the file that stands in for them."""
    from loop.review import Person

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return Person(read=input, write=print, again=sys.stdin.isatty())


def rejudge(
    words: Annotated[
        list[str], typer.Argument(metavar="[RUN] ROUND", help="A round that is over.")
    ],
    judge: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="As in judge.use.", show_default=False),
    ] = None,
    judge_config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TOML with a table [judge].", show_default=False),
    ] = None,
    sets: Sets = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="WHOSE", help="As in judge.model.", show_default=False),
    ] = None,
    track: Track = None,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Score a past round's answers with another judge, beside its own. Generates nothing."""
    from loop import rejudge as rejudging
    from loop import run
    from loop.progress import Progress

    given, number, more = rejudging.said(words)
    if more:
        raise UserError(f"rejudge takes [RUN] ROUND, found {' '.join(words)!r}")
    wish = rejudging.Wish(number, judge, judge_config, sets or (), model, track)
    root, progress = run.find_run(given, runs), Progress(Console(stderr=True))
    answer(rejudging.rejudge(root, wish, _person(), progress), rejudging.view, as_json)


def sample(
    first: Annotated[
        str,
        typer.Argument(metavar="RUN|PROMPT", help="A run; alone, the prompt for the newest."),
    ],
    second: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="- is stdin.", show_default=False)
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Answers of each checkpoint.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=10, help="0 is greedy.", show_default=False)
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, show_default=False)] = None,
    checkpoint: Checkpoint = "best",
    model: Model = None,
    seed: Annotated[int, typer.Option(min=0, help="Another gives other answers.")] = 0,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Ask the best checkpoint, beside what the run began from."""
    from loop import sample as sampling

    given, text = sampling.said(first, second, runs)
    wish = sampling.Wish(text, checkpoint, model, n, temperature, max_tokens, seed)
    with opened(given, runs) as store:
        answer(sampling.sample(store, wish), sampling.view, as_json)


def export(
    first: Annotated[
        Path, typer.Argument(metavar="RUN|INTO", help="A run; alone, the folder for the newest.")
    ],
    second: Annotated[
        Path | None, typer.Argument(metavar="INTO", help="A new folder.", show_default=False)
    ] = None,
    checkpoint: Checkpoint = "best",
    model: Model = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is there.")] = False,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Copy a checkpoint into a folder that plain transformers loads."""
    from loop import export as exporting

    given, into = exporting.said(first, second, runs)
    wish = exporting.Wish(into, checkpoint, model, force)
    with opened(given, runs) as store:
        answer(exporting.export(store, wish), exporting.view, as_json)
