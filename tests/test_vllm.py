"""The real vLLM, in process and as a server, on the embedded model: `make test-vllm`.

Its build for CPUs has an environment of its own; where there is none these tests are left out.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

import small_model
from roles.policy.transformers import TransformersEngine
from roles.policy.vllm import VllmEngine
from roles.policy.vllm_server import Started
from small_model import checkpoint, examples, question
from store.errors import UserError
from store.records import Checkpoint, Completion, Sampling
from test_adapters import lora, train

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
ENGINE: dict[str, Any] = {"dtype": "float32", "cache_gib": 0.25, "extra": {"enforce_eager": True}}
PROMPTS = [question(f"What is the sum of {n} and {n + 8}?") for n in range(6)]
SAMPLING = Sampling(temperature=1.0, max_tokens=12)
GREEDY = Sampling(temperature=0.0, max_tokens=12)
SHAPE = {"hidden_size": 128, "intermediate_size": 256}  # heads of 32, which vLLM has kernels for


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Two of one shape, and two adapters of the first."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        name: checkpoint(small_model.build(folder / name, seed, **SHAPE))
        for seed, name in enumerate(("first", "second"))
    }
    for name, rate in (("adapter", 1e-3), ("other", 3e-2)):
        trainer = lora(learning_rate=rate)
        train(trainer, examples(made["first"].path, 8), made["first"], folder / name)
        made[name] = checkpoint(folder / name, made["first"])
    return made


@pytest.fixture(scope="module", params=["in process", "served"])
def engine(request: pytest.FixtureRequest) -> Iterator[VllmEngine]:
    found = VllmEngine(**ENGINE, serve=request.param == "served")
    yield found
    found.rest()


def ours(model: Checkpoint) -> Any:
    return TransformersEngine(device="cpu").open(model)


def greedy(policy: Any) -> list[tuple[int, ...]]:
    seeds = [[0]] * len(PROMPTS)
    return [one[0].token_ids for one in policy.sample(PROMPTS, sampling=GREEDY, seeds=seeds)]


def sampled(policy: Any, sampling: Sampling = SAMPLING, prompts: Any = PROMPTS) -> Any:
    seeds = [[100 * n + m for m in range(4)] for n, _ in enumerate(prompts)]
    return policy.sample(prompts, sampling=sampling, seeds=seeds)


def flat(groups: list[list[Completion]]) -> list[Completion]:
    return [one for group in groups for one in group]


@pytest.mark.parametrize("name", ["first", "second", "adapter"])
def test_it_computes_what_transformers_does(
    name: str, engine: VllmEngine, models: dict[str, Checkpoint]
) -> None:
    policy, other = engine.open(models[name]), ours(models[name])
    assert greedy(policy) == greedy(other)
    drawn = sampled(policy)
    assert [len(group) for group in drawn] == [4] * len(PROMPTS)
    asked = [prompt for prompt in PROMPTS for _ in range(4)]
    if name == "adapter":
        with pytest.raises(UserError, match="scores no texts with an adapter"):
            policy.logprobs(asked, flat(drawn))
    for way in (other,) if name == "adapter" else (policy, other):
        scored = way.logprobs(asked, flat(drawn))
        for one, found in zip(flat(drawn), scored, strict=True):
            assert len(found.logprobs) == len(one.token_ids)
            assert one.logprob == pytest.approx(sum(found.logprobs), abs=2e-3)
    policy.close()


def test_equal_seeds_give_equal_answers_in_whatever_company(
    engine: VllmEngine, models: dict[str, Checkpoint]
) -> None:
    policy = engine.open(models["first"])
    together = sampled(policy)
    assert len({one.token_ids for one in flat(together)}) > len(PROMPTS)
    assert sampled(policy) == together
    alone = policy.sample(PROMPTS[2:3], sampling=SAMPLING, seeds=[[201, 203]])
    assert [one.text for one in alone[0]] == [together[2][1].text, together[2][3].text]


def test_more_prompts_than_pass_at_once_change_no_answer(
    engine: VllmEngine, models: dict[str, Checkpoint]
) -> None:
    policy = engine.open(models["first"])
    many = [question(f"What is the sum of {n} and {n + 8}?") for n in range(300)]
    drawn = sampled(policy, prompts=many)
    assert [len(group) for group in drawn] == [4] * len(many)
    asked = sum(4 * len(policy.prompt_ids(each)) for each in many)
    assert asked > 8192  # more than vLLM reads in one step
    few = sampled(policy)
    assert [one.text for one in flat(drawn[: len(few)])] == [one.text for one in flat(few)]


def test_answers_end_as_they_are_to(engine: VllmEngine, models: dict[str, Checkpoint]) -> None:
    policy = engine.open(models["first"])
    plain = flat(sampled(policy, replace(SAMPLING, max_tokens=200)))
    stop = next(one.text[2:4] for one in plain if len(one.text) > 8)
    stopped = flat(sampled(policy, replace(SAMPLING, max_tokens=200, stop=(stop,))))
    reasons = {one.finish_reason for one in stopped}
    assert "stop_string" in reasons
    for before, after in zip(plain, stopped, strict=True):
        assert stop not in after.text
        assert before.text.partition(stop)[0] == after.text
        ended = before.finish_reason if stop not in before.text else "stop_string"
        assert after.finish_reason == ended
    for one in plain:
        last = one.token_ids[-1]
        assert (one.finish_reason == "stop") == (last in policy._end_ids)


def test_what_is_too_long_gets_no_answer(engine: VllmEngine, models: dict[str, Checkpoint]) -> None:
    policy = engine.open(models["first"])
    long = question("sum " * 400)
    room = policy.room(PROMPTS[0])
    assert policy.room(long) < 1
    (few, none) = sampled(policy, replace(SAMPLING, max_tokens=999), [PROMPTS[0], long])
    assert len(few) == 4
    assert none == []
    assert max(len(one.token_ids) for one in few) <= room
    whole = [one for one in few if one.finish_reason == "length"]
    assert all(len(one.token_ids) == room for one in whole)
    policy.logprobs([PROMPTS[0]] * 4, few)


# Planted faults: each is found before a token is drawn.


def copied(model: Checkpoint, into: Path) -> Checkpoint:
    shutil.copytree(model.path, into)
    return replace(checkpoint(into), path=into)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model.safetensors", "the content of"),
        ("chat_template.jinja", "the chat template of"),
        ("tokenizer.json", "the tokenizer of"),
    ],
)
def test_a_folder_that_was_changed_is_refused(
    file: str, said: str, engine: VllmEngine, models: dict[str, Checkpoint], tmp_path: Path
) -> None:
    model = copied(models["first"], tmp_path / "model")
    changed = model.path / file
    if file == "model.safetensors":
        weights = load_file(changed)
        weights["model.norm.weight"][0] += 1.0
        save_file(weights, changed, {"format": "pt"})
    elif file == "chat_template.jinja":
        changed.write_text(changed.read_text() + " ")
    else:
        table = json.loads(changed.read_text())
        table["model"]["merges"].pop()
        changed.write_text(json.dumps(table))
    with pytest.raises(UserError, match=said):
        greedy(engine.open(model))


def test_an_engine_that_kept_some_of_its_old_weights_stops_the_run(
    engine: VllmEngine, models: dict[str, Checkpoint]
) -> None:
    """What vLLM reads in place on a CPU leaves the head's packed copy of the weights as it was."""
    greedy(engine.open(models["first"]))
    engine._reloads = True
    with pytest.raises(UserError, match=r"computes with other weights than those in .*second"):
        greedy(engine.open(models["second"]))
    assert engine._running is None
    assert greedy(engine.open(models["second"])) == greedy(ours(models["second"]))


def test_an_engine_that_kept_all_of_its_old_weights_stops_the_run(
    engine: VllmEngine, models: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy(engine.open(models["first"]))
    engine._reloads = True
    monkeypatch.setattr(type(engine._running), "reload", lambda *_: None)
    with pytest.raises(UserError, match=r"computes with other weights than those in .*second"):
        greedy(engine.open(models["second"]))


@pytest.mark.parametrize("wrong", ["template", "tokenizer"])
def test_an_engine_with_another_tokenizer_or_template_stops_the_run(
    wrong: str, engine: VllmEngine, models: dict[str, Checkpoint], tmp_path: Path
) -> None:
    engine.rest()
    other = copied(models["first"], tmp_path / "other").path
    if wrong == "template":
        file = other / "chat_template.jinja"
        file.write_text(file.read_text().replace("helpful", "other"))
    else:
        file = other / "tokenizer.json"
        table = json.loads(file.read_text())
        del table["model"]["merges"][::2]
        file.write_text(json.dumps(table))
    started_with = {**ENGINE, "extra": {**ENGINE["extra"], "tokenizer": str(other)}}
    engine = VllmEngine(**started_with, serve=engine.serve)
    with pytest.raises(UserError, match="does not write a chat as"):
        greedy(engine.open(models["first"]))
    assert engine._running is None


def computing() -> list[psutil.Process]:
    """vLLM's processes that hold a model."""
    found = psutil.Process().children(recursive=True)
    return [each for each in found if "EngineCore" in " ".join([each.name(), *each.cmdline()])]


def test_what_rests_has_given_its_memory_back_and_what_died_is_begun_anew(
    engine: VllmEngine, models: dict[str, Checkpoint]
) -> None:
    engine.rest()
    policy = engine.open(models["first"])
    expected = sampled(policy)
    there = computing()
    assert there
    for each in there:
        each.kill()
    with pytest.warns(UserWarning, match="begun anew"):
        assert sampled(policy) == expected
    begun = psutil.Process().children(recursive=True)
    engine.rest()
    _, left = psutil.wait_procs([*there, *begun], timeout=30)
    assert [each for each in left if "resource_tracker" not in " ".join(each.cmdline())] == []


def test_one_adapter_after_another_is_read_by_the_vllm_that_runs(
    engine: VllmEngine, models: dict[str, Checkpoint]
) -> None:
    expected = {name: greedy(ours(models[name])) for name in ("adapter", "other")}
    assert expected["adapter"] != expected["other"]
    assert greedy(engine.open(models["adapter"])) == expected["adapter"]
    there = computing()
    for name in ("other", "adapter", "other"):
        assert greedy(engine.open(models[name])) == expected[name]
    assert computing() == there


def test_a_base_that_was_changed_under_its_adapter_is_refused(
    engine: VllmEngine, models: dict[str, Checkpoint], tmp_path: Path
) -> None:
    base = copied(models["first"], tmp_path / "base")
    adapter = replace(models["adapter"], base_path=base.path, base_digest=base.digest)
    assert greedy(engine.open(adapter)) == greedy(ours(adapter))
    engine.rest()
    shutil.copy(models["second"].path / "model.safetensors", base.path)
    with pytest.raises(UserError, match=r"the content of .*base is not what it was"):
        greedy(engine.open(adapter))


def test_what_prompts_begin_with_alike_is_read_once(models: dict[str, Checkpoint]) -> None:
    """As a judge's instructions are. On a CPU vLLM shares whole blocks of 128 tokens."""
    from vllm import SamplingParams

    engine = VllmEngine(**ENGINE)
    policy = engine.open(models["first"])
    begin = "Say which answer is better, and why. " * 7
    asked = [question(f"{begin} What is {n} and {n}?") for n in range(4)]
    ids = [policy.prompt_ids(each) for each in asked]
    shared = next(n for n, both in enumerate(zip(*ids, strict=False)) if len(set(both)) > 1)
    assert shared > 128
    policy.sample(asked[:1], sampling=GREEDY, seeds=[[0]])
    found = engine._running._llm.generate(  # type: ignore[union-attr]
        [{"prompt_token_ids": list(each)} for each in ids[1:]],
        SamplingParams(max_tokens=1),
        use_tqdm=False,
    )
    engine.rest()
    assert [each.num_cached_tokens for each in found] == [shared // 128 * 128] * 3


@pytest.fixture
def somewhere(models: dict[str, Checkpoint]) -> Iterator[Callable[[str], str]]:
    """Starts a server of somebody else's, with a model, in place of the one before. Its URL."""
    up: list[Started] = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(name: str) -> str:
        for each in up:
            each.close()
        arguments = VllmEngine(**ENGINE, serve=True).arguments(models[name], models[name].path)
        up[:] = [Started(arguments | {"port": port}, concurrency=8, timeout_s=300.0)]
        return f"http://127.0.0.1:{port}/v1"

    yield start
    for each in up:
        each.close()


def test_a_server_that_runs_already_is_asked_while_it_has_the_weights(
    somewhere: Callable[[str], str], models: dict[str, Checkpoint]
) -> None:
    engine = VllmEngine(url=somewhere("first"), timeout_s=120.0)
    policy = engine.open(models["first"])
    expected = greedy(ours(models["first"]))
    assert greedy(policy) == expected
    engine.end()
    assert greedy(policy) == expected
    with pytest.raises(UserError, match=r"has other weights .* on a CPU they cannot be replaced"):
        greedy(engine.open(models["second"]))
    assert greedy(policy) == expected
    # Started anew, by whoever runs it, with what is another model under the same address.
    somewhere("second")
    with (
        pytest.warns(UserWarning, match="was started anew since its weights were proven"),
        pytest.raises(UserError, match=r"has other weights .* on a CPU they cannot be replaced"),
    ):
        greedy(policy)
    somewhere("first")
    assert greedy(policy) == expected
    engine.end()


DIES = """
import sys
from pathlib import Path

import small_model
import test_vllm
from roles.policy.vllm import VllmEngine

if __name__ == "__main__":
    engine = VllmEngine(**test_vllm.ENGINE, serve=sys.argv[2] == "served")
    model = small_model.checkpoint(Path(sys.argv[1]))
    test_vllm.greedy(engine.open(model))
    print("computed", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["in process", "served"])
def test_it_ends_with_a_process_that_is_killed(
    how: str, models: dict[str, Checkpoint], tmp_path: Path
) -> None:
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    process = subprocess.Popen(
        [sys.executable, str(script), str(models["first"].path), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    while (said := process.stdout.readline()) != "computed\n":
        assert said, "it ended"
    begun = psutil.Process(process.pid).children(recursive=True)
    assert any("EngineCore" in " ".join([each.name(), *each.cmdline()]) for each in begun)
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(begun, timeout=60)
    assert left == []
