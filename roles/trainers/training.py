"""One training, from examples to weights in a folder, whatever its loss.

Hugging Face's Trainer walks the batches; around it lies what a loop that can be killed needs:
whole saves, an end when a number is not finite any more, and nothing left behind but the weights.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from roles.trainers import saves
from roles.trainers.guards import Diverged, Watch, quiet
from roles.trainers.options import OPERATIONAL, Options
from roles.trainers.rows import Row, encode
from store.errors import UserError
from store.records import Call, Checkpoint, Example, Training, TrainingStep

# Cumulative since the process began, so a training that was killed would report other numbers.
_NOT_METRICS = {"step", "loss", "num_tokens"}


@dataclass(frozen=True)
class Session:
    """What stays the same from the beginning of a training to its end, kills included."""

    options: Options
    rows: Sequence[Row]
    tokenizer: Any
    start: Checkpoint
    into: Path
    call: Call
    device: str
    dtype: torch.dtype
    newest: Path | None = None
    """The save to go on from."""

    @property
    def saves(self) -> Path:
        return self.into / "saves"

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        options = self.options
        total = math.ceil(options.epochs * math.ceil(len(self.rows) / options.batch_size))
        return total if options.max_steps is None else min(total, options.max_steps)

    def arguments(self, config: Callable[..., Any], **extra: Any) -> Any:
        """A TRL config for this training."""
        options = self.options
        schedule = options.schedule
        arguments = config(
            output_dir=str(self.saves),
            learning_rate=options.learning_rate,
            per_device_train_batch_size=options.rows_at_once,
            gradient_accumulation_steps=options.batch_size // options.rows_at_once,
            max_steps=self.steps,
            lr_scheduler_type="constant_with_warmup" if schedule == "constant" else schedule,
            # Rounded down: the first step of a warm-up has learning rate 0, and a training of one
            # step should learn.
            warmup_steps=int(options.warmup_ratio * self.steps),
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            gradient_checkpointing=options.gradient_checkpointing,
            bf16=self.dtype is torch.bfloat16,
            use_cpu=self.device == "cpu",
            dataloader_num_workers=0,
            dataloader_pin_memory=self.device != "cpu",
            # Both, because accelerate shuffles with its own generator.
            seed=self.call.seed_for("train") % 2**31,
            data_seed=self.call.seed_for("shuffle") % 2**31,
            remove_unused_columns=False,
            max_length=None,
            logging_steps=1,
            # The filter would replace the loss that we end a training for by an average.
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **extra,
        )
        if arguments.n_gpu > 1:
            # Several visible GPUs make Trainer wrap the model in DataParallel, which TRL refuses.
            arguments._n_gpu = 1
        return arguments

    def model(self, checkpoint: Checkpoint) -> Any:
        """The checkpoint's model in float32, without dropout."""
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
        for module in model.modules():
            # TRL only knows Dropout modules, but Llama and most others drop attention weights by
            # a number that they hand to a function.
            for name, value in list(vars(module).items()):
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    def run(
        self,
        make: Callable[[Any], Any],
        reference_logprobs: Callable[[], dict[int, tuple[float, float | None]]] = dict,
    ) -> Training:
        """Train what `make` makes of the start's model, and leave the weights in `into`.

        reference_logprobs is asked after `make` was called.
        """
        model = self.model(self.start)
        # TRL and Trainer write the tokenizer's special tokens into both; the weights leave with
        # the configuration they came with.
        configs = copy.deepcopy((model.config, model.generation_config))
        trainer = make(model)
        watch = Watch(self.call, self.saves, self.options.save_every_s)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        try:
            trainer.train(resume_from_checkpoint=str(self.newest) if self.newest else None)
        except Diverged as diverged:
            saves.discard(self.saves)
            return Training(
                status="diverged",
                steps=_steps(trainer),
                reference_logprobs=reference_logprobs(),
                reason=str(diverged),
            )
        if watch.stopped:
            raise KeyboardInterrupt
        model.config, model.generation_config = configs
        self._write(model)
        return Training(
            status="trained", steps=_steps(trainer), reference_logprobs=reference_logprobs()
        )

    def _write(self, model: Any) -> None:
        model.save_pretrained(self.into)
        # Copied and not saved anew, so that the tokenizer's digest stays what it was.
        for path in sorted(self.start.path.iterdir()):
            config = path.suffix in {".json", ".jinja", ".txt", ".model"}
            of_weights = path.name == "config.json" or path.name.endswith(".index.json")
            if path.is_file() and config and not of_weights:
                shutil.copyfile(path, self.into / path.name)
        saves.sync_tree(self.into)
        saves.discard(self.saves)


@contextmanager
def session(
    options: Options,
    examples: Sequence[Example],
    start: Checkpoint,
    reference: Checkpoint | None,
    into: Path,
    call: Call,
) -> Iterator[Session]:
    """The training of these examples: the one that `into` holds saves of, or a new one."""
    if not examples:
        raise ValueError("no examples to train on")
    for checkpoint in filter(None, (start, reference)):
        if checkpoint.kind != "full":
            raise UserError(
                f"{checkpoint.path} is an {checkpoint.kind}; this trainer takes full checkpoints"
            )
    device, dtype = _place(options)
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(start.path)
        opened = Session(
            options, encode(tokenizer, examples), tokenizer, start, into, call, device, dtype
        )
        plan = _plan(opened, examples, reference)
        path = opened.saves / "plan.json"
        if path.exists() and json.loads(path.read_text()) == plan:
            opened = replace(opened, newest=saves.newest(opened.saves))
        else:
            # Saves of other examples or options would end in a mixture of two trainings.
            saves.discard(opened.saves)
            opened.saves.mkdir(parents=True)
            saves.write_json(path, plan)
        try:
            yield opened
        finally:
            release()


def release() -> None:
    """Free the memory of models that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _steps(trainer: Any) -> tuple[TrainingStep, ...]:
    return tuple(
        TrainingStep(
            step=logged["step"],
            loss=logged["loss"],
            metrics={
                name: float(value)
                for name, value in logged.items()
                if name not in _NOT_METRICS and math.isfinite(value)
            },
        )
        for logged in trainer.state.log_history
        if "loss" in logged
    )


def _plan(
    session: Session, examples: Sequence[Example], reference: Checkpoint | None
) -> dict[str, Any]:
    """What a save must agree in to be gone on from."""
    content = hashlib.sha256()
    for row in session.rows:
        content.update(f"{row.id} {row.weight!r}".encode())
        for side in filter(None, (row.chosen, row.rejected)):
            content.update(side.ids.tobytes() + side.trained.tobytes())
    options = {
        name: value for name, value in asdict(session.options).items() if name not in OPERATIONAL
    }
    return {
        "options": {**options, "dtype": str(session.dtype)},
        "examples": content.hexdigest(),
        "start": session.start.digest,
        "reference": reference.digest if reference else None,
        "seed": session.call.seed_for("train"),
    }


def _place(options: Options) -> tuple[str, torch.dtype]:
    gpu = torch.cuda.is_available()
    if options.device == "cuda" and not gpu:
        raise UserError("device 'cuda' was asked for, but torch sees no GPU; 'auto' takes the CPU")
    device = "cuda" if gpu and options.device != "cpu" else "cpu"
    if options.dtype == "auto":
        wide = device == "cpu" or not torch.cuda.is_bf16_supported()
        return device, torch.float32 if wide else torch.bfloat16
    return device, torch.float32 if options.dtype == "float32" else torch.bfloat16
