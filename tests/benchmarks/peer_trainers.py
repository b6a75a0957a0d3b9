"""TRL's own trainers in place of ours, to hold a round of ours against.

Plug-ins like any other: `--set trainer.use=tests/benchmarks/peer_trainers.py:Dpo`. They do the same
work on the same data: they get the token ids that were sampled (TRL's own tokenising, which costs
time and may change them, is left out), steps of the same examples in the same order, and the same
objective. Everything else is as TRL has it by default; `tuned` takes what it offers to make it
cheaper.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from kernels.matmul import fast_float32
from roles.policy.encoding import prompt_ids
from roles.policy.folders import quiet, save
from store.errors import UserError
from store.records import Call, Checkpoint, Example, ExampleKind, Training, TrainingStep


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """What the two trainers have in common: options, arguments and what is left in the folder.

    TRL's defaults: bfloat16 over float32 weights, gradient checkpointing, and for the reference a
    second model that runs beside the first at every step.

    tuned: no checkpointing, the reference's log-probabilities are computed beforehand, and what is
    float32 is multiplied as fast as ours does. It stays in bfloat16: of the embedded model, 320
    pairs take 1.7 s so and 2.4 s in float32, on an EPYC that has bfloat16 products.
    bf16: False computes in float32, as ours does on a CPU.
    """

    learns_from: ClassVar[ExampleKind]
    learning_rate: float = 1e-6
    epochs: float = 1.0
    batch_size: int = 32
    schedule: Literal["linear", "cosine"] = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    tuned: bool = False
    bf16: bool = True

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

    def _products(self) -> AbstractContextManager[None]:
        return fast_float32() if self.tuned else nullcontext()

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


@dataclass(frozen=True, kw_only=True)
class Dpo(_Trained):
    """TRL's DPOTrainer."""

    learns_from = "pair"
    loss: str = "sigmoid"
    beta: float = 0.1
    nll_weight: float = 0.0

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
        with quiet(), self._products():
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


@dataclass(frozen=True, kw_only=True)
class Sft(_Trained):
    """TRL's SFTTrainer."""

    learns_from = "demonstration"

    def train(
        self,
        examples: Sequence[Example],
        start: Checkpoint,
        reference: Checkpoint,
        into: Path,
        call: Call,
    ) -> Training:
        with quiet(), self._products():
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
