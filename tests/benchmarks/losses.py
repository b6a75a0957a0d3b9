"""What one round does with each loss, from one warm-up: `losses.py RUNS [ROW ...]`.

Runs `loop start` on the default settings for their warm-up, then, from the checkpoint that this
leaves, one round for each row (all of them unless told); goes on where it was if it was stopped.
Prints a Markdown table: the loss where policy and reference are one, as its formula says and as
the first step measured it, and what the trained checkpoint gets right on the test split, whether
or not the gate accepted it.

The learning rate is the default's. beta is 0.1 but for two losses whose log-ratios are means over
tokens, of which an answer here has about five. No likelihood term but where the row says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from formulas import LOSSES, at_start
from store.database import Store

SEED = 100
COMMON = {"learning_rate": 2e-5, "epochs": 5, "batch_size": 32, "schedule": "linear"}
Options = dict[str, Any]

PAIRS: dict[str, Options] = {name: {"loss": name} for name in LOSSES}
PAIRS["ipo"] |= {"beta": 0.5}
PAIRS["sigmoid_norm"] |= {"beta": 0.5}
PAIRS["exo_pair"] |= {"label_smoothing": 0.001}
PAIRS["robust"] |= {"label_smoothing": 0.1}
PAIRS["sigmoid, nll by token"] = {"loss": "sigmoid", "nll_weight": 2.0}
PAIRS["sigmoid, nll by sequence"] = {"loss": "sigmoid", "nll_weight": 2.0, "nll": "sequence"}
PAIRS["sigmoid, length"] = {"loss": "sigmoid", "length_weight": 0.05}
PAIRS["sigmoid + bco_pair"] = {"loss": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]}

ROWS: dict[str, tuple[Options, Options]] = {
    name: ({"use": "preference", "beta": 0.1, **COMMON, **options}, {})
    for name, options in PAIRS.items()
}
KTO, LABELLED = "roles.trainers.kto:Kto", "roles.filters.labelled:Labelled"
for loss in ("kto", "apo_zero_unpaired"):
    # As many answers a step as in 32 pairs. The warm-up writes a wanted answer for every 3.7
    # unwanted ones (equal ones count once), which the weight makes up for, as the paper advises.
    options = {"use": KTO, "loss": loss, "beta": 0.1, **COMMON, "batch_size": 64}
    options["desirable_weight"] = 4.0
    ROWS[loss] = (options, {"use": LABELLED, "per_label": 4})
ROWS["rejection sampling"] = (
    {"use": "supervised", **COMMON},
    {"use": "best_only", "min_score": 1.0},
)
"""Name -> options of the trainer, options of the filter."""


def expected(trainer: Options) -> float | None:
    """The loss where policy and reference are one. None where it depends on the answers."""
    per_answer = {"nll_weight", "length_weight", "desirable_weight"} & set(trainer)
    if trainer["use"] == "supervised" or per_answer:
        return None
    names = [trainer["loss"]] if isinstance(trainer["loss"], str) else trainer["loss"]
    weights = trainer.get("loss_weights", [1.0] * len(names))
    smoothing = trainer.get("label_smoothing", 0.0)
    return sum(
        weight * at_start(name, beta=trainer["beta"], smoothing=smoothing)
        for name, weight in zip(names, weights, strict=True)
    )


def run(runs: Path, sets: Options) -> Store:
    """The finished run with these settings, the only one under `runs`."""
    command = ["start", "--runs", str(runs)]
    for key, value in {"seed": SEED, **sets}.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    if not any(Store(path).run().status == "done" for path in runs.glob("*/loop.db")):  # type: ignore[union-attr]
        subprocess.run([sys.executable, "-m", "loop", *command], check=True, stdout=sys.stderr)
    [database] = runs.glob("*/loop.db")
    return Store(database)


def accuracy(store: Store, round: int) -> str:
    [found] = store.query(
        "SELECT value, low, high FROM evaluation JOIN round ON round.id = round_id "
        "WHERE split = 'test' AND metric = 'accuracy_sampled' AND number = :number",
        number=round,
    )
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def row(runs: Path, name: str, warmed_up: Path) -> str:
    trainer, filter_ = ROWS[name]
    sets: Options = {"model.path": str(warmed_up), "warmup.when": "never", "rounds": 1}
    sets |= {f"trainer.{key}": value for key, value in trainer.items()}
    if "nll_weight" not in trainer and trainer["use"] == "preference":
        sets["trainer.nll_weight"] = 0.0  # the default has one
    sets |= {f"filter.{key}": value for key, value in filter_.items()}
    store = run(runs / name.replace(", ", "-").replace(" ", "-"), sets)
    [first] = store.query("SELECT loss FROM training_step WHERE step = 1")
    start = expected(trainer)
    shown = "-" if start is None else f"{start:.4f}"
    options = ", ".join(
        f"{key} {value}" for key, value in trainer.items() if key not in {"use", "loss", *COMMON}
    )
    return f"| {name} | {options} | {shown} | {first['loss']:.4f} | {accuracy(store, 1)} |"


def main(runs: Path, names: list[str]) -> None:
    for name in names:
        if name not in ROWS:
            sys.exit(f"no row {name!r}; there are: {'; '.join(ROWS)}")
    # A run has a round at least. This one's is as short as it can be, and nothing of it is used.
    short = {"rounds": 1, "prompts": 16, "trainer.max_steps": 1, "checkpoints.keep_last": 9}
    warm_up = run(runs / "warm-up", short)
    warmed_up = warm_up.beginning("policy").path.resolve()
    print("| loss | options | expected start | first step | test accuracy_sampled |")
    print("|---|---|---|---|---|")
    print(f"| warm-up only | | | | {accuracy(warm_up, 0)} |", flush=True)
    for name in names:
        print(row(runs, name, warmed_up), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(ROWS))
