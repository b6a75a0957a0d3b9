"""The token ids that a prompt becomes.

One function, which the engine samples after and the trainers train after: were there two, the
model would be trained behind other tokens than those it wrote its answer to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from roles.policy.folders import quiet
from store.errors import UserError
from store.records import Message, Prompt


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The prompt through the tokenizer's chat template, up to where the answer begins.

    A last message by the assistant is the beginning of the answer and is left open.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
            "put a chat_template.jinja beside its tokenizer.json"
        )
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
    begun = bool(turns) and turns[-1]["role"] == "assistant"
    try:
        ids = tokenizer.apply_chat_template(
            turns,
            tokenize=True,
            return_dict=False,
            add_generation_prompt=not begun,
            continue_final_message=begun,
        )
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} does not take a chat of the roles "
            f"{roles}: {error}"
        ) from error
    return [int(token) for token in ids]


def check_template(path: Path) -> None:
    """Raises UserError when the tokenizer in a folder cannot write a question by its template.

    Reads the tokenizer alone, so that it can be asked before a run begins.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"the tokenizer in {str(path)!r} cannot be loaded: {said[:300]}") from error
    why, where = (
        prompt_ids(tokenizer, Prompt(messages=(Message(role="user", content=question),)))
        for question in ("Why?", "Where to?")
    )
    if not why:
        raise UserError(f"the chat template of {str(path)!r} makes no token of a question")
    if why == where:
        raise UserError(
            f"the chat template of {str(path)!r} writes the same of every question; it has to "
            "write each message's content"
        )
