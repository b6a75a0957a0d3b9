"""Models of random weights, what a pass of one computed, and how it multiplies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from passes import Pass
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


def fast(passed: Pass) -> Pass:
    """With the float32 products of ours, for a peer that would have torch's default.

    Without them a ratio in float32 would be in part one of two libraries. A user has the same by
    `torch.set_float32_matmul_precision("medium")`.
    """
    from kernels.matmul import fast_float32

    def run() -> None:
        with fast_float32():
            passed.run()

    return Pass(run, passed.agreement)
