"""The engine's own decode loop against `generate` of transformers, over families of models."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import small_model
from kernels.sampling import sample_with_logprob
from roles.policy import adapters
from roles.policy.attending import Prefix, Tails
from roles.policy.decoding import Decoder
from roles.policy.embedded import build
from roles.policy.rows import Drawn, Row, StopStrings
from roles.policy.transformers import TransformersEngine
from store.records import Checkpoint, Message, Prompt, Sampling

VOCABULARY = 97
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FULL = TINY | {"num_key_value_heads": 4}
WIDE = TINY | {"head_dim": 8}
WINDOW = {"sliding_window": 6}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = FULL | {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "factor": 4.0,
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}

# Name -> settings, or (model type, settings).
SERVED: dict[str, Any] = {
    "llama": TINY,
    "mistral": TINY | {"sliding_window": None},
    "mistral in a window": ("mistral", TINY | WINDOW),
    "qwen2": TINY,
    "qwen3": WIDE,
    "qwen2_moe": TINY | EXPERTS | {"shared_expert_intermediate_size": 16},
    "mixtral": TINY | {"num_local_experts": 4, "sliding_window": None},
    "gemma": WIDE,
    "gemma2": WIDE | WINDOW | {"query_pre_attn_scalar": 8},
    "gemma3_text": WIDE
    | WINDOW
    | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": FULL | {"partial_rotary_factor": 0.5},
    "phi3": TINY | {"sliding_window": None},
    "gpt2": GPT,
    "gpt_neox": FULL,
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
    },
    "stablelm": TINY,
    "olmo2": TINY,
    "cohere": TINY,
    "granite": TINY | {"logits_scaling": 2.0, "attention_multiplier": 0.3},
    "smollm3": TINY | {"no_rope_layer_interval": 2},
    "glm4": WIDE,
    "deepseek_v3": LATENT,
    "gpt_oss": WIDE
    | WINDOW
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}
RARER: dict[str, Any] = {
    "qwen2 in a window": (
        "qwen2",
        TINY | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3_moe": WIDE | EXPERTS,
    "mixtral in a window": ("mixtral", TINY | WINDOW | {"num_local_experts": 4}),
    "phi3 in a window": ("phi3", TINY | WINDOW),
    "phimoe": TINY | {"num_local_experts": 4, "sliding_window": None},
    "gemma3n_text": WIDE
    | WINDOW
    | {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_bigcode": GPT,
    "ctrl": GPT | {"dff": 48},
    "biogpt": FULL,
    "olmo": TINY,
    "olmo3": TINY | WINDOW,
    "olmoe": TINY | {"num_experts": 4, "num_experts_per_tok": 2},
    "cohere2": WIDE | WINDOW,
    "granitemoe": TINY | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm": WIDE,
    "deepseek_v2": LATENT,
    "starcoder2": TINY | {"sliding_window": None},
    "nemotron": TINY,
    "persimmon": FULL,
    "ernie4_5": TINY,
    "exaone4": TINY | WINDOW,
    "hunyuan_v1_dense": WIDE,
    "arcee": TINY,
    "helium": WIDE,
    "apertus": TINY,
    "seed_oss": WIDE,
    "bitnet": TINY,
    "diffllama": TINY,
    "jetmoe": TINY | {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}
# Served up to so many tokens; longer texts are left to `generate`.
LIMITED: dict[str, Any] = {
    "phi3 of two ropes": (
        "phi3",
        TINY
        | {
            "original_max_position_embeddings": 24,
            "rope_parameters": LONG_ROPE,
            "sliding_window": None,
        },
    ),
    "llama of a growing rope": (
        "llama",
        TINY | {"max_position_embeddings": 24, "rope_parameters": DYNAMIC_ROPE},
    ),
    "llama4_text": WIDE
    | {"attention_chunk_size": 24, "num_local_experts": 2, "intermediate_size_mlp": 48},
}
LEFT: dict[str, tuple[str, Any]] = {
    "gptj": ("code of its own", GPT | {"rotary_dim": 4}),
    "bloom": (
        "code of its own",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "mpt": (
        "code of its own",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4},
    ),
    "falcon": (
        "code of its own",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    ),
    "mamba": (
        "a recurrent state",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    "recurrent_gemma": (
        "a recurrent state",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "lru_width": 32,
        },
    ),
    "lfm2": ("a recurrent state", TINY | {"layer_types": ["conv", "full_attention"]}),
    "bart": (
        "otherwise than those of a plain pass",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "decoder_layers": 2,
            "encoder_layers": 2,
            "decoder_attention_heads": 4,
            "encoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "encoder_ffn_dim": 48,
            "max_position_embeddings": 128,
        },
    ),
    "t5": (
        "an encoder and a decoder",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
}


def tiny(name: str, settings: Any) -> Any:
    """A small random model, loud enough that its greedy tokens differ."""
    kind, settings = settings if isinstance(settings, tuple) else (name, settings)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    if config.is_encoder_decoder and kind == "t5":
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    for weights in model.parameters():
        if weights.dim() > 1:
            weights.data.normal_(0, 0.2)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.float().eval()


def some_prompts(lengths: Sequence[int], common: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            *range(5, 5 + common),
            *torch.randint(5, VOCABULARY, (each,), generator=generator).tolist(),
        )
        for each in lengths
    ]


def greedy(
    decoder: Decoder, rows: Sequence[Row], *, end_ids: Sequence[int] = (), **settings: Any
) -> list[Drawn]:
    settings = {"most": 256, "bytes_at_once": 2**30} | settings
    sampling = Sampling(temperature=0, max_tokens=max(row.room for row in rows))
    return decoder.decode(rows, sampling, end_ids=end_ids, **settings)


def generated(model: Any, row: Row, end_ids: Sequence[int] = ()) -> list[int]:
    ids = torch.tensor([row.prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=row.room,
        eos_token_id=list(end_ids) or None,
    )
    return found[0, len(row.prompt) :].tolist()  # type: ignore[no-any-return]


def held_to_generate(model: Any, decoder: Decoder, rows: Sequence[Row], **settings: Any) -> int:
    """Every row is what `generate` makes of its prompt alone; how many different ones there are."""
    found = greedy(decoder, rows, **settings)
    wanted = {row[::2]: generated(model, row, settings.get("end_ids", ())) for row in rows}
    assert [drawn.tokens for drawn in found] == [wanted[row[::2]] for row in rows]
    return len({tuple(tokens) for tokens in wanted.values()})


def rows_of(prompts: Sequence[tuple[int, ...]], room: int, each: int = 2) -> list[Row]:
    """More rows of each prompt than of the one before it."""
    return [
        Row(prompt, n, room)
        for place, prompt in enumerate(prompts)
        for n in range(each + place % 2)
    ]


def served_as_by_generate(name: str, settings: Any) -> None:
    model = tiny(name, settings)
    decoder = Decoder(model)
    assert decoder.unserved is None
    # Of different lengths, one of a single token; then behind a beginning that all share.
    assert held_to_generate(model, decoder, rows_of(some_prompts([5, 9, 1]), 10)) == 3
    held_to_generate(model, decoder, rows_of(some_prompts([3, 1], common=34), 6))


@pytest.mark.parametrize("name", SERVED)
def test_a_family_is_decoded_to_the_greedy_tokens_of_generate(name: str) -> None:
    served_as_by_generate(name, SERVED[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", RARER)
def test_a_rarer_family_is_decoded_to_the_greedy_tokens_of_generate(name: str) -> None:
    served_as_by_generate(name, RARER[name])


@pytest.mark.parametrize("name", LIMITED)
def test_where_positions_or_chunks_turn_on_length_short_texts_are_served_and_long_ones_not(
    name: str,
) -> None:
    model = tiny(name, LIMITED[name])
    decoder = Decoder(model)
    assert decoder.unserved is None
    assert decoder.serves(24)
    assert not decoder.serves(25)
    assert held_to_generate(model, decoder, rows_of(some_prompts([5, 9]), 14)) == 2


@pytest.mark.parametrize("name", LEFT)
def test_a_family_that_is_left_to_generate_is_named_with_the_reason(name: str) -> None:
    reason, settings = LEFT[name]
    decoder = Decoder(tiny(name, settings))
    assert decoder.unserved is not None
    assert reason in decoder.unserved
    assert not decoder.serves(1)


def test_a_model_whose_attention_is_told_more_than_is_understood_is_not_served() -> None:
    model = tiny("llama", TINY)
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, named: (args, named | {"position_bias": torch.zeros(1)}),
        with_kwargs=True,
    )
    # What takes it now is transformers' own attention, which adds it; ours must not ignore it.
    assert Decoder(model).unserved == "its attention is told position_bias"


class WithoutPositions(transformers.LlamaForCausalLM):
    def forward(
        self, input_ids: Any, attention_mask: Any = None, past_key_values: Any = None
    ) -> Any:
        return super().forward(input_ids, attention_mask, past_key_values=past_key_values)


class OfItsOwnCache(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, past_key_values: Any = None, **told: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length():
            assert past_key_values.layers[0].keys.shape
        return super().forward(*args, past_key_values=past_key_values, **told)


class OfItsOwnWidth(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, past_key_values: Any = None, **told: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length():
            torch.zeros(2) @ torch.zeros(past_key_values.get_seq_length())
        return super().forward(*args, past_key_values=past_key_values, **told)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (WithoutPositions, "it takes no positions of tokens"),
        (OfItsOwnCache, "its code wants another cache: AttributeError"),
        (OfItsOwnWidth, "its code wants another cache: RuntimeError"),
    ],
)
def test_code_that_wants_something_else_is_left_to_generate(kind: type[Any], reason: str) -> None:
    torch.manual_seed(0)
    decoder = Decoder(kind(transformers.LlamaConfig(**TINY)).eval())
    assert decoder.unserved is not None
    assert decoder.unserved.startswith(reason)


def test_the_model_keeps_its_own_attention_after_decoding_and_after_an_error() -> None:
    model = tiny("llama", TINY)
    decoder = Decoder(model)
    [row] = rows_of(some_prompts([4]), 3, each=1)
    before = generated(model, row)
    weights = model.lm_head.weight.data.clone()
    assert greedy(decoder, [row])[0].tokens == before
    assert model.config._attn_implementation == "sdpa"
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        greedy(decoder, [row])
    assert model.config._attn_implementation == "sdpa"
    assert not [name for name in transformers.AttentionInterface() if name.startswith("cascade")]
    model.lm_head.weight.data.copy_(weights)
    assert generated(model, row) == before


# --- where rows end


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Decoder]:
    model = tiny("llama", TINY)
    return model, Decoder(model)


def test_rows_end_at_any_of_the_tokens_that_end_a_turn_and_the_others_go_on(
    llama: tuple[Any, Decoder],
) -> None:
    model, decoder = llama
    rows = rows_of(some_prompts([5, 9, 1, 3, 7, 7, 2, 8]), 24)
    endings = [greedy(decoder, [row])[0].tokens for row in rows]
    end_ids = [endings[0][2], endings[3][5], endings[7][9]]
    assert held_to_generate(model, decoder, rows, end_ids=end_ids) > 4
    lengths = {len(drawn.tokens) for drawn in greedy(decoder, rows, end_ids=end_ids)}
    assert len(lengths) > 3, "rows shall leave at different steps"


def test_one_token_each_and_rooms_of_their_own(llama: tuple[Any, Decoder]) -> None:
    model, decoder = llama
    prompts = some_prompts([5, 9, 1, 3])
    held_to_generate(model, decoder, rows_of(prompts, 1))
    rows = [Row(prompt, 0, room) for prompt, room in zip(prompts, (7, 1, 12, 3), strict=True)]
    held_to_generate(model, decoder, rows)


def test_learned_positions_are_used_up_to_the_last_and_not_beyond() -> None:
    model = tiny("gpt2", GPT | {"n_positions": 20})
    decoder = Decoder(model)
    prompts = some_prompts([15, 4, 18])
    rows = [Row(prompt, 0, min(12, 20 - len(prompt))) for prompt in prompts for _ in range(3)]
    assert held_to_generate(model, decoder, rows) == 3


def test_packing_the_batch_changes_no_row(llama: tuple[Any, Decoder]) -> None:
    model, decoder = llama
    prompts = some_prompts([5, 9, 1, 3])
    rows = [Row(prompt, n, 2 + 5 * n) for prompt in prompts for n in range(4)]
    assert held_to_generate(model, decoder, rows) > 12


def test_batches_hold_whole_prompts_up_to_rows_and_bytes(llama: tuple[Any, Decoder]) -> None:
    _, decoder = llama
    rows = rows_of(some_prompts([4] * 9), 6, each=3)
    assert decoder.bytes_per_token == 2 * 2 * 2 * 8 * 4
    everything = 2**40
    for most, at_once in ((7, everything), (1000, 70 * decoder.bytes_per_token), (1, 1)):
        batches = list(decoder.batches(rows, most, at_once))
        assert [place for batch in batches for place in batch] == list(range(len(rows)))
        for batch in batches:
            prompts = {rows[place].prompt for place in batch}
            tokens = len(prompts) * 4 + len(batch) * 6
            assert len(prompts) == 1 or (
                len(batch) <= most and tokens * decoder.bytes_per_token <= at_once
            )
        assert 1 < len(batches) <= 9


def test_prompts_whose_rows_have_ended_leave_the_memory(llama: tuple[Any, Decoder]) -> None:
    _, decoder = llama
    with torch.inference_mode():
        prefix = decoder._reader.read(some_prompts([5, 9, 3]), share=False)
        read = [weakref.ref(each) for layer in prefix.layers for each in layer]
        of_others = prefix.copy()
        Tails(of_others, np.array([0, 1, 1, 2]), 4).keep(np.array([1, 2]))
        assert all(each() is not None for each in read)
        tails = Tails(prefix, np.array([0, 1, 1, 2]), 4)
        tails.keep(np.array([1, 2]))
        assert not any(each() is not None for each in read)
    for kept in (prefix, of_others):
        assert [each.shape[0] for layer in kept.layers for each in layer] == [1] * len(read)
    assert tails.lengths_N.tolist() == [9, 9]


def test_more_rows_of_a_prompt_than_a_batch_holds_go_part_by_part(
    llama: tuple[Any, Decoder],
) -> None:
    _, decoder = llama
    rows = [Row(prompt, n, 9) for prompt in some_prompts([6, 4]) for n in range(10)]
    sampling = Sampling(max_tokens=9)
    whole, parts, few = (
        decoder.decode(rows, sampling, end_ids=(), most=most, bytes_at_once=at_once)
        for most, at_once in ((256, 2**30), (3, 2**30), (256, 4 * 9 * decoder.bytes_per_token))
    )
    assert len({tuple(drawn.tokens) for drawn in whole}) == 20
    for other in (parts, few):
        assert [drawn.tokens for drawn in other] == [drawn.tokens for drawn in whole]


def test_more_prompts_than_are_read_at_once_are_read_part_by_part(
    llama: tuple[Any, Decoder],
) -> None:
    model, _ = llama
    decoder = Decoder(model, read_at_once=20)
    for common in (0, 33):
        rows = rows_of(some_prompts([5, 9, 1, 3, 7, 7], common), 5)
        assert held_to_generate(model, decoder, rows) == 6


def test_a_beginning_that_all_prompts_share_is_read_once(llama: tuple[Any, Decoder]) -> None:
    model, decoder = llama
    read: list[tuple[int, int]] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, named: read.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    greedy(decoder, rows_of(some_prompts([3, 5, 4], common=40), 2, each=1))
    hook.remove()
    assert read == [(1, 40), (3, 5), (4, 1)]


def test_drawn_tokens_and_log_probabilities_are_those_of_plain_passes(
    llama: tuple[Any, Decoder],
) -> None:
    model, decoder = llama
    rows = rows_of(some_prompts([5, 9, 1, 3]), 12)
    sampling = Sampling(max_tokens=12, temperature=0.7, top_k=30)
    for row, drawn in zip(
        rows,
        decoder.decode(rows, sampling, end_ids=(), most=256, bytes_at_once=2**30),
        strict=True,
    ):
        ids = torch.tensor([[*row.prompt, *drawn.tokens]])
        logps_TV = model(ids).logits[0].double().log_softmax(-1)[len(row.prompt) - 1 : -1]
        wanted = logps_TV.gather(1, ids[0, len(row.prompt) :, None])[:, 0]
        assert drawn.logprobs == pytest.approx(wanted.tolist(), abs=2e-5)


def test_a_long_completion_has_the_noise_of_each_of_its_positions(
    llama: tuple[Any, Decoder],
) -> None:
    model, decoder = llama
    rows = [Row(prompt, seed, 90) for prompt in some_prompts([5, 9]) for seed in (3, 2**64 - 1)]
    sampling = Sampling(max_tokens=90, temperature=0.7)
    for row, drawn in zip(
        rows,
        decoder.decode(rows, sampling, end_ids=(), most=256, bytes_at_once=2**30),
        strict=True,
    ):
        logits_TV = model(torch.tensor([[*row.prompt, *drawn.tokens]])).logits[0].detach()
        wanted, _ = sample_with_logprob(
            logits_TV[len(row.prompt) - 1 : -1],
            temperature=0.7,
            seeds=[row.seed] * 90,
            positions=range(90),
        )
        assert drawn.tokens == wanted.tolist()


def test_the_keys_of_rows_are_freed_as_soon_as_the_rows_are_drawn(
    llama: tuple[Any, Decoder],
) -> None:
    _, decoder = llama
    gc.collect()
    gc.disable()
    try:
        greedy(decoder, rows_of(some_prompts([5, 9, 1]), 6))
        left = [each for each in gc.get_objects() if type(each) in (Tails, Prefix)]
    finally:
        gc.enable()
    assert not left


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_of_attention_are_capped_where_the_model_s_own_passes_cap_them(
    attention: str,
) -> None:
    # Where scores are large, and not in the few tokens that a model is tried on.
    model = tiny("gemma2", WIDE | {"query_pre_attn_scalar": 8, "sliding_window": 512})
    for name, weights in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weights.data.mul_(3)
    model.set_attn_implementation(attention)
    decoder = Decoder(model)
    assert decoder.unserved is None
    [row] = rows_of(some_prompts([100]), 20, each=1)
    [drawn] = decoder.decode([row], Sampling(), end_ids=(), most=1, bytes_at_once=2**30)
    logits = model(torch.tensor([[*row.prompt, *drawn.tokens]])).logits[0, 99:-1]
    plain = logits.log_softmax(-1)[range(20), drawn.tokens]
    torch.testing.assert_close(torch.tensor(drawn.logprobs), plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decodes_near_a_plain_pass_of_it(dtype: torch.dtype) -> None:
    model = tiny("qwen2", TINY).to(dtype)
    decoder = Decoder(model)
    assert decoder.unserved is None
    assert decoder.bytes_per_token == 2 * 2 * 2 * 8 * 2
    rows = rows_of(some_prompts([5, 9, 1]), 8)
    for row, drawn in zip(rows, greedy(decoder, rows), strict=True):
        ids = torch.tensor([[*row.prompt, *drawn.tokens]])
        logps_TV = model(ids).logits[0].float().log_softmax(-1)[len(row.prompt) - 1 : -1]
        wanted = logps_TV.gather(1, ids[0, len(row.prompt) :, None])[:, 0]
        assert drawn.logprobs == pytest.approx(wanted.tolist(), abs=0.15)


# --- through the engine


def opened(folder: Path, base: Checkpoint | None = None, **options: Any) -> Any:
    found = small_model.checkpoint(folder, base)
    return TransformersEngine(device="cpu", **options).open(found)


def test_stop_strings_end_rows_where_they_do_with_generate(tmp_path: Path) -> None:
    build(tmp_path, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    decoder = Decoder(model)
    prompts = [tuple(tokenizer.encode(text)) for text in ("What is 3 + 4?", "Why", "1 2 3")]
    rows = rows_of(prompts, 20)
    free = greedy(decoder, rows)
    stop = tuple(
        tokenizer.decode(drawn.tokens[place : place + 2])
        for drawn, place in zip(free[::2], (3, 8, 12), strict=False)
    )
    stops, parted = (StopStrings(tokenizer, stop, (), len(rows)) for _ in range(2))
    found = greedy(decoder, rows, stops=stops)
    mixed = [*rows[1::2], *rows[::2]]  # of one prompt in several parts, and not prompt by prompt
    in_parts = greedy(decoder, mixed, stops=parted, most=3)
    for drawn, whole in zip(in_parts, [*found[1::2], *found[::2]], strict=True):
        assert (drawn.tokens, drawn.stop_end) == (whole.tokens, whole.stop_end)
    assert parted.ends == [*stops.ends[1::2], *stops.ends[::2]]
    ended = set()
    for place, (row, drawn) in enumerate(zip(rows, found, strict=True)):
        alone = StopStrings(tokenizer, stop, (), 1)
        ids = torch.tensor([row.prompt])
        wanted = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=None,
            stopping_criteria=[alone],
        )
        assert drawn.tokens == wanted[0, ids.shape[1] :].tolist()
        assert drawn.stop_end == stops.ends[place] == alone.ends[0]
        ended.add(drawn.stop_end)
    assert len(ended) > 1


def test_an_adapter_is_sampled_as_the_model_that_it_is_merged_into(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = small_model.build(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapters.add(model, rank=4, alpha=8, dropout=0.0, targets=adapters.ALL_LINEAR, seed=0)
    torch.manual_seed(3)
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.1)
    adapters.write(model, base, base, tmp_path / "adapter")
    whole = small_model.checkpoint(base)
    laid = small_model.checkpoint(tmp_path / "adapter", whole)
    adapters.merge(laid, tmp_path / "merged")
    prompts = [small_model.question(), small_model.question("Why?")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "is sampled by transformers' generate"
        found, merged, plain = (
            policy.sample(prompts, sampling=Sampling(max_tokens=10), seeds=[[1, 2], [3, 4]])
            for policy in (
                TransformersEngine(device="cpu").open(laid),
                opened(tmp_path / "merged"),
                opened(base),
            )
        )
    assert [[each.token_ids for each in group] for group in found] == [
        [each.token_ids for each in group] for group in merged
    ]
    assert found != plain


def test_what_is_left_to_generate_is_said_and_sampled_with_the_same_draws(tmp_path: Path) -> None:
    """A model with a long rope: the short prompt is decoded here, the long one by `generate`."""
    build(tmp_path, seed=0)
    asked = [Prompt(messages=(Message(role="user", content=text),)) for text in ("Why?", "1 " * 20)]
    seeds, sampling = [[1, 2, 3], [4, 5]], Sampling(max_tokens=8, temperature=0.9)
    wanted = opened(tmp_path).sample(asked, sampling=sampling, seeds=seeds)
    config = AutoConfig.from_pretrained(tmp_path)
    lengths = [len(opened(tmp_path).prompt_ids(prompt)) for prompt in asked]
    config.rope_parameters = LONG_ROPE | {
        "short_factor": [1.0] * 16,
        "long_factor": [1.0] * 16,
        "original_max_position_embeddings": lengths[0] + 8,
        "attention_factor": 1.0,
    }
    config.save_pretrained(tmp_path)
    policy = opened(tmp_path)
    with pytest.warns(UserWarning, match="sampled by .* of a text so long"):
        found = policy.sample(asked, sampling=sampling, seeds=seeds)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.sample(asked, sampling=sampling, seeds=seeds)
    assert policy._decoder.serves(lengths[0] + 8)
    assert not policy._decoder.serves(lengths[1] + 8)
    assert [[each.token_ids for each in group] for group in found] == [
        [each.token_ids for each in group] for group in wanted
    ]

    model = tiny("gptj", GPT | {"rotary_dim": 4, "vocab_size": 1024, "eos_token_id": 4})
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="GPTJForCausalLM is sampled by .* code of its own"):
        groups = opened(tmp_path).sample(asked, sampling=sampling, seeds=seeds)
    assert [len(group) for group in groups] == [3, 2]
    scored = opened(tmp_path)
    for prompt, group in zip(asked, groups, strict=True):
        for each in group:
            ids = scored.prompt_ids(prompt)
            logps = model(torch.tensor([[*ids, *each.token_ids]])).logits[0].log_softmax(-1)
            total = logps[len(ids) - 1 : -1].gather(1, torch.tensor(each.token_ids)[:, None]).sum()
            assert each.logprob == pytest.approx(total.item(), abs=1e-3)


def test_long_texts_are_drawn_in_company_as_alone_where_positions_turn_on_the_length(
    tmp_path: Path,
) -> None:
    build(tmp_path, seed=0)
    config = AutoConfig.from_pretrained(tmp_path)
    config.rope_parameters = LONG_ROPE | {
        "short_factor": [1.0] * 16,
        "long_factor": [1.0 + n for n in range(16)],
        "original_max_position_embeddings": 40,
    }
    config.save_pretrained(tmp_path)
    asked = [Prompt(messages=(Message(role="user", content=text),)) for text in ("Why?", "1 " * 40)]
    policy, sampling = opened(tmp_path), Sampling(max_tokens=36)
    with pytest.warns(UserWarning, match="a text so long"):
        together = policy.sample(asked, sampling=sampling, seeds=[[1], [2]])
    alone = [policy.sample([asked[n]], sampling=sampling, seeds=[[n + 1]])[0] for n in (0, 1)]
    assert [each[0].token_ids for each in together] == [each[0].token_ids for each in alone]
    assert [each[0].logprob for each in together] == pytest.approx([x[0].logprob for x in alone])


def test_nothing_to_sample_loads_no_weights(tmp_path: Path) -> None:
    build(tmp_path, seed=0)
    policy = opened(tmp_path)
    long = Prompt(messages=(Message(role="user", content="1 " * 600),))
    assert policy.sample([long], sampling=Sampling(max_tokens=4), seeds=[[1, 2]]) == [[]]
    assert policy.sample([], sampling=Sampling(max_tokens=4), seeds=[]) == []
    assert policy._weights is None


def test_a_bound_on_keys_and_values_changes_the_batches_and_not_the_answers(tmp_path: Path) -> None:
    build(tmp_path, seed=0)
    asked = [Prompt(messages=(Message(role="user", content=f"{n} + {n}?"),)) for n in range(9)]
    seeds = [[n, n + 50] for n in range(9)]
    sampling = Sampling(max_tokens=6)
    answers, passes = [], []
    for bound in (None, 1e-4):
        policy, seen = opened(tmp_path, cache_gib=bound), list[int]()
        policy._model.get_input_embeddings().register_forward_hook(
            lambda module, ids, out, seen=seen: seen.append(ids[0].shape[1])
        )
        told = (
            nullcontext() if bound is None else pytest.warns(match=r"engine\.cache_gib is 0\.0001,")
        )
        with told:
            answers.append(policy.sample(asked, sampling=sampling, seeds=seeds))
        passes.append(sum(tokens > 1 for tokens in seen))
    whole, tight = answers
    assert passes[1] - passes[0] == 8  # each prompt is read by itself, and not all at once
    assert [[each.token_ids for each in group] for group in tight] == [
        [each.token_ids for each in group] for group in whole
    ]
