"""Each loss, trained on answers that a model sampled, against its formula in float64."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import formulas
from judges import PointwiseJudge
from roles.filters.best_only import BestOnly
from roles.filters.labelled import Labelled
from roles.plugins import load
from roles.policy.embedded import build
from roles.policy.encoding import prompt_ids
from roles.policy.transformers import TransformersEngine
from roles.trainers import losses
from roles.trainers.kto import Kto
from roles.trainers.preference import Preference
from roles.trainers.rows import Tokens
from roles.trainers.supervised import Supervised
from store.errors import UserError
from store.records import (
    Call,
    Candidate,
    Checkpoint,
    Example,
    Group,
    Message,
    Prompt,
    Sampling,
    Training,
)

CALL = Call(seed=5, round=1, stage="train")
WORDS = ("akee", "sun", "tide", "plum", "no", "loop", "ant")
COMMON: dict[str, Any] = {"learning_rate": 1e-3, "device": "cpu", "dtype": "float32"}
NEEDED: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 0.01}}


@dataclass(frozen=True)
class Answer:
    """What a model makes of one candidate, token by token in float64."""

    logps: np.ndarray
    log_sum_squares: np.ndarray


@dataclass(frozen=True)
class Setting:
    start: Checkpoint
    other: Checkpoint
    pairs: list[Example]

    def answers(self, checkpoint: Checkpoint) -> list[list[Answer]]:
        """[2][B]: chosen, then rejected."""
        sides = [[pair.chosen for pair in self.pairs], [pair.rejected for pair in self.pairs]]
        return [
            [
                read(checkpoint, pair.prompt, each.token_ids)
                for pair, each in zip(self.pairs, side, strict=True)
            ]
            for side in sides
        ]


def read(checkpoint: Checkpoint, prompt: Prompt, ids: tuple[int, ...]) -> Answer:
    """By the model's own forward, without a batch."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
    before = prompt_ids(AutoTokenizer.from_pretrained(checkpoint.path), prompt)
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *ids]])).logits[0].double()
    logps = logits.log_softmax(-1)[len(before) - 1 : -1]
    return Answer(
        logps[torch.arange(len(ids)), torch.tensor(ids)].numpy(),
        (2 * logps).logsumexp(-1).numpy(),
    )


def make_model(folder: Path, seed: int) -> Checkpoint:
    build(folder, seed)
    return Checkpoint(
        model="policy",
        path=folder,
        digest=f"embedded-{seed}",
        tokenizer_digest="t",
        template_digest="c",
        bytes=1,
    )


def ask(word: str) -> Prompt:
    return Prompt(messages=(Message(role="user", content=f"Spell this word backward: {word}"),))


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    start, other = make_model(folder / "start", 1), make_model(folder / "other", 2)
    policy = TransformersEngine(device="cpu").open(start)
    pairs = []
    for number, word in enumerate(WORDS):
        sides = []
        for side, length in enumerate((3 + number % 3 * 2, 4 + number % 2 * 3)):
            sampling = Sampling(max_tokens=length)
            seed = CALL.seed_for(word, side)
            [[written]] = policy.sample([ask(word)], sampling=sampling, seeds=[[seed]])
            sides.append(
                Candidate(**vars(written), id=2 * number + side, asked_id=number, index=side)
            )
        chosen, rejected = sides
        pairs.append(
            Example(
                kind="pair",
                asked_id=number,
                prompt=ask(word),
                chosen=chosen,
                rejected=rejected,
                rule="test",
                id=100 + number,
            )
        )
    policy.close()
    return Setting(start, other, pairs)


@pytest.fixture(scope="module")
def started(setting: Setting) -> list[list[Answer]]:
    return setting.answers(setting.start)


@pytest.fixture(scope="module")
def otherwise(setting: Setting) -> list[list[Answer]]:
    return setting.answers(setting.other)


def totals(answers: list[list[Answer]]) -> np.ndarray:
    return np.array([[each.logps.sum() for each in side] for side in answers])


def tokens(answers: list[list[Answer]]) -> np.ndarray:
    return np.array([[float(len(each.logps)) for each in side] for side in answers])


def pairs_of(
    policy: list[list[Answer]], reference: list[list[Answer]], **more: Any
) -> formulas.Pairs:
    return formulas.Pairs(
        policy=totals(policy), reference=totals(reference), tokens=tokens(policy), **more
    )


def preference(**options: Any) -> Preference:
    return Preference(**{**COMMON, "batch_size": 8, "epochs": 2.0, "beta": 0.1, **options})


def train(
    trainer: Any,
    setting: Setting,
    into: Path,
    examples: list[Example] | None = None,
    reference: Checkpoint | None = None,
    call: Call = CALL,
) -> Training:
    into.mkdir(exist_ok=True)
    found: Training = trainer.train(
        examples or setting.pairs, setting.start, reference or setting.start, into, call
    )
    assert found.status == "trained"
    return found


def compared_with(kind: type, method: str, name: str) -> set[str]:
    """The strings that a method of TRL's compares `name` with."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(kind, method))))
    return {
        node.comparators[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and ast.unparse(node.left) == name
        and isinstance(node.comparators[0], ast.Constant)
    }


def test_every_loss_and_divergence_of_trl_is_offered() -> None:
    from trl import DPOTrainer, KTOTrainer

    found = compared_with(DPOTrainer, "_compute_loss", "loss_type")
    assert found == set(losses.LOSSES) | {"sft"}
    assert set(formulas.LOSSES) == set(losses.LOSSES)
    divergences = compared_with(DPOTrainer, "_compute_loss", "self.f_divergence_type")
    assert divergences == set(formulas.DIVERGENCES)
    for name in divergences:
        assert preference(f_divergence=name).f_divergence == name
    for name in compared_with(KTOTrainer, "_compute_loss", "self.loss_type"):
        assert load("trainer", "roles.trainers.kto:Kto", {"loss": name}).loss == name


def test_the_losses_that_bear_a_divergence_are_those_trl_says() -> None:
    from trl import DPOTrainer

    tree = ast.parse(textwrap.dedent(inspect.getsource(DPOTrainer.__init__)))
    [told] = [
        ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "f_divergence_loss_types"
    ]
    assert told == losses.DIVERGENT | {"sft"}


LN2 = math.log(2)
AT_START = {
    "sigmoid": LN2,
    "hinge": 1,
    "ipo": 25,
    "exo_pair": -LN2 - math.log(0.99) / 2 - math.log(0.01) / 2,
    "nca_pair": 2 * LN2,
    "robust": LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 50,
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_zero": 1,
    "apo_down": 1,
    "discopop": (LN2 + 1) / 2,
    "sigmoid_norm": LN2,
}
"""With beta 0.1."""


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_loss_is_its_formula_and_widens_the_margin(
    setting: Setting,
    started: list[list[Answer]],
    otherwise: list[list[Answer]],
    tmp_path: Path,
    name: str,
) -> None:
    options = NEEDED.get(name, {})
    own = train(preference(loss=name, **options), setting, tmp_path / "own")
    assert own.steps[0].loss == pytest.approx(AT_START[name], rel=1e-5)
    assert own.steps[0].metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
    margin = own.steps[1].metrics["rewards/margins"]
    # With its paper's tau discopop begins on the far side of a bump.
    assert margin < -1e-3 if name == "discopop" else margin > 1e-3
    # Away from the start, and seven pairs in micro-batches of two where that can be.
    size = None if name in losses.SORTING else 2
    trainer = preference(loss=name, max_steps=1, micro_batch_size=size, **options)
    away = train(trainer, setting, tmp_path / "away", reference=setting.other)
    smoothing = options.get("label_smoothing", 0.0)
    pairs = pairs_of(started, otherwise, smoothing=smoothing)
    assert away.steps[0].loss == pytest.approx(formulas.LOSSES[name](pairs).mean(), rel=1e-4)
    assert formulas.at_start(name, beta=0.1, smoothing=smoothing) == pytest.approx(AT_START[name])


def test_discopop_widens_the_margin_from_the_start_when_tau_is_above_a_tenth(
    setting: Setting, tmp_path: Path
) -> None:
    turning = (1 - LN2) / 3
    for tau, widens in ((0.9 * turning, False), (1.1 * turning, True)):
        trainer = preference(loss="discopop", discopop_tau=tau, learning_rate=1e-5)
        found = train(trainer, setting, tmp_path / str(tau))
        assert (found.steps[1].metrics["rewards/margins"] > 0) == widens


COMBINATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two and the likelihood of sequences": (
        {"loss": ["sigmoid", "ipo"], "loss_weights": [0.5, 2.0], "nll_weight": 3.0},
        {},
    ),
    "three of equal weight and smoothed labels": (
        {"loss": ["robust", "nca_pair", "exo_pair"], "label_smoothing": 0.2},
        {"smoothing": 0.2},
    ),
    "smoothed labels, sorted": ({"loss": "aot", "label_smoothing": 0.3}, {"smoothing": 0.3}),
    "a price for tokens": ({"loss": "sigmoid", "length_weight": 0.4}, {"token_cost": 0.4}),
    "a price for tokens in two losses": (
        {"loss": ["hinge", "discopop"], "length_weight": 0.2, "discopop_tau": 0.5},
        {"token_cost": 0.2, "tau": 0.5},
    ),
}


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("nll", ["token", "sequence"])
def test_weighted_losses_add_up(
    setting: Setting,
    started: list[list[Answer]],
    otherwise: list[list[Answer]],
    tmp_path: Path,
    name: str,
    nll: str,
) -> None:
    options, twin = COMBINATIONS[name]
    options = {"nll_weight": 0.5, "nll": nll, **options}
    names = preference(**options).loss_names
    size = None if losses.SORTING & set(names) else 4
    trainer = preference(**options, micro_batch_size=size, max_steps=1)
    found = train(trainer, setting, tmp_path / "into", reference=setting.other)
    pairs = pairs_of(started, otherwise, **twin)
    weights = options.get("loss_weights", [1.0] * len(names))
    expected = sum(
        weight * formulas.LOSSES[each](pairs).mean()
        for each, weight in zip(names, weights, strict=True)
    )
    logps = [each.logps for each in started[0]]
    likelihood = {
        "token": np.concatenate(logps).mean(),
        "sequence": np.mean([each.mean() for each in logps]),
    }
    assert abs(likelihood["token"] - likelihood["sequence"]) > 1e-3, "the test cannot tell"
    expected -= options["nll_weight"] * likelihood[nll]
    assert found.steps[0].loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_a_divergence_is_its_formula(
    setting: Setting,
    started: list[list[Answer]],
    otherwise: list[list[Answer]],
    tmp_path: Path,
    name: str,
) -> None:
    trainer = preference(loss=["hinge", "sigmoid_norm"], f_divergence=name, beta=1e-3, max_steps=1)
    found = train(trainer, setting, tmp_path / "into", reference=setting.other)
    pairs = pairs_of(started, otherwise, beta=1e-3, derivative=formulas.DIVERGENCES[name])
    expected = sum(formulas.LOSSES[each](pairs).mean() for each in trainer.loss_names)
    assert found.steps[0].loss == pytest.approx(expected, rel=1e-4)


def test_wpo_weighs_a_pair_by_how_likely_its_answers_are(
    setting: Setting,
    started: list[list[Answer]],
    otherwise: list[list[Answer]],
    tmp_path: Path,
) -> None:
    names = sorted(losses.WEIGHABLE)
    common: dict[str, Any] = {"label_smoothing": 0.01, "micro_batch_size": 4, "max_steps": 1}
    trainer = preference(loss=names, wpo=True, **common)
    found = train(trainer, setting, tmp_path / "into", reference=setting.other)
    likely = np.array(
        [[np.exp((each.logps - each.log_sum_squares).mean()) for each in side] for side in started]
    )
    pairs = pairs_of(started, otherwise, smoothing=0.01)
    expected = sum(formulas.LOSSES[name](pairs) for name in names) * likely.prod(axis=0)
    assert found.steps[0].loss == pytest.approx(expected.mean(), rel=1e-4)


def test_what_is_longer_than_the_other_side_counts_less_to_the_loss_alone(
    setting: Setting,
    started: list[list[Answer]],
    otherwise: list[list[Answer]],
    tmp_path: Path,
) -> None:
    trainer = preference(ld_alpha=0.25, max_steps=1)
    found = train(trainer, setting, tmp_path / "into", reference=setting.other)
    shared = tokens(started).min(axis=0).astype(int)

    def shortened(answers: list[list[Answer]]) -> np.ndarray:
        return np.array(
            [
                [
                    each.logps[:end].sum() + 0.25 * each.logps[end:].sum()
                    for each, end in zip(side, shared, strict=True)
                ]
                for side in answers
            ]
        )

    pairs = replace(
        pairs_of(started, otherwise),
        policy=shortened(started),
        reference=shortened(otherwise),
    )
    assert found.steps[0].loss == pytest.approx(formulas.LOSSES["sigmoid"](pairs).mean(), rel=1e-5)
    stored = np.array([found.reference_logprobs[pair.id or 0] for pair in setting.pairs])
    np.testing.assert_allclose(stored.T, totals(otherwise), atol=1e-3)
    own = train(trainer, setting, tmp_path / "own")
    assert own.steps[0].loss == pytest.approx(LN2, rel=1e-5)


def test_a_token_price_takes_weight_off_pairs_whose_chosen_answer_is_longer(
    setting: Setting, tmp_path: Path
) -> None:
    def norm(pair: Example, price: float) -> float:
        into = tmp_path / f"{pair.id}-{price}"
        trainer = preference(length_weight=price, max_steps=1)
        return train(trainer, setting, into, [pair]).steps[0].metrics["grad_norm"]

    def longer(pair: Example) -> int:
        assert pair.rejected is not None
        return len(pair.chosen.token_ids) - len(pair.rejected.token_ids)

    long, short = (max(setting.pairs, key=longer), min(setting.pairs, key=longer))
    assert longer(long) > 0 > longer(short)
    for pair in (long, short):
        # The gradient of -log sigmoid(0 + price * tokens) is sigmoid(-price * tokens), before 1/2.
        expected = 2 * float(formulas.sigmoid(np.array(-0.3 * longer(pair))))
        assert norm(pair, 0.3) / norm(pair, 0.0) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("names", ["all", "robust"])
def test_a_pair_of_weight_2_beside_one_of_weight_0_is_the_first_one_alone_to_every_part(
    setting: Setting, tmp_path: Path, names: str
) -> None:
    one, two, *_ = setting.pairs
    every = [name for name in losses.LOSSES if name not in losses.SORTING]
    options = {
        "loss": every if names == "all" else names,
        "label_smoothing": 0.01,
        "nll_weight": 1.0,
        "nll": "sequence",
        "epochs": 1.0,
    }
    weighted = [replace(one, weight=2.0), replace(two, weight=0.0)]
    both = train(preference(**options), setting, tmp_path / "both", weighted)
    alone = train(preference(**options), setting, tmp_path / "alone", [one])
    norms = [each.steps[0].metrics["grad_norm"] for each in (both, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    with pytest.raises(UserError, match=r"aot_unpaired .* weight 1; found 2 on example 100"):
        train(preference(loss="aot_unpaired"), setting, tmp_path / "sorted", weighted)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "sigmod"}, "no loss named 'sigmod'; did you mean 'sigmoid'"),
        ({"loss": ["sigmoid", "sft"]}, "nll_weight adds to the other losses"),
        ({"loss": ["sigmoid", "sigmoid"]}, "names 'sigmoid' twice"),
        ({"loss": []}, "at least one loss"),
        ({"loss": ["sigmoid", "hinge"], "loss_weights": [1.0]}, "1 numbers for 2 losses"),
        ({"loss_weights": [0.0]}, "greater than 0"),
        ({"loss_weights": [math.inf]}, "finite"),
        ({"beta": math.inf}, "finite"),
        ({"label_smoothing": 0.1}, "label_smoothing means nothing to sigmoid; it does to aot,"),
        ({"label_smoothing": 0.5, "loss": "robust"}, "less than 0.5"),
        ({"loss": "exo_pair"}, "label_smoothing above 0"),
        ({"discopop_tau": 0.1}, "discopop_tau means nothing to sigmoid"),
        ({"loss": ["sigmoid", "ipo"], "length_weight": 0.1}, "length_weight does not go with ipo"),
        ({"f_divergence": "forward_kl", "length_weight": 0.1}, "has none of"),
        ({"f_divergence": "forward_kl", "loss": "apo_zero"}, "does not go with apo_zero"),
        ({"f_alpha": 0.3}, "f_alpha is of f_divergence 'alpha_divergence'"),
        ({"ld_alpha": 1.5}, "less than or equal to 1"),
        ({"wpo": True, "loss": ["hinge", "aot"]}, "wpo does not go with hinge, aot"),
        ({"loss": "aot", "micro_batch_size": 2}, "found micro_batch_size 2 of 32"),
    ],
)
def test_options_that_a_loss_does_not_heed_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load("trainer", "preference", options)


def labelled(setting: Setting) -> list[Example]:
    """Each pair's chosen answer as wanted or unwanted."""
    return [
        replace(pair, kind="labelled", rejected=None, label=number % 3 != 0)
        for number, pair in enumerate(setting.pairs)
    ]


def kto(**options: Any) -> Kto:
    return Kto(**{**COMMON, "batch_size": 8, "epochs": 2.0, **options})


def test_kto_is_its_formula_in_micro_batches_too(
    setting: Setting,
    started: list[list[Answer]],
    otherwise: list[list[Answer]],
    tmp_path: Path,
) -> None:
    examples = labelled(setting)
    wanted = np.array([bool(each.label) for each in examples])
    rewards = 0.1 * (totals(started) - totals(otherwise))[0]
    order = list(range(len(examples)))
    Random(CALL.seed_for("shuffle")).shuffle(order)
    left = []
    for number, before in zip(order, [order[-1], *order[:-1]], strict=True):
        prompt, ids = examples[number].prompt, examples[before].chosen.token_ids
        sums = [read(at, prompt, ids).logps.sum() for at in (setting.start, setting.other)]
        left.append(sums[0] - sums[1])
    point = 0.1 * max(0.0, float(np.mean(left)))
    expected = formulas.kto(rewards, wanted, point, (1.5, 0.5)).mean()
    options = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "max_steps": 1}
    found = [
        train(kto(**options, micro_batch_size=size), setting, into, examples, setting.other)
        for size, into in ((None, tmp_path / "whole"), (2, tmp_path / "parts"))
    ]
    for each in found:
        assert each.steps[0].loss == pytest.approx(expected, rel=1e-4)
        assert each.steps[0].metrics["kl"] == pytest.approx(10 * point, rel=1e-3, abs=1e-4)
    norms = [each.steps[0].metrics["grad_norm"] for each in found]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    [stored, _] = found[0].reference_logprobs[100]
    assert stored == pytest.approx(totals(otherwise)[0, 0], abs=1e-3)


def test_kto_goes_through_the_same_steps_in_micro_batches(setting: Setting, tmp_path: Path) -> None:
    whole, parts = (
        train(kto(batch_size=4, micro_batch_size=size), setting, tmp_path / str(size), examples)
        for size, examples in ((None, labelled(setting)), (2, labelled(setting)))
    )
    assert len(whole.steps) == 4
    for one, other in zip(whole.steps, parts.steps, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.metrics["kl"] == pytest.approx(other.metrics["kl"], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_begins_at_half_its_weights_and_tells_wanted_from_unwanted(
    setting: Setting, tmp_path: Path, loss: str
) -> None:
    examples = labelled(setting)
    trainer = kto(loss=loss, undesirable_weight=3.0)
    found = train(trainer, setting, tmp_path / "into", examples)
    weights = [1.0 if each.label else 3.0 for each in examples]
    assert found.steps[0].loss == pytest.approx(np.mean(weights) / 2, rel=1e-5)
    assert found.steps[0].metrics["kl"] == pytest.approx(0, abs=1e-4)
    assert found.steps[1].metrics["rewards/margins"] > 1e-3
    assert list(found.reference_logprobs) == [each.id for each in examples]


def test_a_wanted_example_of_weight_0_is_not_learned_from(setting: Setting, tmp_path: Path) -> None:
    first, second, *_ = labelled(setting)
    # The point is 0 in the first step, whoever else is there.
    weighted = [replace(first, weight=2.0), replace(second, weight=0.0)]
    both = train(kto(max_steps=1), setting, tmp_path / "both", weighted)
    same = [first, replace(first, id=7)]
    alone = train(kto(max_steps=1), setting, tmp_path / "alone", same)
    norms = [each.steps[0].metrics["grad_norm"] for each in (both, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_mismatched_answers_come_from_other_prompts_of_the_batch_and_end_with_the_context() -> None:
    from roles.trainers.labelled import mismatched_rows

    def row(prompt: int, answer: list[int]) -> Tokens:
        return Tokens((prompt, prompt), tuple(answer), (True,) * len(answer))

    # The first two and the next two are of one prompt; the fifth is a batch of its own.
    rows = [row(1, [10]), row(1, [11, 11]), row(2, [20]), row(2, [21, 21, 21]), row(3, [30])]
    made = mismatched_rows(rows, [[0, 1, 2, 3], [4]], 4)
    assert [each.ids for each in made] == [
        (1, 1, 20),
        (1, 1, 21, 21),
        (2, 2, 10),
        (2, 2, 11, 11),
        (3, 3, 10),
    ]
    assert [each.tokens for each in made] == [1, 2, 1, 2, 1]


def test_what_kto_cannot_learn_from_is_refused(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labelled candidates; example 100 .* is one of pairs"):
        train(kto(), setting, tmp_path / "pairs")
    with pytest.raises(UserError, match="found 1 example"):
        train(kto(), setting, tmp_path / "one", labelled(setting)[:1])
    with pytest.raises(UserError, match="at least 2 examples are in memory"):
        kto(micro_batch_size=1)


@pytest.mark.parametrize("name", ["losses", "kto"])
def test_a_training_with_any_loss_that_is_stopped_goes_on_as_if_it_were_not(
    setting: Setting, tmp_path: Path, name: str
) -> None:
    common: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2}
    trainer: Any = kto(**common)
    examples = labelled(setting)
    if name == "losses":
        names = [each for each in losses.LOSSES if each not in losses.SORTING]
        more = {"label_smoothing": 0.01, "ld_alpha": 0.5, "nll_weight": 0.5, "nll": "sequence"}
        trainer, examples = preference(loss=names, **more, **common), setting.pairs
    whole = train(trainer, setting, tmp_path / "whole", examples)
    into = tmp_path / "stopped"
    asked = iter(range(1, 99))
    stopping = replace(CALL, stopping=lambda: next(asked) == 3)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, setting, into, examples, call=stopping)
    steps: list[int] = []
    going_on = replace(CALL, progress=lambda step, total: steps.append(step))
    assert train(trainer, setting, into, examples, call=going_on) == whole
    assert steps == [4]
    files = [folder / "model.safetensors" for folder in (into, tmp_path / "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


class Vowels(PointwiseJudge):
    """Right is an answer with a vowel in it, which untrained models write now and then."""

    def score(self, prompt: Any, completion: Any, policy: Any, call: Any) -> float:
        return float(bool(set("aeiou") & set(completion.text)))


def groups_of(setting: Setting) -> list[Group]:
    policy = TransformersEngine(device="cpu").open(setting.start)
    prompts = [ask(word) for word in WORDS]
    seeds = [[CALL.seed_for(word, index) for index in range(6)] for word in WORDS]
    written = policy.sample(prompts, sampling=Sampling(max_tokens=4), seeds=seeds)
    policy.close()
    return [
        Group(
            asked_id=number,
            prompt=prompt,
            candidates=tuple(
                Candidate(**vars(each), id=10 * number + index, asked_id=number, index=index)
                for index, each in enumerate(several)
            ),
        )
        for number, (prompt, several) in enumerate(zip(prompts, written, strict=True))
    ]


@pytest.mark.parametrize("method", ["rejection sampling", "kto"])
def test_sampled_answers_that_are_right_get_likelier_than_those_that_are_wrong(
    setting: Setting, tmp_path: Path, method: str
) -> None:
    """Sampled, judged, filtered and trained, as a round does it."""
    groups = groups_of(setting)
    judged = Vowels().judge(groups, None, CALL)
    scores = {each.candidate_id: each.score for each in judged}
    filter_: Any = BestOnly(min_score=1.0, truncated=True)
    trainer: Any = Supervised(**COMMON, batch_size=4, epochs=3.0)
    if method == "kto":
        filter_, trainer = Labelled(truncated=True), kto(batch_size=8, epochs=3.0)
    history: Any = None
    selected = filter_.select(groups, judged, history, CALL)
    examples = [replace(each, id=1 + at) for at, each in enumerate(selected.examples)]
    for each in examples:
        assert scores[each.chosen.id] == (1.0 if each.label in (None, True) else 0.0)
    assert len({scores[each.chosen.id] for each in examples}) == (1 if method != "kto" else 2)
    train(trainer, setting, tmp_path / "into", examples)
    trained = replace(setting.start, path=tmp_path / "into")
    gained: dict[bool, list[float]] = {True: [], False: []}
    for group in groups:
        for each in group.candidates:
            sums = [
                read(at, group.prompt, each.token_ids).logps.sum()
                for at in (trained, setting.start)
            ]
            gained[scores[each.id] == 1.0].append(sums[0] - sums[1])
    assert np.mean(gained[True]) > np.mean(gained[False]) + 0.1
