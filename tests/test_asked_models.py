"""Whose model a judge asks, and what of an answer it is shown."""

from pathlib import Path

import pytest

from loop import run
from runs import SCRIPTED, loop, scripted_toml, start
from scripted import write_model
from store.database import Store
from store.errors import UserError

JUDGED = """
SELECT number, max(score) AS best, group_concat(DISTINCT judge_model) AS by
FROM verdict JOIN judgement USING (candidate_id, judge, round_id)
JOIN round ON round.id = verdict.round_id JOIN candidate ON candidate.id = verdict.candidate_id
JOIN asked ON asked.id = candidate.asked_id
WHERE verdict.judge LIKE '%Skilful%' AND purpose = 'train' GROUP BY number ORDER BY number
"""


def judged(root: Path) -> list[tuple[int, float, str]]:
    store = Store(root / "loop.db")
    found = store.query(JUDGED)
    store.close()
    return [(row["number"], round(row["best"], 6), Path(row["by"]).name) for row in found]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("round", [(1, 0.3, "base"), (2, 0.5, "round-0001-policy")]),
        ("model:policy", [(1, 0.3, "base"), (2, 0.5, "round-0001-policy")]),
        ("checkpoint:base", [(1, 0.3, "base"), (2, 0.3, "base")]),
        ("checkpoint:{folder}/frozen", [(1, 0.8, "frozen"), (2, 0.8, "frozen")]),
    ],
)
def test_a_judge_asks_the_model_that_it_is_told_to(
    tmp_path: Path, model: str, expected: list[tuple[int, float, str]]
) -> None:
    write_model(tmp_path / "frozen", 0.8)
    sets = ["rounds=2", f"judge.use={SCRIPTED}:Skilful", "filter.use=best_worst"]
    sets.append(f"judge.model={model.format(folder=tmp_path)}")
    root, outcome = start(scripted_toml(tmp_path), tmp_path / "runs", sets)
    assert outcome.code == 0, outcome.reason
    assert judged(root) == expected
    verified = loop("verify", root)
    assert verified.returncode == 0, verified.stdout


def test_a_frozen_model_may_judge_for_the_gate_and_one_of_the_run_may_not(tmp_path: Path) -> None:
    write_model(tmp_path / "frozen", 0.8)
    file = scripted_toml(tmp_path)
    sets = ["rounds=1", f"evaluate.judge.use={SCRIPTED}:Skilful"]
    root, outcome = start(
        file, tmp_path / "runs", [*sets, f"evaluate.judge.model=checkpoint:{tmp_path}/frozen"]
    )
    assert outcome.code == 0, outcome.reason
    store = Store(root / "loop.db")
    (found,) = store.query("SELECT max(score) AS best FROM judgement WHERE judge LIKE '%Skilful%'")
    store.close()
    assert found["best"] == pytest.approx(0.8)
    with pytest.raises(UserError, match="none grades itself"):
        start(file, tmp_path / "runs", [*sets, "evaluate.judge.model=round"])


def test_tokens_of_a_judge_that_is_a_model_of_the_run_count_against_the_budget(
    tmp_path: Path,
) -> None:
    sets = ["rounds=1", f"judge.use={SCRIPTED}:Skilful", "filter.use=best_worst"]
    root, _ = start(scripted_toml(tmp_path), tmp_path / "runs", [*sets, "judge.model=round"])
    store = Store(root / "loop.db")
    (sampled,) = store.query("SELECT sum(tokens) AS n FROM candidate")
    (asked,) = store.query("SELECT sum(tokens) AS n FROM verdict WHERE judge_model IS NOT NULL")
    assert asked["n"] > 0
    assert store.generated_tokens() == sampled["n"] + asked["n"]
    store.close()


@pytest.mark.parametrize(("thinking", "shown"), [("shown", True), ("hidden", False)])
def test_thoughts_are_kept_from_a_judge_that_is_not_to_see_them(
    tmp_path: Path, thinking: str, shown: bool
) -> None:
    sets = ["rounds=1", f"engine.use={SCRIPTED}:Thinker", f"judge.use={SCRIPTED}:Skilful"]
    sets += ["judge.model=round", f"judge.thinking={thinking}", "filter.use=everything"]
    root, outcome = start(scripted_toml(tmp_path), tmp_path / "runs", sets)
    assert outcome.code == 0, outcome.reason
    store = Store(root / "loop.db")
    rows = store.query(
        "SELECT raw, text FROM verdict JOIN candidate ON candidate.id = candidate_id "
        "WHERE judge LIKE '%Skilful%'"
    )
    store.close()
    assert all("think>" in row["text"] for row in rows)
    assert any("think>" in row["raw"] for row in rows) == shown
    if not shown:
        assert all(row["raw"].isdigit() for row in rows)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("judge.model=nobody", r"asks the model 'nobody'; there are: round, model:policy, "),
        ("judge.model=checkpoint:/nowhere/x", r"no model folder '/nowhere/x'"),
        ("generator.model=round", r"has no option 'model'; a judge or a proposer"),
        ("generator.thinking=hidden", r"has no option 'thinking'"),
        ("judge.model=checkpoint:", r"'checkpoint:'|is empty"),
        ("judge.thinking=secret", r"thinking.*'shown' or 'hidden'.*found 'secret'"),
    ],
)
def test_a_mistake_in_whom_to_ask_is_told_at_the_start(
    tmp_path: Path, setting: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        start(scripted_toml(tmp_path), tmp_path / "runs", [setting])
    assert run.all_runs(tmp_path / "runs") == []


@pytest.mark.parametrize(
    ("filter", "trainer", "sentence"),
    [
        ("best_worst", "kto", r"filter 'best_worst' gives pairs, and trainer 'kto' learns from "),
        ("labelled", "preference", r"gives labelled candidates, .* learns from pairs"),
        ("best_only", "preference", r"gives demonstrations, .* learns from pairs"),
    ],
)
def test_a_filter_and_a_trainer_that_do_not_go_together_are_told_at_the_start(
    tmp_path: Path, filter: str, trainer: str, sentence: str
) -> None:
    sets = [f"filter.use={filter}", f"trainer.use={trainer}"]
    with pytest.raises(UserError, match=sentence):
        start(scripted_toml(tmp_path), tmp_path / "runs", sets)
    assert run.all_runs(tmp_path / "runs") == []
