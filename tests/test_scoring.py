"""Log-probabilities of completions, held to a plain forward pass over whole rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from kernels.matmul import counting
from roles.policy.scoring import token_logprobs

VOCABULARY = 97
Rows = list[list[int]]
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "learned positions": lambda: GPT2LMHeadModel(GPT2Config(**GPT, **ENDS)),
    "a head with a bias": lambda: GPTJForCausalLM(GPTJConfig(**GPT, **ENDS, rotary_dim=8)),
    "capped logits, a window of 24": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, sliding_window=24, final_logit_softcapping=2.0)
    ),
    "scaled logits": lambda: Cohere2ForCausalLM(
        Cohere2Config(**SMALL, sliding_window=16, logit_scale=0.25)
    ),
    "experts": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    ),
    "a state in place of a cache": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
}


def built(family: str, **changed: Any) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    # As they are drawn, all logits are near 0, and a wrong scale would not be seen.
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def drawn(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(VOCABULARY) for _ in range(count)]


def answers(seed: int = 0) -> tuple[Rows, Rows]:
    """Prompts with 1 to 6 completions of unequal length, in no order; one empty, one twice."""
    chance = random.Random(seed)
    asked = []
    for completions in (1, 6, 2, 1, 4):
        prompt = drawn(chance, chance.randint(1, 30))
        asked += [(prompt, drawn(chance, chance.randint(1, 25))) for _ in range(completions)]
    asked += [(asked[1][0], []), asked[2], (asked[3][0], drawn(chance, 1))]
    chance.shuffle(asked)
    return [prompt for prompt, _ in asked], [completion for _, completion in asked]


def plain(model: Any, prompts: Rows, completions: Rows) -> list[list[float]]:
    """One whole row at a time, all its logits, in the model's dtype; then in float64."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids_T = torch.tensor([*prompt, *completion])
        with torch.no_grad():
            logits_TV = model(input_ids=ids_T[None]).logits[0].double()
        predicted_TV = logits_TV.log_softmax(-1)[len(prompt) - 1 : -1]
        found.append(predicted_TV.gather(1, ids_T[len(prompt) :, None])[:, 0].tolist())
    return found


def farthest(found: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    assert [len(each) for each in found] == [len(each) for each in other]
    pairs = zip(found, other, strict=True)
    return max(abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_whole_rows_in_every_family(family: str) -> None:
    model = built(family)
    prompts, completions = answers()
    expected = plain(model, prompts, completions)
    assert min(map(min, filter(None, expected))) < -6, "the logits are all alike"
    found = token_logprobs(model, prompts, completions, rows=256)
    assert farthest(found, expected) < 1e-5
    assert [len(each) for each in found] == [len(each) for each in completions]


@pytest.mark.parametrize("bounds", [{"tokens": 1}, {"tokens": 70}, {"rows": 1}, {"max_bytes": 999}])
def test_values_are_exact_in_float64_whatever_passes_at_once(bounds: dict[str, int]) -> None:
    model = built("learned positions").double()
    for seed in range(3):
        prompts, completions = answers(seed)
        found = token_logprobs(model, prompts, completions, **{"rows": 64, **bounds})
        assert farthest(found, plain(model, prompts, completions)) < 1e-10


def test_bfloat16_is_no_farther_from_the_truth_than_a_plain_pass() -> None:
    model = built("llama")
    prompts, completions = answers()
    exact = plain(model, prompts, completions)
    narrow = model.bfloat16()

    def error(found: Sequence[Sequence[float]]) -> float:
        pairs = [
            (a, b)
            for one, two in zip(found, exact, strict=True)
            for a, b in zip(one, two, strict=True)
        ]
        return sum((a - b) ** 2 for a, b in pairs) ** 0.5

    ours = error(token_logprobs(narrow, prompts, completions, rows=256))
    assert 0 < ours <= 1.5 * error(plain(narrow, prompts, completions))


class Seen:
    """The [rows, tokens] of every pass through a model's body."""

    def __init__(self, model: Any) -> None:
        self.passes: list[tuple[int, int]] = []
        model.get_input_embeddings().register_forward_pre_hook(self._note)

    def _note(self, _: Any, given: tuple[Any, ...]) -> None:
        self.passes.append(tuple(given[0].shape))

    @property
    def tokens(self) -> int:
        return sum(rows * tokens for rows, tokens in self.passes)


def test_a_prompt_passes_once_for_all_its_completions() -> None:
    model = built("llama")
    chance = random.Random(3)
    prompts = [drawn(chance, 60 + chance.randint(0, 1)) for _ in range(5)]
    pairs = [(prompt, drawn(chance, 6)) for prompt in prompts for _ in range(8)]
    chance.shuffle(pairs)
    asked = [prompt for prompt, _ in pairs], [completion for _, completion in pairs]
    token_logprobs(model, *asked, rows=256)  # what the model can is found out at the first call
    seen = Seen(model)
    found = token_logprobs(model, *asked, rows=256)
    assert seen.tokens <= 5 * 61 + 40 * 5
    twice = token_logprobs(model, asked[0] * 2, asked[1] * 2, rows=256)
    assert twice == found * 2
    assert seen.tokens <= 2 * (5 * 61 + 40 * 5), "equal completions pass twice"


@pytest.mark.parametrize(("rows", "tokens"), [(3, 10_000), (1, 10_000), (256, 120), (2, 90)])
def test_no_more_rows_and_tokens_pass_at_once_than_allowed(rows: int, tokens: int) -> None:
    model = built("llama")
    prompts, completions = answers()
    expected = token_logprobs(model, prompts, completions, rows=256)
    seen = Seen(model)
    found = token_logprobs(model, prompts, completions, rows=rows, tokens=tokens)
    assert farthest(found, expected) < 1e-5
    for batch, width in seen.passes:
        assert batch <= rows
        assert batch * width <= tokens or batch == 1


def test_logits_are_held_a_tile_at_a_time() -> None:
    model = built("llama")
    prompts, completions = answers()
    with counting() as whole:
        expected = token_logprobs(model, prompts, completions, rows=256)
    with counting() as tiled:
        found = token_logprobs(model, prompts, completions, rows=256, max_bytes=8 << 10)
    assert farthest(found, expected) < 1e-5
    assert tiled.most_held <= 8 << 10 < whole.most_held
    distinct = {(tuple(a), tuple(b)) for a, b in zip(prompts, completions, strict=True)}
    scored = sum(len(completion) for _, completion in distinct)
    for each in (whole, tiled):
        assert each.passes(scored, VOCABULARY, 32) == pytest.approx(1)


class Doubled(torch.nn.Linear):
    """A head that cannot be multiplied apart from its model."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


def test_a_head_that_cannot_be_multiplied_apart_is_asked_for_its_logits() -> None:
    model = built("llama")
    model.lm_head.__class__ = Doubled
    prompts, completions = answers()
    with pytest.warns(UserWarning, match="scored by its own logits"):
        found = token_logprobs(model, prompts, completions, rows=256)
    assert farthest(found, plain(model, prompts, completions)) < 1e-5
    by_two = token_logprobs(model, prompts, completions, rows=2, max_bytes=50_000)
    assert farthest(by_two, found) < 1e-5


@pytest.mark.parametrize("read", [True, False], ids=["head read", "own logits"])
def test_a_row_has_its_own_positions_beside_one_past_the_length_where_they_turn_otherwise(
    read: bool,
) -> None:
    torch.manual_seed(0)
    factors = {"short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [9.0, 9.0, 9.0, 9.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors}
    config = Phi3Config(**SMALL, rope_parameters=rope, original_max_position_embeddings=32)
    model = Phi3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    if not read:
        model.lm_head.__class__ = Doubled
    chance = random.Random(2)
    # 32 tokens, and 34, which is past the limit without the last one too, that predicts nothing.
    prompts = [drawn(chance, 20) for _ in range(6)]
    completions = [drawn(chance, 12 + 2 * (place % 2)) for place in range(6)]
    with nullcontext() if read else pytest.warns(UserWarning, match="scored by its own logits"):
        found = token_logprobs(model, prompts, completions, rows=256)
    assert farthest(found, plain(model, prompts, completions)) < 1e-3


def test_an_adapter_that_lies_over_the_model_is_scored_with_it() -> None:
    peft = pytest.importorskip("peft")
    model = built("llama")
    prompts, completions = answers()
    before = token_logprobs(model, prompts, completions, rows=256)
    model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    found = token_logprobs(model, prompts, completions, rows=256)
    assert farthest(found, plain(model, prompts, completions)) < 1e-5
    assert farthest(found, before) > 0.01
    model.disable_adapters()
    assert farthest(token_logprobs(model, prompts, completions, rows=256), before) < 1e-6


def test_the_same_call_gives_the_same_bits() -> None:
    model = built("llama")
    prompts, completions = answers()
    first, second = (token_logprobs(model, prompts, completions, rows=5) for _ in range(2))
    assert first == second


def test_weights_that_are_no_numbers_give_no_numbers() -> None:
    model = built("llama")
    prompts, completions = answers()
    with torch.no_grad():
        model.lm_head.weight[13] = torch.nan  # one token's, which is part of every sum
    found = token_logprobs(model, prompts, completions, rows=256)
    assert all(value != value for each in found for value in each)
    assert [len(each) for each in found] == [len(each) for each in completions]


def test_without_completions_nothing_passes() -> None:
    model = built("llama")
    assert token_logprobs(model, [], [], rows=4) == []
    token_logprobs(model, [[5]], [[6]], rows=4)
    seen = Seen(model)
    assert token_logprobs(model, [[5], [7, 8]], [[], []], rows=4) == [[], []]
    assert seen.passes == []


def test_dropout_of_a_shared_prompt_leaves_each_value_the_distribution_it_has_alone() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**GPT, **ENDS, resid_pdrop=0.3, attn_pdrop=0.3))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    prompt, completions = [5, 9, 30, 2], [[11, 40], [7, 60, 3]]
    model.train()
    torch.manual_seed(1)
    shared = [token_logprobs(model, [prompt] * 2, completions, rows=8)[1][2] for _ in range(600)]
    alone = [plain(model, [prompt], completions[1:])[0][2] for _ in range(600)]
    model.eval()
    (fixed,) = plain(model, [prompt], completions[1:])
    one, two = (torch.tensor(each).sort().values for each in (shared, alone))
    assert one.std() > 0.1, "nothing is dropped"
    assert abs(one.mean() - fixed[2]) > 0.02, "the mean tells dropout from none"
    places = torch.cat([one, two])
    below = [torch.searchsorted(each, places, right=True) / 600 for each in (one, two)]
    # Kolmogorov and Smirnov's distance; 1.95 is that of p = 0.001.
    assert (below[0] - below[1]).abs().max() < 1.95 * (2 / 600) ** 0.5
