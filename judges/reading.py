"""Read what a judge concluded, from its own words alone.

A conclusion stands at the end: it is the whole last line, after the justification, or a field of
the JSON object that a server was held to. Whatever cannot be read there is no conclusion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from store.errors import UserError
from store.records import Prompt, Reply

SCORE_LINE = r"[*_]{0,3}score[*_]{0,3}:[*_]{0,3}\s*([^\s*_]+)[*_]{0,3}"
_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?")
_QUOTATION = " \t>\"'`“”‘’«»*_=~#+"


def unreadable(said: Reply) -> str | None:
    """Why nothing can be read of a reply, in words; None when something may.

    A judgement that was cut off has no conclusion: what looks like its last line may be the middle.
    """
    if said.status != "ok":
        return said.reason or said.status
    if said.finish_reason == "length":
        return "cut off" if said.tokens is None else f"cut off at {said.tokens} tokens"
    return None if said.text.strip() else "the judge said nothing"


def object_schema(**fields: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a justification and then `fields`: what comes first is thought first."""
    properties = {"justification": {"type": "string"}, **fields}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def field_of(said: Reply, name: str, prompt: Prompt) -> tuple[Any, str]:
    """A field of the one JSON object that the whole reply is, or None and why there is none.

    A field that the prompt has too is refused where the judge put no word of its own beside it.
    """
    try:
        found = json.loads(said.text)
    except (ValueError, RecursionError):
        return None, "the reply is not the JSON that was asked for"
    if not isinstance(found, dict) or found.get(name) is None:
        return None, f"the reply's JSON has no {name!r}"
    if _is_copied_object(found, name, prompt.messages[-1].content):
        return None, f"the {name} and all before it is copied from what the judge was shown"
    return found[name], ""


def is_copied(before: Sequence[str], shown: str, concludes: Callable[[str], bool]) -> bool:
    """Whether a conclusion is one that was planted in the prompt, and nothing else.

    It is when a line of the prompt `concludes` the same *and* the judge wrote nothing of its own
    `before` it: words that the prompt has too are not its own, nor is a line that ends in a colon
    and so announces what follows.
    """
    if not any(concludes(line.strip()) for line in shown.splitlines()):
        return False
    known = _squeezed(shown)
    return all(line.endswith(":") or _squeezed(line) in known for line in before)


def _is_copied_object(found: dict[str, Any], name: str, shown: str) -> bool:
    known = _squeezed(shown)
    if _squeezed(json.dumps({name: found[name]})[1:-1]) not in known:
        return False
    words = [each for key, each in found.items() if key != name and isinstance(each, str)]
    return all(_squeezed(each) in known for each in words)


@dataclass(frozen=True)
class Reading:
    """How a score is read from a judgement: from its last line, which holds nothing else.

    A judge that only copies what it was shown would let an answer grade itself, so a score that
    `is_copied` is refused. An honest judge is left alone: it may quote, and may give the score that
    an answer asks for, if it says anything about it.
    """

    pattern: str
    low: int
    high: int
    fractions: bool
    require_justification: bool

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UserError(f"the lowest score, {self.low}, is not below the highest, {self.high}")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise UserError(
                f"the judge's pattern {self.pattern!r} is not a regular expression: {error}"
            ) from None
        if groups != 1:
            raise UserError(
                f"the judge's pattern {self.pattern!r} has {groups} groups; it needs one, "
                "around the number"
            )

    field: ClassVar[str] = "score"
    """What the conclusion is called in JSON."""

    @property
    def schema(self) -> dict[str, Any]:
        """What a server that can be held to a form is asked for: the justification first."""
        return object_schema(**{self.field: {"type": "number" if self.fractions else "integer"}})

    def read(self, said: Reply, prompt: Prompt) -> tuple[float | None, str]:
        """The score, or None and in words why there is none."""
        if (why := unreadable(said)) is not None:
            return None, why
        if said.structured:
            found, why = field_of(said, self.field, prompt)
            return (None, why) if found is None else self._within(str(found))
        lines = [line for each in said.text.splitlines() if (line := each.strip())]
        value, why = self._score(lines[-1])
        if value is None:
            return None, why
        if self.require_justification and len(lines) == 1:
            return None, "a score without a justification"
        shown = prompt.messages[-1].content
        if is_copied(lines[:-1], shown, lambda line: self._score(line)[0] == value):
            return None, "the score and all before it is copied from what the judge was shown"
        return value, ""

    def _score(self, line: str) -> tuple[float | None, str]:
        found = re.fullmatch(self.pattern, line, re.IGNORECASE)
        if found is None:
            return None, "the last line is no score"
        return self._within(found[1] or "")

    def _within(self, written: str) -> tuple[float | None, str]:
        if not _NUMBER.fullmatch(written):
            return None, f"the score {written!r} is no number"
        value = float(written)
        if not self.low <= value <= self.high:
            return None, f"the score {written} is not within {self.low} to {self.high}"
        if not self.fractions and not value.is_integer():
            return None, f"the score {written} is no whole number"
        return value, ""


def _squeezed(text: str) -> str:
    """Without white space and marks of quotation, so that a quotation is found in its source."""
    return "".join(text.strip(_QUOTATION).split()).casefold()
