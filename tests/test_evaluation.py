"""What a checkpoint is measured by beside the held-out prompts, and what the gate makes of it."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from loop import run
from runs import SCRIPTED, go_on, loop, scripted_toml, start
from store.database import Store
from store.errors import UserError

OLD_SKILL = f"""
[evaluate.suite.triples]
proposer = {{ use = "{SCRIPTED}:Sums", times = 3 }}
prompts = 30
max_fall = 0.1
"""
ANCHORS = """
[evaluate.anchors]
prompts = 20
"""
# Another label than the gate's judge has, and right where that is.
OWN_JUDGE = "judge.abstain_on=no such text"


def rows(root: Path, sql: str) -> list[dict[str, Any]]:
    store = Store(root / "loop.db")
    try:
        return store.query(sql)
    finally:
        store.close()


def measured(root: Path, suite: str) -> dict[tuple[int, str], float]:
    found = rows(
        root,
        "SELECT number, metric, value FROM evaluation JOIN round ON round.id = round_id "
        f"WHERE suite = '{suite}' ORDER BY number",
    )
    return {(row["number"], row["metric"]): row["value"] for row in found}


def decisions(root: Path) -> list[tuple[str, str]]:
    found = rows(root, "SELECT decision, rule FROM decision WHERE model IS NOT NULL ORDER BY id")
    return [(row["decision"], row["rule"]) for row in found]


def test_a_checkpoint_that_forgot_an_old_skill_is_rejected_though_it_gained(tmp_path: Path) -> None:
    file = scripted_toml(tmp_path, OLD_SKILL, skill=0.5)
    root, outcome = start(file, tmp_path / "runs", ["rounds=2", "trainer.forget_in=1"])
    assert outcome.code == 0, outcome.reason
    found = measured(root, "triples")
    assert found[0, "accuracy_greedy"] == 1.0
    assert found[1, "accuracy_greedy"] == 0.0
    assert decisions(root) == [
        ("accept", "first"),
        ("reject", "guard"),
        ("accept", "paired bootstrap"),
    ]
    (reason,) = rows(root, "SELECT reason FROM decision WHERE rule = 'guard'")
    assert reason["reason"] == (
        "triples fell by 1.000 [1.000, 1.000] on 30 items below what the rounds began from; "
        "0.1 is allowed"
    )
    verified = loop("verify", root)
    assert verified.returncode == 0, verified.stdout


def test_old_skills_are_asked_of_prompts_that_are_never_trained_on(tmp_path: Path) -> None:
    root, _ = start(scripted_toml(tmp_path, OLD_SKILL), tmp_path / "runs", ["rounds=1"])
    found = rows(
        root, "SELECT split, suite, count(*) AS n FROM prompt GROUP BY split, suite ORDER BY 1, 2"
    )
    assert [tuple(row.values()) for row in found] == [
        ("gate", "held_out", 60),
        ("gate", "triples", 30),
        ("test", "held_out", 40),
        ("train", "held_out", 24),
    ]
    # The gate's own comparison does not see them.
    (numbers,) = rows(root, "SELECT numbers FROM decision WHERE rule = 'paired bootstrap'")
    assert json.loads(numbers["numbers"])["prompts"] == 60


def test_the_judge_is_measured_on_the_same_anchors_every_round(tmp_path: Path) -> None:
    root, outcome = start(
        scripted_toml(tmp_path, ANCHORS), tmp_path / "runs", ["rounds=2", OWN_JUDGE]
    )
    assert outcome.code == 0, outcome.reason
    found = measured(root, "judge")
    assert {key: found[key] for key in found if key[1] in ("agreement", "unscored")} == {
        (number, metric): value
        for number in range(3)
        for metric, value in (("agreement", 1.0), ("unscored", 0.0))
    }
    answers = rows(
        root,
        "SELECT round_id, group_concat(text, ' ') AS texts FROM candidate "
        "JOIN asked ON asked.id = asked_id WHERE purpose = 'anchor' GROUP BY round_id",
    )
    assert len(answers) == 3
    assert len({row["texts"] for row in answers}) == 1
    assert 0.2 < found[1, "score"] < 0.8  # about half of the answers carry a mistake


def test_a_judge_that_says_one_thing_of_everything_agrees_like_a_coin_and_is_told(
    tmp_path: Path,
) -> None:
    judge = tmp_path / "five.py"
    judge.write_text(
        "from judges import PointwiseJudge\n"
        "class Five(PointwiseJudge):\n"
        "    def score(self, prompt, completion, policy, call):\n"
        "        return 5\n"
    )
    sets = ["rounds=1", f"judge.use={judge}:Five", "filter.use=everything"]
    file = scripted_toml(tmp_path, ANCHORS)
    done = loop("start", "--config", file, "--runs", tmp_path / "runs", *_set(sets))
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "Five gave 100% of 192 answers one score; alarms.max_modal is 0.95" in said
    [root] = (tmp_path / "runs").iterdir()
    found = measured(root, "judge")
    assert found[1, "agreement"] == 0.5
    assert found[1, "modal"] == 1.0


COMMAND = """
[evaluate.command.mine]
run = "{python} {script} {{checkpoint}} --name 'two words'"
"""


def command_toml(folder: Path, body: str, more: str = "") -> Path:
    script = folder / "measure.py"
    script.write_text(f"import json, sys\nfrom pathlib import Path\n{body}")
    table = COMMAND.format(python=sys.executable, script=script)
    return scripted_toml(folder, table + more)


SKILL = """
skill = json.loads((Path(sys.argv[1]) / 'config.json').read_text())['skill']
assert sys.argv[2:] == ['--name', 'two words'], sys.argv
print('loading ...')
print(json.dumps({'skill': skill, 'items': [skill, skill - 0.01, skill + 0.01]}))
"""


def test_a_command_of_the_users_measures_every_checkpoint(tmp_path: Path) -> None:
    root, outcome = start(command_toml(tmp_path, SKILL), tmp_path / "runs", ["rounds=2"])
    assert outcome.code == 0, outcome.reason
    found = measured(root, "mine")
    assert found == pytest.approx(
        {
            (number, metric): 0.3 + 0.2 * number
            for number in range(3)
            for metric in ("skill", "items")
        }
    )


@pytest.mark.parametrize("metric", ["skill", "items"])
def test_a_command_decides_as_the_gate(tmp_path: Path, metric: str) -> None:
    file = command_toml(tmp_path, SKILL)
    sets = ["rounds=2", f"gate.by=mine.{metric}", "trainer.spoil_in=2", "gate.patience=0"]
    root, outcome = start(file, tmp_path / "runs", sets)
    assert outcome.code == 0, outcome.reason
    rule = "difference" if metric == "skill" else "paired bootstrap"
    assert decisions(root) == [
        ("accept", "first"),
        ("accept", f"{rule} of mine.{metric}"),
        ("reject", f"{rule} of mine.{metric}"),
    ]


def test_a_guarded_metric_that_falls_rejects(tmp_path: Path) -> None:
    body = "fell = '0001' in sys.argv[1]\nprint(json.dumps({'safe': 0.7 if fell else 1.0}))"
    file = command_toml(tmp_path, body, 'guard = "safe"\nmax_fall = 0.2\n')
    root, _ = start(file, tmp_path / "runs", ["rounds=2"])
    assert [each[1] for each in decisions(root)] == ["first", "guard", "paired bootstrap"]
    (reason,) = rows(root, "SELECT reason FROM decision WHERE rule = 'guard'")
    assert reason["reason"] == "mine.safe fell by 0.300 below the incumbent; 0.2 is allowed"


@pytest.mark.parametrize(
    ("body", "sets", "sentence"),
    [
        ("sys.exit('no GPU')", [], r"ended with exit code 1: no GPU"),
        ("print('fine')", [], r"printed no JSON object .* it said: 'fine'"),
        ('print(\'{"a": "high"}\')', [], r"metric 'a' is a finite number .* found 'high'"),
        ("print('{\"a\": [1, NaN]}')", [], r"metric 'a' is a finite number"),
        ("print('{\"a\": true}')", [], r"metric 'a' is a finite number"),
        ("print('{\"a\": 1' + '0' * 400 + '}')", [], r"metric 'a' is a finite number"),
        ("print('{\"\": 1}')", [], r"'' is no name of a metric"),
        ("print('[' * 100_000)", [], r"printed no JSON object"),
        ("print('{\"a\": 1}')", ["gate.by=mine.b"], r"printed no metric 'b'; it printed: a"),
        (
            "import time; time.sleep(9)",
            ["evaluate.command.mine.timeout_s=0.3"],
            r"took longer than its timeout_s, 0.3 s",
        ),
    ],
)
def test_a_command_that_fails_stops_the_run_which_goes_on_once_it_is_mended(
    tmp_path: Path, body: str, sets: list[str], sentence: str
) -> None:
    root, outcome = start(command_toml(tmp_path, body), tmp_path / "runs", ["rounds=1", *sets])
    assert outcome.code == 4, outcome.reason
    assert "Traceback" not in outcome.reason
    assert re.search(sentence, outcome.reason), outcome.reason
    (tmp_path / "measure.py").write_text('print(\'{"a": 1, "b": 2}\')')
    settings = run.stored_config(root)
    assert go_on(root, settings, run.load_roles(settings)).code == 0


def test_a_command_runs_beside_the_file_that_names_it_wherever_the_run_is_begun(
    tmp_path: Path,
) -> None:
    (tmp_path / "measure.py").write_text("print('{\"a\": 1}')")
    table = f"[evaluate.command.mine]\nrun = '{sys.executable} measure.py {{checkpoint}}'\n"
    file = scripted_toml(tmp_path, table)
    (tmp_path / "elsewhere").mkdir()
    sets = ["rounds=1"]
    done = loop("start", "--config", file, *_set(sets), cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    [root] = (tmp_path / "elsewhere" / "runs").iterdir()
    assert measured(root, "mine") == {(0, "a"): 1.0, (1, "a"): 1.0}


def test_a_run_whose_command_took_too_long_goes_on_with_more_time(tmp_path: Path) -> None:
    file = command_toml(tmp_path, "import time; time.sleep(1)\nprint('{\"a\": 1}')")
    sets = ["rounds=1", "evaluate.command.mine.timeout_s=0.2"]
    first = loop("start", "--config", file, "--runs", tmp_path / "runs", *_set(sets))
    assert first.returncode == 4, first.stderr
    [root] = (tmp_path / "runs").iterdir()
    again = loop("start", root, "--set", "evaluate.command.mine.timeout_s=60.0")
    assert again.returncode == 0, again.stderr


def _set(sets: list[str]) -> list[str]:
    return [part for each in sets for part in ("--set", each)]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ('[gate]\nby = "mine.a"', r"gate.by is .*there is none"),
        ('[evaluate.command.mine]\nrun = "python x.py"', r"run has no \{checkpoint\}"),
        ('[evaluate.command.mine]\nrun = "python \'x {checkpoint}"', r"run is not a command"),
        (
            '[evaluate.command.mine]\nrun = "a {checkpoint}"\ngard = "b"',
            r"did you mean 'evaluate.command.mine.guard'",
        ),
        ("[evaluate.suite.old]\nprompts = 9", r"evaluate.suite.old.proposer: Field required"),
        ('[evaluate.suite.old]\nproposer="a"\nmax_fal=1', r"mean 'evaluate.suite.old.max_fall'"),
        ("[evaluate.anchors]\nprompts = 1", r"evaluate.anchors.prompts: .* greater"),
        ('[evaluate.suite.held_out]\nproposer = "a"', r"'held_out' is a name of the loop's own"),
        ('[evaluate.command.mine]\nrun = "nosuch {checkpoint}"', r"no program 'nosuch'"),
    ],
)
def test_a_mistake_in_a_measurement_is_told_before_anything_is_written(
    tmp_path: Path, more: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        start(scripted_toml(tmp_path, more), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
