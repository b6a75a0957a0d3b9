"""Claims that stay as they were before their reported seeds ran, and how results are told."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loop import claims, config, recipe_book
from runs import HERE, loop
from store.errors import UserError

sys.path.insert(0, str(HERE / "benchmarks"))

import reported
import results
import told

# Reported seeds


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of one's own, in a repository with the arenas and default.toml."""
    home = tmp_path / "loop"
    shutil.copytree(config.HERE / "recipes" / "arenas", home / "recipes" / "arenas")
    shutil.copy(config.HERE / "default.toml", home / "default.toml")
    monkeypatch.setattr(config, "HERE", home)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "roles").mkdir()
    (tmp_path / "roles" / "banded.py").touch()
    (tmp_path / ".gitignore").write_text("kept.py\n__pycache__/\n")
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


@pytest.mark.parametrize(
    "changed",
    [
        *("mine.toml", "loop/recipes/arenas/spell.toml", "loop/default.toml"),
        *("pyproject.toml", "roles/banded.py", "roles/new.py", "loop/gate.py"),
    ],
)
def test_reported_seeds_wait_until_all_that_a_recipe_stands_on_is_committed(
    recipe: Path, changed: str
) -> None:
    reported.uncommitted([str(recipe)], [])
    with (recipe.parent / changed).open("a") as file:
        file.write("# more\n")
    with pytest.raises(UserError, match=f"commit these before .* run: {changed}$"):
        reported.uncommitted([str(recipe)], [])


def test_what_results_and_other_recipes_say_holds_no_reported_seed_up(recipe: Path) -> None:
    for name in ("RESULTS.md", "results.json", "another.toml", "plots/mine.svg"):
        file = recipe.parent / "loop" / "recipes" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("# new\n")
    reported.uncommitted([str(recipe)], [])


@pytest.mark.parametrize("part", ["part.py:Part", "kept.py:Part", "lib_of_mine:Part"])
def test_reported_seeds_wait_until_parts_of_ones_own_are_committed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.syspath_prepend(recipe.parent)
    file = recipe.parent / f"{part.removesuffix(':Part').removesuffix('.py')}.py"
    with recipe.open("a") as said:
        said.write(f'[judge]\nuse = "panel"\njudges = [{{ use = "{part}" }}]\n')
    file.write_text("# it\n")
    made = [config.read(recipe=str(recipe))]
    assert config.own_files(made[0]) == [file]
    assert config.own_files(config.read(recipe="default")) == []
    subprocess.run(["git", "-C", str(recipe.parent), "add", "mine.toml"], check=True)
    with pytest.raises(UserError, match=rf"run: mine\.toml, {file.name}$"):
        reported.uncommitted([str(recipe)], made)
    subprocess.run(["git", "-C", str(recipe.parent), "add", "-f", file.name], check=True)
    commit(recipe.parent)
    reported.uncommitted([str(recipe)], made)


def test_a_recipe_in_no_repository_is_not_committed(
    recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mine = tmp_path_factory.mktemp("nowhere") / "mine.toml"
    shutil.copy(recipe, mine)
    with pytest.raises(UserError, match=rf"{mine} \(fatal: not a git repository"):
        reported.uncommitted([str(mine)], [])


@pytest.mark.parametrize(
    ("file", "before", "after", "key"),
    [
        (
            *("mine.toml", "It is so", "It is not so"),
            "claim 'It is so', which is gone, 'It is not so', which is new",
        ),
        (
            *("mine.toml", 'metric = "length"', 'metric = "truncated"'),
            "claim 'So it is with them' (metric)",
        ),
        ("mine.toml", 'control = ["rounds=1"]', 'control = ["rounds=3"]', "control"),
        ("mine.toml", "rounds = 2", "rounds = 4", "the recipe's settings (rounds)"),
        (
            *("loop/recipes/arenas/spell.toml", "gate_prompts = 200", "gate_prompts = 201"),
            "the arena's settings (evaluate.gate_prompts)",
        ),
        ("loop/default.toml", "rounds = ", "rounds = 1", "default.toml (rounds)"),
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
    place = runs / results.folder_of(name)
    reported.fix(place, name)
    reported.unchanged(place, name)
    text = (recipe.parent / file).read_text()
    assert before in text
    (recipe.parent / file).write_text(text.replace(before, after, 1))
    commit(recipe.parent)
    monkeypatch.setattr(sys, "argv", ["results.py", name, "--seeds", "3", "--runs", str(runs)])
    wanted = f"differs in {re.escape(key)}; put that back, or remove {place} to"
    with pytest.raises(UserError, match=wanted):
        results.main()
    assert {each.name for each in place.iterdir()} == {"claim.json", "settings.json"}


def test_a_trial_of_which_only_digests_were_kept_is_taken_up(recipe: Path, tmp_path: Path) -> None:
    """And is refused as before when it changed, without the keys."""
    reported.fix(tmp_path / "runs", str(recipe))
    (tmp_path / "runs" / "settings.json").unlink()
    reported.unchanged(tmp_path / "runs", str(recipe))
    reported.fix(tmp_path / "runs", str(recipe))
    assert (tmp_path / "runs" / "settings.json").is_file()
    (tmp_path / "runs" / "settings.json").unlink()
    recipe.write_text(recipe.read_text().replace("rounds = 2", "rounds = 4"))
    with pytest.raises(UserError, match="differs in the recipe's settings; put that back"):
        reported.unchanged(tmp_path / "runs", str(recipe))


def test_what_was_found_is_written_when_the_reported_seeds_have_run(
    recipe: Path, tmp_path: Path
) -> None:
    reported.fix(tmp_path / "runs", str(recipe))
    recipe.write_text(recipe.read_text() + 'found = "Seeds differ."\n')
    reported.unchanged(tmp_path / "runs", str(recipe))
    kept = json.loads((tmp_path / "runs" / "claim.json").read_text())
    assert kept["claim"][1] == {"says": "So it is with them", "metric": "length"}


def test_a_mistake_in_one_recipe_is_found_before_a_claim_of_another_is_fixed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(recipe.read_text().replace("rounds = 2", 'trial = ["rouns=2"]'))
    commit(tmp_path)
    asked = ["results.py", str(recipe), str(other), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(UserError, match=r"other\.toml, trial: no setting named 'rouns'"):
        results.main()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("seeds", [(), ("--seeds", "100", "3")])
def test_reported_seeds_run_under_the_recipes_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: tuple[str, ...]
) -> None:
    asked = ["results.py", "irpo", *seeds, "--set", "rounds=1", "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(UserError, match="tune on seeds from 100 up"):
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


@pytest.mark.parametrize("typed", ["mine.toml", "sub/../mine.toml", "../mine.toml", "{full}"])
def test_a_recipes_page_has_the_result_of_each_claim_that_was_tried(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    """Wherever a recipe of one's own is named from."""
    (recipe.parent / "sub").mkdir()
    monkeypatch.chdir(recipe.parent / "sub" if typed.startswith("../") else recipe.parent)
    name = typed.format(full=recipe)
    first, second = claims.read(name).claim
    rows = {"mine.toml": row("mine.toml", [result(second, "confirmed")])}
    monkeypatch.setattr(recipe_book, "RESULTS", recipe.parent / "results.json")
    (recipe.parent / "results.json").write_text(json.dumps(rows))
    found = {each["says"]: each["verdict"] for each in recipe_book.told(name)["claims"]}
    assert found == {first.says: None, second.says: "confirmed"}
    console = Console(record=True, width=200)
    recipe_book.view(console, recipe_book.told(name))
    page = " ".join(console.export_text().split())
    start, end = (rows["mine.toml"]["variants"]["recipe"]["course"][n] for n in (0, -1))
    low, high = (f"{value:.3f}" for value in end[1:])
    assert f"test split: begins at {start[0]:.3f} [" in page
    assert f"; ends at {end[0]:.3f} [{low}, {high}]; its control ends at " in page
    assert "not tried yet: `make results RECIPES=mine.toml`" in page


def test_a_published_recipe_has_one_name_in_results_and_no_other_recipe_has_it(
    tmp_path: Path,
) -> None:
    folder = config.HERE / "recipes"
    assert config.recipe_key(str(folder / "irpo.toml")) == "irpo"
    assert config.recipe_key(str(folder / "arenas" / "spell.toml")) == "arenas/spell"
    keys = [
        "irpo",
        *(config.recipe_key(str(tmp_path / each)) for each in ("irpo.toml", "a/irpo.toml")),
    ]
    assert len({told.plain_name(each) for each in keys}) == 3
    assert config.recipe_path(config.recipe_of("irpo")) == folder / "irpo.toml"


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
    name = config.recipe_key(str(recipe))
    rows = {name: row(name, [result(each, "refuted") for each in claims.read(str(recipe)).claim])}
    said = told.markdown(rows)
    assert "\n| [mine](plots/mine-" in said
    assert str(recipe.parent).strip("/").replace("/", "-") not in said
    assert str(recipe.parent) not in said
    assert "\n## mine\n" in said
    assert told.line(rows[name]).startswith("mine ")


def test_first_claims_are_counted_without_those_of_the_controls(recipe: Path) -> None:
    verdicts = {"arenas/spell": "refuted", "arenas/collapse": "confirmed", str(recipe): "undecided"}
    rows = {
        name: row(name, [result(each, verdict) for each in claims.read(name).claim])
        for name, verdict in verdicts.items()
    }
    before, table, _ = told.markdown(rows).partition("| recipe |")
    assert before.endswith(
        "\n\nFirst claims: 0 confirmed, 0 refuted, 1 undecided. "
        "All claims: 0 confirmed, 0 refuted, 2 undecided.\n\n"
    )
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
    assert "\n## arenas/spell\n\nOver seeds 100, 101: a tuning run.\n" in said
    cells = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")]
    assert [each[cells[0].index("metric")] for each in cells[2:]] == ["accuracy_sampled", "length"]


def test_a_tuning_run_is_told_as_one(recipe: Path) -> None:
    kept = [result(each, "confirmed") for each in claims.read(str(recipe)).claim]
    more = {"seeds": [100, 101], "sets": ["rounds=1", "prompts=24"]}
    said = told.markdown({"mine.toml": row("mine.toml", kept, **more)})
    assert said.startswith("# A tuning run\n")
    assert "Over seeds 100, 101 with `rounds=1`, `prompts=24`. It is no result" in said
    for untrue in ("committed before", "0, 1, 2, 3, 4", "make results", "Results of the recipes"):
        assert untrue not in " ".join(said.split()).replace("nothing was committed before", "")
    other = row("arenas/spell", [], seeds=[102], sets=[])
    both = told.markdown({"mine.toml": row("mine.toml", kept, **more), "arenas/spell": other})
    assert "Seeds and settings differ. It is no result" in both
    assert "\n## arenas/spell\n\nOver seeds 102: a tuning run.\n" in both


def test_a_row_whose_runs_are_of_different_code_is_named(recipe: Path) -> None:
    kept = [result(each, "confirmed") for each in claims.read(str(recipe)).claim]
    code = {"1a2b3c4d": ["recipe 0", "control 0"], "5e6f then 1a2b": ["plain 0"]}
    said = told.markdown({"mine.toml": row("mine.toml", kept, code=code)})
    runs = "1a2b3c4d made recipe 0, control 0; 5e6f then 1a2b made plain 0."
    assert f"\nIts runs are of different code: {runs}\n" in said
    alike = row("mine.toml", kept, code={"1a2b3c4d": ["recipe 0", "control 0"]})
    assert "different code" not in told.markdown({"mine.toml": alike})


def test_without_matplotlib_plots_are_left_out_and_one_line_says_what_to_install(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = [result(each, "confirmed") for each in claims.read(str(recipe)).claim]
    rows = {"mine.toml": row("mine.toml", kept), "arenas/spell": row("arenas/spell", [])}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told.drawing.cache_clear()
    try:
        for _ in range(2):
            told.write(tmp_path / "out", rows)
    finally:
        told.drawing.cache_clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert "plots are left out" in line
    assert "pip install matplotlib" in line
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"RESULTS.md", "results.json"}
    assert "plots" not in (tmp_path / "out" / "RESULTS.md").read_text()


def test_a_file_of_a_recipe_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    for more in ((), ("--toml",), ("--json",)):
        ended = loop("recipes", "nothing.toml", *more, cwd=tmp_path)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr == "loop: no recipe in nothing.toml: there is no such file\n"
