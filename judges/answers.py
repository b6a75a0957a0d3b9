"""Find the final answer in what a policy wrote.

There is one final answer and it is the last: a text that lists many guesses has made one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

Place = Literal["auto", "whole", "boxed", "tag", "last_line", "marker"]

_MARKER = re.compile(r"answer:(?:\*\*)?|####", re.IGNORECASE)
_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")


def final_answer(text: str, place: Place) -> str | None:
    """The answer that `text` gives at `place`, stripped; None when there is none there.

    `auto` is the last tag, else the last box, else what follows the last marker, else the whole
    text.
    """
    if place == "auto":
        found = (find(text) for find in (_tag, _boxed, _marker, _whole))
        return next(answer for answer in found if answer is not None)
    return _FINDERS[place](text)


def _whole(text: str) -> str:
    return text.strip()


def _tag(text: str) -> str | None:
    """Between the last </answer> and the last <answer> before it."""
    before, closing, _ = text.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return answer.strip() if closing and opening else None


def _boxed(text: str) -> str | None:
    """In the \\boxed{...} that opens last, of those whose braces balance.

    One pass with a stack: looking for each box's end anew takes time quadratic in a text of
    nothing but opening boxes.
    """
    open_braces: list[tuple[int, bool]] = []
    start, answer = -1, None
    for brace in _BRACES.finditer(text):
        token = brace.group()
        if token in (r"\{", r"\}"):
            continue
        if token != "}":
            open_braces.append((brace.end(), len(token) > 1))
        elif open_braces:
            begins, is_box = open_braces.pop()
            if is_box and begins > start:
                start, answer = begins, text[begins : brace.start()].strip()
    return answer


def _last_line(text: str) -> str | None:
    lines = text.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def _marker(text: str) -> str | None:
    """All that follows the last "Answer:" or "####": an answer may have several lines."""
    end = None
    for marker in _MARKER.finditer(text):
        end = marker.end()
    return None if end is None else text[end:].strip()


_FINDERS: dict[str, Callable[[str], str | None]] = {
    "whole": _whole,
    "tag": _tag,
    "boxed": _boxed,
    "last_line": _last_line,
    "marker": _marker,
}
