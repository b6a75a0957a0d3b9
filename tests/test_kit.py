"""`loop judges new`, `test` and `show`: what somebody types who writes a judge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from judges.bench import examples
from judges.rubric import rubric_prompt, rubric_template
from loop import kit, starters
from roles.template import conversation
from runs import SCRIPTED, loop, scripted_toml, start
from shelf import SPECS
from store.database import Store
from store.errors import UserError

GOOD = """
from judges import PointwiseJudge

class Short(PointwiseJudge):
    def __init__(self, words: int = 5):
        self.words = words

    def score(self, prompt, completion, policy, call):
        return float(len(completion.text.split()) <= self.words)
"""
BAD = GOOD.replace("class Short", "class Worded").replace(
    "        return", "        completion.text.split()[0]\n        return"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "short.py").write_text(GOOD)
    (tmp_path / "worded.py").write_text(BAD)
    return tmp_path


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind == "model" else pytest.param(kind, marks=pytest.mark.slow)
        for kind in starters.KINDS
    ],
)
def test_a_new_judge_passes_its_own_test_and_the_contract_as_written(
    tmp_path: Path, kind: str
) -> None:
    made = loop("judges", "new", "kindness", "--kind", kind, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    files = {"kindness.py", "test_kindness.py"} | ({"kindness.txt"} if kind == "model" else set())
    assert {path.name for path in tmp_path.iterdir()} == files
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"], cwd=tmp_path, capture_output=True, text=True
    )
    assert tested.returncode == 0, tested.stdout
    assert "18 passed" in tested.stdout
    steps = [line.strip() for line in made.stdout.splitlines()[1:]]
    assert [step.split()[:3] for step in steps] == [
        ["pytest", "test_kindness.py"],
        ["loop", "judges", "test"],
        ["loop", "judges", "show"],
        ["loop", "start", "--set"],
    ]
    for step in steps[1:3]:
        done = loop(*step.split()[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    if kind == "model":
        planned = loop("plan", *steps[3].split()[2:], cwd=tmp_path)
        assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize("kind", starters.KINDS)
def test_what_a_user_copies_is_short(kind: str) -> None:
    for text in starters.written("kindness", kind).values():
        assert 10 <= text.count("\n") <= 30
        assert max(map(len, text.splitlines())) <= 100 or "{question}" in text
        assert "CLASS" not in text
        assert "NAME" not in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Kindness", "'Kindness' is none"),
        ("my-judge", "'my-judge' is none"),
        ("math", "'math' is taken"),
        ("judges", "'judges' is taken"),
        ("class", "'class' is taken"),
        ("../up", "is none"),
    ],
)
def test_a_name_that_will_not_do_is_refused_and_nothing_written(
    tmp_path: Path, name: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        kit.new(name, "pointwise", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "test_kindness.py").write_text("mine")
    refused = loop("judges", "new", "kindness", cwd=tmp_path)
    assert refused.returncode == 2
    assert "test_kindness.py is already there" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["test_kindness.py"]
    assert (tmp_path / "test_kindness.py").read_text() == "mine"
    with pytest.raises(UserError, match="--kind is one of pointwise, pairwise, model"):
        kit.new("kindness", "listwise", tmp_path)


def test_a_judge_is_tested_by_file_by_module_and_by_name(folder: Path) -> None:
    for spec in ("short.py:Short", SPECS["verifier"], "verifier"):
        done = loop("judges", "test", spec, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "passed 10 checks" in done.stdout
        assert "it asks no model" in done.stdout


def test_a_judge_that_breaks_the_contract_ends_with_1_and_says_where(folder: Path) -> None:
    done = loop("judges", "test", "worded.py:Worded", "--json", cwd=folder)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    failed = [each for each in found["checks"] if each["outcome"] == "failed"]
    assert not found["ok"]
    assert failed == [
        {
            "name": "empty answers",
            "outcome": "failed",
            "why": "it raised IndexError: list index out of range",
        }
    ]
    shown = loop("judges", "test", "worded.py:Worded", cwd=folder)
    assert "worded.py:Worded (version 1) failed 1 of 10 checks" in shown.stdout


def test_options_are_set_as_in_a_run(folder: Path) -> None:
    wish = kit.Wish(f"{folder}/short.py:Short", ["judge.words=2"])
    assert wish.role().options == {"words": 2}
    with pytest.raises(UserError, match=r"as in judge\.votes=1; found 'rounds=3'"):
        kit.Wish("verifier", ["rounds=3"]).role()
    with pytest.raises(UserError, match="did you mean 'words'"):
        kit.test(kit.Wish(f"{folder}/short.py:Short", ["judge.word=2"]))
    with pytest.raises(UserError, match="no judge named 'verifyer'; did you mean 'verifier'"):
        kit.test(kit.Wish("verifyer"))


def test_a_judge_that_cannot_judge_the_examples_is_told_how_to_name_others(folder: Path) -> None:
    (folder / "needy.py").write_text(
        "from judges import PointwiseJudge\nfrom store.errors import UserError\n"
        "class Needy(PointwiseJudge):\n"
        "    def score(self, prompt, completion, policy, call):\n"
        "        raise UserError('no column colour')\n"
    )
    refused = loop("judges", "test", "needy.py:Needy", cwd=folder)
    assert refused.returncode == 2
    assert "no column colour; a judge that needs other prompts names some" in refused.stderr


def test_what_is_shown_is_the_prompt_to_the_letter() -> None:
    found = kit.show(kit.Wish(SPECS["rubric"], ["judge.votes=3"]))
    template, group = rubric_template("rubric", None), examples()[0]
    assert [each["messages"] for each in found["questions"]] == [
        [
            {
                "role": "user",
                "content": rubric_prompt(template, group.prompt, one.text).messages[-1].content,
            }
        ]
        for one in group.candidates
    ]
    assert found["answers"] == 3


def test_every_order_of_a_comparison_is_shown() -> None:
    found = kit.show(kit.Wish(SPECS["pairwise"]))
    assert len(found["questions"]) == 6
    assert len({each["digest"] for each in found["questions"]}) == 6


def test_a_judge_that_asks_no_model_says_so(folder: Path) -> None:
    shown = loop("judges", "show", "short.py:Short", cwd=folder)
    assert shown.returncode == 0
    assert shown.stdout == "short.py:Short (version 1) asks no model about this\n"


def test_a_stored_answer_is_shown_as_the_judge_would_see_it(tmp_path: Path) -> None:
    sets = ["rounds=1", f"engine.use={SCRIPTED}:Thinker"]
    root, _ = start(scripted_toml(tmp_path), tmp_path / "runs", sets)
    store = Store(root / "loop.db")
    stored = store.query("SELECT id, text FROM candidate WHERE text LIKE '<think>%</think>%'")[3]
    group = kit.stored(store, stored["id"])
    wish = kit.Wish(SPECS["rubric"])
    (question,) = kit.show(wish, store, stored["id"])["questions"]
    template = rubric_template("rubric", None)
    asked = rubric_prompt(template, group.prompt, stored["text"])
    assert question["messages"][0]["content"] == asked.messages[-1].content
    hidden = kit.Wish(SPECS["rubric"], ["judge.thinking=hidden"])
    (question,) = kit.show(hidden, store, stored["id"])["questions"]
    assert "think>" not in question["messages"][0]["content"]
    assert conversation(group.prompt) in question["messages"][0]["content"]
    with pytest.raises(UserError, match="has no candidate 999999"):
        kit.show(wish, store, 999_999)
    store.close()
    printed = loop(
        "judges", "show", SPECS["rubric"], "--run", root, "--candidate", str(stored["id"])
    )
    assert stored["text"].strip() in printed.stdout
    assert f"about a group of {len(group.candidates)} answers" in printed.stdout
    refused = loop("judges", "show", "verifier", "--run", root)
    assert refused.returncode == 2
    assert "add --candidate ID" in refused.stderr
