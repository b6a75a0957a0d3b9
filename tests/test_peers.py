"""The plug-ins that a round is compared with do the same work as ours, by other means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
import small_model
from roles.plugins import load
from roles.policy import embedded
from roles.policy.transformers import TransformersEngine
from roles.trainers.preference import Preference
from roles.trainers.supervised import Supervised
from store.database import Store
from store.records import Call, Checkpoint, Prompt, Sampling, Training

BENCHMARKS = Path(__file__).parent / "benchmarks"
ENGINE = BENCHMARKS / "peer_engine.py"
TRAINERS = BENCHMARKS / "peer_trainers.py"
QUESTIONS = ("Why?", "What is 12 * 3?", "Sort these in ascending order: 51.6, -91.9, 7", "1 + 1")
CALL = Call(seed=3, round=1, stage="train")
STEPS: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 4, "epochs": 2.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("embedded")
    embedded.build(folder, seed=0)
    return small_model.checkpoint(folder)


def engine(**options: Any) -> Any:
    return load("engine", f"{ENGINE}:Generate", options)


def trainer(name: str, **options: Any) -> Any:
    return load("trainer", f"{TRAINERS}:{name}", options)


def asked() -> list[Prompt]:
    return [small_model.question(text) for text in QUESTIONS]


def train(by: Any, model: Checkpoint, into: Path, *, pairs: bool = True) -> Training:
    into.mkdir()
    examples = small_model.examples(model.path, 10, pairs=pairs)
    training = by.train(examples, model, model, into, CALL)
    assert isinstance(training, Training)
    return training


def weights(folder: Path) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return list(AutoModelForCausalLM.from_pretrained(folder).parameters())


def losses(training: Training) -> list[float | None]:
    return [step.loss for step in training.steps]


def test_greedy_tokens_and_scores_are_those_of_our_engine(model: Checkpoint) -> None:
    prompts = asked()
    greedy: dict[str, Any] = {
        "sampling": Sampling(temperature=0.0, max_tokens=6),
        "seeds": [[0]] * len(prompts),
    }
    ours = TransformersEngine(device="cpu").open(model)
    other = engine(rows=3).open(model)
    found = other.sample(prompts, **greedy)
    assert [[each.token_ids for each in group] for group in found] == [
        [each.token_ids for each in group] for group in ours.sample(prompts, **greedy)
    ]
    answers = [group[0] for group in found]
    for one, two in zip(
        other.logprobs(prompts, answers), ours.logprobs(prompts, answers), strict=True
    ):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)


def test_answers_are_as_many_as_seeds_and_drawn_from_them(model: Checkpoint) -> None:
    def sample(seeds: Sequence[Sequence[int]]) -> list[list[tuple[int, ...]]]:
        policy = engine(rows=6).open(model)
        groups = policy.sample(asked(), sampling=Sampling(max_tokens=5), seeds=seeds)
        return [[each.token_ids for each in group] for group in groups]

    some = [[1, 2, 3], [4, 5, 6], [7, 8], [9, 10, 11]]
    found = sample(some)
    assert [len(group) for group in found] == [3, 3, 2, 3]
    assert all(0 < len(ids) <= 5 for group in found for ids in group)
    assert len(set(found[0])) == 3  # of an untrained model, so nearly uniform
    assert found == sample(some)
    assert found != sample([[20, 21, 22], *some[1:]])


def test_a_tuned_engine_pads_less_and_gives_each_prompt_its_own_answer(model: Checkpoint) -> None:
    prompts = asked()
    found, padded = [], []
    for tuned in (False, True):
        policy = engine(rows=2, tuned=tuned).open(model)
        generate, widths = policy._model.generate, []

        def watched(*, generate: Any = generate, widths: list[int] = widths, **of: Any) -> Any:
            widths.append(of["input_ids"].shape[1])
            return generate(**of)

        policy._model.generate = watched
        groups = policy.sample(
            prompts,
            sampling=Sampling(temperature=0.0, max_tokens=6),
            seeds=[[0]] * len(prompts),
        )
        found.append([[each.token_ids for each in group] for group in groups])
        padded.append(sum(widths))
    assert found[0] == found[1]
    assert padded[1] < padded[0]


def test_a_prompt_that_fills_the_context_gets_no_answer(model: Checkpoint) -> None:
    policy = engine().open(model)
    prompts = [small_model.question("long " * 600), *asked()[:1]]
    found = policy.sample(prompts, sampling=Sampling(max_tokens=3), seeds=[[1, 2], [3, 4]])
    assert [len(group) for group in found] == [0, 2]


@pytest.mark.parametrize("nll", [0.0, 2.0])
def test_tuned_trl_takes_our_steps_to_our_weights(
    model: Checkpoint, tmp_path: Path, nll: float
) -> None:
    theirs = train(
        trainer("Dpo", nll_weight=nll, tuned=True, bf16=False, **STEPS),
        model,
        tmp_path / "a",
    )
    ours = train(Preference(nll_weight=nll, device="cpu", **STEPS), model, tmp_path / "b")
    assert theirs.steps[0].step == 1
    assert theirs.steps[0].loss == pytest.approx(ours.steps[0].loss, rel=1e-5)
    assert theirs.steps[0].metrics["grad_norm"] == pytest.approx(
        ours.steps[0].metrics["grad_norm"], rel=1e-4
    )
    for one, two in zip(weights(tmp_path / "a"), weights(tmp_path / "b"), strict=True):
        assert torch.allclose(one, two, atol=2e-4)
    assert not (tmp_path / "a" / "saves").exists()


def test_trl_as_it_comes_begins_with_our_loss_within_bfloat16(
    model: Checkpoint, tmp_path: Path
) -> None:
    theirs = train(trainer("Dpo", nll_weight=2.0, **STEPS), model, tmp_path / "a")
    ours = train(Preference(nll_weight=2.0, device="cpu", **STEPS), model, tmp_path / "b")
    assert theirs.steps[0].loss == pytest.approx(ours.steps[0].loss, rel=5e-3)


def test_trl_of_demonstrations_takes_our_steps(model: Checkpoint, tmp_path: Path) -> None:
    theirs = train(
        trainer("Sft", tuned=True, bf16=False, **STEPS), model, tmp_path / "a", pairs=False
    )
    ours = train(Supervised(device="cpu", **STEPS), model, tmp_path / "b", pairs=False)
    assert losses(theirs)[0] == pytest.approx(losses(ours)[0], rel=1e-5)
    for one, two in zip(weights(tmp_path / "a"), weights(tmp_path / "b"), strict=True):
        assert torch.allclose(one, two, atol=2e-4)


JUDGE = """
from judges.base import Opinion, PointwiseJudge
class Mine(PointwiseJudge):
    def score(self, prompt, candidate, policy, call):
        return Opinion(score=float(sum(candidate.token_ids) % 7), raw="")
"""


def test_a_round_runs_on_the_peers_and_trains_on_as_many_examples_as_ours(
    model: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(JUDGE)
    file = tmp_path / "loop.toml"
    file.write_text(
        f"""
rounds = 1
prompts = 12
[model]
path = "{model.path}"
[warmup]
when = "never"
[judge]
use = "mine.py:Mine"
[filter]
use = "best_worst"
truncated = true
[evaluate]
judge = "verifier"
gate_prompts = 6
test_prompts = 6
samples = 2
"""
    )
    counts = []
    for name, sets in {
        "ours": ["trainer.max_steps=2"],
        "peers": [f"engine.use={ENGINE}:Generate", f"trainer.use={TRAINERS}:Dpo"],
    }.items():
        root, outcome = runs.start(file, tmp_path / name, sets)
        assert outcome.code == 0, outcome.reason
        store = Store(root / "loop.db")
        counts.append(
            [
                store.query(f"SELECT count(*) AS n FROM {table}")[0]["n"]
                for table in ("asked", "candidate", "trained_on")
            ]
        )
        store.close()
    assert counts[0] == counts[1]
    assert counts[1][2] == 12
