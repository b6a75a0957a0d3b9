"""TRL's SFTTrainer on candidates as they were sampled.

An example's weight scales its tokens' log-probabilities on the way to TRL's loss, which is linear
in them; the rest of the loss is TRL's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from roles.trainers.passing import Passing
from roles.trainers.rows import pad
from roles.trainers.supervised import Supervised
from roles.trainers.training import Session, session
from store.records import Call, Checkpoint, Example, Training


def train_demonstrations(
    options: Supervised, examples: Sequence[Example], start: Checkpoint, into: Path, call: Call
) -> Training:
    """Train on demonstrations; see roles.protocols.Trainer."""
    with session(options, examples, start, None, into, call) as opened:
        return opened.run(lambda model: DemonstrationTrainer(model, opened))


class DemonstrationTrainer(Passing, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose data set is the numbers of the session's rows."""

    stats = ("entropy", "is_top1")

    def __init__(self, model: Any, session: Session) -> None:
        self.session = session
        super().__init__(
            model=model,
            args=session.arguments(SFTConfig, packing=False),
            data_collator=self._collate,
            train_dataset=Dataset.from_dict({"row": range(len(session.rows))}),
            processing_class=session.tokenizer,
        )

    def _collate(self, batch: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        rows = [self.session.rows[item["row"]] for item in batch]
        padded = pad([row.chosen for row in rows])
        trained = padded.pop("completion_mask").bool()
        padded["labels"] = padded["input_ids"].masked_fill(~trained, -100)
        padded["row"] = torch.tensor([item["row"] for item in batch])
        return padded

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        rows = [self.session.rows[number] for number in inputs.pop("row").tolist()]

        def weighted(**kwargs: Any) -> Any:
            outputs = self._outputs([row.chosen for row in rows], kwargs["labels"] != -100)
            weight_B = outputs.log_probs.new_tensor([row.weight for row in rows])
            outputs.log_probs = outputs.log_probs * weight_B[:, None]
            return outputs

        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)
