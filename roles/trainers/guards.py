"""What watches over Hugging Face's Trainer while it trains.

It ends at the first number that is not finite, before the optimizer has used it; it saves by the
clock, reports each step and stops when it is asked to.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.utils import logging as transformers_logging

from kernels.matmul import fast_float32
from roles.policy import adapters
from roles.trainers import saves
from roles.trainers.batches import Shuffled
from roles.trainers.team import Team, dealt
from store.errors import UserError
from store.records import Call


class Diverged(Exception):
    """A number stopped being finite; the message says which and where."""


def in_one_process(config: Callable[..., Any], **given: Any) -> Any:
    """A TRL config whose training is this process's alone, as far as Trainer knows.

    The trainers' passes go through the model itself, not through what Trainer would add up its
    gradients with; roles.trainers.team does. Raises UserError where a launcher has started several
    processes.
    """
    arguments = config(**given)
    if arguments.world_size > 1:
        raise UserError(
            f"{arguments.world_size} processes were started to train together, and a trainer "
            "starts its own (processes); start it without torchrun or accelerate"
        )
    if arguments.n_gpu > 1:
        # Several visible GPUs make Trainer wrap the model in DataParallel, which TRL refuses.
        arguments._n_gpu = 1
    return arguments


class Guarded(Trainer):  # type: ignore[misc]
    """What both of TRL's trainers are told to do otherwise. Comes before them in the bases."""

    session: Any
    step_batches: Sequence[dict[str, Any]] = ()
    """The micro-batches of the step at hand, those of other processes among them."""
    _passed = 0
    """How many of them were passed, here or elsewhere."""
    _own_loss: Any = 0.0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.step_batches, self._passed, self._own_loss = batches, 0, 0.0
        return batches, items

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        options = self.session.options
        if options.rows_at_once == options.batch_size:
            return super()._get_train_sampler(train_dataset)
        lengths = [row.length for row in self.session.rows]
        return Shuffled(lengths, options.batch_size, self.args.data_seed)

    def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
        # Trainer looks for an adapter in a PeftModel only, and TRL would copy one of those.
        if adapters.has_adapter(self.model):
            adapters.restore(self.model, Path(folder))
        else:
            super()._load_from_checkpoint(folder, model)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        team = self.session.team
        loss = torch.zeros((), device=self.args.device)
        if team.owns(self._passed):
            with fast_float32():
                loss = super().training_step(*args, **kwargs)
            self._own_loss += loss.item() if team.size > 1 else 0.0
        self._passed += 1
        if team.size > 1 and self._passed == len(self.step_batches):
            loss = loss + self._join_step(team)
        if not torch.isfinite(loss):
            raise Diverged(f"step {self.state.global_step + 1}: the loss is {loss.item()}")
        return loss

    def _join_step(self, team: Team) -> float:
        """Make the step's gradient and metrics those of all processes. Returns the loss that the
        others had."""
        team.add_gradients(self.model.parameters())
        everywhere = team.gathered((self._own_loss, dict(self._metrics["train"])))
        for name in sorted({name for _, metrics in everywhere for name in metrics}):
            parts = [metrics.get(name, []) for _, metrics in everywhere]
            self._metrics["train"][name] = dealt(parts)
        return math.fsum(loss for loss, _ in everywhere) - float(self._own_loss)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        # Asked right before the optimizer steps, which a bad gradient must not reach.
        norm = super()._get_grad_norm(*args, **kwargs)
        if not math.isfinite(norm):
            raise Diverged(f"step {self.state.global_step + 1}: the gradient norm is {norm}")
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Counts the parameters anew at each step, for a number that nobody reads.
        return 0

    def create_model_card(self, *_: Any, **__: Any) -> None:
        pass

    def _send_telemetry(self) -> None:
        pass


class Watch(TrainerCallback):  # type: ignore[misc]
    """Reports progress, saves by the clock, and stops when it is asked to."""

    def __init__(self, call: Call, folder: Path, save_every_s: float, team: Team) -> None:
        self.call = call
        self.team = team
        self.folder = folder
        self.save_every_s = save_every_s
        self.saved_at = time.monotonic()
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.team.leads:
            self.call.progress(state.global_step, state.max_steps)
        if self.team.told(self.call.stopping()):
            self.stopped = control.should_training_stop = True
        due = time.monotonic() - self.saved_at >= self.save_every_s
        control.should_save = self.team.leads and (self.stopped or due)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saves.complete(self.folder / f"checkpoint-{state.global_step}")
        self.saved_at = time.monotonic()


@contextmanager
def quiet() -> Iterator[None]:
    """Hugging Face's chatter off, and as it was before."""
    loggers = [logging.getLogger(name) for name in ("transformers", "trl", "accelerate")]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
