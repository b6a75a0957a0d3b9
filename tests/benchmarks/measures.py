"""What a row of the table of judges says, and how it is measured.

Agreement, accuracy and kappa are the loop's own, as it measures a judge on anchors.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from labelled import SEED, WRONG, LabelledSet
from programs import Kind

from loop.measure import judging
from store.records import Call, Evaluation, Group, Judgement, Verdict

CALL = Call(seed=SEED, stage="labelled")
HEADS = (
    *("judge", "asks", "answers", "pairs", "agreement", "accuracy", "κ", "vs nearly right"),
    *("vs wrong", "vs well-written", "unscored", "flips", "seconds", "tokens"),
    "verdicts, as told",
)


def conclude(judge: Any, groups: Sequence[Group], policy: Any) -> tuple[list[Judgement], float]:
    """What it says, each candidate once, and in how many seconds."""
    began = time.perf_counter()
    said = judge.judge(groups, policy, CALL)
    took = time.perf_counter() - began
    asked = sorted(one.id for group in groups for one in group.candidates)
    if sorted(each.candidate_id for each in said) != asked:
        raise ValueError(f"{type(judge).__name__} did not judge each candidate once")
    return said, took


def measured(labelled: LabelledSet, said: Sequence[Judgement]) -> dict[str, Evaluation]:
    """Metric -> the evaluation; `vs KIND` is the agreement on right answers against these alone."""
    scores = {each.candidate_id: each.score for each in said}

    def of(*kinds: Kind) -> dict[str, Evaluation]:
        truth, heard = labelled.truth(*kinds), labelled.answers(scores, *kinds)
        return {each.metric: each for each in judging("judge", truth, heard, [], "judge", SEED)}

    found = of()
    for kind in WRONG:
        if (agreement := of("right", kind).get("agreement")) is not None:
            found[f"vs {kind}"] = agreement
    return found


def pairs(labelled: LabelledSet, said: Sequence[Judgement]) -> int:
    """How many pairs of a right and another answer to one question both have a score."""
    scored = {each.candidate_id for each in said if each.score is not None}
    counted = (
        Counter(labelled.kinds[one.id] == "right" for one in group.candidates if one.id in scored)
        for group in labelled.groups
    )
    return sum(each[True] * each[False] for each in counted)


def flips(said: Sequence[Judgement]) -> float | None:
    """Of the comparisons heard in both orders, the share that came out otherwise in the other."""
    outcomes: dict[tuple[Any, ...], dict[tuple[int, int], float]] = {}
    for each in verdicts(said):
        if each.order is None or each.value is None:
            continue
        other = each.other_candidate_id
        if other is None:
            key = (each.member, each.candidate_id, each.vote)
            outcomes.setdefault(key, {})[each.order, 0] = each.value
        else:
            one, two = sorted((each.candidate_id, other))
            first = each.value if each.candidate_id == one else 1 - each.value
            outcomes.setdefault((each.member, one, two), {})[0, each.candidate_id] = first
    both = [list(each.values()) for each in outcomes.values() if len(each) == 2]
    return fmean(one != other for one, other in both) if both else None


def verdicts(said: Sequence[Judgement]) -> list[Verdict]:
    return [each for judgement in said for each in judgement.verdicts]


def row(name: str, asks: str, judge: Any, labelled: LabelledSet, policy: Any = None) -> list[str]:
    """The cells of a judge's row."""
    said, took = conclude(judge, labelled.groups, policy)
    found = measured(labelled, said)
    agreement, flipped = found.get("agreement"), flips(said)
    tokens = sum(each.tokens or 0 for each in verdicts(said))
    cells = [name, asks, labelled.name, f"{pairs(labelled, said):,}"]
    cells.append("–" if agreement is None else _with_interval(agreement))
    cells += [_value(found, each) for each in ("accuracy", "kappa")]
    cells += [_value(found, f"vs {kind}") for kind in WRONG]
    cells += [_value(found, "unscored"), "–" if flipped is None else f"{flipped:.2f}"]
    return [*cells, f"{took:.1f}", f"{tokens:,}" if tokens else "–", "–"]


def _with_interval(each: Evaluation) -> str:
    return f"{each.value:.2f} [{each.low:.2f}, {each.high:.2f}]"


def _value(found: dict[str, Evaluation], metric: str) -> str:
    return f"{found[metric].value:.2f}" if metric in found else "–"


def protocol_row(
    name: str,
    asks: str,
    labelled: LabelledSet,
    said: Sequence[Judgement],
    took: float,
    heard: Mapping[Any, str],
    told: Mapping[Any, str],
) -> list[str]:
    """heard, told: the status that came of each question, and the one that was to come."""
    if strange := heard.keys() - told.keys():
        raise ValueError(f"{name} heard {len(strange)} verdicts that nobody asked for")
    wanted = Counter(told.values())
    right = Counter(status for key, status in told.items() if heard.get(key) == status)
    words = ", ".join(f"{each} {right[each]} of {wanted[each]}" for each in sorted(wanted))
    tokens = sum(each.tokens or 0 for each in verdicts(said))
    unscored = fmean(each.score is None for each in said)
    cells = [name, asks, labelled.name, *["–"] * 7, f"{unscored:.2f}", "–", f"{took:.1f}"]
    return [*cells, f"{tokens:,}" if tokens else "–", words]
