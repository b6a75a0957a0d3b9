"""Many questions at once, each asked until it is settled by a reply or by a reason for none.

A question that waits for its next try holds nobody up, and then goes before those not yet asked.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from roles.policy.completions import Setback
from roles.policy.connection import Connection
from roles.policy.quoting import disarm
from store.errors import UserError
from store.records import Call, Prompt, Reply, Sampling

if TYPE_CHECKING:
    from roles.policy.server import ChatServer

Place = tuple[int, int]
"""Of a question, and of a seed among its own."""
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 8.0
SHARED_DOUBLING = 0.5
"""How much of a doubling of the back-off a failure is, when others got through meanwhile: the
server is not down, and those that are left at the end need not wait as if it were."""
SHARED_TRY = 0.1
"""How much of a try a refusal for too many calls is, when others got through meanwhile: the pace
was at fault, and not the question."""
LOOK_EVERY_S = 0.2
"""How often to look whether the run is to stop, while calls are under way."""


class Stopped(Exception):
    """The run is to stop. An event loop that meets a KeyboardInterrupt leaves its tasks behind."""


def backoff_s(doublings: float) -> float:
    """How long to wait for the next try: exponential, with full jitter.

    Source: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
    """
    return random.uniform(0, min(FIRST_BACKOFF_S * 2**doublings, LONGEST_BACKOFF_S))


@dataclass(eq=False)
class Asked:
    """One question with one seed."""

    place: Place
    question: Prompt
    seed: int
    tries: float = 0
    """Those it has used up; the calls it took may be more."""
    doublings: float = 0
    calls: int = 0
    began: float | None = None
    left: float = 0


@dataclass(frozen=True)
class Form:
    """How a question is written for the server, which may learn better between two of them."""

    server: ChatServer
    sampling: Sampling
    schema: dict[str, Any] | None

    def held(self) -> bool:
        return self.schema is not None and self.server.offers_structure is not False

    def body(self, asked: Asked) -> dict[str, Any]:
        sampling = self.sampling
        body: dict[str, Any] = {
            "model": self.server.model,
            "messages": [
                {
                    "role": turn.role,
                    "content": disarm(turn.content) if turn.quoted else turn.content,
                }
                for turn in asked.question.messages
            ],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self.server.limit_name: sampling.max_tokens,
            "seed": asked.seed,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.top_k:
            body["top_k"] = sampling.top_k  # not of the standard, but most local servers know it
        if self.held():
            form = {"name": "judgement", "strict": True, "schema": self.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body | self.server.extra


class Settling:
    """One call of `ask` while it lasts: workers that take what is to be asked next."""

    def __init__(
        self,
        server: ChatServer,
        connection: Connection,
        form: Form,
        call: Call,
        keep: Callable[[int, int, Reply], None] | None,
    ) -> None:
        self._server, self._connection, self._form = server, connection, form
        self._call, self._keep = call, keep
        self._waiting: asyncio.PriorityQueue[tuple[float, int, Asked | None]]
        self._waiting = asyncio.PriorityQueue()
        self._gate = asyncio.Lock()
        self._replies: dict[Place, Reply] = {}
        self._total = self._numbered = 0
        self._got_through = float("-inf")

    async def settled(self, questions: Sequence[Asked]) -> dict[Place, Reply]:
        """A reply for each place."""
        self._total = len(questions)
        for asked in questions:
            self._put(asked)
        count = min(self._server.concurrency, self._total)
        workers = {asyncio.create_task(self._work()) for _ in range(count)}
        try:
            while len(self._replies) < self._total:
                self._look()
                ended, _ = await asyncio.wait(
                    workers, timeout=LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                )
                for worker in ended:
                    worker.result()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return self._replies

    def _put(self, asked: Asked | None) -> None:
        """The most often asked first, and then in the order they came."""
        self._numbered += 1
        self._waiting.put_nowait((-asked.tries if asked else 0, self._numbered, asked))

    def _look(self) -> None:
        if self._call.stopping():
            raise Stopped

    async def _work(self) -> None:
        while (asked := (await self._waiting.get())[-1]) is not None:
            self._look()
            asked.left = await self._leave()
            asked.calls += 1
            if asked.began is None:
                asked.began = asked.left
            answer = await self._connection.complete(self._form.body(asked), self._form.held())
            now = time.monotonic()
            if isinstance(answer, Setback):
                self._again(asked, answer, now)
                continue
            self._got_through = now
            self._server.pace.answered()
            if answer.structured:
                self._server.offers_structure = True
            self._settle(asked, answer, now)

    async def _leave(self) -> float:
        """When this call leaves, which is now. One at a time waits for that, the others for it."""
        async with self._gate:
            while (wait_s := self._server.pace.wait(now := time.monotonic())) > 0:
                await asyncio.sleep(wait_s)
        return now

    def _again(self, asked: Asked, found: Setback, now: float) -> None:
        pace, wait_s = self._server.pace, 0.0
        shared = self._got_through > asked.left
        if found.too_fast:
            pace.refused(asked.left, now, found.wait_s)
            asked.tries += SHARED_TRY if shared else 1
        elif not found.is_lesson:
            if found.wait_s is None:
                wait_s = backoff_s(asked.doublings)
            else:
                pace.pause(now + found.wait_s)
            asked.tries += 1
            asked.doublings += SHARED_DOUBLING if shared else 1
        if asked.tries <= self._server.retries:
            asyncio.get_running_loop().call_later(wait_s, self._put, asked)
            return
        assert asked.began is not None
        if (found.too_fast or found.unreachable) and self._got_through < asked.began:
            raise UserError(f"{self._server.shown} takes no call: {found.reason}")
        times = f" (asked {asked.calls} times)" if asked.calls > 1 else ""
        self._settle(asked, Reply(status=found.status, reason=found.reason + times), now)

    def _settle(self, asked: Asked, reply: Reply, now: float) -> None:
        reply = replace(reply, seed=asked.seed, seconds=now - asked.left)
        self._replies[asked.place] = reply
        if self._keep is not None:
            self._keep(*asked.place, reply)
        self._call.progress(len(self._replies), self._total)
        if len(self._replies) == self._total:
            self._put(None)
