"""Commands that tell what a run, two runs or a recipe are."""

from __future__ import annotations

from typing import Annotated

import typer

from loop.cli.answering import FAILED, answer, opened, say
from loop.cli.options import RUNS, Json, RunArgument, Runs, Track
from store.errors import UserError


def status(given: RunArgument = None, runs: Runs = RUNS, as_json: Json = False) -> None:
    """Say how a run stands."""
    from loop import attempt, lease, report, views

    with opened(given, runs) as store:
        found = report.status(store, lease.is_driven(store))
        answer(found | {"next": attempt.next_step(found)}, views.status, as_json)


def rounds(given: RunArgument = None, runs: Runs = RUNS, as_json: Json = False) -> None:
    """One row a round: what was made, how good it is, what was decided, where time went."""
    from loop import report, views

    with opened(given, runs) as store:
        answer(report.rounds(store), views.rounds, as_json)


def show(
    round: Annotated[int, typer.Argument(metavar="ROUND", help="Its number; 0 is the warm-up.")],
    given: RunArgument = None,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """One round in depth, with a few of its examples."""
    from loop import report, views

    with opened(given, runs) as store:
        answer(report.show(store, round), views.show, as_json)


def why(
    example: Annotated[int, typer.Argument(metavar="EXAMPLE", help="A pair or demonstration.")],
    given: RunArgument = None,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Say why an example is what it is: prompt, answers, verdicts, rule, checkpoints."""
    from loop import lineage

    with opened(given, runs) as store:
        answer(lineage.why(store, example), lineage.view, as_json)


def diff(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[RUN] ROUND [JUDGE_A] [JUDGE_B]",
            help="Judges as the store calls them, or how they begin.",
        ),
    ],
    track: Track = None,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Show which examples of a round would change with another judge's scores."""
    from loop import diff as comparing
    from loop import rejudge as rejudging

    given, number, named = rejudging.said(words)
    if len(named) > 2:
        raise UserError(f"diff takes [RUN] ROUND and two judges, found {' '.join(words)!r}")
    with opened(given, runs) as store:
        answer(comparing.diff(store, number, named, track), comparing.view, as_json)


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A run, a folder of runs or a recipe.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Set two runs, or recipes over their seeds, side by side: cost, quality, who is better."""
    from loop import compare as comparing

    answer(comparing.compare(a, b, runs), comparing.view, as_json)


def verify(given: RunArgument = None, runs: Runs = RUNS, as_json: Json = False) -> None:
    """Check every key, count, digest and split of a run. Exit code 4 if one is wrong."""
    from loop import verify as verification
    from loop import views

    with opened(given, runs) as store:
        found = verification.verify(store)
        answer(found, views.verify, as_json)
    raise typer.Exit(0 if found["ok"] else FAILED)


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Tell of this one.", show_default=False)
    ] = None,
    toml: Annotated[bool, typer.Option("--toml", help="Print its file.")] = False,
    as_json: Json = False,
) -> None:
    """List the published loops that there are, or say what one is and what came of its claim."""
    from loop import catalogue, recipe_book, views

    if name is None:
        answer(catalogue.recipes(), views.recipes, as_json)
    elif toml:
        say(catalogue.recipe(name).rstrip())
    else:
        answer(recipe_book.told(name), recipe_book.view, as_json)
