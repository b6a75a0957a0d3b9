"""A run that begins where another one stands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loop import config, fork, run
from runs import everything, go_on, loop, scripted_toml, start
from store.database import Store
from store.errors import UserError


@pytest.fixture
def ended(tmp_path: Path) -> tuple[Path, Path]:
    """(configuration file, a run of two rounds)."""
    file = scripted_toml(tmp_path)
    root, outcome = start(file, tmp_path / "runs", ["rounds=2"])
    assert outcome.code == 0
    return file, root


def forked(file: Path, root: Path, runs: Path, *sets: str) -> Path:
    return fork.fork(root, config.read(file, sets=sets), runs, "fork")


def test_a_fork_under_the_same_settings_ends_as_the_run_itself_would(
    ended: tuple[Path, Path], tmp_path: Path
) -> None:
    file, root = ended
    before = everything(root)
    new = forked(file, root, tmp_path / "forks", "rounds=4")
    assert everything(root) == before
    settings = run.stored_config(new)
    assert go_on(new, settings, run.load_roles(settings)).code == 0
    straight, _ = start(file, tmp_path / "straight", ["rounds=4"])
    ours, theirs = everything(new), everything(straight)
    for table in ("candidate", "judgement", "example", "evaluation", "trained_on"):
        assert ours[table] == theirs[table], table


def test_a_fork_may_have_other_settings_and_says_whose_it_is(
    ended: tuple[Path, Path], tmp_path: Path
) -> None:
    file, root = ended
    new = forked(file, root, tmp_path / "forks", "rounds=3", "filter.pairs=2", "generator.n=4")
    settings = run.stored_config(new)
    assert go_on(new, settings, run.load_roles(settings)).code == 0
    with_store = Store(new / "loop.db")
    made, parent = with_store.run(), Store(root / "loop.db").run()
    assert made is not None
    assert parent is not None
    assert (made.parent_uuid, made.parent_path) == (parent.uuid, str(root.resolve()))
    assert made.uuid != parent.uuid
    assert {each["key"] for each in made.changes} >= {
        "rounds",
        "track.main.filter.pairs",
        "track.main.generator.n",
    }
    counts = with_store.query(
        "SELECT number, count(*) AS n FROM candidate JOIN asked ON asked.id = asked_id "
        "JOIN round ON round.id = round_id WHERE purpose = 'train' AND number > 0 GROUP BY number"
    )
    with_store.close()
    assert [row["n"] for row in counts] == [24 * 8, 24 * 8, 24 * 4]
    # The old one can go: nothing of it is needed.
    shutil.rmtree(root)
    verified = loop("verify", new)
    assert verified.returncode == 0, verified.stdout


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("seed=1", "seed stays what it was"),
        ("evaluate.gate_prompts=61", "evaluate.gate_prompts stays"),
        ("model.path=embedded", "models.policy.path stays"),
    ],
)
def test_what_the_rounds_so_far_hang_on_cannot_change(
    ended: tuple[Path, Path], tmp_path: Path, setting: str, told: str
) -> None:
    file, root = ended
    with pytest.raises(UserError, match=told):
        forked(file, root, tmp_path / "forks", setting)
    assert not (tmp_path / "forks").exists()


def test_what_may_change_in_a_run_may_change_in_a_fork(tmp_path: Path) -> None:
    (tmp_path / "size.py").write_text("print('{\"size\": 1}')")
    more = '[evaluate.command.size]\nrun = "python size.py {checkpoint}"\n'
    file = scripted_toml(tmp_path, more)
    root, _ = start(file, tmp_path / "runs", ["rounds=1"])
    new = forked(file, root, tmp_path / "forks", "evaluate.command.size.timeout_s=9.0")
    assert run.stored_config(new).evaluate.command["size"].timeout_s == 9.0
    with pytest.raises(UserError, match=r"evaluate\.command\.size\.guard stays"):
        forked(file, root, tmp_path / "forks", "evaluate.command.size.guard=size")


def test_a_fork_that_cannot_be_copied_leaves_nothing_and_is_no_run(
    ended: tuple[Path, Path], tmp_path: Path
) -> None:
    file, root = ended
    shutil.rmtree(root / "checkpoints")
    with pytest.raises(UserError, match="cannot copy"):
        forked(file, root, tmp_path / "forks")
    assert run.all_runs(tmp_path / "forks") == []
    assert list((tmp_path / "forks").iterdir()) == []


def test_a_round_that_is_under_way_is_ended_first(tmp_path: Path) -> None:
    file = scripted_toml(tmp_path, "[budget]\ngenerated_tokens = 2000\n")
    root, outcome = start(file, tmp_path / "runs")
    assert outcome.code == 3
    assert Store(root / "loop.db").rounds()[-1].status == "running"
    with pytest.raises(UserError, match=r"round \d of .* is not over; `loop start"):
        forked(file, root, tmp_path / "forks")


def test_loop_fork_says_what_to_type_next(ended: tuple[Path, Path], tmp_path: Path) -> None:
    _, root = ended
    said = loop("fork", root, "--runs", tmp_path / "forks", "--set", "rounds=3", "--name", "more")
    assert said.returncode == 0, said.stderr
    (new,) = (tmp_path / "forks").iterdir()
    assert new.name.endswith("-more")
    assert said.stdout.strip() == f"made {new}; next: loop start {new}"
    assert loop("start", new).returncode == 0
    refused = loop("fork", root, "--runs", tmp_path / "forks", "--set", "seed=9")
    assert refused.returncode == 2
    assert refused.stderr.startswith("loop: seed stays what it was in a fork")
