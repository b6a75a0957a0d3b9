"""OpenRLHF's reward functions as a judge: `reward_func(queries, prompts, labels)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from judges.adapters import chat
from judges.adapters.function import Function, find, version_of
from judges.adapters.parts import Part, concluded, numbers
from judges.asking import ask_all
from roles.protocols import Policy
from roles.template import conversation
from store.errors import UserError
from store.records import ALONE, Call, Candidate, Group, Judgement, Prompt


class OpenRLHF:
    """A judge that is a reward_func of OpenRLHF.

    function: its file, or `path/file.py:name` or `module:name` where it is not named reward_func.
    It is given queries (prompt and answer as one text), prompts and labels (the right answers, ""
    where there is none), and returns a tensor, a list or a table.
    take: which entry of a table is the score. `extra_logs` that are one an answer are kept in the
    verdict.
    template_path, end: a chat template to write the prompts with, and what ends an answer, for a
    function that looks for a model's control tokens; without them the texts are plain.
    """

    version: str = "1"

    def __init__(
        self,
        function: str,
        take: Literal["rewards", "scores"] = "rewards",
        template_path: Path | None = None,
        end: str = "",
    ):
        what = "reward function"
        code = find(what, function, default="reward_func")
        if not callable(code):
            raise UserError(f"{function!r} is not a {what}: it cannot be called")
        self.function = Function(function, code)
        self.take = take
        self.template = None if template_path is None else _read(template_path)
        self.end = end
        self.version = version_of(type(self).version, code)

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        judged = [(group.prompt, one) for group in groups for one in group.candidates]
        if not judged:
            return []
        written = {group.prompt.digest: self._written(group.prompt) for group in groups}
        prompts = [written[prompt.digest] for prompt, _ in judged]
        queries = [text + self._ended(one) for text, (_, one) in zip(prompts, judged, strict=True)]
        labels = [prompt.reference or "" for prompt, _ in judged]
        # By place: their names are the function's own.
        question = self.function.question(queries, prompts, labels)
        [(returned, seconds)] = ask_all([question], limit=1, call=call)
        name = f"the reward function {self.function.spec!r}"
        scores, words = self._read(returned, len(judged), name)
        return [
            concluded(
                one,
                [
                    Part(
                        name=self.function.name,
                        value=score,
                        words=said,
                        seconds=seconds / len(judged),
                    )
                ],
            )
            for (_, one), score, said in zip(judged, scores, words, strict=True)
        ]

    def _read(
        self, returned: Any, count: int, name: str
    ) -> tuple[list[float | None], Sequence[str]]:
        """Each answer's score, and what else was said of it."""
        if not isinstance(returned, Mapping):
            return numbers(returned, count, name), [""] * count
        if self.take not in returned:
            raise RuntimeError(
                f"{name} returned no {self.take!r}; it returned {', '.join(map(str, returned))}"
            )
        logs = {
            key: values.tolist() if hasattr(values, "tolist") else values
            for key, values in (returned.get("extra_logs") or {}).items()
        }
        own = {
            key: values
            for key, values in logs.items()
            if isinstance(values, list | tuple) and len(values) == count
        }
        words = [
            "; ".join(f"{key} {values[row]!r}" for key, values in own.items())
            for row in range(count)
        ]
        return numbers(returned[self.take], count, name), words

    def _written(self, prompt: Prompt) -> str:
        if self.template is None:
            return conversation(prompt)
        from transformers.utils.chat_template_utils import render_jinja_template

        turns = [chat.question(prompt, "conversational")]
        (text,), _ = render_jinja_template(
            turns, chat_template=self.template, add_generation_prompt=True
        )
        return str(text)

    def _ended(self, candidate: Candidate) -> str:
        return candidate.text + (self.end if candidate.finish_reason == "stop" else "")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read a chat template from {str(path)!r}: {error}") from None
