"""What a recipe claims, in which arena it is tried, and what it is held against.

A recipe's file says it beside its settings, so it is fixed before anything is measured:

    arena = "spell"                          # recipes/arenas/spell.toml: the task, below the recipe
    control = ["trainer.nll_weight=0"]       # the recipe with the claimed ingredient off
    plain = ["prompts=480"]                  # plain iterative DPO in that arena, of equal size

    [[claim]]
    says = "with the NLL term beats without"
    metric = "accuracy_sampled"

None of it is a setting of a run.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, Field, StrictFloat, ValidationError, model_validator
from pydantic_core import ErrorDetails
from sqlalchemy.exc import SQLAlchemyError

from loop import config
from loop.gain import METRICS as BY_PROMPT
from loop.gain import Interval, Values, by_prompt
from loop.gate import items
from loop.report import Table
from loop.settings import Frozen
from store.database import Store
from store.errors import UserError, unknown
from store.records import Checkpoint

Verdict = Literal["confirmed", "refuted", "undecided"]
Against = Literal["control", "plain", "start", "zero"]
METRICS = (*BY_PROMPT, "agreement")
RESULT = ("ours", "theirs", "difference", "low", "high", "items", "left_out", "verdict")
"""What a trial says of a claim."""


def _known(metric: str) -> str:
    if metric not in METRICS:
        raise ValueError(str(unknown("metric", metric, METRICS)))
    return metric


class Claim(Frozen):
    """A direction that the paper states, as a number that a run's store can be asked for."""

    says: str = Field(description="the claim, in a sentence")
    metric: str | None = Field(
        None,
        description=f"of the prompts of the test split: {', '.join(BY_PROMPT)}; or of the anchors, "
        "how well it judges: agreement",
    )
    query: str | None = Field(
        None,
        description="a SELECT of item, each once, and value; :checkpoint is the one measured, "
        ":judge the label of [evaluate]'s judge, :run the run. Items that two runs have in common "
        "are compared one by one, so an item is no row's id except against zero",
    )
    of: Literal["recipe", "control", "plain"] = "recipe"
    """Whose number it is about."""
    against: Against = Field(
        "control",
        description="what the number is compared with: the same of the control, of plain iterative "
        "DPO or of the checkpoint that the rounds began from; zero: it is a difference itself",
    )
    found: str | None = None
    """Written when the runs are over: why it is refuted or undecided, and what was tried."""
    expect: Literal["more", "less", "same", "not less", "not more"] = "more"
    margin: Annotated[StrictFloat, Field(ge=0)] = 0.0
    """How large a difference counts as none, where the claim is that there is none."""

    @model_validator(mode="after")
    def _names_a_number(self) -> Claim:
        if (self.metric is None) == (self.query is None):
            raise ValueError("a claim is about a metric or about a query, and about one of them")
        if self.metric is not None:
            _known(self.metric)
        if self.margin == 0 and self.expect not in ("more", "less"):
            raise ValueError(
                f'expect "{self.expect}" needs a margin above 0: how large a difference counts as '
                "none"
            )
        if self.margin > 0 and self.expect in ("more", "less"):
            raise ValueError(
                f'expect "{self.expect}" takes no margin, found {self.margin:g}; it is for "same", '
                '"not less" and "not more"'
            )
        return self

    def values(self, store: Store, checkpoint: Checkpoint, judge: str) -> Values:
        """The number of a checkpoint, item by item. judge: the label of the one that evaluates.

        Raises UserError for a query that gives anything else.
        """
        id = cast(int, checkpoint.id)
        if self.metric is not None:
            return values(store, id, judge, self.metric)
        return asked(store, self.says, cast(str, self.query), checkpoint=id, judge=judge)

    def verdict(self, difference: Interval) -> Verdict:
        """What the 95 % interval of a difference says of the claim."""
        _, low, high = difference
        match self.expect:
            case "more":
                held, broken = low > 0, high < 0
            case "less":
                held, broken = high < 0, low > 0
            case "not less":
                held, broken = low > -self.margin, high < -self.margin
            case "not more":
                held, broken = high < self.margin, low > self.margin
            case "same":
                held = -self.margin < low and high < self.margin
                broken = low > self.margin or high < -self.margin
        return "confirmed" if held else "refuted" if broken else "undecided"


def values(store: Store, checkpoint: int, judge: str, metric: str) -> Values:
    """The number of a checkpoint, item by item. Raises UserError for agreement without anchors."""
    if metric == "agreement":
        try:
            found = items(store, checkpoint, "judge", metric)
        except LookupError as error:
            raise UserError(
                f"{store.root}: {error}; a run that is asked for agreement has [evaluate.anchors], "
                "and of a reward model a judge that asks it (evaluate.anchors.judge)"
            ) from None
        return {str(place): item for place, item in enumerate(found)}
    return by_prompt(store, checkpoint, judge).get(metric, {})


def asked(store: Store, says: str, query: str, **parameters: Any) -> Values:
    """Item -> value, as the query of the claim that says so gives them; NULL is no value."""
    told = f"claim {says!r}: its query"
    try:
        # Inside another SELECT it cannot be anything else, and its columns are looked up by name.
        whole = f"SELECT item, value FROM (\n{query.strip().removesuffix(';')}\n) AS asked"
        rows = store.query(whole, **parameters)
    except (SQLAlchemyError, sqlite3.Warning) as error:
        cause = getattr(error, "orig", None) or error
        said = " ".join(str(*cause.args[:1]).split())
        raise UserError(
            f"{told} cannot be asked: {said}; right is one SELECT of item and value, which may use "
            ":checkpoint, :judge and :run"
        ) from None
    found: dict[str, float] = {}
    for item, value in (row.values() for row in rows):
        number = isinstance(value, int | float) and math.isfinite(value)
        if item is None or not (number or value is None):
            raise UserError(f"{told} gives {value!r} for item {item!r}; a value is a number")
        if str(item) in found:
            raise UserError(f"{told} gives item {item!r} twice; GROUP BY item gives each once")
        if value is not None:
            found[str(item)] = value
    return found


class Trial(Frozen):
    """How a recipe is put to the test."""

    arena: str | None = None
    """None is what default.toml asks."""
    claim: tuple[Claim, ...] = Field(
        min_length=1, description="what it claims, each in a table under [[claim]]"
    )
    """The first is what the recipe stands for."""
    control: tuple[str, ...] = Field(
        min_length=1,
        description="the settings that take the claimed ingredient out, as in "
        'control = ["trainer.nll_weight=0"]',
    )
    plain: tuple[str, ...] = ()
    """Settings of plain iterative DPO in the arena, so that it generates as many tokens."""
    trial: tuple[str, ...] = ()
    """Settings of all three runs, where the recipe's own sizes would take too long."""
    shown: Annotated[str, AfterValidator(_known)] = Field(
        "accuracy_sampled", description="the metric whose course is shown"
    )

    @model_validator(mode="after")
    def _says_each_once(self) -> Trial:
        said = [each.says for each in self.claim]
        if twice := sorted({each for each in said if said.count(each) > 1}):
            raise ValueError(f"two claims say {twice[0]!r}, and a result is found by what one says")
        return self


def read(name: str) -> Trial:
    """The trial of a recipe. Raises UserError."""
    tables = config.recipe_tables(name)
    own = {key: tables[key] for key in config.TRIAL if key in tables}
    try:
        return Trial.model_validate(own)
    except ValidationError as error:
        raise UserError(f"{name}, {_told(error.errors()[0], own)}") from None


def _told(error: ErrorDetails, tables: Table) -> str:
    """A sentence on what is wrong with a trial, which says where."""
    place, known = [*error["loc"]], cast(Any, Trial).model_fields
    where = "the trial"
    if place[:1] == ["claim"] and len(place) > 1:
        known = Claim.model_fields
        number = cast(int, place[1])
        table = tables["claim"][number]
        says = table.get("says") if isinstance(table, dict) else None
        where = f"claim {number + 1 if says is None else repr(says)}"
        place = place[2:]
    key = str(place[0]) if place else ""
    if error["type"] == "extra_forbidden":
        return f"{where}: {unknown('key', key, known)}"
    if place and known is not Claim.model_fields:
        where = key
    elif place:
        where += f", {key}"
    if error["type"] in ("missing", "tuple_type", "too_short"):
        found = "nothing" if error["type"] == "missing" else repr(error["input"])
        right = known[key].description or 'a list of settings, as in ["prompts=480"]'
        return f"{where}: it is {right}; found {found}"
    said = error["msg"].removeprefix("Value error, ")
    found = "" if error["type"] == "value_error" else f", found {error['input']!r}"
    return f"{where}: {said}{found}"


def with_results(claims: Sequence[Claim], kept: Sequence[Table]) -> list[Table]:
    """The claims as they are, each with the numbers of RESULT, which are None where it was not
    tried. kept: what results.json has of them."""
    by = {each["says"]: each for each in kept}
    return [
        {
            **each.model_dump(exclude={"query"}),
            **{key: by[each.says][key] if each.says in by else None for key in RESULT},
        }
        for each in claims
    ]
