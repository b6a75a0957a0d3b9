"""What stops a run in the middle: exit code 4, one sentence, nothing lost, and it goes on.

The disks are real: small ones are mounted where that is allowed, and everywhere else files are
limited in length, which fails the same writes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loop.cli import app
from runs import HERE, everything, scripted_toml
from store.database import Store
from test_bad_input import listing

PARTS = '''
import os, shutil
from pathlib import Path
from judges import PointwiseJudge
from scripted import Exact, Learner
from store.errors import UserError

HERE = Path(__file__).parent


def trouble(round):
    """Make it, the first time that the round is come by."""
    marker = HERE / "seen"
    due = round == 2 and not marker.exists()
    if due:
        marker.touch()
    return due


class Judging(Exact):
    """Makes trouble in round 2 as a user or another program would."""

    def score(self, prompt, completion, policy, call):
        if trouble(call.round):
            self.trouble(call)
        return super().score(prompt, completion, policy, call)


class Filling(Judging):
    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def trouble(self, call):
        with (self.path / "ballast").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                for size in (4096, 512, 1):
                    try:
                        while True:
                            file.write(bytes(size))
                    except OSError:
                        pass


class Mistaken(Judging):
    def trouble(self, call):
        raise UserError("the key of the API has run out; set another")


class Broken(Judging):
    def trouble(self, call):
        raise ZeroDivisionError("a bug")


class Reading(Judging):
    def trouble(self, call):
        (HERE / "words.txt").read_text()


class Removing(Judging):
    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def trouble(self, call):
        self.path.rename(self.path.with_name("moved"))


class Writing(Learner):
    """Writes a checkpoint of some size."""

    def train(self, examples, start, reference, into, call):
        made = super().train(examples, start, reference, into, call)
        (into / "model.safetensors").write_bytes(bytes(7 << 20))
        return made
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration and the parts above."""
    (tmp_path / "parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    scripted_toml(tmp_path)
    return tmp_path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of its own: `disk("size=3m")`."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        told = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
        if shutil.which("mount") is None or subprocess.run(told, capture_output=True).returncode:
            pytest.skip("nothing may be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


def typed(*arguments: object) -> subprocess.CompletedProcess[str]:
    """What typing it gives, without a process of its own."""
    given = list(map(str, arguments))
    found = CliRunner().invoke(app, given, env={"COLUMNS": "200"})
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return subprocess.CompletedProcess(given, found.exit_code, found.stdout, found.stderr)


def only(runs: Path) -> Path:
    [root] = runs.iterdir()
    return root


def status(root: Path) -> str:
    store = Store(root / "loop.db")
    found = store.run()
    store.close()
    assert found is not None
    return found.status


def undisturbed(here: Path, *arguments: object) -> Path:
    """The run as it is when the trouble has been before it began."""
    (here / "seen").touch()
    done = typed("start", "--config", "loop.toml", "--runs", "quiet", *arguments)
    assert done.returncode == 0, done.stderr
    (here / "seen").unlink()
    return only(here / "quiet")


def judged(part: str) -> list[str]:
    return ["--set", f"judge.use=parts.py:{part}"]


def left(done: subprocess.CompletedProcess[str], *said: str) -> None:
    """Exit code 4, a sentence, what is kept and what to type."""
    assert done.returncode == 4, done.stdout + done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr, done.stderr
    *_, told, last = done.stderr.splitlines()
    for words in said:
        assert words in told
    assert "every committed batch is intact" in last
    assert "`loop start " in last


def same(one: Path, other: Path) -> None:
    """Row by row, times aside."""
    left, right = everything(one), everything(other)
    for table in left:
        assert left[table] == right[table], table


def goes_on_to_the_same(root: Path, whole: Path) -> None:
    done = typed("start", root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"goes on with {root}" in done.stderr
    same(root, whole)
    verified = typed("verify", root)
    assert verified.returncode == 0, verified.stdout


# Mistakes and bugs


def test_a_mistake_in_mid_run_is_a_sentence_and_the_run_goes_on(here: Path) -> None:
    whole = undisturbed(here, *judged("Mistaken"))
    done = typed("start", "--config", "loop.toml", *judged("Mistaken"))
    left(done, "the key of the API has run out; set another")
    root = only(here / "runs")
    assert done.stderr.splitlines()[-1].startswith("judge of round 2 failed; ")
    assert status(root) == "failed"
    log = (root / "logs/attempt-1.log").read_text()
    assert "parts.py" in log, "the log says where"
    assert "the key of the API has run out" in log
    goes_on_to_the_same(root, whole)


def test_a_bug_is_shown_whole(here: Path) -> None:
    whole = undisturbed(here, *judged("Broken"))
    done = typed("start", "--config", "loop.toml", *judged("Broken"))
    assert done.returncode == 4
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: a bug" in done.stderr
    assert "judge of round 2 failed; every committed batch is intact" in done.stderr
    goes_on_to_the_same(only(here / "runs"), whole)


def test_a_file_that_a_part_wants_and_is_not_there_is_named(here: Path) -> None:
    whole = undisturbed(here, *judged("Reading"))
    done = typed("start", "--config", "loop.toml", *judged("Reading"))
    left(done, "a file cannot be used: ", f"No such file or directory: '{here}/words.txt'")
    root = only(here / "runs")
    goes_on_to_the_same(root, whole)


def test_before_anything_was_asked_it_is_a_mistake_like_any_other(here: Path) -> None:
    (here / "late.py").write_text(
        "from scripted import Sums\nclass Late(Sums):\n"
        "    def propose(self, *arguments):\n        open('/nowhere/words.txt')\n"
    )
    done = typed("start", "--config", "loop.toml", "--set", "proposer.use=late.py:Late")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "loop: a file cannot be used: [Errno 2] No such file or directory: '/nowhere/words.txt'"
    )
    assert list((here / "runs").iterdir()) == []


# Files that go


def test_a_checkpoint_that_goes_in_mid_run_is_named_and_put_back(here: Path) -> None:
    gone = f'judge={{use = "parts.py:Removing", path = "{here}/base"}}'
    sets = ["--set", gone, "--set", "rounds=2", "--set", "trainer.gain=0.0"]  # base stays
    done = typed("start", "--config", "loop.toml", *sets)
    left(done, f"{here}/base")
    root = only(here / "runs")
    before = everything(root)
    again = typed("start", root)
    assert again.returncode == 2
    assert f"no model folder '{here}/base'" in again.stderr
    assert everything(root) == before
    (here / "moved").rename(here / "base")
    (here / "seen").touch()
    whole = typed("start", "--config", "loop.toml", "--runs", "quiet", *sets)
    assert whole.returncode == 0, whole.stderr
    on = typed("start", root)
    assert on.returncode == 0, on.stderr
    same(root, only(here / "quiet"))


@pytest.mark.parametrize("name", ["parts.py", "prompts.jsonl"])
def test_a_file_that_was_removed_is_asked_for_and_nothing_is_lost(here: Path, name: str) -> None:
    rows = [f'{{"prompt": "1 x {n} + {n} = ?", "answer": "{2 * n}"}}\n' for n in range(300)]
    (here / "prompts.jsonl").write_text("".join(rows))
    data = 'proposer={use = "roles.proposers.dataset:Dataset", path = "prompts.jsonl"}'
    sets = [*judged("Mistaken"), "--set", data, "--set", "evaluate.gate_prompts=40"]
    whole = undisturbed(here, *sets)
    left(typed("start", "--config", "loop.toml", *sets), "the key of the API")
    root = only(here / "runs")
    (here / name).rename(here / "elsewhere")
    before = everything(root), listing(root)
    done = typed("start", root)
    assert (done.returncode, done.stdout) == (2, "")
    assert name in done.stderr
    assert done.stderr.count("\n") == 1
    assert (everything(root), listing(root)) == before
    (here / "elsewhere").rename(here / name)
    goes_on_to_the_same(root, whole)


# Disks


def test_a_disk_that_is_too_small_is_refused_at_start(
    here: Path, disk: Callable[[str], Path]
) -> None:
    place = disk("size=1m")
    done = typed("start", "--config", "loop.toml", "--runs", place / "runs")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"the disk of {place}/runs/ has 1.0 MB free" in done.stderr
    assert "this run needs about" in done.stderr
    assert list(place.iterdir()) == []


def test_a_disk_that_cannot_be_written_is_a_sentence(
    here: Path, disk: Callable[[str], Path]
) -> None:
    place = disk("size=64m")
    assert typed("start", "--config", "loop.toml", "--runs", place).returncode == 0
    root = only(place)
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    before = listing(place)
    new = typed("start", "--config", "loop.toml", "--runs", place, "--set", "seed=9")
    assert (new.returncode, new.stdout) == (2, "")
    assert f"cannot make a run directory under {place}: " in new.stderr
    assert "Read-only file system" in new.stderr
    on = typed("start", root, "--set", "rounds=9")
    assert (on.returncode, on.stdout) == (2, "")
    assert f"{root}/loop.db cannot be" in on.stderr
    for done in (new, on):
        assert done.stderr.splitlines()[-1].startswith("loop: ")
        assert "Traceback" not in done.stderr
    assert listing(place) == before


def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(
    here: Path, disk: Callable[[str], Path]
) -> None:
    """The judge fills the disk, so that the next commit fails."""
    place = disk("size=64m")
    full = ["--set", f'judge={{use = "parts.py:Filling", path = "{place}"}}']
    whole = undisturbed(here, *full)
    done = typed("start", "--config", "loop.toml", "--runs", place / "runs", *full)
    left(done, "disk", "full")
    root = only(place / "runs")
    again = typed("start", root)
    # 2 where not even the lease can be written, 4 where the write-ahead log still had room.
    assert again.returncode in (2, 4), again.stderr
    assert "Traceback" not in again.stderr
    assert "full" in again.stderr
    (place / "ballast").unlink()
    goes_on_to_the_same(root, whole)


def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_no_half_of_it(
    here: Path, disk: Callable[[str], Path]
) -> None:
    writing = ["--set", 'trainer={use = "parts.py:Writing"}']
    whole = undisturbed(here, *writing)
    place = disk("size=64m")
    (place / "ballast").write_bytes(bytes(shutil.disk_usage(place).free - (19 << 20)))
    done = typed("start", "--config", "loop.toml", "--runs", place / "runs", *writing)
    root = only(place / "runs")
    left(done, f"the disk of {root} is full")
    assert "train of round" in done.stderr.splitlines()[-1]
    assert typed("verify", root).returncode == 0
    (place / "ballast").unlink()
    goes_on_to_the_same(root, whole)


LIMITED = f"""
import resource, sys
sys.path.insert(0, {str(HERE)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from loop.cli import main
main()
"""


@pytest.mark.parametrize("longest", [200_000, pytest.param(400_000, marks=pytest.mark.slow)])
def test_a_limit_on_files_stops_a_run_that_goes_on_without_it(here: Path, longest: int) -> None:
    whole = undisturbed(here)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(longest), "start", "--config", "loop.toml"],
        capture_output=True,
        text=True,
        check=False,
    )
    left(done, "loop.db cannot be")
    goes_on_to_the_same(only(here / "runs"), whole)
