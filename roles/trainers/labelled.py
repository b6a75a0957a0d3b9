"""TRL's KTOTrainer on candidates as they were sampled.

TRL estimates the reference point anew in each micro-batch. Here it is estimated once a step, over
all of it, so that a step split in micro-batches is the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import SequentialSampler
from trl import KTOConfig, KTOTrainer

from roles.trainers.kto import Kto
from roles.trainers.reference import Held, Scores, train_held
from roles.trainers.rows import Tokens, pad
from roles.trainers.training import Session, session
from store.errors import UserError
from store.records import Call, Checkpoint, Example, Training


def train_labelled(
    options: Kto,
    examples: Sequence[Example],
    start: Checkpoint,
    reference: Checkpoint,
    into: Path,
    call: Call,
) -> Training:
    """Train on labelled candidates; see roles.protocols.Trainer."""
    if options.loss == "kto" and len(examples) < 2:
        raise UserError(
            f"kto sets an answer after another example's prompt; found {len(examples)} example"
        )
    with session(options, examples, start, reference, into, call) as opened:

        def make(model: Any, opened: Session, scores: Scores, own: bool) -> LabelledTrainer:
            return LabelledTrainer(model, opened, scores, own, examples)

        return train_held(opened, reference, make)


class LabelledTrainer(Held, KTOTrainer):  # type: ignore[misc]
    """KTOTrainer without its tokenising, its mismatched pairs drawn from the whole step."""

    stats = ("entropy", "mean_logit")

    def __init__(
        self,
        model: Any,
        session: Session,
        scores: Scores,
        own: bool,
        examples: Sequence[Example],
    ) -> None:
        self.session = session
        self.scores = scores
        self.own = own
        options = session.options
        assert isinstance(options, Kto)
        self.labels = [bool(example.label) for example in examples]
        order = list(range(len(examples)))
        Random(session.call.seed_for("shuffle")).shuffle(order)
        self.mismatched = mismatched_rows(
            [row.chosen for row in session.rows],
            [
                order[at : at + options.batch_size]
                for at in range(0, len(order), options.batch_size)
            ],
            getattr(model.config.get_text_config(), "max_position_embeddings", None),
        )
        self.reference_point: float | None = None
        super().__init__(
            model=model,
            args=session.arguments(
                KTOConfig,
                loss_type=options.loss,
                beta=options.beta,
                desirable_weight=options.desirable_weight,
                undesirable_weight=options.undesirable_weight,
                precompute_ref_log_probs=True,
                disable_dropout=False,  # the session has, except for an adapter's own
                train_sampling_strategy="sequential",
            ),
            data_collator=self._collate,
            train_dataset=Dataset.from_dict({"row": order}),
            processing_class=session.tokenizer,
        )

    def _collate(self, batch: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        numbers = [item["row"] for item in batch]
        known = [self.scores.known[number] for number in numbers]
        padded = pad([self.session.rows[number].chosen for number in numbers])
        padded["ref_logps"] = torch.tensor([row[1] for row in known])
        if self.calculate_KL:
            padded["ref_KL_logps"] = torch.tensor([row[3] for row in known])
        padded["label"] = torch.tensor([self.labels[number] for number in numbers])
        padded["row"] = torch.tensor(numbers)
        return padded

    def _asked(self, number: int) -> Sequence[Tokens]:
        own = self.session.rows[number].chosen
        return (own, self.mismatched[number]) if self.calculate_KL else (own,)

    def _known(self, number: int, logps: Sequence[Tensor]) -> tuple[float | None, ...]:
        """The answer's, None for the other side, and the mismatched answer's if there is one."""
        own, *mismatched = (each.sum().item() for each in logps)
        return (own, None, *mismatched)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # The steps are the batches that mismatched answers were drawn from.
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.reference_point = None
        return super().get_batch_samples(*args, **kwargs)

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Tensor | None:
        """The mismatched answers' log-probabilities, all as far from the reference as those of the
        step are on average, which is what TRL will average them to."""
        if not self.calculate_KL:
            return None
        if self.reference_point is None:
            self.reference_point = self._drift()
        reference_B: Tensor = batch["ref_KL_logps"]
        return reference_B + self.reference_point

    def _drift(self) -> float:
        """How far the policy has left the reference, on average over the step's mismatched
        answers."""
        left: list[float] = []
        for batch in self.step_batches:
            numbers = batch["row"].tolist()
            logps = self._logps([self.mismatched[number] for number in numbers])
            for number, each in zip(numbers, logps, strict=True):
                left.append(each.sum().item() - self.scores.known[number][3])
        return sum(left) / len(left)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        numbers = inputs.pop("row").tolist()
        sides = [self.session.rows[number].chosen for number in numbers]
        trained = inputs["completion_mask"]

        def held(**kwargs: Any) -> Any:
            return self._held(sides, trained, numbers)

        loss = super()._compute_loss(held, inputs, return_outputs)
        return loss * self._share(len(numbers))


def mismatched_rows(
    rows: Sequence[Tokens], batches: Sequence[Sequence[int]], context: int | None
) -> list[Tokens]:
    """For each row its prompt and the answer of another row of its batch.

    Every answer of a batch is used once, turned by the smallest step at which fewest answers come
    after their own prompt, of which a batch may have several. An answer is cut where the context
    ends, for it stands after a prompt that nobody meant it for.
    """
    made: dict[int, Tokens] = {}
    for batch in batches:
        # A last batch of one takes the answer of the data's first row.
        among = batch if len(batch) > 1 else [*batch, batches[0][0]]
        prompts = [rows[number].prompt for number in among]

        def own(step: int, prompts: Sequence[tuple[int, ...]] = prompts) -> int:
            return sum(prompt == prompts[at - step] for at, prompt in enumerate(prompts))

        step = min(range(1, len(among)), key=own)
        for at, number in enumerate(batch):
            prompt, other = rows[number].prompt, rows[among[at - step]]
            room = None if context is None else context - len(prompt)
            made[number] = Tokens(prompt, other.answer[:room], other.trained[:room])
    return [each for _, each in sorted(made.items())]
