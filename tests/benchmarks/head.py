"""The head and the loss of a DPO step, forward and backward: ours, TRL's, Liger's, the naive one.

The same pairs in every row: prompts of 128 tokens, completions of 64 to 192, the reference's
log-probabilities at 0 so that Liger can do without a second head. Peers multiply float32 as fast
as ours does; TRL as it comes is in one table alone, for it takes as long as the rest. `bare
matmuls` is what no way through the head can pass: its products alone, three, or two where the head
is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import models
import passes
import torch
from torch import Tensor

from kernels.linear_logprob import linear_logprob
from kernels.preference_loss import PreferenceLoss, preference_loss, preference_loss_twin

BETA = 0.1
LOGGED = ["entropy", "mean_logit", "is_top1"]
"""What DPOTrainer logs of each token, and so what ours makes in a training."""
PROMPT = 128
QUOTED = dict.fromkeys(("naive, completion rows", "TRL tuned", "Liger", "bare matmuls"), "ours")


@dataclass(frozen=True)
class Batch:
    """Pairs as a padded batch of a model would leave them at its head."""

    rows: Tensor
    """[2B, T, H]: all chosen, then all rejected, as TRL and Liger stack them."""
    labels: Tensor
    """[2B, T]: each position's next token, -100 where it is not of a completion."""
    weight: Tensor
    lengths: list[int]
    """Tokens of chosen_0, rejected_0, chosen_1, ..."""

    @classmethod
    def make(cls, dtype: str, vocabulary: int, hidden: int, pairs: int, frozen: bool) -> Batch:
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randint(64, 185, (pairs,), generator=generator)
        rejected = chosen + torch.randint(0, 8, (pairs,), generator=generator)
        sides = torch.cat([chosen, rejected])
        width = PROMPT + int(sides.max()) - 1  # the last token has no next one
        of = getattr(torch, dtype)
        rows = torch.randn(2 * pairs, width, hidden, generator=generator).to(of)
        labels = torch.randint(vocabulary, (2 * pairs, width), generator=generator)
        place = torch.arange(width)
        ends = PROMPT - 1 + sides[:, None]
        labels[(place < PROMPT - 1) | (place >= ends)] = -100
        weight = (torch.randn(vocabulary, hidden, generator=generator) * hidden**-0.5).to(of)
        lengths = torch.stack([chosen, rejected], dim=1).flatten().tolist()
        return cls(rows.requires_grad_(), labels, weight.requires_grad_(not frozen), lengths)

    def completions(self) -> tuple[Tensor, Tensor]:
        """Hidden states [N, H] and targets [N] of completions alone, pair by pair."""
        order = torch.arange(len(self.rows)).view(2, -1).T.flatten()
        rows, labels = self.rows[order], self.labels[order]
        there = labels != -100
        return rows[there], labels[there]


def dpo(logp_N: Tensor, lengths: list[int]) -> Tensor:
    logp_S = torch.stack([part.sum() for part in logp_N.split(lengths)])
    return -torch.nn.functional.logsigmoid(BETA * (logp_S[0::2] - logp_S[1::2])).mean()


def passed(batch: Batch, loss_of: Callable[[], Tensor]) -> passes.Pass:
    found: list[Tensor] = []

    def run() -> None:
        batch.rows.grad = batch.weight.grad = None
        loss = loss_of()
        loss.backward()
        found[:] = [loss.detach()]

    trained = (batch.rows, batch.weight)
    return models.fast(passes.Pass(run, lambda: models.figures(found[0].item(), trained)))


def pair_by_pair(op: Callable[..., PreferenceLoss], of: dict[str, Any]) -> passes.Pass:
    batch = Batch.make(**of)
    cu_seqlens = torch.tensor([0, *batch.lengths]).cumsum(0)
    reference = torch.zeros(len(batch.lengths))

    def loss() -> Tensor:
        rows, target = batch.completions()
        more = {"kind": "sigmoid", "beta": BETA}
        return op(rows, batch.weight, target, cu_seqlens, reference, **more).loss

    return passed(batch, loss)


def ours(*, stats: list[str], **of: Any) -> passes.Pass:
    return pair_by_pair(partial(preference_loss, stats=stats), of)


def naive(**of: Any) -> passes.Pass:
    return pair_by_pair(preference_loss_twin, of)


def ours_any_loss(**of: Any) -> passes.Pass:
    batch = Batch.make(**of)

    def loss() -> Tensor:
        rows, target = batch.completions()
        return dpo(linear_logprob(rows, batch.weight, target), batch.lengths)

    return passed(batch, loss)


def trl(**of: Any) -> passes.Pass:
    """As DPOTrainer calls it on a CPU: all rows, and the statistics that it logs."""
    from trl.kernels import ChunkedLogProbFunction

    batch = Batch.make(**of)
    there = batch.labels != -100
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")

    def loss() -> Tensor:
        rows, target = batch.rows.flatten(0, 1), batch.labels.clamp(min=0).flatten()
        logp = ChunkedLogProbFunction.apply(
            rows, batch.weight, None, target, 1.0, 32768, None, 1.0, outputs
        )[0]
        chosen, rejected = (logp.view(there.shape) * there).sum(dim=1).chunk(2)
        return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()

    return passed(batch, loss)


def trl_tuned(**of: Any) -> passes.Pass:
    """TRL's function on completion rows, for log-probabilities alone."""
    from trl.kernels import ChunkedLogProbFunction

    batch = Batch.make(**of)

    def loss() -> Tensor:
        rows, target = batch.completions()
        logp = ChunkedLogProbFunction.apply(
            rows, batch.weight, None, target, 1.0, 32768, None, 1.0, ("log_probs",)
        )[0]
        return dpo(logp, batch.lengths)

    return passed(batch, loss)


def liger(**of: Any) -> passes.Pass:
    """Liger's, which compiles one chunk's forward and backward, on all rows of the completions."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        raise passes.Unavailable(str(error)) from error
    batch = Batch.make(**of)
    fused = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    labels = batch.labels[:, PROMPT - 1 :].contiguous()

    def loss() -> Tensor:
        rows = batch.rows[:, PROMPT - 1 :]
        return fused(batch.weight, rows, labels)[0]  # type: ignore[no-any-return]

    return passed(batch, loss)


def matmuls(*, frozen: bool, **of: Any) -> passes.Pass:
    """The products alone, at their fastest here, into memory that is there already."""
    from kernels.matmul import fast_float32, large

    batch = Batch.make(frozen=frozen, **of)
    rows, _ = (each.detach() for each in batch.completions())
    weight = batch.weight.detach()
    grad = torch.randn(len(rows), len(weight)).to(rows.dtype)
    logits, of_rows, of_weight = (
        large(like.shape, like.dtype, like.device).zero_() for like in (grad, rows, weight)
    )

    def run() -> None:
        with fast_float32():
            torch.mm(rows, weight.T, out=logits)
            torch.mm(grad, weight, out=of_rows)
            if not frozen:
                torch.mm(grad.T, rows, out=of_weight)

    return passes.Pass(run)


def tables(settings: passes.Settings) -> Iterator[passes.Table]:
    for dtype in ("bfloat16", "float32"):
        for frozen in (False, True):
            of = {
                "dtype": dtype,
                "vocabulary": 32_000,
                "hidden": 512,
                "pairs": 4,
                "frozen": frozen,
            }
            variants = {
                "ours": (ours, of | {"stats": LOGGED}),
                "ours, nothing logged": (ours, of | {"stats": []}),
                "ours, any loss": (ours_any_loss, of),
                "naive, completion rows": (naive, of),
                "TRL tuned": (trl_tuned, of),
                "Liger": (liger, of),
                "bare matmuls": (matmuls, of),
            }
            low = dtype == "bfloat16"
            if low and not frozen:
                variants["TRL as it comes"] = (trl, of)
            yield passes.compare(
                f"head and DPO loss{', head frozen' * frozen}, {dtype}: vocabulary 32,000, hidden "
                "512; 4 pairs of answers of 64 to 191 tokens",
                variants,
                baseline="ours",
                agree={"loss": 1e-2 if low else 1e-4, "grad_norm": 2e-2 if low else 1e-3},
                settings=settings,
                quoted=None if frozen else QUOTED,
            )


if __name__ == "__main__":
    passes.main(tables)
