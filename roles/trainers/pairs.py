"""TRL's DPOTrainer on candidates as they were sampled.

Reference log-probabilities are computed by the very model object that is then trained, before its
first update, and kept beside the saves. Where the reference is another checkpoint the same trainer
is made of that one first, scores, and is freed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from roles.trainers import saves
from roles.trainers.guards import Guarded
from roles.trainers.preference import Preference
from roles.trainers.rows import Row, Tokens, pad
from roles.trainers.training import Session, release, session
from store.errors import UserError
from store.records import Call, Checkpoint, Example, Training

_PER_ROOT_TOKEN = {torch.float32: 1e-3, torch.bfloat16: 0.3}


def tolerance(dtype: torch.dtype, tokens: int) -> float:
    """How far two passes of one model over one answer may lie apart, in nats.

    They differ in how rows are batched and padded, hence in the order of sums. So each token's
    log-probability is off by some roundings of a logit, this way or that, and their sum by the
    root of the number of tokens. Measured on CPU with models of 1 to 8 M parameters: up to 5e-6
    (float32) and 0.009 (bfloat16) times that root. The constants leave room for the larger logits
    of larger models, because a false alarm ends a run.
    """
    return _PER_ROOT_TOKEN[dtype] * math.sqrt(tokens)


def train_pairs(
    options: Preference,
    examples: Sequence[Example],
    start: Checkpoint,
    reference: Checkpoint,
    into: Path,
    call: Call,
) -> Training:
    """Train on preference pairs; see roles.protocols.Trainer."""
    for example in examples:
        if example.kind != "pair":
            raise UserError(
                f"the preference trainer learns from pairs; example {example.id} "
                f"({example.rule}) is a {example.kind}"
            )
    own = reference.path.resolve() == start.path.resolve()
    with session(options, examples, start, reference, into, call) as opened:
        scores = _Scores(opened.saves / "reference.json")
        if not own and not scores.known:
            PairTrainer(opened.model(reference), opened, scores, own)
            release()
        return opened.run(lambda model: PairTrainer(model, opened, scores, own), scores.by_example)


class _Scores:
    """Log-probabilities under the reference of each example's two sides."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: list[tuple[int, float, float]] = []
        if path.exists():
            self.known = [(row, *sides) for row, *sides in json.loads(path.read_text())]

    def keep(self, known: list[tuple[int, float, float]]) -> None:
        saves.write_json(self.path, known)
        self.known = known

    def by_example(self) -> dict[int, tuple[float, float | None]]:
        # A start with NaN in it makes a diverged training, and NaN is not JSON.
        return {
            example: (chosen, rejected)
            for example, chosen, rejected in self.known
            if math.isfinite(chosen) and math.isfinite(rejected)
        }


class PairTrainer(Guarded, DPOTrainer):  # type: ignore[misc]
    """DPOTrainer whose data set is the numbers of the session's rows."""

    def __init__(self, model: Any, session: Session, scores: _Scores, own: bool) -> None:
        self.session = session
        self.scores = scores
        self.own = own
        options = session.options
        assert isinstance(options, Preference)
        self.nll_weight = options.nll_weight
        self.step_micro_batches = self.step_pairs = self.step_tokens = 0
        super().__init__(
            model=model,
            args=session.arguments(
                DPOConfig,
                beta=options.beta,
                loss_type=[options.loss, "sft"] if self.nll_weight else [options.loss],
                precompute_ref_log_probs=True,
            ),
            data_collator=self._collate,
            train_dataset=Dataset.from_dict({"row": range(len(session.rows))}),
            processing_class=session.tokenizer,
        )

    def _collate(self, batch: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        numbers = [item["row"] for item in batch]
        padded = _pad_sides([self.session.rows[number] for number in numbers])
        _, chosen, rejected = zip(*(self.scores.known[number] for number in numbers), strict=True)
        padded["ref_chosen_logps"] = torch.tensor(chosen)
        padded["ref_rejected_logps"] = torch.tensor(rejected)
        padded["row"] = torch.tensor(numbers)
        return padded

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        rows = self.session.rows
        if not self.scores.known:
            self.model.eval()
            # Like lengths together: less padding.
            order = sorted(range(len(rows)), key=lambda number: len(rows[number].chosen.ids))
            known: list[tuple[int, float, float]] = [(0, 0.0, 0.0)] * len(rows)
            for first in range(0, len(rows), batch_size):
                numbers = order[first : first + batch_size]
                batch = self._prepare_inputs(_pad_sides([rows[number] for number in numbers]))
                chosen, rejected = self.compute_ref_log_probs(self.model, batch)
                for number, *sides in zip(numbers, chosen.tolist(), rejected.tolist(), strict=True):
                    known[number] = (rows[number].id, *sides)
            self.scores.keep(known)
        return dataset

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.step_micro_batches = len(batches)
        self.step_pairs = sum(len(batch["row"]) for batch in batches)
        self.step_tokens = sum(_chosen_tokens(batch) for batch in batches)
        return batches, items

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        row_B = inputs.pop("row")
        # TRL averages within a micro-batch and Trainer over micro-batches. With these weights the
        # sum is the mean over the step's pairs and over its chosen tokens, also where the last
        # micro-batch is smaller or its answers are longer.
        count = self.step_micro_batches
        self.loss_weights = [count * len(row_B) / self.step_pairs]
        if self.nll_weight:
            share = count * _chosen_tokens(inputs) / self.step_tokens
            self.loss_weights.append(self.nll_weight * share)

        def held(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            if self.own and self.state.global_step == 0:
                self._check(outputs.log_probs.detach(), inputs, row_B)
            self._weigh(outputs.log_probs, row_B)
            return outputs

        return super()._compute_loss(held, inputs, return_outputs)

    def _weigh(self, logprobs_2BT: Tensor, row_B: Tensor) -> None:
        # TRL has no place for an example's weight. But a pair's log-probabilities enter only that
        # pair's part of the loss, so to scale their gradient is to scale that part.
        weights = [self.session.rows[number].weight for number in row_B.tolist()]
        if logprobs_2BT.requires_grad and set(weights) != {1.0}:
            weight_2B = torch.tensor(weights * 2, device=logprobs_2BT.device)
            scale = weight_2B[:, None].mul
            logprobs_2BT.register_hook(scale)  # type: ignore[no-untyped-call]

    def _check(self, logprobs_2BT: Tensor, inputs: dict[str, Tensor], row_B: Tensor) -> None:
        """Before the first update the policy is its reference, or one of the two is not what it
        is taken for."""
        policy_2B = logprobs_2BT.sum(dim=1).tolist()
        reference_2B = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        tokens_2B = inputs["completion_mask"].sum(dim=1).tolist()
        rows = row_B.tolist() * 2
        sides = ["chosen"] * len(row_B) + ["rejected"] * len(row_B)
        for side, number, policy, reference, tokens in zip(
            sides, rows, policy_2B, reference_2B.tolist(), tokens_2B, strict=True
        ):
            allowed = tolerance(self.session.dtype, tokens)
            if abs(policy - reference) > allowed:
                raise RuntimeError(
                    f"before the first update the {side} answer of example "
                    f"{self.session.rows[number].id} has log-probability {policy} under the "
                    f"policy and {reference} under the reference, which are the same checkpoint; "
                    f"they may differ by {allowed:.3g}"
                )


def _pad_sides(rows: Sequence[Row]) -> dict[str, Tensor]:
    """[2B, T]: all chosen, then all rejected, as TRL's loss takes them."""
    sides: list[Tokens] = [row.chosen for row in rows]
    sides += [row.rejected for row in rows if row.rejected is not None]
    return pad(sides)


def _chosen_tokens(batch: dict[str, Tensor]) -> int:
    return int(batch["completion_mask"].chunk(2)[0].sum())
