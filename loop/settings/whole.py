"""All tables together, and which of their settings may change in a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import Field, StrictInt, model_validator

from loop.settings.base import OPERATIONAL, Frozen, Name, Role, digest
from loop.settings.measuring import Alarms, Evaluate, Gate
from loop.settings.surroundings import (
    Budget,
    Cache,
    Checkpoints,
    Cluster,
    Isolated,
    Place,
    Server,
    Stage,
)
from loop.settings.tracks import ROLES, Model, Track, Warmup


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
    stage: dict[Stage, Isolated] = Field(default_factory=dict)
    cluster: Cluster = Cluster()
    track: dict[Name, Track]
    models: dict[Name, Model]
    warmup: Warmup | None = None
    evaluate: Evaluate
    gate: Gate = Gate()
    server: dict[Name, Server] = Field(default_factory=dict)
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


OF_MEANS = {
    "engine": {
        *("cache_gib", "batch_size", "gpu_memory", "sleep"),
        *("serve", "url", "key_env", "concurrency", "timeout_s"),
    },
    "trainer": {"micro_batch_size", "processes", "gradient_checkpointing", "save_every_s"},
    "warmup_trainer": {"micro_batch_size", "processes", "gradient_checkpointing", "save_every_s"},
}
"""Options of roles that say with what means the same is computed: how much is in memory at once,
where a server is, how often something is saved. They may change in a run that ran out of them."""


def operational(key: str) -> bool:
    """Whether a setting, named by its dotted key, may change during a run."""
    model: Any = Config
    *_, table, option = ["", *key.split(".")]
    if option in OF_MEANS.get(table, ()):
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
