"""Windows over earlier rounds, replay and a floor of real data, in runs of scripted roles."""

import json
from collections import Counter
from pathlib import Path

import pytest

from runs import SCRIPTED, everything, loop, scripted_toml, start
from store.database import Store

LEARNED = """
SELECT made.number AS round, asked_in.number AS of, count(*) AS examples,
       sum(chosen.checkpoint_id IS NULL) AS real
FROM trained_on JOIN checkpoint ON checkpoint.id = trained_on.checkpoint_id
JOIN round AS made ON made.id = checkpoint.round_id
JOIN example ON example.id = example_id JOIN candidate AS chosen ON chosen.id = chosen_id
JOIN asked ON asked.id = example.asked_id JOIN round AS asked_in ON asked_in.id = asked.round_id
GROUP BY 1, 2 ORDER BY 1, 2
"""
WARMUP = f"""
[warmup]
when = "always"
prompts = 40
generator = "demonstrations"
filter = "everything"
trainer = "{SCRIPTED}:Learner"
"""


def learned(root: Path) -> dict[int, dict[int, int]]:
    """Round -> round of the examples -> how many."""
    store = Store(root / "loop.db")
    found: dict[int, dict[int, int]] = {}
    for row in store.query(LEARNED):
        found.setdefault(row["round"], {})[row["of"]] = row["examples"]
    store.close()
    return found


def run(folder: Path, *sets: str, more: str = "") -> Path:
    root, outcome = start(scripted_toml(folder, more), folder / "runs", ["rounds=4", *sets])
    assert outcome.code == 0, outcome.reason
    return root


def given(root: Path) -> Counter[int]:
    """Round -> how many examples it gave."""
    store = Store(root / "loop.db")
    found = Counter({each.number: store.count_examples(each.id) for each in store.rounds()})
    store.close()
    return found


def test_a_window_takes_its_shares_of_the_rounds_before(tmp_path: Path) -> None:
    root = run(tmp_path, "mix.rounds=[1.0, 0.5]")
    own, found = given(root), learned(root)
    for number in (2, 3, 4):
        before = min(own[number - 1], -(-own[number] // 2))
        assert found[number] == {number - 1: before, number: own[number]}
    assert found[1] == {1: own[1]}
    assert loop("verify", root).returncode == 0


def test_replay_draws_from_all_rounds_before_the_window(tmp_path: Path) -> None:
    root = run(tmp_path, "mix.replay=0.5")
    own, found = given(root), learned(root)
    for number in (2, 3, 4):
        earlier = {of: n for of, n in found[number].items() if of != number}
        assert sum(earlier.values()) == min(
            sum(own[n] for n in range(1, number)), -(-own[number] // 2)
        )
    assert len(found[4]) > 2


def test_part_of_a_rounds_own_examples(tmp_path: Path) -> None:
    root = run(tmp_path, "mix.rounds=[0.25]")
    own, found = given(root), learned(root)
    assert all(found[number] == {number: -(-own[number] // 4)} for number in (1, 2, 3, 4))


def test_the_floor_of_real_data_is_kept_in_every_round(tmp_path: Path) -> None:
    root = run(tmp_path, "mix.real=0.5", "filter.use=best_only", more=WARMUP)
    own, found = given(root), learned(root)
    assert own[0] == 280
    for number in (1, 2, 3, 4):
        assert found[number] == {0: own[number], number: own[number]}


def test_what_is_drawn_follows_from_the_seed(tmp_path: Path) -> None:
    sets = ("mix.rounds=[0.5, 0.3]", "mix.replay=0.2")
    one, other = (run(_made(tmp_path / name), *sets) for name in ("one", "other"))
    assert everything(one)["trained_on"] == everything(other)["trained_on"]
    third = run(_made(tmp_path / "third"), *sets, "seed=1")
    assert everything(one)["trained_on"] != everything(third)["trained_on"]


def test_a_floor_without_any_real_data_is_one_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    file = scripted_toml(tmp_path)
    told = loop("start", "--config", file, "--runs", tmp_path / "runs", "--set", "mix.real=0.2")
    assert told.returncode == 4
    assert "mix.real is 0.2" in " ".join(told.stderr.split())
    assert "Traceback" not in told.stderr


@pytest.mark.parametrize(
    ("sets", "starts", "references"),
    [
        ([], ["base", "round-0001", "round-0001", "round-0003"], None),
        (["model.start_from=base"], ["base"] * 4, None),
        (["model.start_from=previous"], ["base", "round-0001", "round-0002", "round-0003"], None),
        (
            ["model.reference=base"],
            ["base", "round-0001", "round-0001", "round-0003"],
            ["base"] * 4,
        ),
    ],
)
def test_where_a_training_begins_and_what_it_is_held_to(
    tmp_path: Path, sets: list[str], starts: list[str], references: list[str] | None
) -> None:
    root = run(tmp_path, "trainer.spoil_in=2", "gate.patience=0", *sets)
    told = [
        json.loads((root / f"checkpoints/round-000{n}-policy/learned_from.json").read_text())
        for n in (1, 2, 3, 4)
    ]
    assert [each["start"].removesuffix("-policy") for each in told] == starts
    held = [each["reference"].removesuffix("-policy") for each in told]
    assert held == (starts if references is None else references)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
