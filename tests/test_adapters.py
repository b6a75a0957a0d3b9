"""Low-rank adapters: trained for real, continued, held to a reference, sampled and merged."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from loop import casting
from loop import config as configuration
from loop.seat import Seat
from loop.tasks import Learning
from roles.plugins import load
from roles.policy import adapters
from roles.policy.encoding import prompt_ids
from roles.policy.transformers import TransformersEngine, TransformersPolicy
from roles.trainers.preference import Preference
from roles.trainers.supervised import Supervised
from small_model import build, checkpoint, examples, question
from store import checkpoints
from store.errors import UserError
from store.records import Call, Checkpoint, Example, Sampling, Training

CALL = Call(seed=3, round=1, stage="train")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(build(tmp_path_factory.mktemp("models") / "base"))


@pytest.fixture(scope="module")
def adapter(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """An adapter that has learnt something."""
    into = tmp_path_factory.mktemp("trained") / "adapter"
    train(lora(), examples(base.path, 8), base, into)
    return checkpoint(into, base)


def lora(**options: Any) -> Preference:
    given = {"lora_rank": 4, "learning_rate": 3e-3, "batch_size": 4, "epochs": 2.0, **options}
    return Preference(**{"dtype": "float32", "device": "cpu", **given})


def train(
    trainer: Any,
    given: list[Example],
    start: Checkpoint,
    into: Path,
    reference: Checkpoint | None = None,
    call: Call = CALL,
) -> Training:
    into.mkdir(exist_ok=True)
    return trainer.train(given, start, reference or start, into, call)


def opened(found: Checkpoint, **options: Any) -> TransformersPolicy:
    return TransformersEngine(device="cpu", **options).open(found)


def totals(found: Checkpoint, given: list[Example]) -> list[float]:
    """Log-probabilities of the chosen answers under a checkpoint, as the engine scores them."""
    prompts = [each.prompt for each in given]
    scored = opened(found).logprobs(prompts, [each.chosen for each in given])
    return [each.total for each in scored]


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_fresh_adapter_begins_as_its_base_and_leaves_that_as_it_was(
    base: Checkpoint, tmp_path: Path
) -> None:
    given, into = examples(base.path, 8), tmp_path / "into"
    training = train(lora(), given, base, into)
    assert training.steps[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert training.steps[-1].loss < training.steps[0].loss
    assert checkpoints.intact(base)
    of_base = totals(base, given)
    for example, expected in zip(given, of_base, strict=True):
        assert training.reference_logprobs[example.id][0] == pytest.approx(expected, abs=1e-4)
    assert totals(checkpoint(into), given) != pytest.approx(of_base, abs=1e-2)


def test_what_is_left_loads_as_base_and_adapter_wherever_peft_does(
    base: Checkpoint, adapter: Checkpoint
) -> None:
    expected = {path.name for path in base.path.iterdir()} - {"config.json", "model.safetensors"}
    left = {path.name for path in adapter.path.iterdir()}
    assert left == expected | {"adapter_config.json", "adapter_model.safetensors"}
    model = AutoModelForCausalLM.from_pretrained(adapter.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter.path)
    [example] = examples(base.path, 1)
    before = prompt_ids(tokenizer, example.prompt)
    ids = example.chosen.token_ids
    with torch.no_grad():
        logps_TV = model(torch.tensor([[*before, *ids]])).logits[0].log_softmax(-1)
    places = torch.arange(len(before) - 1, len(before) - 1 + len(ids))
    assert totals(adapter, [example])[0] == pytest.approx(
        logps_TV[places, list(ids)].sum().item(), abs=1e-4
    )


def test_an_adapter_is_measured_as_one_and_is_the_same_wherever_its_base_lies(
    base: Checkpoint, adapter: Checkpoint, tmp_path: Path
) -> None:
    assert (base.kind, adapter.kind) == ("full", "adapter")
    assert adapter.tokenizer_digest == base.tokenizer_digest
    assert adapter.template_digest == base.template_digest
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.path.resolve())
    moved = Path(shutil.copytree(base.path, tmp_path / "another folder"))
    train(lora(), examples(base.path, 8), replace(base, path=moved), tmp_path / "into")
    again = checkpoint(tmp_path / "into")
    assert (again.digest, again.bytes) == (adapter.digest, adapter.bytes)
    (tmp_path / "into/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert checkpoint(tmp_path / "into").digest != adapter.digest


def test_an_adapter_written_in_another_process_is_the_same_to_the_byte(
    base: Checkpoint, adapter: Checkpoint, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import torch; torch.set_num_threads(1)\n"
        "from test_adapters import checkpoint, examples, lora, train\n"
        "base = checkpoint(Path(sys.argv[2]))\n"
        "train(lora(), examples(base.path, 8), base, Path(sys.argv[3]))\n"
    )
    into = tmp_path / "into"
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", code, tests, str(base.path), str(into)]
    subprocess.run(command, check=True, capture_output=True)
    for path in adapter.path.iterdir():
        assert (into / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_adapter_is_gone_on_with_and_keeps_its_shape_and_its_base(
    base: Checkpoint, adapter: Checkpoint, tmp_path: Path
) -> None:
    given = examples(base.path, 8)
    for options in ({"lora_rank": None}, {"lora_rank": 4, "lora_alpha": 8.0}):
        into = tmp_path / str(options["lora_rank"])
        training = train(lora(**options), given, adapter, into)
        assert training.steps[0].loss == pytest.approx(math.log(2), abs=1e-6)
        chosen = [training.reference_logprobs[each.id][0] for each in given]
        assert chosen == pytest.approx(totals(adapter, given), abs=1e-4)
        config = json.loads((into / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (4, 8)
        assert config["base_model_name_or_path"] == str(base.path.resolve())
    assert weights(tmp_path / "4") == weights(tmp_path / "None") != weights(adapter.path)


def test_an_adapter_of_another_shape_is_refused_with_both_numbers(
    adapter: Checkpoint, tmp_path: Path
) -> None:
    given = examples(adapter.path, 1)
    with pytest.raises(UserError, match=r"lora_rank 8 was asked for, .* has 4; leave lora_rank"):
        train(lora(lora_rank=8), given, adapter, tmp_path / "rank")
    with pytest.raises(UserError, match=r"lora_alpha 5 was asked for, .* has 8; leave"):
        train(lora(lora_alpha=5), given, adapter, tmp_path / "alpha")


def test_the_reference_may_be_the_base_which_is_the_model_with_its_adapter_off(
    base: Checkpoint, adapter: Checkpoint, tmp_path: Path
) -> None:
    given = examples(base.path, 8)
    training = train(lora(), given, adapter, tmp_path / "base", reference=base)
    chosen = [training.reference_logprobs[each.id][0] for each in given]
    assert chosen == pytest.approx(totals(base, given), abs=1e-4)
    assert training.steps[0].loss != pytest.approx(math.log(2), abs=1e-3)
    # A copy of the base is another checkpoint, which is loaded alone; the rest is the same.
    copied = replace(base, path=Path(shutil.copytree(base.path, tmp_path / "copied")))
    alone = train(lora(), given, adapter, tmp_path / "alone", reference=copied)
    assert alone == training
    assert weights(tmp_path / "alone") == weights(tmp_path / "base")


def test_the_reference_may_be_another_adapter(
    base: Checkpoint, adapter: Checkpoint, tmp_path: Path
) -> None:
    given = examples(base.path, 8)
    training = train(lora(), given, base, tmp_path / "into", reference=adapter)
    chosen = [training.reference_logprobs[each.id][0] for each in given]
    assert chosen == pytest.approx(totals(adapter, given), abs=1e-4)


@pytest.mark.slow
def test_an_adapter_that_is_stopped_and_gone_on_with_ends_as_an_undisturbed_one(
    base: Checkpoint, adapter: Checkpoint, tmp_path: Path
) -> None:
    given = examples(base.path, 8)
    for name, start, reference in (
        ("fresh", base, base),
        ("continued", adapter, adapter),
        ("held to the base", adapter, base),
    ):
        options = {"epochs": 4.0, "lora_dropout": 0.1, "micro_batch_size": 2}
        whole = train(lora(**options), given, start, tmp_path / name, reference)
        into = tmp_path / f"{name}, stopped"
        for stop_after in (1, 3):
            asked = iter(range(1, 99))
            call = replace(CALL, stopping=lambda n=stop_after, asked=asked: next(asked) == n)
            with pytest.raises(KeyboardInterrupt):
                train(lora(**options), given, start, into, reference, call)
            assert not (into / "adapter_model.safetensors").exists()
        done: list[int] = []
        call = replace(CALL, progress=lambda step, total, done=done: done.append(step))
        assert train(lora(**options), given, start, into, reference, call) == whole
        assert done[0] == 5
        assert weights(into) == weights(tmp_path / name)


def test_an_adapter_drops_what_it_is_told_to_and_its_base_nothing(tmp_path: Path) -> None:
    start = checkpoint(build(tmp_path / "base", attention_dropout=0.5))
    given = examples(start.path, 4)
    plain, dropping = (
        train(lora(lora_dropout=rate), given, start, tmp_path / str(rate)) for rate in (0.0, 0.5)
    )
    assert plain.steps[0].loss == dropping.steps[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert weights(tmp_path / "0.0") != weights(tmp_path / "0.5")
    # While an adapter drops, it is not what it is when it is scored; that is no alarm.
    goes_on = checkpoint(tmp_path / "0.5", start)
    assert train(lora(), given, goes_on, tmp_path / "on").status == "trained"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_an_adapter_is_trained_in_bfloat16_with_its_activations_computed_twice(
    tmp_path: Path, stored: torch.dtype
) -> None:
    start = checkpoint(build(tmp_path / "base", dtype=stored))
    given = examples(start.path, 6)
    options = {"dtype": "bfloat16", "gradient_checkpointing": True, "micro_batch_size": 2}
    training = train(lora(**options), given, start, tmp_path / "into")
    assert training.steps[0].loss == pytest.approx(math.log(2), abs=0.1)
    assert training.steps[0].metrics["grad_norm"] > 0
    exact = train(lora(micro_batch_size=2), given, start, tmp_path / "exact")
    plain, checkpointed = (run.steps[0].metrics["grad_norm"] for run in (exact, training))
    assert checkpointed == pytest.approx(plain, rel=0.1)
    saved = load_file(tmp_path / "into/adapter_model.safetensors")
    assert {each.dtype for each in saved.values()} == {torch.float32}
    goes_on = adapters.load_model(checkpoint(tmp_path / "into", start), torch.bfloat16)
    for name, parameter in goes_on.named_parameters():
        if parameter.requires_grad:
            key = f"base_model.model.{name}".replace(".default", "")
            assert torch.equal(parameter, saved.pop(key))
    assert not saved


def test_gradient_checkpointing_gives_the_same_adapter(base: Checkpoint, tmp_path: Path) -> None:
    given = examples(base.path, 4)
    for twice in (True, False):
        train(lora(gradient_checkpointing=twice), given, base, tmp_path / str(twice))
    left, right = (
        AutoModelForCausalLM.from_pretrained(tmp_path / str(twice)).state_dict()
        for twice in (True, False)
    )
    assert all(torch.allclose(left[key], right[key], atol=1e-5) for key in left)


def test_demonstrations_train_an_adapter_too(base: Checkpoint, tmp_path: Path) -> None:
    given = examples(base.path, 8, pairs=False)
    trainer = Supervised(
        lora_rank=4, learning_rate=3e-3, batch_size=4, epochs=3.0, device="cpu", dtype="float32"
    )
    training = train(trainer, given, base, tmp_path / "into")
    assert training.steps[-1].loss < training.steps[0].loss
    found = checkpoint(tmp_path / "into", base)
    assert sum(totals(found, given)) > sum(totals(base, given))


def test_only_the_layers_that_are_named_are_adapted(base: Checkpoint, tmp_path: Path) -> None:
    given = examples(base.path, 4)
    train(lora(lora_targets=["q_proj", "v_proj"]), given, base, tmp_path / "two")
    config = json.loads((tmp_path / "two/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert len(weights(tmp_path / "two")) > 0
    with pytest.raises(UserError, match=r"no linear layer .* 'q_prj'; did you mean 'q_proj'"):
        train(lora(lora_targets=["q_prj"]), given, base, tmp_path / "none")
    with pytest.raises(UserError, match="'lm_head'"):
        train(lora(lora_targets=["lm_head"]), given, base, tmp_path / "head")


@pytest.mark.parametrize(
    "options", [{"lora_alpha": 4.0}, {"lora_dropout": 0.1}, {"lora_targets": ["q_proj"]}]
)
def test_how_an_adapter_is_made_is_said_of_none(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="lora_rank, which asks for one, is not set"):
        load("trainer", "preference", options)


def test_the_engine_samples_and_scores_an_adapter_whose_base_was_moved(
    base: Checkpoint, adapter: Checkpoint, tmp_path: Path
) -> None:
    given = examples(base.path, 4)
    sampling = Sampling(max_tokens=8)
    [found] = opened(adapter).sample([question()], sampling=sampling, seeds=[[1, 2]])
    scored = opened(adapter).logprobs([question()] * 2, found)
    assert [each.logprob for each in found] == pytest.approx(
        [each.total for each in scored], abs=1e-4
    )
    moved = Path(shutil.copytree(base.path, tmp_path / "moved"))
    elsewhere = Path(shutil.copytree(adapter.path, tmp_path / "adapter"))
    config = elsewhere / "adapter_config.json"
    told = json.loads(config.read_text()) | {"base_model_name_or_path": "/nowhere/base"}
    config.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"is an adapter of /nowhere/base, where no folder is"):
        totals(checkpoint(elsewhere), given)
    kept = replace(checkpoint(elsewhere), base_path=moved)
    assert totals(kept, given) == totals(adapter, given)


def test_a_merged_adapter_is_a_full_model_that_says_the_same(
    base: Checkpoint, adapter: Checkpoint, tmp_path: Path
) -> None:
    given = examples(base.path, 8)
    into = tmp_path / "merged"
    adapters.merge(adapter, into)
    merged = checkpoint(into)
    assert merged.kind == "full"
    assert {path.name for path in into.iterdir()} == {path.name for path in base.path.iterdir()}
    assert totals(merged, given) == pytest.approx(totals(adapter, given), abs=1e-3)
    assert totals(merged, given) != pytest.approx(totals(base, given), abs=1e-2)
    assert checkpoints.locate(str(into)) == into.resolve()
    assert merged.template_digest == base.template_digest
    chat = [{"role": "user", "content": "Why?"}]
    spoken = pipeline("text-generation", str(into), device="cpu")(chat, max_new_tokens=4)
    assert spoken[0]["generated_text"][-1]["role"] == "assistant"
    with pytest.raises(UserError, match="only an adapter can be merged"):
        adapters.merge(base, tmp_path / "again")


def test_a_merged_adapter_is_stored_as_its_base_is_or_wide(tmp_path: Path) -> None:
    start = checkpoint(build(tmp_path / "base", dtype=torch.bfloat16))
    train(lora(), examples(start.path, 4), start, tmp_path / "adapter")
    adapters.merge(checkpoint(tmp_path / "adapter", start), tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype is torch.bfloat16
    adapters.merge(checkpoint(tmp_path / "adapter", start), tmp_path / "wide", dtype="float32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype is torch.float32


def test_an_adapter_of_another_base_is_refused(adapter: Checkpoint, tmp_path: Path) -> None:
    other = build(tmp_path / "deeper", num_hidden_layers=1)
    with pytest.raises(RuntimeError, match="is not of this base"):
        totals(replace(adapter, base_path=other), examples(other, 1))


def test_without_peft_an_adapter_is_refused_by_the_configuration() -> None:
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from roles import plugins; from store.errors import UserError\n"
        "try: plugins.load('trainer', 'preference', {'lora_rank': 8})\n"
        "except UserError as error: print(error)\n"
        "plugins.load('trainer', 'preference', {})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'ratchet-loop[peft]'" in done.stdout
    assert done.stdout.count("\n") == 1


# Over weights in 4 bits


@pytest.fixture(scope="module")
def narrow(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, Path]:
    """A training over 4 bits, and its adapter."""
    into = tmp_path_factory.mktemp("narrow") / "into"
    return train(lora(load_in_4bit=True), examples(base.path, 8), base, into), into


def test_below_an_adapter_weights_may_have_4_bits(
    base: Checkpoint, narrow: tuple[Training, Path]
) -> None:
    training, into = narrow
    given = examples(base.path, 8)
    assert training.steps[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert training.steps[-1].loss < training.steps[0].loss
    assert checkpoints.intact(base)
    # The base is a little off, and only a little.
    whole = torch.tensor(totals(base, given))
    ours = torch.tensor([training.reference_logprobs[each.id][0] for each in given])
    assert 1e-3 < (whole - ours).abs().max() < 0.1 * whole.abs().mean()
    # The adapter is one like any other, and lies over the base as it is stored.
    left = load_file(into / "adapter_model.safetensors")
    assert {each.dtype for each in left.values()} == {torch.float32}
    prompts = [each.prompt for each in given]

    def margins(found: Checkpoint) -> torch.Tensor:
        policy = opened(found)
        sides = ([each.chosen for each in given], [each.rejected for each in given])
        chosen, rejected = (policy.logprobs(prompts, side) for side in sides)
        return torch.tensor([a.total - b.total for a, b in zip(chosen, rejected, strict=True)])

    assert (margins(checkpoint(into, base)) - margins(base)).mean() > 0.1


def test_a_training_over_4_bits_that_was_killed_ends_as_one_that_was_not(
    base: Checkpoint, narrow: tuple[Training, Path], tmp_path: Path
) -> None:
    training, into = narrow
    given, trainer = examples(base.path, 8), lora(load_in_4bit=True)
    asked = iter(range(1, 99))
    stopped = replace(CALL, stopping=lambda: next(asked) == 2)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, given, base, tmp_path / "into", call=stopped)
    assert train(trainer, given, base, tmp_path / "into") == training
    assert weights(tmp_path / "into") == weights(into)


def test_an_adapter_from_4_bits_is_gone_on_with(
    base: Checkpoint, narrow: tuple[Training, Path], tmp_path: Path
) -> None:
    start = checkpoint(narrow[1], base)
    for reference in (start, base):
        into = tmp_path / reference.path.name
        training = train(lora(load_in_4bit=True), examples(base.path, 8), start, into, reference)
        assert training.status == "trained"
        assert (training.steps[0].loss == pytest.approx(math.log(2))) == (reference is start)


@pytest.mark.parametrize("again", [False, True], ids=["activations kept", "activations twice"])
def test_a_reference_elsewhere_is_scored_over_4_bits_as_well(
    base: Checkpoint, narrow: tuple[Training, Path], tmp_path: Path, again: bool
) -> None:
    copied = checkpoint(Path(shutil.copytree(base.path, tmp_path / "copied")))
    trainer = lora(load_in_4bit=True, gradient_checkpointing=again)
    training = train(trainer, examples(base.path, 8), base, tmp_path / "into", copied)
    for example, (chosen, rejected) in narrow[0].reference_logprobs.items():
        found = training.reference_logprobs[example]
        assert found == pytest.approx((chosen, rejected), abs=1e-3)
    assert training.steps[0].loss == pytest.approx(math.log(2), abs=1e-4)
    assert training.steps[-1].loss == pytest.approx(narrow[0].steps[-1].loss, abs=1e-3)


def test_demonstrations_are_imitated_over_4_bits(base: Checkpoint, tmp_path: Path) -> None:
    given = [replace(each, rejected=None, kind="demonstration") for each in examples(base.path, 8)]
    options = {"lora_rank": 4, "batch_size": 4, "epochs": 3.0, "device": "cpu", "dtype": "float32"}
    trainer = Supervised(**options, learning_rate=3e-3, load_in_4bit=True)
    training = train(trainer, given, base, tmp_path / "into")
    assert training.steps[-1].loss < training.steps[0].loss
    assert sum(totals(checkpoint(tmp_path / "into", base), given)) > sum(totals(base, given))


FAULTS = {
    "adapter_model.safetensors": "the content of .*adapter",
    "chat_template.jinja": "the chat template of .*adapter",
    "tokenizer.json": "the tokenizer of .*adapter",
    "base": "the content of .*model",
}


@pytest.mark.parametrize("changed", FAULTS)
def test_what_was_changed_since_it_was_stored_is_neither_sampled_nor_learned_from(
    changed: str, tmp_path: Path
) -> None:
    base = checkpoint(build(tmp_path / "model"))
    train(lora(), examples(base.path, 4), base, tmp_path / "adapter")
    adapter = checkpoint(tmp_path / "adapter", base)
    config = configuration.read(sets=[f"model.path={base.path}", "engine.device=cpu"])
    roles = casting.load_roles(config)
    seat = Seat(config, lambda role: roles[id(role)], tmp_path, print)
    sampled = seat.policy(adapter).sample([question("abc")], sampling=Sampling(), seeds=[[1]])
    assert len(sampled[0]) == 1
    seat.close_policy()
    file = base.path / "model.safetensors" if changed == "base" else adapter.path / changed
    if file.suffix == ".safetensors":
        weights = load_file(file)
        next(iter(weights.values())).view(-1)[0] += 1.0
        save_file(weights, file, {"format": "pt"})
    elif file.suffix == ".json":
        table = json.loads(file.read_text())
        table["model"]["merges"].pop()
        file.write_text(json.dumps(table))
    else:
        file.write_text(file.read_text() + " ")
    said = rf"{FAULTS[changed]} is not what it was when the checkpoint was stored"
    with pytest.raises(UserError, match=said):
        seat.policy(adapter)
    given = tuple(examples(adapter.path, 4))
    for start, reference in ((adapter, base), (base, adapter)):
        task = Learning("models.policy.trainer", given, start, reference, tmp_path / "into", CALL)
        with pytest.raises(UserError, match=said):
            task.perform(seat)
    assert not (tmp_path / "into").exists()


def test_the_package_asks_for_the_bitsandbytes_that_is_checked_for() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    asked = [each for extra in project["optional-dependencies"].values() for each in extra]
    assert {each for each in asked if each.startswith("bitsandbytes")} == {
        f"bitsandbytes>={adapters.BITSANDBYTES}"
    }


def test_4_bits_are_for_what_lies_below_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="load_in_4bit is for the weights below an adapter"):
        Preference(load_in_4bit=True)
    monkeypatch.setattr(adapters, "BITSANDBYTES", "999")
    with pytest.raises(UserError, match=r"takes bitsandbytes 999 or newer, and that is 0\."):
        lora(load_in_4bit=True)
