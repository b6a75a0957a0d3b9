"""A question and its answers in the two forms that other libraries know."""

from __future__ import annotations

from typing import Literal

from roles.template import conversation
from store.records import Prompt

Form = Literal["conversational", "text"]
Turns = list[dict[str, str]]


def question(prompt: Prompt, form: Form) -> Turns | str:
    if form == "text":
        return conversation(prompt)
    return [{"role": turn.role, "content": turn.content} for turn in prompt.messages]


def answer(text: str, form: Form) -> Turns | str:
    return text if form == "text" else [{"role": "assistant", "content": text}]
