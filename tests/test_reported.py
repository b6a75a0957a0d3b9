"""Claims that stay as they were before their reported seeds ran, and how results are told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loop import claims, config, recipe_book
from runs import HERE

sys.path.insert(0, str(HERE / "benchmarks"))

import reported
import results
import told

# Reported seeds


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of one's own, in a repository with the arenas and default.toml."""
    shutil.copytree(config.HERE / "recipes" / "arenas", tmp_path / "recipes" / "arenas")
    shutil.copy(config.HERE / "default.toml", tmp_path / "default.toml")
    monkeypatch.setattr(config, "HERE", tmp_path)
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'arena = "spell"\nrounds = 2\ncontrol = ["rounds=1"]\n'
        '[[claim]]\nsays = "It is so"\nmetric = "score"\n'
        '[[claim]]\nsays = "So it is with them"\nmetric = "length"\n'
    )
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    commit(tmp_path)
    return mine


def commit(folder: Path) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    for said in (["add", "-A"], [*who, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-C", str(folder), *said], check=True)


@pytest.mark.parametrize("changed", ["mine.toml", "recipes/arenas/spell.toml", "default.toml"])
def test_reported_seeds_wait_until_all_that_a_recipe_stands_on_is_committed(
    recipe: Path, changed: str
) -> None:
    reported.uncommitted([str(recipe)])
    with (recipe.parent / changed).open("a") as file:
        file.write("# more\n")
    with pytest.raises(SystemExit, match=f"commit these .*\n M .*{Path(changed).name}"):
        reported.uncommitted([str(recipe)])


@pytest.mark.parametrize(
    ("file", "before", "after", "key"),
    [
        ("mine.toml", "It is so", "It is not so", "claim"),
        ("mine.toml", 'metric = "length"', 'metric = "truncated"', "claim"),
        ("mine.toml", 'control = ["rounds=1"]', 'control = ["rounds=3"]', "control"),
        ("mine.toml", "rounds = 2", "rounds = 4", "the recipe's settings"),
        ("recipes/arenas/spell.toml", "prompts = 480", "prompts = 481", "the arena's settings"),
        ("default.toml", "rounds = ", "rounds = 1", "default.toml"),
    ],
)
def test_a_claim_stays_as_it_was_when_its_reported_seeds_first_ran(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    before: str,
    after: str,
    key: str,
) -> None:
    name, runs = str(recipe), tmp_path / "runs"
    place = runs / told.plain_name(name)
    reported.fix(place, name)
    reported.fix(place, name)
    text = (recipe.parent / file).read_text()
    assert before in text
    (recipe.parent / file).write_text(text.replace(before, after, 1))
    commit(recipe.parent)
    monkeypatch.setattr(sys, "argv", ["results.py", name, "--seeds", "3", "--runs", str(runs)])
    with pytest.raises(SystemExit, match=f"differs in {key}; put that back, or remove {place} "):
        results.main()
    assert [each.name for each in place.iterdir()] == ["claim.json"]


def test_what_was_found_is_written_when_the_reported_seeds_have_run(
    recipe: Path, tmp_path: Path
) -> None:
    reported.fix(tmp_path / "runs", str(recipe))
    recipe.write_text(recipe.read_text() + 'found = "Seeds differ."\n')
    reported.fix(tmp_path / "runs", str(recipe))
    kept = json.loads((tmp_path / "runs" / "claim.json").read_text())
    assert kept["claim"][1] == {"says": "So it is with them", "metric": "length"}


@pytest.mark.parametrize("seeds", [(), ("--seeds", "100", "3")])
def test_reported_seeds_run_under_the_recipes_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: tuple[str, ...]
) -> None:
    asked = ["results.py", "irpo", *seeds, "--set", "rounds=1", "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit, match="tune on seeds from 100 up"):
        results.main()
    assert not (tmp_path / "runs").exists()


# How it is told


def row(recipe: str, claimed: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    course = [(0.5, 0.4, 0.6), (0.7, 0.6, 0.8)]
    variant = {"course": course, "tokens": 1000, "seconds": 60.0, "slowest": 60.0}
    return {
        "recipe": recipe,
        "arena": "spell",
        "shown": "accuracy_sampled",
        "seeds": [0, 1, 2, 3, 4],
        "claims": claimed,
        "variants": dict.fromkeys(("recipe", "control", "plain"), variant),
        **more,
    }


def result(claim: claims.Claim, verdict: str) -> dict[str, Any]:
    numbers = {"ours": 0.7, "theirs": 0.6, "difference": 0.1, "low": 0.05, "high": 0.15}
    said = {"items": 100, "left_out": 0, "verdict": verdict}
    return claim.model_dump(exclude={"query"}) | numbers | said


def test_a_result_is_that_of_the_claim_that_says_the_same(recipe: Path) -> None:
    first, second = claims.read(str(recipe)).claim
    gone = claims.Claim(says="It was so", metric="score")
    kept = [result(gone, "refuted"), result(second, "confirmed")]
    said = told.markdown({str(recipe): row(str(recipe), kept)})
    assert f"- **not tried yet**: {first.says}. Expected more.\n" in said
    assert f"- **confirmed**: {second.says}. Expected more; +0.100 [+0.050, +0.150] (" in said
    assert "It was so" not in said
    assert "| not tried yet; confirmed |" in said
    assert "nothing is corrected for there being 2 claims" in " ".join(said.split())
    assert "First claims: 0 confirmed, 0 refuted, 0 undecided, 1 not tried yet." in said


def test_how_many_values_only_one_side_has_is_told(recipe: Path) -> None:
    first, second = claims.read(str(recipe)).claim
    kept = [result(first, "refuted") | {"left_out": 1200}, result(second, "refuted")]
    said = told.markdown({str(recipe): row(str(recipe), kept)})
    assert said.count("100 values, 1,200 left out that only one side has).") == 1
    assert said.count("100 values).") == 1


def test_a_recipes_page_has_the_result_of_each_claim_that_was_tried(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = claims.read(str(recipe)).claim
    rows = {str(recipe): row(str(recipe), [result(second, "confirmed")])}
    monkeypatch.setattr(recipe_book, "RESULTS", tmp_path / "results.json")
    (tmp_path / "results.json").write_text(json.dumps(rows))
    found = {each["says"]: each["verdict"] for each in recipe_book.told(str(recipe))["claims"]}
    assert found == {first.says: None, second.says: "confirmed"}
    console = Console(record=True, width=200)
    recipe_book.view(console, recipe_book.told(str(recipe)))
    page = " ".join(console.export_text().split())
    start, end = (rows[str(recipe)]["variants"]["recipe"]["course"][n] for n in (0, -1))
    low, high = (f"{value:.3f}" for value in end[1:])
    assert f"test split: begins at {start[0]:.3f} [" in page
    assert f"; ends at {end[0]:.3f} [{low}, {high}]; its control ends at " in page


def test_results_of_a_recipe_whose_file_is_gone_are_told_as_they_were_kept(recipe: Path) -> None:
    first, second = claims.read(str(recipe)).claim
    second = second.model_copy(update={"found": "Seeds differ."})
    kept = {str(recipe): row(str(recipe), [result(first, "refuted"), result(second, "confirmed")])}
    recipe.unlink()
    said = told.markdown(kept)
    assert f"- **refuted**: {first.says}." in said
    assert "\n  Seeds differ.\n" in said


def test_what_was_found_is_told_of_runs_that_were_over_before_it_was_written(recipe: Path) -> None:
    kept = [result(each, "undecided") for each in claims.read(str(recipe)).claim]
    rows = {str(recipe): row(str(recipe), kept)}
    assert "Seeds differ." not in told.markdown(rows)
    recipe.write_text(recipe.read_text() + 'found = "Seeds differ."\n')
    assert "\n  Seeds differ.\n" in told.markdown(rows)


def test_a_recipe_that_is_a_file_is_called_by_its_stem(recipe: Path) -> None:
    name = str(recipe)
    rows = {name: row(name, [result(each, "refuted") for each in claims.read(name).claim])}
    said = told.markdown(rows)
    assert "\n| [mine](plots/" in said
    assert "\n## mine\n" in said
    assert told.line(rows[name]).startswith("mine ")


def test_first_claims_are_counted_without_those_of_the_controls(recipe: Path) -> None:
    verdicts = {"arenas/spell": "refuted", "arenas/collapse": "confirmed", str(recipe): "undecided"}
    rows = {
        name: row(name, [result(each, verdict) for each in claims.read(name).claim])
        for name, verdict in verdicts.items()
    }
    before, table, _ = told.markdown(rows).partition("| recipe |")
    assert before.endswith("\n\nFirst claims: 0 confirmed, 0 refuted, 1 undecided.\n\n")
    assert table


def test_the_seeds_and_the_metric_of_each_row_are_named(recipe: Path) -> None:
    name = str(recipe)
    kept = [result(each, "confirmed") for each in claims.read(name).claim]
    rows = {
        "arenas/spell": row("arenas/spell", [], seeds=[100, 101], shown="length"),
        name: row(name, kept),
    }
    said = told.markdown(rows)
    assert "over seeds 0, 1, 2, 3, 4 and" in said
    assert said.count("Over seeds") == 1
    assert "\n## arenas/spell\n\nOver seeds 100, 101.\n" in said
    cells = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")]
    assert [each[cells[0].index("metric")] for each in cells[2:]] == ["accuracy_sampled", "length"]
