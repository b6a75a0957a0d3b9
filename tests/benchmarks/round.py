"""A whole embedded round, ours against the same round with TRL's trainer and `generate`.

`round.py RUNS`: runs `loop start` on the default settings for their warm-up, then, from the
checkpoint that this leaves, one round (generate, judge, filter, train, evaluate, gate) with our
parts (in float32 as by default, and trained in bfloat16 as TRL does by default), with the peers'
parts as they come and with them tuned, in turns, once a seed, each in a process of its own. Seeds
differ in pairs and steps, so a ratio is of sums over seeds, beside the range of each seed's own.
Prints seconds of the process and of each stage, means over seeds, the most memory that any held,
and what the trained checkpoint gets right on the test split.

Tuned: TRL as peer_trainers.py says; `generate` of prompts sorted by length, with torch's own
float32 products, which are the faster ones here for passes as small as a decoded token's.

No ratio is printed unless they did the same work: the same prompts, as many candidates, about as
many examples (they sample by other noise), on one batch of examples the same loss and gradient
norm, and accuracies whose intervals overlap.

--before FOLDER adds a row: an earlier version of this repository, its default round, of which loss
and gradient norm are not compared. --whole runs all that `make start` does, warm-up included.
--profile shows where the time of ours goes.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean
from typing import Any

import passes
import rounds
from kept import keep
from round_profile import profiled
from rounds import Ran, Sets
from table import Row, Table, times

from store.database import Store
from store.records import Call

ENGINE = passes.HERE / "peer_engine.py"
TRAINERS = passes.HERE / "peer_trainers.py"
SEEDS = (100, 101, 102, 103, 104)
OURS, OURS_16, BEFORE = "ours", "ours, bfloat16", "before"
PLAIN, TUNED = "TRL, generate", "TRL, generate, tuned"
OTHERS = (OURS_16, PLAIN, TUNED)
# bfloat16, in which TRL trains by default, moves a loss in its third digit; other noise of
# sampling moves the number of examples.
AGREE_BY_WORK = {"prompts": 0.0, "candidates": 0.0, "examples": 0.1}
AGREE = {**AGREE_BY_WORK, "first loss": 0.01, "first gradient norm": 0.05}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", choices=OTHERS, default=OTHERS)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    runs = asked.runs.resolve()
    begin: Sets = {}
    if not asked.whole:
        begin = {"model.path": str(rounds.warmed_up(runs)), "warmup.when": "never", "rounds": 1}
    if asked.profile:
        print(profiled(runs / "profile", {"seed": asked.seeds[0], **begin}, asked.threads))
        return
    variants: dict[str, Sets] = {OURS: {}}
    variants |= {name: _sets(name, asked.whole) for name in asked.only}
    if asked.before:
        variants[BEFORE] = {}
    load = os.getloadavg()[0]
    found = _in_turns(variants, begin, asked)
    title = "all of `make start`" if asked.whole else "a whole round of `loop start`"
    title += f", {len(asked.seeds)} seed{'s' * (len(asked.seeds) > 1)}: {_shape()}"
    rows = list(_rows(found, variants))
    quoted = {name: OURS for name in (PLAIN, TUNED) if name in variants}
    table = Table(title, OURS, asked.threads, (load, os.getloadavg()[0]), rows, quoted)
    print(table.markdown(), end="\n\n")
    print(_by_stage(found, table), end="\n\n")
    if asked.json:
        stages = {name: [each.stages for each in ran] for name, ran in found.items()}
        keep(asked.json, [table], stages=stages)
    sys.exit(0 if table.agreed else 1)


def _shape() -> str:
    found = rounds.DEFAULT
    return (
        f"{rounds.SHAPE}, {found['generator']['n']} answers to each of {found['prompts']} prompts, "
        f"within {found['generator']['max_tokens']} tokens"
    )


def _in_turns(
    variants: Mapping[str, Sets], begin: Sets, asked: argparse.Namespace
) -> dict[str, list[Ran]]:
    found: dict[str, list[Ran]] = {name: [] for name in variants}
    for number, seed in enumerate(asked.seeds):
        for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
            folder = asked.runs.resolve() / f"seed-{seed}" / re.sub("[, ]+", "-", name)
            sets = {"seed": seed, **begin, **variants[name]}
            home = asked.before.resolve() if name == BEFORE else passes.ROOT
            found[name].append(rounds.run(folder, sets, asked.threads, home))
            took = found[name][-1]
            print(f"seed {seed}  {name:<16} {took.seconds:6.1f} s", file=sys.stderr, flush=True)
    return found


def _default(table: str) -> Sets:
    """A table of the default settings, without what is used."""
    found: Any = rounds.DEFAULT
    for part in table.split("."):
        found = found[part]
    return {key: value for key, value in found.items() if key != "use"}


def _spelled(table: str, name: str, *, tuned: bool) -> Sets:
    """The settings for a peer of a trainer, with the default's own options."""
    own = _default(table)
    return {
        f"{table}.use": f"{TRAINERS}:{name}",
        **{f"{table}.{key}": value for key, value in own.items()},
        f"{table}.tuned": tuned,
    }


def _sets(name: str, whole: bool) -> Sets:
    if name == OURS_16:
        return {"trainer.dtype": "bfloat16"}
    tuned = name == TUNED
    sets = {"engine.use": f"{ENGINE}:Generate", "engine.tuned": tuned}
    sets |= _spelled("trainer", "Dpo", tuned=tuned)
    return sets | (_spelled("warmup.trainer", "Sft", tuned=tuned) if whole else {})


def _rows(found: Mapping[str, Sequence[Ran]], variants: Mapping[str, Sets]) -> Iterator[Row]:
    first_steps = _first_steps(found[OURS][0].root, variants)
    rows = {}
    for name, ran in found.items():
        rows[name] = Row(
            name,
            seconds=[each.seconds for each in ran],
            cpu_seconds=[each.cpu_seconds for each in ran],
            by_seed=True,
            memory_mib=max(each.mib for each in ran),
            memory_by="ru_maxrss of the whole process",
            figures={
                "prompts": [digest for each in ran for digest in each.prompts],
                "candidates": [each.candidates for each in ran],
                "examples": [each.examples for each in ran],
                **first_steps.get(name, {}),
            },
        )
    ours = _mean(found[OURS])
    for name, row in rows.items():
        row.hold(rows[OURS], AGREE if name in first_steps else AGREE_BY_WORK)
        value, low, high = _mean(found[name])
        told = f"test {value:.3f} [{low:.3f}, {high:.3f}]"
        if low > ours[2] or high < ours[1]:
            row.disagrees, row.ratio = True, None
            told = f"DISAGREES: {told}"
        compared = "" if name in first_steps else "loss and gradient norm not compared"
        row.note = "; ".join(filter(None, [row.note, compared, told]))
        yield row


def _mean(ran: Sequence[Ran]) -> tuple[float, ...]:
    """Accuracy and the ends of its interval, means over seeds."""
    return tuple(sum(each.accuracy[n] for each in ran) / len(ran) for n in range(3))


def _first_steps(root: Path, variants: Mapping[str, Sets]) -> dict[str, passes.Figures]:
    """Loss and gradient norm of one step on the first batch of our run's own examples."""
    from roles.plugins import load

    store = Store(root / "loop.db")
    start = store.beginning("policy")
    own = _default("trainer")
    last = store.rounds()[-1].id or 0
    examples = store.examples(last, ["main"])[: own["batch_size"]]
    call = Call(seed=0, round=1, stage="train")
    found = {}
    for name, sets in variants.items():
        if name == BEFORE:  # of the same data by the same formula, but not importable beside ours
            continue
        spec = sets.get("trainer.use", "preference")
        told = {key.removeprefix("trainer."): value for key, value in sets.items()}
        options = {**own, **{key: told[key] for key in ("tuned", "dtype") if key in told}}
        options["epochs"] = 1
        with tempfile.TemporaryDirectory() as into, redirect_stdout(sys.stderr):
            trained = load("trainer", spec, options).train(examples, start, start, Path(into), call)
        [step] = trained.steps
        found[name] = {
            "first loss": step.loss,
            "first gradient norm": step.metrics["grad_norm"],
        }
    store.close()
    return found


def _by_stage(found: Mapping[str, Sequence[Ran]], table: Table) -> str:
    """Each stage's seconds and the share of the whole, means over seeds."""
    lines = [
        "| seconds | " + " | ".join(found) + " |",
        "|---|" + "--:|" * len(found),
    ]
    for stage in next(iter(found.values()))[0].stages:
        cells = []
        for ran in found.values():
            seconds = mean(each.stages[stage] for each in ran)
            cells.append(f"{seconds:.1f} ({seconds / mean(each.seconds for each in ran):.0%})")
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    ratios = [table[name].ratio for name in found]
    for label, name, ratio in (
        ("the process", "seconds", [each and each.time for each in ratios]),
        ("of a processor", "cpu_seconds", [each and each.cpu for each in ratios]),
    ):
        took = [f"{mean(getattr(each, name) for each in ran):.1f}" for ran in found.values()]
        lines.append(f"| {label} | " + " | ".join(took) + " |")
        lines.append(f"| {label}, / {OURS} | " + " | ".join(map(times, ratio)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
