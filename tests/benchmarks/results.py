"""Put recipes to the test: `results.py [NAME ...]`, all of them when none is named.

For each seed a recipe runs, and beside it its control (the claimed ingredient off) and plain
iterative DPO, all three from the warm-up of the recipe. A warm-up is made once for all that have
it. What a run gave is read from its own store, so this can be stopped and begun again: finished
runs are not run anew, unfinished ones go on.

Writes RESULTS.md, results.json and a plot a recipe beside the recipes. With --seeds or --set it
writes nothing but what --out names: those are for tuning, on seeds from 100 up.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reported
import told
from trial_runs import CODE, WARM_UPS, Bench, Ended, Versions

from loop import claims, config, trials
from loop import run as running
from loop.gain import difference, in_common, over_runs
from loop.report import rounds, training_counts
from loop.settings import Config
from loop.sides import standings
from loop.trials import variants
from store.database import SAMPLED, Store
from store.errors import UserError
from store.records import Run

VARIANTS = ("recipe", "control", "plain")
Table = dict[str, Any]


def begin(
    bench: Bench, names: Sequence[str], seeds: Sequence[int], sets: Sequence[str]
) -> dict[str, dict[str, list[Future[Path]]]]:
    """Recipe -> variant -> its run a seed."""
    made = {name: variants(name, claims.read(name), sets) for name in names}
    warm = {(name, seed): bench.warm_up(made[name][0], seed) for name in names for seed in seeds}
    begun: dict[str, dict[str, list[Future[Path]]]] = {}
    for name in names:
        begun[name] = {each: [] for each in VARIANTS}
        for seed in seeds:
            for each in made[name]:
                place = bench.runs / folder_of(name) / each.name / f"seed-{seed}"
                begun[name][each.name].append(bench.start(each, seed, place, warm[name, seed]))
    return begun


def folder_of(name: str) -> str:
    """Where a recipe's runs are, below those of all."""
    return told.plain_name(config.recipe_key(name))


# What the stores say


def row(
    name: str,
    runs: Mapping[str, Sequence[Path]],
    seeds: Sequence[int],
    sets: Sequence[str] = (),
) -> Table:
    """All that the table and the plot tell of a recipe."""
    trial = claims.read(name)
    read = {each: [Reading.of(root, trial) for root in roots] for each, roots in runs.items()}
    by: dict[str, list[str]] = {}
    for each, found in read.items():
        # Another variant may have other parts.
        differ = len({reading.code["parts"] for reading in found}) > 1
        for seed, reading in zip(seeds, found, strict=True):
            code = reading.code["code"] + (f", parts {reading.code['parts']}" if differ else "")
            by.setdefault(code, []).append(f"{each} {seed}")
    return {
        "recipe": config.recipe_key(name),
        "arena": trial.arena or "default",
        "shown": trial.shown,
        "seeds": list(seeds),
        "sets": list(sets),
        "code": by,
        "claims": [claimed(claim, place, read) for place, claim in enumerate(trial.claim)],
        "variants": {each: _variant(found) for each, found in read.items()},
    }


@dataclass(frozen=True)
class Reading:
    """What is read of one run."""

    course: list[claims.Values]
    """After each round: test prompt -> the metric that is shown."""
    begins: list[claims.Values]
    """Of each claim, the number of the checkpoint that the rounds began from."""
    ends: list[claims.Values]
    """The same of the incumbent when the run is over."""
    tokens: int
    """Generated in its rounds to learn from."""
    seconds: float
    """Of its rounds' stages, so that what was between an end and a going on is not counted."""
    code: Mapping[str, str] = field(default_factory=dict)
    """Of CODE, digests of what it began with and of what it went on with, in words."""

    @classmethod
    def of(cls, root: Path, trial: claims.Trial) -> Reading:
        store = Store(root / "loop.db")
        run = store.run()
        assert run is not None
        made = Config.model_validate(run.config)
        model, judge = made.track["main"].model, made.evaluate.judge.label
        beginning, incumbent = store.beginning(model), store.incumbent(model)
        every = rounds(store)["rounds"]
        over = [each for each in every if each["status"] != "running"]
        after = standings(store, made, model, beginning.id or 0, over)
        found = cls(
            course=[claims.values(store, each.checkpoint, judge, trial.shown) for each in after],
            begins=[each.values(store, beginning, judge) for each in trial.claim],
            ends=[each.values(store, incumbent, judge) for each in trial.claim],
            tokens=learned_from(store),
            seconds=sum(sum(each["seconds"].values()) for each in every if each["number"] > 0),
            code=made_by(run),
        )
        store.close()
        return found


def made_by(run: Run) -> dict[str, str]:
    told = {}
    for key in CODE:
        before = [each["from"] for each in run.changes if each["key"] == f"versions.{key}"]
        now = run.versions.get(key)
        told[key] = " then ".join(each[:8] for each in (*before, now) if each)
    return told


def learned_from(store: Store) -> int:
    """Tokens of answers, of judgements on them and of proposed prompts, in the rounds: not those of
    round 0, nor those by which models and judges are measured."""
    counted = [training_counts(each) for each in store.rounds() if each.number > 0]
    return sum(counts[kind] for counts in counted for kind in SAMPLED)


def claimed(claim: claims.Claim, place: int, read: Mapping[str, Sequence[Reading]]) -> Table:
    ours = [each.ends[place] for each in read[claim.of]]
    match claim.against:
        case "zero":
            theirs = [dict.fromkeys(each, 0.0) for each in ours]
        case "start":
            theirs = [dict(each.begins[place]) for each in read[claim.of]]
        case side:
            theirs = [dict(each.ends[place]) for each in read[side]]
    said = claim.model_dump(exclude={"query"}) | dict.fromkeys(claims.RESULT)
    if not all(ours) or not all(theirs):  # so short a run that there is nothing to read off
        return said | {"items": 0, "left_out": 0, "verdict": "undecided"}
    one, other = in_common(ours, theirs)
    found = difference(one, other)
    return said | {
        "ours": _mean(one),
        "theirs": _mean(other),
        "difference": found[0],
        "low": found[1],
        "high": found[2],
        "items": sum(map(len, one)),
        "left_out": sum(map(len, [*ours, *theirs])) - sum(map(len, [*one, *other])),
        "verdict": claim.verdict(found),
    }


def _mean(runs: Sequence[Mapping[str, float]]) -> float:
    return sum(sum(each.values()) / len(each) for each in runs) / len(runs)


def _variant(read: Sequence[Reading]) -> Table:
    """Its course: (mean, low, high) a round; a run that ended earlier stays as it ended."""
    longest = max(len(each.course) for each in read)
    course = [
        over_runs([list(each.course[min(at, len(each.course) - 1)].values()) for each in read])
        for at in range(longest)
        if all(each.course[min(at, len(each.course) - 1)] for each in read)
    ]
    return {
        "course": course,
        "tokens": round(sum(each.tokens for each in read) / len(read)),
        "seconds": sum(each.seconds for each in read) / len(read),
        "slowest": max(each.seconds for each in read),
    }


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on one thread")
    asked = parser.parse_args()
    if asked.jobs < 1:
        raise UserError(f"--jobs is at least 1, found {asked.jobs}")
    return asked


def checked(
    names: Sequence[str], seeds: Sequence[int], sets: Sequence[str], runs: Path
) -> dict[tuple[str, str], Versions]:
    """Recipe and variant -> the versions that a run would have. Claims of reported seeds are fixed.

    Raises UserError, and then nothing was written, for what is wrong with any of the recipes.
    """
    reported.untuned(seeds, sets)
    made = {
        name: trials.check(
            name, lambda made: running.versions(made, running.load_roles(made)), sets
        )
        for name in names
    }
    if {*seeds} & {*reported.SEEDS}:
        reported.uncommitted(names, [one for each in made.values() for one, _ in each.values()])
        for write in (reported.unchanged, reported.fix):
            for name in names:
                write(runs / folder_of(name), name)
    return {
        (name, variant): now for name, each in made.items() for variant, (_, now) in each.items()
    }


def main() -> int:
    """Returns the exit code. Raises UserError."""
    asked = read_arguments()
    seeds = list(dict.fromkeys(asked.seeds or reported.SEEDS))
    tuning = bool(asked.seeds or asked.sets)
    out = asked.out or (None if tuning else config.HERE / "recipes")
    published = [each for each in config.recipes() if each != "default"]
    wanted = asked.names or [*told.CONTROLS, *published]
    names = list({config.recipe_key(each): each for each in wanted}.values())
    runs_at = asked.runs.resolve()
    now = checked(names, seeds, asked.sets, runs_at)
    kept, failed = told.kept(out), dict[str, Exception]()
    with ThreadPoolExecutor(asked.jobs) as pool:
        bench = Bench(runs_at, pool, now)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, bench.end)
        begun = begin(bench, names, seeds, asked.sets)
        bench.tell_of_other_code(WARM_UPS)
        for name, pending in begun.items():
            try:
                runs = {each: [one.result() for one in made] for each, made in pending.items()}
                bench.tell_of_other_code(folder_of(name))
                if bench.ended_by is not None:
                    break
                made = row(name, runs, seeds, asked.sets)
            except Ended:
                break
            except (RuntimeError, UserError) as error:  # the others' runs took hours
                failed[name] = error
                continue
            kept[made["recipe"]] = made
            print(told.line(made), flush=True)
            if out is not None:  # what is there is kept, should the rest take another day
                told.write(out, kept)
    for name, error in failed.items():
        print(f"{name}: {error}", file=sys.stderr)
    if bench.ended_by is not None:
        ended_by = signal.Signals(bench.ended_by).name
        print(f"results.py: ended by {ended_by}; it goes on when asked again", file=sys.stderr)
        return 128 + bench.ended_by
    if not failed:
        return 0
    return 2 if all(isinstance(each, UserError) for each in failed.values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"results.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before any run
        sys.exit(130)
