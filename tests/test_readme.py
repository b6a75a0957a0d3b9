"""README.md does what it says: its blocks are run in order, in an empty folder, as they stand.

Three things are not as a reader types them. A run is made small (SMALL is added to commands that
begin one; the task is one that a model of 16 steps gets partly right). What needs a fresh machine
or minutes is replaced (INSTEAD says by what and why). And `loop why` takes the number that
`loop show` printed. What is printed is compared with what the README shows in words and order;
numbers, dates and what models wrote may differ.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from loop import config, settings
from roles import plugins

README = Path(__file__).resolve().parent.parent / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)

SMALL = (
    'proposer.tasks=[{name="letter_counting",min_words=1,max_words=3}]',
    *("prompts=48", "evaluate.gate_prompts=64", "evaluate.test_prompts=64", "gate.patience=0"),
    *("warmup.prompts=256", "warmup.generator.n=2"),
    *("warmup.trainer.epochs=2", "warmup.trainer.batch_size=32"),
    *("trainer.epochs=1", "trainer.learning_rate=5e-4"),
)
SELF_REWARDING = (
    *("rounds=1", "prompts=32", "evaluate.gate_prompts=32", "evaluate.test_prompts=32"),
    *("evaluate.anchors.prompts=16", "warmup.prompts=64", "warmup.generator.n=1"),
    *("warmup.track.judging.prompts=600", "warmup.track.proposing.prompts=150"),
    *("warmup.trainer.epochs=4", "warmup.trainer.batch_size=32", "trainer.epochs=1"),
    "gate.patience=0",
)
PERSON = (
    'proposer.tasks=[{name="letter_counting",min_words=1,max_words=3}]',
    *("evaluate.gate_prompts=32", "evaluate.test_prompts=32", "warmup.prompts=64"),
    *("warmup.generator.n=1", "warmup.trainer.epochs=2", "warmup.trainer.batch_size=32"),
    "trainer.epochs=1",
)
OWN = {
    **{"self-rewarding": SELF_REWARDING, "mine.toml": (), "person.toml": PERSON},
    "apart.toml": (*SMALL, "rounds=1"),
}
"""What makes small the runs whose command has one of these words."""
BEGINS = re.compile(r"^loop start(?! runs/)[^&\n]*", re.M)

WAIT = """
import time
from pathlib import Path

from loop import lease, run
from store.database import Store
from store.errors import UserError

for _ in range(1200):
    time.sleep(0.1)
    try:
        store = Store(run.find_run(None, Path("runs")) / run.DATABASE)
        found, rounds = store.run(), store.rounds()
        store.close()
    except (UserError, FileNotFoundError):
        continue
    if found and lease.is_alive(found) and rounds and rounds[-1].stage == "train":
        break
"""
INSTEAD = {
    "make start": ("loop start", "make would install everything again, from the network"),
    ". .venv/bin/activate": (":", "the environment of this test is the one that is meant"),
    "pip install ./places-judge": (
        "pip install --quiet --no-index --no-build-isolation --target installed ./places-judge; "
        "export PYTHONPATH=$PWD/installed",
        "the environment of this test stays as it is",
    ),
    "sleep 60": ("python3 wait.py", "waits until the run trains, so that it is killed there"),
    "--set rounds=4": ("--set rounds=1", "one round shows as much as four"),
}


@dataclass(frozen=True)
class Block:
    kind: str
    body: str
    line: int
    before: str
    """What is written between the block before it and this one."""

    @property
    def place(self) -> str:
        return f"line {self.line}"


def blocks() -> list[Block]:
    text, found, end = README.read_text(), [], 0
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match[1], match[2], line, text[end : match.start()]))
        end = match.end()
    return found


BLOCKS = blocks()
RUN = [block for block in BLOCKS if block.kind in ("sh", "sql")]
SHOWN = [(block, after) for block, after in pairwise(BLOCKS) if after.kind == "text"]


def named(block: Block) -> str:
    """The file that the text before a block tells to save it as."""
    return re.findall(r"as\s+`([\w.]+)`", block.before)[-1]


def typed(block: Block, printed: dict[Block, str]) -> str:
    """What is typed for a block, with this test's changes."""
    said = block.body
    for old, (new, _) in INSTEAD.items():
        said = said.replace(old, new)
    said = BEGINS.sub(lambda found: made_small(found[0]), said)
    if "loop why" in said:
        (why,) = re.findall(r"^why: (loop why \d+)$", "\n".join(printed.values()), re.M)
        said = re.sub(r"loop why \d+", why, said)
    return said


def made_small(command: str) -> str:
    sets = next((sets for word, sets in OWN.items() if word in command), SMALL)
    return command.replace("start", "start" + "".join(f" --set '{each}'" for each in sets), 1)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[Block, str]:
    """What each sh and sql block printed, all having been run."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "wait.py").write_text(WAIT)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    said: dict[Block, str] = {}
    for block in BLOCKS:
        if block.kind in ("python", "toml"):
            (folder / named(block)).write_text(block.body)
        elif block.kind in ("sh", "sql"):
            sql = block.kind == "sql"
            command = ["python3", "ask.py"] if sql else ["bash", "-euo", "pipefail", "-s"]
            done = subprocess.run(
                command,
                input=block.body if sql else typed(block, said),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=folder,
                env=environment,
                timeout=300,
            )
            assert done.returncode == 0, f"{block.place}: {done.stdout}"
            said[block] = done.stdout
    return said


NUMBER = r"(?:[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?%?|-)"
MAY_DIFFER = (
    (r"\d{4}-\d\d-\d\d-\d{6}", r"\d{4}-\d\d-\d\d-\d{6}"),
    (r"'[^']*'", r"'[^']*'"),
    (r"(?<=prompts: ).*", r"[^\n]*"),  # the gate's reason, after the numbers
    (r"(?<=user: ).*|(?<=text: ).*|(?<=right answer: ).*", r"[^\n]*"),
    (r"\b(?:accept|undecided|reject)\b", r"(?:accept|undecided|reject)"),
    (r"\b(?:pruned|accepted|rejected)(?=\))", r"(?:pruned|accepted|rejected)"),
    (r"\bspell_backward\b", r"\w+"),
    (r"(?<=interrupted: )\w+", r"\w+"),
    (r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?%?|(?<=round-)\d+", NUMBER),
    (r"\s+", r"\s+"),
)
DIFFERENCE = re.compile("|".join(f"({old})" for old, _ in MAY_DIFFER))


def pattern(shown: str) -> str:
    """A regular expression of the lines as they may be printed in another run."""
    found, end = "", 0
    for match in DIFFERENCE.finditer(shown):
        assert match.lastindex is not None
        found += re.escape(shown[end : match.start()]) + MAY_DIFFER[match.lastindex - 1][1]
        end = match.end()
    return found + re.escape(shown[end:])


def missing(shown: str, said: str) -> str | None:
    """The first part of what is shown that was not printed after the parts before it."""
    start = 0
    for part in re.split(r"^\.\.\.\n", shown, flags=re.M):
        found = re.compile(pattern(part.strip())).search(said, start)
        if found is None:
            return part
        start = found.end()
    return None


def test_every_block_is_of_a_kind_that_is_run_or_checked() -> None:
    assert {block.kind for block in BLOCKS} == {"sh", "sql", "python", "toml", "text"}
    shown = [block for block in BLOCKS if block.kind == "text"]
    assert [after for before, after in SHOWN if before in RUN] == shown


def test_what_is_replaced_is_in_the_readme() -> None:
    said = "".join(block.body for block in RUN)
    assert [old for old in INSTEAD if old not in said] == []


@pytest.mark.parametrize(
    ("shown", "said", "same"),
    [
        ("gain +0.1 [+0.0, +0.2]\n", "x gain -3 [+1e-05,   -] y", True),
        ("a 1\n...\nb 2\n", "a 9\nmore\nb 8\n", True),
        ("a 1\nb 2\n", "a 9\nmore\nb 8\n", False),
        ("a 1\n...\nb 2\n", "b 8\na 9\n", False),
        ("  text: eeka\nok\n", "  text: q r\nok\n", True),
        ("answer 'a' is right\n", "answer 'b' is wrong\n", False),
    ],
)
def test_words_are_compared_and_numbers_are_not(shown: str, said: str, same: bool) -> None:
    assert (missing(shown, said) is None) == same


@pytest.mark.slow
@pytest.mark.parametrize(("block", "shown"), SHOWN, ids=[shown.place for _, shown in SHOWN])
def test_what_is_shown_is_what_is_printed(
    printed: dict[Block, str], block: Block, shown: Block
) -> None:
    said = printed[block]
    if block.kind == "sql":
        compare_tables(shown.body, said)
        return
    part = missing(shown.body, said)
    assert part is None, f"{shown.place}: not printed:\n{part}\nprinted:\n{said}"


def compare_tables(shown: str, said: str) -> None:
    """The same columns, and a number or None wherever a number is shown."""
    rows = [line.split(" | ") for line in said.splitlines()]
    examples = [line.split(" | ") for line in shown.splitlines() if line != "..."]
    assert rows[0] == examples[0]
    kinds = [re.fullmatch(NUMBER, cell) is not None for cell in examples[1]]
    for row in rows[1:]:
        numbers = [re.fullmatch(NUMBER + "|None", cell) is not None for cell in row]
        assert all(is_number for is_number, kind in zip(numbers, kinds, strict=True) if kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [pytest.param(block, id=block.place) for block in RUN if block.kind == "sql"],
)
def test_every_query_has_an_answer(printed: dict[Block, str], block: Block) -> None:
    assert len(printed[block].splitlines()) > 1


def test_there_are_five_queries() -> None:
    assert sum(block.kind == "sql" for block in BLOCKS) == 5


def test_the_judge_has_ten_lines() -> None:
    (judge,) = [block for block in BLOCKS if "PointwiseJudge" in block.body]
    assert len([line for line in judge.body.splitlines() if line.strip()]) == 10
    assert named(judge) == "places.py"


def test_the_tables_of_tracks_and_models_are_a_configuration(tmp_path: Path) -> None:
    (block,) = [each for each in BLOCKS if each.kind == "toml" and named(each) == "two.toml"]
    (tmp_path / "mine").mkdir()
    (tmp_path / named(block)).write_text(block.body)
    found = config.read(tmp_path / named(block))
    assert (set(found.track), set(found.models)) == (
        {"main", "long", "second"},
        {"policy", "second"},
    )
    assert found.models["second"].path == str(tmp_path / "mine")
    assert found.models["second"].trainer.options["beta"] == 0.1
    assert found.track["long"].proposer.options["tasks"][0]["min_word_len"] == 5


def test_the_table_of_parts_names_every_plug_in() -> None:
    rows = dict(re.findall(r"^\| (\w+) \| (`.*?) \|", README.read_text(), re.M))
    listed = {role: sorted(re.findall(r"`(\w+)`", rows[role])) for role in plugins.GROUPS}
    assert listed == {role: plugins.names(role) for role in plugins.GROUPS}


def test_the_settings_said_to_change_during_a_run_are_all_that_may() -> None:
    text = " ".join(README.read_text().split())
    (said,) = re.findall(r"may change while it runs: (.*?)\. ", text)
    may = {key for key in settings.flat(config.read()) if settings.operational(key)}
    assert set(re.findall(r"`([\w.]+)`", said)) == may


def test_figures_have_their_place() -> None:
    assert re.search(r"^<!-- figures -->\n.*?^<!-- /figures -->$", README.read_text(), re.M | re.S)
