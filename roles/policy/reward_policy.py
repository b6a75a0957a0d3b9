"""A checkpoint that is a reward model: it reads conversations and scores them, and writes nothing.

What else a policy does with text, encode and decode it, it does as well: answers that came with
the data can be shown to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from roles.policy.devices import Device
from roles.policy.sequence_scores import SequenceScores
from roles.policy.transformers import TransformersPolicy
from store.errors import UserError
from store.records import Checkpoint, Completion, Prompt, Sampling, TokenLogprobs


class RewardPolicy(TransformersPolicy):
    """A sequence-classification model with one label, ready to score."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: Device) -> None:
        from roles.policy import devices

        super().__init__(checkpoint, dtype, devices.find(device), batch_size=1)
        self._given_device: Device = device

    @cached_property
    def scores(self) -> SequenceScores:
        """What the judge `reward_model` asks."""
        return SequenceScores(str(self._path), None, self._dtype, self._given_device)

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        raise self._mute("answers")

    def logprobs(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        dropout_seed: int | None = None,
    ) -> list[TokenLogprobs]:
        raise self._mute("log-probabilities")

    def _mute(self, lacks: str) -> UserError:
        return UserError(
            f"{self._path} is a reward model, which has no {lacks}; a track of its examples says "
            'with `writer` which model writes them, as in writer = "policy"'
        )

    def close(self) -> None:
        """Free the memory of the weights; a later call would load them again."""
        if "scores" in self.__dict__:
            self.scores.close()
        super().close()
