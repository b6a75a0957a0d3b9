"""Loss, gradients and logged metrics beside those of TRL's trainers as they come."""

from __future__ import annotations

import hashlib
import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from kernels.matmul import counting
from roles.policy import adapters
from roles.policy.encoding import prompt_ids
from roles.policy.scoring import at_once
from roles.trainers import losses
from roles.trainers.demonstrations import DemonstrationTrainer
from roles.trainers.guards import quiet
from roles.trainers.kto import Kto
from roles.trainers.labelled import LabelledTrainer
from roles.trainers.pairs import PairTrainer
from roles.trainers.preference import Preference
from roles.trainers.reference import Scores
from roles.trainers.rows import Tokens, pad
from roles.trainers.supervised import Supervised
from roles.trainers.training import Session, session
from store.records import Checkpoint, Example
from test_causal import make
from test_trainers import CALL, make_checkpoint, make_examples, plain_logprobs

COMMON: dict[str, Any] = {"batch_size": 8, "device": "cpu", "dtype": "float32"}


@dataclass
class Step:
    """What one batch makes of a model."""

    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Setting:
    start: Checkpoint
    other: Checkpoint
    examples: list[Example]
    tied: Checkpoint
    """Its head is its embedding."""


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    start, other = (make_checkpoint(folder / f"m{seed}", seed) for seed in (1, 2))
    examples = make_examples(start, 7)
    # A prompt with two pairs, of which one answer is in both.
    assert examples[1].rejected is not None
    again = replace(examples[1], id=99, chosen=examples[1].rejected, rejected=examples[2].chosen)
    tied = make_checkpoint(folder / "tied", 3, tie_word_embeddings=True)
    return Setting(start, other, [*examples, again], tied)


def load(checkpoint: Checkpoint, adapted: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    if adapted:
        adapters.add(model, rank=2, alpha=4.0, dropout=0.0, targets="all-linear", seed=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            for name, parameter in model.named_parameters():
                if ".lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
    return model


def step(trainer: Any, batch: dict[str, Tensor], bf16: bool = False, **more: Any) -> Step:
    trainer.model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = trainer.compute_loss(trainer.model, batch, **more)
    loss.backward()
    return Step(
        loss.item(),
        {
            name: parameter.grad
            for name, parameter in trainer.model.named_parameters()
            if parameter.grad is not None
        },
        {name: float(values[0]) for name, values in trainer._metrics["train"].items()},
    )


@contextmanager
def opened(options: Any, setting: Setting, into: Path) -> Iterator[Session]:
    into.mkdir()
    examples = examples_for(options, setting)
    with session(options, examples, setting.start, setting.other, into, CALL) as found:
        yield found


def examples_for(options: Any, setting: Setting) -> list[Example]:
    kind = options.learns_from
    if kind == "pair":
        return setting.examples
    return [
        replace(each, kind=kind, rejected=None, label=n % 3 != 0 if kind == "labelled" else None)
        for n, each in enumerate(setting.examples)
    ]


def our_pairs(options: Preference, setting: Setting, into: Path, model: Any, other: Any) -> Step:
    with opened(options, setting, into) as found:
        scores = Scores(into / "reference.json")
        PairTrainer(other, found, scores, False)
        trainer = PairTrainer(model, found, scores, False)
        batch = {"row": torch.arange(len(found.rows))}
        trainer.step_batches = [batch]
        return step(trainer, batch)


def arguments(config: Any, into: Path, bf16: bool = False, **more: Any) -> Any:
    return config(
        output_dir=str(into / "trl"),
        use_cpu=True,
        bf16=bf16,
        report_to="none",
        max_length=None,
        **more,
    )


def trl_pairs(options: Preference, setting: Setting, into: Path, model: Any, other: Any) -> Step:
    """An unmodified DPOTrainer, its batch padded by its own collator."""
    names: list[str] = options.loss_names
    weights = [1.0] * len(names)
    if options.nll_weight:
        names, weights = [*names, "sft"], [*weights, options.nll_weight]
    bf16 = options.dtype == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(setting.start.path)
    said = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with quiet():
        trainer = trl.DPOTrainer(
            model=model,
            ref_model=other,
            args=arguments(
                trl.DPOConfig,
                into,
                bf16,
                beta=options.beta,
                loss_type=names,
                loss_weights=weights,
                label_smoothing=options.label_smoothing,
                ld_alpha=options.ld_alpha,
                f_divergence_type=options.f_divergence,
                use_weighting=options.wpo,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list([said]),
            processing_class=tokenizer,
        )
    batch = DataCollatorForPreference(pad_token_id=0)(
        [
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            for prompt, chosen, rejected in ids_of(setting)
        ]
    )
    return step(trainer, batch, bf16)


def ids_of(setting: Setting) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected of each pair."""
    tokenizer = AutoTokenizer.from_pretrained(setting.start.path)
    found = []
    for each in setting.examples:
        assert each.rejected is not None
        chosen, rejected = list(each.chosen.token_ids), list(each.rejected.token_ids)
        found.append((prompt_ids(tokenizer, each.prompt), chosen, rejected))
    return found


def hold(ours: Step, theirs: Step) -> None:
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5, abs=1e-6)
    assert ours.gradients.keys() == theirs.gradients.keys()
    scale = max(float(each.abs().max()) for each in theirs.gradients.values())
    for name, gradient in theirs.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=1e-4, atol=2e-5 * scale)
    assert ours.metrics == pytest.approx(theirs.metrics, rel=2e-5, abs=2e-5)


COVERED: list[dict[str, Any]] = [
    {"loss": "sigmoid"},
    {"loss": "sigmoid", "nll_weight": 0.5},
    {"loss": "hinge"},
    {"loss": "robust", "label_smoothing": 0.2},
    {"loss": "ipo", "nll_weight": 0.5},
    {"loss": "sigmoid_norm", "beta": 2.0},
]
OTHERS: list[dict[str, Any]] = [
    {"loss": "exo_pair", "label_smoothing": 0.01},
    {"loss": "aot", "label_smoothing": 0.1, "nll_weight": 0.5},
    {"loss": ["nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"]},
    {"loss": ["sigmoid", "aot_unpaired"]},
    {"loss": "sigmoid", "ld_alpha": 0.5},
    {"loss": "sigmoid", "wpo": True},
    {"loss": "hinge", "f_divergence": "js_divergence"},
]


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("options", COVERED + OTHERS, ids=str)
def test_pairs_are_trained_as_trl_does_it(
    setting: Setting, tmp_path: Path, options: dict[str, Any], adapted: bool
) -> None:
    asked = Preference(**COMMON, **{"beta": 0.3, **options})
    sides = [
        run(
            asked,
            setting,
            tmp_path / name,
            load(setting.start, adapted),
            load(setting.other, False),
        )
        for name, run in (("ours", our_pairs), ("trl", trl_pairs))
    ]
    assert abs(sides[1].metrics["rewards/margins"]) > 1e-3
    assert len(sides[1].gradients) == (28 if adapted else 21)
    hold(*sides)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("options", [COVERED[1], OTHERS[0]], ids=str)
def test_pairs_are_trained_as_trl_does_it_where_the_head_is_the_embedding(
    setting: Setting, tmp_path: Path, options: dict[str, Any], adapted: bool
) -> None:
    asked = Preference(**COMMON, **options)
    sides = [
        run(
            asked, setting, tmp_path / name, load(setting.tied, adapted), load(setting.other, False)
        )
        for name, run in (("ours", our_pairs), ("trl", trl_pairs))
    ]
    assert len(sides[1].gradients) == (28 if adapted else 20)
    assert ("model.embed_tokens.weight" in sides[1].gradients) == (not adapted)
    hold(*sides)


@pytest.mark.parametrize(("adapted", "passes"), [(False, 3), (True, 2)], ids=["full", "adapter"])
@pytest.mark.parametrize("options", COVERED, ids=str)
def test_a_step_goes_over_the_head_three_times_and_twice_where_that_is_frozen(
    setting: Setting, tmp_path: Path, options: dict[str, Any], adapted: bool, passes: int
) -> None:
    with opened(Preference(**COMMON, **options), setting, tmp_path / "ours") as found:
        scores = Scores(tmp_path / "r.json")
        trainer = PairTrainer(load(setting.start, adapted), found, scores, True)
        batch = {"row": torch.arange(len(found.rows))}
        trainer.step_batches = [batch]
        with counting() as count:
            step(trainer, batch)
        vocabulary, width = trainer.model.get_output_embeddings().weight.shape
        tokens = sum(side.tokens for row in found.rows for side in row.sides)
        assert count.passes(tokens, vocabulary, width) == passes
        assert count.most_held == 4 * tokens * vocabulary


def test_every_loss_is_held_to_trls() -> None:
    named: set[str] = set()
    for options in COVERED + OTHERS:
        named |= set(Preference(**options).loss_names)
    assert named == set(losses.LOSSES)


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    offs = torch.stack([(one[name] - other[name]).double().norm() for name in other])
    return float(offs.norm())


@pytest.mark.parametrize("options", [COVERED[1], COVERED[4], OTHERS[0]], ids=str)
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
def test_in_bfloat16_we_are_no_further_from_float32_than_trl_is(
    setting: Setting, tmp_path: Path, options: dict[str, Any], adapted: bool
) -> None:
    exact = Preference(**COMMON, **options)
    narrow = replace(exact, dtype="bfloat16")
    wanted, ours, theirs = (
        run(
            asked,
            setting,
            tmp_path / name,
            load(setting.start, adapted),
            load(setting.other, False),
        )
        for name, run, asked in (
            ("exact", trl_pairs, exact),
            ("ours", our_pairs, narrow),
            ("trl", trl_pairs, narrow),
        )
    )
    error = far(theirs.gradients, wanted.gradients)
    assert 0 < far(ours.gradients, wanted.gradients) < 1.5 * error
    for name, value in wanted.metrics.items():
        if "logps" in name:
            assert ours.metrics[name] == pytest.approx(value, rel=0.01), name


KINDS = ["full", "tied", "adapter"]


def load_kind(setting: Setting, kind: str) -> Any:
    return load(setting.tied if kind == "tied" else setting.start, kind == "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_demonstrations_are_trained_as_trl_does_it(
    setting: Setting, tmp_path: Path, kind: str
) -> None:
    asked = Supervised(**COMMON)
    with opened(asked, setting, tmp_path / "ours") as found:
        ours = DemonstrationTrainer(load_kind(setting, kind), found)
        batch = ours._collate([{"row": number} for number in range(len(found.rows))])
        count = (batch["labels"] != -100).sum()
        own = step(ours, dict(batch), num_items_in_batch=count)
    rows = [
        {"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)}
        for p, c, _ in ids_of(setting)
    ]
    with quiet():
        trainer = trl.SFTTrainer(
            model=load_kind(setting, kind),
            args=arguments(
                trl.SFTConfig, tmp_path, gradient_checkpointing=False, completion_only_loss=True
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(setting.start.path),
        )
    theirs = trainer.data_collator(list(trainer.train_dataset))
    assert torch.equal(theirs["labels"], batch["labels"])
    hold(own, step(trainer, dict(theirs), num_items_in_batch=count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_labelled_answers_are_trained_as_trl_does_it(
    setting: Setting, tmp_path: Path, loss: str, kind: str
) -> None:
    asked = Kto(**COMMON, loss=loss, desirable_weight=1.5)
    with opened(asked, setting, tmp_path / "ours") as found:
        examples = examples_for(asked, setting)
        scores = Scores(tmp_path / "reference.json")
        LabelledTrainer(load(setting.other, False), found, scores, False, examples)
        ours = LabelledTrainer(load_kind(setting, kind), found, scores, False, examples)
        numbers = list(range(len(found.rows)))
        batch = ours._collate([{"row": number} for number in numbers])
        ours.step_batches = [batch]
        theirs = {
            **pad([row.chosen for row in found.rows]),
            **{f"KL_{name}": each for name, each in pad(ours.mismatched).items()},
            "label": batch["label"],
        }
        own = step(ours, dict(batch))
    said = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)] * 4
    with quiet():
        trainer = trl.KTOTrainer(
            model=load_kind(setting, kind),
            ref_model=load(setting.other, False),
            args=arguments(
                trl.KTOConfig,
                tmp_path,
                loss_type=loss,
                desirable_weight=1.5,
                gradient_checkpointing=False,
                per_device_train_batch_size=8,
            ),
            train_dataset=Dataset.from_list(said),
            processing_class=AutoTokenizer.from_pretrained(setting.start.path),
        )
    hold(own, step(trainer, theirs))


def routed() -> Any:
    return make(
        "Mixtral",
        vocab_size=400,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        eos_token_id=0,
    )


def test_a_routed_models_part_of_the_loss_is_trls(setting: Setting, tmp_path: Path) -> None:
    asked = Preference(**COMMON)
    ours = our_pairs(asked, setting, tmp_path / "ours", routed(), load(setting.other, False))
    theirs = trl_pairs(asked, setting, tmp_path / "trl", routed(), load(setting.other, False))
    assert theirs.metrics["aux_loss"] > 0.1
    hold(ours, theirs)


@pytest.mark.parametrize("routes", [True, False], ids=["routed", "head unread"])
def test_a_reference_passes_by_few_rows_only_where_all_its_logits_come_along(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, routes: bool
) -> None:
    model = routed() if routes else load(setting.start, False)
    if not routes:
        model.__class__ = Doubled
    rows, logits, asked = 2, [], []
    with opened(Preference(**COMMON), setting, tmp_path / "ours") as found:
        longest = max(row.length for row in found.rows)
        monkeypatch.setattr("roles.trainers.passing.MAX_BYTES", rows * longest * 400 * 4)

        def note(module: Any, given: Any, kwargs: Any, made: Any) -> None:
            logits.append(made.logits.numel() if hasattr(made, "logits") else 0)
            asked.append(bool(kwargs.get("output_router_logits")))

        model.register_forward_hook(note, with_kwargs=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = PairTrainer(model, found, Scores(tmp_path / "r.json"), True)
        assert all(math.isfinite(each) for row in trainer.scores.known for each in row[1:])
        distinct = len({side for row in found.rows for side in row.sides})
        scored = len(logits)
        assert not any(asked)
        batch = {"row": torch.arange(len(found.rows))}
        trainer.step_batches = [batch]
        step(trainer, batch)
    assert asked[scored:] == [routes]
    if routes:
        assert scored < distinct / 4
        assert max(logits) == 0
    else:
        assert scored >= distinct / rows
        assert max(logits[:scored]) <= rows * longest * 400


@pytest.mark.parametrize("loss", ["sigmoid", "apo_zero"])
def test_logits_are_held_within_a_bound_that_the_device_sets(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    with opened(Preference(**COMMON, loss=loss), setting, tmp_path / "ours") as found:
        scores = Scores(tmp_path / "r.json")
        trainer = PairTrainer(load(setting.start, False), found, scores, True)
        batch = {"row": torch.arange(len(found.rows))}
        trainer.step_batches = [batch]
        with counting() as whole:
            step(trainer, batch)
        bound = whole.most_held // 2
        monkeypatch.setattr("roles.trainers.passing.MAX_BYTES", bound)
        with counting() as tiled:
            step(trainer, batch)
        assert 0 < tiled.most_held <= bound
        trainer.model.to("meta")
        assert trainer._max_bytes >= 2 * 512 * 152_000 * 2


class Doubled(transformers.LlamaForCausalLM):
    """A model that does to its logits what no configuration tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = 2 * found.logits
        return found


def test_a_model_whose_head_cannot_be_read_is_trained_by_its_own_logits(
    setting: Setting, tmp_path: Path
) -> None:
    model = load(setting.start, False)
    model.__class__ = Doubled
    asked = Preference(**COMMON, nll_weight=0.5)
    with pytest.warns(UserWarning, match="Doubled is scored by its own logits"):
        ours = our_pairs(asked, setting, tmp_path / "ours", model, load(setting.other, False))
    # It is the model whose head is twice as large.
    twice = load(setting.start, False)
    twice.lm_head.weight.data *= 2
    theirs = trl_pairs(asked, setting, tmp_path / "trl", twice, load(setting.other, False))
    theirs.gradients["lm_head.weight"] *= 2
    hold(ours, theirs)


def test_a_prompt_and_an_answer_pass_once_however_many_pairs_they_are_in(
    setting: Setting, tmp_path: Path
) -> None:
    with opened(Preference(**COMMON), setting, tmp_path / "ours") as found:
        trainer = PairTrainer(load(setting.start, False), found, Scores(tmp_path / "r.json"), True)
        passed: list[tuple[int, ...]] = []
        trainer.model.get_input_embeddings().register_forward_hook(
            lambda module, given, made: passed.append(tuple(given[0].shape))
        )
        pair, again = found.rows[1], found.rows[-1]
        assert pair.rejected == again.chosen
        trainer._hidden([*pair.sides, *again.sides])
    answers = {side.answer for side in (*pair.sides, *again.sides)}
    assert len(answers) == 3
    assert passed == [
        (1, len(pair.chosen.prompt)),
        (3, max(len(answer) for answer in answers) - 1),
    ]


def test_an_answer_of_which_nothing_is_seen_has_no_log_probability(
    setting: Setting, tmp_path: Path
) -> None:
    with opened(Preference(**COMMON), setting, tmp_path / "ours") as found:
        trainer = PairTrainer(load(setting.start, False), found, Scores(tmp_path / "r.json"), True)
        seen = found.rows[0].chosen
        unseen = replace(seen, trained=(False,) * len(seen.answer))
        assert [len(each) for each in trainer._logps([unseen, unseen])] == [0, 0]
        assert [len(each) for each in trainer._logps([unseen, seen])] == [0, seen.tokens]
        cut = replace(seen, answer=(), trained=())
        assert [len(each) for each in trainer._logps([cut, seen])] == [0, seen.tokens]


def test_reference_scores_pass_within_the_budget_however_unlike_in_length_they_are(
    setting: Setting, tmp_path: Path
) -> None:
    with opened(Preference(**COMMON), setting, tmp_path / "ours") as found:
        trainer = PairTrainer(load(setting.start, False), found, Scores(tmp_path / "r.json"), True)
        prompt = found.rows[0].chosen.prompt
        lengths = [200, *[2] * 40]
        sides = [
            Tokens(prompt, (*[3] * (length - 1), number), (True,) * length)
            for number, length in enumerate(lengths, 5)
        ]
        passed: list[int] = []
        trainer.model.get_input_embeddings().register_forward_hook(
            lambda module, given, made: passed.append(given[0].numel())
        )
        scored = trainer._score(set(sides))
        assert [len(scored[side]) for side in sides] == lengths
        within, sum_of_all = max(passed), sum(lengths)
        assert within <= at_once(trainer.model)
        assert sum(passed) < 2 * sum_of_all < at_once(trainer.model) < 41 * 200
        (alone,) = trainer._logps(sides[3:4])
        torch.testing.assert_close(scored[sides[3]], alone, rtol=1e-4, atol=1e-4)


def test_the_reference_scores_each_answer_once(setting: Setting, tmp_path: Path) -> None:
    with opened(Preference(**COMMON), setting, tmp_path / "ours") as found:
        model = load(setting.start, False)
        trainer = PairTrainer(model, found, scores := Scores(tmp_path / "r.json"), True)
        assert len(trainer.scores.known) == 8
        chosen, rejected = scores.by_example()[99]
        assert chosen == scores.by_example()[101][1]
        plain = plain_logprobs(
            setting.start, setting.examples[-1].prompt, setting.examples[2].chosen.token_ids
        )
        assert rejected == pytest.approx(plain.sum().item(), abs=1e-4)


READ = {
    "kernels.chunked_logprob.ChunkedLogProbFunction.forward": (
        "1d8220b44273cdf36b4c6b0fb8b619b8a1dd0804c5fb3ada50b9a95ef4ef3c5e"
    ),
    "kernels.chunked_logprob._forward_tile": (
        "adf891da0123196110c50da4d4c15099a1f4a04e9949fcc56778bdfa4df0f84d"
    ),
    "trainer.base_trainer._BaseTrainer._send_telemetry": (
        "3e012069065d03d10b6cfa3d94ff72ce6985bc15e758c0b915fda2f6cbfa87ba"
    ),
    "trainer.base_trainer._BaseTrainer.create_model_card": (
        "4f8a407fd9fd3f6e9d3b2300a2029bee1c742631f1ec2c62b34a6cc31841f106"
    ),
    "trainer.dpo_trainer.DPOTrainer.__init__": (
        "632f447c71dcb04361800303be2192d8e48b2b3ccffd415fbf639c03a5dfd84f"
    ),
    "trainer.dpo_trainer.DPOTrainer._compute_loss": (
        "5e58a1699e0d76cd093095fa24cfe6ca5cb950fa73ad769d4e4c483d6ff722d2"
    ),
    "trainer.dpo_trainer.DPOTrainer._precompute_ref_logps": (
        "f2c098c7da6ca701978f476021fbb9482837dee4b83cc04b98ca2a214e856e4d"
    ),
    "trainer.dpo_trainer.DPOTrainer._prepare_dataset": (
        "35e349e8e8266df4a098b8c0b9949729e06d794f67dc24b666863f9f26e1bb55"
    ),
    "trainer.dpo_trainer.DPOTrainer.compute_ref_log_probs": (
        "90611af9cbadb8ecfe0152f237177bea34072e989937cd6341632cb787dafe0a"
    ),
    "trainer.dpo_trainer.DPOTrainer.log": (
        "e80e122cfe5fd8ad2b36edb3fe106ed2c754fa24bb4c1f5e00a755aa72fe8481"
    ),
    "trainer.dpo_trainer.DPOTrainer.training_step": (
        "bba41f264647016a01309e78b769eb862a749277c658d45fac3b755096ca3e54"
    ),
    "trainer.kto_trainer.KTOTrainer.__init__": (
        "df42c2c259c9abf6d7381f211bb71c1095aa5e38e04f9a69d037241ddb798092"
    ),
    "trainer.kto_trainer.KTOTrainer._compute_kl_logps": (
        "ebc903a2f9f7cd83e43d3766d511da9a812e266ab01499991fea64ad1bd5b7d7"
    ),
    "trainer.kto_trainer.KTOTrainer._compute_loss": (
        "70e5262bf7b4fc7788f380c1dde2c8fcf33b1d90d01ec408ee9a57ee13b0a5e1"
    ),
    "trainer.kto_trainer.KTOTrainer._get_train_sampler": (
        "06d3dd1dbbf3779722f7be567f966d77fa778d799ec3f23128c197a9b291c77c"
    ),
    "trainer.kto_trainer.KTOTrainer._precompute_ref_logps": (
        "bb13017be7eeb8f2ef9bbfd093cc6e724eb6f9142e646e786b915ce4d1550667"
    ),
    "trainer.kto_trainer.KTOTrainer._prepare_dataset": (
        "d22cf45470e637d6e401da7de5d9300ae7c4e4ac00ae1993ca3291bfd7092540"
    ),
    "trainer.kto_trainer.KTOTrainer.compute_ref_log_probs": (
        "83c8d1cfdc4fab9daea60cb513f6c9349ec3962192687dea5bc4b49b5283f9fc"
    ),
    "trainer.kto_trainer.KTOTrainer.training_step": (
        "bba41f264647016a01309e78b769eb862a749277c658d45fac3b755096ca3e54"
    ),
    "trainer.sft_trainer.SFTTrainer.__init__": (
        "90b61e42b6900b05ae668cb2aeaee6c8ef35e62f78eacebb4ec2a7886bf33255"
    ),
    "trainer.sft_trainer.SFTTrainer._prepare_dataset": (
        "04b668d28493f693e87d565997a6d2e829251dd656591f3d056561251a20d511"
    ),
    "trainer.sft_trainer.SFTTrainer.compute_loss": (
        "ca448211ff653fe621b45498c79bf4f94b26286146442c361f0a8c3592b3b4c1"
    ),
    "trainer.sft_trainer.SFTTrainer.training_step": (
        "bba41f264647016a01309e78b769eb862a749277c658d45fac3b755096ca3e54"
    ),
    "trainer.utils.FusedCausalLMOutput": (
        "5ccdd6e41dcb9f2c1037b461b852cd0c0bc275a0f78a87f350783787c1f2889a"
    ),
    "trainer.utils.add_fused_lm_head": (
        "422d009f04b66659982f9545a90d560bdcc27fde3268de203d0c5c6d1449d211"
    ),
}
"""Of all of TRL that is overridden or written again, the hash of what was read."""


def test_what_is_overridden_or_written_again_of_trl_is_what_was_read() -> None:
    """When this fails after an upgrade of TRL: read what changed in what it names. Of
    `_compute_loss` the metrics and the losses that kernels.preference_loss has are written again
    in pairs.py, of the others how log-probabilities, statistics and reference scores are made in
    passing.py and reference.py, of add_fused_lm_head what is read of a configuration in
    kernels/causal.py. Then write the new hashes."""
    found = {}
    for named in READ:
        thing: Any = trl
        for part in named.split("."):
            thing = getattr(thing, part)
        found[named] = hashlib.sha256(inspect.getsource(thing).encode()).hexdigest()
    assert found == READ


def test_every_method_of_trl_that_is_overridden_was_read() -> None:
    overridden = set()
    for ours in (PairTrainer, DemonstrationTrainer, LabelledTrainer):
        own = [kind for kind in ours.__mro__ if kind.__module__.startswith("roles.")]
        theirs = [kind for kind in ours.__mro__ if kind.__module__.startswith("trl.")]
        for name in {name for kind in own for name in vars(kind)}:
            overridden |= {
                f"{kind.__module__}.{kind.__name__}.{name}".removeprefix("trl.")
                for kind in theirs
                if callable(vars(kind).get(name)) and (not name.startswith("__"))
            }
    assert overridden
    assert overridden <= set(READ)
