"""What is read of a causal model is what the model does."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from kernels.causal import backbone, fixed_positions, lasting_positions, logits, read_head
from roles.policy import adapters

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
PLAIN: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.3},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "RecurrentGemma": {
        "logits_soft_cap": 3.0,
        "lru_width": 32,
        "head_dim": 8,
        "attention_window_size": 16,
    },
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "FalconH1": {
        "lm_head_multiplier": 0.3,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
}


def make(kind: str, **changes: Any) -> Any:
    """A model of another kind, with weights large enough that caps and windows tell."""
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    config._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = parameter.data + 0.1 * noise if parameter.dim() == 1 else 0.2 * noise
    return model.eval()


IDS = torch.tensor([[5, 90, 3, 17, 44, 2]])


@pytest.mark.parametrize("kind", PLAIN)
def test_a_head_makes_the_models_own_logits(kind: str) -> None:
    model = make(kind, **PLAIN[kind]).double()
    head = read_head(model)
    assert head is not None
    with torch.no_grad():
        own = model(input_ids=IDS).logits
        found = logits(backbone(model)(input_ids=IDS).last_hidden_state, head)
    torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-9)
    assert head.weight is model.get_output_embeddings().weight


def test_an_adapter_is_in_the_body_and_not_in_the_way() -> None:
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = make("Llama")
    bare_logits = model(input_ids=IDS).logits
    wrapped = peft.get_peft_model(model, config).eval()
    laid_over = make("Llama")
    adapters.add(laid_over, rank=2, alpha=4.0, dropout=0.5, targets="all-linear", seed=1)
    for name, parameter in laid_over.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter)
    for adapted in (wrapped, laid_over.train()):
        head = read_head(adapted)
        assert head is not None
        assert not head.weight.requires_grad
        with torch.no_grad():
            found = logits(backbone(adapted.eval())(input_ids=IDS).last_hidden_state, head)
            torch.testing.assert_close(found, adapted(input_ids=IDS).logits)
        assert not torch.allclose(found, bare_logits, atol=0.1)


CAPPED = {kind: PLAIN[kind] for kind in ("Gemma2", "RecurrentGemma")} | {
    # Whose logits are float32 in any dtype.
    "xLSTM": {
        "output_logit_soft_cap": 3.0,
        "num_heads": 4,
        "qk_dim_factor": 2.0,
        "v_dim_factor": 2.0,
    }
}


@pytest.mark.parametrize("kind", CAPPED)
def test_a_cap_is_read_though_logits_are_still_too_small_to_tell(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**SIZES | CAPPED[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    head = read_head(model)
    assert head is not None
    assert head.softcap == 3.0
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)
        own = model(input_ids=IDS).logits
        found = logits(backbone(model)(input_ids=IDS).last_hidden_state, head)
    assert own.abs().max() > 2
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


def test_a_cap_of_an_unknown_name_is_not_taken_for_none() -> None:
    for name in ("lm_head_softcap", "output_softcapping", "soft_cap"):
        model = make("Llama")
        setattr(model.config, name, 1e4)
        with pytest.warns(UserWarning, match=f"what its {name} caps is not known"):
            assert read_head(model) is None
    for name in ("attn_logit_softcapping", "gate_soft_cap", "moe_router_logit_softcapping"):
        model = make("Llama")
        setattr(model.config, name, 5.0)
        assert read_head(model) is not None
    model = make("Gemma2", **PLAIN["Gemma2"])
    model.config.logits_soft_cap = 3.0
    said = "it has several caps, final_logit_softcapping and logits_soft_cap"
    with pytest.warns(UserWarning, match=said):
        assert read_head(model) is None


class Rounded(nn.Linear):
    """As quantised layers are: linear to isinstance, and something else to multiply by."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).round()


class Doubled(transformers.LlamaForCausalLM):
    """A model that does to its logits what no configuration tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = 2 * found.logits
        return found


def unreadable() -> dict[str, Any]:
    quantised, adapted, doubled = make("Llama"), make("Llama"), make("Llama")
    quantised.lm_head = Rounded(32, 97, bias=False)
    adapted.add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    doubled.__class__ = Doubled
    scaled = make("Cohere", logit_scale=-1.0)
    return {
        "Rounded and no plain linear layer": quantised,
        "Linear and no plain linear layer": adapted,
        "off what its configuration says": doubled,
        "scaled by -1": scaled,
    }


def test_a_model_that_makes_its_logits_otherwise_is_told_once_and_has_no_head() -> None:
    for said, model in unreadable().items():
        with pytest.warns(UserWarning, match=said):
            assert read_head(model) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_head(model) is None


def test_an_adapter_laid_over_a_head_that_was_read_is_noticed_and_its_removal_too() -> None:
    model = make("Llama")
    assert read_head(model) is not None
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.warns(UserWarning, match="Linear and no plain linear layer"):
        assert read_head(model) is None
    model.lm_head = model.lm_head.base_layer
    head = read_head(model)
    assert head is not None
    assert head.weight is model.lm_head.weight


class Interrupted(transformers.LlamaForCausalLM):
    """A model whose first pass is cut short."""

    passes = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.passes += 1
        if self.passes == 1:
            raise MemoryError
        return super().forward(*args, **kwargs)


def test_a_check_that_is_cut_short_is_made_again() -> None:
    model = make("Llama")
    model.__class__ = Interrupted
    with pytest.raises(MemoryError):
        read_head(model)
    assert read_head(model) is not None


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = make("Llama", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert read_head(model) is not None
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_a_trainer_wraps_around_a_model_is_not_the_model() -> None:
    model = make("Llama")
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16
    assert read_head(model) is not None


def test_a_model_of_nan_has_a_head() -> None:
    model = make("Llama")
    model.model.norm.weight.data.fill_(float("nan"))
    assert read_head(model) is not None


def test_the_head_is_the_one_that_the_model_has_now() -> None:
    model = make("Llama")
    first = read_head(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(97, 32))
    second = read_head(model)
    assert first is not None
    assert second is not None
    assert second.weight is model.lm_head.weight
    assert second.weight is not first.weight


ROPE: dict[str, Any] = {"rope_theta": 1e4, "factor": 4.0}
LONG: dict[str, Any] = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}


@pytest.mark.parametrize(
    ("kind", "more", "fixed", "lasting"),
    [
        ("linear", {}, None, None),
        ("longrope", LONG | {"original_max_position_embeddings": 12}, 12, None),
        ("dynamic", {}, 16, 16),
        ("dynamic", {"original_max_position_embeddings": 12}, 16, 16),
    ],
)
def test_up_to_a_length_positions_turn_neither_on_other_rows_nor_on_earlier_texts(
    kind: str, more: dict[str, Any], fixed: int | None, lasting: int | None
) -> None:
    rope = ROPE | more | {"rope_type": kind}

    def model() -> Any:
        return make("Llama", max_position_embeddings=16, rope_parameters=rope)

    def last(model: Any, tokens: int, longest: int = 0) -> torch.Tensor:
        """Of a text, padded on the right to the length of a longer one."""
        ids = torch.zeros(1, max(tokens, longest), dtype=torch.int64)
        ids[0, :tokens] = torch.arange(1, tokens + 1)
        with torch.no_grad():
            hidden: torch.Tensor = backbone(model)(input_ids=ids).last_hidden_state
        return hidden[0, tokens - 1]

    def same(one: torch.Tensor, other: torch.Tensor) -> bool:
        return torch.allclose(one, other, rtol=1e-4, atol=1e-5)

    used, limit = model(), fixed or 16
    assert fixed_positions(used.config) == fixed
    assert lasting_positions(used.config) == lasting
    last(used, limit)
    for longest in (9, limit):
        assert same(last(used, 9, longest), last(model(), 9))
    assert same(last(used, 9, limit + 1), last(model(), 9)) == (fixed is None)
    last(used, 30)
    assert same(last(used, limit + 1), last(model(), limit + 1)) == (lasting is None)
