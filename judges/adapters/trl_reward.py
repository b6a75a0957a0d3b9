"""TRL's reward functions as a judge: `f(prompts, completions, **columns) -> list[float | None]`.

They are called as GRPOTrainer calls them, once for all answers at hand.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

from judges.adapters import chat
from judges.adapters.function import Function, find_function, version_of
from judges.adapters.parts import Part, concluded, numbers
from judges.asking import ask_all
from roles.protocols import Policy
from store.errors import UserError
from store.records import ALONE, Call, Candidate, Group, Judgement, Prompt

TAKEN = ("prompt", "prompts", "completion", "completions", "completion_ids")
"""Names that are not a column's: the trainer gives them a meaning."""


class TrlReward:
    """A judge that is one of TRL's reward functions, or several by weight.

    function: `path/file.py:name` or `module:name`, as in "trl.rewards:think_format_reward"; or a
    list of them, with `weights`. A function that makes one gets `arguments`.
    It is given prompts, completions, completion_ids, every column of the data, the right answer as
    the column `reference`, and of trainer_state the global_step, which is the round's number. What
    it gives to log_extra is kept in the verdict; log_metric is taken and not kept.
    format: messages or text; `auto` is messages where it is not annotated `completions: list[str]`.
    None is no score, and left out of the sum where others give one. What is not finite fails.
    """

    version: str = "1"
    concurrency: int = 32

    def __init__(
        self,
        function: str | tuple[str, ...],
        weights: tuple[float, ...] = (),
        arguments: dict[str, Any] | None = None,
        format: Literal["auto", "conversational", "text"] = "auto",
        reference: str = "answer",
    ):
        specs = (function,) if isinstance(function, str) else function
        if not specs or (weights and len(weights) != len(specs)):
            raise UserError(
                f"judge 'trl_reward' has {len(specs)} functions and {len(weights)} weights; "
                "give it a function, and a weight for each or none"
            )
        if arguments is not None and len(specs) > 1:
            raise UserError(
                "judge 'trl_reward' has arguments for one function and names "
                f"{len(specs)}; give each a name of its own in a file"
            )
        self.functions = [find_function("reward function", spec, arguments) for spec in specs]
        self.weights = weights or (1.0,) * len(specs)
        self.format = format
        self.reference = reference
        self.version = version_of(type(self).version, *(each.code for each in self.functions))

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        judged = [(group.prompt, one) for group in groups for one in group.candidates]
        if not judged:
            return []
        logged: list[dict[str, Any]] = [{} for _ in self.functions]
        questions = [
            each.question(**each.taken(self._offered(judged, self._form(each), log, call)))
            for each, log in zip(self.functions, logged, strict=True)
        ]
        # Plain functions first and outside an event loop, where they may run one of their own.
        order = sorted(range(len(questions)), key=lambda place: self.functions[place].is_async)
        answers = ask_all([questions[n] for n in order], limit=self.concurrency, call=call)
        columns: list[list[Part]] = [[] for _ in order]
        for place, (returned, seconds) in zip(order, answers, strict=True):
            columns[place] = self._parts(place, returned, seconds, logged[place], len(judged))
        return [
            concluded(one, parts)
            for (_, one), parts in zip(judged, zip(*columns, strict=True), strict=True)
        ]

    def _form(self, function: Function) -> chat.Form:
        if self.format != "auto":
            return self.format
        completions = inspect.signature(function.code).parameters.get("completions")
        kind = getattr(completions, "annotation", "")
        written = kind if isinstance(kind, str) else inspect.formatannotation(kind)
        says_text = re.fullmatch(r"(\w+\.)?(list|sequence)\[str\]", written.strip(), re.IGNORECASE)
        return "text" if says_text else "conversational"

    def _offered(
        self,
        judged: Sequence[tuple[Prompt, Candidate]],
        form: chat.Form,
        log: dict[str, Any],
        call: Call,
    ) -> dict[str, Any]:
        def forget(name: str, value: float) -> None:
            pass

        return {
            "prompts": [chat.question(prompt, form) for prompt, _ in judged],
            "completions": [chat.answer(one.text, form) for _, one in judged],
            "completion_ids": [list(one.token_ids) for _, one in judged],
            **self._columns([prompt for prompt, _ in judged]),
            "trainer_state": SimpleNamespace(global_step=call.round, epoch=float(call.round)),
            "log_extra": log.__setitem__,
            "log_metric": forget,
        }

    def _columns(self, prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
        """Column -> its value for each answer, None where a prompt has it not."""
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        columns = {
            name: [prompt.columns.get(name) for prompt in prompts]
            for name in names
            if name not in TAKEN
        }
        if any(prompt.reference is not None for prompt in prompts):
            columns.setdefault(self.reference, [prompt.reference for prompt in prompts])
        return columns

    def _parts(
        self, place: int, returned: Any, seconds: float, log: dict[str, Any], count: int
    ) -> list[Part]:
        function, weight = self.functions[place], self.weights[place]
        scores = numbers(returned, count, f"the reward function {function.spec!r}")
        return [
            Part(
                name=function.name,
                value=score,
                weight=weight,
                words="; ".join(f"{name} {values[row]!r}" for name, values in log.items()),
                seconds=seconds / count,
            )
            for row, score in enumerate(scores)
        ]
