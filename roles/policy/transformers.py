"""Sample and score a checkpoint with Hugging Face transformers, in this process.

One engine opens any number of checkpoints, one after the other. A policy reads its tokenizer when
it first needs it and its weights at the first token it must sample or score. Everything that
decides a token lies in sampling.py; `generate` around it is greedy and keeps the cache.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from roles.policy import adapters, devices
from roles.policy.devices import Device
from roles.policy.encoding import prompt_ids
from roles.policy.folders import quiet
from roles.policy.sampling import KeyedDraw, StopStrings, shared_start
from store.errors import UserError
from store.records import Checkpoint, Completion, FinishReason, Prompt, Sampling, TokenLogprobs

DType = Literal["auto", "float32", "bfloat16", "float16"]

# How many logits a scoring pass may hold at once: 512 MiB of them in fp32.
_LOGITS_AT_ONCE = 2**27


class TransformersEngine:
    """Opens checkpoints that `AutoModelForCausalLM` can load, and adapters of them.

    dtype: "auto" is float32 on a CPU, where it is bit-stable, and elsewhere that of the stored
    weights (an adapter's: of its base's).
    batch_size: rows in one forward pass.
    threads: of the CPU, for all of torch; None leaves them as they are.
    """

    def __init__(
        self,
        dtype: DType = "auto",
        device: Device = "auto",
        batch_size: Annotated[int, Field(ge=1)] = 256,
        threads: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.batch_size = batch_size
        self.threads = threads

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
        return TransformersPolicy(checkpoint, dtype, device, self.batch_size)


@dataclass(frozen=True)
class _Row:
    """One completion to be sampled, and its place in the answer."""

    place: tuple[int, int]
    ids: list[int]
    seed: int
    room: int


class TransformersPolicy:
    """One checkpoint, ready to sample and to score."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: str, device: torch.device, batch_size: int
    ) -> None:
        self._checkpoint = checkpoint
        self._path = checkpoint.path
        self._dtype = dtype
        self._device = device
        self._batch_size = batch_size
        self._weights: Any = None

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """One completion for each seed of each prompt, in order; equal seeds give equal ones."""
        rows = []
        for place, (prompt, its_seeds) in enumerate(zip(prompts, seeds, strict=True)):
            ids = self.prompt_ids(prompt)
            room = min(sampling.max_tokens, self._room(ids))
            if room > 0:
                rows += [_Row((place, n), ids, seed, room) for n, seed in enumerate(its_seeds)]
        # By length, so that little is padding. Rows that the context cuts shorter than
        # max_tokens do not share a batch with others: positions past the context may not exist.
        rows.sort(key=lambda row: (len(row.ids), row.place))
        sampled: dict[tuple[int, int], Completion] = {}
        while rows:
            batch = [row for row in rows[: self._batch_size] if row.room == rows[0].room]
            rows = rows[len(batch) :]
            for row, completion in zip(batch, self._sample(batch, sampling), strict=True):
                sampled[row.place] = completion
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
        starts = [self.prompt_ids(prompt) for prompt in prompts]
        ends = [list(completion.token_ids) for completion in completions]
        pairs = list(zip(starts, ends, strict=True))
        order = sorted(range(len(pairs)), key=lambda n: (sum(map(len, pairs[n])), n))
        scored: dict[int, TokenLogprobs] = {}
        with torch.inference_mode(), self._dropout(dropout_seed):
            while order:
                batch = order[: self._rows_at_once([pairs[n] for n in order])]
                order = order[len(batch) :]
                for n, logps in zip(batch, self._score([pairs[n] for n in batch]), strict=True):
                    scored[n] = TokenLogprobs(logprobs=tuple(logps))
        return [scored[n] for n in range(len(pairs))]

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
        self._weights = None
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

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

    def _generation(self, room: int | None = None) -> Any:
        return GenerationConfig(
            do_sample=False,
            eos_token_id=list(self._end_ids),
            pad_token_id=self._pad_id,
            max_new_tokens=room,
        )

    @property
    def _model(self) -> Any:
        if self._weights is None:
            model = adapters.load_model(self._checkpoint, self._dtype)
            # `generate` fills what its argument leaves open from the model's own settings
            # (repetition penalty, forced tokens), which would change what is sampled.
            model.generation_config = self._generation()
            self._weights = model.to(self._device).eval()
        return self._weights

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

    def _sample(self, rows: Sequence[_Row], sampling: Sampling) -> list[Completion]:
        room = rows[0].room
        draw = KeyedDraw([row.seed for row in rows], sampling, room, self._device)
        stops = None
        if sampling.stop:
            stops = StopStrings(self._tokenizer, sampling.stop, self._end_ids, len(rows))
        with torch.inference_mode():
            self._model.generate(
                **shared_start(self._model, [row.ids for row in rows], self._pad_id),
                generation_config=self._generation(room),
                logits_processor=[draw],
                stopping_criteria=[] if stops is None else [stops],
            )
        tokens_BT = torch.stack(draw.tokens, 1).tolist()
        logps_BT = torch.stack(draw.logprobs, 1).tolist()
        ends = stops.ends if stops is not None else [None] * len(rows)
        return [
            self._completion(row, tokens_T, logps_T, end, sampling)
            for row, tokens_T, logps_T, end in zip(rows, tokens_BT, logps_BT, ends, strict=True)
        ]

    def _completion(
        self,
        row: _Row,
        tokens: list[int],
        logps: list[float],
        stop_end: int | None,
        sampling: Sampling,
    ) -> Completion:
        """A row cut where it ended; `generate` goes on until the last row of the batch ends."""
        ends = [n for n, token in enumerate(tokens, 1) if token in self._end_ids][:1]
        reason: FinishReason = "stop" if ends else "length"
        end = ends[0] if ends else len(tokens)
        if stop_end is not None and stop_end <= end:
            reason, end = "stop_string", stop_end
        text = self.decode(tokens[:end])
        if reason == "stop_string":
            found = [text.find(string) for string in sampling.stop]
            text = text[: min((at for at in found if at >= 0), default=len(text))]
        logprob = math.fsum(logps[:end])
        if not math.isfinite(logprob):
            raise FloatingPointError(f"the weights in {str(self._path)!r} give logits of NaN")
        return Completion(
            text=text,
            token_ids=tuple(tokens[:end]),
            finish_reason=reason,
            logprob=logprob,
            seed=row.seed,
            sampling=sampling,
        )

    def _rows_at_once(self, pairs: Sequence[tuple[list[int], list[int]]]) -> int:
        """How many of the first pairs to score together: bounded rows, and bounded logits."""
        vocabulary = self._model.get_output_embeddings().weight.shape[0]
        first = len(pairs[0][0])
        rows = 0
        for start, end in pairs[: self._batch_size]:
            first = min(first, len(start))
            positions = len(start) + len(end) - first + 1
            if rows and (rows + 1) * positions * vocabulary > _LOGITS_AT_ONCE:
                break
            rows += 1
        return rows

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        width = max(len(start) + len(end) for start, end in pairs)
        input_ids = torch.full((len(pairs), width), self._pad_id)
        mask = torch.zeros_like(input_ids)
        for n, (start, end) in enumerate(pairs):
            input_ids[n, : len(start) + len(end)] = torch.tensor(start + end)
            mask[n, : len(start) + len(end)] = 1
        # The logits that predict completions; before the shortest prompt's end there are none.
        kept = width - min(len(start) for start, _ in pairs) + 1
        logits_BKV = self._model(
            input_ids.to(self._device), attention_mask=mask.to(self._device), logits_to_keep=kept
        ).logits
        skipped = width - logits_BKV.shape[1]
        return [
            _token_logps(
                logits_BKV[n, len(start) - 1 - skipped : len(start) + len(end) - 1 - skipped],
                torch.tensor(end, device=self._device),
            )
            for n, (start, end) in enumerate(pairs)
        ]

    @contextmanager
    def _dropout(self, seed: int | None) -> Iterator[None]:
        if seed is None:
            yield
            return
        gpus = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(seed)
            self._model.train()
            try:
                yield
            finally:
                self._model.eval()


def _token_logps(logits_TV: Tensor, ids_T: Tensor) -> list[float]:
    logits_TV = logits_TV.float()
    chosen_T = logits_TV.gather(1, ids_T.unsqueeze(1)).squeeze(1)
    logps: list[float] = (chosen_T - logits_TV.logsumexp(-1)).tolist()
    return logps
