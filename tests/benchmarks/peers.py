"""The loop's parts as they are had elsewhere, to hold ours against: `generate` and TRL's trainers.

Plug-ins like any other: `--set engine.use=tests/benchmarks/peers.py:Generate`,
`--set trainer.use=tests/benchmarks/peers.py:Dpo`. They do the same work on the same data: the same
prompts become the same tokens, and the trainers get the token ids that were sampled (TRL's own
tokenising, which costs time and may change them, is left out), steps of the same examples in the
same order, and the same objective. Everything else is as those libraries have it by default;
`tuned` takes what they offer to make it cheaper.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from roles.policy.encoding import prompt_ids
from roles.policy.folders import quiet, save
from store.errors import UserError
from store.records import (
    Call,
    Checkpoint,
    Completion,
    Example,
    ExampleKind,
    Prompt,
    Sampling,
    TokenLogprobs,
    Training,
    TrainingStep,
)

Schedule = Literal["linear", "cosine"]


class Generate:
    """Opens checkpoints that are sampled by `generate` and scored by whole logits, in float32.

    rows: completions of one call of `generate`, and rows of a scoring pass.
    """

    def __init__(self, rows: int = 256) -> None:
        self.rows = rows

    def open(self, checkpoint: Checkpoint) -> GeneratePolicy:
        return GeneratePolicy(checkpoint, self.rows)


class GeneratePolicy:
    """One checkpoint."""

    def __init__(self, checkpoint: Checkpoint, rows: int) -> None:
        self._rows = rows
        with quiet():
            self._tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, padding_side="left")
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.path, dtype=torch.float32
            )
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._positions = int(self._model.config.max_position_embeddings)

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """A batch of prompts, padded on the left, with `num_return_sequences` answers to each."""
        if sampling.stop:
            raise UserError(f"this peer ends at no stop strings, found {sampling.stop}")
        answers: list[list[Completion]] = [[] for _ in prompts]
        fitting = [n for n, prompt in enumerate(prompts) if self.room(prompt) > 0]
        for count in sorted({len(seeds[n]) for n in fitting}):
            asked = [n for n in fitting if len(seeds[n]) == count]
            at_once = max(1, self._rows // count)
            for first in range(0, len(asked), at_once):
                batch = asked[first : first + at_once]
                found = self._sample([prompts[n] for n in batch], sampling, count, seeds[batch[0]])
                for n, group in zip(batch, found, strict=True):
                    answers[n] = group
        return answers

    def _sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, count: int, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        drawn = sampling.temperature > 0
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        padded = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        room = min(sampling.max_tokens, *(self.room(prompt) for prompt in prompts))
        torch.manual_seed(seeds[0])
        with torch.inference_mode():
            rows_RT = self._model.generate(
                **padded,
                generation_config=GenerationConfig(
                    do_sample=drawn,
                    num_return_sequences=count if drawn else 1,
                    max_new_tokens=room,
                    eos_token_id=self._tokenizer.eos_token_id,
                    pad_token_id=self._tokenizer.pad_token_id,
                    **self._drawing(sampling) if drawn else {},
                ),
            )
        ends = rows_RT[:, padded["input_ids"].shape[1] :].tolist()
        each = count if drawn else 1
        groups = [ends[first : first + each] for first in range(0, len(ends), each)]
        return [
            [self._completion(ids, sampling) for ids in (group if drawn else group * count)]
            for group in groups
        ]

    def _drawing(self, sampling: Sampling) -> dict[str, Any]:
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,  # left out, it would be 50
        }

    def _completion(self, ids: list[int], sampling: Sampling) -> Completion:
        end = self._tokenizer.eos_token_id
        stopped = end in ids
        kept = ids[: ids.index(end) + 1] if stopped else ids
        return Completion(
            text=self.decode(kept),
            token_ids=tuple(kept),
            finish_reason="stop" if stopped else "length",
            sampling=sampling,
        )

    def logprobs(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        dropout_seed: int | None = None,
    ) -> list[TokenLogprobs]:
        """By the logits of all positions of all rows, in the order they come."""
        if dropout_seed is not None:
            raise UserError("this peer scores without dropout")
        scored: list[TokenLogprobs] = []
        for first in range(0, len(prompts), self._rows):
            batch = slice(first, first + self._rows)
            starts = [self.prompt_ids(prompt) for prompt in prompts[batch]]
            ends = [list(completion.token_ids) for completion in completions[batch]]
            rows = [start + end for start, end in zip(starts, ends, strict=True)]
            padded = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            with torch.inference_mode():
                logits_RTV = self._model(**padded).logits[:, :-1].float()
                logps_RT = (
                    logits_RTV.log_softmax(-1)
                    .gather(-1, padded["input_ids"][:, 1:, None])
                    .squeeze(-1)
                )
            scored += [
                TokenLogprobs(logprobs=tuple(logps_T[len(logps_T) - len(end) :].tolist()))
                for logps_T, end in zip(logps_RT, ends, strict=True)
            ]
        return scored

    def write(self, text: str) -> Completion:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return Completion(text=text, token_ids=(*ids, self._tokenizer.eos_token_id))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return prompt_ids(self._tokenizer, prompt)

    def room(self, prompt: Prompt) -> int:
        return self._positions - len(self.prompt_ids(prompt))

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def close(self) -> None:
        self._model = None


class _Trained:
    """What the two trainers have in common: options, arguments and what is left in the folder.

    TRL's defaults: bfloat16 over float32 weights, gradient checkpointing, and for the reference a
    second model that runs beside the first at every step.

    tuned: no checkpointing, and the reference's log-probabilities are computed beforehand.
    bf16: False computes in float32, as ours does on a CPU.
    """

    learns_from: ExampleKind

    def __init__(
        self,
        learning_rate: float = 1e-6,
        epochs: float = 1.0,
        batch_size: int = 32,
        schedule: Schedule = "linear",
        warmup_ratio: float = 0.1,
        weight_decay: float = 0.0,
        tuned: bool = False,
        bf16: bool = True,
    ) -> None:
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.batch_size = batch_size
        self.schedule = schedule
        self.warmup_ratio = warmup_ratio
        self.weight_decay = weight_decay
        self.tuned = tuned
        self.bf16 = bf16

    def _arguments(self, config: Any, examples: int, into: Path, call: Call, **extra: Any) -> Any:
        steps = math.ceil(self.epochs * math.ceil(examples / self.batch_size))
        if self.tuned:
            extra["gradient_checkpointing"] = False
        return config(
            output_dir=str(into / "saves"),
            learning_rate=self.learning_rate,
            per_device_train_batch_size=self.batch_size,
            max_steps=steps,
            warmup_steps=int(self.warmup_ratio * steps),
            lr_scheduler_type=self.schedule,
            weight_decay=self.weight_decay,
            # The order of ours, so that both take the same steps.
            seed=call.seed_for("train") % 2**31,
            data_seed=call.seed_for("shuffle") % 2**31,
            use_cpu=not torch.cuda.is_available(),
            logging_first_step=True,
            bf16=self.bf16,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **extra,
        )

    def _run(self, trainer: Any, start: Checkpoint, into: Path) -> Training:
        trainer.train()
        save(trainer.model, start.path, into)
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
        steps = tuple(
            TrainingStep(
                step=each["step"],
                loss=each["loss"],
                metrics={
                    name: float(value)
                    for name, value in each.items()
                    if name not in ("step", "loss") and math.isfinite(value)
                },
            )
            for each in trainer.state.log_history
            if "loss" in each
        )
        return Training(status="trained", steps=steps)


class Dpo(_Trained):
    """TRL's DPOTrainer."""

    learns_from: ExampleKind = "pair"

    def __init__(
        self,
        loss: str = "sigmoid",
        beta: float = 0.1,
        nll_weight: float = 0.0,
        learning_rate: float = 1e-6,
        epochs: float = 1.0,
        batch_size: int = 32,
        schedule: Schedule = "linear",
        warmup_ratio: float = 0.1,
        weight_decay: float = 0.0,
        tuned: bool = False,
        bf16: bool = True,
    ) -> None:
        super().__init__(
            learning_rate, epochs, batch_size, schedule, warmup_ratio, weight_decay, tuned, bf16
        )
        self.loss, self.beta, self.nll_weight = loss, beta, nll_weight

    def train(
        self,
        examples: Sequence[Example],
        start: Checkpoint,
        reference: Checkpoint,
        into: Path,
        call: Call,
    ) -> Training:
        if reference.path.resolve() != start.path.resolve():
            raise UserError("TRL by default takes the start for the reference")
        names, weights = [self.loss], [1.0]
        if self.nll_weight:
            names, weights = [*names, "sft"], [*weights, self.nll_weight]
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(start.path)
            trainer = _OnIds(
                model=str(start.path),
                args=self._arguments(
                    DPOConfig,
                    len(examples),
                    into,
                    call,
                    beta=self.beta,
                    loss_type=names,
                    loss_weights=weights,
                    precompute_ref_log_probs=self.tuned,
                ),
                train_dataset=Dataset.from_list([_pair(tokenizer, each) for each in examples]),
                processing_class=tokenizer,
            )
            return self._run(trainer, start, into)


class _OnIds(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer of data that is tokenised already, which only its SFTTrainer takes."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        pass


def _pair(tokenizer: Any, example: Example) -> dict[str, list[int]]:
    assert example.rejected is not None
    return {
        "prompt_ids": prompt_ids(tokenizer, example.prompt),
        "chosen_ids": list(example.chosen.token_ids),
        "rejected_ids": list(example.rejected.token_ids),
    }


class Sft(_Trained):
    """TRL's SFTTrainer."""

    learns_from: ExampleKind = "demonstration"

    def train(
        self,
        examples: Sequence[Example],
        start: Checkpoint,
        reference: Checkpoint,
        into: Path,
        call: Call,
    ) -> Training:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(start.path)
            rows = []
            for each in examples:
                prompt, answer = prompt_ids(tokenizer, each.prompt), list(each.chosen.token_ids)
                mask = [0] * len(prompt) + [1] * len(answer)
                rows.append({"input_ids": prompt + answer, "completion_mask": mask})
            trainer = SFTTrainer(
                model=str(start.path),
                args=self._arguments(
                    SFTConfig, len(examples), into, call, completion_only_loss=True
                ),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
            return self._run(trainer, start, into)
