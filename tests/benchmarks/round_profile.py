"""Where the time of a round of ours goes, by cProfile."""

from __future__ import annotations

import pstats
import subprocess
import sys
from pathlib import Path
from typing import Any

import passes
import rounds

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


def profiled(folder: Path, sets: rounds.Sets, threads: int) -> str:
    """Our functions, and what is done below them, that take a hundredth of a round or more."""
    command = rounds.command(folder, sets)
    folder.mkdir(parents=True)
    out = folder / "profile.out"
    subprocess.run(
        [sys.executable, "-c", PROFILE, str(out), *command],
        cwd=passes.ROOT,
        env=rounds.environment(threads, passes.ROOT),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return _most(pstats.Stats(str(out)))


def _most(stats: Any) -> str:
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
