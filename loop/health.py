"""How the judges of a round did, kept as numbers, and the alarms that ring when one is bad.

A judge that fails is heard of at once; one that works and is wrong shows in its numbers: it says
the same of everything, it goes by the order or by the length, its votes contradict each other, or
it has changed its mind about anchors. What rings is computed from what is kept and from [alarms],
so that a bound can be changed and the run goes on.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, cast, get_args

from judges.harmless import harmless
from loop.context import Context, Rows
from loop.measure import correlation
from loop.settings import Alarms, Bell, Config, Role
from store.database import Store
from store.errors import UserError
from store.records import Evaluation, Health, Judgement

BINS = 20
"""Of a histogram of scores with more values than this."""
LEAST = 20
"""Of what a metric is about, for an alarm to ring where few would ring by chance."""
SHOWN = 3
LONGEST = 200


def refuse_unscored(
    alarms: Alarms,
    role: Role,
    track: str,
    known: Callable[[], Mapping[float | None, int]],
    concluded: Sequence[Judgement],
) -> None:
    """Raises UserError when too many answers got no score: what is wrong, with raw replies.

    known: score -> how many answers of the track have it so far.
    """
    lost = [each for each in concluded if each.score is None]
    if not lost:
        return
    counted = known()
    unscored = counted.get(None, 0) + len(lost)
    judged = sum(counted.values()) + len(concluded)
    if unscored <= alarms.max_unscored * judged:
        return
    statuses = Counter(each.status for each in lost)
    told = ", ".join(f"{status} {times:,}" for status, times in statuses.most_common())
    raise UserError(
        f"judge {role.use!r} gave {unscored:,} of {judged:,} answers of track {track} no score "
        f"(the last ones: {told}), and alarms.max_unscored is {alarms.max_unscored:g}; "
        f"it said: {'; '.join(_replies(lost)) or 'nothing'}"
    )


def _replies(lost: Sequence[Judgement]) -> Iterator[str]:
    """What was said where no score came out, and why none did."""
    for each in lost[:SHOWN]:
        said = [one for one in each.verdicts if one.status != "ok"] or each.verdicts
        raw = said[0].raw if said else ""
        written = repr(raw if len(raw) <= LONGEST else raw[:LONGEST] + "…")
        yield f"{written} ({harmless(each.reason or each.status)[:LONGEST]})"


def keep_health(context: Context, rows: Rows, role: Role) -> None:
    """Measure a judge whose work on `rows` is done, once, and say which alarms ring."""
    store = context.store
    if store.has_health(*rows.key, role.label):
        return
    found = list(measured(store, rows, role.label))
    if not found:
        return
    store.add_health(*rows.key, role.label, found)
    trains = rows.purpose == "train" and rows.round.number > 0
    if trains and rows.round.status == "running":
        for bell, sentence in rung(context.config.alarms, found):
            then = "the run stops" if bell in context.config.alarms.stop else "the run goes on"
            told = f"alarm {bell}: track {rows.track}, judge {role.use} {sentence}"
            context.progress.say(f"{told}; {then}")


def measured(store: Store, rows: Rows, judge: str) -> Iterator[Health]:
    """Every number there is on a judge's work in a round."""
    judged = store.judged(*rows.key, judge)
    if not judged:
        return
    statuses = Counter(row["status"] for row in judged)
    unscored = 1 - statuses["ok"] / len(judged)
    yield Health(metric="unscored", value=unscored, n=len(judged), detail=dict(statuses))
    scored = [row for row in judged if row["score"] is not None]
    if scored:
        yield from _spread([row["score"] for row in scored])
        yield from _length(scored)
    yield from _votes(store.votes(*rows.key, judge))
    yield from _flips(store.comparisons(*rows.key, judge), store.turned(*rows.key, judge))
    cost = store.judged_cost(*rows.key, judge)
    for metric in ("seconds", "tokens", "cost", "cached"):
        if cost[metric] is not None:
            yield Health(metric=metric, value=cost[metric], n=cost["verdicts"])


def _spread(scores: Sequence[float]) -> Iterator[Health]:
    """The mean score, the share of the commonest, and the entropy of their histogram in nats."""
    counted = Counter(scores)
    n = len(scores)
    yield Health(metric="score", value=math.fsum(scores) / n, n=n)
    yield Health(metric="modal", value=max(counted.values()) / n, n=n)
    histogram: Counter[str] = Counter()
    for low, times in _histogram(counted):
        histogram[f"{low:g}"] += times
    entropy = -math.fsum(times / n * math.log(times / n) for times in histogram.values())
    yield Health(metric="entropy", value=max(0.0, entropy), n=n, detail=dict(histogram))


def _histogram(counted: Mapping[float, int]) -> list[tuple[float, int]]:
    """Score, or the lower end of its bin -> how many."""
    low, high = min(counted), max(counted)
    if len(counted) <= BINS:
        return sorted(counted.items())
    binned: Counter[float] = Counter()
    for score, times in counted.items():
        place = min(int((score - low) / (high - low) * BINS), BINS - 1)
        binned[low + place * (high - low) / BINS] += times
    return sorted(binned.items())


def _length(scored: Sequence[Mapping[str, Any]]) -> Iterator[Health]:
    """Pearson's correlation of score and length, both as differences from their prompt's mean:
    long answers to prompts that want them are none of the judge's liking."""
    groups = defaultdict(list)
    for row in scored:
        groups[row["asked"]].append((row["score"], float(row["tokens"])))
    several = [group for group in groups.values() if len(group) > 1]
    pairs = [pair for group in several for pair in _centred(group)]
    if (found := correlation(pairs)) is not None:
        yield Health(metric="length", value=found, n=len(pairs))


def _centred(group: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    score, length = (math.fsum(side) / len(group) for side in zip(*group, strict=True))
    for one, other in group:
        yield one - score, other - length


def _votes(votes: Iterable[Mapping[str, Any]]) -> Iterator[Health]:
    """The share of pairs of votes on one answer that agree."""
    by_candidate = defaultdict(list)
    for row in votes:
        by_candidate[row["candidate"], row["member"]].append(row["value"])
    alike = [one == other for own in by_candidate.values() for one, other in combinations(own, 2)]
    if alike:
        yield Health(metric="votes", value=sum(alike) / len(alike), n=len(alike))


def _flips(
    shown: Iterable[Mapping[str, Any]], turned: Iterable[Mapping[str, Any]]
) -> Iterator[Health]:
    """Of the comparisons heard in both orders, the share that turned with the order.

    shown: of two candidates; the value says whether the one shown first won. turned: of a candidate
    with something else, in either order; the value says whether the candidate won.
    """
    won = {(row["member"], row["first"], row["second"]): row["value"] for row in shown}
    twice = [
        value == won[member, second, first]
        for (member, first, second), value in won.items()
        if first < second and (member, second, first) in won
    ]
    both = defaultdict(list)
    for row in turned:
        both[row["member"], row["candidate"], row["vote"]].append(row["value"])
    twice += [own[0] != own[1] for own in both.values() if len(own) == 2]
    if twice:
        yield Health(metric="flips", value=sum(twice) / len(twice), n=len(twice))


# Alarms


def rung(alarms: Alarms, found: Sequence[Health]) -> Iterator[tuple[Bell, str]]:
    """The alarms that these numbers ring, each with what is wrong."""
    of = {each.metric: each for each in found if each.metric == "unscored" or each.n >= LEAST}
    for bell, bound, sentence in (
        ("unscored", alarms.max_unscored, "gave {value:.0%} of {n:,} answers no score"),
        ("modal", alarms.max_modal, "gave {value:.0%} of {n:,} answers one score"),
        ("flips", alarms.max_flips, "turned {value:.0%} of {n:,} comparisons with the order"),
        ("length", alarms.max_length, "goes by length: correlation {value:+.2f} ({n:,})"),
        ("drift", alarms.max_drift, "moved its scores of {n:,} anchors by {value:.0%}"),
    ):
        one = of.get(bell)
        if one is not None and abs(one.value) > bound:
            said = sentence.format(value=one.value, n=one.n)
            yield cast(Bell, bell), f"{said}; alarms.max_{bell} is {bound:g}"
    for bell, bound, sentence in (
        (
            "votes",
            alarms.min_votes,
            "contradicts itself: {value:.0%} of {n:,} pairs of votes agree",
        ),
        ("kappa", alarms.min_kappa, "has a Cohen's kappa of {value:.2f} at best on {n:,} anchors"),
        ("agreement", alarms.min_agreement, "agrees with {n:,} anchors by {value:.2f} at best"),
    ):
        one = of.get(bell)
        if one is not None and one.value < bound:
            said = sentence.format(value=one.value, n=one.n)
            yield cast(Bell, bell), f"{said}; alarms.min_{bell} is {bound:g}"


def anchored(measured: Iterable[Evaluation]) -> list[Health]:
    """What an alarm may hear of a judge's work on anchors."""
    found = []
    for each in measured:
        if each.suite == "judge" and each.metric in get_args(Bell):
            # The end of the interval that speaks for the judge: an alarm is for what is surely bad.
            sure = each.low if each.metric == "unscored" else each.high
            value = each.value if sure is None else sure
            found.append(Health(metric=each.metric, value=value, n=each.n))
    return found


def stopping(store: Store, config: Config) -> str | None:
    """Why the newest round's judges end the run, by the alarms that are to; None: they do not."""
    rounds = store.rounds()
    if not config.alarms.stop or not rounds or rounds[-1].number == 0:
        return None
    id, tracks = cast(int, rounds[-1].id), config.tracks(rounds[-1].number)
    heard = [
        (f"track {row['track']}, judge {row['judge']}", row["health"])
        for row in store.health(id, "train")
        if row["judge"] == tracks[row["track"]].judge.label  # not one that judged it afterwards
    ]
    for each in store.checkpoints(round_id=id):
        anchors = anchored(store.evaluations(cast(int, each.id)))
        heard += [(f"model {each.model}, its judge", one) for one in anchors]
    for who, one in heard:
        for bell, sentence in rung(config.alarms, [one]):
            if bell in config.alarms.stop:
                return f"{who} {sentence}"
    return None
