"""A prompt that passes once is as good as one that passes with each of its completions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.causal import backbone
from kernels.grouped_hidden import grouped_hidden
from kernels.passes import small_attention, take
from kernels.sharing import shared_room
from test_causal import make

CHANCE = torch.Generator().manual_seed(1)


def ids(count: int) -> list[int]:
    return torch.randint(1, 97, (count,), generator=CHANCE).tolist()


PROMPTS = [ids(7), ids(4), ids(11)]
COMPLETIONS = [[ids(3), ids(5)], [ids(1), ids(6), ids(2)], [ids(4)]]
LONGEST = 11 + 6
ALWAYS = 2**31

GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MOE: dict[str, Any] = {"num_experts_per_tok": 2}
SHARED: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama": ("Llama", {}, ALWAYS),
    "Llama tied": ("Llama", {"tie_word_embeddings": True}, ALWAYS),
    "Llama of one key head": ("Llama", {"num_key_value_heads": 1}, ALWAYS),
    "Qwen2": ("Qwen2", {}, ALWAYS),
    "Qwen3": ("Qwen3", {}, ALWAYS),
    "Gemma": ("Gemma", {"head_dim": 8}, ALWAYS),
    "Gemma2 in its window": ("Gemma2", {"head_dim": 8, "sliding_window": 32}, 32),
    "Gemma3 in its window": ("Gemma3Text", {"head_dim": 8, "sliding_window": 32}, 32),
    "GPT-2": ("GPT2", GPT, ALWAYS),
    "GPT-NeoX": ("GPTNeoX", {}, ALWAYS),
    "GPT-J": ("GPTJ", GPT | {"rotary_dim": 4}, ALWAYS),
    "OPT": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}, ALWAYS),
    "Phi": ("Phi", {}, ALWAYS),
    "Phi3": ("Phi3", {}, ALWAYS),
    "Falcon": ("Falcon", {"alibi": True}, ALWAYS),
    "Mistral without a window": ("Mistral", {"sliding_window": None}, ALWAYS),
    "Mistral in its window": ("Mistral", {"sliding_window": LONGEST}, LONGEST),
    "Mixtral": ("Mixtral", MOE | {"num_local_experts": 4, "sliding_window": None}, ALWAYS),
    "Qwen3-MoE": ("Qwen3Moe", MOE | {"num_experts": 4, "moe_intermediate_size": 16}, ALWAYS),
}
WHOLE: dict[str, tuple[str, dict[str, Any], int]] = {
    "Mistral past its window": ("Mistral", {"sliding_window": LONGEST - 1}, LONGEST - 1),
    "Gemma2 past its window": ("Gemma2", {"head_dim": 8, "sliding_window": 8}, 8),
    "GPT-Neo past its window": (
        "GPTNeo",
        {
            "attention_types": [[["global", "local"], 1]],
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 8,
        },
        8,
    ),
    "GPT-Neo past its mask": (
        "GPTNeo",
        {
            "attention_types": [[["global"], 2]],
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": LONGEST - 1,
        },
        LONGEST - 1,
    ),
    "Phi3 of frequencies for long and for short rows": (
        "Phi3",
        {
            "original_max_position_embeddings": 12,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [3.0] * 4,
                "original_max_position_embeddings": 12,
            },
        },
        0,
    ),
    "Bloom": ("Bloom", {"n_head": 4, "n_layer": 2}, 0),
    "Mamba": ("Mamba", {"state_size": 4}, 0),
    "Llama of dynamic frequencies": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        0,
    ),
}
KINDS = SHARED | WHOLE


def by_rows(model: Any, prompts: Any = PROMPTS, completions: Any = COMPLETIONS) -> torch.Tensor:
    """[N, H], row by row, without padding or a mask."""
    found = []
    for prompt, several in zip(prompts, completions, strict=True):
        for completion in several:
            row = torch.tensor([[*prompt, *completion]])
            hidden_TH = backbone(model)(input_ids=row, use_cache=False).last_hidden_state[0]
            found.append(hidden_TH[len(prompt) - 1 : -1])
    return torch.cat(found)


def gradients(model: Any, hidden: torch.Tensor) -> list[torch.Tensor | None]:
    weight = torch.cos(torch.arange(hidden.numel())).view_as(hidden).to(hidden.dtype)
    parameters = list(model.parameters())
    return list(torch.autograd.grad((hidden * weight).sum(), parameters, allow_unused=True))


def hold(
    model: Any,
    found: torch.Tensor,
    rtol: float,
    prompts: Any = PROMPTS,
    completions: Any = COMPLETIONS,
) -> None:
    wanted = by_rows(model, prompts, completions)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol)
    for one, other in zip(gradients(model, found), gradients(model, wanted), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=rtol * float(other.abs().max() + 1))


@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_are_those_of_whole_rows(name: str) -> None:
    kind, changes, room = KINDS[name]
    model = make(kind, **changes).double()
    assert shared_room(model) == room
    found = grouped_hidden(model, PROMPTS, COMPLETIONS)
    flat = [completion for several in COMPLETIONS for completion in several]
    assert found.target.tolist() == [token for completion in flat for token in completion]
    assert found.cu_seqlens.diff().tolist() == [len(completion) for completion in flat]
    # Of most of these models the norms and angles are float32 in a float64 model too.
    hold(model, found.hidden, rtol=3e-6)


def test_they_are_the_same_to_the_last_digits_where_the_model_is_float64_throughout() -> None:
    for name in ("GPT-2", "GPT-NeoX", "Phi"):
        kind, changes, _ = KINDS[name]
        model = make(kind, **changes).double()
        hold(model, grouped_hidden(model, PROMPTS, COMPLETIONS).hidden, rtol=1e-13)


def tokens_passed(model: Any) -> list[int]:
    """How many ids each pass from here on takes, padding included."""
    passed: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, given, made: passed.append(given[0].numel())
    )
    return passed


def test_a_prompt_passes_once_and_the_last_token_of_a_completion_not_at_all() -> None:
    model = make("Llama")
    shared_room(model)
    passed = tokens_passed(model)
    grouped_hidden(model, PROMPTS, COMPLETIONS)
    assert passed == [3 * 11, 6 * 5]
    grouped_hidden(model, [ids(50)], [[ids(1) for _ in range(64)]])
    assert passed[2:] == [50]


def test_many_prompts_pass_in_few_shapes_and_give_the_same() -> None:
    model = make("GPTNeoX").double()
    shared_room(model)
    passed = tokens_passed(model)
    for count in (29, 31, 32):
        prompts = [ids(5) for _ in range(count)]
        completions = [[ids(4), ids(3)] for _ in prompts]
        found = grouped_hidden(model, prompts, completions).hidden
        assert passed[-2:] == [32 * 5, 64 * 3]
        hold(model, found, 1e-13, prompts, completions)


def test_where_little_would_be_shared_whole_rows_pass() -> None:
    model = make("GPTNeoX").double()
    shared_room(model)
    passed = tokens_passed(model)
    prompts, completions = [ids(2), ids(20)], [[ids(19), ids(11)], [ids(3)]]
    found = grouped_hidden(model, prompts, completions).hidden
    assert passed == [3 * 22]
    hold(model, found, 1e-13, prompts, completions)


@pytest.mark.parametrize("name", ["GPT-2", "Mamba"])
@pytest.mark.parametrize(("budget", "most"), [(1, None), (40, None), (500, 2), (10_000, None)])
def test_within_a_budget_completions_pass_in_buckets(name: str, budget: int, most: Any) -> None:
    kind, changes, room = KINDS[name]
    model = make(kind, **changes).double()
    shared_room(model)
    passed = tokens_passed(model)
    found = grouped_hidden(model, PROMPTS, COMPLETIONS, budget=budget, most=most)
    hold(model, found.hidden, rtol=1e-13 if name == "GPT-2" else 3e-6)
    passes = passed[1 if room else 0 :]
    assert all(each <= max(budget, LONGEST) for each in passes)
    assert most is None or len(passes) > 2


def test_padding_asks_for_no_position_that_the_model_does_not_have() -> None:
    model = make("GPT2", **GPT).double()
    prompts, completions = [ids(60), ids(2)], [[ids(4), ids(2)], [ids(40), ids(3)]]
    found = grouped_hidden(model, prompts, completions)
    for place in range(2):
        alone = grouped_hidden(model, prompts[place : place + 1], completions[place : place + 1])
        own = slice(*found.cu_seqlens[[2 * place, 2 * place + 2]].tolist())
        torch.testing.assert_close(found.hidden[own], alone.hidden, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["Mistral past its window", "Mamba"])
def test_where_prompts_cannot_be_shared_whole_rows_pass(name: str) -> None:
    kind, changes, _ = KINDS[name]
    model = make(kind, **changes)
    shared_room(model)
    passed = tokens_passed(model)
    grouped_hidden(model, PROMPTS, COMPLETIONS)
    assert passed == [6 * (11 + 3)]


def test_a_window_that_nothing_reaches_past_does_not_matter() -> None:
    model = make("Mistral", sliding_window=LONGEST - 1)
    passed = tokens_passed(model)
    shared_room(model)
    passed.clear()
    grouped_hidden(model, PROMPTS[:2], COMPLETIONS[:2])
    assert passed == [2 * 7, 5 * 5]


def test_a_model_that_checkpoints_gradients_gets_whole_rows_and_gives_the_same() -> None:
    model = make("Llama").double()
    model.gradient_checkpointing_enable()
    model.train()
    assert shared_room(model) == 0
    hold(model, grouped_hidden(model, PROMPTS, COMPLETIONS).hidden, rtol=3e-6)
    model.gradient_checkpointing_disable()
    assert shared_room(model) == ALWAYS


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_scores_without_gradients_too(context: Any) -> None:
    model = make("Qwen2")
    with context():
        found = grouped_hidden(model, PROMPTS, COMPLETIONS)
    assert not found.hidden.requires_grad
    torch.testing.assert_close(found.hidden, by_rows(model).detach(), rtol=1e-4, atol=1e-4)
    # What is found of the model under inference mode does not get in the way of training it.
    assert grouped_hidden(model, PROMPTS, COMPLETIONS).hidden.requires_grad


def test_equal_calls_give_equal_bits() -> None:
    model = make("Llama")
    calls = [grouped_hidden(model, PROMPTS, COMPLETIONS).hidden for _ in range(2)]
    assert torch.equal(*calls)
    for one, other in zip(*(gradients(model, hidden) for hidden in calls), strict=True):
        assert one is other or torch.equal(one, other)  # type: ignore[arg-type]


def test_in_bfloat16_it_is_as_far_from_float64_as_whole_rows_are() -> None:
    model = make("Llama")
    with torch.no_grad():
        exact = by_rows(make("Llama").double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grouped, rows = grouped_hidden(model, PROMPTS, COMPLETIONS).hidden, by_rows(model)
    errors = [(each.double() - exact).norm().item() for each in (grouped, rows)]
    assert 0 < errors[0] < 1.5 * errors[1]


def fused() -> bool:
    """Whether torch multiplies attention in one kernel now, by what it leaves to be gone back."""
    query = torch.ones(1, 1, 4, 8, requires_grad=True)
    found = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    return "Flash" in type(found.grad_fn).__name__


@pytest.mark.parametrize("shape", [(6, 19, 32), (48,)])
def test_gradients_of_what_many_rows_take_are_rounded_once(shape: tuple[int, ...]) -> None:
    """A prompt's keys and its last state, each taken by 32 completions."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, *shape, generator=generator).bfloat16().requires_grad_()
    owner = torch.arange(2).repeat_interleave(32)
    above = torch.randn(64, *shape, generator=generator).bfloat16()
    (found,) = torch.autograd.grad(take(rows, owner), rows, above)
    exact = above.double().view(2, 32, *shape).sum(1)
    rounded = exact.bfloat16().double()
    assert (found.double() - exact).norm() <= 1.5 * (rounded - exact).norm()


def test_attention_is_not_fused_where_it_is_small_and_afterwards_as_it_was() -> None:
    assert fused()
    first, second = small_attention("cpu", 7, 31), small_attention("cpu", 7, 31)
    with first:
        assert not fused()
        second.__enter__()
    assert not fused()
    second.__exit__(None, None, None)
    assert fused()
    for device, queries, keys in (("cpu", 256, 256), ("cpu", 1, 513), ("cuda", 7, 31)):
        with small_attention(device, queries, keys):
            assert fused()
    with pytest.raises(ValueError, match="stopped"), small_attention("cpu", 7, 31):
        raise ValueError("stopped")
    assert fused()


@pytest.mark.parametrize(
    ("prompts", "completions", "said"),
    [
        ([], [], "0 prompts"),
        ([[1]], [[[2]], [[3]]], "1 prompts and 2 lists"),
        ([[1], []], [[[2]], [[3]]], "prompt 1 has no token"),
        ([[1]], [[]], "prompt 0 has no completion"),
        ([[1], [2]], [[[2]], [[3], []]], "completion 1 of prompt 1 has no token"),
    ],
)
def test_what_has_no_tokens_is_refused(prompts: Any, completions: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        grouped_hidden(make("Llama"), prompts, completions)
