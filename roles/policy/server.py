"""A model behind an OpenAI-compatible server, for judges to ask.

It is asked through the official client (connection.py), many questions at once and each until it
is settled (settling.py), as fast as the server takes them (pacing.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, NoReturn, TypeVar
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field

from roles.policy.completions import Setback
from roles.policy.connection import Connection
from roles.policy.pacing import Pace
from roles.policy.settling import Asked, Form, Place, Settling, Stopped, backoff_s
from store.errors import UserError
from store.records import Call, Prompt, Reply, Sampling

Found = TypeVar("Found")


class ChatServer:
    """A model behind a server.

    url: as in "http://127.0.0.1:8000/v1"; model: left out, the only one that it lists.
    key_env: the environment variable that holds the key, read whenever the server is asked.
    timeout_s: of one call, from the connection to the last byte.
    concurrency: calls under way at once. requests_per_second: a known limit, which is kept;
    without one the pace adapts to what the server refuses.
    retries: how often a question is asked again before its reply says that it failed.
    structured: whether replies are held to a judge's JSON schema; "auto": where it is offered.
    price_in, price_out: money for a million tokens asked and answered.
    extra: what else goes into the body of each request, in place of ours where they meet.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        key_env: str | None = None,
        timeout_s: Annotated[float, Field(gt=0)] = 60.0,
        concurrency: Annotated[int, Field(ge=1, le=1000)] = 32,
        requests_per_second: Annotated[float, Field(gt=0)] | None = None,
        retries: Annotated[int, Field(ge=0)] = 5,
        structured: Literal["auto"] | bool = "auto",
        price_in: Annotated[float, Field(ge=0)] | None = None,
        price_out: Annotated[float, Field(ge=0)] | None = None,
        extra: dict[str, Any] = {},  # noqa: B006  (it is only read)
    ) -> None:
        self.url, self.shown = url, shown_address(url)
        self.model, self.key_env = model, key_env
        self.timeout_s, self.concurrency, self.retries = timeout_s, concurrency, retries
        self.price_in, self.price_out, self.extra = price_in, price_out, dict(extra)
        self.offers_structure: bool | None = None if structured == "auto" else structured
        """Whether the server can hold a reply to a JSON schema; None: that is to be found out."""
        self.limit_name = "max_tokens"
        """What the server calls the most tokens that a reply may have."""
        self.pace = Pace(requests_per_second)

    def __repr__(self) -> str:
        return f"ChatServer({self.shown!r}, model={self.model!r})"

    @property
    def identity(self) -> str:
        """MODEL @ URL. Where no model was named the server is asked, once, which it has."""
        if self.model is None:
            run_async(self._identified())
        return f"{self.model} @ {self.shown}"

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
        """One reply for each seed of each question, in order.

        Raises UserError where asking again would change nothing, and KeyboardInterrupt when the
        run is to stop; what `keep` was told by then stands.
        """
        asked = [
            Asked((n, m), question, seed)
            for n, (question, its_seeds) in enumerate(zip(questions, seeds, strict=True))
            for m, seed in enumerate(its_seeds)
        ]
        try:
            found = run_async(self._settled(asked, Form(self, sampling, schema), call, keep))
        except Stopped:
            raise KeyboardInterrupt from None
        return [[found[n, m] for m in range(len(its_seeds))] for n, its_seeds in enumerate(seeds)]

    def models(self) -> list[str]:
        """The names of the models that the server lists. Raises UserError where it does not say."""
        return run_async(self._listed())

    def room(self, prompt: Prompt) -> int:
        """A large number: what is too long is found out by asking, and is a failed reply."""
        return 2**31

    def close(self) -> None:
        """Nothing is held: connections end with the call that made them."""

    def sample(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UserError: a completion has token ids, which a server does not tell."""
        self._cannot("samples completions")

    def logprobs(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UserError."""
        self._cannot("needs log-probabilities")

    def write(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UserError."""
        self._cannot("needs the tokens of a text")

    def prompt_ids(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UserError."""
        self._cannot("needs the tokens of a prompt")

    def decode(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UserError."""
        self._cannot("reads tokens")

    def _cannot(self, what: str) -> NoReturn:
        raise UserError(
            f"a judge that {what} asks a local model, and {self.shown} is a server; "
            'right are model = "round" and "checkpoint:PATH"'
        )

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        connection = Connection(self)
        try:
            if self.model is None:
                self.model = await _only_model(self, connection)
            yield connection
        finally:
            await connection.close()

    async def _listed(self) -> list[str]:
        connection = Connection(self)
        try:
            return await _models(self, connection)
        finally:
            await connection.close()

    async def _identified(self) -> None:
        async with self._connected():
            pass

    async def _settled(
        self,
        asked: Sequence[Asked],
        form: Form,
        call: Call,
        keep: Callable[[int, int, Reply], None] | None,
    ) -> dict[Place, Reply]:
        if not asked:
            return {}
        async with self._connected() as connection:
            return await Settling(self, connection, form, call, keep).settled(asked)


async def _models(server: ChatServer, connection: Connection) -> list[str]:
    """The names that the server lists, asked again as often as it may be."""
    for tried in range(server.retries + 1):
        names = await connection.models()
        if not isinstance(names, Setback):
            return names
        if tried < server.retries:
            await asyncio.sleep(backoff_s(tried) if names.wait_s is None else names.wait_s)
    assert isinstance(names, Setback)
    raise UserError(f"{server.shown} does not say which models it has: {names.reason}")


async def _only_model(server: ChatServer, connection: Connection) -> str:
    """The one model that the server lists."""
    names = await _models(server, connection)
    if len(names) != 1:
        known = ", ".join(names) or "none"
        raise UserError(f"{server.shown} has {len(names)} models; set model to one of: {known}")
    return names[0]


def shown_address(url: str) -> str:
    """The address without what may be secret in it: a user, a password, a query."""
    parts = urlsplit(url)
    shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"{shown!r} is no server's address; right is http://127.0.0.1:8000/v1")
    return shown.rstrip("/")


def run_async(work: Coroutine[Any, Any, Found]) -> Found:
    """What comes of it, also where an event loop runs already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    # A notebook and an async graph have a loop of their own, and loops do not nest.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, work).result()
