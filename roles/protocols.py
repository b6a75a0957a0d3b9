"""What each role must do: one method each (a policy: sample and score).

Roles compute, the loop persists. A role is a plain function of records, is told the policy at
every call because it changes every round, and can be tried without a database.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from store.records import (
    Call,
    Checkpoint,
    Completion,
    Earlier,
    Example,
    Group,
    Judgement,
    Prompt,
    Reply,
    Sampling,
    Selection,
    Split,
    TokenLogprobs,
    Training,
)


@runtime_checkable
class Policy(Protocol):
    """One checkpoint, ready to sample and to score."""

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """One completion for each seed of each prompt, in order; equal seeds give equal ones.

        A prompt that is too long gets none: it is never cut.
        """
        ...

    def logprobs(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        dropout_seed: int | None = None,
    ) -> list[TokenLogprobs]:
        """Raw log-probabilities of each completion's tokens after its prompt.

        dropout_seed: keep the model's dropout on, drawn from this seed; None switches it off.
        """
        ...

    def write(self, text: str) -> Completion:
        """`text` as a completion that nobody sampled: encoded, with the end of turn."""
        ...

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The token ids that the prompt becomes, up to where the answer begins."""
        ...

    def room(self, prompt: Prompt) -> int:
        """How many tokens of answer the context holds after the prompt; below 1, it is too long."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens are, control tokens left out."""
        ...

    def close(self) -> None:
        """Free the memory that it holds."""
        ...


@runtime_checkable
class Server(Protocol):
    """A model behind a server: it may fail at one question and answer the next."""

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
        """One reply for each seed of each question, in order.

        schema: a JSON schema that a reply is to obey, where the server can be held to it; each
        reply says whether it was (`structured`).
        keep: is told each reply as it comes, with the places of its question and of its seed.
        """
        ...


@runtime_checkable
class Engine(Protocol):
    """What opens a checkpoint as a policy.

    An engine may have the attribute `writes_by_template`: if it is true, prompts are written by the
    checkpoint's chat template, which is then checked before a run begins. One that holds memory
    between its policies, to go on from one to the next, has a method `rest` that gives it back.
    """

    def open(self, checkpoint: Checkpoint) -> Policy:
        """The policy. Weights may be loaded at the first call that needs them."""
        ...


class History(Protocol):
    """What a role may ask about earlier rounds."""

    def asked(self) -> frozenset[str]:
        """Digests of the prompts that this run has asked for training so far."""
        ...

    def held_out(self) -> frozenset[str]:
        """`Prompt.question_digest` of the prompts kept for gate, test and anchor: none of them is
        given for another split, whatever its system prompt."""
        ...

    def prompts(self, *splits: Split) -> list[Prompt]:
        """The prompts of these splits that this run has, in the order they came."""
        ...

    def asked_in(self, call: Call) -> list[Prompt]:
        """The prompts that were asked for training in the round and track of a call, in order."""
        ...

    def judged(self, call: Call) -> list[tuple[Group, list[Judgement]]]:
        """What was answered in the round and track of a call, and what its judge concluded."""
        ...

    def earlier(self, call: Call) -> Mapping[int, Sequence[Earlier]]:
        """Of a filter's call: asked id of a group -> what earlier rounds of its track answered to
        the same prompt, oldest first. Examples may be made of those as well."""
        ...


@runtime_checkable
class Proposer(Protocol):
    """Where a round's prompts come from.

    One that looks at what another track answered (`History.judged`) says which as `track`, and one
    that takes prompts from another has that as `proposer` or `source`: so it is known before a run
    begins whether that track is there.
    """

    def propose(
        self, count: int, split: Split, history: History, policy: Policy, call: Call
    ) -> list[Prompt]:
        """Up to `count` different prompts of `split`, none of them held out for another split."""
        ...


@runtime_checkable
class Generator(Protocol):
    """How candidates are made: plain sampling, refining, contrast, search.

    A generator may say how much it makes of a prompt at most: `n` completions, and `most_tokens`
    sampled for them. `loop plan` counts with that.
    """

    def generate(
        self, prompts: Sequence[Prompt], policy: Policy, call: Call
    ) -> list[list[Completion]]:
        """Each prompt's completions, in the order of the prompts; none for one that is too long."""
        ...


@runtime_checkable
class Judge(Protocol):
    """Groups in, judgements out: one for each candidate, in any order, each naming its own."""

    def judge(
        self, groups: Sequence[Group], policy: Policy | None, call: Call
    ) -> list[Judgement]: ...


@runtime_checkable
class Filter(Protocol):
    """Judgements to examples.

    A filter that says `reads_verdicts` gets judgements with the verdicts behind them, which it is
    otherwise spared. A filter that says `gives` and a trainer that says `learns_from`, each a kind
    of example, are checked against each other before a run begins.
    """

    def select(
        self,
        groups: Sequence[Group],
        judgements: Sequence[Judgement],
        history: History,
        call: Call,
    ) -> Selection:
        """Examples, and for each group that gave none the reason."""
        ...


@runtime_checkable
class Trainer(Protocol):
    """Examples to a checkpoint."""

    def train(
        self,
        examples: Sequence[Example],
        start: Checkpoint,
        reference: Checkpoint,
        into: Path,
        call: Call,
    ) -> Training:
        """Train from `start` and leave weights, tokenizer and generation config in `into`.

        `into` may hold what an earlier, killed call saved: then go on from there.
        """
        ...
