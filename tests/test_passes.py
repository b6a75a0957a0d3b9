"""The harness of the benchmarks, with variants whose differences are known."""

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
import table  # noqa: E402


def sleeping(seconds: float) -> passes.Pass:
    """Of a known time, whatever runs beside it."""
    import time

    return passes.Pass(lambda: time.sleep(seconds), lambda: {"entry": 1.0, "tokens": [1, 2, 3]})


def allocating(mib: int, held: int = 0) -> passes.Pass:
    """Needs `mib` while it runs, beside `held` that it has from its set-up."""
    import torch

    kept = torch.ones(held, 2**18)

    def run() -> float:
        return float(torch.ones(mib, 2**18).sum() + kept.numel())

    return passes.Pass(run, lambda: {"entry": 1.0})


def limit() -> passes.Pass:
    return passes.Pass(sleeping(0.05).run)


def counted(entry: int) -> passes.Pass:
    """Needs no torch, so it is quick to begin."""
    return passes.Pass(lambda: sum(range(1000)), lambda: {"entry": entry})


def threads() -> passes.Pass:
    import torch

    return passes.Pass(lambda: None, lambda: {"entry": torch.get_num_threads()})


def endless() -> passes.Pass:
    import time

    return passes.Pass(lambda: time.sleep(60), lambda: {"entry": 1.0})


def absent() -> passes.Pass:
    raise passes.Unavailable("needs another machine")


def failing() -> passes.Pass:
    raise ZeroDivisionError("a bug")


def tables(settings: passes.Settings) -> Iterator[passes.Table]:
    of = {"one": (counted, {"entry": 512}), "off": (counted, {"entry": 513})}
    yield passes.compare("a", of, baseline="one", agree={"entry": 0.01}, settings=settings)
    yield passes.compare("b", of, baseline="one", agree={"entry": 1e-6}, settings=settings)


def time(row: table.Row) -> float:
    assert row.ratio is not None
    return row.ratio.time


def test_twice_the_time_is_a_ratio_of_two_and_a_limit_is_marked_as_one() -> None:
    found = passes.compare(
        "naps",
        {
            "short": (sleeping, {"seconds": 0.1}),
            "long": (sleeping, {"seconds": 0.2}),
            "limit": limit,
        },
        baseline="short",
        agree={"entry": 0.0, "tokens": 0.0},
    )
    assert found.agreed
    assert [len(row.seconds) for row in found.rows] == [5, 5, 5]
    assert time(found["short"]) == 1.0
    assert 1.8 < time(found["long"]) < 2.2
    assert "a limit" in found["limit"].note
    assert "a limit" not in found.markdown().split("| long |")[1].splitlines()[0]


def test_memory_is_that_of_the_passes_and_not_of_the_set_up() -> None:
    of = passes.compare(
        "memory",
        {
            "little": (allocating, {"mib": 50, "held": 300}),
            "much": (allocating, {"mib": 200}),
        },
        baseline="little",
        agree={"entry": 0.0},
        passes=2,
    )
    assert of["much"].memory_by == "VmHWM"
    assert 45 < of["little"].memory_mib < 75
    assert of["little"].held_mib > of["much"].held_mib + 290
    assert f"| {of['little'].held_mib:.0f} | {of['little'].memory_mib:.0f} |" in of.markdown()
    assert 195 < of["much"].memory_mib < 225
    ratio = of["much"].ratio
    assert ratio is not None
    assert 2.5 < (ratio.memory or 0) < 5


def test_a_variant_that_is_stopped_or_absent_is_shown_with_its_reason_and_without_a_ratio() -> None:
    found = passes.compare(
        "reasons",
        {"ours": (counted, {"entry": 1}), "endless": endless, "absent": absent},
        baseline="ours",
        agree={"entry": 0.0},
        limit_s=2.0,
        passes=1,
    )
    assert found["endless"].note == "stopped after 2 s"
    assert found["absent"].note == "not to be had here: needs another machine"
    assert found["endless"].ratio is None
    assert found["absent"].ratio is None
    assert time(found["ours"]) == 1.0
    assert found.agreed


def test_no_turn_begins_once_passes_have_taken_enough() -> None:
    found = passes.compare(
        "slow",
        dict.fromkeys(("one", "other"), (sleeping, {"seconds": 0.3})),
        baseline="one",
        agree={"entry": 0.0},
        enough_s=0.7,
    )
    assert [len(row.seconds) for row in found.rows] == [2, 2]


def test_a_variant_has_the_threads_that_were_asked_for() -> None:
    [row] = passes.compare(
        "threads", {"threads": threads}, baseline="threads", agree={}, threads=2, passes=1
    ).rows
    assert row.figures == {"entry": 2}


def test_a_variant_that_fails_is_an_error_with_its_own_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)broken, set_up.*ZeroDivisionError: a bug"):
        passes.compare("bug", {"broken": failing}, baseline="broken", agree={})


def test_variants_that_disagree_get_no_ratio_and_the_command_fails(tmp_path: Path) -> None:
    written = tmp_path / "tables.json"
    ran = subprocess.run(
        [sys.executable, __file__, "--passes", "2", "--json", str(written)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 1, ran.stderr
    loose, strict = kept.read(written).tables
    assert [row.ratio is None for row in loose.rows] == [False, False]
    assert [row.ratio is None for row in strict.rows] == [False, True]
    assert strict["off"].note == "DISAGREES: entry 513, the baseline has 512"
    assert "DISAGREES: entry 513" in ran.stdout
    assert "1 thread, load" in ran.stdout


def test_lists_that_differ_in_one_entry_or_in_length_disagree() -> None:
    wanted = {"tokens": [1, 2, 3]}
    assert not list(table.differences({"tokens": [1, 2, 3]}, wanted, {"tokens": 0.0}))
    [one] = table.differences({"tokens": [1, 2, 4]}, wanted, {"tokens": 0.0})
    assert one == "DISAGREES: tokens at 1 of 3 places, first 4, the baseline has 3"
    [shorter] = table.differences({"tokens": [1, 2]}, wanted, {"tokens": 0.0})
    assert shorter == "DISAGREES: 2 tokens, the baseline has 3"


def test_a_figure_that_is_not_a_number_never_agrees() -> None:
    nan = float("nan")
    [said] = table.differences({"loss": nan}, {"loss": 1.0}, {"loss": 1.0})
    assert said == "DISAGREES: loss nan, the baseline has 1"
    assert list(table.differences({"loss": nan}, {"loss": nan}, {"loss": 1.0}))


def test_a_loaded_machine_is_named_in_the_heading() -> None:
    quiet = table.Table("t", "ours", 1, (0.2, 1.2), [])
    noisy = table.Table("t", "ours", 1, (0.2, 1.7), [])
    assert "NOISY" not in quiet.markdown()
    assert "NOISY" in noisy.markdown()


if __name__ == "__main__":
    passes.main(tables)
