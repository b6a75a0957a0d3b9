"""The options that every gradient trainer has.

The fields are the keyword arguments of `__init__`, so they are also what a configuration may say;
their bounds are checked by roles.plugins before a run begins.
"""

# No `from __future__ import annotations` here: the trainers inherit these fields, and a string
# would be looked up among the names of their module instead of this one's.

import math
import os
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from roles.policy.adapters import ALL_LINEAR, require_bitsandbytes, require_peft
from roles.policy.devices import Device
from store.errors import UserError
from store.records import ExampleKind


def _positive(given: Any) -> Any:
    rates = given if isinstance(given, list) else [given]
    if not rates or not all(type(each) in (int, float) and 0 < each < math.inf for each in rates):
        raise ValueError("it is a number above 0, or a list of such, one a round")
    return given


TRUE = ("y", "yes", "t", "true", "on", "1")
"""What accelerate reads as that in the environment."""
Rate = Annotated[float | list[float], BeforeValidator(_positive)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a training goes, whatever its loss."""

    learns_from: ClassVar[ExampleKind]
    """The kind of example that the trainer takes."""
    makes: ClassVar[Literal["policy", "reward model"]] = "policy"
    """What it leaves: a reward model judges answers and writes none."""

    learning_rate: Rate = 1e-6
    """A list gives one a round, the first to round 1 and to a warm-up; the last one stays."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Examples per optimizer step."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Examples in memory at once; gradients are added up to a batch. None is batch_size, or each
    process's share of it."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """End after this many optimizer steps even if the epochs are not over."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What the learning rate does after warm-up: stay, or fall to 0 at the last step."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Longer gradients are scaled down to this norm. 0 is never."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Arithmetic of the passes; trained weights and optimizer are float32 always, because updates
    as small as these round away in bfloat16. auto: bfloat16 on a GPU that has it."""
    save_dtype: Literal["float32", "start"] = "float32"
    """What full weights are stored in: float32 keeps every update for the next round, start halves
    the folder of a model that came in bfloat16. Adapters are stored in float32."""
    device: Device = "auto"
    """auto: the first there is of cuda, mps, cpu."""
    processes: Annotated[int, Field(ge=1)] = 1
    """That train together, on a GPU each or on the CPU: each holds the whole model and does its
    share of a step's micro-batches, and the step is that of one process."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time."""
    save_every_s: Annotated[float, Field(ge=0)] = 300.0
    """Seconds between saves to go on from. 0 saves at each step."""
    lora_rank: Annotated[int, Field(ge=1)] | None = None
    """Train a low-rank adapter and leave the weights below it as they are. None: train all weights,
    or go on with the adapter that the checkpoint is. Needs the package peft."""
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    """The adapter's part is scaled by lora_alpha / lora_rank. None is 2 * lora_rank."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lora_targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = ALL_LINEAR
    """Names of the linear layers that it lies over: all but the output layer, or these."""
    load_in_4bit: bool = False
    """Hold the linear layers below the adapter in 4 bits while it trains (QLoRA, arXiv 2305.14314):
    less memory, more time, and a base that is a little off. Experts of a routed model stay as they
    are. References are scored with the same; whoever samples the adapter lays it over the base as
    it is stored. Needs the package bitsandbytes, and a GPU of NVIDIA's or a CPU."""

    def __post_init__(self) -> None:
        for way in ("FSDP", "DEEPSPEED"):
            name = f"ACCELERATE_USE_{way}"
            if os.environ.get(name, "false").lower() in TRUE:
                raise UserError(
                    f"{name} is set in the environment, and each process of a trainer holds the "
                    "whole model; start it without"
                )
        if self.load_in_4bit:
            if self.lora_rank is None:
                raise UserError(
                    "load_in_4bit is for the weights below an adapter, and lora_rank, which asks "
                    "for one, is not set"
                )
            require_bitsandbytes()
        if self.lora_rank is not None:
            require_peft()
        elif self.lora_alpha or self.lora_dropout or self.lora_targets != ALL_LINEAR:
            raise UserError(
                "lora_alpha, lora_dropout and lora_targets say how an adapter is made, and "
                "lora_rank, which asks for one, is not set"
            )
        if self.batch_size % self.rows_at_once:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size "
                f"{self.rows_at_once}; a batch is made of whole micro-batches"
            )

    @property
    def rows_at_once(self) -> int:
        """Examples of one forward pass."""
        return self.micro_batch_size or -(-self.batch_size // self.processes)

    def rate(self, round: int) -> float:
        """The learning rate of a round."""
        if isinstance(self.learning_rate, list):
            return self.learning_rate[min(max(round, 1), len(self.learning_rate)) - 1]
        return self.learning_rate


OPERATIONAL = frozenset(
    {"micro_batch_size", "processes", "device", "gradient_checkpointing", "save_every_s"}
)
"""Options that may change between a killed training and the one that goes on from it."""
