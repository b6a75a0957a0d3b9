"""What variants took, as a table: each beside the baseline, and a ratio for the same work alone.

A ratio is how many times what another row takes: the quotient of the shortest passes, with the
quotient of the medians and the range over passes taken one after the other. Where each pass was of
a seed of its own, which is other work, it is the quotient of the sums, beside the median of the
seeds' own ratios. A row whose figures differ from the baseline's by more than the relative
tolerance (a list: in any entry, if the tolerance is 0) has none. A row without figures is a limit,
not a peer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

Figures = dict[str, Any]
"""Name -> a number, or a list of numbers such as token ids."""


@dataclass(frozen=True)
class Ratio:
    """How many times what another row takes."""

    time: float
    of_medians: float
    range: tuple[float, float]
    memory: float | None = None
    cpu: float | None = None
    cpu_range: tuple[float, float] | None = None


@dataclass
class Row:
    """One variant. No seconds: it was unavailable or stopped, as `note` says."""

    variant: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Of a processor, where that was measured as well."""
    memory_mib: float = math.nan
    memory_by: str = ""
    figures: Figures | None = None
    note: str = ""
    ratio: Ratio | None = None
    """To the baseline, whose work it did."""
    disagrees: bool = False
    by_seed: bool = False
    """Its passes were of one seed each, in the order of all other rows."""
    held_mib: float = math.nan
    """By the process before the first pass: models, torch itself."""

    def over(self, other: Row) -> Ratio:
        whole = sum if self.by_seed else min
        pairs = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        medians = median(self.seconds) / median(other.seconds)
        cpu, cpu_range = None, None
        if other.cpu_seconds:
            cpu = whole(self.cpu_seconds) / whole(other.cpu_seconds)
            of_cpu = [a / b for a, b in zip(self.cpu_seconds, other.cpu_seconds, strict=True)]
            cpu_range = (min(of_cpu), max(of_cpu))
        return Ratio(
            time=whole(self.seconds) / whole(other.seconds),
            of_medians=median(pairs) if self.by_seed else medians,
            range=(min(pairs), max(pairs)),
            memory=self.memory_mib / other.memory_mib if other.memory_mib > 0 else None,
            cpu=cpu,
            cpu_range=cpu_range,
        )

    @property
    def took(self) -> float:
        """Seconds: the shortest pass, or the mean over seeds."""
        return mean(self.seconds) if self.by_seed else min(self.seconds)

    def hold(self, baseline: Row, agree: Mapping[str, float]) -> None:
        """Fill in the ratio, if this did the same work as the baseline.

        agree: figure -> relative tolerance.
        """
        if not self.seconds or not baseline.seconds:
            return
        if self.figures is None:
            self.note = "a limit: no figures to agree in"
        elif baseline.figures is None:
            raise ValueError(f"the baseline {baseline.variant!r} has no figures to agree with")
        else:
            off = list(differences(self.figures, baseline.figures, agree))
            self.disagrees, self.note = bool(off), "; ".join(off)
        if not self.disagrees:
            self.ratio = self.over(baseline)

    def line(self) -> str:
        cells = [_took(self.took) if self.seconds else "-"]
        memory = "-"
        if self.ratio is None:
            cells += ["-", "-"]
        else:
            low, high = self.ratio.range
            cells.append(f"{self.ratio.time:.2f}×")
            cells.append(f"{self.ratio.of_medians:.2f}; {low:.2f} to {high:.2f}")
            memory = times(self.ratio.memory)
        cells += [mib(self.held_mib), mib(self.memory_mib), memory]
        by = "" if self.memory_by in ("", "VmHWM") else f"memory by {self.memory_by}"
        cells.append("; ".join(filter(None, [self.note, by])))
        return f"| {self.variant} | {' | '.join(cells)} |"


@dataclass(frozen=True)
class Table:
    title: str
    baseline: str
    threads: int
    load: tuple[float, float]
    """The machine's load over a minute, before and after."""
    rows: list[Row]
    quoted: dict[str, str] = field(default_factory=dict)
    """What the README says of it: variant -> the row of ours that it is held to there."""

    @property
    def agreed(self) -> bool:
        return not any(row.disagrees for row in self.rows)

    @property
    def noisy(self) -> bool:
        return max(self.load) > self.threads + 0.5

    def __getitem__(self, variant: str) -> Row:
        [row] = [each for each in self.rows if each.variant == variant]
        return row

    def markdown(self) -> str:
        before, after = self.load
        noise = ", NOISY: other work ran beside it" if self.noisy else ""
        lines = [
            f"**{self.title}** ({on(self.threads)}, load {before:.1f} before, {after:.1f} after"
            f"{noise})",
            "",
            f"| variant | time | time / {self.baseline} | medians; pairs | held MiB | "
            f"passes MiB | memory / {self.baseline} | |",
            "|---|--:|--:|--:|--:|--:|--:|---|",
        ]
        return "\n".join([*lines, *(row.line() for row in self.rows)])


def differences(own: Figures, wanted: Figures, agree: Mapping[str, float]) -> Iterator[str]:
    """What to say of each figure that is farther off than its tolerance."""
    for name, tolerance in agree.items():
        a, b = own[name], wanted[name]
        many, others = (a, b) if isinstance(a, list) else ([a], [b])
        if len(many) != len(others):
            yield f"DISAGREES: {len(many)} {name}, the baseline has {len(others)}"
        far = [
            (x, y)
            for x, y in zip(many, others, strict=False)
            if not abs(x - y) <= tolerance * max(abs(y), 1e-12)
        ]
        if far:
            x, y = far[0]
            of = f" at {len(far)} of {len(many)} places, first" if len(many) > 1 else ""
            yield f"DISAGREES: {name}{of} {x:.6g}, the baseline has {y:.6g}"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}×"


def mib(amount: float) -> str:
    return "-" if math.isnan(amount) else f"{amount:.0f}"


def on(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def _took(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1000 * seconds:.2f} ms"
