"""What every table has in common, and the table of a role."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, model_serializer, model_validator
from pydantic.config import JsonDict

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


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
