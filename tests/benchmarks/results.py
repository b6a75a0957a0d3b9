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
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reported
import told

from loop import claims, config
from loop.fork import fork
from loop.gain import difference, in_common, over_runs
from loop.report import rounds, training_counts
from loop.settings import Config, digest
from loop.sides import standings
from store.database import SAMPLED, Store
from store.errors import UserError

HOME = Path(__file__).resolve().parents[2]
VARIANTS = ("recipe", "control", "plain")
Table = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A run that a recipe is judged by: what to tell `loop start`, the seed aside."""

    name: str
    recipe: str
    sets: tuple[str, ...]
    like: tuple[str, tuple[str, ...]] | None = None
    """The recipe, with its settings, whose warm-up and models it has in place of its own."""

    def config(self, seed: int) -> Config:
        own = config.read(recipe=self.recipe, sets=[*self.sets, f"seed={seed}"])
        if self.like is None:
            return own
        recipe, sets = self.like
        theirs = config.read(recipe=recipe, sets=[*sets, f"seed={seed}"])
        others = {name: each for name, each in theirs.models.items() if name not in own.models}
        return own.model_copy(
            update={
                "warmup": theirs.warmup,
                "evaluate": theirs.evaluate,
                "models": own.models | others,
            }
        )


@dataclass
class Bench:
    """Where runs are, and the processes that make them."""

    runs: Path
    pool: ThreadPoolExecutor
    warmed: dict[str, Future[Path]] = field(default_factory=dict)

    def start(
        self, variant: Variant, seed: int, place: Path, warm: Future[Path] | None = None
    ) -> Future[Path]:
        return self.pool.submit(self._run, variant, seed, place, warm)

    def _run(self, variant: Variant, seed: int, place: Path, warm: Future[Path] | None) -> Path:
        """The finished run. What was begun goes on; a run of other settings is left alone."""
        wanted = variant.config(seed)
        if (found := run_of(place, wanted)) is not None and found.finished:
            return found.root
        if warm is None:
            asked = ["--recipe", variant.recipe, "--runs", str(place), "--set", f"seed={seed}"]
            asked += [part for each in variant.sets for part in ("--set", each)]
        else:
            root = found.root if found else fork(warm.result(), wanted, place, variant.name)
            asked = [str(root)]
        command = [sys.executable, "-m", "loop", "start", *asked]
        alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(HOME)}
        ended = subprocess.run(
            command, env=os.environ | alone, cwd=HOME, capture_output=True, text=True
        )
        if ended.returncode not in (0, 3):  # 3: a rule of the run's own ended it
            raise RuntimeError(
                f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr}"
            )
        made = run_of(place, wanted)
        assert made is not None, command
        return made.root

    def warm_up(self, variant: Variant, seed: int) -> Future[Path]:
        """The run whose round 0 is the variant's, and which has no other."""
        made = variant.config(seed)
        tables = made.model_dump(mode="json")
        bases = {
            name: [each.path, each.warmup_from, made.trainer(0, name).model_dump(mode="json")]
            for name, each in made.models.items()
        }
        parts = [tables["warmup"], tables["evaluate"], made.seed, made.batch_prompts, bases]
        key = digest(parts)[:12]
        if key not in self.warmed:
            self.warmed[key] = self._warm_up(variant, seed, self.runs / "warm-ups" / key)
        return self.warmed[key]

    def _warm_up(self, variant: Variant, seed: int, place: Path) -> Future[Path]:
        if (found := run_of(place)) is not None and found.finished:
            return self.pool.submit(lambda: found.root)
        # Whatever the warm-up scores is enough, so the run is over before its first round.
        only = Variant("warm-up", variant.recipe, (*variant.sets, "gate.target=-1e9"))
        return self.start(only, seed, place)


@dataclass(frozen=True)
class Found:
    root: Path
    finished: bool


def run_of(place: Path, wanted: Config | None = None) -> Found | None:
    """The newest run of these settings, those that may change in a run included, or of any."""
    settings = None if wanted is None else wanted.model_dump(mode="json")
    for database in sorted(place.glob("*/loop.db"), reverse=True):
        store = Store(database)
        run = store.run()
        store.close()
        if run is not None and settings in (None, run.config):
            return Found(database.parent, run.status in ("done", "stopped"))
    return None


def variants(name: str, trial: claims.Trial, sets: Sequence[str]) -> list[Variant]:
    arena = "default" if trial.arena is None else f"{config.ARENAS}/{trial.arena}"
    return [
        Variant("recipe", name, (*trial.trial, *sets)),
        Variant("control", name, (*trial.trial, *trial.control, *sets)),
        Variant("plain", arena, (*trial.trial, *trial.plain, *sets), (name, (*trial.trial, *sets))),
    ]


def begin(
    bench: Bench, names: Sequence[str], seeds: Sequence[int], sets: Sequence[str]
) -> dict[str, dict[str, list[Future[Path]]]]:
    """Recipe -> variant -> its run a seed."""
    trials = {name: claims.read(name) for name in names}
    warm = {
        (name, seed): bench.warm_up(variants(name, trials[name], sets)[0], seed)
        for name in names
        for seed in seeds
    }
    begun: dict[str, dict[str, list[Future[Path]]]] = {}
    for name in names:
        begun[name] = {each: [] for each in VARIANTS}
        for seed in seeds:
            for each in variants(name, trials[name], sets):
                place = bench.runs / told.plain_name(name) / each.name / f"seed-{seed}"
                made = bench.start(each, seed, place, warm[name, seed])
                begun[name][each.name].append(made)
    return begun


# What the stores say


def row(name: str, runs: Mapping[str, Sequence[Path]], seeds: Sequence[int]) -> Table:
    """All that the table and the plot tell of a recipe."""
    trial = claims.read(name)
    read = {each: [Reading.of(root, trial) for root in roots] for each, roots in runs.items()}
    return {
        "recipe": name,
        "arena": trial.arena or "default",
        "shown": trial.shown,
        "seeds": list(seeds),
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
        )
        store.close()
        return found


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on one thread")
    asked = parser.parse_args()
    seeds = asked.seeds or reported.SEEDS
    reported.untuned(seeds, asked.sets)
    tuning = bool(asked.seeds or asked.sets)
    out = asked.out or (None if tuning else config.HERE / "recipes")
    published = [each for each in config.recipes() if each != "default"]
    names = [
        str(Path(each).resolve()) if each.endswith(".toml") else each
        for each in asked.names or [*told.CONTROLS, *published]
    ]
    runs_at = asked.runs.resolve()
    if {*seeds} & {*reported.SEEDS}:
        reported.uncommitted(names)
        for name in names:
            reported.fix(runs_at / told.plain_name(name), name)
    kept, failed = told.kept(out), []
    with ThreadPoolExecutor(asked.jobs) as pool:
        begun = begin(Bench(runs_at, pool), names, seeds, asked.sets)
        for name, pending in begun.items():
            try:
                runs = {each: [one.result() for one in made] for each, made in pending.items()}
                kept[name] = row(name, runs, seeds)
            except (RuntimeError, UserError) as error:  # the others' runs took hours
                failed.append(f"{name}: {error}")
                continue
            print(told.line(kept[name]), flush=True)
            if out is not None:  # what is there is kept, should the rest take another day
                told.write(out, kept)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
