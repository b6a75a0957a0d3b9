"""A whole embedded round, ours against the same round with TRL's trainer and `generate`.

`round.py RUNS`: runs `loop start` on the default settings for their warm-up, then, from the
checkpoint that this leaves, one round (generate, judge, filter, train, evaluate, gate) with our
parts (in float32 as by default, and trained in bfloat16 as TRL does by default), with the peers'
parts as they come and with them tuned, in turns, once a seed, each in a process of its own. Prints
seconds of the process and of each stage, the most memory that it held, and what the trained
checkpoint gets right on the test split.

No ratio is printed unless they did the same work: the same prompts, as many candidates, about as
many examples (they sample by other noise), on one batch of examples the same loss and gradient
norm, and accuracies whose intervals overlap.

--before FOLDER adds a row: an earlier version of this repository, its default round. --whole runs
all that `make start` does, warm-up included. --profile shows where the time of ours goes.
"""

from __future__ import annotations

import argparse
import json
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import losses
import passes

from store.database import Store
from store.records import Call

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers.py"
SEEDS = (100, 101, 102)
STAGES = ("propose", "generate", "judge", "filter", "train", "evaluate", "gate")
OURS, OURS_16, BEFORE = "ours", "ours, bfloat16", "before"
PLAIN, TUNED = "TRL, generate", "TRL, generate, tuned"
OTHERS = (OURS_16, PLAIN, TUNED)
# bfloat16, in which TRL trains by default, moves a loss in its third digit; other noise of
# sampling moves the number of examples.
AGREE = {
    "prompts": 0.0,
    "candidates": 0.0,
    "examples": 0.1,
    "first loss": 0.01,
    "first gradient norm": 0.05,
}
Sets = dict[str, Any]


@dataclass(frozen=True)
class Ran:
    """One run: what it took, and what came of it."""

    root: Path
    seconds: float
    cpu_seconds: float
    mib: float
    stages: dict[str, float]
    prompts: list[int]
    candidates: int
    examples: int
    accuracy: tuple[float, float, float]


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
        begin = {"model.path": str(_warmed_up(runs)), "warmup.when": "never", "rounds": 1}
    if asked.profile:
        print(_profiled(runs / "profile", {"seed": asked.seeds[0], **begin}, asked.threads))
        return
    variants: dict[str, Sets] = {OURS: {}}
    variants |= {name: _sets(name, asked.whole) for name in asked.only}
    if asked.before:
        variants[BEFORE] = {}
    load = os.getloadavg()[0]
    found: dict[str, list[Ran]] = {name: [] for name in variants}
    for number, seed in enumerate(asked.seeds):
        for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
            folder = runs / f"seed-{seed}" / name.replace(", ", "-").replace(" ", "-")
            sets = {"seed": seed, **begin, **variants[name]}
            home = asked.before.resolve() if name == BEFORE else passes.ROOT
            found[name].append(_run(folder, sets, asked.threads, home))
            took = found[name][-1]
            print(f"seed {seed}  {name:<16} {took.seconds:6.1f} s", file=sys.stderr, flush=True)
    title = "all of `make start`" if asked.whole else "a whole embedded round"
    title += f", {len(asked.seeds)} seed{'s' * (len(asked.seeds) > 1)}"
    table = passes.Table(
        title, OURS, asked.threads, (load, os.getloadavg()[0]), list(_rows(found, variants))
    )
    print(table.markdown(), end="\n\n")
    print(_by_stage(found), end="\n\n")
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        written = asdict(table) | {"noisy": table.noisy, "stages": _by_stage(found)}
        asked.json.write_text(json.dumps([written], indent=1))
    sys.exit(0 if table.agreed else 1)


def _warmed_up(runs: Path) -> Path:
    # A run has a round at least. This one's is as short as it can be, and nothing of it is used.
    short = {"rounds": 1, "prompts": 16, "trainer.max_steps": 1, "checkpoints.keep_last": 9}
    path: Path = losses.run(runs / "warm-up", short).beginning("policy").path
    return path.resolve()


def _default(table: str) -> Sets:
    """A table of the default settings, without what is used."""
    found: Any = tomllib.loads((passes.ROOT / "loop" / "default.toml").read_text())
    for part in table.split("."):
        found = found[part]
    return {key: value for key, value in found.items() if key != "use"}


def _spelled(table: str, name: str, *, tuned: bool) -> Sets:
    """The settings for a trainer of the peers with the default's own options."""
    own = _default(table)
    return {
        f"{table}.use": f"{PEERS}:{name}",
        **{f"{table}.{key}": value for key, value in own.items()},
        f"{table}.tuned": tuned,
    }


def _sets(name: str, whole: bool) -> Sets:
    if name == OURS_16:
        return {"trainer.dtype": "bfloat16"}
    sets = {"engine.use": f"{PEERS}:Generate", **_spelled("trainer", "Dpo", tuned=name == TUNED)}
    return sets | (_spelled("warmup.trainer", "Sft", tuned=name == TUNED) if whole else {})


def _command(folder: Path, sets: Mapping[str, Any]) -> list[str]:
    shutil.rmtree(folder, ignore_errors=True)  # a run that went on would be timed in part
    command = ["start", "--runs", str(folder)]
    for key, value in sets.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    return command


def _environment(threads: int, home: Path) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONPATH": str(home),
    }


def _run(folder: Path, sets: Sets, threads: int, home: Path) -> Ran:
    command = [sys.executable, "-m", "loop", *_command(folder, sets)]
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        child = subprocess.Popen(
            command, cwd=home, env=_environment(threads, home), stdout=said, stderr=said
        )
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            said.seek(0)
            sys.exit(f"{' '.join(command)} ended with {child.returncode}:\n{said.read().decode()}")
    [database] = folder.glob("*/loop.db")
    mib = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return _outcome(database, seconds, used.ru_utime + used.ru_stime, mib)


def _outcome(database: Path, seconds: float, cpu_seconds: float, mib: float) -> Ran:
    store = Store(database)
    stages = dict.fromkeys(STAGES, 0.0)
    for round in store.rounds():
        for stage in STAGES:
            stages[stage] += round.seconds.get(stage, 0.0)

    def count(table: str) -> int:
        return int(store.query(f"SELECT count(*) AS n FROM {table}")[0]["n"])

    digests = store.query(
        "SELECT digest FROM asked JOIN prompt ON prompt.id = prompt_id "
        "ORDER BY purpose, digest, round_id"
    )
    [accuracy] = store.query(
        "SELECT value, low, high FROM evaluation JOIN round ON round.id = round_id "
        "WHERE split = 'test' AND metric = 'accuracy_sampled' ORDER BY number DESC LIMIT 1"
    )
    found = Ran(
        root=database.parent,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        mib=mib,
        stages=stages | {"outside the stages": seconds - sum(stages.values())},
        prompts=[int(row["digest"][:12], 16) for row in digests],
        candidates=count("candidate"),
        examples=count("trained_on"),
        accuracy=(accuracy["value"], accuracy["low"], accuracy["high"]),
    )
    store.close()
    return found


def _rows(found: Mapping[str, Sequence[Ran]], variants: Mapping[str, Sets]) -> Iterator[passes.Row]:
    first_steps = _first_steps(found[OURS][0].root, variants)
    rows = {}
    for name, ran in found.items():
        rows[name] = passes.Row(
            name,
            seconds=[each.seconds for each in ran],
            memory_mib=max(each.mib for each in ran),
            memory_by="ru_maxrss of the whole process",
            figures={
                "prompts": [digest for each in ran for digest in each.prompts],
                "candidates": [each.candidates for each in ran],
                "examples": [each.examples for each in ran],
                **first_steps.get(name, first_steps[OURS]),
            },
        )
    ours = _mean(found[OURS])
    for name, row in rows.items():
        passes.hold(row, rows[OURS], AGREE)
        value, low, high = _mean(found[name])
        if low > ours[2] or high < ours[1]:
            row.disagrees, row.ratio = True, None
            row.note += f" DISAGREES: accuracy {value:.3f} [{low:.3f}, {high:.3f}]"
        else:
            row.note = "; ".join(
                filter(None, [row.note, f"test {value:.3f} [{low:.3f}, {high:.3f}]"])
            )
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


def _by_stage(found: Mapping[str, Sequence[Ran]]) -> str:
    """Each stage's seconds in the run where it took least, and the share of the whole."""
    lines = [
        "| seconds | " + " | ".join(found) + " |",
        "|---|" + "--:|" * len(found),
    ]
    for stage in next(iter(found.values()))[0].stages:
        cells = []
        for ran in found.values():
            least = min(each.stages[stage] for each in ran)
            cells.append(f"{least:.1f} ({least / min(each.seconds for each in ran):.0%})")
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    for label, name in (("the process", "seconds"), ("of a processor", "cpu_seconds")):
        least = [f"{min(getattr(each, name) for each in ran):.1f}" for ran in found.values()]
        lines.append(f"| {label} | " + " | ".join(least) + " |")
        times = [f"{float(each) / float(least[0]):.2f}×" for each in least]
        lines.append(f"| {label}, / {OURS} | " + " | ".join(times) + " |")
    return "\n".join(lines)


PROFILE = """
import cProfile, sys
from pathlib import Path
profile = cProfile.Profile()
out = sys.argv.pop(1)
profile.enable()
try:
    from loop.cli import main
    main()
finally:
    profile.disable()
    profile.dump_stats(out)
"""
ELSEWHERE = {
    ("<frozen importlib._bootstrap>", "_find_and_load"): "imports",
    ("transformers/trainer.py", "_inner_training_loop"): "Trainer's loop",
    ("torch/autograd/graph.py", "_engine_run_backward"): "backward passes",
    ("torch/optim/adamw.py", "step"): "optimizer",
    ("torch/nn/utils/clip_grad.py", "clip_grad_norm_"): "gradient norm",
    ("transformers/generation/utils.py", "generate"): "generate",
    ("~", "<method 'execute' of 'sqlite3.Cursor' objects>"): "SQLite, execute",
    ("~", "<method 'executemany' of 'sqlite3.Cursor' objects>"): "SQLite, executemany",
    ("~", "<method 'commit' of 'sqlite3.Connection' objects>"): "SQLite, commit",
    ("~", "<built-in method gc.collect>"): "garbage collection",
    ("~", "<built-in method torch._C._nn.linear>"): "linear layers, forward",
    ("~", "<built-in method torch._C._nn.scaled_dot_product_attention>"): "attention, forward",
}
"""Functions of others that say where time goes. (file's end, function) -> what to call it."""


def _profiled(folder: Path, sets: Sets, threads: int) -> str:
    """Our functions, and what is done below them, that take a hundredth of a round or more."""
    command = _command(folder, sets)
    folder.mkdir(parents=True)
    out = folder / "profile.out"
    subprocess.run(
        [sys.executable, "-c", PROFILE, str(out), *command],
        cwd=passes.ROOT,
        env=_environment(threads, passes.ROOT),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    stats: Any = pstats.Stats(str(out))
    whole = stats.total_tt
    shown: dict[str, list[float]] = {}
    for (file, line, name), (_, calls, _, cumulative, _) in stats.stats.items():
        others = [
            each for (end, its), each in ELSEWHERE.items() if name == its and file.endswith(end)
        ]
        if file.startswith(f"{passes.ROOT}/") and not name.startswith("<"):
            label = f"{Path(file).relative_to(passes.ROOT)}:{line} {name}"
        elif others:
            label = f"({others[0]})"
        else:
            continue
        found = shown.setdefault(label, [0.0, 0.0])
        found[0] += cumulative
        found[1] += calls
    lines = [f"{whole:.1f} s under the profiler, which slows what is small", ""]
    for label, (seconds, calls) in sorted(shown.items(), key=lambda item: -item[1][0]):
        if seconds >= whole / 100:
            lines.append(f"{seconds:7.2f} s  {seconds / whole:4.0%}  {calls:8.0f}  {label}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
