"""A past round judged once more: beside the first, never in its way, and what would change."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import pytest
from typer.testing import CliRunner, Result

from loop import config as configuration
from loop import run
from loop.cli import app
from loop.measure import correlation
from loop.rejudge import ranks
from loop.screen import figure
from runs import HERE, SCRIPTED, everything, go_on, scripted_toml, start
from store.database import Store

JUDGES = '''
from judges import PointwiseJudge


class Contrary(PointwiseJudge):
    """Wrong is 1."""

    def score(self, prompt, completion, policy, call):
        return float(completion.text != prompt.reference)


class Picky(PointwiseJudge):
    """Says nothing of one answer in five; right is 1, and it errs at one in four."""

    def __init__(self, errs: bool = True):
        self.errs = errs

    def score(self, prompt, completion, policy, call):
        if int(completion.text) % 5 == 0:
            return None
        right = completion.text == prompt.reference
        return float(right != (self.errs and int(completion.text) % 4 == 0))


class Flat(PointwiseJudge):
    """Says one of everything."""

    def score(self, prompt, completion, policy, call):
        return 1.0
'''
FEW = ["rounds=2", "generator.n=4", "evaluate.gate_prompts=8", "evaluate.test_prompts=8"]
FEW += ["gate.undecided=keep", "gate.patience=0"]
EXACT = f"{SCRIPTED}:Exact"


def type_(*arguments: object, typed: str = "", code: int = 0) -> Result:
    found = CliRunner().invoke(app, [str(each) for each in arguments], input=typed)
    assert found.exit_code == code, f"{found.exit_code}: {found.output}\n{found.exception}"
    return found


def answered(*arguments: object) -> Any:
    return json.loads(type_(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "judges.py").write_text(JUDGES)
    root, outcome = start(scripted_toml(folder), folder / "runs", FEW)
    assert outcome.code == 0, outcome.reason
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


@pytest.fixture
def contrary(finished: Path) -> str:
    return f"{finished.parent.parent / 'judges.py'}:Contrary"


@pytest.fixture
def picky(finished: Path) -> str:
    return f"{finished.parent.parent / 'judges.py'}:Picky"


def judgements(root: Path, judge: str) -> list[dict[str, Any]]:
    store = Store(root / "loop.db")
    found = store.query(
        "SELECT candidate_id, number, judgement.status, score, raw, value FROM judgement "
        "JOIN verdict USING (candidate_id, judge, round_id) "
        "JOIN round ON round.id = judgement.round_id "
        "WHERE judge LIKE :judge ORDER BY candidate_id, number",
        judge=f"{judge}%",
    )
    store.close()
    return found


def own_examples(root: Path) -> list[dict[str, Any]]:
    """Those of round 1."""
    rows = everything(root)
    [round] = [row["id"] for row in rows["round"] if row["number"] == 1]
    asked = {row["id"] for row in rows["asked"] if row["round_id"] == round}
    return [row for row in rows["example"] if row["asked_id"] in asked]


# Beside, never in the way


def test_another_judge_is_stored_beside_the_first_and_nothing_else_changes(
    root: Path, contrary: str
) -> None:
    before, told = everything(root), [answered("rounds", root), answered("show", 1, root)]
    why = answered("why", 1, root)
    found = answered("rejudge", root, 1, "--judge", contrary)
    after = everything(root)
    for table in before:
        if table not in ("judgement", "verdict", "health", "round"):
            assert before[table] == after[table], table
        elif table != "round":
            assert after[table][: len(before[table])] == before[table]
    new = after["judgement"][len(before["judgement"]) :]
    assert {row["judge"] for row in new} == {contrary}
    assert len(new) == 24 * 4 == found["tracks"]["main"]["candidates"]
    assert answered("rounds", root) == told[0]
    shown = answered("show", 1, root)
    again = shown["evaluating"].pop(f"rejudged:main:{contrary}")
    assert again == {"judged": 96, "verdicts": 96, "unscored": 0}
    shown["judges"] = [each for each in shown["judges"] if each["judge"] != contrary]
    assert shown == told[1]
    reasons = answered("why", 1, root)
    for side in reasons["candidates"]:
        assert [each["judge"] for each in side.pop("judgements")] == [contrary]
        assert [each["judge"] for each in side.pop("verdicts")] == [EXACT, contrary]
    for side in why["candidates"]:
        del side["judgements"], side["verdicts"]
    assert reasons == why
    assert "sound" in type_("verify", root).stdout


def test_verify_finds_a_judgement_that_the_round_did_not_count(root: Path, contrary: str) -> None:
    import sqlite3

    type_("rejudge", root, 1, "--judge", contrary)
    with sqlite3.connect(root / "loop.db") as database:
        database.execute(
            "DELETE FROM judgement WHERE id = (SELECT max(id) FROM judgement WHERE judge = ?)",
            [contrary],
        )
    told = type_("verify", root, code=4).stdout
    assert f"round 1, rejudged:main:{contrary}: says 96 judged, has 95" in told


def test_a_run_that_was_rejudged_goes_on_as_one_that_was_not(root: Path, contrary: str) -> None:
    other = Path(shutil.copytree(root, root.parent / "other", symlinks=True))
    type_("rejudge", root, 2, "--judge", contrary)
    type_("rejudge", root, 0 + 1, "--judge", contrary)
    for each in (root, other):
        config = configuration.change(run.stored_config(each), ["rounds=4"])
        run.update(each, config)
        assert go_on(each, config, run.load_roles(config)).code == 0
    one, two = everything(root), everything(other)
    numbered = {"judgement": "id", "verdict": "id", "health": "id"}
    for table in one:
        for found in (one, two):
            if table in numbered:
                found[table] = [row for row in found[table] if row["judge"] != contrary]
            for row in found[table]:
                for key in (numbered.get(table), "chosen_judgement_id", "rejected_judgement_id"):
                    row.pop(key or "", None)
                if table == "round":
                    own = {k: n for k, n in json.loads(row["counts"]).items() if k[:4] != "reju"}
                    row["counts"] = own
                if table == "run":
                    row.pop("changes")
        assert one[table] == two[table], table
    assert len(one["round"]) == 5


@pytest.mark.parametrize("when", ["inside", "after"])
def test_a_rejudging_that_is_killed_goes_on_with_the_batches_that_are_left(
    root: Path, contrary: str, when: str
) -> None:
    whole = Path(shutil.copytree(root, root.parent / "whole", symlinks=True))
    words = ["rejudge", str(root), "1", "--judge", contrary]
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import faults; "
        f"faults.kill_at('add_judgements', 2, {when!r}); "
        f"from loop.cli import app; app({words!r})"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(judgements(root, contrary)) == 32 * (1 if when == "inside" else 2)
    assert "has judged" in type_("diff", root, 1, code=2).stderr
    assert "sound" in type_("verify", root).stdout
    type_(*words)
    type_("rejudge", whole, "1", "--judge", contrary)
    assert judgements(root, contrary) == judgements(whole, contrary)
    assert "sound" in type_("verify", root).stdout


def test_a_judge_that_asks_the_model_of_its_round_asks_that_of_then(root: Path) -> None:
    skilful, before = f"{SCRIPTED}:Skilful", answered("rounds", root)
    type_("rejudge", root, 1, "--judge", skilful, "--model", "round")
    type_("rejudge", root, 2, "--judge", skilful, "--set", "judge.model=round")
    best = {
        number: max(row["score"] for row in judgements(root, skilful) if row["number"] == number)
        for number in (1, 2)
    }
    assert best == pytest.approx({1: 0.3, 2: 0.5})
    assert answered("rounds", root) == before  # what it sampled is none of the round's tokens
    [counts] = [
        found for name, found in answered("show", 1, root)["evaluating"].items() if "reju" in name
    ]
    assert counts["rejudge_tokens"] == 3 * 96


def test_tracks_are_judged_and_compared_each_by_itself(tmp_path: Path, contrary: str) -> None:
    file = scripted_toml(tmp_path, more="[track.second]\nprompts = 8\n")
    root, outcome = start(file, tmp_path / "runs", [*FEW, "rounds=1"])
    assert outcome.code == 0
    words = ["rejudge", root, 1, "--judge", contrary]
    assert list(answered(*words, "--track", "second")["tracks"]) == ["second"]
    assert "which judge beside" in type_("diff", root, 1, code=2).stderr
    assert list(answered("diff", root, 1, "--track", "second")["tracks"]) == ["second"]
    assert list(answered(*words)["tracks"]) == ["main", "second"]
    found = answered("diff", root, 1)["tracks"]
    assert [sum(found[name]["changes"].values()) for name in ("main", "second")] == [24, 8]
    assert "already judged" in type_(*words, code=2).stderr
    assert "sound" in type_("verify", root).stdout


def test_a_model_that_is_gone_is_named(root: Path) -> None:
    shutil.rmtree(root / "checkpoints" / "round-0001-policy")
    told = type_("rejudge", root, 2, "--judge", f"{SCRIPTED}:Skilful", "--model", "round", code=2)
    assert "round-0001-policy, which cannot be used: its folder is not there" in told.stderr
    assert "--model checkpoint:PATH" in told.stderr


def test_the_other_judge_may_be_a_person(root: Path) -> None:
    words = ["rejudge", root, 1, "--judge", "judges.human:Human", "--set", "judge.high=1"]
    told = type_(*words, typed="1\n" * 40 + "q\n", code=5)
    assert "loop: 56 answers of round 1, track main, still wait" in told.stderr
    said = type_(*words, typed="0\n" * 56).stdout
    assert "96 answers judged by both" in said
    assert len(judgements(root, "judges.human:Human")) == 96


def test_a_judge_can_come_from_a_file_of_settings(root: Path, picky: str, tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text(f'[judge]\nuse = "{picky}"\nerrs = false\n')
    one = answered("rejudge", root, 1, "--judge-config", tmp_path / "other.toml")
    two = answered("rejudge", root, 1, "--judge", picky, "--set", "judge.errs=true")
    labels = [each["tracks"]["main"]["judges"][1]["judge"] for each in (one, two)]
    assert labels[0] != labels[1]
    assert labels[0].startswith(f"{picky}#")
    assert one["tracks"]["main"]["judges"][1]["unscored"] > 0
    assert one["tracks"]["main"]["alike"] == 1.0
    assert two["tracks"]["main"]["alike"] < 1.0
    told = type_("diff", root, 1, code=2).stderr
    assert f"which judge beside {EXACT} in round 1" in told
    assert labels[0] in told
    assert "can be any of" in type_("diff", root, 1, "Picky", code=2).stderr
    sides = answered("diff", root, 1, *labels)["tracks"]["main"]["judges"]
    assert sides == labels


# Mistakes


def test_mistakes_are_answered_with_what_would_be_right(root: Path, contrary: str) -> None:
    def refused(*words: object) -> str:
        return type_(*words, code=2).stderr

    assert "which judge?" in refused("rejudge", root, 1)
    assert "had itself" in refused("rejudge", root, 1, "--judge", EXACT)
    assert "no round 9" in refused("rejudge", root, 9, "--judge", contrary)
    assert "round 0 has no track" in refused("rejudge", root, 0, "--judge", contrary)
    assert "no round" in refused("rejudge", root, "--judge", contrary)
    assert "takes [RUN] ROUND" in refused("rejudge", root, 1, 2, "--judge", contrary)
    assert "main" in refused("rejudge", root, 1, "--judge", contrary, "--track", "mian")
    assert "no judge named 'rubrik'" in refused("rejudge", root, 1, "--judge", "rubrik")
    assert "no option 'x'" in refused("rejudge", root, 1, "--judge", contrary, "--set", "judge.x=1")
    told = refused("rejudge", root, 1, "--judge", contrary, "--set", "rounds=9")
    assert "found 'rounds=9'" in told
    assert f"`loop rejudge {root} 1 --judge NAME` adds one" in refused("diff", root, 1)
    type_("rejudge", root, 1, "--judge", contrary)
    told = refused("rejudge", root, 1, "--judge", contrary)
    assert f"already judged by {contrary}" in told
    assert f"`loop diff {root} 1`" in told
    assert "no judge named 'Nobody'" in refused("diff", root, 1, "Nobody")
    assert "compared with itself" in refused("diff", root, 1, "Contrary", "Contrary")
    assert "two judges" in refused("diff", root, 1, "a", "b", "c")


def test_nobody_rejudges_what_somebody_drives_nor_a_round_that_is_not_over(
    root: Path, contrary: str, tmp_path: Path
) -> None:
    store = Store(root / "loop.db")
    assert store.take_lease("elsewhere:7:1.00", timeout=timedelta(0)) is None
    told = type_("rejudge", root, 1, "--judge", contrary, code=2).stderr
    assert "is being driven by process 7 on elsewhere" in told
    store.release_lease("elsewhere:7:1.00")
    store.close()
    assert judgements(root, contrary) == []
    (tmp_path / "half").mkdir()
    half, outcome = start(
        scripted_toml(tmp_path / "half"), tmp_path / "half" / "runs", [*FEW, "judge.fail_in=1"]
    )
    assert outcome.code == 4
    told = type_("rejudge", half, 1, "--judge", contrary, code=2).stderr
    assert f"round 1 of {half} is not over; `loop start {half}` goes on with it" in told


# What would change


def test_a_contrary_judge_turns_every_pair_around(root: Path, contrary: str) -> None:
    said = type_("rejudge", root, 1, "--judge", contrary).stdout
    assert "Pearson -1, Spearman -1" in said
    assert " 0.0% are ordered alike; 0 are told apart by one alone" in said
    assert f"next: loop diff {root} 1 {contrary}" in said
    found = answered("diff", root, 1)
    track = found["tracks"]["main"]
    examples = own_examples(root)
    changes = track["changes"]
    assert changes["turned"] == len({row["asked_id"] for row in examples}) > 0
    assert sum(changes.values()) == track["prompts"] == 24
    assert changes["kept"] == changes["gone"] == changes["new"] == changes["other"] == 0
    assert track["examples"] == [len(examples)] * 2
    shown = track["shown"][0]
    assert shown["a"]["examples"][0]["chosen"] == shown["b"]["examples"][0]["rejected"]
    assert shown["a"]["examples"][0]["chosen"] == shown["reference"]
    assert len(track["shown"]) == 3 < len(track["changed"]) == changes["turned"]
    text = type_("diff", root, 1, "Contrary").stdout
    assert f"{changes['turned']:>7,}  turned   chosen and rejected swapped" in text
    assert shown["messages"][0]["content"] in text


def test_the_first_judge_of_a_difference_is_the_rounds_own_examples(root: Path, picky: str) -> None:
    type_("rejudge", root, 1, "--judge", picky)
    before = everything(root)
    track = answered("diff", root, 1)["tracks"]["main"]
    assert everything(root) == before  # nothing is stored
    own = {row["asked_id"] for row in own_examples(root)}
    changes, changed = (
        track["changes"],
        {each["asked"]: each["change"] for each in track["changed"]},
    )
    assert sum(changes.values()) == 24
    assert changes["gone"] > 0
    assert len(own) == sum(changes[each] for each in ("kept", "turned", "other", "gone"))
    assert {id for id, change in changed.items() if change == "gone"} <= own
    assert not {id for id, change in changed.items() if change == "new"} & own
    gone = next(each for each in track["shown"] if each["change"] == "gone")
    assert gone["b"]["examples"] == []
    assert gone["b"]["reason"] in ("unjudged", "all right", "all wrong", "too few candidates")
    back = answered("diff", root, 1, "Picky", "Exact")["tracks"]["main"]["changes"]
    assert (back["new"], back["gone"]) == (changes["gone"], changes["new"])
    assert {k: back[k] for k in ("kept", "turned", "other", "neither")} == {
        k: changes[k] for k in ("kept", "turned", "other", "neither")
    }


def test_agreement_is_what_the_definitions_say(root: Path, picky: str) -> None:
    found = answered("rejudge", root, 1, "--judge", picky)["tracks"]["main"]
    scores: dict[int, dict[str, Any]] = {}
    groups: dict[int, list[int]] = {}
    asked = {row["id"]: row["asked_id"] for row in everything(root)["candidate"]}
    for judge in (EXACT, picky):
        for row in judgements(root, judge):
            scores.setdefault(row["candidate_id"], {})[judge] = row["score"]
    both = {
        id: (own[EXACT], own[picky]) for id, own in scores.items() if own.get(picky) is not None
    }
    for id in both:
        groups.setdefault(asked[id], []).append(id)
    pairs = [
        (both[a][0] - both[b][0], both[a][1] - both[b][1])
        for ids in groups.values()
        for a in ids
        for b in ids
        if a < b
    ]
    apart = [a * b > 0 for a, b in pairs if a * b]
    assert found["both"] == len(both)
    assert found["judges"][1]["unscored"] == 96 - len(both)
    assert (found["pairs"], found["alike"]) == (len(apart), sum(apart) / len(apart))
    assert found["one_sided"] == sum((a == 0) != (b == 0) for a, b in pairs)
    known = numpy.corrcoef(numpy.array(list(both.values())).T)[0, 1]
    assert found["pearson"] == pytest.approx(known)


def test_correlations_agree_with_numpy_and_ranks_share_ties() -> None:
    chance = random.Random(0)
    pairs = [(chance.random(), chance.random()) for _ in range(50)]
    assert correlation(pairs) == pytest.approx(numpy.corrcoef(numpy.array(pairs).T)[0, 1])
    assert correlation([(1.0, 2.0), (1.0, 3.0)]) is None
    assert correlation([(1.0, 2.0)]) is None
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert figure(None) == "-"


def test_an_alarm_hears_no_judge_that_came_afterwards(root: Path, contrary: str) -> None:
    flat = f"{contrary.rpartition(':')[0]}:Flat"
    config = configuration.change(run.stored_config(root), ["rounds=3", "alarms.stop=['modal']"])
    run.update(root, config)
    assert "alarm" not in type_("rejudge", root, 2, "--judge", flat).stderr
    assert go_on(root, config, run.load_roles(config)).code == 0
    assert len(everything(root)["round"]) == 4
