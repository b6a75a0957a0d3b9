"""Real tiny models, sampled and scored against plain forward passes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from kernels.sampling import uniforms
from roles import plugins
from roles.policy.embedded import build
from roles.policy.transformers import TransformersEngine, TransformersPolicy
from roles.protocols import Engine, Policy
from store.errors import UserError
from store.records import Checkpoint, Completion, Message, Prompt, Sampling

QUESTIONS = (
    "Why?",
    "State the final answer to the following arithmetic problem: 4 + 3 =",
    "What is 12 * 3?",
    "Sort these numbers in ascending order: 51.6, -91.9, -2.8, 93.1, 7, 12, 0.5",
    "Find the Greatest Common Divisor (GCD) of these numbers: 777, 21",
    "Is 2020 a leap year? Answer with Yes or No.",
)


def ask(text: str, *, begun: str | None = None) -> Prompt:
    messages = [Message(role="user", content=text)]
    if begun is not None:
        messages.append(Message(role="assistant", content=begun))
    return Prompt(messages=tuple(messages))


def checkpoint(path: Path) -> Checkpoint:
    return Checkpoint(
        model="main", path=path, digest="d", tokenizer_digest="t", template_digest="c", bytes=1
    )


def opened(path: Path, **options: Any) -> TransformersPolicy:
    return TransformersEngine(device="cpu", **options).open(checkpoint(path))


def edit(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | values))


def one(policy: Policy, prompt: Prompt, seed: int = 0, **sampling: Any) -> Completion:
    return policy.sample([prompt], sampling=Sampling(**sampling), seeds=[[seed]])[0][0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embedded")
    build(path, seed=0)
    return path


@pytest.fixture(scope="module")
def policy(folder: Path) -> TransformersPolicy:
    return opened(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def next_logits(policy: TransformersPolicy, model: Any) -> Callable[[Prompt], np.ndarray]:
    def logits(prompt: Prompt) -> np.ndarray:
        with torch.no_grad():
            ids = torch.tensor([policy.prompt_ids(prompt)])
            return model(ids).logits[0, -1].double().numpy()

    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def draws(folder: Path, prompt: Prompt, n: int, **sampling: Any) -> Counter[int]:
    """How often each token came first in n completions of one token."""
    policy = opened(folder, batch_size=4096)
    settings = Sampling(max_tokens=1, **sampling)
    group = policy.sample([prompt], sampling=settings, seeds=[range(n)])[0]
    return Counter(completion.token_ids[0] for completion in group)


def chi_square(seen: Counter[int], expected: np.ndarray) -> tuple[float, int]:
    n = sum(seen.values())
    kept = [token for token, share in enumerate(expected) if share > 0]
    total = sum((seen[token] - n * expected[token]) ** 2 / (n * expected[token]) for token in kept)
    return float(total), len(kept) - 1


# --- which tokens are drawn


def test_equal_seeds_give_equal_tokens_whatever_the_batch_and_the_order(folder: Path) -> None:
    prompts = [ask(text) for text in QUESTIONS]
    seeds = [[10 * n, 10 * n + 1, 10 * n + 2] for n in range(len(prompts))]
    sampling = Sampling(max_tokens=24, temperature=0.8)
    together = opened(folder).sample(prompts, sampling=sampling, seeds=seeds)
    by_fives = opened(folder, batch_size=5).sample(prompts, sampling=sampling, seeds=seeds)
    backward = opened(folder, batch_size=7).sample(
        prompts[::-1], sampling=sampling, seeds=[its[::-1] for its in seeds[::-1]]
    )
    alone = [
        [one(opened(folder), prompt, seed, max_tokens=24, temperature=0.8) for seed in its]
        for prompt, its in zip(prompts[:2], seeds[:2], strict=True)
    ]

    def ids(groups: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
        return [[completion.token_ids for completion in group] for group in groups]

    assert ids(by_fives) == ids(together)
    assert ids([group[::-1] for group in backward[::-1]]) == ids(together)
    assert ids(alone) == ids(together[:2])
    assert len({completion.token_ids for group in together for completion in group}) == 18


def test_the_same_call_gives_the_same_completions_to_the_last_bit(folder: Path) -> None:
    prompts = [ask(text) for text in QUESTIONS]
    seeds = [[n, n + 100] for n in range(len(prompts))]
    first, second = (
        opened(folder, batch_size=5).sample(prompts, sampling=Sampling(max_tokens=8), seeds=seeds)
        for _ in range(2)
    )
    assert first == second


def test_a_judge_may_ask_from_several_threads(policy: TransformersPolicy) -> None:
    prompts = [ask(f"Spell {word} backward") for word in ("cat", "bird")]
    sampling = Sampling(temperature=1.0, max_tokens=40)

    def asked(place: int) -> tuple[Any, Any]:
        prompt = prompts[place % 2]
        [drawn] = policy.sample([prompt], sampling=sampling, seeds=[range(place, place + 5)])
        return drawn, policy.logprobs([prompt] * 5, drawn)

    alone = [asked(place) for place in range(8)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(asked, range(8))) == alone


def test_a_prefix_of_the_tokens_does_not_hang_on_max_tokens(policy: TransformersPolicy) -> None:
    short = one(policy, ask("Why?"), 3, max_tokens=5)
    assert one(policy, ask("Why?"), 3, max_tokens=12).token_ids[:5] == short.token_ids


def test_noise_is_uniform_and_unrelated_between_positions_and_neighbouring_seeds() -> None:
    noise = uniforms(range(2000), 50)
    assert noise.min() >= 0
    assert noise.max() < 1
    counts = np.histogram(noise, bins=100, range=(0, 1))[0]
    assert abs(((counts - 1000) ** 2 / 1000).sum() - 99) < 5 * np.sqrt(2 * 99)
    for left, right in ((noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1])):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 5 / np.sqrt(left.size)
    assert (uniforms([7, 2**63 - 1], 9)[:, :4] == uniforms([7, 2**63 - 1], 4)).all()


def test_a_rows_tokens_are_drawn_with_fresh_noise_at_every_position(folder: Path) -> None:
    group = opened(folder, batch_size=1024).sample(
        [ask("Why?")], sampling=Sampling(max_tokens=2), seeds=[range(1000)]
    )[0]
    # A random model likes to repeat a token, which would be a correlation of its own.
    pairs = [c.token_ids for c in group if len(c.token_ids) == 2 and len(set(c.token_ids)) == 2]
    first, second = np.array(pairs).T
    assert len(pairs) > 800
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2


def test_temperature_zero_is_the_models_own_greedy_generation(
    policy: TransformersPolicy, model: Any
) -> None:
    prompts = [ask(text) for text in QUESTIONS]
    sampling = Sampling(temperature=0, max_tokens=16)
    groups = policy.sample(prompts, sampling=sampling, seeds=[[1]] * len(prompts))
    for prompt, group in zip(prompts, groups, strict=True):
        ids = torch.tensor([policy.prompt_ids(prompt)])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16
        )
        assert list(group[0].token_ids) == expected[0, ids.shape[1] :].tolist()


def test_draws_follow_the_models_softmax(
    folder: Path, next_logits: Callable[[Prompt], np.ndarray]
) -> None:
    prompt = ask("What is 12 * 3?")
    seen = draws(folder, prompt, 20_000)
    total, freedom = chi_square(seen, softmax(next_logits(prompt)))
    assert abs(total - freedom) < 5 * np.sqrt(2 * freedom)


def test_top_k_and_temperature_leave_the_k_likeliest_in_proportion(
    folder: Path, next_logits: Callable[[Prompt], np.ndarray]
) -> None:
    prompt = ask("Why?")
    logits = next_logits(prompt) / 1.5
    logits[np.argsort(logits)[:-6]] = -np.inf
    total, freedom = chi_square(
        draws(folder, prompt, 8000, top_k=6, temperature=1.5), softmax(logits)
    )
    assert freedom == 5
    assert total < 25  # p = 0.0001


def test_top_p_leaves_the_smallest_set_that_reaches_p(
    folder: Path, next_logits: Callable[[Prompt], np.ndarray]
) -> None:
    prompt = ask("Why?")
    share = softmax(next_logits(prompt) / 0.5)
    order = np.argsort(-share)
    kept = order[: int(np.searchsorted(share[order].cumsum(), 0.3)) + 1]
    seen = draws(folder, prompt, 8000, top_p=0.3, temperature=0.5)
    assert 5 < len(kept) < 200
    assert set(seen) == set(kept.tolist())
    within = np.zeros_like(share)
    within[kept] = share[kept] / share[kept].sum()
    total, freedom = chi_square(seen, within)
    assert total < freedom + 5 * np.sqrt(2 * freedom)


def test_the_checkpoints_own_generation_settings_change_nothing(
    policy: TransformersPolicy, copied: Path
) -> None:
    edit(
        copied / "generation_config.json",
        do_sample=True,
        temperature=0.1,
        top_k=1,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(400)),
        min_new_tokens=30,
        max_new_tokens=2,
        num_beams=3,
    )
    seeds = [[1, 2, 3, 4]]
    sampling = Sampling(max_tokens=12)
    expected = policy.sample([ask("Why?")], sampling=sampling, seeds=seeds)
    assert opened(copied).sample([ask("Why?")], sampling=sampling, seeds=seeds) == expected


# --- log-probabilities


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5, "top_k": 20, "top_p": 0.8}, {"temperature": 0.0}]
)
def test_the_stored_log_probability_is_the_models_raw_one(
    policy: TransformersPolicy, model: Any, settings: dict[str, Any]
) -> None:
    prompts = [ask(text) for text in QUESTIONS]
    groups = policy.sample(
        prompts, sampling=Sampling(max_tokens=10, **settings), seeds=[[5, 6]] * len(prompts)
    )
    asked = [prompt for prompt in prompts for _ in range(2)]
    completions = [completion for group in groups for completion in group]
    scored = policy.logprobs(asked, completions)
    for prompt, completion, logps in zip(asked, completions, scored, strict=True):
        start = policy.prompt_ids(prompt)
        ids = torch.tensor([[*start, *completion.token_ids]])
        with torch.no_grad():
            logps_TV = model(ids).logits[0].double().log_softmax(-1)
        expected = logps_TV[len(start) - 1 : -1].gather(1, ids[0, len(start) :, None])[:, 0]
        assert logps.logprobs == pytest.approx(expected.tolist(), abs=2e-5)
        assert completion.logprob == pytest.approx(expected.sum().item(), abs=2e-4)
        assert logps.total == pytest.approx(completion.logprob, abs=2e-4)


def test_scoring_does_not_hang_on_the_batch_size(folder: Path, policy: TransformersPolicy) -> None:
    prompts = [ask(text) for text in QUESTIONS]
    completions = [policy.write(text * 3) for text in QUESTIONS[::-1]]
    together = policy.logprobs(prompts, completions)
    by_two = opened(folder, batch_size=2).logprobs(prompts, completions)
    for left, right in zip(together, by_two, strict=True):
        assert left.logprobs == pytest.approx(right.logprobs, abs=2e-5)
    assert policy.logprobs([], []) == []


def test_dropout_is_on_only_when_a_seed_is_given_and_leaves_other_randomness_alone(
    copied: Path,
) -> None:
    edit(copied / "config.json", attention_dropout=0.5)
    policy = opened(copied)
    prompts, completions = [ask("Why?")], [policy.write("Because 42.")]
    plain = policy.logprobs(prompts, completions)
    torch.manual_seed(1)
    untouched = torch.rand(3)
    torch.manual_seed(1)
    first = policy.logprobs(prompts, completions, dropout_seed=7)
    assert torch.equal(torch.rand(3), untouched)
    assert policy.logprobs(prompts, completions, dropout_seed=7) == first
    assert policy.logprobs(prompts, completions, dropout_seed=8) != first
    assert first != plain
    assert policy.logprobs(prompts, completions) == plain


# --- where a completion ends


def test_a_completion_ends_at_any_token_that_ends_a_turn_and_holds_it(copied: Path) -> None:
    ending = [4, *range(300, 500)]
    edit(copied / "generation_config.json", eos_token_id=ending)
    group = opened(copied).sample(
        [ask("Why?")], sampling=Sampling(max_tokens=8), seeds=[range(40)]
    )[0]
    reasons = Counter(completion.finish_reason for completion in group)
    assert set(reasons) == {"stop", "length"}
    for completion in group:
        *before, last = completion.token_ids
        assert not set(before) & set(ending)
        assert (last in ending) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 8


def test_the_end_of_turn_is_a_token_but_not_text(folder: Path) -> None:
    group = opened(folder, batch_size=1024).sample(
        [ask("Why?")], sampling=Sampling(max_tokens=2), seeds=[range(3000)]
    )[0]
    stopped = [completion for completion in group if completion.finish_reason == "stop"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert stopped
    for completion in stopped:
        assert completion.token_ids[-1] == tokenizer.eos_token_id
        assert "<|end|>" not in completion.text
    assert any(completion.text == "" for completion in stopped)


def spanning(tokenizer: Any, ids: Sequence[int]) -> tuple[str, int]:
    """A string that first appears across two of the tokens, and how many tokens complete it."""
    for n in range(2, len(ids)):
        left, right = tokenizer.decode([ids[n - 1]]), tokenizer.decode([ids[n]])
        text = (left + right).strip()
        if left.strip() and right.strip() and text.isascii() and text.isprintable():
            string = left[-1] + right[0]
            if string not in tokenizer.decode(ids[:n]) and string.strip() == string:
                return string, n + 1
    raise AssertionError("no two neighbouring tokens of plain text; take another seed")


def test_a_stop_string_across_tokens_cuts_text_and_keeps_the_tokens_that_made_it(
    folder: Path, policy: TransformersPolicy
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    free = policy.sample([ask("Why?")], sampling=Sampling(max_tokens=30), seeds=[[1, 2, 3]])[0]
    string, n = spanning(tokenizer, free[0].token_ids)
    stop = ("never written", string)
    group = policy.sample(
        [ask("Why?")], sampling=Sampling(max_tokens=30, stop=stop), seeds=[[1, 2, 3]]
    )[0]
    assert group[0].finish_reason == "stop_string"
    assert group[0].token_ids == free[0].token_ids[:n]
    assert group[0].text == free[0].text[: free[0].text.index(string)]
    assert group[0].logprob == pytest.approx(
        policy.logprobs([ask("Why?")], group[:1])[0].total, abs=2e-4
    )
    for ours, other in zip(group[1:], free[1:], strict=True):
        if string not in other.text:
            assert ours.token_ids == other.token_ids


def test_a_stop_string_in_the_prompt_or_over_its_edge_does_not_count(
    folder: Path, policy: TransformersPolicy
) -> None:
    prompt = ask("Say zebra zebra", begun="The zebra")
    free = one(policy, prompt, 1, max_tokens=6)
    stop = ("zebra", "a" + free.text[0])
    assert not any(string in free.text for string in stop)
    stopped = one(policy, prompt, 1, max_tokens=6, stop=stop)
    assert stopped.token_ids == free.token_ids
    assert stopped.finish_reason == "length"


def test_an_answer_begun_in_the_prompt_is_continued(policy: TransformersPolicy) -> None:
    whole = policy.prompt_ids(ask("Why?"))
    begun = policy.prompt_ids(ask("Why?", begun="4 2"))
    assert begun == whole + list(policy.write("4 2").token_ids[:-1])


def test_a_completion_records_its_seed_and_settings(policy: TransformersPolicy) -> None:
    completion = one(policy, ask("Why?"), 2**63 - 1, max_tokens=3, top_k=9)
    assert completion.seed == 2**63 - 1
    assert completion.sampling == Sampling(max_tokens=3, top_k=9)


def test_a_written_completion_is_the_text_and_the_end_of_turn(
    folder: Path, policy: TransformersPolicy
) -> None:
    completion = policy.write("x = 1024, naïve")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(completion.token_ids) == "x = 1024, naïve<|end|>"
    assert completion.finish_reason == "stop"
    assert completion.logprob is None
    assert completion.seed is None


def test_the_context_bounds_a_completion_and_a_prompt_past_it_gets_none(
    copied: Path,
) -> None:
    edit(copied / "config.json", max_position_embeddings=40)
    policy = opened(copied)
    prompts = [ask("Why?"), ask("1" * 30), ask("1" * 31)]
    lengths = [len(policy.prompt_ids(prompt)) for prompt in prompts]
    groups = policy.sample(prompts, sampling=Sampling(max_tokens=9), seeds=[[1], [2], [3]])
    assert [len(group[0].token_ids) for group in groups] == [
        min(9, 40 - length) for length in lengths
    ]
    long = ask("1" * 50)
    assert policy.room(long) == 40 - len(policy.prompt_ids(long)) < 1
    asked = policy.sample([long, ask("Why?")], sampling=Sampling(max_tokens=9), seeds=[[1], [1]])
    assert [len(group) for group in asked] == [0, 1]


# --- what is opened


def test_an_architecture_with_learned_positions_samples_and_scores_alike(copied: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=1024, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=4
    )
    GPT2LMHeadModel(config).save_pretrained(copied)
    policy = opened(copied)
    prompts = [ask("Why?"), ask("1" * 55)]
    groups = policy.sample(prompts, sampling=Sampling(max_tokens=20), seeds=[[1, 2], [3, 4]])
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            assert completion.logprob == pytest.approx(
                policy.logprobs([prompt], [completion])[0].total, abs=2e-4
            )
    assert (
        opened(copied, batch_size=1)
        .sample(prompts[:1], sampling=Sampling(max_tokens=20), seeds=[[1]])[0][0]
        .token_ids
        == groups[0][0].token_ids
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_samples_and_scores_near_float32(
    folder: Path, policy: TransformersPolicy, dtype: str
) -> None:
    half = opened(folder, dtype=dtype)
    completion = one(half, ask("Why?"), 1, max_tokens=16)
    exact = policy.logprobs([ask("Why?")], [completion])[0]
    assert half.logprobs([ask("Why?")], [completion])[0].total == pytest.approx(
        exact.total, rel=0.01
    )
    assert completion.logprob == pytest.approx(exact.total, rel=0.01)
    assert completion.logprob != pytest.approx(exact.total, rel=1e-6)


def test_weights_are_read_at_the_first_token_and_again_after_a_close(
    folder: Path, copied: Path
) -> None:
    policy = opened(copied)
    (copied / "model.safetensors").unlink()
    assert policy.write("4 2").token_ids
    assert policy.prompt_ids(ask("Why?"))
    with pytest.raises(OSError, match=r"model.safetensors"):
        one(policy, ask("Why?"))
    shutil.copy(folder / "model.safetensors", copied)
    before = one(policy, ask("Why?"), max_tokens=4)
    policy.close()
    assert one(policy, ask("Why?"), max_tokens=4) == before


def test_weights_that_give_no_numbers_stop_the_run(copied: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(copied)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(copied)
    with pytest.raises(FloatingPointError, match="NaN"):
        one(opened(copied), ask("Why?"), max_tokens=4)


def test_loading_is_quiet(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one(opened(folder), ask("Why?"), max_tokens=2)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_tokenizer_without_a_chat_template_is_named_with_its_folder(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=rf"{copied}.*no chat template"):
        one(opened(copied), ask("Why?"))


def test_a_folder_that_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        opened(tmp_path / "nothing")


def test_the_engine_is_a_plug_in_whose_options_have_bounds() -> None:
    engine = plugins.load("engine", "transformers", {"batch_size": 3, "device": "cpu"})
    assert isinstance(engine, Engine)
    for options in ({"batch_size": 0}, {"dtype": "int8"}, {"threads": 0}, {"device": "tpu"}):
        with pytest.raises(UserError, match=next(iter(options))):
            plugins.load("engine", "transformers", options)


def test_an_opened_checkpoint_is_a_policy(policy: TransformersPolicy) -> None:
    assert isinstance(policy, Policy)


# --- the embedded model


def test_the_same_seed_writes_the_same_embedded_model_in_another_process(
    folder: Path, tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path; from roles.policy.embedded import build; "
        "build(Path(sys.argv[1]), 0)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "again"], check=True)
    build(tmp_path / "other", seed=1)

    def contents(path: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in path.iterdir()}

    first, again, other = (contents(p) for p in (folder, tmp_path / "again", tmp_path / "other"))
    assert again == first
    assert other.pop("model.safetensors") != first["model.safetensors"]
    assert other.items() <= first.items()


def test_the_embedded_tokenizer_is_lossless_and_takes_digits_one_by_one(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("1024 + 7 = 1031", " naïve 東京 \n\t🙂", "What is the GCD?"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([token]) for token in tokenizer.encode("1024")] == list("1024")
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert chat == "<|system|>Be brief.<|end|><|user|>Why?<|end|><|assistant|>"
