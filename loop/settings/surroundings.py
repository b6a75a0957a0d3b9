"""What a run asks, where it computes and keeps what it has, and how much it may cost."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, StrictFloat, StrictInt, model_validator

from loop.settings.base import OPERATIONAL, Frozen
from store import postgres


class Server(Frozen):
    """A model behind an OpenAI-compatible server, which judges may ask as "server:NAME"."""

    url: str = Field(pattern=r"^https?://", description='as in "http://127.0.0.1:8000/v1"')
    model: str | None = Field(None, description="left out, the only one that the server has")
    extra: dict[str, Any] = Field({}, description="what else goes into each request's body")
    key_env: str | None = Field(
        None,
        description="the environment variable that holds the key",
        json_schema_extra=OPERATIONAL,
    )
    structured: Literal["auto"] | bool = Field(
        "auto", description="whether replies are held to a JSON schema; auto: where it is offered"
    )
    concurrency: StrictInt = Field(
        32, ge=1, le=1000, description="calls under way at once", json_schema_extra=OPERATIONAL
    )
    requests_per_second: StrictFloat | None = Field(
        None, gt=0, description="known limit, if any", json_schema_extra=OPERATIONAL
    )
    timeout_s: StrictFloat = Field(60.0, gt=0, json_schema_extra=OPERATIONAL)
    retries: StrictInt = Field(5, ge=0, json_schema_extra=OPERATIONAL)
    price_in: StrictFloat | None = Field(
        None, ge=0, description="of a million tokens asked", json_schema_extra=OPERATIONAL
    )
    price_out: StrictFloat | None = Field(
        None, ge=0, description="of a million tokens answered", json_schema_extra=OPERATIONAL
    )

    @model_validator(mode="after")
    def _has_an_address(self) -> Server:
        try:
            parts = urlsplit(self.url)
            found = parts.hostname is not None and parts.port != 0
        except ValueError:
            found = False
        if not found:
            raise ValueError('url is no address, as "http://127.0.0.1:8000/v1"')
        return self

    @model_validator(mode="after")
    def _leaves_the_question(self) -> Server:
        if taken := sorted({"messages", "model", "n", "stream"} & self.extra.keys()):
            raise ValueError(f"extra has {taken[0]!r}, which is for the judge to say")
        return self


class Cache(Frozen):
    """What a judge's model said before in the same words is not asked again, in any run."""

    when: Literal["server", "always", "never"] = Field(
        "server",
        description="of which models replies are kept",
        json_schema_extra=OPERATIONAL,
    )
    path: str | None = Field(
        None,
        description="an SQLite file; left out, judged.db beside the run directories",
        json_schema_extra=OPERATIONAL,
    )


class Budget(Frozen):
    generated_tokens: StrictInt = Field(
        0,
        ge=0,
        description="the run stops at this many; 0 = no limit",
        json_schema_extra=OPERATIONAL,
    )
    cost: StrictFloat = Field(
        0.0,
        ge=0,
        description="money that judges may spend, in the currency of the servers' prices; "
        "0 = no limit",
        json_schema_extra=OPERATIONAL,
    )


class Place(Frozen):
    """Where a run's rows are kept: left out, in one SQLite file in the run directory."""

    url: str | None = Field(
        None,
        description='a PostgreSQL database, as in "postgresql://me@127.0.0.1:5432/loops"; a run '
        "has a schema of its own in it",
    )
    password_env: str | None = Field(
        None, description="the environment variable that holds the password"
    )

    @model_validator(mode="after")
    def _can_be_an_address(self) -> Place:
        if self.url is not None:
            postgres.parsed(self.url)
        elif self.password_env is not None:
            raise ValueError("password_env is for a url, and there is none")
        return self


class Checkpoints(Frozen):
    keep_last: StrictInt = Field(
        2,
        ge=1,
        description="checkpoints kept beside the incumbent and the best",
        json_schema_extra=OPERATIONAL,
    )


Stage = Literal["propose", "generate", "judge", "train", "evaluate"]
"""The stages that may have a process of their own."""


class Isolated(Frozen):
    """How the process of a stage is run, where a stage has one of its own."""

    devices: tuple[str, ...] | None = Field(
        None,
        description="of CUDA_VISIBLE_DEVICES there; left out, all that the run sees",
        json_schema_extra=OPERATIONAL,
    )
    timeout_s: StrictFloat | None = Field(
        3600.0,
        gt=0,
        description="it is ended when it was silent for so long: over a batch of prompts, or "
        "between two steps of a training",
        json_schema_extra=OPERATIONAL,
    )
    retries: StrictInt = Field(
        2,
        ge=0,
        description="how often a batch or training is done again whose process ended",
        json_schema_extra=OPERATIONAL,
    )


class Cluster(Frozen):
    """Other processes, on this machine or on others, that answer and judge batch by batch."""

    workers: StrictInt = Field(
        0,
        ge=0,
        description="processes, each with models of its own; 0 = the driver does it all",
        json_schema_extra=OPERATIONAL,
    )
    address: str | None = Field(
        None,
        description="of a Ray cluster that is there; left out, one of this machine's own, for as "
        "long as the run is driven",
        json_schema_extra=OPERATIONAL,
    )
    cpus: StrictFloat = Field(
        1.0, ge=0, description="that Ray gives each of them", json_schema_extra=OPERATIONAL
    )
    gpus: StrictFloat = Field(
        0.0, ge=0, description="that Ray gives each of them", json_schema_extra=OPERATIONAL
    )
    retries: StrictInt = Field(
        2,
        ge=0,
        description="how often a batch is done again whose process ended",
        json_schema_extra=OPERATIONAL,
    )
