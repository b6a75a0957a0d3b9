"""What every trainer that is held to a reference does alike, whatever its loss.

Reference log-probabilities are computed by the very model object that is then trained, before its
first update, and kept beside the saves. Where the reference is another checkpoint the same trainer
is made of that one first, scores, and is freed.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roles.policy import adapters
from roles.trainers import saves
from roles.trainers.guards import Guarded
from roles.trainers.training import Session, release
from store.records import Checkpoint, Training

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


class Scores:
    """Log-probabilities under the reference of each row's sides, and what else a loss asks of it.

    A row is (example id, chosen, rejected or None, ...).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: list[tuple[Any, ...]] = []
        if path.exists():
            self.known = [tuple(row) for row in json.loads(path.read_text())]

    def keep(self, known: list[tuple[Any, ...]]) -> None:
        saves.write_json(self.path, known)
        self.known = known

    def by_example(self) -> dict[int, tuple[float, float | None]]:
        # A start with NaN in it makes a diverged training, and NaN is not JSON.
        return {
            example: (chosen, rejected)
            for example, chosen, rejected, *_ in self.known
            if math.isfinite(chosen) and (rejected is None or math.isfinite(rejected))
        }


def train_held(
    session: Session, reference: Checkpoint, make: Callable[[Any, Session, Scores, bool], Any]
) -> Training:
    """Train what `make` makes of a model, the session, the reference's scores and whether the
    reference is the start."""
    start = session.start
    own = reference.path.resolve() == start.path.resolve()
    base = adapters.base_path(start).resolve() == reference.path.resolve() and not own
    scores = Scores(session.saves / "reference.json")
    if not own and not base and not scores.known:
        make(session.model(reference), session, scores, own)
        release()

    def scoring(model: Any) -> Any:
        # It scores while it is made: an adapter's base is the same model with that off.
        with adapters.switched_off(model) if base else nullcontext():
            return make(model, session, scores, own and not session.drops)

    return session.run(scoring, scores.by_example)


class Held(Guarded):
    """A TRL trainer whose data set is the numbers of the session's rows."""

    session: Session
    scores: Scores
    own: bool
    """Whether the reference is the start."""
    step_batches: Sequence[dict[str, Tensor]] = ()
    """The micro-batches of the step at hand."""

    @abstractmethod
    def _score(self, numbers: Sequence[int]) -> Sequence[tuple[float | None, ...]]:
        """What `scores` keeps of these rows, the ids left out."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        rows = self.session.rows
        if not self.scores.known:
            self.model.eval()
            # Like lengths together: less padding.
            order = sorted(range(len(rows)), key=lambda number: len(rows[number].chosen.ids))
            known: list[tuple[Any, ...]] = [()] * len(rows)
            for first in range(0, len(rows), batch_size):
                numbers = order[first : first + batch_size]
                for number, scored in zip(numbers, self._score(numbers), strict=True):
                    known[number] = (rows[number].id, *scored)
            self.scores.keep(known)
        return dataset

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.step_batches = batches
        return batches, items

    def _share(self, rows: int) -> float:
        """What to multiply a mean over a micro-batch by, so that Trainer's mean over micro-batches
        is the mean over the step's rows also where the last micro-batch is smaller."""
        of_step = sum(len(batch["row"]) for batch in self.step_batches)
        return len(self.step_batches) * rows / of_step

    def _held(self, model: Any, numbers: Sequence[int]) -> Callable[..., Any]:
        """The model as TRL asks it for these rows: checked, and weighed where gradients pass."""

        def held(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            if self.own and self.state.global_step == 0:
                self._check(outputs.log_probs.detach(), numbers)
            self._weigh(outputs.log_probs, numbers)
            return outputs

        return held

    def _weigh(self, logprobs_ST: Tensor, numbers: Sequence[int]) -> None:
        # TRL has no place for an example's weight. But an example's log-probabilities enter only
        # its own part of the loss, so to scale their gradient is to scale that part.
        weights = [self.session.rows[number].weight for number in numbers]
        if logprobs_ST.requires_grad and set(weights) != {1.0}:
            sides = len(logprobs_ST) // len(numbers)
            weight_S = torch.tensor(weights * sides, device=logprobs_ST.device)
            scale = weight_S[:, None].mul
            logprobs_ST.register_hook(scale)  # type: ignore[no-untyped-call]

    def _check(self, logprobs_ST: Tensor, numbers: Sequence[int]) -> None:
        """Before the first update the policy is its reference, or one of the two is not what it
        is taken for."""
        for place, policy in enumerate(logprobs_ST.sum(dim=1).tolist()):
            side, place = divmod(place, len(numbers))
            row = self.session.rows[numbers[place]]
            reference = self.scores.known[numbers[place]][1 + side]
            tokens = (row.chosen, row.rejected)[side]
            assert tokens is not None
            allowed = tolerance(self.session.dtype, tokens.tokens)
            if abs(policy - reference) > allowed:
                raise RuntimeError(
                    f"before the first update the {('chosen', 'rejected')[side]} answer of example "
                    f"{row.id} has log-probability {policy} under the policy and {reference} under "
                    f"the reference, which are the same checkpoint; they may differ by "
                    f"{allowed:.3g}"
                )
