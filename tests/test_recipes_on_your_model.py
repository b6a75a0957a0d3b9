"""Every recipe through whole rounds on a model that a user brings: another Llama, with ChatML."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import small_model
from loop import config, run
from loop.settings import Config
from runs import loop
from store.database import Store

pytestmark = pytest.mark.slow
RECIPES = [name for name in config.recipes() if name != "default"]


LEARNED = (
    "SELECT count(*) AS n FROM trained_on JOIN checkpoint AS learner ON learner.id = "
    "trained_on.checkpoint_id JOIN example ON example.id = example_id "
    "JOIN asked ON asked.id = example.asked_id JOIN round ON round.id = asked.round_id "
    "JOIN prompt ON prompt.id = asked.prompt_id "
    "JOIN candidate AS chosen ON chosen.id = chosen_id "
    "LEFT JOIN checkpoint AS writer ON writer.id = chosen.checkpoint_id "
    "LEFT JOIN judgement ON judgement.id = chosen_judgement_id "
    "LEFT JOIN candidate AS rejected ON rejected.id = rejected_id "
    "LEFT JOIN asked AS before ON before.id = rejected.asked_id "
    "WHERE learner.round_id >= (SELECT id FROM round WHERE number = 1) AND "
)
OWN = {
    "ditto": "before.round_id < learner.round_id",  # answers of an earlier checkpoint
    "llm2llm": "writer.model = 'teacher'",
    "mbr-dpo": "judge LIKE 'mbr#%'",
    "meta-rewarding": "asked.track = 'judging' AND judge LIKE 'meta#%'",
    "online-iterative-dpo": "judge LIKE 'reward_model#%'",
    "rm-sft-coevolve": "learner.model = 'reward' AND number > 0",
    "self-evolution": "chosen.made_as = 'revised'",
    "self-lengthen": "asked.track = 'extender'",
    "self-rewarding": "prompt.origin = 'proposed' AND judge LIKE 'rubric#%'",
    "self-steering": "chosen.made_as = 'good' AND rejected.made_as = 'bad'",
    "self-taught-evaluator": "prompt.origin = 'derived'",
    "ssrm": "learner.model = 'reward' AND judge LIKE 'reward_model#%'",
    "superhf": "judge LIKE 'reward_model#%'",
    "upo": "judge LIKE 'reward_model#%' AND judgement.variance > 0",
}
"""Recipe -> what is special in what its rounds learn from, of LEARNED."""
JUDGED = (
    "SELECT DISTINCT asked.track AS track, judge FROM judgement "
    "JOIN candidate ON candidate.id = candidate_id JOIN asked ON asked.id = asked_id "
    "JOIN round ON round.id = asked.round_id WHERE purpose = 'train' AND number > 0"
)


@pytest.fixture(scope="module")
def yours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of yours that spells one word in some backward."""
    folder = tmp_path_factory.mktemp("yours")
    small_model.build(
        folder / "raw",
        hidden_size=128,
        intermediate_size=384,
        max_position_embeddings=640,
        initializer_range=0.05,
    )
    sets = [f'model.path="{folder / "raw"}"', "warmup.when=always", "gate.target=-1.0"]
    sets += ["warmup.prompts=1800", "evaluate.gate_prompts=8", "evaluate.test_prompts=40"]
    done = loop("start", "--runs", folder / "runs", *(x for each in sets for x in ("--set", each)))
    assert done.returncode == 0, done.stdout + done.stderr
    (root,) = (folder / "runs").iterdir()
    store = Store(root / run.DATABASE)
    shutil.copytree(store.beginning("policy").path, folder / "model")
    store.close()
    return folder / "model"


def small(made: Config) -> list[str]:
    """Settings that make a recipe's rounds short, and that keep what the model can do. There are
    two: some parts look back at the round before."""
    sets = ["rounds=2", "evaluate.gate_prompts=8", "evaluate.test_prompts=8", "evaluate.samples=2"]
    sets += [f"track.{name}.prompts=24" for name in made.track]
    if made.evaluate.anchors is not None:
        sets.append("evaluate.anchors.prompts=8")
    taught = [name for name in made.warmup.track if name != "warmup"] if made.warmup else []
    if set(taught) <= {"reward"}:
        sets += [f"warmup.track.{name}.prompts=64" for name in taught]
        return [*sets, "warmup.prompts=64", "warmup.trainer.learning_rate=1e-4"]
    # It is to judge or to revise, and has to learn what that is.
    return [*sets, *(f"warmup.track.{name}.prompts=500" for name in taught), "warmup.prompts=400"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_goes_through_whole_rounds(recipe: str, yours: Path, tmp_path: Path) -> None:
    mine = [f'model.path="{yours}"', "warmup.when=always"]
    made = config.read(recipe=recipe, sets=mine)
    sets = [*mine, *small(made)]
    done = loop(
        *("start", "--recipe", recipe, "--runs", tmp_path),
        *(part for each in sets for part in ("--set", each)),
    )
    assert done.returncode in (0, 3), done.stdout + done.stderr
    (root,) = tmp_path.iterdir()
    store = Store(root / run.DATABASE)
    _, first, second = store.rounds()
    learned = store.query(
        "SELECT count(*) AS n FROM trained_on JOIN checkpoint ON checkpoint.id = checkpoint_id "
        "WHERE round_id = :round",
        round=first.id,
    )
    (own,) = store.query(f"{LEARNED}({OWN.get(recipe, 'true')})")
    judged = {(row["track"], row["judge"]) for row in store.query(JUDGED)}
    base = store.checkpoints("policy")[0]
    store.close()
    assert first.status == "done", done.stdout
    assert second.status in ("done", "no_examples"), done.stdout
    assert {first.stage, second.stage} == {"done"}
    assert learned[0]["n"] > 0
    assert own["n"] > 0
    assert judged >= {(name, track.judge.label) for name, track in made.track.items()}
    assert base.path == yours
    verified = loop("verify", root)
    assert verified.returncode == 0, verified.stdout
