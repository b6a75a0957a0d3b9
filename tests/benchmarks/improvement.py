"""What the default run gains on the test split, over seeds: `improvement.py RUNS [SEED ...]`.

Runs `loop start` once a seed (0 to 4 unless told), goes on where it was if it was stopped, and
prints each run's figures and the mean gain of the best checkpoint over the warm-up's, with a 95 %
interval by bootstrap over seeds and, within each, over prompts.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from loop.gain import by_prompt, mean, over_runs, paired
from loop.report import rounds
from loop.retention import best_checkpoint
from store.database import Store


def run(folder: Path, seed: int) -> Path:
    """The finished run of a seed."""
    runs = folder / f"seed-{seed}"
    if not any(Store(path).run().status == "done" for path in runs.glob("*/loop.db")):  # type: ignore[union-attr]
        command = ["start", "--runs", str(runs), "--set", f"seed={seed}"]
        subprocess.run([sys.executable, "-m", "loop", *command], check=True, capture_output=True)
    [root] = runs.iterdir()
    return root


def gains(store: Store) -> list[float]:
    """By prompt of the test split: mean score after, minus mean score before."""
    ends = (store.beginning("policy"), best_checkpoint(store, "policy"))
    scores = (by_prompt(store, each.id or 0, "verifier")["score"] for each in ends)
    return [after - before for before, after in zip(*paired(*scores), strict=True)]


def main(folder: Path, seeds: list[int]) -> None:
    found = []
    for seed in seeds:
        store = Store(run(folder, seed) / "loop.db")
        found.append(gains(store))
        made = store.run()
        assert made is not None
        assert made.ended is not None
        assert made.started is not None
        took = (made.ended - made.started).total_seconds()
        accuracy = store.query(
            "SELECT number, metric, value FROM evaluation JOIN round ON round.id = round_id "
            "WHERE split = 'test' AND metric IN ('accuracy_sampled', 'accuracy_greedy') "
            "ORDER BY metric, number"
        )
        for metric in ("accuracy_sampled", "accuracy_greedy"):
            values = [row["value"] for row in accuracy if row["metric"] == metric]
            print(f"seed {seed}  {metric:<16} " + " -> ".join(f"{each:.3f}" for each in values))
        decided = store.query(
            "SELECT decision FROM decision WHERE model IS NOT NULL ORDER BY round_id"
        )
        outside = [row["outside"] for row in rounds(store)["rounds"]]
        print(f"seed {seed}  decisions        " + ", ".join(row["decision"] for row in decided))
        print(f"seed {seed}  outside          " + ", ".join(f"{each:.1%}" for each in outside))
        print(f"seed {seed}  gain {mean(found[-1]):+.3f}  wall {took:.0f} s", flush=True)
    gain, low, high = over_runs(found)
    print(f"mean gain over {len(seeds)} seeds {gain:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(each) for each in sys.argv[2:]] or [0, 1, 2, 3, 4])
