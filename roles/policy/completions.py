"""What a server's answer to a question means: a reply, a setback that may pass, or a mistake.

Servers agree on the form of a chat completion, and on little else. What is read here are the
parts that they share, and of errors the status first and the words last.
"""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from store.errors import UserError
from store.records import FinishReason, Reply, Status

LONGEST_PAUSE_S = 3600.0
_TOO_LONG = re.compile(
    r"context[ _](length|window|size)|too (long|many tokens)|max_model_len|string_above_max_length"
    r"|token limit|reduce the length|exceeds? .{0,60}tokens",
    re.IGNORECASE,
)
_FORBIDDEN = re.compile(r"content[ _](filter|policy|management)|moderation|flagged", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|$)")
_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, kw_only=True)
class Setback:
    """A call that failed in a way that may pass."""

    status: Literal["failed", "timed_out"] = "failed"
    reason: str
    wait_s: float | None = None
    """How long the server says to wait."""
    too_fast: bool = False
    """It has refused the call for there being too many."""
    unreachable: bool = False
    """There is nobody there."""
    is_lesson: bool = False
    """It was about the form of the question, which is another from now on."""


def read_completion(
    said: object, held: bool, price_in: float | None = None, price_out: float | None = None
) -> Reply:
    """The reply in a chat completion. Raises ValueError for what is none.

    held: whether a JSON schema was sent with the question. Some servers take no notice of one:
    a reply counts as structured when it came as the object that was asked for.
    price_in, price_out: money for a million tokens asked and answered.
    """
    match said:
        case {"choices": [{"message": {**message}, **choice}, *_], **rest}:
            text = message.get("content")
        case _:
            raise ValueError("it is not the JSON of a chat completion")
    if not isinstance(text, str | None):
        raise ValueError("the message of the chat completion is no text")
    asked, tokens = (_count(rest, name) for name in ("prompt_tokens", "completion_tokens"))
    cost = None
    if asked is not None and tokens is not None and (price_in, price_out) != (None, None):
        cost = (asked * (price_in or 0) + tokens * (price_out or 0)) / 1e6
    status, reason = _whether_refused(message.get("refusal"), choice.get("finish_reason"))
    return Reply(
        text=text or "",
        status=status,
        reason=reason,
        finish_reason=_finish(choice),
        structured=held and _is_object(text or ""),
        tokens=tokens,
        cost=cost,
    )


def _count(rest: Mapping[Any, Any], name: str) -> int | None:
    usage = rest.get("usage")
    found = usage.get(name) if isinstance(usage, dict) else None
    return found if isinstance(found, int) else None


def _whether_refused(refusal: object, finish: object) -> tuple[Status, str | None]:
    if isinstance(refusal, str) and refusal:
        return "refused", f"the model refused: {_short(refusal)}"
    if finish == "content_filter":
        return "refused", "the server's content filter stopped it"
    return "ok", None


def _finish(choice: Mapping[Any, Any]) -> FinishReason:
    if choice.get("finish_reason") == "length":
        return "length"
    # Not of the standard: vLLM and SGLang say here which stop string it was.
    return "stop_string" if isinstance(choice.get("stop_reason"), str) else "stop"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def words_of(body: object, key: str) -> str:
    """What a server says of an error, in short. A key that it repeats is left out."""
    message: object = body
    if isinstance(body, dict):
        found = body.get("error", body)
        message = found.get("message", body) if isinstance(found, dict) else found
    said = message if isinstance(message, str) else json.dumps(message)
    return _short(said.replace(key, "***") if key else said)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:199]}…"


def about_the_question(status: int, body: object) -> Reply | None:
    """The reply to a question that the server cannot take as it is; None if that is not why."""
    found = body.get("error", body) if isinstance(body, dict) else body
    said = json.dumps(found) if isinstance(found, dict) else str(found)
    if status == 413 or _TOO_LONG.search(said):
        return Reply(status="failed", reason="the judge's prompt is too long for the server")
    if _FORBIDDEN.search(said):
        return Reply(status="refused", reason="the server's content filter refused the question")
    return None


def setback(url: str, status: int, said: str, headers: Mapping[str, str]) -> Setback | None:
    """What to make of a status that may pass; None for one that will not."""
    if status not in (408, 409, 429) and status < 500:
        return None
    wait_s = _wait(headers, status)
    if wait_s is not None and wait_s > LONGEST_PAUSE_S:
        raise UserError(f"{url} wants no call for {wait_s / 3600:.1f} hours: {said}")
    return Setback(
        reason=f"the server answered {status}: {said}", wait_s=wait_s, too_fast=status == 429
    )


def _wait(headers: Mapping[str, str], status: int) -> float | None:
    """Seconds until the server wants to be asked again; None where it does not say."""
    if status not in (429, 503):
        return None
    if (found := _seconds(headers.get("retry-after-ms"))) is not None:
        return found / 1000
    after = headers.get("retry-after")
    if (found := _seconds(after)) is not None:
        return found
    if after and (date := email.utils.parsedate_tz(after)) is not None:
        return max(0.0, email.utils.mktime_tz(date) - time.time())
    return _seconds(headers.get("x-ratelimit-reset-requests")) if status == 429 else None


def _seconds(written: str | None) -> float | None:
    """Seconds of "1.5", "20ms" or "6m0s"."""
    parts = _DURATION.findall(written or "")
    if not parts or "".join(map("".join, parts)) != written:
        return None
    seconds = math.fsum(float(number) * _UNITS[unit] for number, unit in parts)
    return seconds if math.isfinite(seconds) else None
