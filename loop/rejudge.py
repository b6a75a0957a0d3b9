"""Score the answers of a past round with another judge, beside its own.

Nothing is generated and nothing of the round changes: its examples, its counts and all that came
after are what they were. The other judge's judgements are rows like any, under its own label.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from shlex import quote
from statistics import fmean
from typing import Any, cast

from rich.console import Console

from loop import config as configuration
from loop import meant, run
from loop.context import Context, Rows
from loop.health import keep_health
from loop.measure import correlation
from loop.progress import Progress
from loop.report import Table
from loop.review import Person, Pile, ask_for, pile
from loop.screen import NOTHING, figure, line
from loop.settings import Config, Role
from loop.work import judge_asked
from store.database import Store
from store.errors import UserError, Waiting, unknown
from store.records import Checkpoint, Judgement

MAY_SET = ("judge", "server", "cache", "alarms")
"""The tables by which a judge can be told what to do. A run's budget does not bound rejudging."""


@dataclass(frozen=True)
class Wish:
    """What `loop rejudge` was told."""

    round: int
    judge: str | None = None
    file: Path | None = None
    sets: Sequence[str] = ()
    model: str | None = None
    track: str | None = None


def said(words: Sequence[str]) -> tuple[Path | None, int, list[str]]:
    """(run, round, the rest) of `[RUN] ROUND ...`. Raises UserError where there is no round."""
    given = list(words)
    several = len(given) > 1 and given[1].isdecimal()
    root = Path(given.pop(0)) if several or not given[0].isdecimal() else None
    if not given or not given[0].isdecimal():
        raise UserError(f"no round: after the run comes a number, found {' '.join(words)!r}")
    if len(given[0]) > 9:
        raise UserError(f"no round {given[0][:20]}; a run has fewer")
    return root, int(given[0]), given[1:]


def rejudge(root: Path, wish: Wish, person: Person, progress: Progress) -> Table:
    """Judge what has no judgement of that judge yet. Returns {run, path, round, tracks {track: how
    the two agree}}.

    Raises UserError for a round that is not over, a judge that is there already, and a run that
    somebody drives.
    """
    own = run.stored_config(root)
    config, judged = _with_judge(own, wish)
    roles = run.load_roles(config)
    with run.at_work(root, progress, roles, config) as context:
        round = finished(context.store, wish.round)
        first = {name: own.tracks(round.number)[name].judge.label for name in judged}
        rows = {name: Rows(round, name, "train") for name in judged}
        for name, role in judged.items():
            if first[name] == role.label:
                raise UserError(
                    f"{role.label} is the judge that track {name} of round {round.number} had "
                    "itself; name another, or other settings"
                )
        left = [
            name
            for name, role in judged.items()
            if context.store.unjudged(*rows[name].key, role.label)
        ]
        if not left:
            labels = sorted({role.label for role in judged.values()})
            raise UserError(
                f"round {round.number} of {root} is already judged by {' and '.join(labels)}; "
                f"`loop diff {quote(str(root))} {round.number}` shows what would change"
            )
        progress.begin(round.number, "judge", 0)
        for name in left:
            _judge(context, rows[name], judged[name], person)
        progress.end()
        return {
            "run": cast(Any, context.store.run()).name,
            "path": str(root),
            "round": round.number,
            "tracks": {
                name: compared(context.store, rows[name], (first[name], role.label))
                for name, role in judged.items()
            },
        }


def finished(store: Store, number: int) -> Any:
    """The round of that number. Raises UserError while it is under way."""
    round = store.round(number)
    if round.status == "running":
        raise UserError(
            f"round {number} of {store.root} is not over; `loop start {quote(str(store.root))}` "
            "goes on with it"
        )
    return round


def track_names(config: Config, round: int, wanted: str | None) -> list[str]:
    tracks = config.tracks(round)
    if not tracks:
        raise UserError(f"round {round} has no track: nothing was judged in it")
    if wanted is not None and wanted not in tracks:
        raise unknown(f"track of round {round}", wanted, tracks)
    return list(tracks) if wanted is None else [wanted]


def _with_judge(config: Config, wish: Wish) -> tuple[Config, dict[str, Role]]:
    """The run's settings with another judge of the round's tracks, and that judge by track.

    A judge of the same class keeps the settings of the track's own, as with `loop start --set`.
    """
    if wish.judge is None and wish.file is None:
        raise UserError("which judge? --judge NAME says, or --judge-config FILE with its [judge]")
    for each in wish.sets:
        if each.partition("=")[0].strip().partition(".")[0] not in MAY_SET:
            raise UserError(
                f"--set changes how the other judge judges ({', '.join(MAY_SET)}), found {each!r}"
            )
    names = track_names(config, wish.round, wish.track)
    tables = config.model_dump(mode="json") | {"budget": {}}
    if wish.file is not None:
        told = configuration.read(wish.file).model_dump(mode="json")
        tables["server"] |= told["server"]
        for name in names:
            _tracks(tables, wish.round)[name]["judge"] = told["track"]["main"]["judge"]
    place = "track" if wish.round else "warmup.track"
    sets = [each for each in wish.sets if not each.startswith("judge.")]
    for name in names:
        own = [f"use={json.dumps(wish.judge)}"] if wish.judge is not None else []
        own += [each.removeprefix("judge.") for each in wish.sets if each.startswith("judge.")]
        own += [f"model={json.dumps(wish.model)}"] if wish.model is not None else []
        sets += [f"{place}.{name}.judge.{each}" for each in own]
    changed = configuration.change(configuration.validate(tables), sets)
    return changed, {name: changed.tracks(wish.round)[name].judge for name in names}


def _tracks(tables: Table, round: int) -> Any:
    return tables["track"] if round else tables["warmup"]["track"]


def _judge(context: Context, rows: Rows, role: Role, person: Person) -> None:
    """What is left of a track, by a model or by a person. Raises Waiting when the person leaves."""
    waiting = pile(context, rows, role)
    if waiting is not None:
        try:
            ask_for(context, waiting, person)
        except Waiting:
            left = cast(Pile, pile(context, rows, role)).answers
            raise Waiting(
                f"{left:,} answers of round {rows.round.number}, track {rows.track}, still wait "
                "for a person's scores; the same command goes on with them"
            ) from None
        keep_health(context, rows, role)
        return
    track = context.config.tracks(rows.round.number)[rows.track]
    then = _writer(context.store, rows) or context.store.incumbent(track.model)
    asked = {role.model, *getattr(context.role(role), "models", ())}
    if "round" in asked and (why := meant.gone(then)) is not None:
        raise UserError(
            f"judge {role.use!r} asks the model of its round, {then.path}, which cannot be used: "
            f"{why}; --model checkpoint:PATH names another"
        )
    judge_asked(context, rows, role, track.model, then)


def _writer(store: Store, rows: Rows) -> Checkpoint | None:
    """The checkpoint that wrote the answers: what "round" was when they were judged first."""
    found = store.query(
        "SELECT checkpoint_id AS id FROM asked JOIN candidate ON candidate.asked_id = asked.id "
        "WHERE round_id = :round AND track = :track AND purpose = 'train' "
        "AND checkpoint_id IS NOT NULL LIMIT 1",
        round=rows.round.id,
        track=rows.track,
    )
    made = {each.id: each for each in store.checkpoints()}
    return made[found[0]["id"]] if found else None


# How two judges agree


def compared(store: Store, rows: Rows, judges: tuple[str, str]) -> Table:
    """{candidates, judges [{judge, mean, unscored}], both, pearson, spearman, pairs, alike,
    one_sided}: `both` is how many answers have two scores, `pairs` how many two answers to one
    prompt are told apart by both judges, `alike` the share of them that both put in the same
    order, and `one_sided` how many only one judge tells apart. None: cannot be said.
    """
    heard = [_scores(store.judgements(*rows.key, judge)) for judge in judges]
    both = [
        [(heard[0][each.id], heard[1][each.id]) for each in group.candidates]
        for group in store.groups(*rows.key)
        if all(each.id in side for each in group.candidates for side in heard)
    ]
    groups = [[(a, b) for a, b in group if a is not None and b is not None] for group in both]
    pairs = [
        (one[0] - other[0], one[1] - other[1])
        for group in groups
        for one, other in combinations(group, 2)
    ]
    apart = [a * b > 0 for a, b in pairs if a and b]
    scored = [pair for group in groups for pair in group]
    return {
        "candidates": sum(map(len, both)),
        "judges": [
            {
                "judge": judge,
                "mean": fmean(known)
                if (known := [s for s in side.values() if s is not None])
                else None,
                "unscored": sum(score is None for score in side.values()),
            }
            for judge, side in zip(judges, heard, strict=True)
        ],
        "both": len(scored),
        "pearson": correlation(scored),
        "spearman": correlation(list(zip(*map(ranks, zip(*scored, strict=True)), strict=True))),
        "pairs": len(apart),
        "alike": sum(apart) / len(apart) if apart else None,
        "one_sided": sum((a == 0) != (b == 0) for a, b in pairs),
    }


def _scores(judgements: Sequence[Judgement]) -> dict[int, float | None]:
    return {each.candidate_id: each.score for each in judgements}


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the least; equal ones share the mean of their ranks."""
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values), 1):
        places.setdefault(value, []).append(place)
    return [fmean(places[value]) for value in values]


def view(console: Console, found: Table) -> None:
    for line_ in _lines(found):
        line(console, line_)
    labels = {track["judges"][1]["judge"] for track in found["tracks"].values()}
    judge = f" {quote(labels.pop())}" if len(labels) == 1 else ""
    line(console, f"next: loop diff {quote(found['path'])} {found['round']}{judge}")


def _lines(found: Table) -> Iterator[str]:
    yield f"{found['run']}, round {found['round']}"
    for name, track in found["tracks"].items():
        yield f"track {name}: {track['candidates']:,} answers judged by both"
        for judge in track["judges"]:
            yield f"  {_judge_line(judge)}"
        correlations = f"Pearson {figure(track['pearson'])}, Spearman {figure(track['spearman'])}"
        alike = NOTHING if track["alike"] is None else f"{track['alike']:.1%}"
        yield f"  {correlations}, on {track['both']:,} answers with two scores"
        yield (
            f"  of {track['pairs']:,} pairs of answers that both tell apart, {alike} are ordered "
            f"alike; {track['one_sided']:,} are told apart by one alone"
        )


def _judge_line(judge: Mapping[str, Any]) -> str:
    return f"{judge['judge']}: mean score {figure(judge['mean'])}, {judge['unscored']:,} unscored"
