"""The schema: the records of store/records.py as SQLModel tables, plus keys.

Read it from the top: run > round > asked > candidate > judgement > example > checkpoint. Times
are UTC. A SQLModel table class does not validate; what enters has been validated as a record.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Index, LargeBinary, UniqueConstraint
from sqlmodel import Field, SQLModel


def _json() -> Any:
    return Field(sa_column=Column(JSON, nullable=False))


def _key(column: str, *, index: bool = False, default: Any = ...) -> Any:
    return Field(default, foreign_key=column, index=index)


class RunRow(SQLModel, table=True):
    """One run, and the lease of the one process that drives it."""

    __tablename__ = "run"
    id: int | None = Field(default=None, primary_key=True)
    uuid: str = Field(unique=True)
    name: str
    config: dict[str, Any] = _json()
    identity: str
    seed: int = Field(sa_type=BigInteger)
    versions: dict[str, Any] = _json()
    status: str
    changes: list[Any] = _json()
    stop_requested: bool
    driver: str | None
    driver_seen: datetime | None
    parent_uuid: str | None
    parent_path: str | None
    started: datetime
    ended: datetime | None


class RoundRow(SQLModel, table=True):
    __tablename__ = "round"
    __table_args__ = (UniqueConstraint("run_id", "number"),)
    id: int | None = Field(default=None, primary_key=True)
    run_id: int = _key("run.id")
    number: int
    stage: str
    status: str
    counts: dict[str, Any] = _json()
    seconds: dict[str, Any] = _json()
    started: datetime
    ended: datetime | None


class PromptRow(SQLModel, table=True):
    __tablename__ = "prompt"
    __table_args__ = (UniqueConstraint("run_id", "digest"),)
    id: int | None = Field(default=None, primary_key=True)
    run_id: int = _key("run.id")
    messages: list[Any] = _json()
    reference: str | None
    task: str | None
    origin: str
    split: str
    digest: str
    suite: str = Field(sa_column_kwargs={"server_default": "held_out"})
    columns: dict[str, Any] = _json()
    parent_prompt_id: int | None = _key("prompt.id")
    parent_candidate_id: int | None = Field(
        sa_column=Column(ForeignKey("candidate.id", use_alter=True))
    )
    """use_alter: candidate > asked > prompt > candidate is a ring."""


class AskedRow(SQLModel, table=True):
    """A prompt asked in a round. `track` is the model's name when it is asked to evaluate."""

    __tablename__ = "asked"
    __table_args__ = (UniqueConstraint("round_id", "track", "purpose", "prompt_id"),)
    id: int | None = Field(default=None, primary_key=True)
    round_id: int = _key("round.id")
    prompt_id: int = _key("prompt.id", index=True)
    track: str
    purpose: str
    batch: int


class CandidateRow(SQLModel, table=True):
    __tablename__ = "candidate"
    __table_args__ = (UniqueConstraint("asked_id", "index"),)
    id: int | None = Field(default=None, primary_key=True)
    asked_id: int = _key("asked.id")
    index: int
    text: str
    token_ids: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    """Packed little-endian uint32."""
    tokens: int
    trained_mask: bytes | None = Field(sa_column=Column(LargeBinary))
    """A byte a token, 1 where it is trained on. None is everywhere."""
    finish_reason: str
    logprob: float | None
    seed: int | None = Field(sa_type=BigInteger)
    sampling: dict[str, Any] | None = Field(sa_column=Column(JSON(none_as_null=True)))
    made_as: str | None
    made_with: str | None
    checkpoint_id: int | None = _key("checkpoint.id", index=True)


class VerdictRow(SQLModel, table=True):
    """One call of a judge. Its judgement has the same candidate, judge and round."""

    __tablename__ = "verdict"
    __table_args__ = (Index("ix_verdict_candidate", "candidate_id", "judge", "round_id"),)
    id: int | None = Field(default=None, primary_key=True)
    candidate_id: int = _key("candidate.id")
    other_candidate_id: int | None = _key("candidate.id")
    round_id: int = _key("round.id")
    judge: str
    judge_version: str
    judge_model: str | None
    prompt_digest: str | None
    raw: str
    value: float | None
    status: str
    order: int | None
    vote: int
    seed: int | None = Field(sa_type=BigInteger)
    seconds: float | None
    tokens: int | None
    cost: float | None
    cached: bool = Field(sa_column_kwargs={"server_default": "0"})
    member: str | None


class JudgementRow(SQLModel, table=True):
    __tablename__ = "judgement"
    __table_args__ = (UniqueConstraint("candidate_id", "judge", "round_id"),)
    id: int | None = Field(default=None, primary_key=True)
    candidate_id: int = _key("candidate.id")
    round_id: int = _key("round.id")
    judge: str
    judge_version: str
    score: float | None
    status: str
    reason: str | None
    variance: float | None


class HealthRow(SQLModel, table=True):
    """How a judge did in a round, and what it took."""

    __tablename__ = "health"
    __table_args__ = (UniqueConstraint("round_id", "track", "purpose", "judge", "metric"),)
    id: int | None = Field(default=None, primary_key=True)
    round_id: int = _key("round.id")
    track: str
    purpose: str
    judge: str
    metric: str
    value: float
    n: int
    detail: dict[str, Any] | None = Field(sa_column=Column(JSON(none_as_null=True)))


class ExampleRow(SQLModel, table=True):
    __tablename__ = "example"
    id: int | None = Field(default=None, primary_key=True)
    asked_id: int = _key("asked.id", index=True)
    kind: str
    chosen_id: int = _key("candidate.id", index=True)
    rejected_id: int | None = _key("candidate.id", index=True)
    margin: float | None
    label: bool | None
    weight: float
    rule: str
    chosen_judgement_id: int | None = _key("judgement.id")
    rejected_judgement_id: int | None = _key("judgement.id")


class DroppedRow(SQLModel, table=True):
    __tablename__ = "dropped"
    id: int | None = Field(default=None, primary_key=True)
    asked_id: int = Field(foreign_key="asked.id", unique=True)
    reason: str


class CheckpointRow(SQLModel, table=True):
    __tablename__ = "checkpoint"
    id: int | None = Field(default=None, primary_key=True)
    run_id: int = _key("run.id")
    round_id: int = _key("round.id")
    model: str
    kind: str
    path: str
    digest: str
    tokenizer_digest: str
    template_digest: str
    bytes: int = Field(sa_type=BigInteger)
    status: str
    parent_id: int | None = _key("checkpoint.id")
    base_id: int | None = _key("checkpoint.id")


class TrainedOnRow(SQLModel, table=True):
    """Which checkpoint learned from which example, and what it was held to."""

    __tablename__ = "trained_on"
    checkpoint_id: int = Field(foreign_key="checkpoint.id", primary_key=True)
    example_id: int = Field(foreign_key="example.id", primary_key=True, index=True)
    chosen_reference_logprob: float | None
    rejected_reference_logprob: float | None


class TrainingStepRow(SQLModel, table=True):
    __tablename__ = "training_step"
    checkpoint_id: int = Field(foreign_key="checkpoint.id", primary_key=True)
    step: int = Field(primary_key=True)
    loss: float | None
    metrics: dict[str, Any] = _json()


class EvaluationRow(SQLModel, table=True):
    __tablename__ = "evaluation"
    __table_args__ = (UniqueConstraint("checkpoint_id", "suite", "split", "metric"),)
    id: int | None = Field(default=None, primary_key=True)
    checkpoint_id: int = _key("checkpoint.id")
    round_id: int = _key("round.id")
    model: str
    suite: str
    split: str
    metric: str
    value: float
    n: int
    low: float | None
    high: float | None
    judge: str | None
    items: list[float] | None = Field(sa_column=Column(JSON(none_as_null=True)))


class DecisionRow(SQLModel, table=True):
    __tablename__ = "decision"
    id: int | None = Field(default=None, primary_key=True)
    run_id: int = _key("run.id")
    round_id: int = _key("round.id")
    model: str | None
    decision: str
    rule: str
    reason: str
    checkpoint_id: int | None = _key("checkpoint.id")
    incumbent_id: int | None = _key("checkpoint.id")
    numbers: dict[str, Any] = _json()
