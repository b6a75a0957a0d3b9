"""The text that a judge asks a model, with the question and the answer filled in.

What is judged wants to be judged well, so it is held at arm's length: each part stands between
two fences that occur in none of them, and cannot spell the tokens by which a chat is marked up.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from store.errors import UserError, unknown
from store.records import Message, Prompt

TASK = "judging"
"""The task of a prompt that asks for a judgement."""

_HERE = Path(__file__).parent
_FENCES = "=~#+"  # the embedded tokenizer has each as one token, as most have
_SHORTEST_FENCE = 3

_MARKER = re.compile(r"<(?=[|｜][^\s<>]+>|\w+[|｜]>|</?SYS>>|(/?\w+)>)|\[(?=(/?\w+)\])")
_NAMES = frozenset(
    {"s", "bos", "eos", "pad", "unk", "cls", "sep", "mask", "gmask", "sop", "eop", "inst"}
    | {"think", "tool", "image", "img", "audio", "video"}
)


class Template:
    """A judge's prompt: a file with the places `needs`, as in {answer}, and maybe `may`.

    name: of a file of this package, without its ending; path: a file of the user's instead.
    Braces around anything else are text.
    """

    def __init__(
        self, name: str, path: Path | None, needs: Sequence[str], may: Sequence[str] = ()
    ) -> None:
        shown = repr(name) if path is None else repr(str(path))
        self.text = _shipped(name) if path is None else _read(path)
        self.digest = hashlib.sha256(self.text.encode()).hexdigest()
        self.places = {place for place in (*needs, *may) if f"{{{place}}}" in self.text}
        missing = [f"{{{place}}}" for place in needs if place not in self.places]
        if missing:
            wanted = " and ".join(f"{{{place}}}" for place in needs)
            raise UserError(
                f"the judge's prompt {shown} lacks {' and '.join(missing)}; it needs {wanted}"
            )

    def fill(self, **parts: str) -> Prompt:
        """What to ask: one user turn that hangs on the template and the parts alone."""
        shown = {place: disarm(parts[place]) for place in self.places}
        fence = fence_for(*shown.values())
        fenced = {place: f"{fence}\n{text}\n{fence}" for place, text in shown.items()}
        asked = substitute(self.text, fenced).strip()
        return Prompt(messages=(Message(role="user", content=asked),), task=TASK)


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


def disarm(text: str) -> str:
    """`text` with a space in whatever a tokenizer could take for one of its control tokens.

    These are <|...|> and its like with one bar or with full-width ones, names in angle brackets
    that have an underscore or are known (<s>, </think>, <start_of_turn>), the same in capitals in
    square ones ([INST]) and <<SYS>>: `<|end|>` becomes `< |end|>`. A judge sees a policy and no
    tokenizer, so it goes by the shape. A space splits them in every tokenizer; an invisible
    character is dropped by some and costs others three tokens. All other text stays as it is, so
    roles that a template marks in plain words ("Assistant:") are held by the fence alone.
    """
    return _MARKER.sub(lambda found: f"{found[0]} " if _is_marker(found) else found[0], text)


def _is_marker(found: re.Match[str]) -> bool:
    angled, squared = found[1], found[2]
    name = (angled or squared or "").removeprefix("/")
    known = "_" in name or name.lower() in _NAMES or name.startswith("unused")
    if squared:
        return known and (name.isupper() or name == "gMASK")
    return known or not angled


def _shipped(name: str) -> str:
    names = [file.stem for file in _HERE.glob("*.txt")]
    if name not in names:
        raise unknown("judge's prompt", name, names)
    return _read(_HERE / f"{name}.txt")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"cannot read a judge's prompt from {str(path)!r}: {error.strerror}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 text: {error}") from None
