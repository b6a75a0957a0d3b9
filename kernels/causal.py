"""What of a causal model of Hugging Face's the ops need: its body, its head, and what it does to
the logits.

The head is multiplied by the ops, not by the model, so what the model does to its logits is read
from its configuration and held to the model's own logits once, on a few tokens. A model whose
logits come out otherwise is told as one that has no head to multiply by.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class Head(NamedTuple):
    """softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature are the logits.

    The names are those that linear_logprob takes.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    temperature: float


class _Shape(NamedTuple):
    softcap: float | None
    temperature: float


_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configurations call a cap on logits: Gemma's, RecurrentGemma's and xLSTM's."""
_A_CAP = re.compile(r"soft_?cap(ping)?")
_INSIDE = re.compile(r"(attn|attention|gate|router)_")
"""In the names of caps within a body."""

_checked: WeakKeyDictionary[nn.Module, tuple[type, _Shape | None]] = WeakKeyDictionary()
"""Of what class a model's output layer was, and what was found of it."""


def backbone(model: Any) -> Any:
    """The model below its head, adapters included, wrapped in a PeftModel or not."""
    model = bare(model)
    # A few name a body that they do not have, and are then their own.
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def bare(model: Any) -> Any:
    """The causal model itself, out of the PeftModel that may be around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def read_head(model: Any) -> Head | None:
    """The model's head; None when its logits are not what a head's product makes of them.

    That is when the output layer is no plain linear layer (quantised, or with an adapter on it),
    or when the model's own logits differ from what its configuration says of them. Why it is None
    is told as a warning, once for each model and class of output layer.
    """
    model = bare(model)
    head = model.get_output_embeddings()
    # An adapter may be laid over the output layer of a model that was read before.
    if model not in _checked or _checked[model][0] is not type(head):
        said = _told(model, head)
        _checked[model] = (type(head), None if isinstance(said, str) else said)
        if isinstance(said, str):
            warnings.warn(
                f"{type(model).__name__} is scored by its own logits, which takes more memory: "
                f"{said}",
                stacklevel=2,
            )
    shape = _checked[model][1]
    return None if shape is None else Head(head.weight, head.bias, *shape)


def _told(model: Any, head: Any) -> _Shape | str:
    """How the model shapes its logits, or why that cannot be said."""
    # By its class and not its kin: quantised and adapted layers are nn.Linear to isinstance.
    if type(head) is not nn.Linear:
        return f"its output layer is a {type(head).__name__} and no plain linear layer"
    if backbone(model) is model:
        return "it has no body of its own below its head"
    config = model.config.get_text_config()
    scale = logit_scale(config)
    if not scale > 0:
        return f"its logits are scaled by {scale}"
    # Small logits, as fresh weights make them, are the same with a cap and without.
    if unread := _numbers(config, set(_caps_of(config)) - set(_CAPS)):
        return f"what its {next(iter(unread))} caps is not known"
    if len(told := _numbers(config, _CAPS)) > 1:
        return f"it has several caps, {' and '.join(told)}"
    cap = next(iter(told.values()), None)
    # cap * tanh(scale * z / cap) = scale * (cap / scale) * tanh(z / (cap / scale))
    shape = _Shape(None if cap is None else cap / scale, 1 / scale)
    with undisturbed(model), torch.no_grad():
        ids = few_ids(model, 5)
        # Its class's forward: trainers put autocast around the object's.
        own_TV = type(model).forward(model, input_ids=ids).logits[0]
        hidden_TH = backbone(model)(input_ids=ids).last_hidden_state[0]
        if hidden_TH.shape[-1] != head.weight.shape[1]:
            return f"its body ends in {hidden_TH.shape[-1]} numbers a token"
        found_TV = logits(hidden_TH, Head(head.weight, head.bias, *shape))
    if not alike(own_TV, found_TV):
        far = (own_TV - found_TV).abs().max().item()
        return f"its logits are up to {far:.3g} off what its configuration says of them"
    return shape


def _caps_of(config: Any) -> Iterator[str]:
    """The names in a configuration of caps that are not known to lie within the body."""
    return (name for name in dir(config) if _A_CAP.search(name) and not _INSIDE.search(name))


def _numbers(config: Any, names: Iterable[str]) -> dict[str, float]:
    found = {name: getattr(config, name, None) for name in sorted(names)}
    return {name: float(each) for name, each in found.items() if isinstance(each, (int, float))}


def logits(hidden: Tensor, head: Head) -> Tensor:
    """The logits of each row: [N, H] to [N, V], in the dtype of the product."""
    found = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    if head.softcap is not None:
        found = head.softcap * torch.tanh(found / head.softcap)
    return found / head.temperature


def logit_scale(config: Any) -> float:
    """What the model multiplies its logits by, before they are capped.

    Source: TRL 1.16, trl/trainer/utils.py, add_fused_lm_head.
    """
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        found = getattr(config, name, None)
        if found is not None:
            return float(found)
    found = getattr(config, "logits_scaling", None)
    if found is None:
        return 1.0
    return float(found) if config.model_type == "hyperclovax" else 1 / float(found)


def few_ids(model: Any, count: int) -> Tensor:
    """[1, count] token ids from all over the vocabulary."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    return torch.arange(1, 7919 * count, 7919, device=model.device)[None] % rows


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two computations of the same numbers may be taken for one: they lie as far apart as
    roundings on the way take them, and not as far as another formula would. NaN is like NaN."""
    if one.isnan().any() or other.isnan().any():
        return bool((one.isnan() == other.isnan()).all())
    narrow = one.dtype in (torch.bfloat16, torch.float16)
    off, size = (one.double() - other.double()).norm(), one.double().norm()
    return bool(off <= (0.03 if narrow else 2e-3) * size)


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """The model without dropout and outside of autocast, and afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True


def fixed_positions(config: Any) -> int | None:
    """Up to how many tokens a token's position does not hang on the length of its batch; None is
    always.

    Some rotary embeddings turn otherwise for a whole batch once its longest row passes a length.
    """
    lasting, config = lasting_positions(config), config.get_text_config()
    kinds = [each for each in _ropes(config) if each["rope_type"] == "longrope"]
    if not kinds:
        return lasting
    stated = [each.get("original_max_position_embeddings") for each in kinds]
    stated += [getattr(config, "original_max_position_embeddings", None), lasting]
    return min([*filter(None, stated)], default=int(config.max_position_embeddings))


def lasting_positions(config: Any) -> int | None:
    """Up to how many tokens in each text positions do not hang on what passed before; None is any.

    Dynamic rotary embeddings are stretched to the longest text that has passed, until one passes
    that is shorter than the context.
    Source: transformers 5.19, modeling_rope_utils.py, dynamic_rope_update.
    """
    config = config.get_text_config()
    dynamic = any(each["rope_type"] == "dynamic" for each in _ropes(config))
    return int(config.max_position_embeddings) if dynamic else None


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    waiting = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            if isinstance(found.get("rope_type"), str):
                yield found
            waiting += found.values()
