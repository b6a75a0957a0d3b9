"""`generate` of transformers in place of our engine, to hold a round of ours against.

A plug-in like any other: `--set engine.use=tests/benchmarks/peer_engine.py:Generate`. The same
prompts become the same tokens; all else is as transformers does it when nobody thinks about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from roles.policy.encoding import prompt_ids
from roles.policy.folders import quiet
from store.errors import UserError
from store.records import Checkpoint, Completion, Prompt, Sampling, TokenLogprobs


class Generate:
    """Opens checkpoints that are sampled by `generate` and scored by whole logits, in float32.

    rows: completions of one call of `generate`, and rows of a scoring pass.
    tuned: prompts are sorted by length first, such that less is padded.
    """

    def __init__(self, rows: int = 256, tuned: bool = False) -> None:
        self.rows = rows
        self.tuned = tuned

    def open(self, checkpoint: Checkpoint) -> GeneratePolicy:
        return GeneratePolicy(checkpoint, self.rows, self.tuned)


class GeneratePolicy:
    """One checkpoint."""

    def __init__(self, checkpoint: Checkpoint, rows: int, tuned: bool) -> None:
        self._rows, self._tuned = rows, tuned
        with quiet():
            self._tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, padding_side="left")
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.path, dtype=torch.float32
            )
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._positions = int(self._model.config.max_position_embeddings)

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """A batch of prompts, padded on the left, with `num_return_sequences` answers to each."""
        if sampling.stop:
            raise UserError(f"this peer ends at no stop strings, found {sampling.stop}")
        answers: list[list[Completion]] = [[] for _ in prompts]
        fitting = [n for n, prompt in enumerate(prompts) if self.room(prompt) > 0]
        if self._tuned:
            fitting.sort(key=lambda n: -self.room(prompts[n]))
        for count in sorted({len(seeds[n]) for n in fitting}):
            asked = [n for n in fitting if len(seeds[n]) == count]
            at_once = max(1, self._rows // count)
            for first in range(0, len(asked), at_once):
                batch = asked[first : first + at_once]
                found = self._sample([prompts[n] for n in batch], sampling, count, seeds[batch[0]])
                for n, group in zip(batch, found, strict=True):
                    answers[n] = group
        return answers

    def _sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, count: int, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        drawn = sampling.temperature > 0
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        padded = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        room = min(sampling.max_tokens, *(self.room(prompt) for prompt in prompts))
        torch.manual_seed(seeds[0])
        with torch.inference_mode():
            rows_RT = self._model.generate(
                **padded,
                generation_config=GenerationConfig(
                    do_sample=drawn,
                    num_return_sequences=count if drawn else 1,
                    max_new_tokens=room,
                    eos_token_id=self._tokenizer.eos_token_id,
                    pad_token_id=self._tokenizer.pad_token_id,
                    **self._drawing(sampling) if drawn else {},
                ),
            )
        ends = rows_RT[:, padded["input_ids"].shape[1] :].tolist()
        each = count if drawn else 1
        groups = [ends[first : first + each] for first in range(0, len(ends), each)]
        return [
            [self._completion(ids, sampling) for ids in (group if drawn else group * count)]
            for group in groups
        ]

    def _drawing(self, sampling: Sampling) -> dict[str, Any]:
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,  # left out, it would be 50
        }

    def _completion(self, ids: list[int], sampling: Sampling) -> Completion:
        end = self._tokenizer.eos_token_id
        stopped = end in ids
        kept = ids[: ids.index(end) + 1] if stopped else ids
        return Completion(
            text=self.decode(kept),
            token_ids=tuple(kept),
            finish_reason="stop" if stopped else "length",
            sampling=sampling,
        )

    def logprobs(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        dropout_seed: int | None = None,
    ) -> list[TokenLogprobs]:
        """By the logits of all positions of all rows, in the order they come."""
        if dropout_seed is not None:
            raise UserError("this peer scores without dropout")
        scored: list[TokenLogprobs] = []
        for first in range(0, len(prompts), self._rows):
            batch = slice(first, first + self._rows)
            starts = [self.prompt_ids(prompt) for prompt in prompts[batch]]
            ends = [list(completion.token_ids) for completion in completions[batch]]
            rows = [start + end for start, end in zip(starts, ends, strict=True)]
            padded = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            with torch.inference_mode():
                logits_RTV = self._model(**padded).logits[:, :-1].float()
                logps_RT = (
                    logits_RTV.log_softmax(-1)
                    .gather(-1, padded["input_ids"][:, 1:, None])
                    .squeeze(-1)
                )
            scored += [
                TokenLogprobs(logprobs=tuple(logps_T[len(logps_T) - len(end) :].tolist()))
                for logps_T, end in zip(logps_RT, ends, strict=True)
            ]
        return scored

    def write(self, text: str) -> Completion:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return Completion(text=text, token_ids=(*ids, self._tokenizer.eos_token_id))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return prompt_ids(self._tokenizer, prompt)

    def room(self, prompt: Prompt) -> int:
        return self._positions - len(self.prompt_ids(prompt))

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def close(self) -> None:
        self._model = None
