"""Whether a configuration can run on this machine: device, compiler, model, template, judges'
servers, memory, disk and store, each looked at by the code that a run would use.

No weights are read, and nothing is asked of a server but which models it has.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit
from urllib.request import urlopen

import psutil

from loop import casting, lease, meant, peaks, report, run, space
from loop import config as configuration
from loop.doctor import Finding, State, Wish, vllm
from loop.settings import Config, Model, Server
from roles import plugins
from roles.policy import devices, shape
from store import checkpoints, postgres
from store.errors import UserError

PATIENCE_S = 5.0
"""For a server to say what it is, or which models it has."""
INSTALLS = {
    "apt-get": "sudo apt-get install gcc",
    "dnf": "sudo dnf install gcc",
    "apk": "sudo apk add gcc musl-dev",
    "xcode-select": "xcode-select --install",
}
"""What installs a C compiler, by the program that does."""
HUB_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"


def examine(wish: Wish) -> Iterator[Finding]:
    """What is found, the machine first."""
    config: Config | None = None
    trouble: Finding | None = None
    try:
        if wish.run is not None:
            wish = replace(wish, run=run.find_run(wish.run, wish.runs))
            config = run.stored_config(cast(Path, wish.run))
    except UserError as error:
        trouble = Finding("store", "wrong", str(error), "loop start")
    try:
        if trouble is None:
            config = _config(wish, config)
    except UserError as error:
        trouble = Finding("configuration", "wrong", str(error), _told(error) or _again(wish))
    engines = [] if config is None else [each.engine for each in config.models.values()]
    urls = {each.options.get("url") for each in engines if each.use == "vllm"}
    yield vllm(None in urls)
    for url in sorted(map(str, urls - {None})):
        yield _vllm_at(url)
    yield from _device(config)
    yield _compiler()
    if config is None or trouble is not None:
        yield cast(Finding, trouble)
        return
    again = _again(wish)
    models = list(_models(config, again))
    yield from models
    for name, server in config.server.items():
        asked = f'"server:{name}"' in config.model_dump_json()
        yield _server(name, server, _state(asked), again)
    roles: dict[int, Any] | None = None
    try:
        roles = casting.load_roles(config, weights=False)
        yield Finding("parts", "ok", f"{len(roles)} roles made and checked")
    except UserError as error:
        # What is wrong with a model was said of it already.
        if not any(each.said == str(error) for each in models):
            yield Finding("parts", "wrong", str(error), _told(error) or _again(wish))
    if roles is not None and all(each.state != "wrong" for each in models):
        yield from _memory(config, roles, wish)
        yield _disk(config, roles, wish)
    yield _store(wish, config)


def _config(wish: Wish, stored: Config | None) -> Config:
    """As `loop start` makes it. stored: the run's own."""
    if stored is not None and wish.file is None and wish.recipe is None:
        return configuration.change(stored, wish.sets)
    return configuration.read(wish.file, wish.recipe, wish.sets)


def _again(wish: Wish) -> str:
    """The same question, for when a setting was changed."""
    words = ["loop", "doctor"]
    for option, value in (("--config", wish.file), ("--recipe", wish.recipe)):
        words += [] if value is None else [option, str(value)]
    words += [word for each in wish.sets for word in ("--set", each)]
    return shlex.join([*words, *([] if wish.run is None else [str(wish.run)])])


def _told(error: UserError) -> str | None:
    """The command that an error itself names."""
    found = re.search(r"`((?:pip|git) [^`]+)`|right is: (pip install [^;]+)", str(error))
    return None if found is None else found[1] or found[2]


def _device(config: Config | None) -> Iterator[Finding]:
    import torch

    nvidia = any(Path(each).exists() for each in ("/dev/nvidiactl", "/proc/driver/nvidia/version"))
    mend = None
    if nvidia and torch.version.cuda is None:
        mend = "pip install --force-reinstall --index-url https://pypi.org/simple torch=="
        mend += torch.__version__.partition("+")[0]
    elif nvidia:
        mend = "nvidia-smi"
    asked = set[str]()
    for model in () if config is None else config.models.values():
        asked |= {str(each.options.get("device", "auto")) for each in (model.engine, model.trainer)}
    for name in sorted(asked & {"cuda", "mps"}):
        try:
            devices.find(name)  # type: ignore[arg-type]
        except UserError as error:
            other = "loop doctor --set engine.device=auto --set trainer.device=auto"
            yield Finding("device", "wrong", str(error), mend or other)
    found = devices.find("auto")
    if found.type == "cuda":
        has = torch.cuda.get_device_properties(found)
        narrow = "bfloat16" if devices.prefers_bfloat16(found) else "no bfloat16"
        size = space.shown(has.total_memory)
        yield Finding("device", "ok", f"{has.name}, {size}, CUDA {torch.version.cuda}, {narrow}")
    elif found.type == "cpu" and nvidia:
        why = "is built without CUDA" if torch.version.cuda is None else "cannot use it"
        said = f"there is an NVIDIA GPU, and torch {torch.__version__} {why}: the CPU computes"
        yield Finding("device", "note", said, mend)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        kind = "the GPU of a Mac" if found.type == "mps" else f"{cores} CPU cores, no GPU"
        yield Finding("device", "ok", f"{kind}, torch {torch.__version__}")


def _compiler() -> Finding:
    """Of the C fold on a CPU, of Triton's on a GPU."""
    from kernels import fold

    device = devices.find("auto")
    try:
        chosen = fold.chosen(device)
    except ValueError as error:
        return Finding("compiler", "wrong", str(error), f"unset {fold.VARIABLE}")
    if chosen.name != "torch" or device.type == "mps" or os.environ.get(fold.VARIABLE):
        return Finding("compiler", "ok", chosen.reason)
    if device.type == "cuda":
        return Finding("compiler", "note", chosen.reason, "pip install triton")
    if os.environ.get("CC"):
        return Finding("compiler", "note", chosen.reason, "unset CC")
    there = (command for program, command in INSTALLS.items() if shutil.which(program))
    return Finding("compiler", "note", chosen.reason, next(there, INSTALLS["apt-get"]))


def _models(config: Config, again: str) -> Iterator[Finding]:
    """Those that the run improves, then those that judges and proposers ask as they are."""
    for name, model in config.models.items():
        own = name == "policy"
        setting = "model" if own else f"models.{name}"
        mend = f"{again} --set {setting}.template_path=FILE.jinja"
        yield from _model("model" if own else f"model {name}", model, mend)
    first = next(iter(config.models.values()))
    asked = {(role.model or "").partition(":")[::2] for _, role in config.roles()}
    for path in sorted(of for kind, of in asked if kind == "checkpoint" and of not in ("", "base")):
        frozen = first.model_copy(update={"path": path, "template_path": None})
        mend = f"cp FILE.jinja {shlex.quote(path + '/chat_template.jinja')}"
        yield from _model(f"model {path}", frozen, mend)


def _model(what: str, model: Model, mend: str) -> Iterator[Finding]:
    """mend: what gives it a chat template."""
    if model.path == "embedded":
        yield Finding(what, "ok", "the embedded one, made when a run begins")
        return
    hub = not Path(model.path).is_dir() and re.fullmatch(HUB_ID, model.path) is not None
    fetch = f"hf download {model.path if hub else 'HUB_ID'}"
    fetch += "" if hub else f" --local-dir {shlex.quote(model.path)}"
    ours = _writes_by_template(model)
    try:
        folder = checkpoints.locate(model.path, weights=False)
        size = shape.read(folder) if ours else None
    except UserError as error:
        yield Finding(what, "wrong", str(error), fetch)
        return
    if size is None:
        yield Finding(what, "ok", f"{folder}, which the engine {model.engine.use} reads")
        return
    told = f"{size.parameters:,} weights in {size.layers} layers"
    if hub and not any(folder.glob(checkpoints.WEIGHTS)):
        stored = space.shown(size.parameters * size.stored_bytes)
        yield Finding(what, "note", f"{told}, {stored} to fetch when a run begins", fetch)
    else:
        yield Finding(what, "ok", f"{told}, {folder}")
    what = what.replace("model", "template", 1)
    try:
        casting.check_template(model, folder)
        yield Finding(what, "ok", model.template_path or "the model's own")
    except UserError as error:
        yield Finding(what, "wrong", str(error), mend)


def _writes_by_template(model: Model) -> bool:
    """Whether the engine is one that prompts a model of transformers by its chat template."""
    try:
        engine = plugins.load("engine", model.engine.use, model.engine.options)
    except UserError:  # which is said of the parts
        return True
    return bool(getattr(engine, "writes_by_template", False))


def _server(name: str, server: Server, otherwise: State, again: str) -> Finding:
    """otherwise: what it is if it is not ready, which matters where a judge asks it."""
    from roles.policy.server import ChatServer

    what, key = f"server {name}", server.key_env
    if key is not None and not os.environ.get(key):
        said = f"its key is to be in the environment variable {key}, which is not set"
        return Finding(what, otherwise, said, f"export {key}=KEY")
    quick = {"timeout_s": min(server.timeout_s, PATIENCE_S), "retries": 0}
    try:
        asked = ChatServer(**(server.model_dump() | quick))
        there = asked.models()
    except UserError as error:
        if " answered 404" in str(error) and server.model is not None:
            return Finding(what, "note", f"it is there and lists no models: {error}")
        return Finding(what, otherwise, str(error), _told(error) or _serve(server))
    if server.model in there or (server.model is None and len(there) == 1):
        return Finding(what, "ok", f"{asked.shown} has {server.model or there[0]}")
    wanted = "one is to be named" if server.model is None else f"asked is {server.model}"
    said = f"{asked.shown} has {', '.join(there) or 'no model'}, and {wanted}"
    mend = f"{again} --set server.{name}.model={shlex.quote(there[0]) if there else 'NAME'}"
    return Finding(what, otherwise, said, mend)


def _vllm_at(url: str) -> Finding:
    """Whether a server that an engine asks is there, and is a vLLM that goes with this."""
    from roles.policy import vllm_version
    from roles.policy.vllm_server import SERVE

    root = url.rstrip("/").removesuffix("/v1")
    parts = urlsplit(root)
    shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    what, start = f"vllm at {shown}", f"{SERVE} --port {parts.port or 80}"
    try:
        vllm_version.check(elsewhere=True)
        with urlopen(f"{root}/version", timeout=PATIENCE_S) as answer:
            version = str(json.load(answer)["version"])
    except UserError as error:
        return Finding(what, "wrong", str(error), _told(error))
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(f"it does not say its version: {error}".split())
        return Finding(what, "wrong", said, start)
    if (needed := vllm_version.unfit(version)) is not None:
        said = f"it is {version}, and {needed} is needed"
        return Finding(what, "wrong", said, f"pip install --upgrade '{needed}'")
    return Finding(what, "ok", f"it answers, {version}")


def _state(stands_in_the_way: bool) -> State:
    return "wrong" if stands_in_the_way else "note"


def _serve(server: Server) -> str:
    """What starts a server that is to be on this machine, or asks one elsewhere."""
    parts = urlsplit(server.url)
    if parts.hostname in ("127.0.0.1", "localhost", "::1"):
        return f"vllm serve {server.model or 'MODEL'} --port {parts.port or 80}"
    shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return f"curl -i {shlex.quote(shown.rstrip('/') + '/models')}"


def _memory(config: Config, roles: dict[int, Any], wish: Wish) -> Iterator[Finding]:
    device = peaks.here(wish.gpu_gib)
    found = peaks.peaks(config, roles, device)
    known = [each for each in found["stages"] if each["peak"] is not None]
    if not known:
        yield Finding("memory", "note", "what these parts take is not known")
        return
    for each in known:
        if each["fits"] is False:
            sure = sum(each[part] for part in ("weights", "optimizer", "gradients"))
            sets = "".join(f" --set {one}" for one in each["less"] or ())
            mend = _again(wish) + (sets or " --set model.path=SMALLER")
            state = _state(sure > (device.bytes or 0))
            yield Finding("memory", state, peaks.unfit(found, each), mend)
    most = max(known, key=lambda each: each["peak"])
    size = "" if device.bytes is None else f" of {space.shown(device.bytes)}"
    said = f"{space.shown(most['peak'])}{size} at most, in {most['stage']}"
    if device.kind == "cpu" and most["fits"]:
        free = int(psutil.virtual_memory().available)
        if free < most["peak"]:
            said += f", and other programs leave {space.shown(free)}"
            yield Finding("memory", "note", said, "top -o %MEM")
            return
    if all(each["fits"] is not False for each in known):
        yield Finding("memory", "ok", said)


def _disk(config: Config, roles: dict[int, Any], wish: Wish) -> Finding:
    need = space.needed(config, roles).total
    if wish.run is not None:
        files = (each for each in wish.run.rglob("*") if each.is_file() and not each.is_symlink())
        need = max(0, need - sum(each.stat().st_size for each in files))
    runs = wish.runs if wish.run is None else wish.run
    place = space.place(runs)
    disk = shutil.disk_usage(place)
    said = f"{space.shown(disk.free)} free at {place.resolve()}, {space.shown(need)} needed at most"
    if disk.free < need and disk.total:
        return Finding("disk", "wrong", said, f"{_again(wish)} --runs /OTHER/DISK")
    return Finding("disk", "ok", said)


def _store(wish: Wish, config: Config) -> Finding:
    if wish.run is None:
        return _writable(wish.runs) if config.store.url is None else _reached(config)
    root = wish.run
    try:
        with meant.opened(root) as store:
            found, alive = report.the_run(store), lease.is_driven(store)
            place = store.place or root / run.DATABASE
    except UserError as error:
        return Finding("store", "wrong", str(error), "loop start")
    if alive:
        said = f"{root} is driven by another process, and two cannot"
        return Finding("store", "wrong", said, f"loop stop {shlex.quote(str(root))}")
    return Finding("store", "ok", f"{place}, {found.status}")


def _reached(config: Config) -> Finding:
    """Whether the server of store.url takes a run."""
    try:
        run.check_store(config)
    except UserError as error:
        again = "loop doctor --set store.url=postgresql://USER@HOST:PORT/DATABASE"
        return Finding("store", "wrong", str(error), _told(error) or again)
    return Finding(
        "store", "ok", f"PostgreSQL at {postgres.shown(postgres.parsed(config.store.url or ''))}"
    )


def _writable(runs: Path) -> Finding:
    """Whether a store can be made there, by making one: not every disk can hold it."""
    place = space.place(runs)
    other = f"loop doctor --runs {shlex.quote(str(Path.home() / 'runs'))}"
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder,
            closing(sqlite3.connect(Path(folder) / run.DATABASE)) as tried,
        ):
            (mode,) = tried.execute("PRAGMA journal_mode = WAL").fetchone()
            tried.execute("CREATE TABLE tried (number INTEGER)")
            tried.commit()
    except (OSError, sqlite3.Error) as error:
        return Finding("store", "wrong", f"none can be made in {place.resolve()}: {error}", other)
    if mode != "wal":
        said = f"SQLite cannot keep a write-ahead log in {place.resolve()}, a network disk maybe"
        return Finding("store", "wrong", said, other)
    return Finding("store", "ok", f"SQLite {sqlite3.sqlite_version} in {place.resolve()}")
