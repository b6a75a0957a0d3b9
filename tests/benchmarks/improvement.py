"""What a recipe gains on the test split, over seeds: `improvement.py RUNS [RECIPE [SEED ...]]`.

Runs `loop start --recipe` once a seed (`default` and 0 to 4 unless told), goes on where it was if
it was stopped, and prints each run's figures and the mean gain of the best checkpoint over the
warm-up's, with a 95 % interval by bootstrap over seeds and, within each, over prompts. Where a
judge is measured on anchors its figures come too, by round.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from loop.gain import by_prompt, mean, over_runs, paired
from loop.report import rounds
from loop.retention import best_checkpoint
from store.database import Store

JUDGING = ("agreement", "variance", "modal", "unscored")


def run(folder: Path, recipe: str, seed: int) -> Path:
    """The finished run of a seed."""
    runs = folder / f"seed-{seed}"
    if not any(Store(path).run().status == "done" for path in runs.glob("*/loop.db")):  # type: ignore[union-attr]
        command = ["start", "--recipe", recipe, "--runs", str(runs), "--set", f"seed={seed}"]
        subprocess.run([sys.executable, "-m", "loop", *command], check=True, capture_output=True)
    [root] = runs.iterdir()
    return root


def gains(store: Store) -> list[float]:
    """By prompt of the test split: mean score after, minus mean score before."""
    ends = (store.beginning("policy"), best_checkpoint(store, "policy"))
    scores = (by_prompt(store, each.id or 0, "verifier")["score"] for each in ends)
    return [after - before for before, after in zip(*paired(*scores), strict=True)]


def main(folder: Path, recipe: str, seeds: list[int]) -> None:
    found, judged = [], []
    for seed in seeds:
        store = Store(run(folder, recipe, seed) / "loop.db")
        found.append(gains(store))
        made = store.run()
        assert made is not None
        assert made.ended is not None
        assert made.started is not None
        took = (made.ended - made.started).total_seconds()
        accuracy = store.query(
            "SELECT number, metric, value FROM evaluation JOIN round ON round.id = round_id "
            "WHERE (split = 'test' AND metric IN ('accuracy_sampled', 'accuracy_greedy')) "
            "OR suite = 'judge' ORDER BY metric, number"
        )
        of: dict[str, list[float]] = {}
        for row in accuracy:
            of.setdefault(row["metric"], []).append(row["value"])
        for metric in ("accuracy_sampled", "accuracy_greedy", *JUDGING):
            if metric in of:
                print(f"seed {seed}  {metric:<16} " + " -> ".join(f"{v:.3f}" for v in of[metric]))
        judged.append(of.get("agreement", []))
        decided = store.query(
            "SELECT decision FROM decision WHERE model IS NOT NULL ORDER BY round_id"
        )
        outside = [row["outside"] for row in rounds(store)["rounds"]]
        print(f"seed {seed}  decisions        " + ", ".join(row["decision"] for row in decided))
        print(f"seed {seed}  outside          " + ", ".join(f"{each:.1%}" for each in outside))
        print(f"seed {seed}  gain {mean(found[-1]):+.3f}  wall {took:.0f} s", flush=True)
    gain, low, high = over_runs(found)
    print(f"mean gain over {len(seeds)} seeds {gain:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]")
    for number, values in enumerate(zip(*judged, strict=False)):
        print(f"round {number}  mean agreement of the judge with the verifier {mean(values):.3f}")


if __name__ == "__main__":
    folder, recipe, *rest = [*sys.argv[1:], "default"] if len(sys.argv) == 2 else sys.argv[1:]
    main(Path(folder), recipe, [int(each) for each in rest] or [0, 1, 2, 3, 4])
