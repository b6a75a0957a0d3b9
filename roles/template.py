"""The text that a model is asked about an answer, with the question and the answer filled in.

What is judged wants to be judged well, so it is held at arm's length: each part stands between
two fences that occur in none of them, in a message that the engine encodes as text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from store.errors import UserError, unknown
from store.records import Message, Prompt

TASK = "judging"
"""The task of a prompt that asks for a judgement."""
NONCE = 8
"""Characters of a fence that nobody can know before the whole question is written. Fewer could all
be spelled in one answer."""

_FENCES = "=~#+"  # the embedded tokenizer has each as one token, as most have
_SHORTEST_FENCE = 3


class Template:
    """A prompt about an answer: a file with the places `needs`, as in {answer}, and maybe `may`.

    name: of a file of `folder`, without its ending; path: a file of the user's instead.
    nonce: whether a part of each fence is drawn anew for each question. It is drawn from a hash of
    all that it says, so a question asked twice is the same question.
    Braces around anything else are text.
    """

    def __init__(
        self,
        name: str,
        path: Path | None,
        needs: Sequence[str],
        may: Sequence[str] = (),
        nonce: bool = True,
        *,
        folder: Path,
    ) -> None:
        shown = repr(name) if path is None else repr(str(path))
        self.text = _shipped(name, folder) if path is None else _read(path)
        self.digest = hashlib.sha256(self.text.encode()).hexdigest()
        self.nonce = nonce
        self.places = {place for place in (*needs, *may) if f"{{{place}}}" in self.text}
        missing = [f"{{{place}}}" for place in needs if place not in self.places]
        if missing:
            wanted = " and ".join(f"{{{place}}}" for place in needs)
            raise UserError(f"the prompt {shown} lacks {' and '.join(missing)}; it needs {wanted}")

    def fill(self, **parts: str) -> Prompt:
        """What to ask: one user turn that hangs on the template and the parts alone."""
        shown = {place: parts[place] for place in self.places}
        fence = self._fence(shown)
        fenced = {place: f"{fence}\n{text}\n{fence}" for place, text in shown.items()}
        asked = substitute(self.text, fenced).strip()
        turn = Message(role="user", content=asked, quoted=True)
        return Prompt(messages=(turn,), task=TASK)

    def _fence(self, parts: Mapping[str, str]) -> str:
        """A run of marks that is longer than any in a part, and a nonce that is in none."""
        marks = fence_for(*parts.values())
        if not self.nonce:
            return marks
        said, tried = json.dumps([self.digest, sorted(parts.items())]), 0
        while True:
            drawn = hashlib.sha512(f"{tried} {said}".encode()).hexdigest()[:NONCE]
            if not any(drawn in part for part in parts.values()):
                return f"{marks} {drawn}"
            tried += 1


def substitute(text: str, parts: Mapping[str, str]) -> str:
    """`text` with each {name} replaced, in one pass: a part that spells {answer} keeps it."""
    names = "|".join(map(re.escape, parts))
    return re.sub(f"{{({names})}}", lambda found: parts[found[1]], text)


def conversation(prompt: Prompt) -> str:
    """The prompt as one text: a single user turn as it is, others each with its role before it."""
    turns = prompt.messages
    if len(turns) == 1 and turns[0].role == "user":
        return turns[0].content
    return "\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)


def fence_for(*texts: str) -> str:
    """The shortest run of one character, three or more, that occurs in no text."""
    together = "\n".join(texts)
    runs = {
        mark: max(map(len, re.findall(f"{re.escape(mark)}+", together)), default=0)
        for mark in _FENCES
    }
    mark = min(_FENCES, key=lambda mark: max(runs[mark] + 1, _SHORTEST_FENCE))
    return mark * max(runs[mark] + 1, _SHORTEST_FENCE)


def _shipped(name: str, folder: Path) -> str:
    names = [file.stem for file in folder.glob("*.txt")]
    if name not in names:
        raise unknown("prompt", name, names)
    return _read(folder / f"{name}.txt")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read a prompt from {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 text: {error}") from None
