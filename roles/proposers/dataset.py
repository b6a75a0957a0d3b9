"""Prompts from people's own data, with the answers that it records.

Gate, test and anchor prompts come from data of their own, or are held out of the same: those whose
digests come first, so that neither the order of rows nor a run's seed moves them.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, get_args

from roles.proposers.formats import Format, Row
from roles.proposers.recorded import COLUMN
from roles.proposers.rows import read_rows
from roles.protocols import History, Policy
from store.errors import UserError, unknown
from store.records import Call, Prompt, Split

_log = logging.getLogger(__name__)

Prompts = dict[str, Prompt]
"""By digest, in the data's order."""


class Dataset:
    """path: a file (.jsonl, .json, .csv, .tsv, .parquet), a folder of such files, a folder written
    by `save_to_disk`, or a data set's name on the Hugging Face Hub.
    gate_path, test_path, anchor_path: the same for prompts that are not trained on.
    split: of data that has splits, "train" unless said; a table says it for each of ours, as in
    {train = "train_prefs", test = "test_prefs"}, and what it names needs no path of its own.
    subset: of a data set on the Hub.
    prompt: the column with the prompt, a text or a list of {"role", "content"}.
    reference: the column with the right answer; "answer" unless said, where there is one; "" is
    none. A column "task" names the prompt's task, and all others are kept for judges.
    system: a system prompt, put before prompts that have none.
    Prompts that differ in system prompts alone ask the same: one held out keeps the others from
    all other splits.
    shuffle: ask in an order drawn from the run's seed, not in the data's.
    """

    def __init__(
        self,
        path: Path,
        gate_path: Path | None = None,
        test_path: Path | None = None,
        anchor_path: Path | None = None,
        split: str | dict[str, str] | None = None,
        subset: str | None = None,
        prompt: str = "prompt",
        reference: str | None = None,
        system: str | None = None,
        shuffle: bool = True,
    ):
        self.path = path
        self.shuffle = shuffle
        splits = _by_ours(split)
        columns = {"prompt": prompt, "reference": reference, "system": system}
        self._train = _read(path, splits.get("train"), subset, columns)
        self._own: dict[str, tuple[str, Prompts]] = {}
        paths = {"gate": gate_path, "test": test_path, "anchor": anchor_path}
        for name, own in paths.items():
            if own is not None or name in splits:
                ours = splits.get(name)
                where = f"{str(own or path)!r}" + (f", split {ours!r}" if ours else "")
                self._own[name] = where, _read(own or path, ours, subset, columns)

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        if split == "train":
            return self._training(count, history, call)
        held_out = history.held_out()
        if split not in self._own:
            found = self._hold_out(count, split, held_out)
        else:
            where, prompts = self._own[split]
            found = [prompts[digest] for digest in _free(prompts, held_out)][:count]
            if count and not found:
                raise UserError(
                    f"all {len(prompts)} prompts of {where} are held out for another split "
                    f"already; {split}_path needs prompts of its own"
                )
        return [replace(one, split=split) for one in found]

    def _training(self, count: int, history: History, call: Call) -> list[Prompt]:
        asked, free = history.asked(), _free(self._train, history.held_out())
        if count and not free:
            raise UserError(
                f"all {len(self._train)} prompts of {str(self.path)!r} are held out for gate, "
                "test or anchor; none is left to train on"
            )
        if self.shuffle:
            Random(call.seed).shuffle(free)
        new = [digest for digest in free if digest not in asked]
        again = [digest for digest in free if digest in asked]
        # History is a set and does not say which was asked longest ago; turning the order on by
        # what each round takes comes round to all of them.
        turn = call.round * count % len(again) if again else 0
        return [self._train[digest] for digest in (new + again[turn:] + again[:turn])[:count]]

    def _hold_out(self, count: int, split: Split, held_out: frozenset[str]) -> list[Prompt]:
        free = _free(self._train, held_out)
        if count and len(free) <= count:
            raise UserError(
                f"{str(self.path)!r} has {len(self._train)} different prompts, of which "
                f"{len(self._train) - len(free)} are held out already: holding out {count} for "
                f"{split} leaves none to train on; ask for fewer, or give a {split}_path"
            )
        return [self._train[digest] for digest in sorted(free)[:count]]


def _free(prompts: Prompts, held_out: frozenset[str]) -> list[str]:
    """Digests of the prompts that are not held out, in their order."""
    return [digest for digest, one in prompts.items() if one.question_digest not in held_out]


def _by_ours(split: str | dict[str, str] | None) -> dict[str, str]:
    """The data's split for each of ours that has one."""
    if not isinstance(split, dict):
        return {} if split is None else {"train": split}
    for name in split:
        if name not in get_args(Split):
            raise unknown("split of a run", name, get_args(Split))
    return split


def _read(path: Path, split: str | None, subset: str | None, columns: dict[str, Any]) -> Prompts:
    """The data's different prompts, each with the answers of all its rows."""
    found: Prompts = {}
    repeated = 0
    form = None
    for place, raw in read_rows(path, split, subset):
        if form is None:
            form = Format.of(raw, place, **columns)
        row = form.read(raw, place)
        if COLUMN in row.prompt.columns:
            raise UserError(
                f"{place} has a column {COLUMN!r}, under which answers are kept; rename it"
            )
        digest = row.prompt.digest
        first = found.setdefault(digest, row.prompt)
        if row.answers:
            # Nobody else has the record yet, and a second one would hold its texts twice.
            first.columns.setdefault(COLUMN, []).append(_entry(row, first, form.reference))
        elif first is not row.prompt:
            repeated += 1
    if not found:
        raise UserError(f"{str(path)!r} has no prompts: it is empty")
    if repeated:
        _log.warning("%s: %d prompts repeat an earlier one, which is used", path, repeated)
    return found


def _entry(row: Row, first: Prompt, reference: str | None) -> dict[str, Any]:
    """The row's answers, and its columns where they are not as in the prompt's first row."""
    entry = dict(row.answers)
    if row.prompt is first:
        return entry
    own = row.prompt.columns
    for name in {**own, **first.columns}:
        if name != COLUMN and own.get(name) != first.columns.get(name):
            entry[name] = own.get(name)
    if reference is not None and row.prompt.reference != first.reference:
        entry[reference] = row.prompt.reference
    if row.prompt.task != first.task:
        entry["task"] = row.prompt.task
    return entry
