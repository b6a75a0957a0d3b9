"""Prompts that reasoning-gym makes up, as many as are wanted, with answers that can be checked.

Each task is a stream of entries drawn from (seed, round, split); the first that are new are
taken. So prompts need no file, and no two rounds share one while there are others.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from roles.proposers.gym_tasks import COLUMN, make_dataset
from roles.proposers.messages import with_system
from roles.protocols import History, Policy
from store.errors import UserError
from store.records import Call, Message, Prompt, Split

# Some data sets do work in proportion to their size when they are made, some only per entry.
_CHUNK = 4096
# So many entries in a row without a new prompt, and the task counts as run dry.
_PATIENCE = 1000
_CHECKED: set[tuple[str, str]] = set()
"""Tasks and options that were tried: a run's proposers have much in common, and one that reads a
book for its words takes a quarter of a second."""


class ReasoningGym:
    """tasks: tables of a task's name, its own options and a `weight`, its share of the prompts.
    instruction: written under every question. system: a system prompt, put before it.
    """

    def __init__(
        self,
        tasks: list[dict[str, Any]],
        instruction: str | None = None,
        system: str | None = None,
    ):
        if not tasks:
            raise UserError('reasoning_gym needs at least one task, as in [{name = "chain_sum"}]')
        self._tasks = [_Task(table) for table in tasks]
        self._instruction = instruction
        self._system = system

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        held_out, asked = history.held_out(), history.asked()
        streams = [
            _Stream(task, number, split, self._ask, call) for number, task in enumerate(self._tasks)
        ]
        weights = [task.weight for task in self._tasks]
        taken: dict[str, Prompt] = {}
        turns = Random(call.seed_for("reasoning_gym", split, "turns"))
        while len(taken) < count:
            stream = turns.choices(streams, weights)[0]
            prompt = stream.next_new(taken, held_out, asked)
            if prompt is None:
                raise UserError(
                    f"the reasoning-gym task {stream.task.name!r} has run dry: {_PATIENCE} draws "
                    f"in a row gave no other prompt, with {len(taken)} of {count} {split} prompts "
                    f"found and {len(held_out)} held out; ask for fewer, or widen its options "
                    f"({stream.task.options})"
                )
            taken[prompt.digest] = prompt
            call.progress(len(taken), count)
        return list(taken.values())

    def _ask(self, question: str) -> tuple[Message, ...]:
        if self._instruction:
            question = f"{question}\n\n{self._instruction}"
        return with_system((Message(role="user", content=question),), self._system)


class _Task:
    """One table of `tasks`, checked."""

    def __init__(self, table: dict[str, Any]):
        options = dict(table)
        name, weight = options.pop("name", None), options.pop("weight", 1)
        if not isinstance(name, str):
            raise UserError(f"a reasoning_gym task is a table with a name; found {table}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            raise UserError(f"the weight of task {name!r} is a number above 0; found {weight!r}")
        for ours in ("seed", "size"):
            if ours in options:
                raise UserError(
                    f"task {name!r} has no option {ours!r}: the run's seed and the number of "
                    "prompts that are asked decide it"
                )
        self.name = name
        self.weight = float(weight)
        self.options = options
        self._check_options()

    def _check_options(self) -> None:
        """Some options pass the data set's own check and fail at its first entry."""
        asked = (self.name, repr(sorted(self.options.items())))
        if asked in _CHECKED:
            return
        dataset = make_dataset(self.name, self.options, seed=0, size=1)
        try:
            dataset[0]
        except (LookupError, ValueError, TypeError) as error:
            raise UserError(
                f"the reasoning-gym task {self.name!r} makes no entries with {self.options}: "
                f"{error}"
            ) from error
        _CHECKED.add(asked)


class _Stream:
    """The prompts of one task in one call, one after the other."""

    def __init__(
        self,
        task: _Task,
        number: int,
        split: Split,
        ask: Callable[[str], tuple[Message, ...]],
        call: Call,
    ):
        self.task = task
        self._split = split
        self._ask = ask
        self._entries = self._draw(call, number)
        # Asked in an earlier round: taken when nothing else is left.
        self._again: deque[Prompt] = deque()
        self._dry = False

    def next_new(
        self, taken: dict[str, Prompt], held_out: frozenset[str], asked: frozenset[str]
    ) -> Prompt | None:
        """The next prompt that is not taken or held out, sooner an unasked one; None when dry."""
        draws = 0
        while not self._dry:
            prompt = self._prompt(next(self._entries))
            digest = prompt.digest
            if digest not in taken and prompt.question_digest not in held_out:
                if digest not in asked:
                    return prompt
                self._again.append(prompt)
            draws += 1
            self._dry = draws >= _PATIENCE
        while self._again:
            prompt = self._again.popleft()
            if prompt.digest not in taken:
                return prompt
        # There may be more of those than came up while new ones were looked for.
        for _ in range(_PATIENCE):
            prompt = self._prompt(next(self._entries))
            if prompt.digest not in taken and prompt.question_digest not in held_out:
                return prompt
        return None

    def _draw(self, call: Call, number: int) -> Iterator[dict[str, Any]]:
        chunk = 0
        while True:
            seed = call.seed_for("reasoning_gym", self._split, self.task.name, number, chunk)
            # Some data sets seed numpy with seed + index, which takes 32 bits.
            dataset = make_dataset(
                self.task.name, self.task.options, seed=seed % 2**31, size=_CHUNK
            )
            for index in range(_CHUNK):
                yield dataset[index]
            chunk += 1

    def _prompt(self, entry: dict[str, Any]) -> Prompt:
        column = {
            "task": self.task.name,
            "options": self.task.options,
            "metadata": entry["metadata"],
        }
        return Prompt(
            messages=self._ask(entry["question"]),
            reference=entry["answer"],
            task=self.task.name,
            split=self._split,
            # What the store gives back: tuples are lists and keys are texts from the start.
            columns={COLUMN: json.loads(json.dumps(column))},
        )
