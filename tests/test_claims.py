"""What a recipe claims, and what an interval says of it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from loop import claims, config, trials
from loop.casting import load_roles
from loop.gain import difference, in_common, over_runs
from runs import everything, scripted_toml, start
from store.database import Store
from store.errors import UserError

TRIED = [name for name in config.recipes() if name != "default"]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The store of a finished run."""
    folder = tmp_path_factory.mktemp("scripted")
    root, _ = start(scripted_toml(folder), folder / "runs", ["rounds=1"])
    store = Store(root / "loop.db")
    yield store
    store.close()


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
        ({"metric": "beauty"}, "no metric named 'beauty'; there are: accuracy_greedy, "),
        ({"metric": "lenght"}, "no metric named 'lenght'; did you mean 'length'"),
        ({}, "a metric or about a query"),
        ({"metric": "length", "query": "SELECT 1"}, "one of them"),
        ({"metric": "length", "expect": "same"}, 'expect "same" needs a margin above 0'),
        ({"metric": "length", "margin": 0.1}, 'expect "more" takes no margin, found 0.1'),
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
    with pytest.raises(UserError, match=r"mine\.toml, claim: .* \[\[claim\]\]; found nothing"):
        claims.read(str(mine))


CONTROL = 'control = ["rounds=1"]\n'
CLAIM = '[[claim]]\nsays = "It is so"\nmetric = "length"\n'


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (CLAIM, r"mine\.toml, control: .* as in control = .*; found nothing"),
        ('control = "rounds=1"\n' + CLAIM, r"control: it is the settings .*; found 'rounds=1'"),
        ("control = []\n" + CLAIM, r"control: it is the settings that .*; found \[\]"),
        (
            'trial = "rounds=1"\n' + CONTROL + CLAIM,
            r"trial: it is a list of settings, .*'rounds=1'",
        ),
        (CONTROL + CLAIM + 'expct = "less"', r"claim 'It is so': no key .* did you mean 'expect'"),
        (CONTROL + CLAIM + 'expect = "big"', r"claim 'It is so', expect: .* 'less'.*, found 'big'"),
        (CONTROL + CLAIM + 'expect = "same"', r"claim 'It is so': expect \"same\" needs a margin"),
        (CONTROL + CLAIM + '[[claim]]\nmetric = "score"', r"claim 2, says: .*; found nothing"),
        (CONTROL + '[claim]\nsays = "x"', r"claim: it is what it claims, .* under \[\[claim\]\]"),
        (CONTROL + CLAIM + CLAIM, r"two claims say 'It is so'"),
    ],
)
def test_what_is_wrong_with_a_trial_is_a_sentence_that_says_where(
    tmp_path: Path, written: str, told: str
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(written)
    with pytest.raises(UserError, match=told) as found:
        claims.read(str(mine))
    assert "tuple" not in str(found.value)
    assert str(found.value).startswith(f"{mine}, ")


def test_a_key_that_a_recipe_does_not_have_is_answered_with_those_of_its_trial_too(
    tmp_path: Path,
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('contrl = ["rounds=1"]\n')
    with pytest.raises(UserError, match="'contrl'; did you mean 'control'"):
        config.read(recipe=str(mine))
    mine.write_text("zzz = 1\n")
    with pytest.raises(UserError, match=r"there are: alarms, arena, .* claim, cluster, control, "):
        config.read(recipe=str(mine))


def test_an_arena_that_is_not_there_is_called_an_arena(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('arena = "spel"\n')
    with pytest.raises(UserError, match="no arena named 'spel'; did you mean 'spell'"):
        config.read(recipe=str(mine))


# What is found before anything runs


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ('control = ["generater.n=2"]', r"control: no setting .* did you mean 'generator'"),
        ('trial = ["rouns=2"]\ncontrol = ["rounds=2"]', r"trial: no .* did you mean 'rounds'"),
        ('plain = ["prompts=0"]\ncontrol = ["rounds=2"]', r"plain: .*prompts: .*, found 0"),
        ('control = ["rounds=2"]\nrouns = 1', r"mine\.toml: no .* did you mean 'rounds'"),
        ('control = ["generator.nn=2"]', r"control: generator 'sampler' has no option 'nn'"),
        ('control = ["rounds=1"]', r"control: it changes nothing, .*; found rounds=1"),
    ],
)
def test_a_wrong_setting_of_a_trial_is_found_before_any_run_and_it_is_said_where(
    tmp_path: Path, written: str, told: str
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(f"rounds = 1\n{written}\n{CLAIM}")
    with pytest.raises(UserError, match=told) as found:
        trials.check(str(mine), load_roles)
    assert str(found.value).startswith(str(mine))


def test_a_wrong_set_of_a_tuning_run_is_not_laid_on_the_recipe() -> None:
    with pytest.raises(UserError, match=r"^irpo, --set: no setting named 'rouns'"):
        trials.check("irpo", lambda made: None, ["rouns=1"])


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT digest AS item FROM prompt", "no such column: value"),
        ("SELECT digest AS value FROM prompt", "no such column: item"),
        ("SELECT 1 AS item, :seed AS value", "'seed'.* may use :checkpoint, :judge and :run"),
        ("SELECT 1 AS item, 1 AS value; SELECT 2", "right is one SELECT"),
        ("DELETE FROM training_step RETURNING step AS item, 1 AS value", '"DELETE": syntax error'),
        ("SELECT 1 AS item, score AS value FROM judgment", "no such table: judgment"),
    ],
)
def test_a_query_that_cannot_be_asked_is_a_sentence_before_anything_runs(
    tmp_path: Path, query: str, told: str
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(f"{CONTROL}[[claim]]\nsays = 'It is so'\nquery = {json.dumps(query)}\n")
    wanted = f"mine.toml, claim 'It is so': its query cannot be asked: .*{told}"
    with pytest.raises(UserError, match=wanted) as found:
        trials.check(str(mine), lambda made: None)
    assert "sqlalche.me" not in str(found.value)


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


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("SELECT 'a' AS item, tokens AS value FROM candidate", "gives item 'a' twice"),
        ("SELECT id AS item, text AS value FROM candidate", "for item 1; a value is a number"),
        ("SELECT 'a' AS item, 9e999 AS value", "gives inf for item 'a'"),
        ("SELECT NULL AS item, 1 AS value", "gives 1 for item None"),
    ],
)
def test_a_query_that_gives_something_else_than_a_number_an_item_is_a_sentence(
    scripted: Store, query: str, told: str
) -> None:
    claim = claims.Claim(says="It is so", query=query)
    with pytest.raises(UserError, match=f"claim 'It is so': its query .*{told}"):
        claim.values(scripted, scripted.incumbent("policy"), "exact")


def test_an_item_whose_value_is_null_has_none(scripted: Store) -> None:
    query = "SELECT id AS item, CASE id WHEN 1 THEN 2.5 END AS value FROM prompt; "
    claim = claims.Claim(says="It is so", query=query)
    assert claim.values(scripted, scripted.incumbent("policy"), "exact") == {"1": 2.5}


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM training_step RETURNING step AS item, 1 AS value",
        "INSERT INTO training_step SELECT * FROM training_step",
        "UPDATE run SET status = 'failed'",
        "DROP TABLE candidate",
        "PRAGMA user_version = 1",
    ],
)
def test_no_question_changes_a_run(scripted: Store, sql: str) -> None:
    before = everything(scripted.root)
    with pytest.raises(UserError, match=r"loop\.db reads and changes nothing, and this one would"):
        scripted.query(sql)
    assert everything(scripted.root) == before
    scripted.request_stop(False)  # what is no question can write as ever


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
