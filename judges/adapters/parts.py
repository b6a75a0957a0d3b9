"""What several functions gave one answer, as one judgement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from store.records import Candidate, Judgement, Status, Verdict


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one function gave one answer. value: None where it does not apply to it."""

    name: str
    value: float | None
    weight: float = 1.0
    """At 0 it is kept and has no say."""
    words: str = ""
    seconds: float | None = None


def numbers(returned: Any, count: int, name: str) -> list[float | None]:
    """The score of each of `count` answers; a list, an array or a tensor of them was returned.

    Raises RuntimeError when it has another number of them: then nobody knows whose is whose.
    """
    scores = returned.tolist() if hasattr(returned, "tolist") else returned
    if isinstance(scores, str) or not hasattr(scores, "__len__"):
        raise TypeError(f"{name} returned {returned!r}; it returns a list of numbers or None")
    if len(scores) != count:
        raise RuntimeError(f"{name} was given {count} answers and returned {len(scores)} scores")
    return [number(score, name) for score in scores]


def number(score: Any, name: str) -> float | None:
    if hasattr(score, "item"):  # of an array, or a tensor without dimensions
        score = score.item()
    if score is not None and not isinstance(score, Real):
        raise TypeError(f"{name} returned {score!r} for an answer; it returns a number or None")
    return None if score is None else float(score)


def concluded(candidate: Candidate, parts: Sequence[Part]) -> Judgement:
    """The sum of the parts by their weights.

    A part that is no finite number fails the whole. One that does not apply is left out, as TRL
    leaves it out; where none applies there is no score.
    """
    verdicts = tuple(
        _verdict(candidate, each, place, alone=len(parts) == 1) for place, each in enumerate(parts)
    )
    counted = [each for each in parts if each.weight]
    broken = [each for each in counted if _status(each) == "failed"]
    silent = [each.name for each in counted if each.value is None]
    terms = [each.weight * each.value for each in counted if each.value is not None]
    reason = f"no score from {', '.join(silent)}" if silent else None
    if broken:
        reason = "; ".join(f"{each.name} returned {each.value}" for each in broken)
    status: Status = "failed" if broken else "ok" if terms else "abstained"
    return Judgement(
        candidate_id=candidate.id,
        score=math.fsum(terms) if status == "ok" else None,
        status=status,
        reason=reason,
        verdicts=verdicts,
    )


def _status(part: Part) -> Status:
    if part.value is None:
        return "abstained"
    return "ok" if math.isfinite(part.value) else "failed"


def _verdict(candidate: Candidate, part: Part, place: int, alone: bool) -> Verdict:
    status = _status(part)
    return Verdict(
        candidate_id=candidate.id,
        raw="; ".join(filter(None, (repr(part.value), part.words))),
        status=status,
        value=part.value if status == "ok" else None,
        vote=place,
        seconds=part.seconds,
        member=None if alone else part.name,
    )
