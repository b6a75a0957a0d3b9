"""The commands. Each reads its arguments, asks another module and prints the answer.

Only what every command needs is imported at the top, because `loop --help` must be quick.
Exit codes: 0 done, 2 the user's mistake, 3 stopped by a rule, 4 a stage failed or a check found
something wrong, 130 interrupted; 1 is a bug.
"""

from __future__ import annotations

import io
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from store.errors import UserError

if TYPE_CHECKING:
    from store.database import Store

USER_ERROR, FAILED, INTERRUPTED = 2, 4, 130


class Commands(TyperGroup):
    """What every command has in common: how it ends when it cannot go on."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            print(f"loop: {error}", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            print("loop: interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


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

RunArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RUN]", help="A run directory; left out, the newest.", show_default=False
    ),
]
Runs = Annotated[Path, typer.Option(metavar="DIR", help="Where runs are.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, in a shape that stays.")]
File = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML, as `loop init` writes it.")
]
Recipe = Annotated[
    str | None, typer.Option(metavar="NAME", help="A published loop; see `loop recipes`.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting, as in judge.votes=3."),
]
Checkpoint = Annotated[
    str, typer.Option(metavar="WHICH", help="best, base, given or the number of a round.")
]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="Of several; left out, the first.")]
RUNS = Path("runs")


def main() -> None:
    """The command `loop`, and `ratchet`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the screen cannot show
    app()


@app.command()
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
    _say(f"wrote {path}; next: loop plan {named}, then loop start {named}")


@app.command()
def plan(
    config: File = None, recipe: Recipe = None, sets: Sets = None, as_json: Json = False
) -> None:
    """Say what a run would do and cost. Checks everything, writes nothing."""
    from loop import names, run
    from loop import plan as planning
    from loop.config import read

    names.check()
    resolved = read(config, recipe, sets or ())
    _answer(planning.plan(resolved, run.load_roles(resolved)), planning.view, as_json)


@app.command()
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
    raise typer.Exit(attempt.start(wish, _screen(), Console(stderr=True)))


@app.command()
def stop(given: RunArgument = None, runs: Runs = RUNS) -> None:
    """Ask a run to stop after the batch it is at."""
    from loop import run

    root = run.find_run(given, runs)
    if run.request_stop(root):
        told = f"`loop status {shlex.quote(str(root))}` says when it has"
        _say(f"{root} will stop after its batch; {told}")
    else:
        _say(f"nobody drives {root}")


@app.command()
def status(given: RunArgument = None, runs: Runs = RUNS, as_json: Json = False) -> None:
    """Say how a run stands."""
    from loop import attempt, lease, report, views

    with _opened(given, runs) as store:
        found = report.status(store, lease.is_alive(report.the_run(store)))
        _answer(found | {"next": attempt.next_step(found)}, views.status, as_json)


@app.command()
def rounds(given: RunArgument = None, runs: Runs = RUNS, as_json: Json = False) -> None:
    """One row a round: what was made, how good it is, what was decided, where time went."""
    from loop import report, views

    with _opened(given, runs) as store:
        _answer(report.rounds(store), views.rounds, as_json)


@app.command()
def show(
    round: Annotated[int, typer.Argument(metavar="ROUND", help="Its number; 0 is the warm-up.")],
    given: RunArgument = None,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """One round in depth, with a few of its examples."""
    from loop import report, views

    with _opened(given, runs) as store:
        _answer(report.show(store, round), views.show, as_json)


@app.command()
def why(
    example: Annotated[int, typer.Argument(metavar="EXAMPLE", help="A pair or demonstration.")],
    given: RunArgument = None,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Say why an example is what it is: prompt, answers, verdicts, rule, checkpoints."""
    from loop import lineage

    with _opened(given, runs) as store:
        _answer(lineage.why(store, example), lineage.view, as_json)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A run, a folder of runs or a recipe.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Set two runs, or recipes over their seeds, side by side: cost, quality, who is better."""
    from loop import compare as comparing

    _answer(comparing.compare(a, b, runs), comparing.view, as_json)


@app.command()
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
    with _opened(given, runs) as store:
        _answer(sampling.sample(store, wish), sampling.view, as_json)


@app.command()
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
    with _opened(given, runs) as store:
        _answer(exporting.export(store, wish), exporting.view, as_json)


@app.command()
def verify(given: RunArgument = None, runs: Runs = RUNS, as_json: Json = False) -> None:
    """Check every key, count, digest and split of a run. Exit code 4 if one is wrong."""
    from loop import verify as verification
    from loop import views

    with _opened(given, runs) as store:
        found = verification.verify(store)
        _answer(found, views.verify, as_json)
    raise typer.Exit(0 if found["ok"] else FAILED)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the published loops that there are, or print one as TOML."""
    from loop import catalogue, views

    if name is not None:
        _say(catalogue.recipe(name).rstrip())
    else:
        _answer(catalogue.recipes(), views.recipes, as_json)


@judges.command("list")
def list_judges(as_json: Json = False) -> None:
    """List the judges that installed packages offer, with their options."""
    from loop import catalogue, views

    _answer(catalogue.judges(), views.judges, as_json)


@contextmanager
def _opened(given: Path | None, runs: Path) -> Iterator[Store]:
    """The store of the run that is meant."""
    from loop import meant, run

    with meant.opened(run.find_run(given, runs)) as store:
        yield store


def _answer(found: Any, view: Callable[[Console, Any], None], as_json: bool) -> None:
    if as_json:
        print(json.dumps(_finite(found), indent=2, default=str, allow_nan=False))
    else:
        view(_screen(), found)


def _finite(found: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _say(text: str) -> None:
    print(text)


def _screen() -> Console:
    """Markup, emoji and highlighting are off: what is printed is what models and judges wrote."""
    return Console(markup=False, emoji=False, highlight=False)
