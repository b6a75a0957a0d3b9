"""Turns of a chat, as a data file or an option says them."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from store.errors import UserError
from store.records import Message

_RIGHT = 'a text or a list of {"role": ..., "content": ...}'


def read_messages(value: Any, place: str) -> tuple[Message, ...]:
    """`value` as turns, a text being one of the user's. Raises UserError, naming `place`."""
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        raise UserError(f"{place} is {_RIGHT}; found {shown(value)}")
    try:
        # Tables of structs have every key in every turn, without a value where there is none.
        messages = tuple(
            Message(**{key: held for key, held in turn.items() if held is not None})
            for turn in turns
        )
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{first['loc'][-1]}: {first['msg']}" if first else error
        raise UserError(f"{place} is {_RIGHT}; {why}") from None
    if not messages[-1].content.strip():
        raise UserError(f"{place} is empty")
    return messages


def with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """`messages` behind the system prompt, unless they have one or there is none."""
    if system is None or messages[0].role == "system":
        return messages
    return (Message(role="system", content=system), *messages)


def steered(messages: tuple[Message, ...], principle: str) -> tuple[Message, ...]:
    """`messages` with a principle as their system prompt, or at the end of the one they have."""
    if messages[0].role != "system":
        return with_system(messages, principle)
    system = Message(role="system", content=f"{messages[0].content}\n\n{principle}")
    return (system, *messages[1:])


def shown(value: Any) -> str:
    """`value` for an error's sentence."""
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:80]}…"
