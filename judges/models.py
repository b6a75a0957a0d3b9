"""The model that a judge asks, and by name the others that it may ask.

A judge asks what it is handed and never opens a model: which one that is changes every round, and
whoever opens it also frees it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from judges.asking import stop_when_told
from roles.protocols import Policy, Server
from store.errors import UserError, unknown
from store.records import Call, Completion, Prompt, Reply, Sampling


class Models:
    """A policy or server to judge with, and others by the names that a judge gives them.

    others: name -> model, or a function that finds it. A judge that asks for none of them can be
    handed the policy itself.
    """

    def __init__(
        self,
        main: Policy | Server | None,
        others: Mapping[str, Any] | Callable[[str], Any],
    ) -> None:
        self._main = main
        self._others = others

    def other(self, name: str) -> Policy:
        if callable(self._others):
            return cast(Policy, self._others(name))
        if name not in self._others:
            raise unknown("model", name, self._others)
        return cast(Policy, self._others[name])

    def __getattr__(self, name: str) -> Any:
        if self._main is None:
            raise AttributeError(name)
        return getattr(self._main, name)


def other_model(policy: Policy | None, name: str | None) -> Policy | None:
    """The model of this name; None is `policy` itself. Raises UserError where there is none."""
    if name is None:
        return policy
    find = getattr(policy, "other", None)
    if find is None:
        raise UserError(
            f"the judge asks the model {name!r} and was handed one model alone; "
            "hand it judges.Models(policy, {name: model, ...})"
        )
    return cast(Policy, find(name))


def ask_model(
    policy: Policy | None,
    questions: Sequence[Prompt],
    *,
    sampling: Sampling,
    seeds: Sequence[Sequence[int]],
    call: Call,
    schema: dict[str, Any] | None = None,
    keep: Callable[[int, int, Reply], None] | None = None,
) -> list[list[Reply]]:
    """One reply for each seed of each question, in order; one that failed says so.

    keep: is told each reply as it comes, with the places of its question and of its seed.
    A question that is too long for a policy is never cut: its replies have the status failed.
    """
    stop_when_told(call)
    ask = getattr(policy, "ask", None)
    if ask is not None:
        settings: dict[str, Any] = {"sampling": sampling, "seeds": seeds, "call": call}
        return cast(list[list[Reply]], ask(questions, schema=schema, keep=keep, **settings))
    if getattr(policy, "sample", None) is None:
        raise UserError('the judge asks a model: set its model, as in judge.model = "round"')
    policy = cast(Policy, policy)
    began = time.perf_counter()
    said = policy.sample(questions, sampling=sampling, seeds=seeds)
    seconds = (time.perf_counter() - began) / max(sum(map(len, said)), 1)
    call.progress(len(questions), len(questions))
    replies = [
        [_heard(one, seconds) for one in completions]
        if completions
        else [_too_long(policy.room(question), seed) for seed in its_seeds]
        for question, completions, its_seeds in zip(questions, said, seeds, strict=True)
    ]
    if keep is not None:
        for place, own in enumerate(replies):
            for vote, reply in enumerate(own):
                keep(place, vote, reply)
    return replies


def _heard(said: Completion, seconds: float) -> Reply:
    return Reply(
        text=said.text,
        finish_reason=said.finish_reason,
        seed=said.seed,
        seconds=seconds,
        tokens=len(said.token_ids),
    )


def _too_long(room: int, seed: int) -> Reply:
    return Reply(
        status="failed",
        reason=f"the judge's prompt is {1 - room} tokens too long for its context",
        seed=seed,
    )
