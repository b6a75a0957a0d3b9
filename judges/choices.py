"""Choices among answers that go by letters: how they are asked for, and how one is read.

As a score does (judges/reading.py), a choice stands at the end of what the judge says: it is the
whole last line, or a field of the JSON object that a server was held to. A letter says where an
answer was shown and nothing else of it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, ClassVar

from judges.reading import field_of, is_copied, object_schema, unreadable
from roles.template import Template, conversation
from store.errors import UserError
from store.records import Prompt, Reply

LETTERS = ascii_uppercase
TIE = "tie"


@dataclass(frozen=True)
class Choice(ABC):
    """How a choice is read from a judgement: from its last line, which holds nothing else.

    One that `is_copied` is refused, as with scores: an answer would choose itself.
    """

    letters: str
    require_justification: bool

    word: ClassVar[str]

    @property
    @abstractmethod
    def form(self) -> str:
        """What may be chosen, in the words of a prompt."""

    @property
    def schema(self) -> dict[str, Any]:
        """What a server that can be held to a form is asked for: the justification first."""
        return object_schema(**{self.word: self._field()})

    def read(self, said: Reply, prompt: Prompt) -> tuple[str | None, str]:
        """The choice, or None and in words why there is none."""
        if (why := unreadable(said)) is not None:
            return None, why
        if said.structured:
            found, why = field_of(said, self.word, prompt)
            return (None, why) if found is None else self._chosen(found)
        lines = [line for each in said.text.splitlines() if (line := each.strip())]
        choice, why = self._on(lines[-1])
        if choice is None:
            return None, why
        if self.require_justification and len(lines) == 1:
            return None, f"a {self.word} without a justification"
        shown = prompt.messages[-1].content
        if is_copied(lines[:-1], shown, lambda line: self._on(line)[0] == choice):
            return (
                None,
                f"the {self.word} and all before it is copied from what the judge was shown",
            )
        return choice, ""

    def _on(self, line: str) -> tuple[str | None, str]:
        marks = "[*_]{0,3}"
        pattern = rf"{marks}{self.word}{marks}:{marks}\s*(\S.*?)\.?{marks}"
        # Without ASCII, letter case aside, other alphabets' letters would match some of ours.
        found = re.fullmatch(pattern, line, re.IGNORECASE | re.ASCII)
        if found is None:
            return None, f"the last line is no {self.word}"
        return self._chosen(found[1])

    @abstractmethod
    def _field(self) -> dict[str, Any]: ...

    @abstractmethod
    def _chosen(self, written: Any) -> tuple[str | None, str]:
        """written: what follows the word, or what the JSON field holds."""


@dataclass(frozen=True)
class Winner(Choice):
    """One letter, or `tie` where that may be said."""

    ties: bool = False

    word: ClassVar[str] = "winner"

    @property
    def form(self) -> str:
        return _listed([*self.letters, *([TIE] if self.ties else [])], "or")

    def _field(self) -> dict[str, Any]:
        return {"type": "string", "enum": [*self.letters, *([TIE] if self.ties else [])]}

    def _chosen(self, written: Any) -> tuple[str | None, str]:
        said = written.strip() if isinstance(written, str) else ""
        if said.lower() == TIE and self.ties:
            return TIE, ""
        if len(said) == 1 and said.isascii() and said.upper() in self.letters:
            return said.upper(), ""
        return None, f"the winner {_short(written)} is not {self.form}"


@dataclass(frozen=True)
class Ranking(Choice):
    """All letters, the best first, with `>` between them; each exactly once."""

    word: ClassVar[str] = "ranking"

    @property
    def form(self) -> str:
        return _listed(self.letters, "and")

    def _field(self) -> dict[str, Any]:
        letter = {"type": "string", "enum": [*self.letters]}
        return {"type": "array", "items": letter, "description": "the best first, each once"}

    def _chosen(self, written: Any) -> tuple[str | None, str]:
        parts = written.split(">") if isinstance(written, str) else written
        if not isinstance(parts, list):
            parts = [parts]
        said = [part.strip().upper() for part in parts if isinstance(part, str) and part.isascii()]
        if len(said) == len(parts) and sorted(said) == sorted(self.letters):
            return "".join(said), ""
        return None, f"the ranking {_short(written)} has not each of {self.form} once"


def spelled(template: Template, place: str, text: str, *places: str) -> Template:
    """The template with words of ours at a place, which bring `places` of their own."""
    made = copy(template)
    made.text = template.text.replace(f"{{{place}}}", text)
    made.places = {*template.places - {place}, *places}
    return made


def asked_parts(template: Template, asked: Prompt) -> dict[str, str]:
    """What a template shows of a prompt: the question, and the reference if it wants it."""
    parts = {"question": conversation(asked)}
    if "reference" in template.places:
        if asked.reference is None:
            raise UserError(
                "the judge's prompt shows {reference}, and the prompt "
                f"{asked.messages[-1].content[:60]!r} has no reference answer"
            )
        parts["reference"] = asked.reference
    return parts


def _listed(names: Sequence[str], last: str) -> str:
    return f"{', '.join(names[:-1])} {last} {names[-1]}"


def _short(written: Any) -> str:
    said = repr(written)
    return said if len(said) <= 60 else said[:60] + "…"
