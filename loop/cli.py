"""The commands. Each reads its arguments, asks another module and prints the answer.

Only what every command needs is imported at the top, because `loop --help` must be quick.
Exit codes: 0 done, 2 the user's mistake, 3 stopped by a rule, 4 a stage failed or a check found
something wrong, 5 waiting for a person, 130 interrupted; 1 is a bug, ours or, of `judges test`, of
the judge.
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

from store.errors import UserError, Waiting

if TYPE_CHECKING:
    from loop.review import Person
    from store.database import Store

UNSOUND, USER_ERROR, FAILED, WAITING, INTERRUPTED = 1, 2, 4, 5, 130


class Commands(TyperGroup):
    """What every command has in common: how it ends when it cannot go on."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            print(f"loop: {error}", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from None
        except Waiting as error:
            print(f"loop: {error}", file=sys.stderr)
            raise typer.Exit(WAITING) from None
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
    str | None,
    typer.Option(metavar="NAME", help="A published loop, see `loop recipes`; or a file of one."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting, as in judge.votes=3."),
]
Gpu = Annotated[
    float | None,
    typer.Option(
        metavar="GIB", min=1, help="Plan for one GPU with so much memory.", show_default=False
    ),
]
Checkpoint = Annotated[
    str, typer.Option(metavar="WHICH", help="best, base, given or the number of a round.")
]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="Of several; left out, the first.")]
Track = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of several; left out, all.", show_default=False)
]
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
        with _opened(rates, runs) as store:
            measured = run.stored_config(store.root)
            return _answer(scale.scale(store, measured, cluster), scale.view, as_json)
    resolved = read(config, recipe, sets or ())
    run.check_store(resolved)
    roles = run.load_roles(resolved, weights=False)
    _answer(planning.plan(resolved, roles, gpu, prompt_tokens), planning.view, as_json)


@app.command()
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
    _answer(found, examining.view, as_json)
    raise typer.Exit(0 if found["ok"] else USER_ERROR)


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


@app.command("fork")
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
    _say(f"made {made}; next: loop start {shlex.quote(str(made))}")


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
        found = report.status(store, lease.is_driven(store))
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
        _say(reviewing.export(root, export, progress))
    elif taken is not None:
        _say(reviewing.take(root, taken, progress))
    elif reviewing.review(root, _person(), progress):
        raise typer.Exit(WAITING)


def _person() -> Person:
    """Whoever types, or the file that stands in for them."""
    from loop.review import Person

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return Person(read=input, write=print, again=sys.stdin.isatty())


@app.command()
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
    _answer(rejudging.rejudge(root, wish, _person(), progress), rejudging.view, as_json)


@app.command()
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
    with _opened(given, runs) as store:
        _answer(comparing.diff(store, number, named, track), comparing.view, as_json)


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
    name: Annotated[
        str | None, typer.Argument(help="Tell of this one.", show_default=False)
    ] = None,
    toml: Annotated[bool, typer.Option("--toml", help="Print its file.")] = False,
    as_json: Json = False,
) -> None:
    """List the published loops that there are, or say what one is and what came of its claim."""
    from loop import catalogue, recipe_book, views

    if name is None:
        _answer(catalogue.recipes(), views.recipes, as_json)
    elif toml:
        _say(catalogue.recipe(name).rstrip())
    else:
        _answer(recipe_book.told(name), recipe_book.view, as_json)


@judges.command("new")
def new_judge(
    name: Annotated[str, typer.Argument(help="A module's, as in kindness.")],
    kind: Annotated[str, typer.Option(help="pointwise, pairwise or model.")] = "pointwise",
) -> None:
    """Write a judge of your own to begin from, and its test, into this folder."""
    from loop import kit

    files = kit.new(name, kind, Path())
    _say(f"wrote {', '.join(file.name for file in files)}; next:")
    for step in kit.next_steps(name, kind):
        _say(f"  {step}")


@judges.command("test")
def try_judge(
    judge: Annotated[str, typer.Argument(metavar="SPEC", help="As in judge.use.")],
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Try a judge on what every judge has to keep to. Exit code 1 if it does not."""
    from loop import kit

    found = kit.test(kit.Wish(judge, sets or ()))
    _answer(found, kit.view_of_test, as_json)
    raise typer.Exit(0 if found["ok"] else UNSOUND)


@judges.command("show")
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
        _answer(kit.show(wish), kit.view_of_show, as_json)
        return
    with _opened(run, runs) as store:
        _answer(kit.show(wish, store, candidate), kit.view_of_show, as_json)


@judges.command("list")
def list_judges(as_json: Json = False) -> None:
    """List the judges that installed packages offer, with their options."""
    from loop import catalogue, views

    _answer(catalogue.judges(), views.judges, as_json)


@judges.command("train")
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
    with _opened(given, runs) as store:
        _answer(training.train(store, wish, Console(stderr=True)), training.view, as_json)


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
