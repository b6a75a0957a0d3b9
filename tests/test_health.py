"""How judges' health is measured, and that each alarm rings for the judge it is meant for."""

import json
import math
from pathlib import Path

import pytest

from loop import config, run
from loop.context import Rows
from loop.health import measured, rung
from loop.settings import Alarms
from runs import go_on, loop, printed, scripted_toml, start
from store.database import Store
from store.records import Health

PLANTED = Path(__file__).with_name("planted_judges.py")
ANCHORS = "\n[evaluate.anchors]\nprompts = 30\n"
QUIET = "alarms.max_unscored=1.0"
BAD = {
    "modal": ("Five", ["filter.use=everything"]),
    "flips": ("FirstIsBetter", ["filter.use=best_worst", QUIET, "alarms.max_flips=0.3"]),
    "votes": ("Wavering", ["filter.use=right_wrong"]),
    "length": ("Longest", ["filter.use=best_worst"]),
    "kappa": ("Inverted", ["filter.use=best_worst"]),
    "agreement": ("Inverted", ["filter.use=best_worst"]),
    "drift": ("Moody", ["filter.use=best_worst"]),
}
"""Alarm -> the judge that rings it, and how it is set up."""


def planted(
    folder: Path, judge: str, sets: list[str], skill: float = 0.5
) -> tuple[Path, list[str]]:
    file = scripted_toml(folder, ANCHORS, skill=skill)
    # Sums on both sides of ten and a hundred, so that answers to one prompt differ in length.
    return file, ["rounds=2", "proposer.below=60", f"judge.use={PLANTED}:{judge}", *sets]


def health(root: Path) -> dict[tuple[int, str, str], float]:
    store = Store(root / "loop.db")
    found = store.query(
        "SELECT number, purpose, metric, value FROM health JOIN round ON round.id = round_id "
        "ORDER BY health.id"
    )
    store.close()
    return {(row["number"], row["purpose"], row["metric"]): row["value"] for row in found}


@pytest.mark.parametrize("alarm", BAD)
def test_each_alarm_is_said_and_the_run_goes_on(tmp_path: Path, alarm: str) -> None:
    file, sets = planted(tmp_path, *BAD[alarm])
    said = printed(file, tmp_path / "runs", sets)
    bound = f"alarms.m{'in' if alarm in ('votes', 'kappa', 'agreement') else 'ax'}_{alarm}"
    assert f"alarm {alarm}:" in said
    assert bound in said


@pytest.mark.parametrize("alarm", BAD)
def test_each_alarm_can_stop_the_run_which_goes_on_with_another_bound(
    tmp_path: Path, alarm: str
) -> None:
    file, sets = planted(tmp_path, *BAD[alarm])
    root, outcome = start(file, tmp_path / "runs", [*sets, f'alarms.stop=["{alarm}"]'])
    assert (outcome.code, outcome.status) == (3, "stopped")
    store = Store(root / "loop.db")
    decided = store.query("SELECT decision, reason FROM decision ORDER BY id DESC LIMIT 2")
    newest, rounds = store.checkpoints()[-1], len(store.rounds())
    store.close()
    assert decided[0] == {"decision": "stop", "reason": outcome.reason}
    if alarm in ("kappa", "agreement", "drift"):  # found out when it had taught already
        assert decided[1] == {"decision": "reject", "reason": outcome.reason}
        assert newest.status == "rejected"
    assert alarm in outcome.reason
    assert rounds <= 3
    settings = config.change(run.stored_config(root), ["alarms.stop=[]"])
    assert [each["key"] for each in run.update(root, settings)] == ["alarms.stop"]
    assert go_on(root, settings, run.load_roles(settings)).code == 0


def test_a_sound_judge_rings_nothing(tmp_path: Path) -> None:
    file = scripted_toml(tmp_path, ANCHORS)
    assert "alarm" not in printed(file, tmp_path / "runs", ["rounds=2"])


def test_a_judge_without_scores_stops_the_stage_before_it_commits_and_shows_what_it_said(
    tmp_path: Path,
) -> None:
    file, sets = planted(tmp_path, "Silent", ["filter.use=best_worst"], skill=0.2)
    root, outcome = start(file, tmp_path / "runs", sets)
    assert (outcome.code, outcome.status) == (4, "failed")
    assert "Silent' gave" in outcome.reason
    assert "alarms.max_unscored is 0.5" in outcome.reason
    assert outcome.reason.count("'None' (the judge gave no score)") == 3
    store = Store(root / "loop.db")
    (judged,) = store.query(
        "SELECT count(*) AS n FROM judgement JOIN candidate ON candidate.id = candidate_id "
        "JOIN asked ON asked.id = asked_id WHERE purpose = 'train'"
    )
    store.close()
    assert judged["n"] == 0
    settings = config.change(run.stored_config(root), [QUIET])
    run.update(root, settings)
    assert go_on(root, settings, run.load_roles(settings)).code == 0
    assert health(root)[1, "train", "unscored"] > 0.5
    verified = loop("verify", root)
    assert verified.returncode == 0, verified.stdout


def test_health_is_kept_for_every_judge_and_shown(tmp_path: Path) -> None:
    root, outcome = start(scripted_toml(tmp_path), tmp_path / "runs", ["rounds=1"])
    assert outcome.code == 0
    found = health(root)
    for purpose in ("train", "sampled", "greedy"):
        assert found[1, purpose, "unscored"] == 0.0
    assert 0.5 < found[1, "train", "modal"] < 1.0
    share = found[1, "train", "modal"]
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert found[1, "train", "entropy"] == pytest.approx(entropy)
    shown = loop("show", "1", root)
    assert "how judges did" in shown.stdout
    (row,) = [
        row
        for row in json.loads(loop("show", "1", root, "--json").stdout)["judges"]
        if row["purpose"] == "train"
    ]
    assert row["modal"] == pytest.approx(share)
    assert row["histogram"] == {
        "0": pytest.approx(row["n"] * (1 - row["score"])),
        "1": pytest.approx(row["n"] * row["score"]),
    }


def test_numbers_are_what_their_formulas_say(tmp_path: Path) -> None:
    file, sets = planted(tmp_path, "Wavering", ["rounds=1"])
    root, _ = start(file, tmp_path / "runs", sets)
    assert health(root)[1, "train", "votes"] == 0.0
    file, sets = planted(tmp_path, "Longest", ["rounds=1", "filter.use=best_worst"])
    root, _ = start(file, tmp_path / "runs", sets)
    assert health(root)[1, "train", "length"] == pytest.approx(1.0)
    file, sets = planted(tmp_path, "FirstIsBetter", ["rounds=1", "filter.use=best_worst", QUIET])
    root, _ = start(file, tmp_path / "runs", sets)
    store = Store(root / "loop.db")
    groups = store.groups(store.round(1).id, "main", "train")
    alike = total = 0
    for group in groups:
        marks = [one.text == group.prompt.reference for one in group.candidates]
        pairs = [(a, b) for n, a in enumerate(marks) for b in marks[n + 1 :]]
        alike += sum(a == b for a, b in pairs)
        total += len(pairs)
    rows = Rows(store.round(1), "main", "train")
    label = config.validate(store.run().config).track["main"].judge.label
    found = {each.metric: each for each in measured(store, rows, label)}
    store.close()
    assert found["flips"].value == pytest.approx(alike / total)
    assert found["flips"].n == total


def test_a_comparison_with_what_is_no_candidate_is_told_when_it_turns_with_the_order(
    tmp_path: Path,
) -> None:
    file, sets = planted(tmp_path, "Turning", ["rounds=1", "filter.use=right_wrong"])
    root, outcome = start(file, tmp_path / "runs", sets)
    assert outcome.code == 0, outcome.reason
    found = health(root)
    share = found[1, "train", "score"]  # right answers keep their place, and no other does
    assert found[1, "train", "flips"] == pytest.approx(1 - share)
    assert (1, "train", "votes") not in found


def test_alarms_ring_beyond_their_bounds_only() -> None:
    alarms = Alarms(max_modal=0.9, min_kappa=0.2)
    at = [Health(metric="modal", value=0.9, n=100), Health(metric="kappa", value=0.2, n=100)]
    beyond = [Health(metric="modal", value=0.91, n=100), Health(metric="kappa", value=0.19, n=100)]
    assert list(rung(alarms, at)) == []
    assert [bell for bell, _ in rung(alarms, beyond)] == ["modal", "kappa"]
    few = [Health(metric="length", value=1.0, n=4), Health(metric="votes", value=0.0, n=4)]
    assert list(rung(alarms, few)) == []
