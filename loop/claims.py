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

from collections.abc import Sequence
from typing import Annotated, Literal, cast

from pydantic import AfterValidator, Field, StrictFloat, ValidationError, model_validator

from loop import config
from loop.gain import METRICS as BY_PROMPT
from loop.gain import Interval, Values, by_prompt
from loop.gate import items
from loop.report import Table
from loop.settings import Frozen
from store.database import Store
from store.errors import UserError
from store.records import Checkpoint

Verdict = Literal["confirmed", "refuted", "undecided"]
Against = Literal["control", "plain", "start", "zero"]
METRICS = (*BY_PROMPT, "agreement")
RESULT = ("ours", "theirs", "difference", "low", "high", "items", "left_out", "verdict")
"""What a trial says of a claim."""


def _known(metric: str) -> str:
    if metric not in METRICS:
        raise ValueError(f"there is no metric {metric!r}; there are {', '.join(METRICS)}")
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
        description="SQL that gives (item, value); :checkpoint is the one measured, :judge the "
        "label of [evaluate]'s judge, :run the run. Items that two runs have in common are "
        "compared one by one, so an item is no row's id except against zero",
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
        if (self.margin > 0) == (self.expect in ("more", "less")):
            raise ValueError(
                f'expect "{self.expect}" and margin {self.margin:g} do not go together'
            )
        return self

    def values(self, store: Store, checkpoint: Checkpoint, judge: str) -> Values:
        """The number of a checkpoint, item by item. judge: the label of the one that evaluates."""
        id = cast(int, checkpoint.id)
        if self.metric is not None:
            return values(store, id, judge, self.metric)
        rows = store.query(cast(str, self.query), checkpoint=id, judge=judge)
        return {str(row["item"]): row["value"] for row in rows if row["value"] is not None}

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


class Trial(Frozen):
    """How a recipe is put to the test."""

    arena: str | None = None
    """None is what default.toml asks."""
    claim: tuple[Claim, ...] = Field(min_length=1)
    """The first is what the recipe stands for."""
    control: tuple[str, ...] = Field(min_length=1)
    """Settings that take the claimed ingredient out, as `--set` takes them."""
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
    try:
        return Trial.model_validate({key: tables[key] for key in config.TRIAL if key in tables})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(f"recipe {name!r}, {place or 'claim'}: {said}") from None


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
