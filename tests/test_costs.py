"""The README's table of costs, made of what real comparisons leave behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import kept  # noqa: E402
import passes  # noqa: E402
import quoted  # noqa: E402
from table import Row, Table  # noqa: E402


def sleeping(milliseconds: int, entry: int = 1) -> passes.Pass:
    import time

    return passes.Pass(lambda: time.sleep(milliseconds / 1000), lambda: {"entry": entry})


def limit() -> passes.Pass:
    return passes.Pass(sleeping(5).run)


def absent() -> passes.Pass:
    raise passes.Unavailable("needs another machine")


def tables(settings: passes.Settings) -> Iterator[passes.Table]:
    names = ("twice", "limit", "off", "absent")
    yield passes.compare(
        "naps",
        {
            "ours": (sleeping, {"milliseconds": 20}),
            "ours, longer": (sleeping, {"milliseconds": 80}),
            "twice": (sleeping, {"milliseconds": 40}),
            "limit": limit,
            "off": (sleeping, {"milliseconds": 20, "entry": 2}),
            "absent": absent,
            "private": (sleeping, {"milliseconds": 1}),
        },
        baseline="ours",
        agree={"entry": 0.0},
        settings=settings,
        quoted=dict.fromkeys(names, "ours"),
    )
    yield passes.compare(
        "long naps",
        {
            "ours": (sleeping, {"milliseconds": 20}),
            "ours, longer": (sleeping, {"milliseconds": 80}),
            "twice": (sleeping, {"milliseconds": 40}),
        },
        baseline="ours",
        agree={"entry": 0.0},
        settings=settings,
        quoted={"twice": "ours, longer"},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of costs.py in which one benchmark has left its file."""
    folder = tmp_path_factory.mktemp("costs")
    asked = [__file__, "--passes", "2", "--json", str(folder / "head.json")]
    ran = subprocess.run([sys.executable, *asked], capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr  # one variant disagrees
    return folder


def lines(markdown: str) -> dict[tuple[str, str], list[str]]:
    """The table's rows: what, against -> time, spread, memory."""
    rows = [line[2:-2].split(" | ") for line in markdown.splitlines() if line[:1] == "|"]
    found, what = {}, ""
    for row in rows[2:]:
        what = row[0] or what
        found[what, row[1]] = row[2:]
    return found


def test_the_table_has_the_rows_that_are_quoted_and_ratios_where_figures_agreed(
    runs: Path,
) -> None:
    part = kept.read(runs / "head.json")
    found = lines(quoted.markdown({"head": part}))
    assert [against for _, against in found] == [
        *("twice", "limit", "off", "absent"),
        "twice, held to ours, longer",
    ]
    took, spread, _ = found["naps", "twice"]
    ratio = part.tables[0]["twice"].ratio
    assert ratio is not None
    assert took == f"{ratio.time:.2f}×"
    assert spread == "{:.2f} to {:.2f}".format(*ratio.range)
    assert 1.5 < ratio.time < 2.5
    assert float(found["naps", "limit"][0].rstrip("×")) < 0.8
    assert found["naps", "off"] == ["off: DISAGREES: entry 2, the baseline has 1", "-", "-"]
    assert found["naps", "absent"][0] == "absent: not to be had here: needs another machine"


def test_a_variant_is_held_to_the_row_of_ours_that_is_named(runs: Path) -> None:
    found = lines(quoted.markdown({"head": kept.read(runs / "head.json")}))
    took = found["long naps", "twice, held to ours, longer"][0]
    assert 0.35 < float(took.rstrip("×")) < 0.65


def test_reading_prints_the_table_again_and_says_what_is_missing(runs: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "costs.py"), "--read", "--runs", str(runs)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr
    assert quoted.markdown({"head": kept.read(runs / "head.json")}) in ran.stdout
    assert "Not measured: step, prefix, generate, scoring, round." in ran.stdout
    none = subprocess.run([*command, str(runs)], capture_output=True, text=True)
    assert "no benchmark" in none.stderr


def test_parts_of_different_machines_are_each_given_their_own() -> None:
    quiet = Table("t", "ours", 1, (0.0, 0.0), [])
    loud = Table("t", "ours", 2, (0.0, 9.0), [])
    one = quoted.markdown({"head": kept.Kept("here", [quiet]), "step": kept.Kept("here", [quiet])})
    assert one.startswith("On here; 1 thread.\n")
    two = quoted.markdown({"head": kept.Kept("here", [quiet]), "step": kept.Kept("there", [loud])})
    assert "\n\nAn excerpt. How many times" in one
    assert two.startswith(
        "On here; 1 thread: head.\nOn there; 2 threads: step.\n"
        "NOISY, other work ran beside: step.\n"
    )


def test_time_of_a_processor_is_told_where_it_was_measured() -> None:
    rows = [
        Row("ours", [1.0, 1.5], [0.5, 0.75], 100.0, figures={}),
        Row("theirs", [3.0, 3.0], [1.0, 1.0], 150.0, figures={}),
    ]
    for row in rows:
        row.hold(rows[0], {})
    table = Table("a round", "ours", 1, (0.0, 0.0), rows, {"theirs": "ours"})
    found = lines(quoted.markdown({"round": kept.Kept("here", [table])}))
    assert found["a round", "theirs"] == [
        "3.00× (2.00× by CPU)",
        "2.00 to 3.00 (1.33 to 2.00 by CPU)",
        "1.50×",
    ]


def test_passes_of_a_seed_each_are_compared_by_their_sums() -> None:
    """Not by their shortest, which are of two seeds here: 2 s of the first beside 5 s."""
    rows = [
        Row("ours", [2.0, 5.0, 4.0], [2.0, 5.0, 3.0], 100.0, by_seed=True, figures={}),
        Row("theirs", [8.0, 5.0, 9.0], [4.0, 5.0, 6.0], 150.0, by_seed=True, figures={}),
    ]
    for row in rows:
        row.hold(rows[0], {})
    ratio = rows[1].ratio
    assert ratio is not None
    assert ratio.time == 2.0  # (8 + 5 + 9) / (2 + 5 + 4), where the shortest say 2.5
    assert ratio.of_medians == 2.25  # of 4, 1 and 2.25
    assert (ratio.range, ratio.cpu, ratio.cpu_range) == ((1.0, 4.0), 1.5, (1.0, 2.0))
    table = Table("a round", "ours", 1, (0.0, 0.0), rows, {"theirs": "ours"})
    assert "| theirs | 7333.33 ms | 2.00× | 2.25; 1.00 to 4.00 |" in table.markdown()


if __name__ == "__main__":
    passes.main(tables)
