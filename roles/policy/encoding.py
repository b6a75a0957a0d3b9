"""The token ids that a prompt becomes.

One function, which the engine samples after and the trainers train after: were there two, the
model would be trained behind other tokens than those it wrote its answer to.
"""

from __future__ import annotations

from typing import Any

from store.errors import UserError
from store.records import Prompt


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
    ids = tokenizer.apply_chat_template(
        turns,
        tokenize=True,
        return_dict=False,
        add_generation_prompt=not begun,
        continue_final_message=begun,
    )
    return [int(token) for token in ids]
