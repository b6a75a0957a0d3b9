"""A small model of the kind people have: ChatML, unlike the embedded one in all it can be.

A Llama with tied weights whose byte-level BPE tokenizer has a default system prompt in its chat
template, and whose generation settings name two tokens that end a turn.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from store import checkpoints
from store.records import Candidate, Checkpoint, Example, Message, Prompt

TEXT_END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
TEXTS = [
    "You are a helpful assistant. system user assistant",
    "What is the sum of 17 and 25? The answer is 42.",
    "Spell this word backward (example: sun -> nus): tree",
] * 20


def build(into: Path, seed: int = 0, *, dtype: Any = torch.float32, **changes: Any) -> Path:
    """Write the model to a folder; `changes` are of its configuration. Returns the folder."""
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(into)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": None,
        }
        | changes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
    ending = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TEXT_END)]
    model.generation_config = GenerationConfig(
        eos_token_id=ending, do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.05
    )
    model.save_pretrained(into)
    return into


def _tokenizer() -> Any:
    """Without a pad token, as many have it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[TEXT_END, TURN, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        additional_special_tokens=[TURN],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def question(text: str = "What is the sum of 17 and 25?") -> Prompt:
    return Prompt(messages=(Message(role="user", content=text),))


def checkpoint(folder: Path, base: Checkpoint | None = None) -> Checkpoint:
    """What a folder holds, as the store would say it; of an adapter, with its base."""
    found = checkpoints.measure(folder, "policy")
    if base is None:
        return found
    return replace(found, base_id=1, base_path=base.path, base_digest=base.digest)


def examples(folder: Path, count: int, *, pairs: bool = True) -> list[Example]:
    """Answers of different lengths, encoded by the folder's tokenizer, with the end of turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = []
    for number in range(count):
        text = "abc" * (1 + number % 4) + str(number)
        sides = [
            Candidate(
                text=answer,
                token_ids=(*tokenizer.encode(answer), tokenizer.eos_token_id),
                id=10 * number + side,
                asked_id=number,
                index=side,
            )
            for side, answer in enumerate((text, text[::-1] + "xy" * (number % 3)))
        ]
        made.append(
            Example(
                kind="pair" if pairs else "demonstration",
                asked_id=number,
                prompt=question(f"the sum {number}"),
                chosen=sides[0],
                rejected=sides[1] if pairs else None,
                rule="test",
                id=100 + number,
            )
        )
    return made
