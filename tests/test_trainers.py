"""The trainers, on small real models that are trained for real."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from roles.plugins import load
from roles.policy.encoding import prompt_ids
from roles.trainers import saves
from roles.trainers.preference import Preference
from roles.trainers.supervised import Supervised
from runs import loop
from store.errors import UserError
from store.records import Call, Candidate, Checkpoint, Example, Message, Prompt, Training

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = Call(seed=3, round=1, stage="train")


def make_tokenizer(folder: Path) -> None:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    text = ["the answer is one two three four", "what is the sum", "abcabcabc"] * 20
    raw.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def make_checkpoint(folder: Path, seed: int, **config: Any) -> Checkpoint:
    folder.mkdir()
    make_tokenizer(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
            **config,
        )
    )
    model.save_pretrained(folder)
    return Checkpoint(
        model="policy",
        path=folder,
        digest=f"{folder.name}-{seed}",
        tokenizer_digest="t",
        template_digest="c",
        bytes=1,
        id=seed,
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "start", 1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "other", 2)


def spell(tokenizer: Any, text: str) -> tuple[int, ...]:
    """One token a character: ids a model can sample, which are not those of encoding its text."""
    ids = [tokenizer.encode(char, add_special_tokens=False)[0] for char in text]
    return (*ids, tokenizer.eos_token_id)


def make_examples(checkpoint: Checkpoint, count: int, pairs: bool = True) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    examples = []
    for index in range(count):
        text = "abc" * (1 + index % 4) + str(index)
        sides = []
        for side, answer in enumerate((text, text[::-1] + "one" * (index % 3))):
            sides.append(
                Candidate(
                    text=answer,
                    token_ids=spell(tokenizer, answer),
                    id=10 * index + side,
                    asked_id=index,
                    index=side,
                )
            )
        examples.append(
            Example(
                kind="pair" if pairs else "demonstration",
                asked_id=index,
                prompt=Prompt(messages=(Message(role="user", content=f"the sum {index}"),)),
                chosen=sides[0],
                rejected=sides[1] if pairs else None,
                rule="test",
                id=100 + index,
            )
        )
    return examples


def plain_logprobs(checkpoint: Checkpoint, prompt: Prompt, ids: Any, mask: Any = None) -> Any:
    """Each token's log-probability, one answer at a time, by the model's own forward."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
    before = prompt_ids(tokenizer, prompt)
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *ids]])).logits[0].double()
    logps = logits.log_softmax(-1)[torch.arange(len(before) - 1, len(before) - 1 + len(ids)), ids]
    return logps if mask is None else logps[torch.tensor(mask)]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def small(**options: Any) -> Preference:
    given = {"learning_rate": 1e-3, "batch_size": 4, "epochs": 2.0, "device": "cpu", **options}
    return Preference(dtype="float32", **given)


def imitation(**options: Any) -> Supervised:
    given = {"learning_rate": 1e-3, "batch_size": 4, "epochs": 2.0, "device": "cpu", **options}
    return Supervised(dtype="float32", **given)


def train(
    trainer: Any, examples: list[Example], start: Checkpoint, into: Path, **more: Any
) -> Training:
    into.mkdir(exist_ok=True)
    call = more.pop("call", CALL)
    return trainer.train(examples, start, more.pop("reference", start), into, call)


def test_a_configuration_finds_the_trainers_and_their_bounds() -> None:
    assert load("trainer", "preference", {"beta": 0.3}) == Preference(beta=0.3)
    assert load("trainer", "preference", {"loss": ["ipo", "sigmoid"]}).loss == ["ipo", "sigmoid"]
    assert load("trainer", "supervised", {"epochs": 3}).epochs == 3.0
    assert load("trainer", "roles.trainers.kto:Kto", {"beta": 0.2}).desirable_weight == 1.0
    with pytest.raises(UserError, match="learning_rate"):
        load("trainer", "preference", {"learning_rate": 0})
    with pytest.raises(UserError, match="whole micro-batches"):
        load("trainer", "supervised", {"batch_size": 8, "micro_batch_size": 3})


def test_choosing_a_trainer_imports_neither_torch_nor_trl() -> None:
    for made in ("preference import Preference", "supervised import Supervised", "kto import Kto"):
        code = f"import sys\nfrom roles.trainers.{made} as Made\nMade()\nprint(*sys.modules)"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        assert not {b"torch", b"trl", b"transformers"} & set(found.stdout.split())


def test_reference_logprobs_are_those_of_the_sampled_ids(start: Checkpoint, tmp_path: Path) -> None:
    examples = make_examples(start, 6)
    training = train(small(epochs=1.0), examples, start, tmp_path / "into")
    tokenizer = AutoTokenizer.from_pretrained(start.path)
    assert training.status == "trained"
    assert list(training.reference_logprobs) == [example.id for example in examples]
    for example in examples:
        assert example.id is not None
        assert example.rejected is not None
        chosen, rejected = training.reference_logprobs[example.id]
        for found, side in ((chosen, example.chosen), (rejected, example.rejected)):
            plain = plain_logprobs(start, example.prompt, side.token_ids).sum().item()
            assert found == pytest.approx(plain, abs=1e-4)
    again = tokenizer.encode(examples[3].chosen.text, add_special_tokens=False)
    assert len(again) < len(examples[3].chosen.token_ids) - 1, (
        "the test's text does not re-tokenise"
    )


def test_the_loss_of_the_first_step_is_ln_2_and_the_margin_0(
    start: Checkpoint, tmp_path: Path
) -> None:
    training = train(small(), make_examples(start, 4), start, tmp_path / "into")
    first = training.steps[0]
    assert first.loss == pytest.approx(math.log(2), abs=1e-5)
    assert first.metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first.metrics["grad_norm"] > 0
    assert training.steps[-1].loss < first.loss
    assert [step.step for step in training.steps] == [1, 2]
    json.dumps([step.metrics for step in training.steps], allow_nan=False)


def test_the_nll_term_is_the_mean_over_the_steps_chosen_tokens_in_micro_batches_too(
    start: Checkpoint, tmp_path: Path
) -> None:
    examples = make_examples(start, 7)
    # Seven in micro-batches of two: the last is smaller, and answers differ in length.
    options = {"nll_weight": 0.5, "batch_size": 8, "epochs": 3.0}
    whole = train(small(**options), examples, start, tmp_path / "whole")
    parts = train(small(**options, micro_batch_size=2), examples, start, tmp_path / "parts")
    logps = torch.cat(
        [plain_logprobs(start, example.prompt, example.chosen.token_ids) for example in examples]
    )
    expected = math.log(2) - 0.5 * logps.mean().item()
    assert whole.steps[0].loss == pytest.approx(expected, abs=1e-4)
    for one, other in zip(whole.steps, parts.steps, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-4)
        assert one.metrics["grad_norm"] == pytest.approx(other.metrics["grad_norm"], rel=1e-3)


def test_masked_tokens_are_not_trained(start: Checkpoint, tmp_path: Path) -> None:
    [example] = make_examples(start, 1, pairs=False)
    mask = tuple(index % 2 == 0 for index in range(len(example.chosen.token_ids)))
    masked = replace(example, chosen=replace(example.chosen, trained_mask=mask))
    training = train(imitation(), [masked], start, tmp_path / "into")
    plain = plain_logprobs(start, example.prompt, example.chosen.token_ids, mask)
    assert training.steps[0].loss == pytest.approx(-plain.mean().item(), abs=1e-5)


def test_masked_tokens_of_a_pair_are_neither_trained_nor_scored(
    start: Checkpoint, tmp_path: Path
) -> None:
    masked = []
    for pair in make_examples(start, 3):
        mask = tuple(index % 3 != 1 for index in range(len(pair.chosen.token_ids)))
        masked.append(replace(pair, chosen=replace(pair.chosen, trained_mask=mask)))
    found = {
        at: train(small(nll_weight=0.5, micro_batch_size=size), masked, start, tmp_path / at)
        for at, size in (("whole", 4), ("parts", 1))
    }
    logps = [
        plain_logprobs(start, pair.prompt, pair.chosen.token_ids, pair.chosen.trained_mask)
        for pair in masked
    ]
    for training in found.values():
        for pair, each in zip(masked, logps, strict=True):
            scored, _ = training.reference_logprobs[pair.id or 0]
            assert scored == pytest.approx(each.sum().item(), abs=1e-4)
        expected = math.log(2) - 0.5 * torch.cat(logps).mean().item()
        assert training.steps[0].loss == pytest.approx(expected, abs=1e-4)


def test_a_training_in_bfloat16_that_is_gone_on_from_ends_as_an_undisturbed_one(
    start: Checkpoint, tmp_path: Path
) -> None:
    examples = make_examples(start, 6)
    trainer = replace(small(epochs=3.0, micro_batch_size=2), dtype="bfloat16")
    whole = train(trainer, examples, start, tmp_path / "whole")
    into, asked = tmp_path / "into", iter(range(1, 99))
    stopping = replace(CALL, stopping=lambda: next(asked) == 3)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, examples, start, into, call=stopping)
    assert train(trainer, examples, start, into) == whole
    assert weights(into) == weights(tmp_path / "whole")


def test_demonstrations_are_trained_as_sampled_and_by_weight(
    start: Checkpoint, tmp_path: Path
) -> None:
    examples = [
        replace(example, weight=weight)
        for example, weight in zip(
            make_examples(start, 4, pairs=False), (0.0, 1.0, 2.0, 0.5), strict=True
        )
    ]
    training = train(imitation(), examples, start, tmp_path / "into")
    parts = train(imitation(micro_batch_size=1), examples, start, tmp_path / "parts")
    losses = [
        -plain_logprobs(start, example.prompt, example.chosen.token_ids) for example in examples
    ]
    tokens = sum(len(loss) for loss in losses)
    expected = sum(
        example.weight * loss.sum() for example, loss in zip(examples, losses, strict=True)
    )
    assert training.steps[0].loss == pytest.approx((expected / tokens).item(), abs=1e-5)
    assert parts.steps[0].loss == pytest.approx(training.steps[0].loss, abs=1e-5)
    assert training.steps[-1].loss < training.steps[0].loss
    assert training.reference_logprobs == {}


def test_a_pair_of_weight_2_beside_one_of_weight_0_is_the_first_one_alone(
    start: Checkpoint, tmp_path: Path
) -> None:
    one, two = make_examples(start, 2)
    weighted = [replace(one, weight=2.0), replace(two, weight=0.0)]
    # Plain sums of gradients can be compared: AdamW forgets their scale, the norm does not.
    both = train(small(epochs=1.0), weighted, start, tmp_path / "both")
    alone = train(small(epochs=1.0), [one], start, tmp_path / "alone")
    norms = [training.steps[0].metrics["grad_norm"] for training in (both, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("both", "alone")]
    for left, right in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(left, right, atol=1e-4)


@pytest.mark.parametrize("twice", [False, True], ids=["kept", "computed twice"])
@pytest.mark.parametrize(("size", "off"), [(6, 2e-6), (2, 5e-3)])
def test_in_bfloat16_the_first_margin_is_near_0_and_0_where_the_reference_passes_alike(
    start: Checkpoint, tmp_path: Path, twice: bool, size: int, off: float
) -> None:
    options = {"batch_size": 6, "micro_batch_size": size, "gradient_checkpointing": twice}
    trainer = replace(small(**options), dtype="bfloat16")
    training = train(trainer, make_examples(start, 6), start, tmp_path / "into")
    assert training.steps[0].metrics["rewards/margins"] == pytest.approx(0, abs=off)
    assert training.steps[0].loss == pytest.approx(math.log(2), abs=off)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "into").dtype is torch.float32


def test_another_reference_scores_with_its_own_weights(
    start: Checkpoint, other: Checkpoint, tmp_path: Path
) -> None:
    examples = make_examples(start, 4)
    training = train(small(), examples, start, tmp_path / "into", reference=other)
    chosen, _ = training.reference_logprobs[100]
    plain = plain_logprobs(other, examples[0].prompt, examples[0].chosen.token_ids)
    assert chosen == pytest.approx(plain.sum().item(), abs=1e-4)
    assert training.steps[0].loss != pytest.approx(math.log(2), abs=1e-3)


def test_a_model_with_dropout_is_trained_without(tmp_path: Path) -> None:
    start = make_checkpoint(tmp_path / "dropping", 1, attention_dropout=0.5)
    training = train(small(), make_examples(start, 4), start, tmp_path / "into")
    assert training.steps[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert json.loads((tmp_path / "into/config.json").read_text())["attention_dropout"] == 0.5


def test_what_is_left_is_a_checkpoint_and_nothing_else(start: Checkpoint, tmp_path: Path) -> None:
    into = tmp_path / "into"
    train(small(save_every_s=0), make_examples(start, 4), start, into)
    assert {path.name for path in into.iterdir()} == {path.name for path in start.path.iterdir()}
    for path in start.path.iterdir():
        if path.name not in {"model.safetensors", "config.json"}:
            assert path.read_bytes() == (into / path.name).read_bytes()
    assert weights(into) != weights(start.path)
    before, after = (json.loads((at / "config.json").read_text()) for at in (start.path, into))
    assert before == after
    AutoModelForCausalLM.from_pretrained(into)


CHILD = """
import os, signal, sys, threading
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_trainers import CALL, imitation, make_examples, small, train
from store.records import Checkpoint
into = Path({into!r})
def kill():
    while not (into / "saves" / "checkpoint-3").exists():
        pass
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
start = Checkpoint(model="policy", path=Path({start!r}), digest={digest!r}, tokenizer_digest="t",
                   template_digest="c", bytes=1, id=1)
train({make}(save_every_s=0, epochs=4.0), make_examples(start, 6, {pairs}), start, into)
"""


@pytest.mark.parametrize("make", ["small", "imitation"])
def test_a_training_killed_in_mid_save_ends_as_an_undisturbed_one(
    start: Checkpoint, tmp_path: Path, make: str
) -> None:
    pairs = make == "small"
    options = {"epochs": 4.0}
    examples = make_examples(start, 6, pairs)
    whole = train(globals()[make](**options), examples, start, tmp_path / "whole")
    into = tmp_path / "killed"
    code = CHILD.format(
        tests=str(Path(__file__).parent),
        into=str(into),
        start=str(start.path),
        digest=start.digest,
        make=make,
        pairs=pairs,
    )
    child = subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ})
    assert child.returncode == -signal.SIGKILL
    assert list((into / "saves").glob("checkpoint-*"))
    assert not (into / "model.safetensors").exists()
    done: list[int] = []
    call = replace(CALL, progress=lambda step, total: done.append(step))
    resumed = train(globals()[make](**options), examples, start, into, call=call)
    assert done[0] > 2
    assert len(whole.steps) == 8
    assert resumed == whole
    assert weights(into) == weights(tmp_path / "whole")


def test_a_training_that_is_asked_to_stop_saves_and_goes_on(
    start: Checkpoint, tmp_path: Path
) -> None:
    examples = make_examples(start, 6)
    options = {"epochs": 3.0, "micro_batch_size": 2, "schedule": "cosine"}
    whole = train(small(**options), examples, start, tmp_path / "whole")
    into = tmp_path / "into"
    for stop_after in (2, 1, 3, 99):
        asked = iter(range(1, 99))
        call = replace(CALL, stopping=lambda n=stop_after, asked=asked: next(asked) == n)
        if stop_after == 99:
            resumed = train(small(**options), examples, start, into, call=call)
        else:
            with pytest.raises(KeyboardInterrupt):
                train(small(**options), examples, start, into, call=call)
            assert not (into / "model.safetensors").exists()
    assert resumed == whole
    assert weights(into) == weights(tmp_path / "whole")


def test_saves_of_another_training_are_not_gone_on_from(start: Checkpoint, tmp_path: Path) -> None:
    into = tmp_path / "into"
    call = replace(CALL, stopping=lambda: True)
    with pytest.raises(KeyboardInterrupt):
        train(small(), make_examples(start, 6), start, into, call=call)
    resumed = train(small(beta=0.5), make_examples(start, 6), start, into)
    fresh = train(small(beta=0.5), make_examples(start, 6), start, tmp_path / "fresh")
    assert resumed == fresh


def test_a_save_without_its_marker_does_not_count(tmp_path: Path) -> None:
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("w")
    saves.write_json(tmp_path / "checkpoint-2" / saves.MARKER, {})
    assert saves.newest(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-10").exists()


def test_a_loss_that_is_not_finite_ends_as_diverged_without_weights(
    start: Checkpoint, tmp_path: Path
) -> None:
    for make, pairs in ((small, True), (imitation, False)):
        into = tmp_path / make.__name__
        training = train(make(learning_rate=1e30), make_examples(start, 8, pairs), start, into)
        assert training.status == "diverged"
        assert training.reason is not None
        assert training.reason.startswith("step 2: the loss is")
        assert [step.step for step in training.steps] == [1]
        assert len(training.reference_logprobs) == (8 if pairs else 0)
        assert not list(into.iterdir())


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(
    start: Checkpoint, tmp_path: Path
) -> None:
    # The loss is ln 2 and its gradient overflows.
    examples = [replace(example, weight=3e38) for example in make_examples(start, 4)]
    training = train(small(), examples, start, tmp_path / "into")
    assert training.status == "diverged"
    assert training.reason in {f"step 1: the gradient norm is {bad}" for bad in ("inf", "nan")}
    assert training.steps == ()


def test_a_learning_rate_that_only_does_harm_is_not_divergence(
    start: Checkpoint, tmp_path: Path
) -> None:
    training = train(small(learning_rate=0.5), make_examples(start, 8), start, tmp_path / "into")
    assert training.status == "trained"


def test_a_policy_that_is_not_its_reference_is_found_before_the_first_update(
    start: Checkpoint, tmp_path: Path
) -> None:
    examples = make_examples(start, 4)
    into = tmp_path / "into"

    def crash(step: int, total: int) -> None:
        raise OSError("the machine went down")

    with pytest.raises(OSError, match="went down"):
        train(small(), examples, start, into, call=replace(CALL, progress=crash))
    path = into / "saves" / "reference.json"
    known = json.loads(path.read_text())
    known[2][2] -= 0.5
    path.write_text(json.dumps(known))
    with pytest.raises(RuntimeError, match=r"rejected answer of example 102 .* -\d+\.\d+ .* -\d+"):
        train(small(micro_batch_size=1), examples, start, into)


@pytest.mark.parametrize("make", ["small", "imitation"])
def test_texts_whose_positions_turn_on_what_was_read_before_are_refused(
    make: str, tmp_path: Path
) -> None:
    options = globals()[make]()
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    held = [
        make_checkpoint(tmp_path / f"{size}", 1, max_position_embeddings=size, rope_parameters=rope)
        for size in (64, 16)
    ]
    examples = make_examples(held[0], 4, pairs=make == "small")
    assert train(options, examples, held[0], tmp_path / "trained").status == "trained"
    with pytest.raises(UserError) as told:
        train(options, examples, held[1], tmp_path / "refused")
    said = str(told.value)
    assert said.startswith(f"example {102 if make == 'small' else 103} has 2")
    assert f"tokens with its prompt, and the positions of {held[1].path}, whose rope_type" in said
    assert "last for 16: past that they turn on what was read before; leave it out" in said


def test_what_a_trainer_cannot_learn_from_is_refused_by_name(
    start: Checkpoint, tmp_path: Path
) -> None:
    [pair] = make_examples(start, 1)
    with pytest.raises(UserError, match=r"example 100 .* is one of pairs"):
        train(imitation(), [pair], start, tmp_path / "a")
    with pytest.raises(UserError, match="is an adapter"):
        train(small(), [pair], replace(start, kind="adapter"), tmp_path / "b")
    nothing = replace(pair.chosen, trained_mask=(False,) * len(pair.chosen.token_ids))
    with pytest.raises(UserError, match="no token to train on"):
        train(small(), [replace(pair, chosen=nothing)], start, tmp_path / "c")


JOINED = """
import sys
from pathlib import Path
from store.errors import UserError
from store.records import Checkpoint
from test_trainers import make_examples, small, train

folder = Path(sys.argv[1])
start = Checkpoint(
    model="policy", path=folder, digest="s", tokenizer_digest="t", template_digest="c", bytes=1
)
try:
    train(small(), make_examples(start, 2), start, Path(sys.argv[2]))
except UserError as told:
    print(told)
"""


def test_several_processes_do_not_train_together(start: Checkpoint, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    here = Path(__file__).parent
    running = []
    for rank in ("0", "1"):
        joined = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        joined |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        path = os.pathsep.join([str(here), str(here.parent)])
        command = [sys.executable, "-c", JOINED, str(start.path), str(tmp_path / rank)]
        env = {**os.environ, **joined, "PYTHONPATH": path}
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    told = [each.communicate(timeout=120)[0] for each in running]
    for said in told:
        assert "2 processes were started to train together" in said
        assert "start it without torchrun or accelerate" in said


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED"])
def test_a_model_is_not_trained_in_parts(tmp_path: Path, way: str) -> None:
    name = f"ACCELERATE_USE_{way}"
    ended = loop("start", "--runs", tmp_path / "runs", env={name: "true"})
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"loop: {name} is set in the environment, and each process")
    assert ended.stderr.strip().endswith("holds the whole model; start it without")
    assert not (tmp_path / "runs").exists()


# Imitation that is held to a reference


def k2(start: Checkpoint, after: Path, example: Example) -> float:
    """The mean over the answer's tokens of (log p - log p_reference)^2 / 2."""
    tokenizer = AutoTokenizer.from_pretrained(start.path)
    before = prompt_ids(tokenizer, example.prompt)
    ids = list(example.chosen.token_ids)
    now, then = (logps_of(folder, before, ids) for folder in (after, start.path))
    return float(((now - then) ** 2 / 2).mean())


def logps_of(folder: Path, before: list[int], ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *ids]])).logits[0].double()
    rows = torch.arange(len(before) - 1, len(before) - 1 + len(ids))
    return logits.log_softmax(-1)[rows, ids]


def demonstrations(start: Checkpoint, count: int) -> list[Example]:
    return [
        replace(each, kind="demonstration", rejected=None, margin=None)
        for each in make_examples(start, count)
    ]


def test_a_kl_weight_holds_imitation_near_its_reference(start: Checkpoint, tmp_path: Path) -> None:
    examples = demonstrations(start, 8)
    far = train(imitation(epochs=6.0), examples, start, tmp_path / "far")
    near = train(imitation(epochs=6.0, kl_weight=20.0), examples, start, tmp_path / "near")
    assert far.status == near.status == "trained"
    moved = [sum(k2(start, tmp_path / name, each) for each in examples) for name in ("far", "near")]
    assert moved[1] < moved[0] / 2
    # The first loss is that of plain imitation: nothing was left yet.
    assert near.steps[0].loss == pytest.approx(far.steps[0].loss, abs=1e-4)
    assert set(near.reference_logprobs) == {each.id for each in examples}
    assert all(rejected is None for _, rejected in near.reference_logprobs.values())


def test_the_gradient_of_the_kl_term_is_that_of_its_formula(
    start: Checkpoint, tmp_path: Path
) -> None:
    """One step from another checkpoint than the reference, against the formula by autograd."""
    examples = demonstrations(start, 4)
    train(imitation(epochs=4.0), examples, start, tmp_path / "moved")
    moved = replace(start, path=tmp_path / "moved")
    one = {"max_steps": 1, "learning_rate": 1e-2, "max_grad_norm": 0.0, "warmup_ratio": 0.0}
    told = train(
        imitation(kl_weight=3.0, **one), examples, moved, tmp_path / "step", reference=start
    )
    tokenizer = AutoTokenizer.from_pretrained(start.path)
    model = AutoModelForCausalLM.from_pretrained(moved.path, dtype=torch.float32)
    losses, tokens = [], 0
    for each in examples:
        before, ids = prompt_ids(tokenizer, each.prompt), list(each.chosen.token_ids)
        logits = model(torch.tensor([[*before, *ids]])).logits[0]
        rows = torch.arange(len(before) - 1, len(before) - 1 + len(ids))
        logps = logits.log_softmax(-1)[rows, ids]
        reference = logps_of(start.path, before, ids).float()
        losses.append((-logps + 3.0 * (logps - reference) ** 2 / 2).sum())
        tokens += len(ids)
    loss = torch.stack(losses).sum() / tokens
    loss.backward()
    norm = torch.sqrt(sum((each.grad**2).sum() for each in model.parameters()))
    assert told.steps[0].loss == pytest.approx(loss.item(), rel=1e-3)
    assert told.steps[0].metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
