"""Models that people bring: their tokenizers, templates, weights and devices, and a whole round."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import runs
from roles.plugins import load
from roles.policy import devices
from roles.policy.encoding import check_template, prompt_ids
from roles.policy.transformers import TransformersEngine
from roles.trainers.preference import Preference
from small_model import CHATML, TEXT_END, TURN_END, build, checkpoint, examples, question
from store import checkpoints
from store.database import Store
from store.errors import UserError
from store.records import Call, Message, Prompt, Sampling, Training

CALL = Call(seed=3, round=1, stage="train")
BEGUN = "{{- bos_token -}}" + CHATML


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "chatml")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def trained(model: Path, into: Path, call: Call = CALL, **options: Any) -> Training:
    into.mkdir()
    given = {"learning_rate": 1e-3, "batch_size": 4, "device": "cpu", "dtype": "float32", **options}
    start = checkpoint(model)
    return Preference(**given).train(examples(model, 4), start, start, into, call)


# --- tokenizers and templates


def in_its_own_file(model: Path) -> None:
    assert (model / "chat_template.jinja").is_file()


def in_the_tokenizers_settings(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    edit(model / "tokenizer_config.json", chat_template=CHATML)


def named_in_the_settings(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "tools"}]
    edit(model / "tokenizer_config.json", chat_template=named)


def with_others_beside(model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools")


def beginning_with_a_token(model: Path) -> None:
    (model / "chat_template.jinja").write_text(BEGUN)
    edit(model / "tokenizer_config.json", bos_token=TEXT_END)


@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize(
    "kept",
    [
        in_its_own_file,
        in_the_tokenizers_settings,
        named_in_the_settings,
        with_others_beside,
        beginning_with_a_token,
    ],
)
def test_a_trained_model_has_the_template_and_the_ids_that_it_had(
    copied: Path, tmp_path: Path, kept: Any, lora_rank: int | None
) -> None:
    kept(copied)
    into = tmp_path / "into"
    assert trained(copied, into, lora_rank=lora_rank).status == "trained"
    before, after = (AutoTokenizer.from_pretrained(path) for path in (copied, into))
    assert before.chat_template == after.chat_template
    asked = Prompt(
        messages=(Message(role="system", content="Be brief."), *question("naïve 17?").messages)
    )
    for prompt in (question(), asked):
        assert prompt_ids(before, prompt) == prompt_ids(after, prompt)
    assert before.encode("17 trees, naïve") == after.encode("17 trees, naïve")
    measured = [checkpoints.measure(path, "policy") for path in (copied, into)]
    assert measured[0].tokenizer_digest == measured[1].tokenizer_digest
    assert measured[0].template_digest == measured[1].template_digest


def test_a_default_system_prompt_and_a_first_token_are_written_once(copied: Path) -> None:
    beginning_with_a_token(copied)
    tokenizer = AutoTokenizer.from_pretrained(copied)
    text = tokenizer.decode(prompt_ids(tokenizer, question("Why?")))
    assert text == (
        f"{TEXT_END}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_answer_ends_at_each_token_that_the_generation_settings_name(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token is None
    policy = TransformersEngine(device="cpu").open(checkpoint(folder))
    [found] = policy.sample([question()], sampling=Sampling(max_tokens=2), seeds=[range(2000)])
    last = {each.token_ids[-1] for each in found if each.finish_reason == "stop"}
    assert last == set(tokenizer.convert_tokens_to_ids([TEXT_END, TURN_END]))
    assert policy.write("42").token_ids[-1] == tokenizer.eos_token_id


def test_a_template_is_checked_before_a_run(copied: Path) -> None:
    check_template(copied)
    template = copied / "chat_template.jinja"
    template.write_text("{{ raise_exception('no questions, please') }}")
    with pytest.raises(UserError, match=r"does not take a chat of the roles user: no questions"):
        check_template(copied)
    template.write_text("{% if false %}{% endif %}")
    with pytest.raises(UserError, match="makes no token of a question"):
        check_template(copied)
    template.write_text("Hello.")
    with pytest.raises(UserError, match="writes the same of every question"):
        check_template(copied)
    template.unlink()
    with pytest.raises(UserError, match=r"no chat template.*chat_template\.jinja"):
        check_template(copied)
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer in .* cannot be loaded"):
        check_template(copied)


def test_a_base_model_is_given_a_template_and_learns(copied: Path, tmp_path: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    (tmp_path / "chat.jinja").write_text(CHATML)
    checkpoints.with_template(copied, tmp_path / "chat.jinja", tmp_path / "with")
    check_template(tmp_path / "with")
    into = tmp_path / "into"
    assert trained(tmp_path / "with", into).status == "trained"
    assert not any(path.is_symlink() for path in into.iterdir())
    check_template(into)
    assert AutoModelForCausalLM.from_pretrained(copied).num_parameters() > 0


# --- weights


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_weights_tied_or_not_are_sampled_and_trained(tmp_path: Path, tied: bool) -> None:
    whole = build(tmp_path / "whole", tie_word_embeddings=tied)
    shards = Path(shutil.copytree(whole, tmp_path / "shards"))
    (shards / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(shards, max_shard_size="40KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert checkpoints.locate(str(shards)) == shards.resolve()
    assert trained(whole, tmp_path / "a") == trained(shards, tmp_path / "b")
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert ("lm_head.weight" in left) == (not tied)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert not (tmp_path / "b" / checkpoints.INDEX).exists()


def test_weights_that_came_in_bfloat16_are_kept_in_float32_unless_asked_otherwise(
    tmp_path: Path,
) -> None:
    start = build(tmp_path / "narrow", dtype=torch.bfloat16)
    found = {}
    for kept in ("float32", "start"):
        assert trained(start, tmp_path / kept, save_dtype=kept).status == "trained"
        found[kept] = load_file(tmp_path / kept / "model.safetensors")
        written = json.loads((tmp_path / kept / "config.json").read_text())["dtype"]
        assert {str(each.dtype) for each in found[kept].values()} == {f"torch.{written}"}
    assert written == "bfloat16"
    for key, wide in found["float32"].items():
        assert wide.dtype is torch.float32
        assert torch.equal(wide.to(torch.bfloat16), found["start"][key])


@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("settings", [{"do_sample": False, "temperature": 0.6, "top_p": 0.9}, None])
def test_generation_settings_leave_as_they_came_those_that_transformers_refuses_too(
    copied: Path, tmp_path: Path, settings: dict[str, Any] | None, lora_rank: int | None
) -> None:
    kept = copied / "generation_config.json"
    kept.unlink() if settings is None else kept.write_text(json.dumps(settings))
    into = tmp_path / "into"
    assert trained(copied, into, save_every_s=0.0, lora_rank=lora_rank).status == "trained"
    assert (into / kept.name).is_file() == (settings is not None)
    if settings is not None:
        assert (into / kept.name).read_bytes() == kept.read_bytes()


# --- how it is trained


def test_a_learning_rate_may_be_one_a_round(folder: Path, tmp_path: Path) -> None:
    rates = [3e-3, 2e-3, 1e-3]
    for number, expected in ((0, 3e-3), (1, 3e-3), (2, 2e-3), (9, 1e-3)):
        training = trained(
            folder,
            tmp_path / str(number),
            replace(CALL, round=number),
            learning_rate=rates,
            schedule="constant",
            warmup_ratio=0.0,
        )
        assert training.steps[0].metrics["learning_rate"] == pytest.approx(expected)


@pytest.mark.parametrize("rate", [0, -1.0, [], [1e-3, 0.0], True, "fast"])
def test_each_learning_rate_has_bounds(rate: Any) -> None:
    with pytest.raises(UserError, match=r"option 'learning_rate': .*a number above 0, or a list"):
        load("trainer", "preference", {"learning_rate": rate})
    for right in (1e-3, 1, [1e-3], [1e-3, 1e-4]):
        assert load("trainer", "supervised", {"learning_rate": right}).learning_rate == right


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_by_engine_and_trainer(
    folder: Path, tmp_path: Path, name: Any
) -> None:
    if devices.find("auto").type == name:
        pytest.skip(f"this machine has {name}")
    with pytest.raises(UserError, match=rf"no device '{name}' on this machine; there are: .*cpu"):
        TransformersEngine(device=name).open(checkpoint(folder))
    with pytest.raises(UserError, match=rf"no device '{name}' on this machine"):
        trained(folder, tmp_path / "into", device=name)


# --- a whole round

JUDGE = '''
from judges import PointwiseJudge


class Brief(PointwiseJudge):
    """Shorter answers are better."""

    def score(self, prompt, completion, policy, call):
        return 1 / (1 + len(completion.text))
'''
CONFIG = """
rounds = 2
prompts = 8
batch_prompts = 8
[model]
path = "chatml"
[engine]
use = "transformers"
device = "cpu"
threads = 1
[proposer]
use = "reasoning_gym"
tasks = [{ name = "spell_backward", min_word_len = 3, max_word_len = 4 }]
[generator]
use = "sampler"
n = 4
max_tokens = 6
[judge]
use = "brief.py:Brief"
[filter]
use = "best_worst"
truncated = true
[trainer]
use = "preference"
learning_rate = [1e-3, 5e-4]
batch_size = 4
device = "cpu"
dtype = "float32"
[evaluate]
judge = "brief.py:Brief"
gate_prompts = 8
test_prompts = 8
samples = 2
max_tokens = 6
[gate]
undecided = "keep"
[checkpoints]
keep_last = 1
"""


def run_rounds(tmp_path: Path, more: tuple[str, ...] = ()) -> Store:
    build(tmp_path / "chatml")
    (tmp_path / "brief.py").write_text(JUDGE)
    (tmp_path / "loop.toml").write_text(CONFIG)
    root, outcome = runs.start(tmp_path / "loop.toml", tmp_path / "runs", more)
    assert outcome.code in (0, 3), outcome.reason
    return Store(root / "loop.db")


def test_a_round_with_a_model_from_a_folder(tmp_path: Path) -> None:
    store = run_rounds(tmp_path)
    base, *made = store.checkpoints("policy")
    assert base.path == (tmp_path / "chatml").resolve()
    assert checkpoints.intact(base)
    assert made
    assert {each.kind for each in made} == {"full"}
    learnt = store.query("SELECT count(*) AS examples FROM trained_on")[0]["examples"]
    assert learnt > 0
    kept = made[-1].path
    before, after = (AutoTokenizer.from_pretrained(path) for path in (base.path, kept))
    assert before.chat_template == after.chat_template == CHATML
    assert prompt_ids(before, question()) == prompt_ids(after, question())
    AutoModelForCausalLM.from_pretrained(kept)
    store.close()


def test_a_round_with_an_adapter_goes_on_with_it_and_keeps_its_base(tmp_path: Path) -> None:
    store = run_rounds(tmp_path, ("trainer.lora_rank=4",))
    base, *made = store.checkpoints("policy")
    assert made
    assert checkpoints.intact(base)
    for each in made:
        assert (each.kind, each.base_id, each.base_path) == ("adapter", base.id, base.path)
    kept = [each for each in made if each.status != "pruned"]
    assert kept
    for each in kept:
        assert checkpoints.intact(each)
        model = AutoModelForCausalLM.from_pretrained(each.path)
        assert model.peft_config["default"].r == 4
    policy = TransformersEngine(device="cpu").open(kept[-1])
    [[answer]] = policy.sample([question()], sampling=Sampling(max_tokens=4), seeds=[[1]])
    assert answer.token_ids
    store.close()


def test_each_round_may_begin_with_a_fresh_adapter_on_the_merged_one(tmp_path: Path) -> None:
    store = run_rounds(tmp_path, ("trainer.lora_rank=4", "model.fresh_adapter=true"))
    base, *made = store.checkpoints("policy")
    adapters = [each for each in made if each.kind == "adapter"]
    [merged] = [each for each in made if each.kind == "full"]
    assert [each.base_id for each in adapters] == [base.id, merged.id]
    AutoModelForCausalLM.from_pretrained(adapters[-1].path)
    store.close()


SELF_INSTRUCT = """
[proposer]
use = "self_instruct"
path = "seeds.jsonl"
prompt = "self_instruct_brief"
share = 0.5
seeds = 12
shots = 1
own = 1
similarity = 1.0
temperature = 0.7
max_tokens = 10
min_words = 1
attempts = 60
[evaluate.proposer]
use = "dataset"
path = "questions.jsonl"
"""


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="full", marks=pytest.mark.slow),
        pytest.param(("trainer.lora_rank=4",), id="lora"),
    ],
)
def test_from_a_folder_through_self_instructed_rounds_to_a_folder_that_answers(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    """What a user types: start, sample, export; and plain transformers at the end."""
    build(tmp_path / "chatml")
    (tmp_path / "brief.py").write_text(JUDGE)
    own = CONFIG.split("[proposer]")[0] + SELF_INSTRUCT
    own += "[generator]" + CONFIG.split("[generator]")[1]
    (tmp_path / "loop.toml").write_text(own)
    for name, word in (("seeds", "tree"), ("questions", "river")):
        rows = [{"prompt": f"Spell the {word} number {n} backward"} for n in range(40)]
        lines = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines + "\n")
    sets = [part for each in ("gate.patience=0", *more) for part in ("--set", each)]
    done = runs.loop("start", "--config", "loop.toml", *sets, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [root] = (tmp_path / "runs").iterdir()
    store = Store(root / "loop.db")
    proposed = store.query("SELECT messages FROM prompt WHERE origin = 'proposed'")
    trained_on = store.query("SELECT count(*) AS n FROM trained_on")[0]["n"]
    counts = [each.counts["train:main"] for each in store.rounds()[1:]]
    kinds = {each.kind for each in store.checkpoints("policy")[1:]}
    store.close()
    assert proposed
    assert trained_on
    assert all(each["proposed_tokens"] > 0 for each in counts)
    assert kinds == ({"adapter"} if more else {"full"})
    verified = runs.loop("verify", root)
    assert verified.returncode == 0, verified.stdout
    sampled = runs.loop("sample", root, "Spell tree backward", "--max-tokens", "6")
    assert sampled.returncode == 0, sampled.stderr
    exported = runs.loop("export", root, tmp_path / "mine")
    assert exported.returncode == 0, exported.stderr
    speak = pipeline("text-generation", str(tmp_path / "mine"), device="cpu")
    chat = [{"role": "user", "content": "Spell tree backward"}]
    [answer] = speak(chat, max_new_tokens=4, do_sample=False)
    assert answer["generated_text"][-1]["role"] == "assistant"
