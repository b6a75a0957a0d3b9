"""Prompts from a file, one JSON object a line.

Gate and test prompts come from files of their own, or are held out of the same one: those whose
digests come first, so that neither the order of lines nor a run's seed moves them.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from random import Random
from typing import Any

from pydantic import ValidationError

from roles.protocols import History, Policy
from store.errors import UserError, unknown
from store.records import Call, Message, Prompt, Split

_log = logging.getLogger(__name__)


class Jsonl:
    """prompt: the column with the prompt, a text or a list of {"role", "content"}.
    reference: the column with the right answer; "" when there is none. A column "task" names the
    prompt's task, and all others are kept for judges.
    shuffle: ask in an order drawn from the run's seed, not in the file's.
    """

    def __init__(
        self,
        path: Path,
        gate_path: Path | None = None,
        test_path: Path | None = None,
        prompt: str = "prompt",
        reference: str = "answer",
        shuffle: bool = True,
    ):
        self.path = path
        self.shuffle = shuffle
        self._train = _read(path, prompt, reference)
        self._own: dict[str, tuple[Path, list[Prompt]]] = {
            split: (own, _read(own, prompt, reference))
            for split, own in (("gate", gate_path), ("test", test_path))
            if own is not None
        }

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        if split == "train":
            return self._training(count, history, call)
        if split == "anchor":
            raise UserError("the proposer 'jsonl' has no anchor prompts; it has train, gate, test")
        held_out = history.held_out()
        if split not in self._own:
            found = self._hold_out(count, split, held_out)
        else:
            path, prompts = self._own[split]
            found = [one for one in prompts if one.digest not in held_out][:count]
            if count and not found:
                raise UserError(
                    f"all {len(prompts)} prompts of {str(path)!r} are held out for another split "
                    f"already; {split}_path needs prompts of its own"
                )
        return [_of_split(one, split) for one in found]

    def _training(self, count: int, history: History, call: Call) -> list[Prompt]:
        held_out, asked = history.held_out(), history.asked()
        free = [one for one in self._train if one.digest not in held_out]
        if count and not free:
            raise UserError(
                f"all {len(self._train)} prompts of {str(self.path)!r} are held out for gate and "
                "test; none is left to train on"
            )
        if self.shuffle:
            Random(call.seed).shuffle(free)
        new = [one for one in free if one.digest not in asked]
        again = [one for one in free if one.digest in asked]
        # History is a set and does not say which was asked longest ago; turning the order on by
        # what each round takes comes round to all of them.
        turn = call.round * count % len(again) if again else 0
        return (new + again[turn:] + again[:turn])[:count]

    def _hold_out(self, count: int, split: Split, held_out: frozenset[str]) -> list[Prompt]:
        free = [one for one in self._train if one.digest not in held_out]
        if count and len(free) <= count:
            raise UserError(
                f"{str(self.path)!r} has {len(self._train)} different prompts, of which "
                f"{len(self._train) - len(free)} are held out already: holding out {count} for "
                f"{split} leaves none to train on; ask for fewer, or give a {split}_path"
            )
        return sorted(free, key=lambda one: one.digest)[:count]


def _of_split(prompt: Prompt, split: Split) -> Prompt:
    return Prompt(
        messages=prompt.messages,
        reference=prompt.reference,
        task=prompt.task,
        split=split,
        columns=prompt.columns,
    )


def _read(path: Path, prompt: str, reference: str) -> list[Prompt]:
    """The file's different prompts, in its order."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read prompts from {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 text: {error}") from None
    found: dict[str, Prompt] = {}
    rows = 0
    # Not splitlines: JSON texts may hold the other characters that end a line there.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows += 1
            one = _prompt(line, f"{path}:{number}", prompt, reference)
            found.setdefault(one.digest, one)
    if not found:
        raise UserError(f"{str(path)!r} has no prompts: it is empty")
    if len(found) < rows:
        repeated = rows - len(found)
        _log.warning("%s: %d prompts repeat an earlier one, which is used", path, repeated)
    return list(found.values())


def _prompt(line: str, place: str, prompt: str, reference: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not a line of JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f'{place} is not an object such as {{"{prompt}": "..."}}')
    for column in filter(None, (prompt, reference)):
        if column not in row:
            raise UserError(f"{place}: {unknown('column', column, row)}")
    answer = row.pop(reference) if reference else None
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise UserError(f"{place}: column {reference!r} is a text or a number; found {answer!r}")
    messages = _messages(row.pop(prompt), f"{place}: column {prompt!r}")
    task = row.pop("task") if isinstance(row.get("task"), str) else None
    return Prompt(
        messages=messages,
        reference=None if answer is None else str(answer),
        task=task,
        columns=row,
    )


def _messages(value: Any, place: str) -> tuple[Message, ...]:
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    right = 'a text or a list of {"role": ..., "content": ...}'
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        raise UserError(f"{place} is {right}; found {value!r}")
    try:
        messages = tuple(Message(**turn) for turn in turns)
    except (ValidationError, TypeError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"{place} is {right}; {first}") from None
    if not messages[-1].content.strip():
        raise UserError(f"{place} is empty")
    return messages
