"""TOML to a frozen Config: default.toml < recipe < the user's file < --set.

Tables merge and lists replace; a role's table is replaced when another one is used, because its
options belong to it. The expanded form, in which every track and model is spelled out, is what is
stored with the run and read back.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.config import JsonDict

from store.errors import UserError, unknown
from store.records import Sampling

HERE = Path(__file__).parent
ROLES = ("proposer", "generator", "judge", "filter")
SPELLED = (*ROLES, "engine", "trainer")
"""Tables for which a string may stand: `judge = "verifier"` is `judge = { use = "verifier" }`."""
Tables = dict[str, Any]
OPERATIONAL: JsonDict = {"operational": True}
"""Marks a setting that may change during a run; a change of any other makes another run."""


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Role(Frozen):
    """Which class fills a role, whose model it asks, and the options it is made with."""

    use: str
    model: str | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, table: Any) -> Any:
        if isinstance(table, str):
            return {"use": table}
        if not isinstance(table, Mapping) or "use" not in table:
            raise ValueError('a role is a table with a key "use"')
        own = {key: table[key] for key in ("use", "model") if key in table}
        return own | {"options": {key: table[key] for key in table if key not in own}}

    @model_serializer
    def _flat(self) -> Tables:
        model = {} if self.model is None else {"model": self.model}
        return {"use": self.use, **model, **self.options}

    @property
    def label(self) -> str:
        """Its name in the store: what is used, told apart by its model and options, if any."""
        told_apart = self.model_dump(mode="json")
        del told_apart["use"]
        return f"{self.use}#{_digest(told_apart)[:6]}" if told_apart else self.use


class Track(Frozen):
    """One line of propose, generate, judge, filter inside a round."""

    model: str = Field("policy", description="which model it samples and makes examples for")
    prompts: StrictInt = Field(256, ge=1, description="prompts asked a round")
    proposer: Role
    generator: Role
    judge: Role
    filter: Role


class Warmup(Track):
    """Round 0: demonstrations to imitate before the first round."""

    trainer: Role


class Model(Frozen):
    """A model that the run improves."""

    path: str = Field(description='a folder, a Hub id, or "embedded"')
    engine: Role
    trainer: Role


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

    @model_validator(mode="after")
    def _somebody_else_grades(self) -> Evaluate:
        if self.judge.model is not None:
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

    min_gain: StrictFloat = Field(0.0, ge=-1, le=1, description="what the lower bound must pass")
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


class Budget(Frozen):
    generated_tokens: StrictInt = Field(
        0,
        ge=0,
        description="the run stops at this many; 0 = no limit",
        json_schema_extra=OPERATIONAL,
    )


class Checkpoints(Frozen):
    keep_last: StrictInt = Field(
        2,
        ge=1,
        description="checkpoints kept beside the incumbent and the best",
        json_schema_extra=OPERATIONAL,
    )


Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]


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
    track: dict[Name, Track]
    models: dict[Name, Model]
    warmup: Warmup | None = None
    evaluate: Evaluate
    gate: Gate = Gate()
    budget: Budget = Budget()
    checkpoints: Checkpoints = Checkpoints()

    @model_validator(mode="after")
    def _tracks_have_models(self) -> Config:
        for name, track in self.track.items():
            if track.model not in self.models:
                raise ValueError(f"track {name!r} is of model {track.model!r}, which is not there")
        idle = set(self.models) - {track.model for track in self.track.values()}
        if idle:
            raise ValueError(f"no track makes examples for model {sorted(idle)[0]!r}")
        return self

    def tracks(self, round: int) -> dict[str, Track]:
        """The tracks of a round. Round 0 has the warm-up, if any, and nothing else."""
        if round > 0:
            return self.track
        return {} if self.warmup is None else {"warmup": self.warmup}

    def trainer(self, round: int, model: str) -> Role:
        if round == 0 and self.warmup is not None:
            return self.warmup.trainer
        return self.models[model].trainer

    @property
    def identity(self) -> str:
        """Digest of the settings that make the run what it is."""
        return _digest({key: value for key, value in flat(self).items() if not operational(key)})


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


def operational(key: str) -> bool:
    """Whether a setting, named by its dotted key, may change during a run."""
    model: Any = Config
    for part in key.split("."):
        fields = getattr(model, "model_fields", {})
        item = fields.get(part)
        if item is None:
            return False
        if item.json_schema_extra == OPERATIONAL:
            return True
        model = item.annotation
    return False


def differences(old: Config, new: Config) -> list[dict[str, Any]]:
    """Each setting in which two configurations differ."""
    before, after = flat(old), flat(new)
    return [
        {"key": key, "from": before.get(key), "to": after.get(key)}
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def read(file: Path | None = None, recipe: str | None = None, sets: Sequence[str] = ()) -> Config:
    """The configuration that these make together. Raises UserError."""
    tables = _parse(HERE / "default.toml")
    if recipe is not None and recipe != "default":
        tables = merge(tables, _parse(recipe_path(recipe)))
    if file is not None:
        tables = merge(tables, _parse(file))
    for assignment in sets:
        tables = merge(tables, _assigned(assignment))
    config = validate(expand(tables))
    if config.warmup is None:
        # Switched off for now; a mistake in it would be found when it is switched on.
        table = _warmup_table(tables)
        validate(config.model_dump() | {"warmup": table})
    return config


def change(config: Config, sets: Sequence[str]) -> Config:
    """An expanded configuration with settings named as in a file changed. Raises UserError."""
    tables: Tables = config.model_dump(mode="json")
    for assignment in sets:
        assigned = _assigned(assignment)
        top = next(iter(assigned))
        if top not in USER_KEYS:
            raise unknown("setting", top, USER_KEYS)
        if top in (*ROLES, "prompts"):
            assigned = {"track": {"main": assigned}}
        elif top in ("engine", "trainer"):
            assigned = {"models": {"policy": assigned}}
        elif top == "model":
            assigned = {"models": {"policy": assigned["model"]}}
        tables = merge(tables, assigned)
    return validate(tables)


def recipes() -> list[str]:
    """The names of the recipes there are."""
    return ["default", *sorted(path.stem for path in (HERE / "recipes").glob("*.toml"))]


def recipe_path(name: str) -> Path:
    path = HERE / "default.toml" if name == "default" else HERE / "recipes" / f"{name}.toml"
    if name not in recipes():
        raise unknown("recipe", name, recipes())
    return path


def merge(lower: Tables, upper: Tables) -> Tables:
    """`upper` over `lower`: tables merge, all else replaces."""
    replaced = "use" in upper and lower.get("use", upper["use"]) != upper["use"]
    merged = {} if replaced else dict(lower)
    for key, value in upper.items():
        under = merged.get(key)
        if key in SPELLED and isinstance(under, str | dict) and isinstance(value, str | dict):
            under, value = (
                {"use": each} if isinstance(each, str) else each for each in (under, value)
            )
        both = isinstance(under, dict) and isinstance(value, dict)
        merged[key] = merge(cast(Tables, under), value) if both else value
    return merged


USER_KEYS = {
    *("rounds", "seed", "batch_prompts", "prompts", "model", "engine", "warmup", "trainer"),
    *("track", "models", "evaluate", "gate", "budget", "checkpoints", *ROLES),
}


def expand(tables: Tables) -> Tables:
    """The user's form to the expanded one: what a named track or model leaves out, the top says."""
    for key in tables:
        if key not in USER_KEYS:
            raise unknown("setting", key, USER_KEYS)
    _must_be_tables(tables)
    top_roles = {key: tables[key] for key in ROLES}
    top_track = top_roles | {key: tables[key] for key in ("prompts",) if key in tables}
    tracks = {"main": top_track}
    tracks |= {name: merge(top_track, track) for name, track in tables.get("track", {}).items()}
    top_model = {key: tables[key] for key in ("engine", "trainer")}
    models = {"policy": merge(top_model, tables["model"])}
    models |= {name: merge(top_model, model) for name, model in tables.get("models", {}).items()}
    evaluate = merge({"proposer": tables["proposer"]}, tables["evaluate"])
    if isinstance(evaluate.get("judge"), str):
        evaluate["judge"] = {"use": evaluate["judge"]}
    rest = ("rounds", "seed", "batch_prompts", "gate", "budget", "checkpoints")
    return {key: tables[key] for key in rest if key in tables} | {
        "track": tracks,
        "models": models,
        "evaluate": evaluate,
        "warmup": _warmup(tables),
    }


def _warmup(tables: Tables) -> Tables | None:
    """Left out, the embedded model is warmed up, because it knows nothing, and no other."""
    embedded = tables["model"].get("path") == "embedded"
    on = tables.get("warmup", {}).get("when", "embedded")
    if on not in ("always", "never", "embedded"):
        raise UserError(f'warmup.when is "always", "never" or "embedded", found {on!r}')
    if on == "never" or (on == "embedded" and not embedded):
        return None
    return _warmup_table(tables)


def _warmup_table(tables: Tables) -> Tables:
    top = {key: tables[key] for key in (*ROLES, "prompts", "trainer") if key in tables}
    own = {key: value for key, value in tables.get("warmup", {}).items() if key != "when"}
    return merge(top, own)


def _must_be_tables(tables: Tables) -> None:
    for key in USER_KEYS - {"rounds", "seed", "batch_prompts", "prompts"}:
        if key in SPELLED and isinstance(tables.get(key), str):
            tables[key] = {"use": tables[key]}
        if not isinstance(tables.get(key, {}), dict):
            raise UserError(f"{key} is a table, found {tables[key]!r}")
    for key in ("track", "models"):
        for name, table in tables.get(key, {}).items():
            if not isinstance(table, dict):
                raise UserError(f"{key}.{name} is a table, found {table!r}")


def validate(expanded: Tables) -> Config:
    """Raises UserError: which setting, what was found, what would be right."""
    try:
        return Config.model_validate(expanded)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise unknown("setting", place, _setting_names(first["loc"][:-1])) from None
        if place.endswith(".[key]"):
            name = place.removesuffix(".[key]")
            raise UserError(
                f"{name}: a name has lower-case letters, digits, - and _, and begins with a "
                f"letter, found {_short(first['input'])}"
            ) from None
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "tuple_type":  # what TOML calls otherwise
            said = "Input should be a list"
        whole = first["type"] == "missing" or not place
        found = "" if whole else f", found {_short(first['input'])}"
        raise UserError(f"{place or 'configuration'}: {said}{found}") from None


def _short(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= 60 else written[:57] + "..."


def _setting_names(place: tuple[Any, ...]) -> list[str]:
    """The dotted names of all settings beside the one at `place`."""
    kinds: dict[str, type[Frozen]] = {
        "track": Track,
        "models": Model,
        "warmup": Warmup,
        "evaluate": Evaluate,
    }
    kinds |= {"gate": Gate, "budget": Budget, "checkpoints": Checkpoints}
    kind = kinds.get(str(place[0]), Config) if place else Config
    return [".".join([*map(str, place), name]) for name in kind.model_fields]


def _parse(path: Path) -> Tables:
    if not path.is_file():
        raise UserError(f"no configuration file {path}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    return cast(Tables, _resolved(tables, path.resolve().parent))


def _resolved(tables: Any, base: Path, place: tuple[str, ...] = ()) -> Any:
    """Paths made absolute: they are relative to the file that names them."""
    if isinstance(tables, dict):
        return {name: _resolved(value, base, (*place, name)) for name, value in tables.items()}
    if not isinstance(tables, str) or not place:
        return tables
    key, of_model = place[-1], place[:-1] == ("model",) or place[:-2] == ("models",)
    if key in ("use", *SPELLED) and ".py:" in tables and not tables.startswith("/"):
        return str(base / tables)
    if not (key == "path" or key.endswith("_path")) or (of_model and tables in ("embedded", "")):
        return tables
    path = base / Path(tables).expanduser()
    # Of a model, what is no folder may be a name on the Hub.
    return tables if of_model and not path.exists() else str(path)


def _assigned(assignment: str) -> Tables:
    key, equals, written = assignment.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set takes key=value, as in judge.votes=3, found {assignment!r}")
    try:
        parsed = tomllib.loads(f"value = {written}")
    except tomllib.TOMLDecodeError:
        parsed = {"value": written}
    value: Any = parsed.pop("value")
    if parsed:
        raise UserError(f"--set takes one key=value, found {assignment!r}; repeat --set for more")
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return dict(_resolved(value, Path.cwd()))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
