"""TRL's DPOTrainer on candidates as they were sampled.

Losses that kernels.preference_loss has are computed by it, from the hidden states, with TRL's
metrics beside them. Every other loss, and several at once, is TRL's own, which is handed the
log-probabilities of the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from kernels.causal import Head
from kernels.preference_loss import PreferenceLoss, preference_loss
from kernels.preference_terms import KINDS
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
        if options.wpo:
            self.stats = (*self.stats, "log_sum_sq")
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
        return {"row": torch.tensor([item["row"] for item in batch])}

    def _asked(self, number: int) -> Sequence[Tokens]:
        return self.session.rows[number].sides

    def _known(self, number: int, logps: Sequence[Tensor]) -> tuple[float | None, ...]:
        """Chosen, rejected, and both as the loss takes them, which ld_alpha may shorten."""
        shared, alpha = min(map(len, logps)), self.options.ld_alpha
        alpha = 1.0 if alpha is None else alpha
        return (
            *(each.sum().item() for each in logps),
            *((each[:shared].sum() + alpha * each[shared:].sum()).item() for each in logps),
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        numbers = inputs["row"].tolist()
        head = self._head
        if head is not None and self._covered:
            return self._fused_loss(head, numbers)
        return self._trl_loss(model, numbers)

    @property
    def _covered(self) -> bool:
        """Whether the loss is one that needs no more than kernels.preference_loss."""
        options = self.options
        return (
            len(options.loss_names) == 1
            and set(options.loss_names) <= set(KINDS)
            and options.f_divergence == "reverse_kl"
            and options.ld_alpha is None
            and not options.wpo
        )

    def _fused_loss(self, head: Head, numbers: Sequence[int]) -> Tensor:
        options, rows = self.options, [self.session.rows[number] for number in numbers]
        sides = [side for row in rows for side in row.sides]
        passed = self._hidden(sides)
        with self._arithmetic():
            found = preference_loss(
                passed.hidden,
                head.weight,
                passed.target,
                passed.cu_seqlens,
                self._references(numbers).flatten(),
                kind=options.loss_names[0],
                beta=options.beta,
                label_smoothing=options.label_smoothing,
                pair_weight=torch.tensor([row.weight for row in rows]),
                length_alpha=options.length_weight,
                nll_alpha=options.nll_weight / self.weights[0],
                nll=options.nll,
                bias=head.bias,
                softcap=head.softcap,
                temperature=head.temperature,
                max_bytes=self._max_bytes,
                stats=self.stats,
                # Trainer averages over the step's micro-batches, of which the last may be smaller.
                pairs=len(self._of_step()) / len(self.step_batches),
                nll_tokens=self._chosen_tokens() / len(self.step_batches),
            )
        self._check(found.logp, [(number, side) for number in numbers for side in (0, 1)])
        self._log_pairs(found, sides)
        loss: Tensor = _Reported.apply(found.loss, found.unweighted)  # type: ignore[no-untyped-call]
        return loss * self.weights[0]

    def _log_pairs(self, found: PreferenceLoss, sides: Sequence[Tokens]) -> None:
        """TRL's metrics, by its names and formulas."""
        stats = found.stats
        assert stats.entropy is not None
        assert stats.mean_logit is not None
        assert stats.is_top1 is not None
        tokens_S = torch.tensor([side.tokens for side in sides], device=found.logp.device)
        chosen_N = torch.arange(len(sides), device=found.logp.device) % 2 == 0
        chosen_N = chosen_N.repeat_interleave(tokens_S)
        reward_B2, logp_B2 = found.reward.view(-1, 2), found.logp.view(-1, 2)
        named = {
            "entropy": stats.entropy.mean(),
            "logits/chosen": stats.mean_logit[chosen_N].mean(),
            "logits/rejected": stats.mean_logit[~chosen_N].mean(),
            "mean_token_accuracy": stats.is_top1[chosen_N].float().mean(),
            "rewards/chosen": reward_B2[:, 0].mean(),
            "rewards/rejected": reward_B2[:, 1].mean(),
            "rewards/accuracies": (reward_B2[:, 0] > reward_B2[:, 1]).float().mean(),
            "rewards/margins": found.margin.mean(),
            "logps/chosen": logp_B2[:, 0].mean(),
            "logps/rejected": logp_B2[:, 1].mean(),
        }
        values = torch.stack([each.float() for each in named.values()]).tolist()
        for name, value in zip(named, values, strict=True):
            self._metrics["train"][name].append(value)
        self._total_train_tokens += sum(side.length for side in sides)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _trl_loss(self, model: Any, numbers: Sequence[int]) -> Tensor:
        rows = [self.session.rows[number] for number in numbers]
        sides = [row.sides[side] for side in (0, 1) for row in rows]
        inputs = self._prepare_inputs(pad(sides))
        # A lower reference is a higher reward: TRL multiplies what is taken off here by beta.
        per_token = self.options.length_weight / self.options.beta
        tokens_2B = inputs["completion_mask"].sum(dim=1).view(2, -1)
        references_2B = self._references(numbers).T.to(tokens_2B.device) - per_token * tokens_2B
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = references_2B
        self.loss_weights = [weight * self._share(len(numbers)) for weight in self.weights]
        seen: list[Tensor] = []

        def held(**kwargs: Any) -> Any:
            outputs = self._held(sides, inputs["completion_mask"], numbers)
            seen.append(outputs.log_probs)
            return outputs

        loss: Tensor = super()._compute_loss(held, inputs, False)
        if self.options.nll_weight:
            loss = loss + self.options.nll_weight * self._nll(seen[0], rows)
        return loss

    def _nll(self, logprobs_ST: Tensor, rows: Sequence[Row]) -> Tensor:
        """This micro-batch's part of the chosen answers' negative log-likelihood."""
        logprobs_B = logprobs_ST.chunk(2)[0].sum(dim=1)
        if self.options.nll == "token":
            return -logprobs_B.sum() * len(self.step_batches) / self._chosen_tokens()
        tokens_B = logprobs_B.new_tensor([row.chosen.tokens for row in rows])
        return -(logprobs_B / tokens_B).mean() * self._share(len(rows))

    def _references(self, numbers: Sequence[int]) -> Tensor:
        """[B, 2], as the loss takes them."""
        return torch.tensor([self.scores.known[number][3:] for number in numbers])

    def _chosen_tokens(self) -> int:
        """Of the whole step, those that the loss sees."""
        return sum(self.session.rows[number].chosen.tokens for number in self._of_step())


class _Reported(torch.autograd.Function):
    """The value of one loss and the gradient of another."""

    @staticmethod
    def forward(ctx: Any, trained: Tensor, reported: Tensor) -> Tensor:
        return reported.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _refuse_weights(rows: Sequence[Row], sorting: Set[str]) -> None:
    weighted = [row for row in rows if row.weight != 1]
    if sorting and weighted:
        raise UserError(
            f"{', '.join(sorted(sorting))} compares sorted pairs and has no part for one alone, so "
            f"examples have weight 1; found {weighted[0].weight:g} on example {weighted[0].id}"
        )
