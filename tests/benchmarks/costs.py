"""All that the README says about time and memory, measured: `costs.py [NAME ...]`.

Runs head, step, prefix, generate, scoring, growth and round (or those named), one after the other,
and prints their tables under one heading that says how and where. Tables, and every pass as JSON,
are kept under runs/costs. Ends with 1 where a variant did other work than ours.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = ("head", "step", "prefix", "generate", "scoring", "growth", "round")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, help="of each but round; theirs if it is left out")
    parser.add_argument("--runs", type=Path, default=Path("runs/costs"))
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(NAMES):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(NAMES)}")
    asked.runs.mkdir(parents=True, exist_ok=True)
    began = os.getloadavg()[0]
    told, agreed = [], True
    for name in asked.names or NAMES:
        command = [sys.executable, str(HERE / f"{name}.py")]
        command += ["--threads", str(asked.threads), "--json", str(asked.runs / f"{name}.json")]
        if name == "round":
            command.append(str(asked.runs / "round"))
        elif asked.passes:
            command += ["--passes", str(asked.passes)]
        print(f"{name} ...", file=sys.stderr, flush=True)
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        agreed &= ran.returncode == 0
        tables = ran.stdout.strip() or f"nothing: it ended with {ran.returncode}"
        (asked.runs / f"{name}.md").write_text(f"{tables}\n")
        told.append(f"### {name}\n\n{tables}\n")
    print(_heading(asked.threads, began), *told, sep="\n")
    sys.exit(0 if agreed else 1)


def _heading(threads: int, began: float) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    return (
        f"`python tests/benchmarks/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}` on "
        f"{_machine()}, {packages}; {threads} thread{'s' * (threads > 1)}, "
        f"load {began:.1f} before and {os.getloadavg()[0]:.1f} after\n"
    )


def _machine() -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{os.cpu_count()} cores of {model}"


if __name__ == "__main__":
    main()
