"""The token ids that a prompt becomes.

One function, which the engine samples after and the trainers train after: were there two, the
model would be trained behind other tokens than those it wrote its answer to.

Text that a message quotes stays text. Where it spells a control token, a seam is set into the
spelling, the chat is encoded, and the seam's own tokens are taken out again; all other text gets
the tokens that it always had. That no control token came of it is then checked: the chat must have
those that it has with harmless words in its place, in their order.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from roles.policy.folders import quiet
from store.errors import UserError
from store.records import Message, Prompt

_UNPRINTED = [chr(code) for code in (*range(1, 9), *range(14, 28))]
"""What a seam is spelled in: a tokenizer that knows bytes has a token for each of them, and no
template takes them for white space."""
_BLANK = " \t\r\n\u2581"  # the last is what SentencePiece writes for a space


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The prompt through the tokenizer's chat template, up to where the answer begins.

    A last message by the assistant is the beginning of the answer and is left open. Nothing in a
    quoted message becomes a control token.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
            "put a chat_template.jinja beside its tokenizer.json"
        )
    if not any(turn.quoted for turn in prompt.messages):
        return _chat_ids(tokenizer, prompt)
    spelled = control_tokens(tokenizer)
    # Any unknown character becomes the unknown token, which says nothing.
    control = spelled.keys() - {tokenizer.unk_token_id}
    harmless = _requoted(prompt, lambda text: "text" if text.strip() else text)
    wanted = [token for token in _chat_ids(tokenizer, harmless) if token in control]
    for ids in _sewn_ids(tokenizer, prompt, set(spelled.values())):
        if [token for token in ids if token in control] == wanted:
            return ids
    raise UserError(
        f"the tokenizer of {tokenizer.name_or_path!r} makes control tokens of plain text, so its "
        "model cannot be shown what others wrote; choose another model to judge with"
    )


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """id -> spelling of each token that was added to a vocabulary to mark something up.

    Not all are flagged special (`<think>` and `<tool_call>` are not). Added runs of white space are
    text.
    """
    return {
        token: added.content
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.content.strip(_BLANK)
    }


def _sewn_ids(tokenizer: Any, prompt: Prompt, spellings: set[str]) -> Iterator[list[int]]:
    """The chat's ids with seams where a control token is spelled, then with one after each
    character: a tokenizer that normalises may find a control token where none is spelled.

    One that knows no bytes has no tokens for a seam, and gets spaces, which stay.
    """
    said = "\0".join(turn.content for turn in prompt.messages)
    spelled = "|".join(re.escape(each) for each in spellings if each in said) or "(?!)"
    seam = _seam(said)
    seam_ids = tokenizer.encode(f"a{seam}a", add_special_tokens=False)[1:-1]
    for places in (f"(?={spelled}).", "."):
        sewn, count = _sewn(prompt, places, seam, spellings)
        ids = _taken_out(_chat_ids(tokenizer, sewn), seam_ids, count)
        if ids is not None:
            yield ids
        spaced, _ = _sewn(prompt, places, " ", spellings)
        yield _chat_ids(tokenizer, spaced)


def _sewn(prompt: Prompt, places: str, seam: str, spellings: set[str]) -> tuple[Prompt, int]:
    """The prompt with a seam after each of these characters of what it quotes, and how many."""
    count = 0

    def sew(found: re.Match[str]) -> str:
        nonlocal count
        count += 1
        # A control token of one character can be spelled in no other way, and is left out.
        return seam if found[0] in spellings else found[0] + seam

    pattern = re.compile(places, re.DOTALL)
    return _requoted(prompt, lambda text: pattern.sub(sew, text)), count


def _seam(said: str) -> str:
    """What nobody can have written into a prompt, as it hangs on all that the prompt says."""
    drawn = hashlib.sha256(said.encode()).digest()[:8]
    return "".join(_UNPRINTED[each % len(_UNPRINTED)] for each in drawn)


def _taken_out(ids: list[int], part: list[int], count: int) -> list[int] | None:
    """`ids` without the `count` times that `part` stands in it; None if it does not so often."""
    kept: list[int] = []
    for token in ids:
        kept.append(token)
        if part and kept[-len(part) :] == part:
            del kept[-len(part) :]
            count -= 1
    return kept if count == 0 else None


def _requoted(prompt: Prompt, change: Callable[[str], str]) -> Prompt:
    """The prompt with what it quotes changed."""
    turns = tuple(
        replace(turn, content=change(turn.content)) if turn.quoted else turn
        for turn in prompt.messages
    )
    return replace(prompt, messages=turns)


def _chat_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
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


def _refuse_encoder(path: Path) -> None:
    config = path / "config.json"
    told = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if told.get("is_encoder_decoder"):
        raise UserError(
            f"the model in {str(path)!r} is of the kind {told.get('model_type')!r}, which reads a "
            "prompt with an encoder; a policy is a causal model, which goes on from it"
        )


def check_template(path: Path) -> None:
    """Raises UserError when the model in a folder reads with an encoder, or its tokenizer cannot
    write a question by its template.

    Reads no weights, so that it can be asked before a run begins.
    """
    from transformers import AutoTokenizer

    _refuse_encoder(path)
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
