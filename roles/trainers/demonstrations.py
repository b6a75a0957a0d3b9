"""TRL's SFTTrainer on candidates as they were sampled.

An example's weight scales its tokens' log-probabilities on the way from the model to TRL's loss,
which is linear in them; the rest of the loss is TRL's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from roles.trainers.guards import Guarded
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


class DemonstrationTrainer(Guarded, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose data set is the numbers of the session's rows."""

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
        padded["weight"] = torch.tensor([row.weight for row in rows])
        return padded

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        weight_B = inputs.pop("weight")

        def weighted(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            outputs.log_probs = outputs.log_probs * weight_B[:, None]
            return outputs

        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)
