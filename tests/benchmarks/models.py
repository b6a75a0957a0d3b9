"""Models of random weights, and what a pass of one computed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from table import Figures

from store.records import Checkpoint


def llama(
    *, vocabulary: int, hidden: int, layers: int, positions: int, seed: int = 0, **more: Any
) -> Any:
    """A Llama with heads of 64; `more` are other fields of its LlamaConfig."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "intermediate_size": -(-8 * hidden // 96) * 32,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        **more,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            max_position_embeddings=positions,
            **shape,
        )
    )


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(
        model="policy", path=folder, digest="d", tokenizer_digest="t", template_digest="c", bytes=1
    )


def figures(loss: float, trained: Iterable[Any]) -> Figures:
    """The loss, and the norm of the gradients of all that is trained."""
    import torch

    grads = [each.grad.double().norm() for each in trained if each.grad is not None]
    return {"loss": loss, "grad_norm": torch.stack(grads).norm().item()}
