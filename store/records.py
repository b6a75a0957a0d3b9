"""What flows between roles: frozen, validated dataclasses.

Records cross between roles; rows (store/tables.py) stay in the store. A record that has been
stored carries its row's id; one that has not has `id=None`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, ConfigDict
from pydantic.dataclasses import dataclass

Split = Literal["train", "gate", "test", "anchor"]
Origin = Literal["seed", "proposed", "derived"]
Purpose = Literal["train", "sampled", "greedy", "anchor"]
Status = Literal["ok", "abstained", "unparsed", "refused", "timed_out", "failed"]
FinishReason = Literal["stop", "stop_string", "length"]
ExampleKind = Literal["pair", "demonstration", "labelled"]
KINDS = {"pair": "pairs", "demonstration": "demonstrations", "labelled": "labelled candidates"}
"""What examples of a kind are called."""
CheckpointKind = Literal["full", "adapter"]
CheckpointStatus = Literal["trained", "accepted", "rejected", "diverged", "merged", "pruned"]
DecisionKind = Literal["accept", "reject", "undecided", "stop", "pause"]

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True, ser_json_inf_nan="constants")


def _encodable(text: Any) -> Any:
    if not isinstance(text, str) or text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


Text = Annotated[str, BeforeValidator(_encodable)]
"""What a model, a judge or a data file said. A lone surrogate, which JSON can spell and neither
a database nor a tokenizer takes, becomes U+FFFD."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text
    quoted: bool = False
    """Whether it holds somebody else's text, as a judge's question does. An engine encodes it as
    text, so that nothing in it becomes a control token."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Prompt:
    """What a policy is asked, and what a judge may need to know about it."""

    messages: tuple[Message, ...]
    reference: Text | None = None
    """The right answer, where there is one."""
    task: Text | None = None
    origin: Origin = "seed"
    split: Split = "train"
    suite: str = "held_out"
    """Which evaluation a prompt that is not trained on belongs to."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Whatever else the source said of it (JSON), kept for judges."""
    parent_prompt_id: int | None = None
    parent_candidate_id: int | None = None
    id: int | None = None

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the messages: two prompts that read the same are the same prompt."""
        return _digest(self.messages)

    @property
    def question_digest(self) -> str:
        """`digest` of the prompt without its system turns, by which splits are kept apart.

        A prompt of nothing but system turns is a question as it stands."""
        asked = [message for message in self.messages if message.role != "system"]
        return _digest(asked or self.messages)


def _digest(messages: Iterable[Message]) -> str:
    turns = [[message.role, message.content] for message in messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sampling:
    """How completions are sampled. Temperature 0 is greedy; top_p 1 and top_k 0 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Completion:
    """One answer as a policy wrote it."""

    text: Text
    token_ids: tuple[int, ...]
    """As sampled, the end-of-turn token included when the policy wrote it."""
    finish_reason: FinishReason = "stop"
    logprob: float | None = None
    """Sum over token_ids of the raw log-probability (temperature 1, whole vocabulary), in nats.
    None when no policy sampled it."""
    seed: int | None = None
    sampling: Sampling | None = None
    trained_mask: tuple[bool, ...] | None = None
    """Which of token_ids are trained on. None is all of them."""
    made_as: Text | None = None
    """What its generator calls it, where that makes several kinds: "revised", say."""
    made_with: Text | None = None
    """What else was written to make it: a critique, say."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Candidate(Completion):
    """A stored completion: the `index`-th answer to an asked prompt."""

    id: int
    asked_id: int
    index: int
    checkpoint_id: int | None = None
    """Who wrote it. None for an answer that came with the data."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Group:
    """All candidates of one asked prompt."""

    asked_id: int
    prompt: Prompt
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenLogprobs:
    """Raw log-probability of each of a completion's tokens, in nats."""

    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        return math.fsum(self.logprobs)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Reply:
    """What a model said when a judge asked it, or why it said nothing."""

    text: Text = ""
    status: Status = "ok"
    """Of the call, not of what was said: ok, refused, timed_out or failed."""
    reason: Text | None = None
    """Why it is not ok."""
    finish_reason: FinishReason = "stop"
    structured: bool = False
    """Whether the server was held to the JSON schema that was asked for."""
    seed: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    """Sampled for it; the question's are not counted."""
    cost: float | None = None
    """In the currency of the prices that the server was given; None where it has none."""
    cached: bool = False
    """It was said on an earlier occasion, and cost nothing now."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Verdict:
    """One call of a judge, raw."""

    candidate_id: int
    raw: Text
    """What the judge said, to the letter."""
    status: Status = "ok"
    value: float | None = None
    other_candidate_id: int | None = None
    """The other side of a comparison."""
    order: int | None = None
    """Which side was shown first in a comparison: 0 the candidate, 1 the other."""
    vote: int = 0
    prompt_digest: str | None = None
    seed: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    cost: float | None = None
    cached: bool = False
    """It was heard before, of the same model in the same words, and was not asked again."""
    member: str | None = None
    """Of a panel: which of its judges said it."""
    judge_model: str | None = None
    """Which model said it, where that is not the one that the judge was handed."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Judgement:
    """What a judge concluded on one candidate: a score, or a status that says why there is none."""

    candidate_id: int
    score: float | None
    status: Status = "ok"
    reason: Text | None = None
    variance: float | None = None
    """Of the score over votes. None when there was one vote."""
    verdicts: tuple[Verdict, ...] = ()
    id: int | None = None

    def __post_init__(self) -> None:
        if (self.score is not None) != (self.status == "ok"):
            raise ValueError(f"a judgement has a score exactly when its status is ok: {self}")
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"a score is a finite number: {self}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Example:
    """What a trainer learns from: a preference pair, a demonstration, or a labelled candidate."""

    kind: ExampleKind
    asked_id: int
    prompt: Prompt
    chosen: Candidate
    rejected: Candidate | None = None
    label: bool | None = None
    """Of a labelled candidate, which is `chosen`: whether answers like it are wanted."""
    margin: float | None = None
    """Score of the chosen minus score of the rejected."""
    weight: float = 1.0
    rule: str
    """The filter that made it."""
    chosen_judgement_id: int | None = None
    rejected_judgement_id: int | None = None
    id: int | None = None

    def __post_init__(self) -> None:
        if (self.rejected is not None) != (self.kind == "pair"):
            raise ValueError(f"a pair has a rejected side and nothing else has: {self.kind}")
        if (self.label is not None) != (self.kind == "labelled"):
            raise ValueError(f"a labelled candidate has a label and nothing else has: {self.kind}")
        if self.rejected is not None and self.rejected.token_ids == self.chosen.token_ids:
            raise ValueError("chosen and rejected are the same tokens")
        for name, value in (("margin", self.margin), ("weight", self.weight)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"the {name} of an example is a finite number, found {value}")


class Earlier(NamedTuple):
    """An answer that an earlier round had to a prompt that is asked again."""

    round: int
    candidate: Candidate
    judgement: Judgement | None
    """By the judge of its track, as it is now. None when that one never saw it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Dropped:
    """An asked prompt that gave no example, and why."""

    asked_id: int
    reason: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Selection:
    """What a filter made of a track's groups: each asked prompt is in one of the two."""

    examples: tuple[Example, ...]
    dropped: tuple[Dropped, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Checkpoint:
    """Weights on disk and where they come from."""

    model: str
    kind: CheckpointKind = "full"
    path: Path
    digest: str
    tokenizer_digest: str
    template_digest: str
    bytes: int
    status: CheckpointStatus = "trained"
    parent_id: int | None = None
    base_id: int | None = None
    """What an adapter is laid over."""
    base_path: Path | None = None
    """Where that lies, and its digest. The store fills them in."""
    base_digest: str | None = None
    id: int | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingStep:
    """One optimizer step as the trainer logged it."""

    step: int
    loss: float | None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Training:
    """How a training went. Its weights lie in the folder it was given."""

    status: Literal["trained", "diverged"]
    steps: tuple[TrainingStep, ...]
    reference_logprobs: dict[int, tuple[float, float | None]] = field(default_factory=dict)
    """Example id -> log-probability under the reference of (chosen, rejected), in nats."""
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Evaluation:
    """One number measured of a checkpoint."""

    model: str
    split: Split
    metric: str
    value: float
    n: int
    """How many prompts it is a mean over."""
    low: float | None = None
    high: float | None = None
    """The 95 % interval, by bootstrap over prompts."""
    judge: str | None = None
    suite: str = "held_out"
    items: tuple[float, ...] | None = None
    """What it is the mean of, where a rule may pair them with another checkpoint's."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Health:
    """One number on how a judge did on a track in a round."""

    metric: str
    value: float
    n: int
    """How many of what it is about: judgements, or comparisons, or pairs of votes."""
    detail: dict[str, Any] | None = None
    """What it was computed from, where that is worth keeping: a histogram, say."""


RunStatus = Literal["running", "done", "stopped", "interrupted", "failed", "waiting"]
RoundStatus = Literal["running", "done", "no_examples"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Run:
    """One run of the loop."""

    uuid: str
    name: str
    config: dict[str, Any]
    """Resolved."""
    identity: str
    """Digest of the part of config that may not change."""
    seed: int
    versions: dict[str, str]
    status: RunStatus = "running"
    changes: tuple[dict[str, Any], ...] = ()
    """Operational settings changed after the start: when, which, from, to."""
    stop_requested: bool = False
    driver: str | None = None
    driver_seen: datetime | None = None
    parent_uuid: str | None = None
    parent_path: str | None = None
    started: datetime | None = None
    ended: datetime | None = None
    id: int | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Round:
    """One turn of the loop; number 0 is the warm-up."""

    number: int
    stage: str
    status: RoundStatus = "running"
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """"purpose:track" -> how many of what. Kept in the transactions that write the rows."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> wall time; "in policy", "in judge", "in trainer" -> the part spent in the roles."""
    started: datetime | None = None
    ended: datetime | None = None
    id: int | None = None


class Answer(NamedTuple):
    """What an evaluation needs of a candidate. A tuple: there are many, and none is written."""

    prompt_id: int
    split: Split
    greedy: bool
    text: str
    tokens: int
    truncated: bool
    score: float | None
    """What one judge gave it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Decision:
    """What a rule decided, and the numbers it saw."""

    decision: DecisionKind
    rule: str
    reason: str
    model: str | None = None
    """None when it is about the run."""
    checkpoint_id: int | None = None
    incumbent_id: int | None = None
    numbers: dict[str, Any] = field(default_factory=dict)


def _silent(done: int, total: int) -> None:
    pass


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Call:
    """Where in a run a role is called: what its randomness hangs on, and how it reports back."""

    seed: int = 0
    round: int = 0
    track: str = "main"
    stage: str = ""
    progress: Callable[[int, int], None] = _silent
    stopping: Callable[[], bool] = _never
    """Whether somebody asked the run to stop: long work then saves and raises KeyboardInterrupt."""

    def __getstate__(self) -> dict[str, Any]:
        """Its callbacks stay in the process that made it."""
        return vars(self) | {"progress": _silent, "stopping": _never}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def seed_for(self, *key: str | int) -> int:
        """A seed in [0, 2**63) that depends on the run's seed, this place in it and `key` alone."""
        place = [self.seed, self.round, self.track, self.stage, *key]
        digest = hashlib.sha256(json.dumps(place).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


ALONE = Call()
"""Where a role is called that nobody calls in a run."""
