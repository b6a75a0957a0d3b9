"""Answers written after a principle and kept without it: what makes them good or bad is known.

Source: "Aligning Large Language Models via Self-Steering Optimization" (arXiv 2410.17131): answers
after a good principle and after a bad one make pairs that no judge has to label, and both come from
the current policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from roles.generators.sampler import Sampler
from roles.proposers.messages import steered
from roles.protocols import Policy
from store.records import Call, Completion, Prompt


class Steered:
    """n completions after each principle, made as "good" and "bad", and then `plain` without one.

    good, bad: the principles, each put before the prompt as the system prompt that it then has.
    temperature, top_p, top_k, max_tokens, stop: as `sampler` has them.

    The log-probability of a completion is that which it has without its principle: how much like
    the policy's own answers it is.
    """

    def __init__(
        self,
        good: Annotated[str, Field(min_length=1)],
        bad: Annotated[str, Field(min_length=1)],
        n: Annotated[int, Field(ge=1)] = 4,
        plain: Annotated[int, Field(ge=0)] = 0,
        temperature: Annotated[float, Field(ge=0, le=10)] = 1.0,
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
        top_k: Annotated[int, Field(ge=0)] = 0,
        max_tokens: Annotated[int, Field(ge=1)] = 256,
        stop: tuple[Annotated[str, Field(min_length=1)], ...] = (),
    ) -> None:
        self.principles = {"good": good, "bad": bad}
        self.each, self.plain = n, plain
        self.n = len(self.principles) * n + plain
        """Of all completions."""
        self.sampling = Sampler(n, temperature, top_p, top_k, max_tokens, stop).sampling
        self.most_tokens = self.n * max_tokens

    def generate(
        self, prompts: Sequence[Prompt], policy: Policy, call: Call
    ) -> list[list[Completion]]:
        """Each prompt's completions; none where it is too long with a principle."""
        made: list[list[Completion]] = [[] for _ in prompts]
        for name, principle in self.principles.items():
            asked = [
                replace(prompt, messages=steered(prompt.messages, principle)) for prompt in prompts
            ]
            seeds = [[call.seed_for(each.digest, n) for n in range(self.each)] for each in asked]
            sampled = policy.sample(asked, sampling=self.sampling, seeds=seeds)
            for own, some in zip(made, alone(prompts, sampled, policy), strict=True):
                own += [replace(one, made_as=name) for one in some]
        if self.plain:
            seeds = [[call.seed_for(each.digest, n) for n in range(self.plain)] for each in prompts]
            sampled = policy.sample(prompts, sampling=self.sampling, seeds=seeds)
            for own, some in zip(made, sampled, strict=True):
                own += some
        return [own if len(own) == self.n else [] for own in made]


def alone(
    prompts: Sequence[Prompt], sampled: Sequence[Sequence[Completion]], policy: Policy
) -> list[list[Completion]]:
    """Completions that were sampled after more than their prompt, with the log-probability that
    each has after its prompt alone."""
    pairs = [(prompt, one) for prompt, own in zip(prompts, sampled, strict=True) for one in own]
    scored = policy.logprobs([prompt for prompt, _ in pairs], [one for _, one in pairs])
    likely = iter(scored)
    return [[replace(one, logprob=next(likely).total) for one in own] for own in sampled]
