"""How large a model is, from its configuration alone: its weights are counted and never read.

The model is made on torch's meta device, where a tensor has a shape and no memory, so a model of
70 B parameters is counted in seconds on a laptop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roles.policy.adapters import ALL_LINEAR
from roles.policy.folders import quiet
from store.errors import UserError


@dataclass(frozen=True)
class Shape:
    """What of a model decides how much memory it takes. Numbers are counts, not bytes."""

    parameters: int
    """Weights that are tied are counted once."""
    linear: tuple[tuple[str, int, int], ...]
    """Name, inputs and outputs of each linear layer but the head."""
    hidden: int
    layers: int
    heads: int
    query: int
    """Numbers of a token's queries in a layer: heads times their dimension."""
    keys: int
    """Numbers of a token's keys in a layer; its values are as many."""
    inner: int
    """Width of a layer's MLP, of a routed one that of the experts that a token goes to."""
    vocabulary: int
    context: int | None
    stored_bytes: int
    """Of one weight, as the configuration says that they are stored."""

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def multiplied(self) -> int:
        """Weights of all linear layers but the head."""
        return sum(inputs * outputs for _, inputs, outputs in self.linear)

    @property
    def cached(self) -> int:
        """Numbers that are kept of each token while a text is continued."""
        return 2 * self.layers * self.keys

    def adapter(self, rank: int, targets: str | Sequence[str] = ALL_LINEAR) -> int:
        """Weights of a low-rank adapter over these layers."""
        over = [
            inputs + outputs
            for name, inputs, outputs in self.linear
            if targets == ALL_LINEAR or any(f".{name}".endswith(f".{target}") for target in targets)
        ]
        return rank * sum(over)


def read(path: str | Path) -> Shape:
    """Of a folder, or of a Hub id, of which config.json alone is fetched.

    Raises UserError where no model can be made of the configuration.
    """
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"the configuration of {str(path)!r} cannot be had: {said}") from error
    return of(config)


def of(config: Any) -> Shape:
    """Of a configuration of transformers. Raises UserError where no model can be made of it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    scores = any("SequenceClassification" in each for each in config.architectures or ())
    kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    try:
        with quiet(), torch.device("meta"):
            model = kind.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"no model can be made of a configuration of the kind {config.model_type!r}: {said}"
        ) from error
    text = config.get_text_config()
    heads = text.num_attention_heads
    dimension = getattr(text, "head_dim", None) or text.hidden_size // heads
    stored = config.dtype or torch.float32
    return Shape(
        parameters=sum(each.numel() for each in model.parameters()),
        linear=tuple(_linear(model)),
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        query=heads * dimension,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * dimension,
        inner=_inner(text),
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", None),
        stored_bytes=stored.itemsize,
    )


def _linear(model: Any) -> list[tuple[str, int, int]]:
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        (name, *reversed(module.weight.shape))
        if isinstance(module, torch.nn.Linear)
        else (name, *module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]


def _inner(text: Any) -> int:
    routed = getattr(text, "num_experts_per_tok", None)
    if routed and (width := getattr(text, "moe_intermediate_size", None)):
        return int(routed * width)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None)
    return int((inner or 4 * text.hidden_size) * (routed or 1))
