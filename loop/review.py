"""What a run waits for from a person: shown and asked for, or carried in a table.

Only this works on a run beside `loop start`, and while nobody drives it. Each prompt's judgements
are committed as they are given, under the judge's own label, so the stage that waited finds
nothing left to do and goes on.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any, cast

from judges.harmless import harmless
from judges.human import KEYS, Human, in_order
from loop import run
from loop.context import Context, Rows
from loop.evaluation import questions, under_test
from loop.progress import Progress
from loop.settings import Role
from loop.work import without_thinking
from roles.filters.eligibility import by_candidate
from store.errors import UserError, Waiting
from store.records import Candidate, Group, Judgement, Prompt


@dataclass(frozen=True)
class Pile:
    """What waits for one judge in one place of a round: prompts with the answers not yet judged."""

    rows: Rows
    role: Role
    judge: Human
    groups: tuple[Group, ...]
    kept: tuple[tuple[Candidate, Judgement], ...]
    """What the judge has concluded there so far."""

    @property
    def answers(self) -> int:
        return sum(len(group.candidates) for group in self.groups)

    @property
    def place(self) -> str:
        what = "" if self.rows.purpose == "train" else f" ({self.rows.purpose})"
        return f"round {self.rows.round.number}, track {self.rows.track}{what}"


def piles(context: Context) -> list[Pile]:
    """All that a person judges in the round that is under way, in the order of its stages."""
    rounds = context.store.rounds()
    if not rounds or rounds[-1].status != "running":
        return []
    found = (pile(context, rows, role) for rows, role in _judged(context))
    return [each for each in found if each is not None]


def _judged(context: Context) -> Iterator[tuple[Rows, Role]]:
    """What is judged in the newest round, and by whom."""
    round = context.store.rounds()[-1]
    for name, track in context.config.tracks(round.number).items():
        yield Rows(round, name, "train"), track.judge
    for checkpoint in under_test(context, round):
        for asked in questions(context, round, checkpoint):
            for role in asked.judges:
                yield asked.rows, role


def pile(context: Context, rows: Rows, role: Role) -> Pile | None:
    """What waits for a judge there; None where it is not a person."""
    judge = context.role(role)
    if not isinstance(judge, Human):
        return None
    judged = by_candidate(context.store.judgements(*rows.key, role.label))
    groups, kept = [], []
    for group in context.store.groups(*rows.key):
        shown = without_thinking(group) if role.thinking == "hidden" else group
        left = tuple(each for each in shown.candidates if each.id not in judged)
        kept += [(each, judged[each.id]) for each in shown.candidates if each.id in judged]
        if left:
            groups.append(replace(shown, candidates=left))
    return Pile(rows, role, judge, tuple(groups), tuple(kept))


def told(context: Context) -> str:
    """How many answers wait for a person, and where. Empty: none does."""
    return "; ".join(
        f"{each.place}: {each.answers:,} answers wait for a score of the judge {each.role.use}"
        for each in piles(context)
        if each.groups
    )


@dataclass(frozen=True)
class Person:
    """Who is asked, and how: `read` is told what it asks for, `write` is given a line to show."""

    read: Callable[[str], str]
    write: Callable[[str], object]
    again: bool
    """Whether what is no score is asked for anew. Not of a file: what follows would move."""


def review(root: Path, person: Person, progress: Progress) -> int:
    """Ask a person for all that waits. Returns how many answers still do.

    Raises UserError when somebody drives the run, and for what is no score if it is not asked anew.
    """
    with opened(root, progress) as context:
        try:
            for each in piles(context):
                if each.groups:
                    ask_for(context, each, person)
        except Waiting:
            person.write("")
        left = sum(each.answers for each in piles(context))
        person.write(_summary(root, context, left))
        return left


def opened(root: Path, progress: Progress) -> Any:
    """The run's Context, as somebody who answers needs it: an interrupt comes at once."""
    config = run.stored_config(root)
    return run.at_work(root, progress, run.load_roles(config), config, batches=False)


def ask_for(context: Context, pile: Pile, person: Person) -> None:
    """Ask for a pile, prompt by prompt, each committed. Raises Waiting when the person leaves."""
    call = context.call(pile.rows.round, pile.rows.track, "judge")
    person.write(f"{pile.place}: {pile.answers:,} answers to {len(pile.groups):,} prompts")
    person.write(f"scores are {pile.judge.scale}; {KEYS}")
    if pile.judge.instructions:
        person.write(pile.judge.instructions)
    for number, group in enumerate(pile.groups, 1):
        person.write(f"\nprompt {number:,} of {len(pile.groups):,}")
        seed = call.seed_for("order", group.prompt.digest)
        given = pile.judge.ask(group, person.read, person.write, seed=seed, again=person.again)
        stop = context.stopping()  # raises when another process took the run over
        keep(context, pile, given)
        if stop:
            raise Waiting(f"{context.root} was asked to stop")


def keep(context: Context, pile: Pile, given: Sequence[Judgement]) -> None:
    """Write judgements as the stage would have."""
    version = str(pile.judge.version)
    context.store.add_judgements(*pile.rows.key, pile.role.label, version, None, given)


def _summary(root: Path, context: Context, left: int) -> str:
    path = quote(str(root))
    if left:
        return f"{told(context)}; `loop review {path}` goes on with them"
    waits = cast(Any, context.store.run()).status == "waiting"
    on = f"`loop start {path}` goes on" if waits else f"`loop status {path}` says how it stands"
    return f"nothing more waits for a person; {on}"


# As a table, for several people


COLUMNS = ("id", "place", "scores", "prompt", "answer", "score", "reason")
TYPED = ("id", "score", "reason")


def export(root: Path, file: Path, progress: Progress) -> str:
    """Write all that waits as CSV, a row an answer, its score left empty. Returns what was done."""
    with opened(root, progress) as context:
        found = piles(context)
        rows = [row for each in found for row in _rows(context, each)]
    if not rows:
        raise UserError(f"nothing of {root} waits for a person; there is nothing to write")
    try:
        with file.open("x", newline="", encoding="utf-8-sig") as opened_file:
            table = csv.DictWriter(opened_file, COLUMNS)
            table.writeheader()
            table.writerows(rows)
    except FileExistsError:
        raise UserError(f"{file} is already there; name another file") from None
    except OSError as error:
        if file.is_file():
            file.unlink()
        raise UserError(f"cannot write {file}: {error.strerror}") from None
    here = f"`loop review {quote(str(root))} --import {quote(str(file))}` takes them"
    told = [each.judge.instructions for each in found if each.groups and each.judge.instructions]
    return "\n".join(
        [
            *dict.fromkeys(told),
            f"wrote {len(rows):,} answers to {file}; when its scores are filled in, {here}",
        ]
    )


def _rows(context: Context, pile: Pile) -> Iterator[dict[str, str]]:
    call = context.call(pile.rows.round, pile.rows.track, "judge")
    for group in pile.groups:
        for candidate in in_order(group, call.seed_for("order", group.prompt.digest)):
            yield {
                "id": _mark(context, pile, candidate),
                "place": pile.place,
                "scores": pile.judge.scale,
                "prompt": _cell(_asked(group.prompt)),
                "answer": _cell(candidate.text),
                "score": "",
                "reason": "",
            }


def _mark(context: Context, pile: Pile, candidate: Candidate) -> str:
    """An answer's name in a table: another run's, or another judge's, has another."""
    uuid = cast(Any, context.store.run()).uuid
    told_apart = "\0".join((uuid, pile.role.label, str(candidate.id), candidate.text))
    return f"c{candidate.id}-{hashlib.sha256(told_apart.encode()).hexdigest()[:10]}"


def _asked(prompt: Prompt) -> str:
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n\n".join(f"{each.role}: {each.content}" for each in prompt.messages)


def _cell(text: str) -> str:
    """A spreadsheet runs what begins like a formula: a model's text is only to be read."""
    shown = harmless(text)
    return f"'{shown}" if shown.lstrip()[:1] in ("=", "+", "-", "@") else shown


def take(root: Path, file: Path, progress: Progress) -> str:
    """Keep the scores of a table that `export` wrote. Returns what was done.

    A row without a score still waits. Raises UserError, and keeps nothing, when a row is not of
    this run, comes twice, has what is no score, or another than is already kept.
    """
    typed = _read(file)
    with opened(root, progress) as context:
        given = [(each, _given(context, each, typed)) for each in piles(context)]
        for place, mark, _ in typed.values():
            raise UserError(
                f"{place}: no answer {mark!r} of {root} waits for a person; the table is of "
                "another run or of an earlier stage, or the id was changed"
            )
        context.stopping()  # raises when another process took the run over
        for each, judgements in given:
            keep(context, each, judgements)
        took = sum(len(judgements) for _, judgements in given)
        left = sum(each.answers for each in piles(context))
        return f"took {took:,} scores from {file}; {_summary(root, context, left)}"


Typed = dict[str, tuple[str, str, str]]
"""An answer's mark -> where that is written, the mark again, and what was typed."""


def _given(context: Context, pile: Pile, typed: Typed) -> list[Judgement]:
    """What was typed about the answers of a pile, which is taken out of `typed`."""
    given = []
    waiting = [(each, None) for group in pile.groups for each in group.candidates]
    for candidate, kept in (*waiting, *pile.kept):
        place, _, said = typed.pop(_mark(context, pile, candidate), ("", "", ""))
        if not said:
            continue
        try:
            judgement = pile.judge.concluded(candidate.id, said)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        if kept is None:
            given.append(judgement)
        elif kept.score != judgement.score:
            raise UserError(
                f"{place}: the answer already has "
                f"{'no score' if kept.score is None else f'the score {kept.score:g}'}, "
                f"found {said!r}; leave it empty, nothing is replaced"
            )
    return given


def _read(file: Path) -> Typed:
    """The rows of a table that have a score."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8; save it as CSV in UTF-8") from None
    heading = text.partition("\n")[0]
    delimiter = max(",;\t", key=heading.count)  # some countries' spreadsheets write others
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    found, seen = Typed(), set()
    try:
        if missing := {"id", "score"} - set(table.fieldnames or ()):
            raise UserError(f"{file} has no column {sorted(missing)[0]!r}; --export writes it")
        for row in table:
            place = f"{file}, line {table.line_num}"
            mark, score, reason = ((row.get(name) or "").strip() for name in TYPED)
            if mark in seen:
                raise UserError(f"{place}: the answer {mark!r} comes twice")
            seen.add(mark)
            if reason and not score:
                raise UserError(
                    f"{place}: a reason and no score; the score s says that it has none"
                )
            if len(score.split()) > 1:
                raise UserError(f"{place}: a score is one number or s; found {score!r}")
            if score:
                found[mark] = (place, mark, f"{score} {reason}".strip())
    except csv.Error as error:
        raise UserError(f"{file} is not CSV: {error}") from None
    return found
