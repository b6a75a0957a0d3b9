"""The options that every gradient trainer has.

The fields are the keyword arguments of `__init__`, so they are also what a configuration may say;
their bounds are checked by roles.plugins before a run begins.
"""

# No `from __future__ import annotations` here: the trainers inherit these fields, and a string
# would be looked up among the names of their module instead of this one's.

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from store.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a training goes, whatever its loss."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    epochs: Annotated[float, Field(gt=0)] = 1.0
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Examples per optimizer step."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Examples in memory at once; gradients are added up to a batch. None is batch_size."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """End after this many optimizer steps even if the epochs are not over."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What the learning rate does after warm-up: stay, or fall to 0 at the last step."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Longer gradients are scaled down to this norm. 0 is never."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Arithmetic of the passes; weights and optimizer are float32 always, because updates as small
    as these round away in bfloat16. auto: bfloat16 on a GPU that has it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time."""
    save_every_s: Annotated[float, Field(ge=0)] = 300.0
    """Seconds between saves to go on from. 0 saves at each step."""

    def __post_init__(self) -> None:
        if self.batch_size % self.rows_at_once:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}; a batch is made of whole micro-batches"
            )

    @property
    def rows_at_once(self) -> int:
        """Examples of one forward pass."""
        return self.micro_batch_size or self.batch_size


OPERATIONAL = frozenset({"micro_batch_size", "device", "gradient_checkpointing", "save_every_s"})
"""Options that may change between a killed training and the one that goes on from it."""
