"""A model folder, read and written: weights, and what lies beside them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_COMPANIONS = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe"}
_OF_WEIGHTS = {"config.json", "adapter_config.json"}
_TEMPLATES = "additional_chat_templates"


def load_whole(folder: Path, dtype: Any, four_bit_on: str | None = None) -> Any:
    """The model of a folder that holds whole weights, on the CPU or where four_bit_on says.

    four_bit_on: the device, cuda or cpu, on which the weights of linear layers but the head are
    held in 4 bits, as NF4 with scales that are quantized themselves; dtype is then of the
    arithmetic and of the rest, to which the experts of most routed models belong.
    Source: "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314).
    Its generation settings are left out: people's are often such as transformers refuses to save.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    narrow = {} if four_bit_on is None else _in_4_bits(dtype, four_bit_on)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **narrow)
    for module in model.modules() if narrow else ():
        # Some CPUs would score in bfloat16 what they train in `dtype`.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.generation_config = GenerationConfig()
    return model


def _in_4_bits(dtype: Any, device: str) -> dict[str, Any]:
    """What from_pretrained is told besides."""
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    # Trainer leaves such a model where it is.
    place = torch.cuda.current_device() if device == "cuda" else device
    return {"quantization_config": config, "device_map": {"": place}}


def save(model: Any, like: Path, into: Path) -> None:
    """Save the model to a folder, with the tokenizer, chat templates and generation settings that
    lie in the folder `like`.

    Those are copied and not saved anew, so that they are to the byte what they were: a tokenizer
    that is saved by another version than it was written by can encode differently.
    """
    with quiet():
        model.save_pretrained(into)
    (into / "generation_config.json").unlink(missing_ok=True)
    for path in sorted(like.iterdir()):
        of_weights = path.name in _OF_WEIGHTS or path.name.endswith(".index.json")
        companion = path.suffix in _COMPANIONS or path.name.startswith("tokenizer.model.")
        if path.is_file() and companion and not of_weights:
            shutil.copyfile(path, into / path.name)
    if (like / _TEMPLATES).is_dir():
        shutil.copytree(like / _TEMPLATES, into / _TEMPLATES, dirs_exist_ok=True)


def stored_dtype(model: Path) -> Any:
    """The torch.dtype that a model folder's weights are stored in, as its configuration says."""
    import torch
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).dtype or torch.float32


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and remarks, which would break the loop's own display."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
