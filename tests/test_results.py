"""How recipes are put to the test: which runs are made, and what is read of them."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from loop import claims, config, lease, run, trials
from runs import HERE, SCRIPTED, scripted_toml, start
from scripted import write_model
from store.database import Store
from store.errors import UserError

sys.path.insert(0, str(HERE / "benchmarks"))

import results
import told
import trial_runs

RESULTS = HERE / "benchmarks" / "results.py"
TINY = (
    *("rounds=1", "prompts=24", "trainer.epochs=1", "warmup.prompts=1600", "warmup.generator.n=4"),
    *("evaluate.gate_prompts=16", "evaluate.test_prompts=24", "generator.n=8"),
    "evaluate.samples=4",  # both recipes measure alike, so they have one warm-up
)
OWN = """\
# Sums, by a model that is no neural network.
rounds = 1
trial = {trial}
control = ["rounds=2"]
plain = ["rounds=1"]
[[claim]]
says = "It gains"
{claim}
"""
SCORE = claims.Claim(says="It is so", metric="score")


# The trial itself, on two recipes


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """results.py on two recipes with few prompts, one seed, and before them on one that fails."""
    folder = tmp_path_factory.mktemp("results")
    broken = folder / "broken.toml"
    broken.write_text(
        'filter = "broken.py:Broken"\ncontrol = ["gate.patience=7"]\n'
        f"plain = ['filter=\"{folder / 'broken.py'}:Broken\"']\n"
        '[[claim]]\nsays = "x"\nmetric = "score"\n'
    )
    (folder / "broken.py").write_text(
        "class Broken:\n    def select(self, *_):\n        raise RuntimeError('it is broken')\n"
    )
    command = [sys.executable, str(RESULTS), str(broken), "irpo", "mbr-dpo", "--seeds", "100"]
    command += ["--runs", str(folder / "runs"), "--out", str(folder / "out")]
    command += [part for each in TINY for part in ("--set", each)]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(HERE.parent)}
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert ended.stderr.startswith(f"{broken}: ")
    assert "it is broken" in ended.stderr
    return folder, ended.stdout


def test_a_trial_tells_of_each_claim_what_the_runs_own_stores_say(tried: tuple[Path, str]) -> None:
    folder, printed = tried
    rows = json.loads((folder / "out" / "results.json").read_text())
    assert set(rows) == {"irpo", "mbr-dpo"}
    row = rows["irpo"]
    (root,) = (folder / "runs" / "irpo" / "recipe" / "seed-100").iterdir()
    store = Store(root / "loop.db")
    (accuracy,) = store.query(
        "SELECT value FROM evaluation WHERE split = 'test' AND metric = 'accuracy_sampled' "
        "AND checkpoint_id = :checkpoint",
        checkpoint=store.incumbent("policy").id,
    )
    (tokens,) = store.query(
        "SELECT sum(tokens) AS n FROM candidate JOIN asked ON asked.id = candidate.asked_id "
        "JOIN round ON round.id = asked.round_id WHERE number > 0 AND purpose = 'train'"
    )
    store.close()
    first, second = row["claims"][:2]
    assert first["ours"] == pytest.approx(accuracy["value"])
    assert first["low"] <= first["difference"] <= first["high"]
    assert row["variants"]["recipe"]["tokens"] == tokens["n"]
    assert second["against"] == "zero"
    assert second["items"] == 1
    assert {each["verdict"] for each in (first, second)} <= {"confirmed", "refuted", "undecided"}
    assert [line.split()[0] for line in printed.splitlines()] == ["irpo", "mbr-dpo"]


def test_all_runs_of_a_trial_begin_from_one_warm_up_and_answer_the_same_questions(
    tried: tuple[Path, str],
) -> None:
    folder, _ = tried
    began, asked = set(), set()
    for name in ("irpo", "mbr-dpo"):
        for variant in ("recipe", "control", "plain"):
            (root,) = (folder / "runs" / name / variant / "seed-100").iterdir()
            store = Store(root / "loop.db")
            began.add(store.beginning("policy").digest)
            held = [*store.prompts("gate"), *store.prompts("test")]
            asked.add(tuple(each.digest for each in held))
            store.close()
    assert len(began) == 1
    assert len(asked) == 1
    (warm,) = (folder / "runs" / "warm-ups").glob("*/*")
    store = Store(warm / "loop.db")
    learned = store.query(
        "SELECT digest FROM prompt JOIN asked ON asked.prompt_id = prompt.id "
        "WHERE purpose = 'train'"
    )
    store.close()
    assert not {row["digest"] for row in learned} & set(*asked)


def test_a_trial_that_is_begun_again_runs_nothing_anew(tried: tuple[Path, str]) -> None:
    folder, printed = tried
    databases = sorted(folder.glob("runs/**/loop.db"))
    written = [each.stat().st_mtime_ns for each in databases]
    command = [sys.executable, str(RESULTS), "irpo", "mbr-dpo", "--seeds", "100"]
    command += ["--runs", str(folder / "runs")]
    command += [part for each in TINY for part in ("--set", each)]
    again = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(HERE.parent)}
    )
    assert again.stdout == printed
    assert sorted(folder.glob("runs/**/loop.db")) == databases
    assert [each.stat().st_mtime_ns for each in databases] == written


def test_results_are_told_as_a_table_with_a_plot_of_each_recipe(tried: tuple[Path, str]) -> None:
    folder, _ = tried
    told = (folder / "out" / "RESULTS.md").read_text()
    for name in ("irpo", "mbr-dpo"):
        assert f"| [{name}](plots/{name}.svg) |" in told
        assert f"## {name}" in told
        assert "recipe" in (folder / "out" / "plots" / f"{name}.svg").read_text()
        for claim in claims.read(name).claim:
            assert claim.says in told


def test_rows_that_were_kept_are_told_as_when_they_were_new(tried: tuple[Path, str]) -> None:
    folder, _ = tried
    new = (folder / "out" / "RESULTS.md").read_text()
    assert told.markdown(told.kept(folder / "out")) == new


@pytest.mark.parametrize("more", [(), ("--seeds", "3", "100")])
def test_reported_seeds_are_not_run_before_the_claim_is_committed(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(OWN.format(trial=[], claim='metric = "score"'))
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    ended = subprocess.run(
        [sys.executable, str(RESULTS), "mine.toml", "--runs", str(tmp_path / "runs"), *more],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
    )
    assert ended.returncode == 2
    assert "results.py: commit these before their reported seeds run: mine.toml" in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_runs_that_generated_more_than_the_recipes_are_named(tried: tuple[Path, str]) -> None:
    folder, _ = tried
    rows = told.kept(folder / "out")
    own = rows["irpo"]["variants"]["recipe"]["tokens"]
    for name, share in (("control", 1.08), ("plain", 1.5)):
        rows["irpo"]["variants"][name]["tokens"] = round(own * share)
    said = told.markdown({"irpo": rows["irpo"]})
    assert "Generated tokens, against the recipe's: plain iterative DPO +50%." in said
    rows["irpo"]["variants"]["plain"]["tokens"] = own
    assert "Generated tokens, against" not in told.markdown({"irpo": rows["irpo"]})


# A recipe of one's own


def scripted_trial(folder: Path) -> list[str]:
    """Settings under which a run takes a second."""
    write_model(folder / "base", 0.3)
    return [
        *("prompts=24", "batch_prompts=8", "evaluate.gate_prompts=60", "evaluate.test_prompts=40"),
        *(f"{role}={SCRIPTED}:{name}" for role, name in PARTS.items()),
        f"model.path={folder / 'base'}",
    ]


PARTS = {
    "engine": "Engine",
    "proposer": "Sums",
    "judge": "Exact",
    "evaluate.judge": "Exact",
    "trainer": "Learner",
}


def tries(cwd: Path, *asked: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RESULTS), *asked],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
    )


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results.py on a recipe of one's own, and before it on one whose query gives an item twice."""
    folder = tmp_path_factory.mktemp("own")
    trial = json.dumps(scripted_trial(folder))
    twice = "query = \"SELECT 'a' AS item, tokens AS value FROM candidate\""
    (folder / "raft.toml").write_text(OWN.format(trial=trial, claim='metric = "score"'))
    (folder / "twice.toml").write_text(OWN.format(trial=trial, claim=twice))
    asked = ("--seeds", "100", "--runs", "runs", "--out", "out")
    ended = tries(folder, "twice.toml", "raft.toml", *asked)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    told = "twice.toml: claim 'It gains': its query gives item 'a' twice; "
    assert ended.stderr.startswith(told), ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout.startswith("raft ")
    return folder


def test_a_query_at_fault_costs_no_other_recipe_its_row(own: Path) -> None:
    rows = json.loads((own / "out" / "results.json").read_text())
    (key,) = rows
    assert key == config.recipe_key(str(own / "raft.toml"))
    assert not Path(key).is_absolute()
    said = (own / "out" / "RESULTS.md").read_text()
    assert said.startswith("# A tuning run\n\nOver seeds 100. It is no result")
    assert str(own).strip("/") not in said
    assert (own / "out" / "plots" / f"{told.plain_name(key)}.svg").is_file()


def test_a_recipe_of_ones_own_has_its_runs_wherever_it_is_named_from(own: Path) -> None:
    (own / "sub").mkdir()
    databases = sorted(own.glob("runs/**/loop.db"))
    ended = tries(own / "sub", "../raft.toml", "--seeds", "100", "--runs", "../runs")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert sorted(own.glob("runs/**/loop.db")) == databases


def test_runs_of_code_that_is_not_here_now_are_taken_and_named(own: Path) -> None:
    (recipe,) = own.glob("runs/raft-*/recipe/seed-100/*/loop.db")
    (warm,) = own.glob("runs/warm-ups/*/*/loop.db")
    before = [each.read_bytes() for each in (recipe, warm)]
    for each in (recipe, warm):
        with sqlite3.connect(each) as database:
            database.execute("UPDATE run SET versions = json_set(versions, '$.code', '0123456789')")
        database.close()
    ended = tries(own, "raft.toml", "--seeds", "100", "--runs", "runs", "--out", "other")
    for each, content in zip((recipe, warm), before, strict=True):
        each.write_bytes(content)
    assert ended.returncode == 0
    key = warm.parents[1].name
    by = "were made by other code than is here now and are taken as they are; remove a folder to"
    assert ended.stderr.splitlines() == [
        f"results.py: {key} in {own / 'runs' / 'warm-ups'} {by} run it anew",
        f"results.py: recipe/seed-100 in {recipe.parents[3]} {by} run it anew",
    ]
    said = (own / "other" / "RESULTS.md").read_text()
    assert "Its runs are of different code: 01234567 made recipe 100; " in said
    assert " made control 100, plain 100.\n" in said


def test_a_warm_up_that_was_left_is_gone_on_with_whoever_began_it(tmp_path: Path) -> None:
    names, warm_ups = [], []
    for name, rounds in (("raft", 1), ("band", 2)):
        file = tmp_path / f"{name}.toml"
        said = OWN.format(trial=json.dumps(scripted_trial(tmp_path)), claim='metric = "score"')
        file.write_text(said.replace("rounds = 1\n", f"rounds = {rounds}\n"))
        names.append(str(file))
    mine, band = (trials.variants(each, claims.read(each), ())[0] for each in names)
    place = tmp_path / "runs" / "warm-ups" / trial_runs.warm_up_key(mine.config(100))
    said = (*band.said, ("--set", ("gate.target=-1e9",)))
    settings = replace(band, said=said).config(100)
    begun = run.begin(settings, place, "band", run.load_roles(settings))
    with ThreadPoolExecutor(1) as pool:
        bench = trial_runs.Bench(tmp_path / "runs", pool)
        warm_ups = [bench.warm_up(each, 100).result() for each in (mine, band)]
    assert warm_ups == [begun, begun]
    assert list(place.iterdir()) == [begun]
    assert trial_runs.run_of(place) == trial_runs.Found(begun, True)


def test_what_runs_ends_with_results_and_goes_on_when_asked_again(tmp_path: Path) -> None:
    trial = [*scripted_trial(tmp_path), "trainer.steps=200", "trainer.seconds_a_step=0.5"]
    file = tmp_path / "raft.toml"
    file.write_text(OWN.format(trial=json.dumps(trial), claim='metric = "score"'))
    command = [sys.executable, str(RESULTS), str(file), "--seeds", "100"]
    roots = set()
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [*command, "--runs", str(tmp_path / "runs"), "--jobs", "1"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(HERE.parent)},
            # Who runs these tests in the background has it ignored, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        )
        driven = None
        while driven is None:
            assert process.poll() is None
            time.sleep(0.2)
            driven = next(trains(tmp_path / "runs"), None)
        (child,) = psutil.Process(process.pid).children()
        process.send_signal(number)
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 128 + number
        said = f"results.py: ended by {number.name}; it goes on when asked again\n"
        assert complaint == said
        assert not child.is_running()
        roots.add(driven)
    assert len(roots) == 1


def trains(runs: Path) -> Iterator[Path]:
    """The runs that train just now."""
    for database in runs.glob("raft-*/*/*/*/loop.db"):
        store = Store(database)
        found, rounds = store.run(), store.rounds()
        store.close()
        if found and lease.is_alive(found) and rounds[-1].stage == "train":
            yield database.parent


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["nothing.toml"], r"no recipe in nothing\.toml: there is no such file"),
        (["irp"], r"no recipe named 'irp'; did you mean 'irpo'"),
        (["arenas/spel"], r"no arena named 'spel'; did you mean 'spell'"),
        (["irpo", "--jobs", "0"], r"--jobs is at least 1, found 0"),
        (["bad.toml"], r"bad\.toml is not TOML"),
        (["irpo", "--seeds", "100", "--set", "rouns=1"], r"irpo, --set: no setting named 'rouns'"),
    ],
)
def test_a_mistake_is_a_sentence_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str], told: str
) -> None:
    (tmp_path / "bad.toml").write_text("x = = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["results.py", *asked])
    with pytest.raises(UserError, match=told):
        results.main()
    assert [each.name for each in tmp_path.iterdir()] == ["bad.toml"]


def test_a_mistake_has_no_traceback_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('control = ["rounds=1"]\n')
    ended = tries(tmp_path, "mine.toml", "--seeds", "100")
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("results.py: mine.toml, claim: ")
    assert not (tmp_path / "runs").exists()


# Which runs


def test_a_run_of_other_settings_is_not_the_one_that_is_wanted(tmp_path: Path) -> None:
    """Also where they are settings that may change in a run."""
    file, place = scripted_toml(tmp_path), tmp_path / "runs"
    root, _ = start(file, place, ["rounds=1"])
    found = trial_runs.run_of(place, config.read(file, sets=["rounds=1"]))
    assert found == trial_runs.Found(root, True)
    assert trial_runs.run_of(place) == found
    for other in ("rounds=2", "gate.patience=7", "gate.target=0.5", "trainer.step=0.1"):
        asked = config.read(file, sets=["rounds=1", other])
        assert trial_runs.run_of(place, asked) is None, other


@pytest.mark.parametrize(("key", "taken"), [("isolation", True), ("rounds", False)])
def test_a_run_from_before_there_was_a_setting_is_the_one_that_is_wanted(
    tmp_path: Path, key: str, taken: bool
) -> None:
    file = scripted_toml(tmp_path)
    root, _ = start(file, tmp_path / "runs", ["rounds=1"])
    with closing(sqlite3.connect(root / "loop.db")) as raw, raw:
        raw.execute(f"UPDATE run SET config = json_remove(config, '$.{key}')")
    found = trial_runs.run_of(root.parent, config.read(file, sets=["rounds=1"]))
    assert (found is not None) == taken


# What the stores say


def test_tokens_are_those_that_the_rounds_generated_to_learn_from(tmp_path: Path) -> None:
    sets = ["rounds=2", f"judge.use={SCRIPTED}:Skilful", "judge.model=round"]
    anchors = "[evaluate.anchors]\nprompts = 10\n"
    root, outcome = start(
        scripted_toml(tmp_path, anchors), tmp_path / "runs", [*sets, "filter.use=best_worst"]
    )
    assert outcome.code == 0, outcome.reason
    store = Store(root / "loop.db")
    learning = "JOIN asked ON asked.id = asked_id JOIN round ON round.id = asked.round_id "
    learning += "WHERE number > 0 AND purpose = 'train'"
    (answers,) = store.query(f"SELECT sum(tokens) AS n FROM candidate {learning}")
    (verdicts,) = store.query(
        "SELECT sum(verdict.tokens) AS n FROM verdict "
        f"JOIN candidate ON candidate.id = candidate_id {learning}"
    )
    assert answers["n"] > 0
    assert verdicts["n"] > 0
    assert results.learned_from(store) == answers["n"] + verdicts["n"]
    assert results.learned_from(store) < store.generated_tokens()
    for number, proposed in ((0, 1000), (1, 7)):
        store.ask(store.round(number).id or 0, "own", "train", [], 8, proposed_tokens=proposed)
    assert results.learned_from(store) == answers["n"] + verdicts["n"] + 7
    store.close()


def test_seconds_are_those_of_the_rounds_and_no_pause(tmp_path: Path) -> None:
    root, _ = start(scripted_toml(tmp_path), tmp_path / "runs", ["rounds=2"])
    with sqlite3.connect(root / "loop.db") as database:
        database.execute("UPDATE run SET started = '2000-01-01 00:00:00.000000'")
        stored = database.execute("SELECT seconds FROM round WHERE number > 0").fetchall()
    stages = [json.loads(each) for (each,) in stored]
    own = [value for each in stages for key, value in each.items() if not key.startswith("in ")]
    trial = claims.Trial(claim=(SCORE,), control=("rounds=1",))
    assert 0 < results.Reading.of(root, trial).seconds == pytest.approx(sum(own))


def test_a_claim_says_how_many_values_only_one_side_has() -> None:
    def reading(**ends: float) -> results.Reading:
        return results.Reading(course=[], begins=[{}], ends=[ends], tokens=1, seconds=1.0)

    read = {
        "recipe": [reading(a=1.0, b=0.5), reading(a=1.0, b=1.0)],
        "control": [reading(a=0.0, b=0.5), reading(a=0.5, c=9.0)],
    }
    found = results.claimed(SCORE, 0, read)
    assert (found["items"], found["left_out"]) == (3, 2)
    assert found["ours"] == pytest.approx((0.75 + 1.0) / 2)
    assert found["theirs"] == pytest.approx((0.25 + 0.5) / 2)
    assert found["difference"] == pytest.approx(0.5)
