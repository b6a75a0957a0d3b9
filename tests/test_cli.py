"""The commands as they are typed: what they print, how they end, and what they leave alone."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from loop import attempt, lease, run
from loop import config as configuration
from loop.cli import app
from loop.cli.answering import answer
from loop.progress import Progress
from store.database import Store
from test_report import SMALL, Builder, build, change, copied, finished, prompts

__all__ = ["copied", "finished"]
SETS = [part for each in SMALL for part in ("--set", each)]
COMMANDS = (
    *("init", "plan", "start", "stop", "status", "rounds", "show", "why", "compare", "sample"),
    *("export", "verify", "recipes", "judges", "review", "rejudge", "diff", "doctor"),
)
LOOP = Path(sys.executable).with_name("loop")


def type_(*arguments: object, code: int = 0) -> Result:
    """What typing it gives. Eighty columns, not a terminal."""
    found = CliRunner().invoke(
        app, [str(each) for each in arguments], env={"COLUMNS": "80", "TERM": "dumb"}
    )
    assert found.exit_code == code, f"{found.exit_code}: {found.output}\n{found.exception}"
    return found


def refused(*arguments: object) -> str:
    """The one sentence that a mistake is answered with."""
    found = type_(*arguments, code=2)
    assert found.stdout == ""
    assert found.stderr.startswith("loop: ")
    assert found.stderr.count("\n") == 1
    return found.stderr


def answered(*arguments: object) -> Any:
    return json.loads(type_(*arguments, "--json").stdout)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to type commands in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Help and starting up


@pytest.mark.parametrize("name", ["loop", "ratchet"])
def test_help_answers_at_once(name: str) -> None:
    times = []
    for _ in range(7):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = subprocess.run([LOOP.with_name(name), "--help"], capture_output=True, text=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime)
        assert found.returncode == 0
        for command in COMMANDS:
            assert command in found.stdout
    assert statistics.median(times) < 0.5


def test_nothing_heavy_is_imported_for_help() -> None:
    heavy = [
        "torch",
        "transformers",
        "trl",
        "langgraph",
        "pydantic",
        "sqlmodel",
        "sqlalchemy",
        "numpy",
    ]
    asked = f"import sys, loop.cli; print([each for each in {heavy} if each in sys.modules])"
    found = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["show"], ["why", "seven"], ["plan", "--nonsense"], ["rounds", "-x"]],
)
def test_a_mistyped_command_ends_with_2(arguments: list[str]) -> None:
    assert "Traceback" not in type_(*arguments, code=2).output


# init and plan


def test_init_writes_a_configuration_that_says_what_default_says(here: Path) -> None:
    said = type_("init").stdout
    assert said == (
        "wrote loop.toml; next: loop plan --config loop.toml, then loop start --config loop.toml\n"
    )
    assert configuration.read(here / "loop.toml") == configuration.read()


def test_what_init_shows_in_comments_can_be_used(here: Path) -> None:
    type_("init", "mine.toml")
    shown = re.findall(r"^#     (.*)$", (here / "mine.toml").read_text(), re.M)
    (here / "shown.toml").write_text("\n".join(shown))
    (here / "prompts.jsonl").touch()
    config = configuration.read(here / "shown.toml")
    assert config.track["main"].proposer.options["path"] == str(here / "prompts.jsonl")
    assert config.track["main"].judge.use == f"{here}/my_judge.py:MyJudge"


def test_init_does_not_overwrite(here: Path) -> None:
    (here / "loop.toml").write_text("seed = 7\n")
    assert "loop.toml is already there" in refused("init")
    assert (here / "loop.toml").read_text() == "seed = 7\n"
    assert "cannot write nowhere/loop.toml" in refused("init", "nowhere/loop.toml")


def test_plan_says_what_a_run_would_do_and_writes_nothing(here: Path) -> None:
    said = type_("plan", *SETS).stdout
    assert re.search(r"^main +policy +6 +24 +384$", said, re.M)
    assert "a warm-up and 2 rounds" in said
    assert "generated tokens at most: warm-up 528, round 912, run 2,352" in said
    assert "the gate can tell a difference of" in said
    assert "paired by prompt" in said
    found = answered("plan", *SETS)
    assert found["generated_tokens"]["run"] == 2352
    assert found["gate"]["detectable"] == pytest.approx(0.5165, abs=1e-3)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("judge.use=verifyer", "no judge named 'verifyer'; did you mean 'verifier'?"),
        ("generator.m=8", "generator 'sampler' has no option 'm'"),
        ("generator.n=0", "option 'n'"),
        ("evaluate.samples=0", "evaluate.samples: Input should be greater than or equal to 1"),
        ("evaluate.sample=3", "did you mean 'evaluate.samples'?"),
        ("judge.model=gpt", "judge 'verifier' asks the model 'gpt'"),
        ("model.path=./nowhere", "no model folder './nowhere'"),
        ("nonsense", "--set takes key=value"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "start"])
def test_a_mistake_is_a_sentence_and_nothing_is_written(
    here: Path, command: str, setting: str, sentence: str
) -> None:
    assert sentence in refused(command, "--set", setting)
    assert list(here.iterdir()) == []


def test_files_and_recipes_that_are_not_there(here: Path) -> None:
    assert "no configuration file nowhere.toml" in refused("plan", "--config", "nowhere.toml")
    assert "no recipe named 'defualt'; did you mean 'default'?" in refused(
        "start", "--recipe", "defualt"
    )
    assert "no run under runs/ yet; `loop start` begins one" in refused("status")
    assert "no run in nowhere" in refused("rounds", "nowhere")


# Reading a run


def test_status(finished: Path) -> None:
    said = type_("status", finished).stdout
    assert "status       done, nobody drives it" in said
    assert "rounds done  2 of 2" in said
    assert f"`loop start {finished} --set rounds=N` extends it" in said
    found = answered("status", "--runs", finished.parent)
    assert (found["status"], found["alive"], found["round"]) == ("done", False, 2)
    assert found["decision"]["rule"] == "rounds"


def test_status_while_it_is_driven_and_after_its_driver_was_killed(copied: Path) -> None:
    store = Store(copied / run.DATABASE)
    store.set_status("running")
    with lease.held(store):
        assert answered("status", copied)["alive"]
        assert "driven" in type_("status", copied).stdout
        assert f"`loop stop {copied}` ends it" in type_("status", copied).stdout
    store.take_lease(f"{lease.socket.gethostname()}:999999:1.00", timeout=lease.TIMEOUT)
    store.close()
    assert not answered("status", copied)["alive"]
    assert "its driver is gone; `loop start" in type_("status", copied).stdout


def test_stop_asks_the_driver(copied: Path) -> None:
    assert type_("stop", copied).stdout == f"nobody drives {copied}\n"
    store = Store(copied / run.DATABASE)
    with lease.held(store):
        assert "will stop after its batch" in type_("stop", copied).stdout
        assert store.stop_requested()
    store.close()


def test_rounds_fit_eighty_columns(finished: Path) -> None:
    said = type_("rounds", finished).stdout
    tables = [line for line in said.splitlines() if re.match(r" +(round|\d) +", line)]
    assert len(tables) == 3 * 3 + 3
    words = ("policy: ", str(finished))  # a reason and a path are as long as they are
    lines = [line for line in said.splitlines() if not any(word in line for word in words)]
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert "…" not in said
    assert re.search(r"^ +1  done +6 +24 +24 +", said, re.M)
    assert re.search(r"^round 1 dropped: \d (margin|all right)", said, re.M)
    assert re.search(r"^ +1  test +1\.00 \[1\.00, 1\.00\]  0\.\d\d \[", said, re.M)
    assert "round 1 policy: " in said
    assert "10.0%" in said


def test_rounds_as_json(finished: Path) -> None:
    found = answered("rounds", finished)
    assert [each["number"] for each in found["rounds"]] == [0, 1, 2]


def test_show_a_round(finished: Path) -> None:
    said = type_("show", 1, finished).stdout
    assert "main: 6 asked, 24 candidates" in said
    assert "20 steps, loss 0.69 to 0.5" in said
    assert "accuracy_sampled" in said
    assert re.search(r"why: loop why \d+$", said, re.M)
    assert answered("show", 1, finished)["number"] == 1
    assert "no round 9" in refused("show", 9, finished)


def test_why(finished: Path) -> None:
    pair = answered("show", 1, finished)["samples"][0]["example"]
    said = type_("why", pair, finished).stdout
    for words in (
        "user: What is 10",
        "chosen: candidate",
        "written by checkpoint 2 (policy, round 0)",
        "log-probability -",
        "verdict of verifier 1 (vote 0): ok 1: the answer '",
        "rule right_wrong, margin 1, weight 1",
        "learned by checkpoint 3 (policy, round 1, ",
        "reference log-probability chosen -1.5, rejected -2.5",
        "by paired bootstrap: gain",
    ):
        assert words in said
    assert answered("why", pair, finished)["example"]["example"] == pair
    assert re.search(r"no example 999; .* has examples 1 to \d+", refused("why", 999, finished))


def test_a_model_cannot_write_to_the_screen(copied: Path) -> None:
    pair = answered("show", 1, copied)["samples"][0]["example"]
    change(copied, "UPDATE candidate SET text = '[red]\x1b[2J\u202e7 \u2028'")
    for command in (("why", pair), ("show", 1)):
        said = type_(*command, copied).stdout
        assert "[red]\\x1b[2J\\u202e7" in said
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said)


def test_verify(finished: Path) -> None:
    said = type_("verify", finished).stdout
    assert re.search(r"^ +ok +\d+  digests of prompts$", said, re.M)
    assert said.endswith(f"{finished}: sound\n")
    assert answered("verify", finished)["ok"]


def test_verify_ends_with_4_when_something_is_wrong(copied: Path) -> None:
    change(copied, "UPDATE candidate SET tokens = 9 WHERE id = 20")
    found = type_("verify", copied, code=4)
    assert "  candidate 20: tokens 9, bytes" in found.stdout
    assert not json.loads(type_("verify", copied, "--json", code=4).stdout)["ok"]


def test_a_damaged_database_is_a_sentence(copied: Path) -> None:
    with (copied / run.DATABASE).open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 2000)
    assert "loop.db cannot be read" in refused("rounds", copied)
    (copied / run.DATABASE).write_text("no database at all, but long enough to look" * 100)
    assert "is not a SQLite database" in refused("status", copied)


def test_recipes() -> None:
    said = type_("recipes").stdout
    assert said.startswith("default")
    assert "What `loop start` runs when told nothing" in said
    assert [each["name"] for each in answered("recipes")] == configuration.recipes()
    assert tomllib.loads(type_("recipes", "default", "--toml").stdout)["rounds"] == 3
    assert "no recipe named 'nonsense'" in refused("recipes", "nonsense")


def test_judges_list() -> None:
    said = type_("judges", "list").stdout
    assert "verifier 1  A judge of answers that can be right or wrong." in said
    assert "    partial: bool = False" in said
    (verifier,) = [each for each in answered("judges", "list") if each["name"] == "verifier"]
    scorer = next(each for each in verifier["options"] if each["option"] == "scorer")
    assert (scorer["default"], scorer["required"]) == ("auto", False)
    assert "'numeric'" in scorer["type"]


def test_reading_does_not_disturb_a_run(finished: Path) -> None:
    before = (finished / run.DATABASE).read_bytes()
    commands = (("status",), ("rounds",), ("show", 1), ("why", 1), ("verify",))
    for command in (*commands, ("compare", finished)):
        type_(*command, finished)
    assert (finished / run.DATABASE).read_bytes() == before


# Progress


def stage(progress: Progress) -> None:
    progress.begin(1, "generate", 256)
    progress.advance_by(64)
    progress.advance_by(64)
    progress.end()
    progress.begin(1, "judge", 256)
    progress.end()


def test_progress_is_one_line_a_stage_with_units() -> None:
    screen, log = io.StringIO(), io.StringIO()
    stage(Progress(Console(file=screen, width=80), Console(file=log, width=100)))
    assert re.fullmatch(
        r"round 1  generate +128 prompts +\d+\.\d s +[\d,.]+ prompts/s\n", screen.getvalue()
    )
    assert log.getvalue() == screen.getvalue()


def test_progress_is_a_bar_on_a_terminal_and_a_line_in_the_log() -> None:
    screen, log = io.StringIO(), io.StringIO()
    terminal = Console(file=screen, width=100, force_terminal=True)
    stage(Progress(terminal, Console(file=log, width=100)))
    assert "128/256 prompts" in screen.getvalue()
    assert "prompts/s" in screen.getvalue()
    assert "\x1b" not in log.getvalue()
    assert log.getvalue().count("\n") == 1


def test_what_a_screen_cannot_show_is_spelled_out(copied: Path) -> None:
    change(copied, "UPDATE candidate SET text = 'caf\u00e9 \u2192'")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    found = subprocess.run([LOOP, "why", "5", copied], capture_output=True, env=environment)
    assert found.returncode == 0, found.stderr
    assert b"caf\\xe9 \\u2192" in found.stdout


def test_a_reader_that_leaves_early_is_no_failure(copied: Path) -> None:
    said = subprocess.run(f"{LOOP} rounds {copied} | head -1", shell=True, capture_output=True)
    assert b"Traceback" not in said.stderr


# start


def test_start_of_a_finished_run_prints_how_it_ended(copied: Path) -> None:
    found = type_("start", copied)
    assert f"goes on with {copied}" in found.stderr
    assert re.search(r"best checkpoint: .*checkpoints/round-0001-policy$", found.stdout, re.M)
    assert re.search(
        r"gain on the test split: [+-]0\.\d{3} \[[+-]0\.\d{3}, [+-]0\.\d{3}\]", found.stdout
    )
    assert "ended: 2 of 2 rounds done" in found.stdout
    assert "look closer: loop rounds, loop show 1, loop why 5\n" in found.stdout
    use = f'use it: loop sample "PROMPT", loop compare {copied} OTHER, loop export FOLDER\n'
    assert use in found.stdout
    log = (copied / "logs/attempt-1.log").read_text()
    for line in found.output.splitlines():
        assert line.rstrip() in [each.rstrip() for each in log.splitlines()]


def test_start_of_a_run_that_a_rule_ended_says_how_it_goes_on(copied: Path) -> None:
    change(copied, "UPDATE decision SET decision = 'reject' WHERE model IS NOT NULL AND id > 1")
    found = type_("start", copied, "--set", "rounds=9", "--set", "gate.patience=1", code=3)
    assert "rounds 2 -> 9" in found.stderr
    assert "ended: 2 rounds in a row gave no accepted checkpoint" in found.stdout
    assert f"`loop start {copied} --set gate.patience=N`" in found.stdout
    assert answered("status", copied)["status"] == "stopped"


def test_start_refuses_to_make_another_run_of_a_run(copied: Path) -> None:
    said = refused("start", copied, "--set", "generator.n=5")
    assert "track.main.generator.n: 4 -> 5" in said
    assert "cannot change" in said
    assert "these settings cannot change" in refused("start", copied, "--recipe", "default")
    assert not list((copied / "logs").iterdir())


def test_start_refuses_a_run_that_is_driven_and_a_name_that_is_none(copied: Path) -> None:
    assert "a run's name has letters" in refused("start", "--name", "a/b")
    assert "--name is for a new run" in refused("start", copied, "--name", "other")
    store = Store(copied / run.DATABASE)
    with lease.held(store):
        said = refused("start", copied, "--set", "rounds=4")
        assert f"is being driven by process {os.getpid()}" in said
    assert store.run().config["rounds"] == 2
    store.close()


FAILING = """
class Failing:
    def propose(self, count, split, history, policy, call):
        raise {error}
"""


def failing(here: Path, error: str) -> list[str]:
    """Arguments of a run whose proposer fails before anything was asked."""
    (here / "failing.py").write_text(
        f"from store.errors import UserError\n{FAILING}".format(error=error)
    )
    return [*SETS, "--set", f"proposer.use={here}/failing.py:Failing"]


def test_a_stage_that_fails_says_which_and_the_next_start_goes_on(here: Path) -> None:
    arguments = failing(here, "RuntimeError('no more ideas')")
    found = type_("start", *arguments, "--name", "mine", code=4)
    (root,) = Path("runs").iterdir()
    assert root.name.endswith("-mine")
    assert f"begins a new run, {root}" in found.stderr
    assert "Traceback" in found.stderr
    assert "RuntimeError: no more ideas" in found.stderr
    assert found.stderr.endswith(
        "propose of round 0 failed; every committed batch is intact, and "
        f"`loop start {root}` goes on from there\n"
    )
    assert f"goes on with {root}" in type_("start", *arguments, code=4).stderr
    logs = sorted(each.name for each in (root / "logs").iterdir())
    assert logs == ["attempt-1.log", "attempt-2.log"]
    assert "no more ideas" in (root / "logs/attempt-2.log").read_text()
    assert answered("status")["status"] == "failed"


def test_an_interrupted_run_is_left_with_a_sentence(here: Path) -> None:
    found = type_("start", *failing(here, "KeyboardInterrupt"), code=130)
    (root,) = Path("runs").iterdir()
    assert found.stderr.splitlines()[-1] == (
        "interrupted: propose of round 0 was under way; every committed batch is intact, and "
        f"`loop start {root}` goes on from there"
    )
    assert "Traceback" not in found.output


def test_a_mistake_found_before_anything_was_asked_leaves_nothing(here: Path) -> None:
    arguments = failing(here, "UserError('the file has 3 prompts, 5 are needed')")
    found = type_("start", *arguments, code=2)
    assert found.stderr.endswith("loop: the file has 3 prompts, 5 are needed\n")
    assert list(Path("runs").iterdir()) == []


def test_a_mistake_found_later_says_that_what_was_committed_is_kept(here: Path) -> None:
    root = build(here / "my runs")
    (here / "late.py").write_text(
        "from roles.generators.sampler import Sampler\nfrom store.errors import UserError\n"
        "class Late(Sampler):\n"
        "    def generate(self, *arguments):\n        raise UserError('no more tokens')\n"
    )
    late = f'"{here}/late.py:Late"'
    change(root, f"UPDATE run SET config = replace(config, '\"sampler\"', '{late}')")
    found = type_("start", root, "--set", "rounds=3", code=4)
    told = "no more tokens\ngenerate of round 3 failed; every committed batch is intact, and "
    told += f"`loop start '{root}'` goes on from there\n"
    assert found.stderr.endswith(told)
    assert "Traceback" not in found.stderr
    assert (root / "logs/attempt-1.log").read_text().endswith(told)


def test_a_log_of_a_strange_name_is_passed_over(copied: Path) -> None:
    for name in ("attempt-x.log", "attempt-7.log", "attempt-9.log.old", "other.log"):
        (copied / "logs" / name).touch()
    type_("start", copied)
    assert (copied / "logs/attempt-8.log").read_text()


def test_a_log_that_cannot_be_written_is_left_out_and_said() -> None:
    with attempt.Log(open("/dev/full", "wb"), line_buffering=True) as log:
        Console(file=log).print("a line\n" * 9000)
    assert log.failure is not None
    assert "No space left" in str(log.failure)


def test_a_next_step_can_be_typed_whatever_the_path(here: Path) -> None:
    root = build(here / "my runs")
    assert f"`loop start '{root}' --set rounds=N`" in type_("status", root).stdout
    assert "loop plan --config 'my loop.toml'," in type_("init", "my loop.toml").stdout


def test_json_has_no_number_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    answer({"a": [float("nan"), 1.5], "b": (float("inf"),)}, lambda *_: None, True)
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None]}


def test_a_mistake_found_in_an_old_run_keeps_it(here: Path) -> None:
    root = build(here / "runs")
    store = Store(root / run.DATABASE)
    builder = Builder(root, configuration.validate(store.run().config))
    round = store.open_round(3, "propose")
    store.ask(round.id, "main", "train", prompts("train", 300, 6), 4)
    builder.store.close()
    store.close()
    change(root, "UPDATE checkpoint SET path = '/nowhere'")
    assert "/nowhere, from which" in type_("start", root, "--set", "rounds=3", code=2).stderr
    assert "/nowhere, from which" in (root / "logs/attempt-1.log").read_text()
    assert (root / run.DATABASE).is_file()
