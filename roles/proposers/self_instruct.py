"""New prompts that the policy writes after examples of others.

Each is sampled behind its own draw of seed prompts and of prompts that were proposed before, and
is kept if it reads like a prompt and like no other: not of this run, and none that is held out.

Source: Self-Instruct, arXiv 2212.10560, sections 2.2 and 3.1 (eight examples of which two are the
model's own; ROUGE-L below 0.7 with every other), as in Self-Rewarding Language Models, 2401.10020.
"""

from __future__ import annotations

import logging
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

from pydantic import Field

from roles import plugins
from roles.proposers.dataset import Dataset
from roles.proposers.messages import with_system
from roles.proposers.similarity import NearTexts, words_of
from roles.protocols import History, Policy, Proposer
from store.errors import UserError, unknown
from store.records import Call, Completion, Message, Prompt, Sampling, Split

_log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_SHOTS = "{shots}"
_OPEN, _CLOSE = "<prompt>", "</prompt>"
# A run that is told to stop does so between two batches. The last prompts are not worth one each.
_MOST_AT_ONCE, _LEAST_AT_ONCE = 64, 16


class SelfInstruct:
    """path: seed prompts, in any form that the proposer `dataset` reads; or
    proposer: a table of the proposer that gives them, as in {use = "reasoning_gym", tasks = [...]}.
    It gives the prompts of gate, test and anchor too. Where it gives none, none are written.
    seeds: from how many of its prompts examples are drawn.
    shots: examples in one question, of which up to `own` were proposed in earlier rounds.
    similarity: a prompt whose ROUGE-L with another is above it is left out; 1 leaves out only
    the same text.
    share: of the prompts asked for, how many are proposed; the others come from the source.
    attempts: at most so many samples for each prompt that is wanted.
    min_words, max_words: of a prompt. banned: words that it does not have, as "image" for a model
    that cannot see.
    system: a system prompt, put before seeds from `path` and before prompts that are proposed.
    prompt: the text to ask with, `self_instruct`, or `self_instruct_brief` for a very small model;
    template_path: one of your own. {shots} in it becomes the examples, each between <prompt> and
    </prompt>. An answer is one prompt: what these tags hold, else all of it.
    """

    def __init__(
        self,
        path: Path | None = None,
        proposer: dict[str, Any] | None = None,
        seeds: Annotated[int, Field(ge=1)] = 100,
        shots: Annotated[int, Field(ge=1)] = 8,
        own: Annotated[int, Field(ge=0)] = 2,
        temperature: Annotated[float, Field(ge=0, le=10)] = 0.7,
        top_p: Annotated[float, Field(gt=0, le=1)] = 0.9,
        max_tokens: Annotated[int, Field(ge=1)] = 256,
        stop: tuple[Annotated[str, Field(min_length=1)], ...] = (_CLOSE,),
        similarity: Annotated[float, Field(ge=0, le=1)] = 0.7,
        share: Annotated[float, Field(gt=0, le=1)] = 1.0,
        attempts: Annotated[int, Field(ge=1)] = 4,
        min_words: Annotated[int, Field(ge=1)] = 4,
        max_words: Annotated[int, Field(ge=1)] = 150,
        banned: tuple[str, ...] = (),
        system: str | None = None,
        prompt: str = "self_instruct",
        template_path: Path | None = None,
    ):
        self.source = _source(path, proposer, system)
        self.seeds, self.shots, self.own = seeds, shots, min(own, shots)
        self.sampling = Sampling(
            temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=stop
        )
        self.similarity, self.share, self.attempts = similarity, share, attempts
        self.min_words, self.max_words = min_words, max_words
        self.banned = frozenset(word.casefold() for word in banned)
        self.system = system
        self.template = _template(template_path or _shipped(prompt))
        if _SHOTS not in self.template:
            self.shots = self.own = 0

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        if split != "train":
            return self.source.propose(count, split, history, policy, call)
        wanted = round(count * self.share)
        given = []
        if wanted < count:
            given = self.source.propose(count - wanted, split, history, policy, call)
        if not wanted:
            return given
        # A stage of their own, or the seeds would be drawn as those given were.
        apart = replace(call, stage="seeds")
        seeds = self.source.propose(self.seeds, split, history, policy, apart)
        if self.shots and not seeds:  # nothing to go by, in a run's first round say
            return given
        own = [one for one in history.prompts("train") if one.origin == "proposed"]
        others = [*given, *seeds, *history.prompts("train", "gate", "test", "anchor")]
        near = NearTexts(self.similarity, (last_asked(one) for one in others))
        kept: list[Prompt] = []
        lost: Counter[str] = Counter()
        for shots, completions in self._answers(wanted, kept, seeds, own, policy, call):
            found, reason = self._read(completions)
            if not reason and near.near(found) is not None:
                reason = "too like another"
            if not reason and len(kept) == wanted:
                reason = "more than wanted"
            if reason:
                lost[reason] += 1
            else:
                near.add(found)
                kept.append(self._prompt(found, shots))
                call.progress(len(kept), wanted)
        self._tell(wanted, len(kept), lost, first=call.round <= 1)
        return [*given, *kept]

    def _answers(
        self,
        wanted: int,
        kept: Sequence[Prompt],
        seeds: Sequence[Prompt],
        own: Sequence[Prompt],
        policy: Policy,
        call: Call,
    ) -> Iterator[tuple[list[Prompt], list[Completion]]]:
        """Examples with what the policy wrote after them, until enough of it was kept."""
        tried, most = 0, wanted * self.attempts
        while len(kept) < wanted and tried < most:
            if call.stopping():
                raise KeyboardInterrupt
            batch = min(_MOST_AT_ONCE, max(_LEAST_AT_ONCE, wanted - len(kept)))
            numbers = range(tried, min(most, tried + batch))
            tried = numbers.stop
            drawn = [
                self._draw(seeds, own, Random(call.seed_for("self_instruct", "shots", n)))
                for n in numbers
            ]
            answers = policy.sample(
                [self.ask(shots) for shots in drawn],
                sampling=self.sampling,
                seeds=[[call.seed_for("self_instruct", n)] for n in numbers],
            )
            yield from zip(drawn, answers, strict=True)

    def _draw(self, seeds: Sequence[Prompt], own: Sequence[Prompt], chance: Random) -> list[Prompt]:
        """The examples of one question, in an order that says nothing of where they are from."""
        shots = chance.sample(own, min(self.own, len(own)))
        shots += chance.sample(seeds, min(self.shots - len(shots), len(seeds)))
        chance.shuffle(shots)
        return shots

    def ask(self, shots: Sequence[Prompt]) -> Prompt:
        """The question for one prompt more."""
        examples = "\n\n".join(f"{_OPEN}\n{last_asked(one)}\n{_CLOSE}" for one in shots)
        text = self.template.replace(_SHOTS, examples)
        return Prompt(messages=(Message(role="user", content=text),))

    def _read(self, completions: Sequence[Completion]) -> tuple[str, str]:
        """The prompt in an answer, and why it is none; an empty reason if it is one."""
        if not completions:
            return "", "question longer than the context"
        (answer,) = completions
        _, opened, inside = answer.text.partition(_OPEN)
        text, closed, _ = (inside if opened else answer.text).partition(_CLOSE)
        if answer.finish_reason == "length" and not closed:
            return "", "cut off"
        # Models that were shown a list write a number before what they add to it.
        text = re.sub(r"^\d+[.)]\s+", "", text.strip())
        words = words_of(text)
        if not words or any(_is_no_text(character) for character in text):
            return text, "no text"
        if text[0] in string.punctuation:
            return text, "begins with punctuation"
        if len(words) < self.min_words:
            return text, "too short"
        if len(words) > self.max_words:
            return text, "too long"
        if not self.banned.isdisjoint(words):
            return text, "banned word"
        return text, ""

    def _prompt(self, text: str, shots: Sequence[Prompt]) -> Prompt:
        parents = [one.id for one in shots if one.id is not None]
        return Prompt(
            messages=with_system((Message(role="user", content=text),), self.system),
            origin="proposed",
            columns={"shots": [one.digest for one in shots]},
            parent_prompt_id=parents[0] if parents else None,
        )

    def _tell(self, wanted: int, kept: int, lost: Counter[str], first: bool) -> None:
        reasons = ", ".join(f"{reason} {count}" for reason, count in lost.most_common())
        counts = (
            f"{kept + lost.total()} sampled, {kept} of {wanted} kept; lost: {reasons or 'none'}"
        )
        if first and not kept:  # later it is the policy's doing, which no setting mends
            raise UserError(
                f"self_instruct got no prompt that can be used ({counts}); ask for other prompts "
                "with template_path, or allow more with similarity, min_words and max_tokens"
            )
        _log.log(logging.WARNING if kept < wanted else logging.INFO, "self_instruct: %s", counts)


def _source(path: Path | None, table: dict[str, Any] | None, system: str | None) -> Proposer:
    if (path is None) == (table is None):
        raise UserError(
            "self_instruct takes its seed prompts from `path` or from `proposer`; "
            f"found {'neither' if path is None else 'both'}"
        )
    if path is not None:
        return Dataset(path, system=system)
    found: Proposer = plugins.inner("proposer", table, "self_instruct's proposer")
    return found


def _shipped(name: str) -> Path:
    names = sorted(file.stem for file in _HERE.glob("*.txt"))
    if name not in names:
        raise unknown("self_instruct's prompt", name, names)
    return _HERE / f"{name}.txt"


def _template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read self_instruct's template {str(path)!r}: {error}") from None
    if not text:
        raise UserError(f"self_instruct's template {str(path)!r} is empty")
    return text


def _is_no_text(character: str) -> bool:
    """Half a character, a control character, or one that Unicode has not assigned."""
    if character == "\ufffd":
        return True
    return not character.isspace() and unicodedata.category(character) in ("Cc", "Cn", "Co")


def last_asked(prompt: Prompt) -> str:
    """What the user asked last."""
    asked = [turn.content for turn in prompt.messages if turn.role == "user"]
    return (asked or [prompt.messages[-1].content])[-1]
