"""How cost grows, one axis at a time from one centre: a training step, and sampling.

    python tests/benchmarks/growth.py [AXIS ...] [--passes 3] [--threads 1] [--json FILE]

The centre: a Llama of hidden size 256 with 4 layers and a vocabulary of 8,000, random weights; 2
prompts of 256 tokens; 8 candidates of each are sampled, 128 tokens long, and 2 of them are trained
on, as a pair. Every text has its full length.

A step is that of step.py: body, head, DPO loss and every gradient under bfloat16 autocast, and the
pass of the reference. TRL is its DPOTrainer as it comes. Along `candidates` all are trained on, as
half as many pairs. Sampling is that of generate.py (grouped heads, float32, temperature 1), beside
`generate` as it comes. A point that several axes have is measured once. No turn begins once passes
have taken 15 s together; a pass of more than --limit-s, 60, is stopped, and its row shown so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import generate
import passes
import step
import step_batch
import torch
from table import Row, Table, mib, on, times

CENTRE = {
    "prompts": 2,
    "candidates": 8,
    "prompt": 256,
    "completion": 128,
    "vocabulary": 8_000,
    "hidden": 256,
    "layers": 4,
}
AXES: dict[str, list[dict[str, int]]] = {
    "candidates": [{"candidates": n} for n in (2, 8, 32)],
    "prompt": [{"prompt": n} for n in (64, 256, 2048)],
    "completion": [{"completion": n} for n in (64, 128, 1024)],
    "vocabulary": [{"vocabulary": n} for n in (1_000, 8_000, 32_000, 128_000)],
    "parameters": [
        {"hidden": hidden, "layers": layers}
        for hidden, layers in ((64, 1), (256, 4), (512, 6), (768, 13))
    ],
}
ENOUGH_S = 15.0
HEADS = {
    "candidates": "candidates of a prompt",
    "prompt": "tokens of a prompt",
    "completion": "tokens of a completion",
    "vocabulary": "vocabulary",
    "parameters": "parameters",
}


@dataclass(frozen=True)
class Growth:
    """One axis: at each point, ours beside theirs."""

    title: str
    axis: str
    other: str
    points: list[tuple[str, Table]]
    limit_s: float

    @property
    def agreed(self) -> bool:
        return all(table.agreed for _, table in self.points)

    @property
    def noisy(self) -> bool:
        return any(table.noisy for _, table in self.points)

    def markdown(self) -> str:
        most = max(max(table.load) for _, table in self.points)
        noise = ", NOISY: other work ran beside it" if self.noisy else ""
        lines = [
            f"**{self.title}** ({on(self.points[0][1].threads)}, load up to {most:.1f}{noise})",
            "",
            f"| {HEADS[self.axis]} | ours | {self.other} | time / ours | pairs | passes | ours MiB "
            f"| {self.other} MiB | memory / ours | held before | |",
            "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
        ]
        return "\n".join([*lines, *(self._line(*point) for point in self.points)])

    def _line(self, place: str, table: Table) -> str:
        ours, theirs = table.rows
        found, pairs = theirs.ratio, "-"
        if found is not None:
            pairs = f"{found.range[0]:.2f} to {found.range[1]:.2f}"
        cells = [place, self._took(ours), self._took(theirs), times(found and found.time), pairs]
        cells.append(str(max(len(ours.seconds), len(theirs.seconds))))
        cells += [mib(ours.memory_mib), mib(theirs.memory_mib), times(found and found.memory)]
        cells.append(f"{mib(ours.held_mib)}; {mib(theirs.held_mib)}")
        notes = [row.note for row in table.rows if row.note and not _stopped(row)]
        return f"| {' | '.join(cells)} | {'; '.join(notes)} |"

    def _took(self, row: Row) -> str:
        if _stopped(row):
            return f"> {self.limit_s:g} s, stopped"
        return f"{min(row.seconds):.3g} s" if row.seconds else "-"


def _stopped(row: Row) -> bool:
    return not row.seconds and row.note.startswith("stopped")


def _step(axis: str, at: dict[str, int]) -> dict[str, Any]:
    return {
        "dtype": "bfloat16",
        "prompts": at["prompts"],
        "pairs": at["candidates"] // 2 if axis == "candidates" else 1,
        "prompt": [at["prompt"]] * 2,
        "answer": [at["completion"]] * 2,
        **_shape(at),
    }


def _sampling(axis: str, at: dict[str, int]) -> dict[str, Any]:
    return {
        "lengths": [at["prompt"]] * at["prompts"],
        "candidates": at["candidates"],
        "new": at["completion"],
        **_shape(at),
    }


def _shape(at: dict[str, int]) -> dict[str, int]:
    return {name: at[name] for name in ("vocabulary", "hidden", "layers")}


def _place(axis: str, at: dict[str, int]) -> str:
    if axis != "parameters":
        return f"{at[axis]:,}"
    with torch.device("meta"):
        count = step_batch.model(0, sizes=step_batch.Sizes(**_shape(at))).num_parameters()
    return f"{count / 1e6:.1f} M"


class Work(NamedTuple):
    """What is measured along axes: two set-up functions, and what each alone is told."""

    title: str
    other: str
    axes: tuple[str, ...]
    options: Callable[[str, dict[str, int]], dict[str, Any]]
    ours: Callable[..., passes.Pass]
    own: dict[str, Any]
    theirs: Callable[..., passes.Pass]
    their: dict[str, Any]
    agree: dict[str, float]


WORKS = (
    Work(
        "a DPO step with its reference",
        "TRL as it comes",
        tuple(AXES),
        _step,
        step.ours,
        {"reference": True},
        step.trl,
        {"tuned": False},
        {"loss": 0.03, "grad_norm": 0.03},
    ),
    Work(
        "sampling",
        "generate",
        ("candidates", "prompt", "completion"),
        _sampling,
        generate.ours,
        {},
        generate.generate,
        {},
        {"tokens": 0},
    ),
)


def growths(axes: Sequence[str], settings: passes.Settings) -> Iterator[Growth]:
    assert settings.limit_s is not None
    for work in WORKS:
        known: dict[str, Table] = {}
        for axis in (each for each in work.axes if each in axes):
            title, points = f"{work.title}, by {HEADS[axis]}", []
            for change in AXES[axis]:
                at = CENTRE | change
                of = work.options(axis, at)
                if (key := json.dumps(of)) not in known:
                    known[key] = passes.compare(
                        title,
                        {
                            "ours": (work.ours, of | work.own),
                            work.other: (work.theirs, of | work.their),
                        },
                        baseline="ours",
                        agree=work.agree,
                        settings=settings,
                    )
                points.append((_place(axis, at), known[key]))
            yield Growth(title, axis, work.other, points, settings.limit_s)


def main() -> None:
    parser = passes.parser(passes=3, limit_s=60.0)
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=", ".join(AXES))
    asked = parser.parse_args()
    if unknown := set(asked.axes) - set(AXES):
        sys.exit(f"no axis {', '.join(sorted(unknown))}; there are: {', '.join(AXES)}")
    settings = passes.Settings(asked.passes, asked.threads, asked.limit_s, ENOUGH_S)
    print(f"Centre: {_centre()}\n", flush=True)
    passes.show(growths(asked.axes or list(AXES), settings), asked.json)


def _centre() -> str:
    return (
        f"a Llama of {_place('parameters', CENTRE)} parameters (hidden {CENTRE['hidden']}, "
        f"{CENTRE['layers']} layers, vocabulary {CENTRE['vocabulary']:,}), {CENTRE['prompts']} "
        f"prompts of {CENTRE['prompt']} tokens; of each {CENTRE['candidates']} candidates of "
        f"{CENTRE['completion']} tokens are sampled (float32) and 2 trained on, as a pair "
        "(bfloat16 autocast); along candidates all are, as half as many pairs. MiB is the peak of "
        "passes, beyond what the process held before, ours; theirs: models, torch itself, and with "
        "TRL the second model that is its reference."
    )


if __name__ == "__main__":
    main()
