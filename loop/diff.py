"""What another judge would have changed: a round's filter with each of two judges' scores.

Nothing is stored. The filter is asked twice about the same answers, so whatever differs comes
from the judgements.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any, Literal, cast

from rich.console import Console

from loop import meant
from loop.context import Rows, StoredHistory
from loop.rejudge import finished, track_names
from loop.report import Table, the_run
from loop.screen import block, conversation, figure, line
from loop.settings import Config
from roles import plugins
from roles.protocols import Filter
from store.database import Store
from store.errors import UserError, unknown
from store.records import Call, Example, Group, Judgement, Selection

Change = Literal["kept", "turned", "other", "gone", "new", "neither"]
CHANGES: dict[Change, str] = {
    "kept": "the same examples",
    "turned": "chosen and rejected swapped",
    "other": "other answers",
    "gone": "no example any more",
    "new": "an example where there was none",
    "neither": "no example with either",
}
SHOWN = 3
"""Of each change, with texts."""
Key = tuple[str, int, int | None, bool | None]


def diff(store: Store, number: int, judges: Sequence[str] = (), track: str | None = None) -> Table:
    """{run, path, round, tracks {track: {judges [a, b], prompts, examples [of a, of b],
    changes {change: prompts}, changed [{asked, change}], shown [{asked, change, messages,
    reference, a, b}]}}}: a and b have examples [{kind, chosen, rejected, label, margin}] and why
    there is none.

    judges: none, the round's own and the only other; one, the round's own and this; or both.
    Raises UserError for a judge that is not there, or has not judged all.
    """
    config, round = meant.config_of(store), finished(store, number)
    found = {}
    for name in track_names(config, number, track):
        rows = Rows(round, name, "train")
        both = _meant(store, rows, config.tracks(number)[name].judge.label, judges)
        found[name] = _track(store, config, rows, both)
    return {
        "run": the_run(store).name,
        "path": str(store.root),
        "round": number,
        "tracks": found,
    }


def _meant(store: Store, rows: Rows, own: str, given: Sequence[str]) -> tuple[str, str]:
    """The labels of the two judges."""
    there = [
        row["judge"]
        for row in store.query(
            "SELECT DISTINCT judge FROM asked JOIN candidate ON candidate.asked_id = asked.id "
            "JOIN judgement ON judgement.candidate_id = candidate.id "
            "WHERE asked.round_id = :round AND track = :track AND purpose = 'train' ORDER BY judge",
            round=rows.round.id,
            track=rows.track,
        )
    ]
    named = [_label(each, there) for each in given]
    others = [each for each in there if each != own]
    if len(named) < 2 and named != [own] and named:
        named = [own, *named]
    elif len(named) < 2:
        if len(others) != 1:
            path, place = quote(str(store.root)), rows.round.number
            right = (
                f"there are: {', '.join(others)}"
                if others
                else f"`loop rejudge {path} {place} --judge NAME` adds one"
            )
            raise UserError(
                f"which judge beside {own} in round {place}, track {rows.track}? {right}"
            )
        named = [own, others[0]]
    if named[0] == named[1]:
        raise UserError(f"{named[0]!r} cannot be compared with itself; there are: {there}")
    return named[0], named[1]


def _label(given: str, there: Sequence[str]) -> str:
    """The judge that is meant by its label, or by how it or its class begins."""
    if given in there:
        return given
    found = [
        each
        for each in there
        if each.startswith(given) or Path(each).name.rpartition(":")[2].startswith(given)
    ]
    if len(found) > 1:
        raise UserError(f"{given!r} can be any of {', '.join(found)}; write more of it")
    if not found:
        raise unknown("judge", given, there)
    return found[0]


def _track(store: Store, config: Config, rows: Rows, judges: tuple[str, str]) -> Table:
    groups = [group for group in store.groups(*rows.key) if group.candidates]
    table = config.tracks(rows.round.number)[rows.track].filter
    selecting = cast(Filter, plugins.load("filter", table.use, table.options))
    call = Call(seed=config.seed, round=rows.round.number, track=rows.track, stage="filter")
    made = []
    for judge in judges:
        with_verdicts = bool(getattr(selecting, "reads_verdicts", False))
        judgements = store.judgements(*rows.key, judge, verdicts=with_verdicts)
        _refuse_unjudged(store, rows, judge, groups, judgements)
        history = StoredHistory(store, config)
        made.append(_Made(selecting.select(groups, judgements, history, call)))
    changed = [(group, _change(*(each.keys[group.asked_id] for each in made))) for group in groups]
    counted = Counter(change for _, change in changed)
    shown = [
        (group, change)
        for kind in ("turned", "other", "gone", "new")
        for group, change in [each for each in changed if each[1] == kind][:SHOWN]
    ]
    return {
        "judges": list(judges),
        "prompts": len(groups),
        "examples": [each.count for each in made],
        "changes": {change: counted[change] for change in CHANGES},
        "changed": [
            {"asked": group.asked_id, "change": change}
            for group, change in changed
            if change not in ("kept", "neither")
        ],
        "shown": [_shown(group, change, made) for group, change in shown],
    }


class _Made:
    """What a filter made of one judge's judgements, by asked prompt."""

    def __init__(self, selection: Selection) -> None:
        self.count = len(selection.examples)
        self.examples: dict[int, list[Example]] = defaultdict(list)
        self.keys: dict[int, set[Key]] = defaultdict(set)
        for each in selection.examples:
            rejected = None if each.rejected is None else each.rejected.id
            self.examples[each.asked_id].append(each)
            self.keys[each.asked_id].add((each.kind, each.chosen.id, rejected, each.label))
        self.reasons = {each.asked_id: each.reason for each in selection.dropped}


def _refuse_unjudged(
    store: Store, rows: Rows, judge: str, groups: Sequence[Group], judged: Sequence[Judgement]
) -> None:
    answers = sum(len(group.candidates) for group in groups)
    if len(judged) != answers:
        raise UserError(
            f"judge {judge!r} has judged {len(judged):,} of the {answers:,} answers of round "
            f"{rows.round.number}, track {rows.track}; `loop rejudge {quote(str(store.root))} "
            f"{rows.round.number}`, as it was begun, goes on"
        )


def _change(a: set[Key], b: set[Key]) -> Change:
    if not a or not b:
        return "gone" if a else "new" if b else "neither"
    if a == b:
        return "kept"
    swapped = {(kind, rejected, chosen, label) for kind, chosen, rejected, label in a}
    return "turned" if swapped & b else "other"


def _shown(group: Group, change: Change, made: Sequence[_Made]) -> Table:
    sides = []
    for each in made:
        examples = [
            {
                "kind": one.kind,
                "chosen": one.chosen.text,
                "rejected": None if one.rejected is None else one.rejected.text,
                "label": one.label,
                "margin": one.margin,
            }
            for one in each.examples[group.asked_id]
        ]
        sides.append({"examples": examples, "reason": each.reasons.get(group.asked_id)})
    return {
        "asked": group.asked_id,
        "change": change,
        "messages": [asdict(cast(Any, turn)) for turn in group.prompt.messages],
        "reference": group.prompt.reference,
        "a": sides[0],
        "b": sides[1],
    }


def view(console: Console, found: Table) -> None:
    for name, track in found["tracks"].items():
        a, b = track["judges"]
        line(console, f"{found['run']}, round {found['round']}, track {name}: {a} against {b}")
        examples = " and ".join(f"{n:,}" for n in track["examples"])
        line(console, f"{track['prompts']:,} prompts; {examples} examples")
        for change, about in CHANGES.items():
            line(console, f"{track['changes'][change]:>7,}  {change:<8} {about}")
        for each in track["shown"]:
            line(console)
            line(console, f"{each['change']}: {CHANGES[each['change']]}")
            conversation(console, each["messages"], each["reference"])
            for judge, side in zip((a, b), (each["a"], each["b"]), strict=True):
                _side(console, judge, side)


def _side(console: Console, judge: str, side: Table) -> None:
    if not side["examples"]:
        line(console, f"  {judge}: no example, {side['reason']}")
    for each in side["examples"]:
        margin = "" if each["margin"] is None else f", margin {figure(each['margin'])}"
        label = "" if each["label"] is None else f" {'wanted' if each['label'] else 'unwanted'}"
        line(console, f"  {judge}: {each['kind']}{label}{margin}")
        for what in ("chosen", "rejected"):
            if each[what] is not None:
                block(console, f"  {what}", each[what])
