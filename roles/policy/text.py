"""What a policy does with text, whatever it samples with: encode, decode, and say what was drawn.

One tokenizer and one chat template, those in the checkpoint's folder: engines are given token ids
and give token ids back, so that no other tokenizer has a say in what is stored or trained.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from roles.policy import adapters
from roles.policy.encoding import prompt_ids
from roles.policy.folders import quiet
from roles.policy.rows import Drawn, Ids, Row
from store.errors import UserError
from store.records import Checkpoint, Completion, FinishReason, Prompt, Sampling, TokenLogprobs


class TextPolicy(ABC):
    """A checkpoint that lies in a folder of transformers'. Its tokenizer is read when it is first
    needed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._path = checkpoint.path
        # A judge of the user's may ask from several threads, and engines are not made for that.
        self._alone = threading.Lock()

    @abstractmethod
    def _draw(self, rows: Sequence[Row], sampling: Sampling) -> list[Drawn]:
        """What is drawn of the rows, in order. Those that begin alike come one after the other."""

    @abstractmethod
    def _score(
        self, starts: Sequence[Ids], answers: Sequence[Ids], dropout_seed: int | None
    ) -> list[list[float]]:
        """log p(token) of each token of the answers, each behind its start, in nats."""

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
        rows = [row for _, row in asked]
        with self._alone:
            drawn = self._draw(rows, sampling)
        sampled = {
            place: self._completion(row, each, sampling)
            for (place, row), each in zip(asked, drawn, strict=True)
        }
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
        starts = {messages: tuple(self.prompt_ids(prompt)) for messages, prompt in written.items()}
        with self._alone:
            scored = self._score(
                [starts[prompt.messages] for prompt in prompts],
                [completion.token_ids for completion in completions],
                dropout_seed,
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
