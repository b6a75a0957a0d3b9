"""All that the README says about time and memory, measured: `costs.py [NAME ...]`.

Runs head, step, prefix, generate, scoring, growth and round (or those named), one after the other,
and prints their tables under one heading that says how and where; last, the one table that the
README quotes. Tables, and every pass as JSON, are kept under runs/costs; `--read` measures nothing
and prints the README's table of what is kept there, or the whole tables of those named. Ends with
1 where a variant did other work than ours.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import kept
import quoted
from passes import HERE
from table import on

QUOTED = ("head", "step", "prefix", "generate", "scoring", "round")
NAMES = (*QUOTED, "growth")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, help="of each but round; theirs if it is left out")
    parser.add_argument("--runs", type=Path, default=Path("runs/costs"))
    parser.add_argument("--read", action="store_true", help="only print what is kept")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(NAMES):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(NAMES)}")
    if asked.read and asked.names:
        for name in asked.names:
            file = asked.runs / f"{name}.md"
            print(file.read_text() if file.is_file() else f"{name} was not measured: no {file}")
        return
    agreed = asked.read or _measured(asked)
    parts = {
        name: kept.read(asked.runs / f"{name}.json")
        for name in QUOTED
        if (asked.runs / f"{name}.json").is_file()
    }
    if asked.read and not parts:
        sys.exit(f"nothing is kept under {asked.runs}; without --read it is measured")
    print(f"### For the README\n\n{quoted.markdown(parts)}")
    if absent := [name for name in QUOTED if name not in parts]:
        print(f"\nNot measured: {', '.join(absent)}.")
    sys.exit(0 if agreed and quoted.agreed(parts) else 1)


def _measured(asked: argparse.Namespace) -> bool:
    """Run the benchmarks and print their tables. Whether all variants agreed."""
    asked.runs.mkdir(parents=True, exist_ok=True)
    began = os.getloadavg()[0]
    told, agreed = [], True
    for name in asked.names or NAMES:
        file = asked.runs / f"{name}.json"
        file.unlink(missing_ok=True)  # one that fails shall not be quoted by its last figures
        command = [sys.executable, str(HERE / f"{name}.py")]
        command += ["--threads", str(asked.threads), "--json", str(file)]
        if name == "round":
            command.append(str(asked.runs / "round"))
        elif asked.passes:
            command += ["--passes", str(asked.passes)]
        if name == "generate":  # samples from the warm-up that `round` begins with
            command += ["--runs", str(asked.runs / "round")]
        print(f"{name} ...", file=sys.stderr, flush=True)
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        agreed &= ran.returncode == 0
        tables = ran.stdout.strip() or f"nothing: it ended with {ran.returncode}"
        (asked.runs / f"{name}.md").write_text(f"{tables}\n")
        told.append(f"### {name}\n\n{tables}\n")
    print(
        f"`python tests/benchmarks/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}` on "
        f"{kept.where()}; {on(asked.threads)}, load {began:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after\n",
        *told,
        sep="\n",
    )
    return agreed


if __name__ == "__main__":
    main()
