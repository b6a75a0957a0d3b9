"""What a recipe claims, and what an interval says of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from loop import claims, config
from loop.gain import difference, in_common, over_runs
from runs import scripted_toml, start
from store.database import Store
from store.errors import UserError

TRIED = [name for name in config.recipes() if name != "default"]


# Verdicts


@pytest.mark.parametrize(
    ("expect", "interval", "verdict"),
    [
        ("more", (0.1, 0.02, 0.2), "confirmed"),
        ("more", (0.1, -0.02, 0.2), "undecided"),
        ("more", (-0.1, -0.2, -0.02), "refuted"),
        ("less", (-0.1, -0.2, -0.02), "confirmed"),
        ("less", (0.1, 0.02, 0.2), "refuted"),
        ("same", (0.0, -0.04, 0.04), "confirmed"),
        ("same", (0.0, -0.06, 0.04), "undecided"),
        ("same", (0.2, 0.06, 0.3), "refuted"),
        ("not less", (-0.02, -0.04, 0.0), "confirmed"),
        ("not less", (0.0, -0.06, 0.06), "undecided"),
        ("not less", (-0.2, -0.3, -0.06), "refuted"),
        ("not more", (0.02, 0.0, 0.04), "confirmed"),
        ("not more", (0.2, 0.06, 0.3), "refuted"),
    ],
)
def test_a_verdict_is_what_the_whole_interval_says(
    expect: str, interval: tuple[float, float, float], verdict: str
) -> None:
    margin = 0.0 if expect in ("more", "less") else 0.05
    told = {"says": "It is so", "metric": "length", "expect": expect, "margin": margin}
    assert claims.Claim.model_validate(told).verdict(interval) == verdict


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"metric": "beauty"}, "no metric 'beauty'"),
        ({}, "a metric or about a query"),
        ({"metric": "length", "query": "SELECT 1"}, "one of them"),
        ({"metric": "length", "expect": "same"}, "do not go together"),
        ({"metric": "length", "margin": 0.1}, "do not go together"),
    ],
)
def test_a_claim_that_cannot_be_tried_is_refused(table: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        claims.Claim.model_validate({"says": "It is so", **table})


def test_a_recipe_of_ones_own_is_a_file_and_without_a_claim_it_runs_and_is_not_tried(
    tmp_path: Path,
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('arena = "spell"\ncontrol = ["rounds=1"]\nrounds = 2\n')
    assert config.read(recipe=str(mine)).rounds == 2
    with pytest.raises(UserError, match=r"mine\.toml', claim: Field required"):
        claims.read(str(mine))


def test_two_claims_that_say_the_same_are_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    claim = '[[claim]]\nsays = "It is so"\nmetric = "length"\n'
    mine.write_text('control = ["rounds=1"]\n' + 2 * claim)
    with pytest.raises(UserError, match="two claims say 'It is so'"):
        claims.read(str(mine))


@pytest.mark.parametrize("name", TRIED)
def test_every_recipe_has_a_claim_a_control_and_a_plain_run_on_the_same_questions(
    name: str,
) -> None:
    trial = claims.read(name)
    arena = "default" if trial.arena is None else f"{config.ARENAS}/{trial.arena}"
    ours = config.read(recipe=name, sets=trial.trial)
    control = config.read(recipe=name, sets=[*trial.trial, *trial.control])
    plain = config.read(recipe=arena, sets=[*trial.trial, *trial.plain])
    assert ours.identity != control.identity
    for other in (control, plain):
        for key in ("proposer", "judge", "gate_prompts", "test_prompts", "samples", "max_tokens"):
            assert getattr(other.evaluate, key) == getattr(ours.evaluate, key), key


# Differences


def test_items_that_both_sides_have_are_paired_and_others_are_not() -> None:
    chance = random.Random(0)
    theirs = [{str(n): chance.random() for n in range(40)} for _ in range(5)]
    ours = [{item: value + 0.05 for item, value in run.items()} for run in theirs]
    mean, low, high = difference(ours, theirs)
    assert mean == pytest.approx(0.05)
    assert high - low < 1e-9
    renamed = [{f"other {item}": value for item, value in run.items()} for run in ours]
    mean, low, high = difference(renamed, theirs)
    assert mean == pytest.approx(0.05)
    assert low < 0 < high


def test_an_item_that_one_side_lacks_is_left_out_and_the_others_stay_paired() -> None:
    chance = random.Random(0)
    theirs = [{str(n): chance.random() for n in range(40)} for _ in range(5)]
    ours = [{item: value + 0.05 for item, value in run.items()} for run in theirs]
    ours[2].pop("7")
    theirs[2].pop("8")
    ours[4]["of ours alone"] = 100.0
    mean, low, high = difference(ours, theirs)
    assert mean == pytest.approx(0.05)
    assert high - low < 1e-9
    one, other = in_common(ours, theirs)
    assert [len(run) for run in one] == [len(run) for run in other] == [40, 40, 38, 40, 40]


def test_nothing_is_paired_where_the_sides_of_a_seed_have_no_item_in_common() -> None:
    ours = [{"a": 1.0, "b": 2.0}, {"c": 3.0}]
    theirs = [{"a": 0.0, "b": 1.0}, {"d": 1.0}]
    assert in_common(ours, theirs) == (ours, theirs)
    mean, _, _ = difference(ours, theirs)
    assert mean == pytest.approx((1.0 + 2.0) / 2)


def test_a_difference_of_unpaired_items_has_the_interval_of_a_difference() -> None:
    """Held to the textbook's: the roots of the variances of two means add up."""
    chance = random.Random(1)
    ours = [[chance.gauss(1, 2) for _ in range(300)]]
    theirs = [[chance.gauss(0, 1) for _ in range(200)]]
    _, low, high = over_runs(ours, less=theirs)
    wanted = 2 * 1.96 * (4 / 300 + 1 / 200) ** 0.5
    assert high - low == pytest.approx(wanted, rel=0.1)


def test_a_run_without_values_is_compared_with_nothing() -> None:
    with pytest.raises(ValueError, match="nothing to be compared"):
        difference([{}], [{"a": 1.0}])


def test_a_query_is_asked_of_the_store_for_a_checkpoint(tmp_path: Path) -> None:
    root, _ = start(scripted_toml(tmp_path), tmp_path / "runs", ["rounds=2"])
    store = Store(root / "loop.db")
    claim = claims.Claim(
        says="Answers are short",
        query="SELECT id AS item, tokens AS value FROM candidate WHERE checkpoint_id = :checkpoint",
    )
    last = store.incumbent("policy")
    found = claim.values(store, last, "exact")
    (count,) = store.query(
        "SELECT count(*) AS n FROM candidate WHERE checkpoint_id = :id", id=last.id
    )
    assert len(found) == count["n"] > 0
    store.close()


def test_how_well_it_judges_is_a_number_an_anchor(tmp_path: Path) -> None:
    anchors = "[evaluate.anchors]\nprompts = 10\n"
    root, _ = start(scripted_toml(tmp_path, anchors), tmp_path / "runs", ["rounds=1"])
    store = Store(root / "loop.db")
    last = store.incumbent("policy")
    found = claims.Claim(says="It judges well", metric="agreement").values(store, last, "exact")
    (measured,) = [each for each in store.evaluations(last.id or 0) if each.metric == "agreement"]
    assert list(found.values()) == list(measured.items or ())
    assert sum(found.values()) / len(found) == pytest.approx(measured.value)
    store.close()


def test_without_anchors_there_is_no_word_on_how_well_it_judges(tmp_path: Path) -> None:
    root, _ = start(scripted_toml(tmp_path), tmp_path / "runs", ["rounds=1"])
    store = Store(root / "loop.db")
    claim = claims.Claim(says="It judges well", metric="agreement")
    with pytest.raises(UserError, match=r"was not measured; a run .* has \[evaluate.anchors\]"):
        claim.values(store, store.incumbent("policy"), "exact")
    store.close()
