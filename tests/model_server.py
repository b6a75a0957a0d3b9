"""An OpenAI-compatible model server that misbehaves as it is told: `model_server.py [JSON]`.

A process of its own on 127.0.0.1. It prints its port and serves until its standard input ends.
What it says hangs on the question and the seed alone, and how it fails on these and on how often
they came before, so a run with failures can be held against one without.

A question says what is to become of it by a word in capitals (WORDS). The rest is set for all
questions (Habits), at the start or later by POST /habits; GET /seen says what came.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

WORDS = ("REFUSE", "FILTER", "FORBIDDEN", "TOO_LONG", "CUT_OFF", "EMPTY", "STOPPED", "NO_TEXT")


@dataclass
class Habits:
    """What the server does. Shares are of the calls that the cap let through."""

    cap: float = 0
    """Calls that it takes in any second; 0 is no limit."""
    window_s: float = 1.0
    """The cap counts over this long: in it `cap * window_s` calls are taken."""
    says_when: str = "s"
    """How a refusal says when to come back: s, ms, date, reset, or nothing."""
    fail: float = 0
    """Share of calls answered with 500."""
    cut: float = 0
    """Share of calls whose body ends in the middle, and with it the connection."""
    hang: float = 0
    hang_s: float = 60
    """Share of calls that say nothing for so long; then the connection ends."""
    garble: float = 0
    """Share of calls answered with JSON that is no chat completion."""
    always: tuple[int, str] | None = None
    """A status and a message that is the answer to every chat completion."""
    first: tuple[tuple[int, dict[str, str]], ...] = ()
    """Statuses, with headers, that answer the first calls, one each."""
    latency_s: float = 0.0
    models: tuple[str, ...] = ("judge",)
    key: str | None = None
    """Without it in a call's header the answer is 401."""
    offers_structure: bool | None = True
    """None takes no notice of a JSON schema; False answers 400."""
    completion_limit: bool = False
    """It knows max_completion_tokens, and not max_tokens."""
    reasons: bool = False
    """Replies carry a reasoning_content."""


@dataclass
class Seen:
    """What came to the server since its habits were last set."""

    calls: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    at_once: int = 0
    peak: int = 0
    connections: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    """The body of the last chat completion, and `authorization`, its header."""
    starts: list[float] = field(default_factory=list)
    """Monotonic seconds at which calls came, those that the cap refused left out."""
    refused: list[float] = field(default_factory=list)


class ModelServer:
    def __init__(self, habits: Habits) -> None:
        self.set(habits)

    def set(self, habits: Habits) -> None:
        self.habits = habits
        self.seen = Seen()
        self.taken: deque[float] = deque()
        self.times: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen.connections += 1
        try:
            while (request := await _read(reader)) is not None:
                writer.write(await self._answer(*request))
                await writer.drain()
                if writer.is_closing():
                    return
        except (ConnectionError, asyncio.IncompleteReadError, _Hangup) as end:
            if isinstance(end, _Hangup):
                writer.write(end.half)
        finally:
            writer.close()

    async def _answer(self, method: str, path: str, key: str, body: bytes) -> bytes:
        if path == "/habits":
            self.set(Habits(**json.loads(body)))
            return _response(200, {})
        if path == "/seen":
            return _response(200, asdict(self.seen))
        if self.habits.key is not None and key != f"Bearer {self.habits.key}":
            self._count("401")
            return _response(401, _error(f"Incorrect API key provided: {key[7:]}"))
        if (method, path) == ("GET", "/v1/models"):
            return _response(200, {"data": [{"id": name} for name in self.habits.models]})
        if (method, path) != ("POST", "/v1/chat/completions"):
            return _response(404, {"detail": "Not Found"})
        self.seen.calls += 1
        self.seen.at_once += 1
        self.seen.peak = max(self.seen.peak, self.seen.at_once)
        try:
            status, said, headers = await self._complete(json.loads(body), key)
            self._count(str(status))
            return _response(status, said, headers)
        except _Hangup as end:
            self._count(end.why)
            raise
        finally:
            self.seen.at_once -= 1

    def _count(self, what: str) -> None:
        self.seen.statuses[what] = self.seen.statuses.get(what, 0) + 1

    async def _complete(self, body: dict[str, Any], key: str) -> tuple[int, Any, dict[str, str]]:
        if (refusal := self._over_the_cap(time.monotonic())) is not None:
            return 429, _error("Rate limit reached for requests"), refusal
        self.seen.starts.append(time.monotonic())
        if self.seen.calls <= len(self.habits.first):
            status, headers = self.habits.first[self.seen.calls - 1]
            return status, _error("not now"), headers
        self.seen.last = {**body, "authorization": key}
        await asyncio.sleep(self.habits.latency_s)
        if self.habits.always is not None:
            return self.habits.always[0], _error(self.habits.always[1]), {}
        asked = json.dumps([body["messages"], body.get("seed")])
        answer = self._in_order(body, asked)
        await self._misbehave(asked, answer)
        self.times[asked] += 1
        share = _share(f"{self.times[asked]} {asked}")
        if share < self.habits.fail:
            return 500, _error("The server had an error"), {}
        if share < self.habits.fail + self.habits.garble:
            return 200, {"object": "list", "choices": []}, {}
        return *answer, {}

    async def _misbehave(self, asked: str, answer: tuple[int, Any]) -> None:
        share = 1 - _share(f"{self.times[asked] + 1} {asked}")
        if share < self.habits.cut:
            self.times[asked] += 1
            raise _Hangup("cut", _response(*answer)[:-40])
        if share < self.habits.cut + self.habits.hang:
            self.times[asked] += 1
            await asyncio.sleep(self.habits.hang_s)
            raise _Hangup("hung", b"")

    def _over_the_cap(self, now: float) -> dict[str, str] | None:
        if not self.habits.cap:
            return None
        while self.taken and self.taken[0] <= now - self.habits.window_s:
            self.taken.popleft()
        if len(self.taken) < round(self.habits.cap * self.habits.window_s):
            self.taken.append(now)
            return None
        self.seen.refused.append(now)
        wait = self.taken[0] + self.habits.window_s - now
        return {
            "s": {"Retry-After": str(int(wait) + 1)},
            "ms": {"retry-after-ms": str(round(wait * 1000) + 1)},
            "date": {"Retry-After": formatdate(time.time() + wait + 1, usegmt=True)},
            "reset": {"x-ratelimit-reset-requests": f"{round(wait * 1000) + 1}ms"},
            "nothing": {},
        }[self.habits.says_when]

    def _in_order(self, body: dict[str, Any], asked: str) -> tuple[int, Any]:
        """The answer of a server that has no trouble."""
        habits, shown = self.habits, body["messages"][-1]["content"]
        if body["model"] not in habits.models:
            return 404, _error(f"The model `{body['model']}` does not exist.", "model_not_found")
        if habits.completion_limit and "max_tokens" in body:
            return 400, _error("'max_tokens' is not supported: use 'max_completion_tokens'")
        if "TOO_LONG" in shown:
            long = "This model's maximum context length is 10 tokens; you requested 20 tokens"
            return 400, _error(long, "context_length_exceeded")
        if "FORBIDDEN" in shown:
            return 400, _error("flagged by our content policy", "content_filter")
        if habits.offers_structure is False and "response_format" in body:
            return 400, _error("Unknown field")
        text, finish = _judged(asked), "stop"
        if habits.offers_structure and "response_format" in body:
            why, _, score = text.partition("\nScore: ")
            text = json.dumps({"justification": why, "score": int(score)})
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if habits.reasons:
            message["reasoning_content"] = "Let me think.\nScore: 9"
        if "REFUSE" in shown:
            message |= {"content": None, "refusal": "I cannot judge that."}
        if "EMPTY" in shown:
            message["content"] = ""
        if "NO_TEXT" in shown:
            message["content"] = None
        if "FILTER" in shown:
            finish = "content_filter"
        if "CUT_OFF" in shown:
            finish = "length"
        choice = {"index": 0, "message": message, "finish_reason": finish}
        if "STOPPED" in shown:
            choice["stop_reason"] = "###"
        usage = {"prompt_tokens": len(shown.split()), "completion_tokens": len(text.split())}
        return 200, {"object": "chat.completion", "choices": [choice], "usage": usage}


class _Hangup(Exception):
    """The connection ends after `half` of an answer."""

    def __init__(self, why: str, half: bytes) -> None:
        super().__init__(why)
        self.why, self.half = why, half


def _judged(asked: str) -> str:
    return f"It does what was asked, mostly.\nScore: {int(_share(asked) * 6)}"


def _share(key: str) -> float:
    """A number in [0, 1) that is as good as drawn, and always the same."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 256**7


def _error(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", "param": None, "code": code}}


async def _read(reader: asyncio.StreamReader) -> tuple[str, str, str, bytes] | None:
    head = await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""
    if not head:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if line)
    headers = {name.lower(): value for name, value in headers.items()}
    method, path, _ = first.split(" ", 2)
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return method, path, headers.get("authorization", ""), body


def _response(status: int, said: Any, headers: dict[str, str] | None = None) -> bytes:
    body = json.dumps(said).encode()
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in (fields | (headers or {})).items())
    return f"HTTP/1.1 {status} Status\r\n{lines}\r\n".encode() + body


async def _main(habits: Habits) -> None:
    model = ModelServer(habits)
    server = await asyncio.start_server(model.serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


class Running:
    """A server process, as a test sees it."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def behave(self, **habits: Any) -> None:
        """Set its habits, those not named to the good ones, and forget what came so far."""
        body = json.dumps(asdict(Habits(**habits))).encode()
        urllib.request.urlopen(f"{self.root}/habits", data=body).close()

    def seen(self) -> Seen:
        with urllib.request.urlopen(f"{self.root}/seen") as answer:
            return Seen(**json.loads(answer.read()))


@contextmanager
def running(**habits: Any) -> Iterator[Running]:
    """A server process, ended at the end."""
    command = [sys.executable, str(Path(__file__)), json.dumps(habits)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield Running(int(process.stdout.readline()))
        finally:
            process.kill()


if __name__ == "__main__":
    asyncio.run(_main(Habits(**json.loads((sys.argv[1:] or ["{}"])[0]))))
