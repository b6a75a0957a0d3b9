"""Sample and score a checkpoint with Hugging Face transformers, in this process.

One engine opens any number of checkpoints, one after the other. A policy reads its tokenizer when
it first needs it and its weights at the first token it must sample or score. decoding.py samples;
what it does not serve, generating.py does, with the same draws, in more time.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from roles.policy import adapters, devices, generating
from roles.policy.decoding import Decoder, cache_bytes
from roles.policy.devices import Device
from roles.policy.encoding import prompt_ids
from roles.policy.folders import quiet
from roles.policy.rows import Drawn, Row, StopStrings
from roles.policy.scoring import dropout, token_logprobs
from roles.policy.serving import TOO_LONG
from store import checkpoints
from store.errors import UserError
from store.records import Checkpoint, Completion, FinishReason, Prompt, Sampling, TokenLogprobs

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


class TransformersPolicy:
    """One checkpoint, ready to sample and to score."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str,
        device: torch.device,
        batch_size: int,
        cache_gib: float | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._path = checkpoint.path
        self._dtype = dtype
        self._device = device
        self._batch_size = batch_size
        self._cache_gib = cache_gib
        self._weights: Any = None
        self._made_decoder: Decoder | None = None
        self._said: set[str] = set()
        # A judge of the user's may ask from several threads, and decoding changes the model.
        self._alone = threading.Lock()

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """One completion for each seed of each prompt, in order; equal seeds give equal ones."""
        asked: list[tuple[tuple[int, int], Row]] = []
        for place, (prompt, its_seeds) in enumerate(zip(prompts, seeds, strict=True)):
            ids = tuple(self.prompt_ids(prompt))
            room = min(sampling.max_tokens, self._room(ids))
            if room > 0:
                asked += [((place, n), Row(ids, seed, room)) for n, seed in enumerate(its_seeds)]
        # By length, so that little is padding.
        asked.sort(key=lambda each: (len(each[1].prompt), each[0]))
        sampled: dict[tuple[int, int], Completion] = {}
        with self._alone:
            for batch, served in self._batches([row for _, row in asked]):
                rows = [asked[n][1] for n in batch]
                for n, completion in zip(batch, self._sample(rows, sampling, served), strict=True):
                    sampled[asked[n][0]] = completion
        return [
            [sampled[place, n] for n in range(len(its_seeds)) if (place, n) in sampled]
            for place, its_seeds in enumerate(seeds)
        ]

    def logprobs(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        dropout_seed: int | None = None,
    ) -> list[TokenLogprobs]:
        """Raw log-probabilities of each completion's tokens after its prompt.

        dropout_seed: keep the model's dropout on, drawn from this seed; None switches it off.
        """
        if not prompts:
            return []
        written = {prompt.messages: prompt for prompt in prompts}
        starts = {messages: self.prompt_ids(prompt) for messages, prompt in written.items()}
        with self._alone, dropout(self._model, dropout_seed):
            scored = token_logprobs(
                self._model,
                [starts[prompt.messages] for prompt in prompts],
                [completion.token_ids for completion in completions],
                rows=self._batch_size,
            )
        return [TokenLogprobs(logprobs=tuple(logps)) for logps in scored]

    def write(self, text: str) -> Completion:
        """`text` as a completion that nobody sampled: encoded, with the end of turn."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return Completion(text=text, token_ids=(*ids, self._end_ids[0]), finish_reason="stop")

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens are, control tokens left out."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The token ids that the prompt becomes, up to where the answer begins."""
        return prompt_ids(self._tokenizer, prompt)

    def room(self, prompt: Prompt) -> int:
        """How many tokens of answer the context holds after the prompt; below 1, it is too long."""
        return self._room(self.prompt_ids(prompt))

    def close(self) -> None:
        """Free the memory of the weights; a later call would load them again."""
        self._weights = self._made_decoder = None
        devices.give_back()

    @cached_property
    def _tokenizer(self) -> Any:
        with quiet():
            return AutoTokenizer.from_pretrained(self._path)

    @cached_property
    def _end_ids(self) -> tuple[int, ...]:
        """Tokens that end a turn. The first is the one to write: the tokenizer's own."""
        found: list[int] = []
        if self._tokenizer.eos_token_id is not None:
            found.append(self._tokenizer.eos_token_id)
        if (self._path / "generation_config.json").is_file():
            named = GenerationConfig.from_pretrained(self._path).eos_token_id
        else:
            named = self._config.eos_token_id
        if named is not None:
            found += named if isinstance(named, list) else [named]
        if not found:
            raise UserError(
                f"the checkpoint in {str(self._path)!r} names no token that ends a turn; "
                "set eos_token in its tokenizer_config.json"
            )
        return tuple(dict.fromkeys(found))

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

    def _room(self, ids: Sequence[int]) -> int:
        return (2**31 if self._positions is None else self._positions) - len(ids)

    @cached_property
    def _positions(self) -> int | None:
        """How many tokens the model's context holds; None when its configuration does not say."""
        found = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        return None if found is None else int(found)

    @cached_property
    def _config(self) -> Any:
        return AutoConfig.from_pretrained(adapters.base_path(self._checkpoint))

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

    def _sample(self, rows: Sequence[Row], sampling: Sampling, served: bool) -> list[Completion]:
        stops = None
        if sampling.stop:
            stops = StopStrings(self._tokenizer, sampling.stop, self._end_ids, len(rows))
        try:
            if served:
                drawn = self._decoder.decode(
                    rows,
                    sampling,
                    end_ids=self._end_ids,
                    stops=stops,
                    most=self._batch_size,
                    bytes_at_once=self._cache_bytes,
                )
            else:
                drawn = generating.generate(
                    self._model,
                    rows,
                    sampling,
                    end_ids=self._end_ids,
                    pad_id=self._pad_id,
                    stops=stops,
                )
        except FloatingPointError as error:
            raise FloatingPointError(f"the weights in {str(self._path)!r} give {error}") from error
        return [
            self._completion(row, each, sampling) for row, each in zip(rows, drawn, strict=True)
        ]

    def _completion(self, row: Row, drawn: Drawn, sampling: Sampling) -> Completion:
        text = self.decode(drawn.tokens)
        reason: FinishReason = "stop" if drawn.tokens[-1] in self._end_ids else "length"
        if drawn.stop_end is not None:
            reason = "stop_string"
            found = [text.find(string) for string in sampling.stop]
            text = text[: min((at for at in found if at >= 0), default=len(text))]
        return Completion(
            text=text,
            token_ids=tuple(drawn.tokens),
            finish_reason=reason,
            logprob=math.fsum(drawn.logprobs),
            seed=row.seed,
            sampling=sampling,
        )
