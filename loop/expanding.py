"""The tables of files put together: the short form that a person writes, and the expanded one.

Tables merge and lists replace; a role's table is replaced when another one is used, because its
options belong to it. In the expanded form every track and model is spelled out.
"""

from __future__ import annotations

import re
from typing import Any, cast

from loop.settings import ROLES, Tables
from store.errors import UserError, unknown

SPELLED = (*ROLES, "engine", "trainer", "warmup_trainer")
"""Tables for which a string may stand: `judge = "verifier"` is `judge = { use = "verifier" }`."""
ANSWERED = {"use": "demonstrations", "n": 4, "mistakes": 0.5}
"""How the answers of anchors are made when nothing else is said: half of them carry a mistake."""
MODEL_KEYS = ("engine", "trainer", "mix")
"""Tables of the top level that a model falls back to."""
BESIDE = ("stage", "cluster", "server", "cache", "alarms", "budget", "checkpoints", "store")
"""Tables that are the same in both forms."""
USER_KEYS = {
    *("rounds", "seed", "batch_prompts", "prompts", "isolation", "model", "warmup", "track"),
    *("models", "evaluate", "gate", *BESIDE, *ROLES, *MODEL_KEYS),
}
WHEN = ("always", "never", "embedded")
"""When there is a warm-up: always, never, or of the embedded model only, which knows nothing."""


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


def expand(tables: Tables) -> Tables:
    """The user's form to the expanded one: what a named track or model leaves out, the top says."""
    for key in tables:
        if key not in USER_KEYS:
            raise unknown("setting", key, USER_KEYS)
    _must_be_tables(tables)
    named = dict(tables.get("models", {}))
    if "policy" in named:  # [model] by its other name
        tables = tables | {"model": merge(tables["model"], named.pop("policy"))}
    top_roles = {key: tables[key] for key in ROLES}
    top_track = top_roles | {key: tables[key] for key in ("prompts",) if key in tables}
    tracks = {"main": top_track}
    tracks |= {name: merge(top_track, track) for name, track in tables.get("track", {}).items()}
    top_model = {key: tables[key] for key in MODEL_KEYS if key in tables}
    models = {"policy": merge(top_model, tables["model"])}
    # A second model is made of what the first is, unless it says otherwise.
    same = {
        key: tables["model"][key] for key in ("path", "template_path") if key in tables["model"]
    }
    for name, model in named.items():
        models[name] = merge(top_model | ({} if "path" in model else same), model)
    rest = ("rounds", "seed", "batch_prompts", "isolation", "gate", *BESIDE)
    return {key: tables[key] for key in rest if key in tables} | {
        "track": tracks,
        "models": models,
        "evaluate": _evaluate(merge({"proposer": tables["proposer"]}, tables["evaluate"])),
        "warmup": _warmup(tables),
    }


def _evaluate(own: Tables) -> Tables:
    """What suites and anchors leave out, the table around them says."""
    if isinstance(own.get("judge"), str):
        own["judge"] = {"use": own["judge"]}
    if isinstance(own.get("anchors"), dict):
        own["anchors"] = merge({"proposer": own["proposer"], "generator": ANSWERED}, own["anchors"])
    if isinstance(suites := own.get("suite"), dict):
        above = {"judge": own.get("judge")}
        own["suite"] = {
            name: merge(above, suite) if isinstance(suite, dict) else suite
            for name, suite in suites.items()
        }
    return own


def _warmup(tables: Tables) -> Tables | None:
    """Left out, the embedded model is warmed up, because it knows nothing, and no other; and what
    a track of the warm-up is for may be wanted always."""
    embedded = tables["model"].get("path") == "embedded"
    own = tables.get("warmup", {})
    on = _when(own, "warmup", "embedded")
    if on == "never":
        return None
    made = warmup_table(tables)
    for name, track in own.get("track", {}).items():
        when = _when(track, f"warmup.track.{name}", on)
        if when == "never" or (when == "embedded" and not embedded):
            del made["track"][name]
    if on == "embedded" and not embedded:
        del made["track"]["warmup"]
    return made if made["track"] else None


def _when(table: Tables, place: str, otherwise: str) -> str:
    found = table.get("when", otherwise)
    if found not in WHEN:
        raise UserError(f'{place}.when is "always", "never" or "embedded", found {found!r}')
    return str(found)


def warmup_table(tables: Tables) -> Tables:
    """What a warm-up leaves out the top says, and what one of its tracks leaves out the warm-up."""
    table = tables.get("warmup", {})
    top = {key: tables[key] for key in (*ROLES, "prompts", "trainer") if key in tables}
    own = {key: value for key, value in table.items() if key not in ("when", "track")}
    first = _apart(top, own)
    trainer = first.pop("trainer")
    tracks = {
        name: _apart(first, {key: value for key, value in track.items() if key != "when"})
        for name, track in table.get("track", {}).items()
    }
    return {"track": {"warmup": first, **tracks}, "trainer": trainer}


def _apart(lower: Tables, upper: Tables) -> Tables:
    """`upper` over `lower`, but a role that `upper` names takes no option from below: how the
    rounds choose or train, or what mistakes others' demonstrations have, is nothing to it."""
    named = {key for key, value in upper.items() if isinstance(value, dict) and "use" in value}
    return merge({key: value for key, value in lower.items() if key not in named}, upper)


def _must_be_tables(tables: Tables) -> None:
    for key in USER_KEYS - {"rounds", "seed", "batch_prompts", "prompts", "isolation"}:
        if key in SPELLED and isinstance(tables.get(key), str):
            tables[key] = {"use": tables[key]}
        if not isinstance(tables.get(key, {}), dict):
            raise UserError(f"{key} is a table, found {short(tables[key])}")
    for key in ("track", "models", "server", "stage", "warmup.track"):
        found: Any = tables
        for part in key.split("."):
            found = found.get(part, {})
        for name, table in found.items() if isinstance(found, dict) else [("", found)]:
            if not isinstance(table, dict):
                raise UserError(f"{key}.{name} is a table, found {table!r}")


def short(value: Any) -> str:
    """What was found, without the password that an address may hold."""
    written = re.sub(r"(://[^:@/\s]*):[^@\s]*@", r"\1:...@", repr(value))
    return written if len(written) <= 60 else written[:57] + "..."
