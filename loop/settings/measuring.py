"""How checkpoints and judges are measured, and what they must show."""

from __future__ import annotations

import shlex
from typing import Literal

from pydantic import Field, StrictFloat, StrictInt, model_validator

from loop.settings.base import OPERATIONAL, Frozen, Name, Role, Share, is_frozen
from store.records import Sampling


class Anchors(Frozen):
    """Answers of known worth, by which the judge of each round is measured."""

    prompts: StrictInt = Field(100, ge=2)
    proposer: Role
    generator: Role
    judge: Role | None = Field(
        None, description="who asks a model that judges, where no judge of the rounds does"
    )


class Suite(Frozen):
    """Skills that a model had and must not lose, measured greedily each round."""

    proposer: Role
    judge: Role
    prompts: StrictInt = Field(200, ge=2)
    max_tokens: StrictInt = Field(256, ge=1)
    stop: tuple[str, ...] = ()
    max_fall: Share = Field(
        0.0, description="rejected when it surely scores this much below what the rounds began from"
    )

    @model_validator(mode="after")
    def _somebody_else_grades(self) -> Suite:
        if not is_frozen(self.judge.model):
            raise ValueError("every model of the run is under test, and none grades itself")
        return self


class Command(Frozen):
    """A command of the user's: a checkpoint's path in, metrics as a JSON object out."""

    run: str = Field(description="its words as in a shell; {checkpoint} stands for the path")
    folder_path: str | None = Field(
        None, description="where it runs; unless said, the folder of the file that names it"
    )
    timeout_s: StrictFloat = Field(3600.0, gt=0, json_schema_extra=OPERATIONAL)
    guard: str | None = Field(None, description="the metric that must not fall")
    max_fall: StrictFloat = Field(0.0, ge=0, description="below the incumbent's")

    @model_validator(mode="after")
    def _names_the_checkpoint(self) -> Command:
        try:
            words = shlex.split(self.run)
        except ValueError as error:
            raise ValueError(f"run is not a command: {error}") from None
        if not any("{checkpoint}" in word for word in words):
            raise ValueError("run has no {checkpoint}, so it would measure something else")
        return self


class Evaluate(Frozen):
    """How checkpoints are measured, on prompts that are never trained on."""

    judge: Role
    proposer: Role
    gate_prompts: StrictInt = Field(200, ge=2, description="prompts that the gate sees")
    test_prompts: StrictInt = Field(300, ge=2, description="prompts that no rule sees")
    samples: StrictInt = Field(
        4, ge=1, description="sampled answers a prompt; one greedy one is added"
    )
    temperature: StrictFloat = Field(1.0, gt=0, le=10)
    top_p: StrictFloat = Field(1.0, gt=0, le=1)
    top_k: StrictInt = Field(0, ge=0)
    max_tokens: StrictInt = Field(256, ge=1)
    stop: tuple[str, ...] = ()
    anchors: Anchors | None = None
    suite: dict[Name, Suite] = Field(default_factory=dict)
    command: dict[Name, Command] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_differ(self) -> Evaluate:
        if both := sorted(self.suite.keys() & self.command.keys()):
            raise ValueError(f"{both[0]!r} is the name of a suite and of a command")
        for name in ("held_out", "anchors", "judge"):
            if name in self.suite or name in self.command:
                raise ValueError(f"{name!r} is a name of the loop's own; choose another")
        return self

    @model_validator(mode="after")
    def _somebody_else_grades(self) -> Evaluate:
        if not is_frozen(self.judge.model):
            raise ValueError("every model of the run is under test, and none grades itself")
        return self

    def sampling(self, *, greedy: bool) -> Sampling:
        return Sampling(
            temperature=0.0 if greedy else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            stop=self.stop,
        )


class Gate(Frozen):
    """What a new checkpoint must show to replace the incumbent."""

    by: str = Field(
        "held_out",
        description='what decides: "held_out", or a metric of a command as "name.metric"',
    )
    min_gain: StrictFloat = Field(0.0, description="what the lower bound must pass")
    undecided: Literal["keep", "revert"] = Field(
        "revert", description="what to go on with when the interval holds zero"
    )
    resamples: StrictInt = Field(10_000, ge=100, le=1_000_000)
    patience: StrictInt = Field(
        2,
        ge=0,
        description="rounds without an accepted checkpoint after which the run stops; 0 = never",
        json_schema_extra=OPERATIONAL,
    )
    target: StrictFloat | None = Field(
        None,
        description="the run ends when the gate's score reaches this",
        json_schema_extra=OPERATIONAL,
    )

    @model_validator(mode="after")
    def _scores_lie_within_1(self) -> Gate:
        if self.by == "held_out" and not -1 <= self.min_gain <= 1:
            raise ValueError(f"min_gain is between -1 and 1, found {self.min_gain:g}")
        return self


Bell = Literal["unscored", "modal", "flips", "votes", "length", "kappa", "agreement", "drift"]
"""What a judge's health is watched for."""


class Alarms(Frozen):
    """How bad a judge may get in a round before it is said or the run stops (loop/health.py)."""

    stop: tuple[Bell, ...] = Field(
        (),
        description="alarms that end the run; the others are said and kept",
        json_schema_extra=OPERATIONAL,
    )
    max_unscored: Share = Field(
        0.5,
        description="share of answers without a score; above it the stage stops before it commits",
        json_schema_extra=OPERATIONAL,
    )
    max_modal: Share = Field(
        0.95, description="share of the commonest score", json_schema_extra=OPERATIONAL
    )
    max_flips: Share = Field(
        0.5,
        description="share of comparisons that turn around when the order does",
        json_schema_extra=OPERATIONAL,
    )
    min_votes: Share = Field(
        0.2, description="share of pairs of votes that agree", json_schema_extra=OPERATIONAL
    )
    max_length: Share = Field(
        0.8,
        description="correlation of score and length among answers to one prompt, either way",
        json_schema_extra=OPERATIONAL,
    )
    min_kappa: StrictFloat = Field(
        0.0, ge=-1, le=1, description="Cohen's kappa on anchors", json_schema_extra=OPERATIONAL
    )
    min_agreement: Share = Field(
        0.5, description="upper bound of the agreement on anchors", json_schema_extra=OPERATIONAL
    )
    max_drift: Share = Field(
        0.25,
        description="mean change of the anchors' scores since the last round, of their range",
        json_schema_extra=OPERATIONAL,
    )
