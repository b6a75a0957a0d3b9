"""What every trainer that is held to a reference does alike, whatever its loss.

Reference log-probabilities are computed by the very model object that is then trained, before its
first update, and kept beside the saves. Where the reference is another checkpoint the same trainer
is made of that one first, scores, and is freed.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from kernels.matmul import fast_float32
from roles.policy import adapters, devices
from roles.policy.rows import Ids
from roles.policy.scoring import at_once, batches, own_batches
from roles.trainers import saves
from roles.trainers.passing import Passing
from roles.trainers.rows import Tokens
from roles.trainers.team import dealt
from roles.trainers.training import Session
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

    def keep(self, known: list[tuple[Any, ...]], *, write: bool = True) -> None:
        if write:
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
    # Those that others find may have been written since by the one that leads.
    scores.known = session.team.told(scores.known)
    if not own and not base and not scores.known:
        make(session.model(reference), session, scores, own)
        devices.give_back()

    def scoring(model: Any) -> Any:
        # It scores while it is made: an adapter's base is the same model with that off.
        with adapters.switched_off(model) if base else nullcontext():
            return make(model, session, scores, own and not session.drops)

    return session.run(scoring, scores.by_example)


class Held(Passing):
    """A TRL trainer whose data set is the numbers of the session's rows."""

    session: Session
    scores: Scores
    own: bool
    """Whether the reference is the start."""

    @abstractmethod
    def _asked(self, number: int) -> Sequence[Tokens]:
        """What of a row the reference scores."""

    @abstractmethod
    def _known(self, number: int, logps: Sequence[Tensor]) -> tuple[float | None, ...]:
        """What `scores` keeps of a row, its id left out. logps: of each token of what it asked."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self.scores.known:
            asked = [self._asked(number) for number in range(len(self.session.rows))]
            logps = self._score({side for sides in asked for side in sides})
            self.scores.keep(
                [
                    (row.id, *self._known(number, [logps[side] for side in sides]))
                    for number, (row, sides) in enumerate(
                        zip(self.session.rows, asked, strict=True)
                    )
                ],
                write=self.session.team.leads,
            )
        return dataset

    def _score(self, sides: Set[Tokens]) -> Mapping[Tokens, Tensor]:
        """Each once."""
        self.model.eval()
        if self.args.gradient_checkpointing:
            # Trainer turns it on when it begins to train, and prompts are not shared under it: the
            # policy would pass in another way than its reference.
            self.model.gradient_checkpointing_enable()
        order = sorted(sides, key=lambda side: (side.prompt, side.answer, side.trained))
        budget = at_once(self.model)
        team, passes = self.session.team, list(self._batches(order, budget))
        with fast_float32():
            own = [
                self._logps(scored, budget)
                for place, scored in enumerate(passes)
                if team.owns(place)
            ]
        found: dict[Tokens, Tensor] = {}
        for scored, logps in zip(passes, dealt(team.gathered(own)), strict=True):
            found |= zip(scored, logps, strict=True)
        return found

    def _batches(self, sides: Sequence[Tokens], budget: int) -> Iterator[list[Tokens]]:
        """All answers to a prompt beside each other and prompts of like length; where the model's
        own forward is used, rows of like length."""
        if self._head is None:
            rows = [side.ids for side in sides]
            for bucket in own_batches(self.model, rows, budget, self._max_bytes):
                yield [sides[place] for place in bucket]
            return
        asked: dict[Ids, dict[Ids, list[Tokens]]] = {}
        for side in sides:
            asked.setdefault(side.prompt, {}).setdefault(side.answer, []).append(side)
        answers = {prompt: list(several) for prompt, several in asked.items()}
        for batch in batches(answers, budget):
            yield [each for prompt in batch for ids in batch[prompt] for each in asked[prompt][ids]]

    def _of_step(self) -> list[int]:
        """The numbers of the step's rows."""
        return [number for batch in self.step_batches for number in batch["row"].tolist()]

    def _share(self, rows: int) -> float:
        """What to multiply a mean over a micro-batch by, so that Trainer's mean over micro-batches
        is the mean over the step's rows also where the last micro-batch is smaller."""
        return len(self.step_batches) * rows / len(self._of_step())

    def _held(
        self, sides: Sequence[Tokens], trained_ST: Tensor, numbers: Sequence[int]
    ) -> FusedCausalLMOutput:
        """What TRL's loss takes from a model for these rows: checked and weighed. sides: of all of
        them the chosen, then of all of them the rejected ones, if there are such."""
        outputs = self._outputs(sides, trained_ST)
        of_sides = [
            (number, side) for side in range(len(sides) // len(numbers)) for number in numbers
        ]
        self._check(outputs.log_probs.sum(dim=1), of_sides)
        self._weigh(outputs.log_probs, numbers)
        return outputs

    def _weigh(self, logprobs_ST: Tensor, numbers: Sequence[int]) -> None:
        # TRL has no place for an example's weight. But an example's log-probabilities enter only
        # its own part of the loss, so to scale their gradient is to scale that part.
        weights = [self.session.rows[number].weight for number in numbers]
        if logprobs_ST.requires_grad and set(weights) != {1.0}:
            sides = len(logprobs_ST) // len(numbers)
            weight_S = torch.tensor(weights * sides, device=logprobs_ST.device)
            scale = weight_S[:, None].mul
            logprobs_ST.register_hook(scale)  # type: ignore[no-untyped-call]

    def _check(self, logps_S: Tensor, sides: Sequence[tuple[int, int]]) -> None:
        """Before the first update the policy is its reference, or one of the two is not what it
        is taken for. sides: of each log-probability the row's number, and 0 for chosen."""
        if not self.own or self.state.global_step:
            return
        for (number, side), policy in zip(sides, logps_S.tolist(), strict=True):
            row = self.session.rows[number]
            reference = self.scores.known[number][1 + side]
            allowed = tolerance(self.session.dtype, row.sides[side].tokens)
            if abs(policy - reference) > allowed:
                raise RuntimeError(
                    f"before the first update the {('chosen', 'rejected')[side]} answer of example "
                    f"{row.id} has log-probability {policy} under the policy and {reference} under "
                    f"the reference, which are the same checkpoint; they may differ by "
                    f"{allowed:.3g}"
                )
