"""Sample and score a checkpoint with Hugging Face transformers, in this process.

One engine opens any number of checkpoints, one after the other. A policy reads its tokenizer when
it first needs it and its weights at the first token it must sample or score. decoding.py samples;
what it does not serve, generating.py does, with the same draws, in more time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from roles.policy import adapters, devices, generating
from roles.policy.decoding import Decoder, cache_bytes
from roles.policy.devices import Device
from roles.policy.rows import Drawn, Ids, Row, StopStrings
from roles.policy.scoring import dropout, token_logprobs
from roles.policy.serving import TOO_LONG
from roles.policy.text import TextPolicy
from store import checkpoints
from store.errors import UserError
from store.records import Checkpoint, Sampling

DType = Literal["auto", "float32", "bfloat16", "float16"]


FEW = 4
"""Answers sampled at once below which it is said: a batch reads the weights once for all of it."""


class TransformersEngine:
    """Opens checkpoints that `AutoModelForCausalLM` can load, adapters of them, and reward models.

    dtype: "auto" is float32 on a CPU, where it is bit-stable, and elsewhere that of the stored
    weights (an adapter's: of its base's).
    batch_size: completions that are sampled together, and rows that are scored together.
    cache_gib: of keys and values that one batch of completions may come to, with each as long as
    max_tokens lets it be; a single one is sampled whatever it takes. None is half of what the
    weights leave of a CUDA device, and 4 elsewhere. It does not bound models that `generate`
    samples, but for their batch_size.
    threads: of the CPU, for all of torch; None leaves them as they are.
    """

    writes_by_template = True

    def __init__(
        self,
        dtype: DType = "auto",
        device: Device = "auto",
        batch_size: Annotated[int, Field(ge=1)] = 256,
        threads: Annotated[int, Field(ge=1)] | None = None,
        cache_gib: Annotated[float, Field(gt=0)] | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.batch_size = batch_size
        self.threads = threads
        self.cache_gib = cache_gib

    def open(self, checkpoint: Checkpoint) -> TransformersPolicy:
        """The checkpoint as a policy. Nothing is read before it is needed."""
        if not checkpoint.path.is_dir():
            raise UserError(f"no folder {str(checkpoint.path)!r} to open a checkpoint from")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = devices.find(self.device)
        dtype = self.dtype
        if dtype == "auto" and device.type == "cpu":
            dtype = "float32"
        if dtype == "bfloat16":
            devices.check_bfloat16(device)
        if checkpoints.is_reward_model(checkpoint.path):
            from roles.policy.reward_policy import RewardPolicy

            return RewardPolicy(checkpoint, dtype, self.device)
        return TransformersPolicy(checkpoint, dtype, device, self.batch_size, self.cache_gib)


class TransformersPolicy(TextPolicy):
    """One checkpoint, ready to sample and to score."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str,
        device: torch.device,
        batch_size: int,
        cache_gib: float | None = None,
    ) -> None:
        super().__init__(checkpoint)
        self._dtype = dtype
        self._device = device
        self._batch_size = batch_size
        self._cache_gib = cache_gib
        self._weights: Any = None
        self._made_decoder: Decoder | None = None
        self._said: set[str] = set()

    def _score(
        self, starts: Sequence[Ids], answers: Sequence[Ids], dropout_seed: int | None
    ) -> list[list[float]]:
        with dropout(self._model, dropout_seed):
            return token_logprobs(self._model, starts, answers, rows=self._batch_size)

    def _draw(self, rows: Sequence[Row], sampling: Sampling) -> list[Drawn]:
        drawn: dict[int, Drawn] = {}
        for batch, served in self._batches(rows):
            drawn |= zip(
                batch, self._drawn([rows[n] for n in batch], sampling, served), strict=True
            )
        return [drawn[n] for n in range(len(rows))]

    def close(self) -> None:
        """Free the memory of the weights; a later call would load them again."""
        self._weights = self._made_decoder = None
        devices.give_back()

    @cached_property
    def _pad_id(self) -> int:
        pad = self._tokenizer.pad_token_id
        return self._end_ids[0] if pad is None else int(pad)

    @property
    def _model(self) -> Any:
        if self._weights is None:
            model = adapters.load_model(self._checkpoint, self._dtype)
            # `generate` fills what its argument leaves open from the model's own settings
            # (repetition penalty, forced tokens), which would change what is sampled.
            model.generation_config = generating.settings(self._end_ids, self._pad_id)
            self._weights = model.to(self._device).eval()
        return self._weights

    @property
    def _decoder(self) -> Decoder:
        if self._made_decoder is None:
            self._made_decoder = Decoder(self._model)
        return self._made_decoder

    def _say_left(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            warnings.warn(
                f"{type(self._model).__name__} is sampled by transformers' generate, which takes "
                f"longer: {why}",
                stacklevel=1,
            )

    def _say_few(self, at_once: int, room: int) -> None:
        if "few" not in self._said:
            self._said.add("few")
            gib = self._cache_bytes / 2**30
            warnings.warn(
                f"answers are sampled {at_once} at a time, which takes longer: engine.cache_gib is "
                f"{gib:.3g}, and each may have {room:,} tokens; raise the one, or lower max_tokens",
                stacklevel=1,
            )

    def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], bool]]:
        """Places of rows to sample together, and whether decoding.py serves them."""
        if not rows:
            return
        serves = [self._decoder.serves(len(row.prompt) + row.room) for row in rows]
        served = [n for n, yes in enumerate(serves) if yes]
        left = [n for n, yes in enumerate(serves) if not yes]
        planned = list(
            self._decoder.batches([rows[n] for n in served], self._batch_size, self._cache_bytes)
        )
        # Rows that do not go together make small batches as well, of which there is nothing to say.
        longest = max((len(rows[n].prompt) + rows[n].room for n in served), default=0)
        fit = self._cache_bytes // max(1, longest * self._decoder.bytes_per_token)
        most = max(map(len, planned), default=0)
        if max(most, fit) < min(len(served), self._batch_size, FEW):
            self._say_few(most, max(rows[n].room for n in served))
        for batch in planned:
            yield [served[n] for n in batch], True
        if left:
            self._say_left(self._decoder.unserved or TOO_LONG)
        # What a token of a model that is not served takes is not known.
        at_once = self._cache_bytes // max(1, self._decoder.bytes_per_token)
        longer = [rows[n] for n in left]
        for batch in generating.batches(self._model, longer, self._batch_size, at_once):
            yield [left[n] for n in batch], False

    @property
    def _cache_bytes(self) -> int:
        if self._cache_gib is not None:
            return int(self._cache_gib * 2**30)
        return cache_bytes(self._model)

    def _drawn(self, rows: Sequence[Row], sampling: Sampling, served: bool) -> list[Drawn]:
        stops = None
        if sampling.stop:
            stops = StopStrings(self._tokenizer, sampling.stop, self._end_ids, len(rows))
        try:
            if served:
                return self._decoder.decode(
                    rows,
                    sampling,
                    end_ids=self._end_ids,
                    stops=stops,
                    most=self._batch_size,
                    bytes_at_once=self._cache_bytes,
                )
            return generating.generate(
                self._model,
                rows,
                sampling,
                end_ids=self._end_ids,
                pad_id=self._pad_id,
                stops=stops,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"the weights in {str(self._path)!r} give {error}") from error
