"""The commands of `loop judges`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loop.cli.answering import UNSOUND, answer, opened, say
from loop.cli.options import RUNS, Json, Runs, Sets
from store.errors import UserError


def new_judge(
    name: Annotated[str, typer.Argument(help="A module's, as in kindness.")],
    kind: Annotated[str, typer.Option(help="pointwise, pairwise or model.")] = "pointwise",
) -> None:
    """Write a judge of your own to begin from, and its test, into this folder."""
    from loop import kit

    files = kit.new(name, kind, Path())
    say(f"wrote {', '.join(file.name for file in files)}; next:")
    for step in kit.next_steps(name, kind):
        say(f"  {step}")


def try_judge(
    judge: Annotated[str, typer.Argument(metavar="SPEC", help="As in judge.use.")],
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Try a judge on what every judge has to keep to. Exit code 1 if it does not."""
    from loop import kit

    found = kit.test(kit.Wish(judge, sets or ()))
    answer(found, kit.view_of_test, as_json)
    raise typer.Exit(0 if found["ok"] else UNSOUND)


def show_judge(
    judge: Annotated[str, typer.Argument(metavar="SPEC", help="As in judge.use.")],
    sets: Sets = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Left out, the newest.", show_default=False),
    ] = None,
    candidate: Annotated[
        int | None,
        typer.Option(metavar="ID", help="Of the run; left out, an example.", show_default=False),
    ] = None,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Print to the letter what a judge asks a model."""
    from loop import kit

    wish = kit.Wish(judge, sets or ())
    if candidate is None:
        if run is not None:
            raise UserError("--run shows a stored answer: add --candidate ID")
        answer(kit.show(wish), kit.view_of_show, as_json)
        return
    with opened(run, runs) as store:
        answer(kit.show(wish, store, candidate), kit.view_of_show, as_json)


def list_judges(as_json: Json = False) -> None:
    """List the judges that installed packages offer, with their options."""
    from loop import catalogue, views

    answer(catalogue.judges(), views.judges, as_json)


def train_judge(
    given: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    into: Annotated[Path, typer.Argument(metavar="INTO", help="A new folder.")],
    rounds: Annotated[
        list[int] | None,
        typer.Option("--round", metavar="N", min=0, help="Pairs of this round; left out, of all."),
    ] = None,
    accepted: Annotated[
        bool, typer.Option("--accepted", help="Only of rounds whose checkpoint was accepted.")
    ] = False,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="PATH", help="What to train; left out, the run's base."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="As in learning_rate=3e-4."),
    ] = None,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Train a reward model on a run's preference pairs, for the judge `reward_model`."""
    from loop import train_judge as training

    wish = training.Wish(into, rounds or (), accepted, start, sets or ())
    with opened(given, runs) as store:
        answer(training.train(store, wish, Console(stderr=True)), training.view, as_json)
