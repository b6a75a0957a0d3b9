"""An assistant's turn that is over, as whoever reads whole conversations sees it.

A policy is asked up to where its answer begins (roles/policy/encoding.py); a reward model reads
the answer to its end, and its score is what it has at the last token. So that token must be the
same one when the model is trained and when it scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from roles.policy.encoding import prompt_ids
from store.errors import UserError
from store.records import Message, Prompt

_ANSWER = "ANSWER"


def closing_ids(tokenizer: Any) -> list[int]:
    """What the chat template writes after an assistant's words, as token ids; maybe nothing.

    Raises UserError where there is no template, or it does not write an assistant's words.
    """
    asked = Prompt(messages=(Message(role="user", content="?"),))
    prompt_ids(tokenizer, asked)  # says what is wrong with a template that does not even ask
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    written: str = tokenizer.apply_chat_template(turns, tokenize=False)
    _, found, closing = written.rpartition(_ANSWER)
    if not found:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} does not write what an assistant "
            "said, so no answer can be read after it"
        )
    return [int(token) for token in tokenizer.encode(closing, add_special_tokens=False)]


def closed(ids: Sequence[int], closing: Sequence[int]) -> list[int]:
    """What of `closing` is missing at the end of an answer's `ids`.

    An answer that was sampled ends with the token that ended it, or with none when it was cut.
    """
    for had in range(len(closing), 0, -1):
        if list(ids[-had:]) == list(closing[:had]):
            return list(closing[had:])
    return list(closing)


def conversation_ids(
    tokenizer: Any, prompt: Prompt, answer: str, closing: Sequence[int]
) -> list[int] | None:
    """Prompt, answer and closing; nothing in the answer becomes a control token.

    None when the chat template does not write the answer as it is.
    """
    turns = prompt.messages
    begun = turns[-1].content if turns and turns[-1].role == "assistant" else None
    asked, said = (turns, answer) if begun is None else (turns[:-1], begun + answer)
    last = Message(role="assistant", content=said, quoted=True)
    try:
        ids = prompt_ids(tokenizer, Prompt(messages=(*asked, last)))
    except ValueError:  # how transformers says that it does not find the last message's content
        return None
    return [*ids, *closing]
