"""What a run may be told: frozen tables with a bound and a sentence for every setting.

A setting is marked operational when it may change during a run; a change of any other makes
another run. Reading files into these tables is loop/config.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    model_serializer,
    model_validator,
)
from pydantic.config import JsonDict

from store import postgres
from store.records import Sampling

ROLES = ("proposer", "generator", "judge", "filter")
Tables = dict[str, Any]
OPERATIONAL: JsonDict = {"operational": True}
"""Marks a setting that may change during a run; a change of any other makes another run."""
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]
Share = Annotated[StrictFloat, Field(ge=0, le=1)]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Role(Frozen):
    """Which class fills a role, and the options it is made with.

    A judge and a proposer also have: whose model they ask; a judge, whether it sees what stands in
    <think>.
    """

    use: str
    model: str | None = None
    thinking: Literal["shown", "hidden"] = "shown"
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, table: Any) -> Any:
        if isinstance(table, str):
            return {"use": table}
        if not isinstance(table, Mapping) or "use" not in table:
            raise ValueError('a role is a table with a key "use"')
        _refuse_endless(table)
        own = {key: table[key] for key in ("use", "model", "thinking") if key in table}
        return own | {"options": {key: table[key] for key in table if key not in own}}

    @model_serializer
    def _flat(self) -> Tables:
        model = {} if self.model is None else {"model": self.model}
        thinking = {} if self.thinking == "shown" else {"thinking": self.thinking}
        return {"use": self.use, **model, **thinking, **self.options}

    @property
    def label(self) -> str:
        """Its name in the store: what is used, told apart by its model and options, if any."""
        told_apart = self.model_dump(mode="json")
        del told_apart["use"]
        return f"{self.use}#{digest(told_apart)[:6]}" if told_apart else self.use


def is_frozen(model: str | None) -> bool:
    """Whether what a judge asks is no model, or one that the run does not improve."""
    return model is None or model.startswith(("checkpoint:", "base:", "server:"))


def _refuse_endless(found: Any, place: str = "") -> None:
    """JSON, in which a run keeps its settings, has no infinity and nothing that is not a number."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            _refuse_endless(value, f"{place}.{key}" if place else str(key))
    elif isinstance(found, list | tuple):
        for value in found:
            _refuse_endless(value, place)
    elif isinstance(found, float) and not math.isfinite(found):
        raise ValueError(f"{place} is {found}, and a number in a configuration is finite")


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
    suite: dict[Name, Suite] = {}
    command: dict[Name, Command] = {}

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


Stage = Literal["propose", "generate", "judge", "train", "evaluate"]
"""The stages that may have a process of their own."""


class Config(Frozen):
    """Everything a run is, expanded."""

    rounds: StrictInt = Field(
        3,
        ge=0,
        description="rounds after the warm-up; 0 = until stopped",
        json_schema_extra=OPERATIONAL,
    )
    seed: StrictInt = Field(0, ge=0, lt=2**31)
    batch_prompts: StrictInt = Field(
        64, ge=1, description="prompts worked on and committed together"
    )
    isolation: Literal["auto", "inline", "process"] = Field(
        "auto",
        description="where stages compute: in the driver's process, or each in one of its own; "
        "auto: that where a device is a GPU",
        json_schema_extra=OPERATIONAL,
    )
    stage: dict[Stage, Isolated] = {}
    cluster: Cluster = Cluster()
    track: dict[Name, Track]
    models: dict[Name, Model]
    warmup: Warmup | None = None
    evaluate: Evaluate
    gate: Gate = Gate()
    server: dict[Name, Server] = {}
    cache: Cache = Cache()
    alarms: Alarms = Alarms()
    budget: Budget = Budget()
    checkpoints: Checkpoints = Checkpoints()
    store: Place = Place()

    @model_validator(mode="after")
    def _tracks_have_models(self) -> Config:
        for name, track in (*self.track.items(), *self.tracks(0).items()):
            if track.model not in self.models:
                raise ValueError(f"track {name!r} is of model {track.model!r}, which is not there")
            if track.asks not in self.models:
                raise ValueError(f"track {name!r} asks model {track.asks!r}, which is not there")
        tracks = (*self.track.values(), *self.tracks(0).values())
        busy = {track.model for track in tracks} | {track.asks for track in tracks}
        roles = (role for track in tracks for role in (track.judge, track.proposer))
        asked = {role.model for role in roles}
        busy |= {each for each in self.models if {f"model:{each}", f"base:{each}"} & asked}
        if idle := set(self.models) - busy:
            raise ValueError(f"no track makes examples for model {sorted(idle)[0]!r}, or asks it")
        return self

    @model_validator(mode="after")
    def _anchors_measure_a_model_of_the_run(self) -> Config:
        judge = None if self.evaluate.anchors is None else self.evaluate.anchors.judge
        there = [f"model:{each}" for each in self.models]
        if judge is not None and judge.model not in there:
            raise ValueError(
                "evaluate.anchors.judge asks the model of the run that is to be measured: its "
                f"model is one of {', '.join(there)}, found {judge.model!r}"
            )
        return self

    @model_validator(mode="after")
    def _models_are_warmed_up_in_order(self) -> Config:
        names = list(self.models)
        for place, (name, model) in enumerate(self.models.items()):
            if model.warmup_from is not None and model.warmup_from not in names[:place]:
                before = ", ".join(names[:place]) or "none"
                raise ValueError(
                    f"the warm-up of model {name!r} begins from {model.warmup_from!r}, which is "
                    f"none of the models before it ({before})"
                )
        return self

    @model_validator(mode="after")
    def _the_gate_hears_a_command(self) -> Config:
        name, _, metric = self.gate.by.partition(".")
        if self.gate.by != "held_out" and (not metric or name not in self.evaluate.command):
            there = ", ".join(f'"{each}.METRIC"' for each in self.evaluate.command)
            raise ValueError(
                f'gate.by is "held_out" or a metric of a command ({there or "there is none"}), '
                f"found {self.gate.by!r}"
            )
        return self

    def tracks(self, round: int) -> dict[str, Track]:
        """The tracks of a round. Round 0 has the warm-up's, if any, and no others."""
        if round > 0:
            return self.track
        return {} if self.warmup is None else self.warmup.track

    def roles(self) -> Iterator[tuple[str, Role]]:
        """Every role that is named, and as what."""
        return ((kind, role) for _, kind, role in self._placed())

    def place(self, role: Role) -> str:
        """The dotted key of one of these roles, by which another process finds it."""
        return next(place for place, _, each in self._placed() if each is role)

    def role(self, place: str) -> Role:
        return next(each for key, _, each in self._placed() if key == place)

    def _placed(self) -> Iterator[tuple[str, str, Role]]:
        """(dotted key, as what, role)."""
        yield "evaluate.judge", "judge", self.evaluate.judge
        yield "evaluate.proposer", "proposer", self.evaluate.proposer
        if (anchors := self.evaluate.anchors) is not None:
            yield "evaluate.anchors.proposer", "proposer", anchors.proposer
            yield "evaluate.anchors.generator", "generator", anchors.generator
            if anchors.judge is not None:
                yield "evaluate.anchors.judge", "judge", anchors.judge
        for name, suite in self.evaluate.suite.items():
            yield f"evaluate.suite.{name}.proposer", "proposer", suite.proposer
            yield f"evaluate.suite.{name}.judge", "judge", suite.judge
        for before, tracks in (("warmup.track", self.tracks(0)), ("track", self.track)):
            for name, track in tracks.items():
                for role in ROLES:
                    yield f"{before}.{name}.{role}", role, getattr(track, role)
        for name, model in self.models.items():
            yield f"models.{name}.engine", "engine", model.engine
            yield f"models.{name}.trainer", "trainer", model.trainer
            if model.warmup_trainer is not None:
                yield f"models.{name}.warmup_trainer", "trainer", model.warmup_trainer
        if self.warmup is not None:
            yield "warmup.trainer", "trainer", self.warmup.trainer

    def judge(self, model: str) -> Role:
        """The judge whose choices a model is trained on: its first track's. Of a model that no
        track is of, which is only asked, that of [evaluate]."""
        own = (track.judge for track in self.track.values() if track.model == model)
        return next(own, self.evaluate.judge)

    def judge_by(self, model: str) -> Role | None:
        """The judge that asks a model which the run trains to judge; None when none does."""
        own = [track.judge for track in self.track.values()]
        if self.evaluate.anchors is not None and self.evaluate.anchors.judge is not None:
            own.append(self.evaluate.anchors.judge)
        return next((each for each in own if each.model == f"model:{model}"), None)

    def trainer(self, round: int, model: str) -> Role:
        own = self.models[model]
        if round == 0 and self.warmup is not None:
            return own.warmup_trainer or self.warmup.trainer
        return own.trainer

    @property
    def identity(self) -> str:
        """Digest of the settings that make the run what it is."""
        said = flat(self).items()
        return digest({key: value for key, value in said if not operational(key) | of_place(key)})


def flat(config: Config) -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}

    def walk(place: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{place}.{key}" if place else key, inner)
        else:
            found[place] = value

    walk("", config.model_dump(mode="json"))
    return found


OF_MEMORY = {
    "engine": {"cache_gib", "batch_size"},
    "trainer": {"micro_batch_size", "processes", "gradient_checkpointing", "save_every_s"},
    "warmup_trainer": {"micro_batch_size", "processes", "gradient_checkpointing", "save_every_s"},
}
"""Options of roles that say how much is in memory at once and how often it is saved. They may
change in a run that ran out of it."""


def operational(key: str) -> bool:
    """Whether a setting, named by its dotted key, may change during a run."""
    model: Any = Config
    *_, table, option = ["", *key.split(".")]
    if option in OF_MEMORY.get(table, ()):
        return True
    for part in key.split("."):
        if get_origin(model) is dict:  # `part` is the user's name for a table of it
            model = get_args(model)[1]
            continue
        item = getattr(model, "model_fields", {}).get(part)
        if item is None:
            return False
        if item.json_schema_extra == OPERATIONAL:
            return True
        model = item.annotation
    return False


def of_place(key: str) -> bool:
    """Whether a setting says where a run is kept: it cannot change, and makes no other run."""
    return key.startswith("store.")


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
