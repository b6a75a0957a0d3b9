"""Commands that make a run, drive it and end it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loop.cli.answering import USER_ERROR, answer, opened, say, screen
from loop.cli.options import RUNS, File, Gpu, Json, Recipe, RunArgument, Runs, Sets
from store.errors import UserError


def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("loop.toml"),
) -> None:
    """Write a configuration to start from."""
    from loop import catalogue

    try:
        with path.open("x") as file:
            file.write(catalogue.beginning())
    except FileExistsError:
        raise UserError(f"{path} is already there; name another file") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    named = f"--config {shlex.quote(str(path))}"
    say(f"wrote {path}; next: loop plan {named}, then loop start {named}")


def plan(
    config: File = None,
    recipe: Recipe = None,
    sets: Sets = None,
    gpu: Gpu = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the longest prompt, for the memory it takes.", show_default=False
        ),
    ] = None,
    cluster: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="GPUS",
            help="Say instead what a million prompts with 8 answers each would take on so many.",
            show_default=False,
        ),
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option(help="The run that --cluster goes by; left out, the newest.", metavar="RUN"),
    ] = None,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Say what a run would do and cost. Checks everything, writes nothing."""
    from loop import names, run, scale
    from loop import plan as planning
    from loop.config import read

    names.check()
    if cluster is not None:
        with opened(rates, runs) as store:
            measured = run.stored_config(store.root)
            return answer(scale.scale(store, measured, cluster), scale.view, as_json)
    resolved = read(config, recipe, sets or ())
    run.check_store(resolved)
    roles = run.load_roles(resolved, weights=False)
    answer(planning.plan(resolved, roles, gpu, prompt_tokens), planning.view, as_json)


def doctor(
    given: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="One to go on with; left out, a new one."),
    ] = None,
    config: File = None,
    recipe: Recipe = None,
    sets: Sets = None,
    runs: Runs = RUNS,
    gpu: Gpu = None,
    as_json: Json = False,
) -> None:
    """Say what stands in the way of a run, and what to type to mend it. Exit code 2 if anything."""
    from loop import doctor as examining

    found = examining.examine(examining.Wish(given, config, recipe, sets or (), runs, gpu))
    answer(found, examining.view, as_json)
    raise typer.Exit(0 if found["ok"] else USER_ERROR)


def start(
    given: RunArgument = None,
    config: File = None,
    recipe: Recipe = None,
    sets: Sets = None,
    runs: Runs = RUNS,
    name: Annotated[str | None, typer.Option(metavar="N", help="Names a new run.")] = None,
) -> None:
    """Go on with the newest unfinished run of this configuration, or begin one."""
    from loop import attempt

    wish = attempt.Wish(
        run=given, file=config, recipe=recipe, sets=sets or (), runs=runs, name=name
    )
    raise typer.Exit(attempt.start(wish, screen(), Console(stderr=True)))


def fork_run(
    given: RunArgument = None,
    config: File = None,
    recipe: Recipe = None,
    sets: Sets = None,
    runs: Runs = RUNS,
    name: Annotated[str | None, typer.Option(metavar="N", help="Names the new run.")] = None,
) -> None:
    """Copy a run that ended a round, to go on from there under other settings."""
    from loop import config as configuration
    from loop import fork, names, run

    names.check()
    root = run.find_run(given, runs)
    if config is None and recipe is None:
        resolved = configuration.change(run.stored_config(root), sets or ())
    else:
        resolved = configuration.read(config, recipe, sets or ())
    run.load_roles(resolved)
    run.check_store(resolved)
    made = fork.fork(root, resolved, runs, name or "fork")
    say(f"made {made}; next: loop start {shlex.quote(str(made))}")


def stop(given: RunArgument = None, runs: Runs = RUNS) -> None:
    """Ask a run to stop after the batch it is at."""
    from loop import run

    root = run.find_run(given, runs)
    if run.request_stop(root):
        told = f"`loop status {shlex.quote(str(root))}` says when it has"
        say(f"{root} will stop after its batch; {told}")
    else:
        say(f"nobody drives {root}")
