"""A command of the user's that measures a checkpoint: a path in, a JSON object of metrics out.

A metric is a number, or a list of numbers, one an item, in an order that stays the same: those
can be paired with another checkpoint's, so a rule that uses them has an interval.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

from loop.measure import RESAMPLES, bootstrap
from loop.settings import Command
from store.errors import UserError
from store.records import Checkpoint, Evaluation

SHOWN = 300
"""Characters of a command's own words in an error."""


def run_command(
    name: str, command: Command, checkpoint: Checkpoint, by: str, seed: int
) -> list[Evaluation]:
    """The metrics that the command prints: the last line of its output that is a JSON object.

    by: what the gate hears, as in Gate. Raises UserError when the command cannot be started,
    fails, takes too long, or prints no such line or not the metrics that rules use.
    """
    path = str(checkpoint.path.absolute())
    words = [word.replace("{checkpoint}", path) for word in shlex.split(command.run)]
    told = f"evaluate.command.{name} ({words[0]})"
    output = _printed(words, command, path, told)
    found = [
        _evaluation(name, metric, value, checkpoint.model, seed, told)
        for metric, value in _metrics(output, told).items()
    ]
    there = [each.metric for each in found]
    heard = by.removeprefix(f"{name}.") if by.startswith(f"{name}.") else None
    for metric in (command.guard, heard):
        if metric is not None and metric not in there:
            raise UserError(f"{told} printed no metric {metric!r}; it printed: {', '.join(there)}")
    return found


def _printed(words: list[str], command: Command, path: str, told: str) -> str:
    """What the command wrote on its standard output."""
    try:
        # In a session of its own: a Ctrl-C asks the run to stop after its batch, and a command that
        # takes too long is ended with all that it started.
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | {"RATCHET_CHECKPOINT": path},
            cwd=command.folder_path,
            start_new_session=True,
        )
    except OSError as error:
        raise UserError(f"{told} cannot be started: {error.strerror}") from None
    try:
        output, complaint = process.communicate(timeout=command.timeout_s)
    except subprocess.TimeoutExpired:
        limit = f"{command.timeout_s:g} s"
        raise UserError(f"{told} took longer than its timeout_s, {limit}") from None
    finally:
        with suppress(ProcessLookupError):  # nothing that it started outlives it
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if process.returncode != 0:
        said = " ".join((complaint or output).split())[-SHOWN:]
        raise UserError(f"{told} ended with exit code {process.returncode}: {said}")
    return output


def _metrics(output: str, told: str) -> dict[str, Any]:
    for line in (output.strip(), *reversed(output.splitlines())):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and found:
            return found
    said = " ".join(output.split())[-SHOWN:]
    raise UserError(f'{told} printed no JSON object such as {{"accuracy": 0.5}}; it said: {said!r}')


def _is_number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and abs(value) <= sys.float_info.max  # an int may be larger than any float


def _evaluation(name: str, metric: str, value: Any, model: str, seed: int, told: str) -> Evaluation:
    if not metric or not metric.isprintable():
        raise UserError(f"{told}: {metric!a} is no name of a metric")
    items = value if isinstance(value, list) else [value]
    numbers = [each for each in items if _is_number(each)]
    if not items or len(numbers) < len(items):
        raise UserError(
            f"{told}: metric {metric!r} is a finite number or a list of them, found {value!r:.60}"
        )
    kept: dict[str, Any] = {"value": float(numbers[0])}
    if isinstance(value, list):
        mean, low, high = bootstrap(numbers, RESAMPLES, seed)
        kept = {"value": mean, "low": low, "high": high, "items": tuple(map(float, numbers))}
    return Evaluation(model=model, split="gate", suite=name, metric=metric, n=len(numbers), **kept)
