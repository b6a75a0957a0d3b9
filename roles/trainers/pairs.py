"""TRL's DPOTrainer on candidates as they were sampled."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from roles.trainers.losses import SORTING
from roles.trainers.preference import Preference
from roles.trainers.reference import Held, Scores, train_held
from roles.trainers.rows import Row, Tokens, pad
from roles.trainers.training import Session, session
from store.errors import UserError
from store.records import Call, Checkpoint, Example, Training


def train_pairs(
    options: Preference,
    examples: Sequence[Example],
    start: Checkpoint,
    reference: Checkpoint,
    into: Path,
    call: Call,
) -> Training:
    """Train on preference pairs; see roles.protocols.Trainer."""
    with session(options, examples, start, reference, into, call) as opened:
        return train_held(opened, reference, PairTrainer)


class PairTrainer(Held, DPOTrainer):  # type: ignore[misc]
    """DPOTrainer without its tokenising, the likelihood term and the length term being ours."""

    def __init__(self, model: Any, session: Session, scores: Scores, own: bool) -> None:
        self.session = session
        self.scores = scores
        self.own = own
        options = session.options
        assert isinstance(options, Preference)
        self.options = options
        names = options.loss_names
        self.weights = options.loss_weights or [1.0] * len(names)
        _refuse_weights(session.rows, SORTING & set(names))
        super().__init__(
            model=model,
            args=session.arguments(
                DPOConfig,
                beta=options.beta,
                loss_type=names,
                label_smoothing=options.label_smoothing,
                ld_alpha=options.ld_alpha,
                f_divergence_type=options.f_divergence,
                f_alpha_divergence_coef=options.f_alpha,
                discopop_tau=options.discopop_tau,
                use_weighting=options.wpo,
                precompute_ref_log_probs=True,
                disable_dropout=False,  # the session has, except for an adapter's own
            ),
            data_collator=self._collate,
            train_dataset=Dataset.from_dict({"row": range(len(session.rows))}),
            processing_class=session.tokenizer,
        )

    def _collate(self, batch: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        numbers = [item["row"] for item in batch]
        padded = _pad_sides([self.session.rows[number] for number in numbers])
        references = torch.tensor([self.scores.known[number][3:] for number in numbers])
        # A lower reference is a higher reward: TRL multiplies what is taken off here by beta.
        per_token = self.options.length_weight / self.options.beta
        tokens_B2 = padded["completion_mask"].sum(dim=1).view(2, -1).T
        chosen, rejected = (references - per_token * tokens_B2).unbind(dim=1)
        padded["ref_chosen_logps"], padded["ref_rejected_logps"] = chosen, rejected
        padded["row"] = torch.tensor(numbers)
        return padded

    def _score(self, numbers: Sequence[int]) -> Sequence[tuple[float | None, ...]]:
        """Chosen, rejected, and both as the loss takes them, which ld_alpha may shorten."""
        batch = self._prepare_inputs(_pad_sides([self.session.rows[number] for number in numbers]))
        whole: list[Tensor] = []

        def kept(**kwargs: Any) -> Any:
            outputs = self.model(**kwargs)
            whole.append(outputs.log_probs.sum(dim=1))
            return outputs

        shortened = self.compute_ref_log_probs(kept, batch)
        sides = (*whole[0].chunk(2), *shortened)
        return list(zip(*(side.tolist() for side in sides), strict=True))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        numbers = inputs.pop("row").tolist()
        self.loss_weights = [weight * self._share(len(numbers)) for weight in self.weights]
        held = self._held(model, numbers)
        seen: list[Tensor] = []

        def kept(**kwargs: Any) -> Any:
            outputs = held(**kwargs)
            seen.append(outputs.log_probs)
            return outputs

        loss = super()._compute_loss(kept, inputs, return_outputs)
        if self.options.nll_weight:
            loss = loss + self.options.nll_weight * self._nll(seen[0], inputs["completion_mask"])
        return loss

    def _nll(self, logprobs_ST: Tensor, trained_ST: Tensor) -> Tensor:
        """This micro-batch's part of the chosen answers' negative log-likelihood."""
        logprobs_B = logprobs_ST.chunk(2)[0].sum(dim=1)
        tokens_B = trained_ST.chunk(2)[0].sum(dim=1)
        if self.options.nll == "sequence":
            return -(logprobs_B / tokens_B).mean() * self._share(len(tokens_B))
        of_step = sum(
            int(batch["completion_mask"].chunk(2)[0].sum()) for batch in self.step_batches
        )
        return -logprobs_B.sum() * len(self.step_batches) / of_step


def _pad_sides(rows: Sequence[Row]) -> dict[str, Tensor]:
    """[2B, T]: all chosen, then all rejected, as TRL's loss takes them."""
    sides: list[Tokens] = [row.chosen for row in rows]
    sides += [row.rejected for row in rows if row.rejected is not None]
    return pad(sides)


def _refuse_weights(rows: Sequence[Row], sorting: Set[str]) -> None:
    weighted = [row for row in rows if row.weight != 1]
    if sorting and weighted:
        raise UserError(
            f"{', '.join(sorted(sorting))} compares sorted pairs and has no part for one alone, so "
            f"examples have weight 1; found {weighted[0].weight:g} on example {weighted[0].id}"
        )
