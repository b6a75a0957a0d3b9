"""Write the embedded model: a small Llama that knows nothing yet, with tokenizer and template.

It lets a run begin on a machine that reaches no model hub. Weights and tokenizer follow from the
seed and the constants below alone, so two machines begin from the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from roles.policy.folders import quiet

HIDDEN = 192
LAYERS = 2
HEADS = 6
INTERMEDIATE = 576
POSITIONS = 512
VOCABULARY = 430

PAD, USER, SYSTEM, ASSISTANT, END = "<|pad|>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>"

# What the tokenizer learns its merges from: tasks that are quick to make and written in the words
# that reasoning-gym's prompts use.
TASKS = (
    "basic_arithmetic",
    "chain_sum",
    "gcd",
    "letter_counting",
    "products",
    "spell_backward",
)
PROMPTS_PER_TASK = 100

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build(into: Path, seed: int) -> None:
    """Write the model to the folder `into`. The same seed writes the same bytes."""
    tokenizer = _tokenizer()
    config = configuration(
        len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with quiet():
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)


def configuration(vocabulary: int = VOCABULARY, **more: Any) -> LlamaConfig:
    """The model's, so that its size can be told without making it."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.05,  # such a small model starts learning sooner than from 0.02
        bos_token_id=None,
        **more,
    )


def _tokenizer() -> Any:
    """Byte-level BPE in which every digit is a token: sums are then learnt digit by digit."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, USER, SYSTEM, ASSISTANT, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, SYSTEM, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=POSITIONS,
    )


def _texts() -> Iterator[str]:
    # The tasks' own seed is fixed: the seed of a run shall not change its vocabulary.
    for task in TASKS:
        for entry in reasoning_gym.create_dataset(task, size=PROMPTS_PER_TASK, seed=0):
            yield entry["question"]
            yield str(entry["answer"])
