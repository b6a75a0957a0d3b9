"""Rows of a data set as prompts and answers, in TRL's formats.

The columns of the first row say which format it is, and all rows have it. Each format is a
function from its columns to the turns before the answer and the answers as plain text.

    prompt                        a prompt
    prompt, completion            and an answer
    prompt, completion, label     and whether answers like it are wanted
    prompt, chosen, rejected      and the better and the worse of two answers
    chosen, rejected              the same, the prompt being their common beginning
    messages                      a conversation that ends with the answer

Each value is a text or a list of turns. Source: TRL's "Dataset formats and types", standard and
conversational; the common beginning of two texts is that of its `extract_prompt`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from roles.proposers.messages import read_messages, shown, with_system
from store.errors import UserError, unknown
from store.records import Message, Prompt

Turns = tuple[Message, ...]

PREFERENCE = ("chosen", "rejected")


@dataclass(frozen=True)
class Row:
    """One row, read: a prompt with its extra columns, and the answers recorded for it."""

    prompt: Prompt
    answers: dict[str, Any]


@dataclass(frozen=True)
class Format:
    """Which columns of a data set are what."""

    prompt: str | None
    """None where the prompt is the beginning of the answers' conversations."""
    answers: tuple[str, ...]
    reference: str | None
    watched: frozenset[str]
    """Columns that mean something here: every row has the same of them."""
    present: frozenset[str]
    system: str | None

    @classmethod
    def of(
        cls,
        row: Mapping[str, Any],
        place: str,
        *,
        prompt: str,
        reference: str | None,
        system: str | None,
    ) -> Format:
        """The format of a data set whose first row this is. Raises UserError when it has none.

        reference: None is "answer" where there is such a column, "" is none.
        """
        looked_for = "answer" if reference is None else reference
        found = looked_for if reference is not None or looked_for in row else ""
        for name in (found, "" if prompt == "prompt" else prompt):
            if name and name not in row:
                raise _missing(name, row, place)
        answers = _answers(row, prompt, place)
        watched = frozenset((*PREFERENCE, "completion", prompt, looked_for, *answers))
        return cls(
            prompt=prompt if prompt in row else None,
            answers=answers,
            reference=found or None,
            watched=watched,
            present=watched & row.keys(),
            system=system,
        )

    def read(self, row: dict[str, Any], place: str) -> Row:
        """Raises UserError, naming `place`, for a row that is not of this format."""
        present = row.keys() & self.watched
        if present != self.present:
            if missing := sorted(self.present - present):
                raise _missing(missing[0], row, place)
            more = sorted(present - self.present)[0]
            raise UserError(f"{place} has a column {more!r}, which the first row has not")
        rest = dict(row)
        asked = None if self.prompt is None else rest.pop(self.prompt)
        raw = {name: rest.pop(name) for name in self.answers}
        messages, answers = _split(asked, raw, place)
        reference = None
        if self.reference in answers:
            reference = answers[self.reference]
        elif self.reference is not None:
            reference = _reference(rest.pop(self.reference), self.reference, place)
        task = rest.pop("task") if isinstance(rest.get("task"), str) else None
        return Row(
            prompt=Prompt(
                messages=with_system(messages, self.system),
                reference=reference,
                task=task,
                columns={
                    key: plain(value, f"{place}: column {key!r}") for key, value in rest.items()
                },
            ),
            answers=answers,
        )


def plain(value: Any, place: str) -> Any:
    """`value` as JSON holds it, dates as ISO 8601. Raises UserError for what it cannot hold."""
    match value:
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return value
        case dict() if all(isinstance(key, str) for key in value):
            return {key: plain(held, place) for key, held in value.items()}
        case list() | tuple():
            return [plain(held, place) for held in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise UserError(
        f"{place} holds {shown(value)}, which JSON cannot; drop the column, or write it as text"
    )


def _answers(row: Mapping[str, Any], prompt: str, place: str) -> tuple[str, ...]:
    """The columns with answers."""
    if any(name in row for name in PREFERENCE):
        for name in PREFERENCE:
            if name not in row:
                raise UserError(f"{place}: a preference is 'chosen' and 'rejected'; no {name!r}")
        if "completion" in row:
            raise UserError(
                f"{place}: 'chosen' and 'completion' belong to two formats; rename or drop one"
            )
        return PREFERENCE
    if "completion" in row:
        if prompt not in row:
            raise _missing(prompt, row, place)
        return ("completion", "label") if "label" in row else ("completion",)
    if prompt in row:
        return ()
    if "messages" in row:
        return ("messages",)
    if "text" in row:
        raise UserError(
            f"{place}: a column 'text' does not say where its prompt ends; right are columns "
            f"'prompt' and 'completion', or prompt = \"text\" if it is all prompt"
        )
    raise _missing(prompt, row, place)


def _split(asked: Any, raw: Mapping[str, Any], place: str) -> tuple[Turns, dict[str, Any]]:
    """The turns before the answer, and the answers."""
    if "messages" in raw:
        return _conversation(raw["messages"], f"{place}: column 'messages'")
    if "chosen" in raw and (asked is None or _repeats(asked, raw["chosen"])):
        messages, texts = _common_beginning(raw["chosen"], raw["rejected"], place)
        return messages, dict(zip(PREFERENCE, texts, strict=True))
    messages = read_messages(asked, f"{place}: the prompt")
    answers: dict[str, Any] = {
        name: _answer(value, f"{place}: column {name!r}")
        for name, value in raw.items()
        if name != "label"
    }
    if "label" in raw:
        answers["label"] = _label(raw["label"], place)
    return messages, answers


def _conversation(value: Any, place: str) -> tuple[Turns, dict[str, Any]]:
    if isinstance(value, str):
        raise UserError(f"{place} is a list of turns; found {shown(value)}")
    turns = read_messages(value, place)
    if turns[-1].role != "assistant" or len(turns) < 2:
        raise UserError(
            f"{place} ends with the assistant's answer to an earlier turn; "
            f"found {', '.join(turn.role for turn in turns[-3:])}"
        )
    return turns[:-1], {"completion": turns[-1].content}


def _repeats(asked: Any, chosen: Any) -> bool:
    """Whether a text beside conversations is there to be read, as the prompt is in them too."""
    return isinstance(asked, str) and isinstance(chosen, list) and len(chosen) > 1


def _common_beginning(chosen: Any, rejected: Any, place: str) -> tuple[Turns, tuple[str, str]]:
    """The prompt that two answers begin with, and what follows it in each."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        at = _first_difference(chosen, rejected)
        if not chosen[:at].strip():
            raise UserError(
                f"{place}: 'chosen' and 'rejected' begin differently, so there is no prompt"
            )
        return read_messages(chosen[:at], place), (
            _answer(chosen[at:], f"{place}: 'chosen' after the common beginning"),
            _answer(rejected[at:], f"{place}: 'rejected' after the common beginning"),
        )
    sides = [
        read_messages(value, f"{place}: column {name!r}")
        for name, value in (("chosen", chosen), ("rejected", rejected))
    ]
    # The last turn is an answer even where the two are the same.
    pairs = list(zip(*sides, strict=False))[: min(map(len, sides)) - 1]
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if not common:
        raise UserError(
            f"{place}: 'chosen' and 'rejected' begin with different turns, so there is no prompt"
        )
    ends = [
        _only_answer(side[common:], f"{place}: column {name!r}, after the turns both begin with,")
        for name, side in zip(PREFERENCE, sides, strict=True)
    ]
    return sides[0][:common], (ends[0], ends[1])


def _first_difference(one: str, other: str) -> int:
    """Where two texts part, a space before it left to the answers; the last place if nowhere."""
    shortest = min(len(one), len(other))
    at = bisect_left(range(shortest), True, key=lambda n: one[: n + 1] != other[: n + 1])
    if at == shortest:
        return max(0, shortest - 1)
    return at - 1 if at and one[at - 1] == " " else at


def _answer(value: Any, place: str) -> str:
    if isinstance(value, str):
        return read_messages(value, place)[0].content
    return _only_answer(read_messages(value, place), place)


def _only_answer(turns: Turns, place: str) -> str:
    if len(turns) != 1 or turns[0].role != "assistant":
        raise UserError(
            f"{place} is one turn of the assistant; found {len(turns)}: "
            f"{', '.join(turn.role for turn in turns[:4])}"
        )
    return turns[0].content


def _label(value: Any, place: str) -> bool:
    # A table of texts, as CSV is, spells them.
    found = {"true": True, "false": False, "1": True, "0": False}.get(str(value).lower())
    if found is None:
        raise UserError(f"{place}: column 'label' is true or false; found {shown(value)}")
    return found


def _reference(value: Any, column: str, place: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{place}: column {column!r} is a text or a number; found {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{place}: column {column!r} is a finite number; found {value}")
    return str(value)


def _missing(column: str, row: Mapping[str, Any], place: str) -> UserError:
    return UserError(f"{place}: {unknown('column', column, row)}")
