"""A model whose replies are remembered: the same question is asked once, in all rounds and runs.

A key is made of the judge's version, the model, the question's words (the candidate's text among
them), how it is sampled and which vote it is. Seeds are no part of it: they differ by round.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from judges.models import ask_model
from store.records import Call, Prompt, Reply, Sampling

WRITTEN_EVERY_S = 1.0
"""A killed judge has paid for so many seconds' replies at most that nobody remembers."""


class Memory(Protocol):
    """Where replies are kept (store/cache.py)."""

    def find(self, keys: Sequence[str]) -> dict[str, tuple[str, Reply]]: ...

    def add(self, said: Mapping[str, tuple[Mapping[str, Any], Reply]]) -> None: ...


class Remembered:
    """`model` behind a memory. identity: which model it is, in words; version: the judge's.

    place: where it is asked. What was said at the very same place was paid for there and never
    committed, or it would not be asked again: it comes back with its cost, as if said just now.
    """

    def __init__(
        self, model: Any, identity: str, version: str, memory: Memory, place: str = ""
    ) -> None:
        self._model = model
        self._identity = identity
        self._version = version
        self._memory = memory
        self._place = place

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def ask(
        self,
        questions: Sequence[Prompt],
        *,
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        call: Call,
        schema: dict[str, Any] | None = None,
        keep: Callable[[int, int, Reply], None] | None = None,
    ) -> list[list[Reply]]:
        """As a server's `ask`. Equal questions of one call are asked once; no failure is kept."""
        keys = [
            [self._key(question, sampling, schema, vote) for vote in range(len(own))]
            for question, own in zip(questions, seeds, strict=True)
        ]
        places: dict[str, tuple[int, int]] = {}
        for n, own in enumerate(keys):
            for vote, key in enumerate(own):
                places.setdefault(key, (n, vote))
        found = self._memory.find(list(places))
        left = [(key, *place) for key, place in places.items() if key not in found]
        fresh = self._ask(left, questions, sampling, seeds, call, schema)
        known = {}
        for key, (place, reply) in found.items():
            if place and place == self._place:
                fresh[key] = reply
            else:
                known[key] = _free(reply)
        replies = [
            [
                replace(known[key], seed=seed)
                if key in known
                else _told(fresh[key], seed, first=places[key] == (n, vote))
                for vote, (key, seed) in enumerate(zip(own, its_seeds, strict=True))
            ]
            for n, (own, its_seeds) in enumerate(zip(keys, seeds, strict=True))
        ]
        if keep is not None:
            for n, told in enumerate(replies):
                for vote, reply in enumerate(told):
                    keep(n, vote, reply)
        return replies

    def _ask(
        self,
        left: Sequence[tuple[str, int, int]],
        questions: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        call: Call,
        schema: dict[str, Any] | None,
    ) -> dict[str, Reply]:
        """Replies that nobody remembers, kept as they come."""
        waiting: dict[str, tuple[Mapping[str, Any], Reply]] = {}
        written = time.monotonic()

        def keep(place: int, _: int, reply: Reply) -> None:
            nonlocal written
            key, n, vote = left[place]
            if reply.status == "ok":
                waiting[key] = (self._about(questions[n], vote), reply)
            if time.monotonic() - written >= WRITTEN_EVERY_S:
                self._memory.add(waiting)
                waiting.clear()
                written = time.monotonic()

        try:
            replies = ask_model(
                self._model,
                [questions[n] for _, n, _ in left],
                sampling=sampling,
                seeds=[[seeds[n][vote]] for _, n, vote in left],
                call=call,
                schema=schema,
                keep=keep,
            )
        finally:
            self._memory.add(waiting)
        return {key: own[0] for (key, _, _), own in zip(left, replies, strict=True)}

    def _about(self, question: Prompt, vote: int) -> dict[str, Any]:
        return {
            "model": self._identity,
            "judge_version": self._version,
            "question_digest": question.digest,
            "vote": vote,
            "place": self._place,
        }

    def _key(
        self, question: Prompt, sampling: Sampling, schema: dict[str, Any] | None, vote: int
    ) -> str:
        said = [[turn.role, turn.content] for turn in question.messages]
        parts = [self._version, self._identity, said, asdict(sampling), schema, vote]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _told(reply: Reply, seed: int, *, first: bool) -> Reply:
    """A reply that several questions of one call share: the first of them has paid for it."""
    return replace(reply, seed=seed) if first else replace(_free(reply), seed=seed)


def _free(reply: Reply) -> Reply:
    return replace(reply, cached=True, seconds=0.0, cost=None if reply.cost is None else 0.0)
