"""The official client of OpenAI-compatible servers, and what its exceptions mean."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from roles.policy.completions import (
    Setback,
    about_the_question,
    read_completion,
    setback,
    words_of,
)
from store.errors import UserError
from store.records import Reply

if TYPE_CHECKING:
    from roles.policy.server import ChatServer

Found = TypeVar("Found")
_KEYLESS = "none"
"""The client insists on a key, and would else send the one in OPENAI_API_KEY to any server."""


@dataclass
class _Refusal(Exception):
    """A status that asking again would not change."""

    status: int
    body: object
    said: str


class Connection:
    """The client, for as long as one event loop lives. Its methods raise UserError."""

    def __init__(self, server: ChatServer) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(
                "a model behind a server is asked with the package 'openai', which is not "
                "installed; right is: pip install 'ratchet-loop[server]'"
            ) from None
        self._server, self._openai, self._key = server, openai, _key_of(server)
        self._client = openai.AsyncOpenAI(
            base_url=server.url, api_key=self._key or _KEYLESS, max_retries=0, timeout=None
        )

    async def close(self) -> None:
        await self._client.close()

    async def complete(self, body: dict[str, Any], held: bool) -> Reply | Setback:
        """The reply to a chat completion, or what was in the way.

        held: whether `body` asks for a reply to the judge's JSON schema.
        """

        async def post() -> Reply:
            # A plain object: making the client's own classes costs as much as the call.
            said = await self._client.post("/chat/completions", cast_to=object, body=body)
            return read_completion(said, held, self._server.price_in, self._server.price_out)

        try:
            return await self._tried(post)
        except _Refusal as refusal:
            if refusal.status in (400, 413, 422):
                reply = about_the_question(refusal.status, refusal.body)
                return reply or self._without_it(refusal, body, held)
            if refusal.status == 404:
                raise await self._not_found(refusal) from None
            raise self._mistake(refusal) from None

    async def models(self) -> list[str] | Setback:
        """The names of the models that the server lists, or what was in the way."""

        async def get() -> list[str]:
            match await self._client.get("/models", cast_to=object):
                case {"data": [*models]} if all(isinstance(each, dict) for each in models):
                    return [str(each.get("id")) for each in models]
            raise ValueError("it is no list of models")

        try:
            return await self._tried(get)
        except _Refusal as refusal:
            raise self._mistake(refusal) from None

    async def _tried(self, ask: Callable[[], Awaitable[Found]]) -> Found | Setback:
        shown, limit_s = self._server.shown, self._server.timeout_s
        try:
            # Over the whole of a call: the client's own time-outs begin anew with each byte.
            async with asyncio.timeout(limit_s):
                return await ask()
        except TimeoutError:
            return Setback(status="timed_out", reason=f"no answer within {limit_s:g} s")
        except self._openai.APIStatusError as error:
            said = words_of(error.body, self._key)
            found = setback(shown, error.status_code, said, error.response.headers)
            if found is None:
                raise _Refusal(error.status_code, error.body, said) from None
            return found
        except self._openai.APIConnectionError as error:
            # The client's transport is another package from one of its versions to the next.
            cause = type(error.__cause__).__name__
            why = " ".join(str(error.__cause__ or error).split())
            return Setback(
                reason=f"the connection to {shown} failed: {why or cause}",
                unreachable=cause in ("ConnectError", "ConnectTimeout"),
            )
        except ValueError as error:
            return Setback(reason=f"the answer cannot be read: {error}")

    def _without_it(self, refusal: _Refusal, body: dict[str, Any], held: bool) -> Setback:
        """Asked again without what the server may not know: a JSON schema, then `max_tokens`."""
        server = self._server
        again = Setback(reason=refusal.said, is_lesson=True)
        if held and server.offers_structure is not True:
            server.offers_structure = False
            return again
        renamed = "max_completion_tokens"
        if renamed in refusal.said and "max_tokens" in body and "max_tokens" not in server.extra:
            server.limit_name = renamed
            return again
        mistake = self._mistake(refusal)
        if held and server.offers_structure:
            mistake = UserError(
                f"{mistake}; a server that knows no JSON schema is structured=false"
            )
        raise mistake

    async def _not_found(self, refusal: _Refusal) -> UserError:
        model, shown = self._server.model, self._server.shown
        try:
            names = await self.models()
        except UserError:
            names = []
        if isinstance(names, Setback) or not names or model in names:
            return UserError(
                f"{shown}/chat/completions answered 404: {refusal.said}; right is the address "
                "that /chat/completions follows, as in http://127.0.0.1:8000/v1"
            )
        return UserError(f"{shown} has no model {model!r}; it offers: {', '.join(names)}")

    def _mistake(self, refusal: _Refusal) -> UserError:
        shown, key_env = self._server.shown, self._server.key_env
        said = f"{shown} answered {refusal.status}: {refusal.said}"
        if refusal.status in (401, 403):
            right = (
                "set key_env to the name of the environment variable that holds the key"
                if key_env is None
                else f"the key in the environment variable {key_env!r} is not one that it takes"
            )
            said = f"{said}; {right}"
        return UserError(said)


def _key_of(server: ChatServer) -> str:
    key = os.environ.get(server.key_env, "") if server.key_env is not None else ""
    if server.key_env is not None and not key:
        raise UserError(
            f"the key for {server.shown} is to be in the environment variable "
            f"{server.key_env!r}, which is not set"
        )
    return key
