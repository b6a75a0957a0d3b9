"""TRL's RewardTrainer on candidates as they were sampled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
)
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from roles.policy.turns import closed, closing_ids
from roles.trainers.reference import Held
from roles.trainers.reward import Reward
from roles.trainers.rows import Row, Tokens
from roles.trainers.training import Session, session
from store.errors import UserError
from store.records import Call, Checkpoint, Example, Training


def train_rewards(
    options: Reward, examples: Sequence[Example], start: Checkpoint, into: Path, call: Call
) -> Training:
    """Train on preference pairs; see roles.protocols.Trainer."""
    if start.kind == "adapter":
        raise UserError(
            f"a reward model begins from whole weights, and {start.path} is an adapter; "
            "`loop export` merges it into its base"
        )
    with session(options, examples, start, None, into, call) as opened:
        headed = Headed(**vars(opened))
        return headed.run(lambda model: PairScorer(model, headed))


class Headed(Session):
    """A training of the start's model with a head that scores in place of the one that writes."""

    def model(self, checkpoint: Checkpoint) -> Any:
        """In float32, without dropout; a head that the checkpoint does not have is drawn from the
        seed."""
        config = AutoConfig.from_pretrained(checkpoint.path)
        classifies = any("SequenceClassification" in each for each in config.architectures or ())
        if classifies and config.num_labels != 1:
            raise UserError(
                f"{checkpoint.path} has {config.num_labels} labels; a reward model has one"
            )
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise UserError(
                f"{checkpoint.path} is of the kind {config.model_type!r}, of which transformers "
                "has no sequence-classification model"
            )
        config.num_labels = 1
        # TRL only knows Dropout modules; most models drop attention weights by a number of their
        # configuration, as all their modules do when they are made.
        for key, value in list(vars(config).items()):
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        config.get_text_config().pad_token_id = self._padding(checkpoint)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.call.seed_for("head"))
            return AutoModelForSequenceClassification.from_pretrained(
                checkpoint.path, config=config, dtype=torch.float32
            )

    def _padding(self, checkpoint: Checkpoint) -> int:
        """The token that TRL pads with. The model finds an answer's last token by it, so it stays
        in the configuration."""
        tokenizer = self.tokenizer
        found = tokenizer.eos_token_id if tokenizer.pad_token is None else tokenizer.pad_token_id
        if found is None:
            raise UserError(
                f"the tokenizer of {checkpoint.path} has no token to pad with; set pad_token in "
                "its tokenizer_config.json"
            )
        return int(found)


class PairScorer(Held, RewardTrainer):  # type: ignore[misc]
    """RewardTrainer on rows: weighed, and in micro-batches too. There is no reference."""

    own = False

    def __init__(self, model: Any, session: Headed) -> None:
        self.session = session
        options = session.options
        assert isinstance(options, Reward)
        rows = _closed(session)
        _refuse_long(rows, model, session.start)
        self.sides = [
            {"chosen_ids": list(row.chosen.ids), "rejected_ids": list(_rejected(row).ids)}
            for row in rows
        ]
        super().__init__(
            model=model,
            args=session.arguments(
                RewardConfig,
                center_rewards_coefficient=options.center_weight or None,
                disable_dropout=False,  # its configuration has none
            ),
            data_collator=self._collate,
            train_dataset=Dataset.from_dict({"row": range(len(rows))}),
            processing_class=session.tokenizer,
        )

    def _collate(self, batch: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        numbers = [item["row"] for item in batch]
        pad = DataCollatorForPreference(self.model.config.get_text_config().pad_token_id)
        padded: dict[str, Tensor] = pad([self.sides[number] for number in numbers])
        padded["row"] = torch.tensor(numbers)
        return padded

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        numbers = inputs.pop("row").tolist()

        def weighed(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            self._weigh(outputs.logits, numbers)
            return outputs

        loss = super().compute_loss(weighed, inputs, return_outputs, num_items_in_batch)
        return loss * self._share(len(numbers))


def _rejected(row: Row) -> Tokens:
    assert row.rejected is not None
    return row.rejected


def _closed(session: Session) -> list[Row]:
    """The rows with their answers' turns closed as the chat template closes them."""
    closing = closing_ids(session.tokenizer)

    def close(side: Tokens) -> Tokens:
        rest = tuple(closed(list(side.ids), closing))
        trained = (*side.trained, *(False for _ in rest))
        return Tokens(side.prompt, side.answer + rest, trained)

    return [
        Row(row.id, row.weight, close(row.chosen), close(_rejected(row))) for row in session.rows
    ]


def _refuse_long(rows: Sequence[Row], model: Any, start: Checkpoint) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(rows, key=lambda row: row.length)
    if context is not None and longest.length > context:
        raise UserError(
            f"example {longest.id} has {longest.length} tokens with its prompt and the end of its "
            f"turn, and the context of {start.path} holds {context}; leave it out"
        )
