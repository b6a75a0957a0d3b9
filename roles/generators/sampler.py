"""Plain sampling: n answers to every prompt, straight from the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from roles.protocols import Policy
from store.records import Call, Completion, Prompt, Sampling


class Sampler:
    """n completions of each prompt.

    temperature: 0 is greedy, so all n are then equal. top_p 1 and top_k 0 are off.
    max_tokens: the longest completion, its end of turn included.
    stop: strings that end a completion; its text is cut before them.
    """

    def __init__(
        self,
        n: Annotated[int, Field(ge=1)] = 8,
        temperature: Annotated[float, Field(ge=0, le=10)] = 1.0,
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
        top_k: Annotated[int, Field(ge=0)] = 0,
        max_tokens: Annotated[int, Field(ge=1)] = 256,
        stop: tuple[Annotated[str, Field(min_length=1)], ...] = (),
    ) -> None:
        self.n = n
        self.sampling = Sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, stop=stop
        )
        self.most_tokens = n * max_tokens

    def generate(
        self, prompts: Sequence[Prompt], policy: Policy, call: Call
    ) -> list[list[Completion]]:
        """Each prompt's n completions. The seed hangs on the prompt and the index alone."""
        seeds = [
            [call.seed_for(prompt.digest, index) for index in range(self.n)] for prompt in prompts
        ]
        return policy.sample(prompts, sampling=self.sampling, seeds=seeds)
