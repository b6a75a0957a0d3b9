"""Which candidates of a group may become examples, and why a group gave none.

The filters differ in what they pick; what may be picked, and the words for why nothing was,
are the same for all and are said here once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from store.errors import UserError
from store.records import Candidate, Dropped, Example, Group, Judgement, Selection

Reason = Literal[
    "unjudged",
    "truncated",
    "length",
    "unlikely",
    "duplicate",
    "tie",
    "margin",
    "unsure",
    "all right",
    "all wrong",
    "too few candidates",
]
# When as many candidates were lost for one reason as for another, the first of these is told.
_LOSSES: tuple[Reason, ...] = ("unjudged", "truncated", "length", "unlikely", "duplicate")


@dataclass(frozen=True)
class Scored:
    """A candidate with the score that it got."""

    candidate: Candidate
    score: float
    judgement_id: int | None


@dataclass(frozen=True)
class Sorted:
    """A group's candidates: those that may be picked, and why the others may not."""

    kept: tuple[Scored, ...]
    lost: tuple[Reason, ...]

    @property
    def main_loss(self) -> Reason:
        """What most of the lost were lost to."""
        if not self.lost:
            return "too few candidates"
        counts = Counter(self.lost)
        return max(_LOSSES, key=lambda reason: counts[reason])


@dataclass(frozen=True)
class Eligibility:
    """Judged, finished, of a length in [min_tokens, max_tokens], and not said before."""

    min_tokens: int = 0
    max_tokens: int | None = None
    truncated: bool = False
    """Whether a candidate that was cut off at its token limit may be picked."""
    min_logprob: float | None = None
    """The least mean log-probability of its tokens under the policy, in nats. What nobody sampled
    has none and may be picked."""

    def __post_init__(self) -> None:
        if self.min_tokens < 0:
            raise UserError(f"a filter's min_tokens is at least 0; found {self.min_tokens}")
        if self.max_tokens is not None and self.max_tokens < max(1, self.min_tokens):
            raise UserError(
                f"a filter's max_tokens is at least 1 and at least its min_tokens; "
                f"found {self.max_tokens} and {self.min_tokens}"
            )

    def sort(self, group: Group, judgements: Mapping[int, Judgement]) -> Sorted:
        kept: list[Scored] = []
        lost: list[Reason] = []
        for candidate in group.candidates:
            judgement = judgements.get(candidate.id)
            if judgement is None or judgement.score is None:
                lost.append("unjudged")
            elif candidate.finish_reason == "length" and not self.truncated:
                lost.append("truncated")
            elif not self._fits(len(candidate.token_ids)):
                lost.append("length")
            elif self._is_unlikely(candidate):
                lost.append("unlikely")
            elif any(same(candidate, earlier.candidate) for earlier in kept):
                lost.append("duplicate")
            else:
                kept.append(Scored(candidate, judgement.score, judgement.id))
        return Sorted(tuple(kept), tuple(lost))

    def _is_unlikely(self, candidate: Candidate) -> bool:
        if self.min_logprob is None or candidate.logprob is None:
            return False
        return candidate.logprob < self.min_logprob * len(candidate.token_ids)

    def _fits(self, tokens: int) -> bool:
        return self.min_tokens <= tokens and (self.max_tokens is None or tokens <= self.max_tokens)


def same(one: Candidate, other: Candidate) -> bool:
    """Whether two candidates say the same."""
    return one.text == other.text or one.token_ids == other.token_ids


def by_candidate(judgements: Iterable[Judgement]) -> dict[int, Judgement]:
    """Judgements by the candidate they name: their order says nothing."""
    return {judgement.candidate_id: judgement for judgement in judgements}


def select_each(
    groups: Iterable[Group],
    judgements: Iterable[Judgement],
    select: Callable[[Group, Mapping[int, Judgement]], list[Example] | Reason],
) -> Selection:
    """What `select` makes of each group: examples, or the reason why there is none."""
    judged = by_candidate(judgements)
    examples: list[Example] = []
    dropped: list[Dropped] = []
    for group in groups:
        found = select(group, judged)
        if isinstance(found, list):
            examples += found
        else:
            dropped.append(drop(group, found))
    return Selection(examples=tuple(examples), dropped=tuple(dropped))


def drop(group: Group, reason: Reason) -> Dropped:
    return Dropped(asked_id=group.asked_id, reason=reason)


def pair(group: Group, chosen: Scored, rejected: Scored, rule: str) -> Example:
    return Example(
        kind="pair",
        asked_id=group.asked_id,
        prompt=group.prompt,
        chosen=chosen.candidate,
        rejected=rejected.candidate,
        margin=chosen.score - rejected.score,
        rule=rule,
        chosen_judgement_id=chosen.judgement_id,
        rejected_judgement_id=rejected.judgement_id,
    )


def check_min_margin(min_margin: float) -> float:
    if not min_margin >= 0:
        raise UserError(f"a filter's min_margin is at least 0; found {min_margin}")
    return min_margin


def best_first(kept: Sequence[Scored]) -> list[Scored]:
    """Highest score first; of equal ones the one that was written first."""
    return sorted(kept, key=lambda one: (-one.score, one.candidate.index))
