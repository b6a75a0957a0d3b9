"""Plug-ins: found by name, checked at the start, and nothing run that was not named."""

import sys
from typing import Annotated

import pytest
from pydantic import Field

from judges.verifier import Verifier
from roles import plugins
from store.errors import UserError

JUDGE = """
from judges import PointwiseJudge

class Mine(PointwiseJudge):
    def __init__(self, limit: int = 3):
        self.limit = limit

    def score(self, prompt, completion, policy, call):
        return self.limit

class NotAJudge:
    pass

class HalfAJudge(PointwiseJudge):
    pass

def judge():
    pass
"""


class Bounded:
    def __init__(self, share: Annotated[float, Field(ge=0, le=1)] = 0.5):
        self.share = share

    def judge(self, groups, policy, call):
        return []


class Plain:
    def judge(self, groups, policy, call):
        return []


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(JUDGE)
    return path


def test_a_built_in_is_found_by_its_entry_point():
    judge = plugins.load("judge", "verifier", {"scorer": "numeric"})
    assert isinstance(judge, Verifier)
    assert judge.scorer == "numeric"


def test_the_names_of_a_role_are_those_of_its_entry_points():
    assert {"best_only", "best_worst", "everything", "right_wrong"} <= set(plugins.names("filter"))


def test_a_class_is_found_by_its_module():
    assert plugins.find("judge", "judges.verifier:Verifier") is Verifier


def test_a_class_is_found_in_a_file_and_made_with_its_options(mine):
    judge = plugins.load("judge", f"{mine}:Mine", {"limit": 7})
    assert judge.limit == 7
    assert plugins.find("judge", f"{mine}:Mine") is type(judge)


def test_a_files_folder_is_not_put_on_the_path_and_its_neighbours_are_not_run(mine):
    (mine.parent / "neighbour.py").write_text("raise SystemExit('run')")
    (mine.parent / "__init__.py").write_text("raise SystemExit('run')")
    before = list(sys.path)
    plugins.find("judge", f"{mine}:Mine")
    assert sys.path == before
    assert "mine" not in sys.modules


def test_two_files_of_one_name_are_two_modules(mine, tmp_path):
    other = tmp_path / "other" / "mine.py"
    other.parent.mkdir()
    other.write_text(JUDGE)
    assert plugins.find("judge", f"{mine}:Mine") is not plugins.find("judge", f"{other}:Mine")


def test_a_file_that_fails_leaves_no_half_module_behind(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("raise RuntimeError('broken')")
    for _ in range(2):
        with pytest.raises(UserError, match="broken"):
            plugins.find("judge", f"{path}:Mine")


def test_a_directory_is_never_run(tmp_path):
    folder = tmp_path / "folder.py"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('run')")
    with pytest.raises(UserError, match="no file"):
        plugins.find("judge", f"{folder}:Mine")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("verifer", "no judge named 'verifer'; did you mean 'verifier'?"),
        ("judges.verifier:Verifer", "did you mean 'Verifier'?"),
        ("judges.no_such:Verifier", "no module named 'judges.no_such'"),
        ("no_such_file.py:Verifier", "no file 'no_such_file.py'"),
    ],
)
def test_a_name_that_is_not_there_is_answered_with_what_would_be_right(spec, words):
    with pytest.raises(UserError) as caught:
        plugins.find("judge", spec)
    assert words in str(caught.value)


def test_a_name_in_a_file_is_answered_with_the_nearest_there(mine):
    with pytest.raises(UserError, match="did you mean 'Mine'"):
        plugins.find("judge", f"{mine}:Mne")


FAILS_WHEN_MADE = """
from judges import PointwiseJudge
class Mine(PointwiseJudge):
    def __init__(self):
        {}
    def score(self, prompt, completion, policy, call):
        return 1.0
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'|:1"),
        ("a = 1\ndef (", "SyntaxError: invalid syntax|:2"),
        ("a = '\udcff'", "SyntaxError: (unicode error) 'utf-8' codec can't decode byte"),
        ("def f():\n    raise OSError('a\\nb')\nf()", "OSError: a b|:2"),
        ("import sys\nsys.exit()", "SystemExit|:2"),
        ("import json\njson.loads('')", "JSONDecodeError: Expecting value|:2"),
        (FAILS_WHEN_MADE.format("raise SystemExit('no')"), "SystemExit: no|:5"),
        (FAILS_WHEN_MADE.format("self.x = {}['key']"), "KeyError: 'key'|:5"),
    ],
)
def test_a_plug_in_whose_code_fails_is_a_sentence_with_the_line(tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError) as caught:
        plugins.load("judge", f"{path}:Mine", {})
    error, _, line = words.partition("|")
    said = str(caught.value)
    assert f"judge '{path}:Mine' cannot be loaded: {error}" in said
    assert said.endswith(f"({path}{line})" if line else ")")
    assert "\n" not in said


def test_a_mistake_that_a_plug_in_tells_itself_is_told_as_it_is(tmp_path):
    path = tmp_path / "mine.py"
    told = "from store.errors import UserError\nraise UserError('give me a key')"
    path.write_text(told)
    with pytest.raises(UserError, match=r"^give me a key$"):
        plugins.find("judge", f"{path}:Mine")


def test_an_annotation_that_cannot_be_read_is_a_sentence(tmp_path):
    path = tmp_path / "mine.py"
    made = FAILS_WHEN_MADE.format("pass").replace("(self)", "(self, a: Missing = 1)")
    path.write_text(f"from __future__ import annotations\n{made}")
    with pytest.raises(UserError, match=r"annotation .* 'Missing' is not defined"):
        plugins.load("judge", f"{path}:Mine", {})


@pytest.mark.parametrize("spec", [":", ":X", ".:X", "..:X", "judges.:X", "judges.verifier:"])
def test_half_a_name_is_answered_with_how_one_is_written(spec):
    with pytest.raises(UserError, match=r"names no judge; right are .*module:Name"):
        plugins.find("judge", spec)


def test_only_classes_of_the_module_itself_are_suggested(mine):
    with pytest.raises(UserError) as caught:
        plugins.find("judge", f"{mine}:Zzz")
    assert str(caught.value).endswith("there are: HalfAJudge, Mine, NotAJudge")


def test_a_refusal_has_the_right_article():
    with pytest.raises(UserError, match="is not an engine"):
        plugins.find("engine", "judges.verifier:Verifier")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NotAJudge", "it has no method judge"),
        ("HalfAJudge", "it has no method score"),
        ("judge", "is not a judge"),
    ],
)
def test_what_is_not_a_judge_is_refused_when_it_is_named(mine, name, words):
    with pytest.raises(UserError, match=words):
        plugins.find("judge", f"{mine}:{name}")


def test_an_unknown_option_is_answered_with_those_there_are():
    with pytest.raises(UserError) as caught:
        plugins.load("judge", "verifier", {"tolerence": 0.1})
    assert "did you mean 'tolerance'?" in str(caught.value)
    assert "scorer, answer, pattern, partial, tolerance" in str(caught.value)


def test_a_role_without_options_says_so():
    with pytest.raises(UserError, match="its options: none"):
        plugins.load("judge", f"{__name__}:Plain", {"a": 1})
    assert isinstance(plugins.load("judge", f"{__name__}:Plain", {}), Plain)


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        (f"{__name__}:Bounded", {"share": 1.5}, "less than or equal to 1"),
        ("verifier", {"scorer": "vibes"}, "'exact'"),
        ("verifier", {"tolerance": "small"}, "valid number"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_option(spec, options, words):
    with pytest.raises(UserError) as caught:
        plugins.load("judge", spec, options)
    assert words in str(caught.value)
    assert repr(next(iter(options))) in str(caught.value)


def test_a_required_option_that_is_left_out_is_named():
    with pytest.raises(UserError, match="option 'tasks': Field required"):
        plugins.load("proposer", "reasoning_gym", {})


def test_an_option_may_begin_with_model(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(
        "class Odd:\n"
        "    def __init__(self, model_name: str = 'a'):\n"
        "        self.model_name = model_name\n"
        "    def judge(self, groups, policy, call):\n"
        "        return []\n"
    )
    assert plugins.load("judge", f"{path}:Odd", {"model_name": "b"}).model_name == "b"


def test_a_plug_in_inherits_the_options_of_a_dataclass_of_another_module(tmp_path):
    """Their annotations are text, and name what only that other module has imported."""
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from roles.trainers.preference import Preference\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(Preference):\n"
        "    patience: int = 1\n"
    )
    made = plugins.load("trainer", f"{tmp_path}/mine.py:Mine", {"patience": 3, "loss": "sigmoid"})
    assert (made.patience, made.loss) == (3, "sigmoid")
    with pytest.raises(UserError, match="loss"):
        plugins.load("trainer", f"{tmp_path}/mine.py:Mine", {"loss": "sigmund"})
