"""What a round makes its examples of, and the models that learn from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, model_validator

from loop.settings.base import Frozen, Name, Role

ROLES = ("proposer", "generator", "judge", "filter")


class Track(Frozen):
    """One line of propose, generate, judge, filter inside a round."""

    model: str = Field("policy", description="which model it makes examples for")
    writer: str | None = Field(
        None, description="which model writes its candidates, where that is another"
    )
    prompts: StrictInt = Field(256, ge=1, description="prompts asked a round")
    proposer: Role
    generator: Role
    judge: Role
    filter: Role

    @property
    def asks(self) -> str:
        """The model that proposers and generators ask."""
        return self.writer or self.model


class Warmup(Frozen):
    """Round 0: what is learned before the first round, all tracks of a model in one training."""

    track: dict[Name, Track]
    trainer: Role


class Mix(Frozen):
    """Which examples a training learns from beside those of its own round.

    Shares are of the number of examples that the round itself gave.
    """

    rounds: tuple[Annotated[StrictFloat, Field(ge=0, le=100)], ...] = Field(
        (1.0,), min_length=1, description="of this round, of the one before, and so on"
    )
    replay: StrictFloat = Field(
        0.0, ge=0, le=100, description="of any rounds before those, warm-up aside"
    )
    real: StrictFloat = Field(
        0.0,
        ge=0,
        lt=1,
        description="the least share of the whole that came with data and from no policy",
    )

    @model_validator(mode="after")
    def _this_round_counts(self) -> Mix:
        if not 0 < self.rounds[0] <= 1:
            raise ValueError(
                "the share of a round's own examples, the first of rounds, is in (0, 1]"
            )
        return self


class Model(Frozen):
    """A model that the run improves."""

    path: str = Field(description='a folder, a Hub id, or "embedded"')
    template_path: str | None = Field(
        None, description="a Jinja chat template, for a model that has none or another"
    )
    start_from: Literal["incumbent", "base", "previous"] = Field(
        "incumbent",
        description="where a round's training begins: what was accepted last, what the rounds "
        "began from, or what was trained last, accepted or not",
    )
    reference: Literal["start", "base"] = Field(
        "start", description="what preference training is held to: where it began, or the base"
    )
    fresh_adapter: StrictBool = Field(
        False, description="merge an adapter before each round, and train a new one"
    )
    warmup_from: str | None = Field(
        None,
        description="the model that its warm-up begins from, when that one's is over, in place of "
        "what lies at its own path",
    )
    mix: Mix = Mix()
    engine: Role
    trainer: Role
    warmup_trainer: Role | None = Field(
        None, description="what trains it in the warm-up, where that is not warmup.trainer"
    )

    @model_validator(mode="after")
    def _has_a_template_already(self) -> Model:
        if self.path == "embedded" and self.template_path is not None:
            raise ValueError("the embedded model has a chat template; leave template_path out")
        return self

    @model_validator(mode="after")
    def _has_an_adapter(self) -> Model:
        if self.fresh_adapter and self.trainer.options.get("lora_rank") is None:
            raise ValueError("fresh_adapter is for trainers with a lora_rank")
        return self
