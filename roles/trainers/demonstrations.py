"""TRL's SFTTrainer on candidates as they were sampled.

TRL's loss is linear in the log-probabilities of a step's tokens. So on their way there an example's
weight scales them, and what it costs to leave the reference is taken off; the rest is TRL's.
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
from roles.trainers.reference import Held, Scores, train_held
from roles.trainers.rows import Tokens, pad
from roles.trainers.supervised import Supervised
from roles.trainers.training import Session, session
from store.records import Call, Checkpoint, Example, Training


def train_demonstrations(
    options: Supervised,
    examples: Sequence[Example],
    start: Checkpoint,
    reference: Checkpoint,
    into: Path,
    call: Call,
) -> Training:
    """Train on demonstrations; see roles.protocols.Trainer."""
    held = options.kl_weight > 0
    with session(options, examples, start, reference if held else None, into, call) as opened:
        if held:
            return train_held(opened, reference, HeldDemonstrationTrainer)
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
        numbers = inputs.pop("row").tolist()
        rows = [self.session.rows[number] for number in numbers]

        def weighted(**kwargs: Any) -> Any:
            outputs = self._outputs([row.chosen for row in rows], kwargs["labels"] != -100)
            weight_B = outputs.log_probs.new_tensor([row.weight for row in rows])
            gained = outputs.log_probs - self._cost(outputs.log_probs, outputs.label_mask, numbers)
            outputs.log_probs = gained * weight_B[:, None]
            return outputs

        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)

    def _cost(self, logp_BT: Tensor, mask_BT: Tensor, numbers: Sequence[int]) -> Tensor | float:
        """What leaving the reference costs, token by token."""
        return 0.0


class HeldDemonstrationTrainer(Held, DemonstrationTrainer):
    """One that is held to a reference."""

    def __init__(self, model: Any, session: Session, scores: Scores, own: bool) -> None:
        self.scores, self.own = scores, own
        super().__init__(model, session)
        self._precompute_ref_logps(None, "train", 0)

    def _asked(self, number: int) -> Sequence[Tokens]:
        return [self.session.rows[number].chosen]

    def _known(self, number: int, logps: Sequence[Tensor]) -> tuple[Any, ...]:
        """The answer, nothing rejected, and the answer's tokens one by one."""
        return logps[0].sum().item(), None, logps[0].tolist()

    def _cost(self, logp_BT: Tensor, mask_BT: Tensor, numbers: Sequence[int]) -> Tensor:
        options = self.session.options
        assert isinstance(options, Supervised)
        self._check(logp_BT.sum(dim=1), [(number, 0) for number in numbers])
        tokens = [token for number in numbers for token in self.scores.known[number][3]]
        reference_BT = logp_BT.new_zeros(mask_BT.shape)
        reference_BT = reference_BT.masked_scatter(mask_BT, logp_BT.new_tensor(tokens))
        return options.kl_weight * (logp_BT - reference_BT) ** 2 / 2
