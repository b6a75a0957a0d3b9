"""Which class plays which role: every part that a configuration names, made and checked."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any, get_args

from loop.asked import check_model
from loop.settings import Command, Config, Model, Role, is_frozen
from roles import plugins
from store import checkpoints
from store.errors import UserError
from store.records import KINDS


def load_roles(config: Config, *, weights: bool = True) -> dict[int, Any]:
    """Every role the configuration names, made and checked: id() of its table -> the role.

    The models' folders are checked as well. weights: whether those of models on the Hub are
    fetched. Raises UserError for the first that will not do.
    """
    wanted = list(config.roles())
    folders = {
        name: checkpoints.locate(model.path, weights=weights)
        for name, model in config.models.items()
        if model.path != "embedded"
    }
    for name, command in config.evaluate.command.items():
        _check_command(name, command)
    for role, table in wanted:
        _check_own(role, table)
    made = {id(table): plugins.load(role, table.use, table.options) for role, table in wanted}
    for role, table in wanted:
        if role == "judge":
            _check_asked(config, table, made[id(table)], weights)
        elif table.model is not None:
            check_model(config, role, table.use, table.model, weights=weights)
            if table.model.startswith("server:"):
                raise UserError(
                    f"proposer {table.use!r} asks {table.model!r}, and proposers ask models that "
                    "the run opens itself; name a checkpoint"
                )
    for role, table in wanted:
        if role == "proposer":
            _check_track(config, table.use, made[id(table)])
    for number in (0, 1):
        for track in config.tracks(number).values():
            _check_kinds(track.filter, config.trainer(number, track.model), made)
    for model in config.models.values():
        for part in (model.engine, model.trainer):
            _check_device(made[id(part)])
    for name, folder in folders.items():
        model = config.models[name]
        if getattr(made[id(model.engine)], "writes_by_template", False):
            check_template(model, folder)
    return made


def _check_command(name: str, command: Command) -> None:
    word = shlex.split(command.run)[0]
    place = Path(command.folder_path or ".")
    if "{checkpoint}" not in word and shutil.which(word) is None and not (place / word).is_file():
        raise UserError(f"evaluate.command.{name}: there is no program {word!r}; give its path")


def _check_kinds(selecting: Role, training: Role, made: dict[int, Any]) -> None:
    """What a filter gives is what the trainer learns from, where both say so."""
    gives = getattr(made[id(selecting)], "gives", None)
    learns = getattr(made[id(training)], "learns_from", None)
    if gives is not None and learns is not None and gives != learns:
        raise UserError(
            f"filter {selecting.use!r} gives {KINDS[gives]}, and trainer {training.use!r} learns "
            f"from {KINDS[learns]}; choose a filter and a trainer that go together"
        )


def _check_device(made: Any) -> None:
    """Of a part of the user's own, `device` may mean something else."""
    from roles.policy import devices

    device: Any = getattr(made, "device", None)
    if device in get_args(devices.Device):
        devices.find(device)


def _check_track(config: Config, use: str, proposer: Any) -> None:
    """The track that a proposer looks back at, or one that it takes prompts from, is there."""
    track = getattr(proposer, "track", None)
    if isinstance(track, str) and track not in config.track:
        raise UserError(
            f"proposer {use!r} looks at what track {track!r} answered, which is not there; there "
            f"are: {', '.join(config.track)}"
        )
    for inside in ("proposer", "source"):
        if (source := getattr(proposer, inside, None)) is not None:
            _check_track(config, use, source)


def _check_own(role: str, table: Role) -> None:
    if table.model is not None and role not in ("judge", "proposer"):
        raise UserError(
            f"{role} {table.use!r} has no option 'model'; a judge or a proposer asks a model"
        )
    if table.thinking != "shown" and role != "judge":
        raise UserError(f"{role} {table.use!r} has no option 'thinking'; it is a judge's")


def _check_asked(config: Config, table: Role, judge: Any, weights: bool) -> None:
    """Every model that a judge will ask is there, and none that is under test grades itself."""
    if table.model is None and getattr(judge, "asks_model", False):
        raise UserError(
            f'judge {table.use!r} asks a model: set its model, as in judge.model = "round"'
        )
    others = tuple(getattr(judge, "models", ()))
    asked = others if table.model is None else (table.model, *others)
    grading = [config.evaluate.judge, *(each.judge for each in config.evaluate.suite.values())]
    for name in asked:
        check_model(config, "judge", table.use, name, weights=weights)
        _check_server(config, table.use, judge, name)
        if not is_frozen(name) and any(table is each for each in grading):
            raise UserError(
                f"the judge {table.use!r} of [evaluate] asks the model {name!r}; every model of "
                "the run is under test, and none grades itself"
            )


def _check_server(config: Config, use: str, judge: Any, name: str) -> None:
    """What can be known of a server without asking it."""
    kind, _, of = name.partition(":")
    if kind != "server":
        return
    if getattr(judge, "needs_tokens", False):
        raise UserError(
            f"judge {use!r} needs log-probabilities of tokens, and {name!r} is a server, which "
            "tells none; name a local model"
        )
    key = config.server[of].key_env
    if key is not None and not os.environ.get(key):
        raise UserError(
            f"server.{of}.key_env names the environment variable {key!r}, which is not set"
        )


def check_template(model: Model, folder: Path) -> None:
    """Raises UserError unless the model's chat template, its own or the one it is given, writes
    questions. Of use where an engine writes prompts by it."""
    from roles.policy import encoding

    if model.template_path is None:
        encoding.check_template(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        tried = Path(place) / folder.name
        checkpoints.with_template(folder, Path(model.template_path), tried)
        try:
            encoding.check_template(tried)
        except UserError as error:
            told = str(error).replace(str(tried), model.template_path)
            raise UserError(told) from None
