"""One training, from examples to weights in a folder, whatever its loss.

Hugging Face's Trainer walks the batches; around it lies what a loop that can be killed needs:
whole saves, an end when a number is not finite any more, and nothing left behind but the weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PrinterCallback

from roles.policy import adapters, devices
from roles.policy.folders import save, stored_dtype
from roles.trainers import saves
from roles.trainers.guards import Diverged, Watch, in_one_process, quiet
from roles.trainers.options import OPERATIONAL, Options
from roles.trainers.rows import Row, encode
from roles.trainers.team import Team, together
from store.errors import UserError
from store.records import KINDS, Call, Checkpoint, Example, Training, TrainingStep

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
    team: Team = field(default_factory=Team)

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
        return in_one_process(
            config,
            output_dir=str(self.saves),
            learning_rate=options.rate(self.call.round),
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
            dataloader_pin_memory=self.device == "cuda",
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

    @property
    def adapts(self) -> bool:
        """Whether what is trained is an adapter: the start's own, or a fresh one laid over it."""
        return self.start.kind == "adapter" or self.options.lora_rank is not None

    @property
    def drops(self) -> bool:
        """Whether the start computes otherwise while it is trained, by its adapter's dropout."""
        return self.start.kind == "adapter" and adapters.settings(self.start)["lora_dropout"] > 0

    def model(self, checkpoint: Checkpoint) -> Any:
        """The checkpoint's model, without dropout but an adapter's own.

        In float32; below an adapter, where nothing is trained, in the arithmetic of the passes, or
        in 4 bits.
        """
        dtype = self.dtype if self.adapts else torch.float32
        four_bit_on = self.device if self.options.load_in_4bit else None
        model = adapters.load_model(checkpoint, dtype, four_bit_on)
        for name, module in model.named_modules():
            if ".lora_dropout" in name:
                continue
            # TRL only knows Dropout modules, but Llama and most others drop attention weights by
            # a number that they hand to a function.
            for key, value in list(vars(module).items()):
                if "drop" in key and isinstance(value, float):
                    setattr(module, key, 0.0)
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    def _to_train(self) -> Any:
        """The start's model, with a fresh adapter where one is asked for."""
        options = self.options
        model = self.model(self.start)
        if self.start.kind == "full" and options.lora_rank is not None:
            rank = options.lora_rank
            adapters.add(
                model,
                rank=rank,
                alpha=2.0 * rank if options.lora_alpha is None else options.lora_alpha,
                dropout=options.lora_dropout,
                targets=options.lora_targets,
                seed=self.call.seed_for("adapter"),
            )
        return model

    def run(
        self,
        make: Callable[[Any], Any],
        reference_logprobs: Callable[[], dict[int, tuple[float, float | None]]] = dict,
    ) -> Training:
        """Train what `make` makes of the start's model, and leave the weights in `into`.

        reference_logprobs is asked after `make` was called.
        """
        model = self._to_train()
        # TRL and Trainer write the tokenizer's special tokens into it; the weights leave with the
        # configuration they came with.
        config = copy.deepcopy(model.config)
        trainer = make(model)
        watch = Watch(self.call, self.saves, self.options.save_every_s, self.team)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        try:
            trainer.train(resume_from_checkpoint=str(self.newest) if self.newest else None)
        except Diverged as diverged:
            if self.team.leads:
                saves.discard(self.saves)
            return Training(
                status="diverged",
                steps=_steps(trainer),
                reference_logprobs=reference_logprobs(),
                reason=str(diverged),
            )
        if watch.stopped:
            self.team.gathered(None)  # the save is whole
            raise KeyboardInterrupt
        model.config = config
        self._check_together(model)
        if self.team.leads:
            self._write(model)
        return Training(
            status="trained", steps=_steps(trainer), reference_logprobs=reference_logprobs()
        )

    def _check_together(self, model: Any) -> None:
        """All processes took the same steps, or the sum of their gradients was not one."""
        own = [each.detach().sum().item() for each in model.parameters() if each.requires_grad]
        first, *others = self.team.gathered(own)
        if any(each != first for each in others):
            raise RuntimeError("processes that trained together ended with different weights")

    def _write(self, model: Any) -> None:
        if self.adapts:
            adapters.write(model, adapters.base_path(self.start), self.start.path, self.into)
        else:
            if self.options.save_dtype == "start":
                model.to(stored_dtype(self.start.path))
            save(model, self.start.path, self.into)
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
    for example in examples:
        if example.kind != options.learns_from:
            raise UserError(
                f"the trainer learns from {KINDS[options.learns_from]}; example {example.id} "
                f"({example.rule}) is one of {KINDS[example.kind]}"
            )
    if start.kind == "adapter":
        _refuse_another_shape(options, start)
    device, dtype = _place(options)
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(start.path)
        opened = Session(
            options, encode(tokenizer, examples), tokenizer, start, into, call, device, dtype
        )
        plan = _plan(opened, examples, reference)
        others = (options, examples, start, reference or start, into, call)
        with together(options.processes, device, *others) as team:
            newest = team.told(_newest(opened.saves, plan) if team.leads else None)
            try:
                yield replace(opened, newest=newest, team=team)
            finally:
                devices.give_back()


def _newest(folder: Path, plan: dict[str, Any]) -> Path | None:
    """The save to go on from, if the folder is of this training; else it is emptied."""
    path = folder / "plan.json"
    if path.exists() and json.loads(path.read_text()) == plan:
        return saves.newest(folder)
    # Saves of other examples or options would end in a mixture of two trainings.
    saves.discard(folder)
    folder.mkdir(parents=True)
    saves.write_json(path, plan)
    return None


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
        for side in row.sides:
            content.update(repr((side.prompt, side.answer, side.trained)).encode())
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


def _refuse_another_shape(options: Options, start: Checkpoint) -> None:
    """An adapter is gone on with as it is; its shape cannot be another one than it has."""
    has = adapters.settings(start)
    for option, asked, key in (
        ("lora_rank", options.lora_rank, "r"),
        ("lora_alpha", options.lora_alpha, "lora_alpha"),
    ):
        if asked is not None and asked != has[key]:
            raise UserError(
                f"{option} {asked:g} was asked for, and the adapter to go on with, {start.path}, "
                f"has {has[key]:g}; leave {option} out, or begin from its base"
            )


def _place(options: Options) -> tuple[str, torch.dtype]:
    device = devices.find(options.device)
    if options.load_in_4bit and device.type not in ("cuda", "cpu"):
        raise UserError(f"load_in_4bit is for NVIDIA's GPUs and the CPU, and not for {device.type}")
    if options.dtype == "bfloat16":
        devices.check_bfloat16(device)
    narrow = options.dtype == "bfloat16" or (
        options.dtype == "auto" and devices.prefers_bfloat16(device)
    )
    return device.type, torch.bfloat16 if narrow else torch.float32
