"""How well each judge agrees with the truth: `agreement.py FOLDER [--quick]` prints one table.

Answers of known worth (labelled.py) go through every judge of the shelf. Those that ask a model do
it twice, with the policy of a default run and with a small model trained to judge (judges.toml);
and once more through a server that keeps to their form or does not, as it is told: there what is
counted is whether each verdict has the status that it is to have. The runs are made in FOLDER
where they are not there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

from labelled import (
    SEED,
    LabelledSet,
    as_bytes,
    judgements,
    maths,
    programs,
    spelling,
    write_references,
)
from measures import HEADS, row
from served import served_rows

from judges import Models
from loop import meant
from roles import plugins
from roles.policy.transformers import TransformersEngine
from roles.protocols import Policy
from store.records import Checkpoint

HERE = Path(__file__).parent
PROMPTS = Path(sys.modules["judges"].__file__ or "").parent


@dataclass(frozen=True)
class Sizes:
    """Questions of each labelled set."""

    spelling: int = 60
    judgements: int = 40
    maths: int = 120
    programs: int = 3
    """Of each task."""
    served: int = 12


QUICK = Sizes(spelling=6, judgements=4, maths=8, programs=1, served=3)


# The judges, with what makes each fit for so small a model: a text of a few words, fences without
# a nonce, and room for no more than a judgement of its form.


def brief(name: str, **more: Any) -> dict[str, Any]:
    one = {"temperature": 0.0, "max_tokens": 72}
    return {"prompt_path": PROMPTS / f"{name}_brief.txt", "nonce": False, **one, **more}


def asking(references: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name in the table -> which judge, and its options, for those that ask about spellings."""
    votes = {"temperature": 0.7}
    return {
        "rubric": ("rubric", brief("rubric", **votes)),
        "reference": ("reference", brief("reference", **votes)),
        "pairwise": ("pairwise", brief("pairwise")),
        "listwise": ("listwise", brief("listwise", max_tokens=144)),
        "mbr": ("mbr", brief("reference")),
        "consistency, model": ("consistency", {"by": "model", **brief("consistency")}),
        "meta_ranking": (
            "meta_ranking",
            brief("meta_ranking", references_path=references, max_tokens=80),
        ),
        "panel of three": (
            "panel",
            {
                "scale": "rank",
                "members": {
                    "rubric": {"use": "rubric", **brief("rubric", **votes)},
                    "reference": {"use": "reference", **brief("reference", **votes)},
                    "listwise": {"use": "listwise", **brief("listwise", max_tokens=144)},
                },
            },
        ),
    }


META = ("meta", brief("meta"))


# Judges that ask no model.


def plain_rows(sizes: Sizes) -> Iterator[list[str]]:
    """On numbers and formulas, on programs, and what came with the data."""
    numbers = maths(sizes.maths, SEED, as_bytes)
    for name, use, options in (
        ("verifier", "verifier", {}),
        ("math", "math", {}),
        ("consistency, exact", "consistency", {"by": "exact"}),
        ("mbr, exact", "mbr", {"utility": "exact"}),
        ("mbr, rouge_l", "mbr", {"utility": "rouge_l"}),
        (
            "panel of three",
            "panel",
            {
                "scale": "rank",
                "members": {
                    "math": {"use": "math"},
                    "consistency": {"use": "consistency"},
                    "mbr": {"use": "mbr", "utility": "rouge_l"},
                },
                "min_members": 1,
            },
        ),
    ):
        yield row(name, "–", plugins.load("judge", use, options), numbers)
    written = programs(sizes.programs, SEED, as_bytes)
    yield row("code", "–", plugins.load("judge", "code", {}), written)
    words = spelling(sizes.spelling, SEED, as_bytes)
    yield row("recorded", "–", plugins.load("judge", "recorded", {}), recorded(words))


def recorded(labelled: LabelledSet) -> LabelledSet:
    """The same answers, their labels beside the question."""
    groups = []
    for group in labelled.groups:
        rows = [
            {"completion": one.text, "label": labelled.kinds[one.id] == "right"}
            for one in group.candidates
        ]
        groups.append(replace(group, prompt=replace(group.prompt, columns={"recorded": rows})))
    return replace(labelled, groups=tuple(groups))


# Judges that ask a model, with models of this machine.


def model_rows(
    asks: str, policy: Policy, sizes: Sizes, folder: Path, learnt: frozenset[str]
) -> Iterator[list[str]]:
    words = spelling(sizes.spelling, SEED, policy.write, learnt)
    known = write_references(folder / "references.jsonl", words, learnt)
    for name, (use, options) in asking(known).items():
        yield row(name, asks, plugins.load("judge", use, options), words, policy)
    judged = judgements(sizes.judgements, SEED, policy.write, learnt)
    yield row("meta", asks, plugins.load("judge", *META), judged, policy)


@dataclass(frozen=True)
class Made:
    """The runs that the table rests on, finished."""

    default: Path
    judge: Path
    reward: Path


def make(folder: Path) -> Made:
    """What is not there yet is made: minutes on a core."""
    folder.mkdir(parents=True, exist_ok=True)
    default = _run(folder / "default", "--recipe", "default")
    judge = _run(folder / "judge", "--config", str(HERE / "judges.toml"))
    reward = folder / "reward"
    if not reward.exists():
        # Of its own learning rate, 1e-5, so small a model learns nothing in one epoch.
        sets = ("--set", "learning_rate=1e-3", "--set", "epochs=3")
        _loop("judges", "train", str(default), str(reward), *sets)
    return Made(default, judge, reward)


def _run(runs: Path, *options: str) -> Path:
    def done() -> list[Path]:
        found = [path.parent for path in sorted(runs.glob("*/loop.db"))]
        return [root for root in found if _status(root) in ("done", "stopped")]

    if not done():
        _loop("start", *options, "--set", f"seed={SEED}", "--runs", str(runs))
    return done()[0]


def _status(root: Path) -> str | None:
    with meant.opened(root) as store:
        run = store.run()
        return None if run is None else run.status


def _loop(*command: str) -> None:
    print(f"loop {' '.join(command)}", file=sys.stderr, flush=True)
    ended = subprocess.run([sys.executable, "-m", "loop", *command], stdout=sys.stderr).returncode
    if ended not in (0, 3):  # 3: stopped by a rule, as a run is whose rounds do not gain
        raise SystemExit(ended)


def learnt_from(*roots: Path) -> frozenset[str]:
    """Digests of the questions that some model of these runs has learnt from."""
    found = set[str]()
    for root in roots:
        with meant.opened(root) as store:
            for each in store.query("SELECT digest, columns FROM prompt WHERE split = 'train'"):
                columns = each["columns"]
                if isinstance(columns, str):
                    columns = json.loads(columns)
                found |= {each["digest"], columns.get("question_digest", each["digest"])}
    return frozenset(found)


def checkpoint(root: Path, which: str) -> Checkpoint:
    with meant.opened(root) as store:
        return meant.checkpoint(store, "policy", which)


def trained_rows(made: Made, sizes: Sizes, folder: Path) -> Iterator[list[str]]:
    """With the policy of the default run, and with the small judge."""
    engine = TransformersEngine(device="cpu")
    learnt = learnt_from(made.default, made.judge)
    best = engine.open(checkpoint(made.default, "best"))
    base = engine.open(checkpoint(made.default, "base"))
    small = engine.open(checkpoint(made.judge, "base"))
    yield from model_rows("small judge", small, sizes, folder, learnt)
    yield from model_rows("default run", best, sizes, folder, learnt)
    words = spelling(sizes.spelling, SEED, best.write, learnt)
    judge = plugins.load("judge", "implicit_reward", {})
    models = Models(best, {"checkpoint:base": base})
    yield row("implicit_reward", "default run, its warm-up", judge, words, models)
    judge = plugins.load("judge", "reward_model", {"path": str(made.reward), "device": "cpu"})
    yield row("reward_model", "trained on the default run", judge, words)


def main(folder: Path, sizes: Sizes) -> None:
    made = make(folder)
    began = time.monotonic()
    print(f"| {' | '.join(HEADS)} |")
    print(f"|{'---|' * len(HEADS)}", flush=True)
    parts: list[Callable[[], Iterator[list[str]]]] = [
        lambda: plain_rows(sizes),
        lambda: trained_rows(made, sizes, folder),
        lambda: served_rows(sizes.served, folder),
    ]
    for cells in chain.from_iterable(part() for part in parts):
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s, the runs aside", file=sys.stderr)


if __name__ == "__main__":
    quick = "--quick" in sys.argv[1:]
    [into] = [each for each in sys.argv[1:] if each != "--quick"]
    main(Path(into), QUICK if quick else Sizes())
