"""A rubric of the library verifiers as a judge: reward functions, each with a weight.

The library is not needed: a rubric is known by its functions and weights, whose names have changed
from version to version.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, get_origin

from judges.adapters import chat
from judges.adapters.function import Function, find, version_of
from judges.adapters.parts import Part, concluded, number, numbers
from judges.asking import ask_all
from roles.protocols import Policy
from store.errors import UserError
from store.records import ALONE, Call, Candidate, Group, Judgement, Prompt

PLURALS = {
    "states": "state",
    "prompts": "prompt",
    "completions": "completion",
    "answers": "answer",
    "tasks": "task",
    "infos": "info",
}
"""What a function takes that scores a whole group -> what one that scores an answer takes."""


@dataclass(frozen=True)
class Reward:
    """A reward function of a rubric, its weight, and what else its rubric has for it."""

    function: Function
    weight: float
    objects: Mapping[str, Any]
    of_group: bool


class Verifiers:
    """A judge that is a rubric as the library verifiers has them, or a list of reward functions.

    rubric: `path/file.py:name` or `module:name` of a rubric, a group of rubrics, an environment, a
    function or a list of functions; with `arguments` of what returns one, as load_environment.
    weights: of a list's functions, each 1 unless said.
    A function gets what it names of prompt, completion, answer, state, task, info, the data's
    columns and what its rubric offers (parser, judge). One that fails stops the run, where the
    library would make it a score of 0.
    format: whether prompt and completion are messages or text.
    """

    version: str = "1"
    concurrency: int = 32
    """How many answers are scored at once."""

    def __init__(
        self,
        rubric: str,
        arguments: dict[str, Any] | None = None,
        weights: tuple[float, ...] = (),
        format: chat.Form = "conversational",
    ):
        found = find("rubric", rubric)
        if callable(found) and (arguments is not None or inspect.isclass(found)):
            found = found(**(arguments or {}))
        self.rewards = _rewards(found, rubric, weights)
        if not any(each.weight for each in self.rewards):
            raise UserError(f"{rubric!r} has no reward function with a weight")
        self.spec = rubric
        self.format: chat.Form = format
        codes = [each.function.code for each in self.rewards]
        self.version = version_of(type(self).version, found, *codes)

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        judged = [(group.prompt, one) for group in groups for one in group.candidates]
        states = {one.id: _state(prompt, one, self.format) for prompt, one in judged}
        alone = [place for place, each in enumerate(self.rewards) if not each.of_group]
        of_group = [place for place, each in enumerate(self.rewards) if each.of_group]
        scored = ask_all(
            [
                self._question(alone, prompt, states[one.id])
                for prompt, one in (judged if alone else [])
            ],
            limit=self.concurrency,
            call=call,
        )
        parts: dict[int, dict[int, Part]] = {one.id: {} for _, one in judged}
        for (_, one), own in zip(judged, scored, strict=False):
            parts[one.id].update(zip(alone, own, strict=True))
        for group in groups:
            own_states = [states[one.id] for one in group.candidates]
            for place in of_group if own_states else ():
                ask = self._group_question(place, group.prompt, own_states)
                [together] = ask_all([ask], limit=1, call=call)
                for one, part in zip(group.candidates, together, strict=True):
                    parts[one.id][place] = part
        places = range(len(self.rewards))
        return [concluded(one, [parts[one.id][place] for place in places]) for _, one in judged]

    def _question(
        self, places: Sequence[int], prompt: Prompt, state: dict[str, Any]
    ) -> Callable[[], Any]:
        """Asks every function about one answer, in their order, since they share its state."""

        async def ask() -> list[Part]:
            said = []
            for place in places:
                reward = self.rewards[place]
                offered = {**_columns(prompt), **_singular(state), **reward.objects}
                score, seconds = await _answered(reward.function, offered)
                said.append(_part(reward, number(score, reward.function.spec), seconds))
            return said

        return ask

    def _group_question(
        self, place: int, prompt: Prompt, states: Sequence[dict[str, Any]]
    ) -> Callable[[], Any]:
        async def ask() -> list[Part]:
            reward, columns = self.rewards[place], [_singular(state) for state in states]
            offered = {many: [each[one] for each in columns] for many, one in PLURALS.items()}
            returned, seconds = await _answered(reward.function, {**offered, **reward.objects})
            scores = numbers(returned, len(states), reward.function.spec)
            return [_part(reward, score, seconds / len(states)) for score in scores]

        return ask


def _part(reward: Reward, score: float | None, seconds: float) -> Part:
    return Part(name=reward.function.name, value=score, weight=reward.weight, seconds=seconds)


async def _answered(function: Function, offered: Mapping[str, Any]) -> tuple[Any, float]:
    answer = function.question(**function.taken(offered))()
    if asyncio.iscoroutine(answer):
        answer = await answer
    returned, seconds = answer
    return returned, seconds


def _rewards(found: Any, spec: str, weights: tuple[float, ...] = ()) -> list[Reward]:
    """The functions of whatever `spec` names. Raises UserError where it has none."""
    if (inner := getattr(found, "rubrics", None)) is not None:
        _no_weights(spec, weights)
        return [reward for each in inner for reward in _rewards(each, spec)]
    codes = _first(found, "funcs", "reward_funcs")
    if codes is not None:
        _no_weights(spec, weights)
        own = list(_first(found, "weights", "reward_weights") or [])
        objects = dict(getattr(found, "class_objects", None) or {})
        return _weighted(list(codes), own, objects, spec)
    if (rubric := getattr(found, "rubric", None)) is not None:
        return _rewards(rubric, spec, weights)
    if callable(found):
        found = [found]
    if not isinstance(found, list | tuple):
        raise UserError(
            f"{spec!r} is not a rubric: it is of type {type(found).__name__}, which has no funcs; "
            "right are a rubric, an environment, a function, a list of functions"
        )
    return _weighted(list(found), list(weights), {}, spec)


def _weighted(
    codes: list[Any], weights: list[float], objects: Mapping[str, Any], spec: str
) -> list[Reward]:
    if weights and len(weights) != len(codes):
        raise UserError(f"{spec!r} has {len(codes)} functions and {len(weights)} weights")
    return [
        Reward(_named(code, spec), float(weight), objects, _scores_groups(code))
        for code, weight in zip(codes, weights or [1.0] * len(codes), strict=True)
    ]


def _named(code: Any, spec: str) -> Function:
    if not callable(code):
        raise UserError(f"{spec!r} has {code!r} among its functions, which cannot be called")
    name = Function(spec, code).name
    return Function(spec if spec.endswith(f":{name}") else f"{name} of {spec}", code)


def _scores_groups(code: Callable[..., Any]) -> bool:
    signature = inspect.signature(code)
    returned = signature.return_annotation
    written = returned if isinstance(returned, str) else ""
    returns_list = (get_origin(returned) or returned) is list or written.startswith(
        ("list", "List")
    )
    return returns_list or not PLURALS.keys().isdisjoint(signature.parameters)


def _no_weights(spec: str, weights: tuple[float, ...]) -> None:
    if weights:
        raise UserError(f"{spec!r} has weights of its own; leave `weights` out")


def _first(found: Any, *names: str) -> Any:
    """What the object has by the first of these names that it has; None where it has none."""
    return next((getattr(found, name) for name in names if hasattr(found, name)), None)


def _columns(prompt: Prompt) -> dict[str, Any]:
    return deepcopy(prompt.columns)


def _state(prompt: Prompt, candidate: Candidate, form: chat.Form) -> dict[str, Any]:
    """What the functions that score one answer share, and may write to."""
    columns = _columns(prompt)
    asked, said = chat.question(prompt, form), chat.answer(candidate.text, form)
    return {
        "prompt": asked,
        "completion": said,
        "answer": prompt.reference or "",
        "task": prompt.task or "default",
        "info": columns.get("info", columns),
        "trajectory": [{"prompt": asked, "completion": said, "extras": {}}],
        "turn": 1,
        "is_completed": True,
        "is_truncated": candidate.finish_reason == "length",
    }


def _singular(state: dict[str, Any]) -> dict[str, Any]:
    """What the functions can name of a state, and the state itself."""
    return {**{name: state[name] for name in PLURALS.values() if name in state}, "state": state}
