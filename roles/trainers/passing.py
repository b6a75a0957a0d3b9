"""How the rows of a training go through its model, the same way for whoever asks.

Policy, reference and the check between them have to come from the same numerics. So there is one
way for a model: each prompt of a micro-batch passes once, each of its answers once, and only tokens
that the loss sees reach the head. A model whose head cannot be multiplied apart from it, or whose
loss has a part of its routing, goes through its own forward, padded, as TRL does it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from kernels.causal import Head, lasting_positions, read_head
from kernels.grouped_hidden import Grouped, grouped_hidden
from kernels.head import MAX_BYTES, MAX_BYTES_ELSEWHERE
from kernels.linear_logprob import TokenStats, linear_logprob_stats, of_logits
from kernels.passes import take
from roles.trainers.guards import Guarded
from roles.trainers.rows import Row, Tokens, pad
from store.errors import UserError

_TRL_NAMES = {
    "entropy": "entropy",
    "mean_logit": "mean_logits",
    "is_top1": "is_top1",
    "log_sum_sq": "log_sum_sq_probs",
}


@contextmanager
def _told_of_no_4_bits(model: Any) -> Iterator[None]:
    """TRL would round an adapter over 4 bits to bfloat16, in which small updates are lost, and
    Trainer refuses a model that has none, although a reference is only scored."""
    if not getattr(model, "is_loaded_in_4bit", False):
        yield
        return
    model.is_loaded_in_4bit = model.is_quantized = False
    try:
        yield
    finally:
        model.is_loaded_in_4bit = model.is_quantized = True


class Passing(Guarded):
    """A TRL trainer of a causal model, as it is before TRL's own methods."""

    stats: tuple[str, ...] = ("entropy", "mean_logit", "is_top1")
    """What TRL's metrics and losses read of each token besides its log-probability."""

    def __init__(self, *args: Any, model: Any, **kwargs: Any) -> None:
        _refuse_stretching(model, self.session.rows)
        with _told_of_no_4_bits(model):
            super().__init__(*args, model=model, **kwargs)

    @property
    def _head(self) -> Head | None:
        """The model's head where the ops multiply it; None: the model's own forward is used."""
        # Scores of a routed model come from there too. In bfloat16 a token near a tie goes to other
        # experts when its prompt passes apart, which is no rounding any more.
        return None if self.aux_loss_enabled else read_head(self.model)

    @property
    def _max_bytes(self) -> int:
        """Of logits that are held at once."""
        return MAX_BYTES if self.model.device.type == "cpu" else MAX_BYTES_ELSEWHERE

    def _arithmetic(self) -> AbstractContextManager[Any]:
        found: AbstractContextManager[Any] = self.accelerator.autocast()
        return found

    def _hidden(self, sides: Sequence[Tokens], budget: int | None = None) -> Grouped:
        """What predicts the tokens that the loss sees, side after side.

        Equal prompts of the sides, and equal answers to them, pass once. budget: of tokens that
        pass at once, padding included; None: all pass together.
        """
        with self._arithmetic():
            return _rows_of(self.model, sides, budget)

    def _token_stats(
        self, sides: Sequence[Tokens], stats: Collection[str], budget: int | None = None
    ) -> tuple[TokenStats, Tensor | None]:
        """Of the tokens that the loss sees, side after side, and the routing's part of the loss."""
        head = self._head
        if head is None:
            with self._arithmetic():
                return self._own_stats(self._prepare_inputs(pad(sides)), stats)
        rows = self._hidden(sides, budget)
        with self._arithmetic():
            found = linear_logprob_stats(
                rows.hidden,
                head.weight,
                rows.target,
                bias=head.bias,
                softcap=head.softcap,
                temperature=head.temperature,
                max_bytes=self._max_bytes,
                stats=stats,
            )
        return found, None

    def _own_stats(
        self, padded: dict[str, Tensor], stats: Collection[str]
    ) -> tuple[TokenStats, Tensor | None]:
        trained = padded.pop("completion_mask")[:, 1:].bool()
        asked = {"use_cache": False}
        if self.aux_loss_enabled:
            asked["output_router_logits"] = torch.is_grad_enabled()
        if read_head(self.model) is None:
            outputs = self.model(**padded, **asked)
            target = padded["input_ids"][:, 1:][trained]
            logits_NV = outputs.logits[:, :-1][trained].float()
            return of_logits(logits_NV, target, stats), _aux(outputs)
        labels = padded["input_ids"].clone()
        labels[:, 1:].masked_fill_(~trained, -100)
        outputs = self.model(**padded, **asked, labels=labels, fused_lm_head=True)
        found = {name: getattr(outputs, _TRL_NAMES[name])[trained] for name in stats}
        return TokenStats(outputs.log_probs[trained], **found), _aux(outputs)

    def _outputs(self, sides: Sequence[Tokens], trained_ST: Tensor) -> FusedCausalLMOutput:
        """What TRL's losses take from a model, [S, T - 1]; trained_ST: as `pad` makes it."""
        mask = trained_ST[:, 1:].bool()
        found, aux = self._token_stats(sides, self.stats)

        def spread(each: Tensor) -> Tensor:
            return each.new_zeros(mask.shape).masked_scatter(mask, each)

        return FusedCausalLMOutput(
            log_probs=spread(found.logp),
            label_mask=mask,
            aux_loss=aux,
            **{_TRL_NAMES[name]: spread(getattr(found, name)) for name in self.stats},
        )

    @torch.no_grad()
    def _logps(self, sides: Sequence[Tokens], budget: int | None = None) -> list[Tensor]:
        """Of each side the log-probabilities of the tokens that the loss sees, on the CPU."""
        counts = [side.tokens for side in sides]
        if not any(counts):  # an answer that is cut may be left with none
            return [torch.zeros(0) for _ in sides]
        found, _ = self._token_stats(sides, (), budget)
        return list(torch.split(found.logp.cpu(), counts))


def _rows_of(model: Any, sides: Sequence[Tokens], budget: int | None) -> Grouped:
    answers: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    seen = [side for side in sides if side.tokens]
    for side in seen:
        answers.setdefault(side.prompt, {})[side.answer] = 0
    completions = [list(several) for several in answers.values()]
    grouped = grouped_hidden(model, list(answers), completions, budget=budget)
    first = 0
    for several in answers.values():
        for answer in several:
            several[answer] = first
            first += len(answer)
    rows = [
        row
        for side in seen
        for row, trained in enumerate(side.trained, answers[side.prompt][side.answer])
        if trained
    ]
    seqlens = torch.tensor([0, *accumulate(side.tokens for side in sides)])
    if rows == list(range(first)):
        return grouped._replace(cu_seqlens=seqlens)
    index = torch.tensor(rows, dtype=torch.int64, device=grouped.target.device)
    return Grouped(take(grouped.hidden, index), grouped.target[index], seqlens)


def _refuse_stretching(model: Any, rows: Sequence[Row]) -> None:
    """Policy and reference would not have the same positions."""
    limit = lasting_positions(model.config)
    longest = max(rows, key=lambda row: row.length)
    if limit is not None and longest.length > limit:
        raise UserError(
            f"example {longest.id} has {longest.length} tokens with its prompt, and the positions "
            f"of {model.name_or_path}, whose rope_type is 'dynamic', last for {limit}: past that "
            "they turn on what was read before; leave it out"
        )


def _aux(outputs: Any) -> Tensor | None:
    found: Tensor | None = getattr(outputs, "aux_loss", None)
    return found
