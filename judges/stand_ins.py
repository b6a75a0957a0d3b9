"""Models without weights, to try judges on: what one says hangs on what it is shown.

A judge cannot tell them from a policy or a server. So what becomes of a good reply, a silly one,
a copied one or none at all can be seen in a second, and seen again tomorrow.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from store.records import (
    Call,
    Completion,
    FinishReason,
    Prompt,
    Reply,
    Sampling,
    Status,
    TokenLogprobs,
)

Say = Callable[[str, dict[str, Any] | None], str]
"""What a question's text is answered with; held to a JSON schema, if there is one."""

WORDS = "A stand-in has read this."
_FORM = re.compile(r"^(\w+): ?<([^<>\n]+)>", re.MULTILINE)


class StandIn:
    """A server, and a policy for judges that sample by themselves, which says what `say` says.

    status: of every reply; other than ok, nothing is said.
    structured: whether it can be held to the JSON schema that a judge asks for.
    """

    def __init__(
        self,
        say: Say,
        *,
        status: Status = "ok",
        structured: bool = False,
        finish_reason: FinishReason = "stop",
    ) -> None:
        self.say = say
        self.status: Status = status
        self.structured = structured
        self.finish_reason: FinishReason = finish_reason
        self.asked: list[Prompt] = []
        self.was_sampled = False
        """By a judge that cannot hear of statuses."""

    def ask(
        self,
        questions: Sequence[Prompt],
        *,
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        call: Call,
        schema: dict[str, Any] | None = None,
        keep: Callable[[int, int, Reply], None] | None = None,
    ) -> list[list[Reply]]:
        self.asked += questions
        held_to = schema if self.structured else None
        return [
            [self._reply(question, seed, held_to) for seed in own]
            for question, own in zip(questions, seeds, strict=True)
        ]

    def _reply(self, question: Prompt, seed: int, schema: dict[str, Any] | None) -> Reply:
        if self.status != "ok":
            return Reply(status=self.status, reason=f"the stand-in {self.status}", seed=seed)
        text = self.say(question.messages[-1].content, schema)
        return Reply(
            text=text,
            finish_reason=self.finish_reason,
            structured=schema is not None,
            seed=seed,
            seconds=0.0,
            tokens=len(text),
        )

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """None for any prompt unless the status is ok, as where all are too long."""
        self.asked += prompts
        self.was_sampled = True
        return [
            [self._completion(prompt, seed) for seed in own if self.status == "ok"]
            for prompt, own in zip(prompts, seeds, strict=True)
        ]

    def _completion(self, prompt: Prompt, seed: int) -> Completion:
        text = self.say(prompt.messages[-1].content, None)
        ids = tuple(text.encode())
        return Completion(text=text, token_ids=ids, finish_reason=self.finish_reason, seed=seed)

    def logprobs(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        dropout_seed: int | None = None,
    ) -> list[TokenLogprobs]:
        """Of each token, drawn from the prompt, its place and itself."""
        starts = [number(prompt.digest, 100) for prompt in prompts]
        return [
            TokenLogprobs(
                logprobs=tuple(
                    -1 - (drawn + 7 * place + token) % 100 / 100
                    for place, token in enumerate(completion.token_ids)
                )
            )
            for drawn, completion in zip(starts, completions, strict=True)
        ]

    def write(self, text: str) -> Completion:
        return Completion(text=text, token_ids=tuple(text.encode()))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return list(prompt.messages[-1].content.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")

    def room(self, prompt: Prompt) -> int:
        return 2**31 - len(self.prompt_ids(prompt))

    def close(self) -> None:
        pass

    def other(self, name: str) -> StandIn:
        """Whatever other model a judge asks for is this one too."""
        return self


class Graded:
    """Replies in the form that the question asks for, by what each text is worth.

    worth: from 0 to 5, of each answer; of two the better one wins. Nothing else that is shown
    decides anything, so that the same answers get the same replies. Of answers that it does not
    know, each gets a 3, and of two the second wins.
    """

    def __init__(self, worth: Mapping[str, int], words: str = WORDS) -> None:
        self.worth = worth
        self.words = words

    def __call__(self, shown: str, schema: dict[str, Any] | None = None) -> str:
        places = {text: at for text in self.worth if (at := shown.find(text)) >= 0}
        found = sorted(places, key=lambda text: places[text])
        if schema is not None:
            return json.dumps(self._object(schema, found))
        named = _FORM.findall(shown)
        word, form = named[-1] if named else ("Score", "number")
        return f"{self.words}\n{word}: {self._value(form, found)}"

    def _value(self, form: str, found: Sequence[str]) -> str:
        ranked = self._ranked(found)
        if form == "letter":
            return " > ".join(ranked)
        if form in ("choice", "A, B or tie"):
            return ranked[0]
        if form == "yes or no":
            return ("no", "yes")[number(sorted(found), 2)] if found else "no"
        if form.startswith("numbers"):
            return "1"
        return str(self._score(found))

    def _object(self, schema: dict[str, Any], found: Sequence[str]) -> dict[str, Any]:
        return {
            name: self._field(field, found) for name, field in schema.get("properties", {}).items()
        }

    def _field(self, field: dict[str, Any], found: Sequence[str]) -> Any:
        match field.get("type"), field.get("enum"):
            case "array", _:
                return self._ranked(found) if "enum" in field.get("items", {}) else [1]
            case _, ["yes", "no"]:
                return self._value("yes or no", found)
            case _, [_, *_]:
                return self._ranked(found)[0]
            case "integer" | "number", _:
                return self._score(found)
        return self.words

    def _ranked(self, found: Sequence[str]) -> list[str]:
        """The letters of the answers shown, the best first; of two, if it knows none or one."""
        if len(found) < 2:
            return ["B", "A"]
        order = sorted(range(len(found)), key=lambda n: (-self.worth[found[n]], found[n]))
        return [chr(ord("A") + n) for n in order]

    def _score(self, found: Sequence[str]) -> int:
        return self.worth[found[-1]] if found else 3


def number(said: object, below: int) -> int:
    """One in [0, below) that hangs on what is said alone."""
    return int.from_bytes(hashlib.sha256(repr(said).encode()).digest()[:8], "big") % below
