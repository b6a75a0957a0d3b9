"""Several judges as one: each judges every answer, and what they say is combined.

Members may measure in different units, so a score can be scaled within its group first. That they
disagree is kept: in the variance, in the reason, and in every member's own verdicts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum, isclose
from statistics import fmean, pstdev, pvariance
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from judges.asking import unlike
from judges.models import Models, other_model
from roles import plugins
from roles.protocols import Judge, Policy
from store.errors import UserError
from store.records import ALONE, Call, Group, Judgement, Status, Verdict

Combine = Literal["mean", "median", "majority", "veto"]
Scale = Literal["none", "rank", "z"]

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_WEIGHT = TypeAdapter(Annotated[float, Field(gt=0, allow_inf_nan=False)])


@dataclass(frozen=True)
class Member:
    """One judge of a panel, whose model it asks, and what its word weighs."""

    name: str
    judge: Judge
    model: str | None
    weight: float
    passes: float


class Panel:
    """A judge made of several, each of which may be any judge, and may ask a model of its own.

    members: a table for each by its name, [judge.members.NAME]: `use` and the options of that
    judge, its `model` where it asks another one than the panel's, and its `weight`, 1 if left out.
    combine: `mean` and `median` of the members' scores, by weight. `majority` is 1 where more than
    half of the weight says yes and 0 where more than half says no; an even split abstains. `veto`
    is 1 where all say yes and 0 where one says no, whatever it weighs.
    passes: the score above which a member says yes; a table gives each member its own.
    scale: what is made of a member's scores within a group first: `rank` is the share of the other
    candidates that it puts below, ties by half, in [0, 1]; `z` is in standard deviations from its
    mean. A candidate that it sees alone, or all alike, is at 0.5 and at 0.
    min_members: how many must give a score; left out, all. A member without one is left out.
    """

    asks_model: bool = False
    """Whether a member asks the model that the panel is handed."""
    models: tuple[str, ...] = ()
    """The names of the models that its members ask, and theirs in turn."""
    version: str = "1"

    def __init__(
        self,
        members: dict[str, dict[str, Any]],
        combine: Combine = "mean",
        scale: Scale = "none",
        passes: float | dict[str, float] = 0.5,
        min_members: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        if not members:
            raise UserError("judge 'panel' has no members; give it some, as [judge.members.NAME]")
        if min_members is not None and min_members > len(members):
            raise UserError(
                f"judge 'panel' has {len(members)} members and min_members wants {min_members}"
            )
        if isinstance(passes, dict) and passes.keys() != members.keys():
            raise UserError(
                f"judge 'panel': passes is one number, or one for each of {', '.join(members)}; "
                f"found {passes}"
            )
        self.members = [
            _member(name, table, passes[name] if isinstance(passes, dict) else passes)
            for name, table in members.items()
        ]
        self.combine = combine
        self.scale = scale
        self.min_members = len(members) if min_members is None else min_members
        versions = (f"{each.name}={getattr(each.judge, 'version', '1')}" for each in self.members)
        self.version = f"1 {', '.join(versions)}"
        self.asks_model = any(
            each.model is None and getattr(each.judge, "asks_model", False) for each in self.members
        )
        self.models = _names(self.members)

    def close(self) -> None:
        for each in self.members:
            if (close := getattr(each.judge, "close", None)) is not None:
                close()

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        said = {
            each.name: self._asked(place, each, groups, policy, call)
            for place, each in enumerate(self.members)
        }
        return [judgement for group in groups for judgement in self._concluded(group, said)]

    def _asked(
        self,
        place: int,
        member: Member,
        groups: Sequence[Group],
        policy: Policy | None,
        call: Call,
    ) -> dict[int, Judgement]:
        """A member's judgements by candidate."""

        def progress(done: int, total: int) -> None:
            call.progress(place * total + done, len(self.members) * total)

        # Its own place in the run: two members that ask the same do not draw the same.
        own = replace(call, stage=f"{call.stage}/{member.name}", progress=progress)
        concluded = member.judge.judge(groups, _model_of(member, policy), own)
        asked = [one.id for group in groups for one in group.candidates]
        if (wrong := unlike(asked, [each.candidate_id for each in concluded])) is not None:
            raise RuntimeError(f"{member.name!r} of the panel {wrong}")
        return {each.candidate_id: each for each in concluded}

    def _concluded(
        self, group: Group, said: Mapping[str, Mapping[int, Judgement]]
    ) -> list[Judgement]:
        ids = [one.id for one in group.candidates]
        scaled = {
            name: _scaled({n: judged[n].score for n in ids}, self.scale)
            for name, judged in said.items()
        }
        return [
            self._combined(
                n,
                {name: judged[n] for name, judged in said.items()},
                {name: values[n] for name, values in scaled.items() if n in values},
            )
            for n in ids
        ]

    def _combined(
        self, candidate_id: int, said: Mapping[str, Judgement], scaled: Mapping[str, float]
    ) -> Judgement:
        counted = [each for each in self.members if each.name in scaled]
        values = [scaled[each.name] for each in counted]
        if self.combine in ("majority", "veto"):
            values = [float(scaled[each.name] > each.passes) for each in counted]
        lacking = [each for each in said.values() if each.score is None]
        score: float | None = None
        status: Status = "ok"
        if len(counted) < self.min_members:
            status = Counter(each.status for each in lacking).most_common(1)[0][0]
        else:
            score = _together(self.combine, values, [each.weight for each in counted])
            status = "abstained" if score is None else "ok"
        return Judgement(
            candidate_id=candidate_id,
            score=score,
            status=status,
            reason=_words(said, differ=len(set(values)) > 1),
            variance=pvariance(values) if score is not None and len(values) > 1 else None,
            verdicts=tuple(
                _of(member, each) for member in self.members for each in said[member.name].verdicts
            ),
        )


def _member(name: str, table: Mapping[str, Any], passes: float) -> Member:
    if not _NAME.fullmatch(name):
        raise UserError(
            "judge 'panel': a member's name has lower-case letters, digits, - and _, and begins "
            f"with a letter; found {name!r}"
        )
    options = dict(table)
    use, model = options.pop("use", None), options.pop("model", None)
    if not isinstance(use, str):
        raise UserError(
            f"judge 'panel': member {name!r} is a table with a key \"use\", as "
            f'[judge.members.{name}] use = "rubric"; found {dict(table)}'
        )
    if model is not None and not isinstance(model, str):
        raise UserError(
            f"judge 'panel': the model of member {name!r} is a name, as \"round\"; found {model!r}"
        )
    try:
        weight = _WEIGHT.validate_python(options.pop("weight", 1.0))
    except ValidationError as error:
        raise UserError(
            f"judge 'panel': the weight of member {name!r} is a number above 0; "
            f"found {error.errors()[0]['input']!r}"
        ) from None
    judge = plugins.load("judge", use, options)
    if getattr(judge, "asks_person", False):
        # What a person says is stored under the judge that asked, and that would be no member.
        raise UserError(
            f"judge 'panel': member {name!r} asks a person, who cannot sit in a panel; "
            f"judge {use!r} can be the judge of a track of its own"
        )
    return Member(name, judge, model, weight, passes)


def _names(members: Sequence[Member]) -> tuple[str, ...]:
    """Of the models that the members ask by name, each once."""
    named: dict[str, None] = {}
    for each in members:
        own = () if each.model is None else (each.model,)
        named |= dict.fromkeys((*own, *getattr(each.judge, "models", ())))
    return tuple(named)


def _model_of(member: Member, policy: Policy | None) -> Any:
    """What a member is handed: its own model, with the others by name if it asks for some."""
    own = other_model(policy, member.model)
    if member.model is None or not getattr(member.judge, "models", ()):
        return own
    return Models(own, lambda name: other_model(policy, name))


def _scaled(scores: Mapping[int, float | None], scale: Scale) -> dict[int, float]:
    """One member's scores of one group, scaled among themselves; those that are None left out."""
    given = {n: score for n, score in scores.items() if score is not None}
    if scale == "none" or not given:
        return given
    values = list(given.values())
    if scale == "z":
        mean, spread = fmean(values), pstdev(values)
        return {n: (score - mean) / spread if spread else 0.0 for n, score in given.items()}
    others = len(values) - 1
    below = {
        n: sum(other < score for other in values)
        + (sum(other == score for other in values) - 1) / 2
        for n, score in given.items()
    }
    return {n: count / others if others else 0.5 for n, count in below.items()}


def _together(combine: Combine, values: Sequence[float], weights: Sequence[float]) -> float | None:
    """None is a tie. For a majority and a veto, a value is 1 for yes and 0 for no."""
    if combine == "veto":
        return min(values)
    if combine == "median":
        return _median(values, weights)
    weighed = fsum(value * weight for value, weight in zip(values, weights, strict=True))
    if combine == "mean":
        return weighed / fsum(weights)
    against = fsum(weights) - weighed
    return None if isclose(weighed, against) else float(weighed > against)


def _median(values: Sequence[float], weights: Sequence[float]) -> float:
    """The value that has half of the weight on either side; between two, the middle of them."""
    half, below = fsum(weights) / 2, 0.0
    pairs = sorted(zip(values, weights, strict=True))
    for place, (value, weight) in enumerate(pairs):
        below += weight
        if isclose(below, half):
            return (value + pairs[place + 1][0]) / 2
        if below > half:
            return value
    return pairs[-1][0]


def _words(said: Mapping[str, Judgement], *, differ: bool) -> str | None:
    """Who said what, where they differ or some say nothing."""
    if not differ and all(each.score is not None for each in said.values()):
        return None
    return "; ".join(
        f"{name} {each.score:.4g}"
        if each.score is not None
        else f"{name} gave no score: {each.status}{f', {each.reason}' if each.reason else ''}"
        for name, each in said.items()
    )


def _of(member: Member, said: Verdict) -> Verdict:
    """A verdict with whose it is: of a panel in a panel, a path."""
    name = member.name if said.member is None else f"{member.name}/{said.member}"
    return replace(said, member=name, judge_model=said.judge_model or member.model)
