"""Score each candidate by how many of the others agree with it: no reference, and often no model.

Right answers agree with each other, and wrong ones are wrong in many ways.
"""

# No `from __future__ import annotations` here: see judges/model_judge.py.

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from math import fsum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from judges.answers import Place, final_answer
from judges.choices import Choice
from judges.model_judge import ModelJudge, verdict, without_score
from judges.numbers import read_number
from roles.proposers.similarity import rouge_l
from roles.protocols import Policy
from roles.template import conversation
from store.records import ALONE, Call, Candidate, Group, Judgement, Verdict

Texts = tuple[int, int]
"""Two texts of a group, by their places."""


@dataclass(frozen=True)
class Sameness(Choice):
    """Yes or no."""

    word: ClassVar[str] = "same"

    @property
    def form(self) -> str:
        return "yes or no"

    def _field(self) -> dict[str, Any]:
        return {"type": "string", "enum": ["yes", "no"]}

    def _chosen(self, written: Any) -> tuple[str | None, str]:
        said = written.strip().lower() if isinstance(written, str) else ""
        return (
            (said, "") if said in ("yes", "no") else (None, f"{written!r:.60} is not {self.form}")
        )


@dataclass
class Answers:
    """The final answers of a group, each different text once, and which of them agree."""

    group: Group
    texts: list[str] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)
    """Candidate id -> which of the texts it gave."""
    lacking: dict[int, str] = field(default_factory=dict)
    """Candidate id -> why its answer cannot be compared."""
    agreement: dict[Texts, float | None] = field(default_factory=dict)
    """In [0, 1], None where it could not be found out; the earlier text first."""
    heard: dict[Texts, list[Verdict]] = field(default_factory=dict)
    whys: dict[Texts, str] = field(default_factory=dict)
    """Why an agreement could not be found out."""

    def author(self, text: int) -> Candidate:
        """Who gave the text first."""
        return next(one for one in self.group.candidates if self.place.get(one.id) == text)

    def join(self) -> None:
        """What agrees with the same answer agrees, whatever was found of the two."""
        root = list(range(len(self.texts)))
        for (one, other), found in self.agreement.items():
            if found == 1.0:
                root = [root[one] if each == root[other] else each for each in root]
        joined = {pair: 1.0 for pair in self.agreement if root[pair[0]] == root[pair[1]]}
        self.agreement |= joined

    def hear(self, pair: Texts, said: Verdict, why: str) -> None:
        """One order of a pair; both must say the same."""
        both = self.heard.setdefault(pair, [])
        both.append(said)
        first = both[0].value
        self.agreement[pair] = first if all(each.value == first for each in both) else None
        if self.agreement[pair] is None:
            self.whys[pair] = why or self.whys.get(pair, "the order decided")

    def others(self, candidate: Candidate) -> list[Texts | None]:
        """For each other candidate that gave an answer: the two texts, None where it is one."""
        own = self.place[candidate.id]
        places = [place for one, place in self.place.items() if one != candidate.id]
        return [None if n == own else (min(own, n), max(own, n)) for n in places]


@dataclass(kw_only=True)
class Consistency(ModelJudge):
    """A judge of how many of a group's other candidates give the same final answer.

    The score is the share of the other candidates that agree, of those that gave an answer which
    can be compared: 1 where all do, 0 where none does. An answer without a final one abstains and
    counts for nobody, and so does one that has no others.

    Source: "Self-Consistency Improves Chain of Thought Reasoning in Language Models" (arXiv
    2203.11171), section 2: the answer of the majority; asking for sameness in both directions, and
    clusters of what agrees, is that of "Semantic Uncertainty" (arXiv 2302.09664).

    by: `exact` the same text, letter case, white space and a full stop at the end aside; `numeric`
    the same number within `tolerance` (relative to numbers beyond 1); `similar` is no yes or no
    but the share of words in common in order (ROUGE-L), averaged over the others; `model` asks
    whether two answers come to the same, each two different ones in both orders: yes in both is
    the same, no in both is not, and anything else counts for neither. What agrees with the same
    answer agrees.
    answer: where the final answer is (`judges.answers`).
    prompt_path: a text of your own with {question}, {first} and {second}.
    """

    by: Literal["exact", "numeric", "similar", "model"] = "exact"
    answer: Place = "auto"
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 1e-6
    require_justification: bool = True

    def __post_init__(self) -> None:
        if self.by == "model":
            self.template = self.take_template("consistency", ("question", "first", "second"))
            self.reading = Sameness("", self.require_justification)
        else:
            self.asks_model = False  # type: ignore[misc]
            self.version = f"{type(self).version} {self.by}"  # type: ignore[misc]

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        boards = [self._read(group) for group in groups]
        if self.by == "model":
            self._ask_all(boards, policy, call)
        else:
            for board in boards:
                self._compute(board)
        if self.by != "similar":
            for board in boards:
                board.join()
        return [self._concluded(one, board) for board in boards for one in board.group.candidates]

    def _read(self, group: Group) -> Answers:
        board, places = Answers(group), dict[str, int]()
        for one in group.candidates:
            text, why = self._comparable(final_answer(one.text, self.answer))
            if text is None:
                board.lacking[one.id] = why
                continue
            board.place[one.id] = places.setdefault(text, len(places))
        board.texts = list(places)
        return board

    def _comparable(self, answer: str | None) -> tuple[str | None, str]:
        """An answer in the form in which equals are the same text, or why it has none."""
        if not answer:
            return None, f"no final answer: looked for {self.answer!r}"
        if self.by == "numeric":
            number = read_number(answer)
            return (None, f"{answer!r:.60} is no number") if number is None else (str(number), "")
        plain = " ".join(answer.split())
        return (plain.casefold().removesuffix(".") if self.by == "exact" else plain), ""

    def _compute(self, board: Answers) -> None:
        for one, other in combinations(range(len(board.texts)), 2):
            first, second = board.texts[one], board.texts[other]
            found = 0.0
            if self.by == "similar":
                found = rouge_l(first, second)
            elif self.by == "numeric":
                a, b = Fraction(first), Fraction(second)
                allowed = Fraction(self.tolerance) * max(Fraction(1), abs(a), abs(b))
                found = float(abs(a - b) <= allowed)
            board.agreement[one, other] = found

    def _ask_all(self, boards: Sequence[Answers], policy: Policy | None, call: Call) -> None:
        """Every two texts of every group in both orders, asked in one call."""
        asked = [
            (board, first, second)
            for board in boards
            for pair in combinations(range(len(board.texts)), 2)
            for first, second in (pair, pair[::-1])
        ]
        questions = [
            self.template.fill(
                question=conversation(board.group.prompt),
                first=board.texts[first],
                second=board.texts[second],
            )
            for board, first, second in asked
        ]
        seeds = [
            [call.seed_for(board.group.prompt.digest, *(board.author(n).index for n in shown))]
            for board, *shown in asked
        ]
        replies = self.ask(policy, questions, seeds, call, self.reading.schema)
        for (board, first, second), question, (said,) in zip(
            asked, questions, replies, strict=True
        ):
            choice, why = self.reading.read(said, question)
            value = None if choice is None else float(choice == "yes")
            author, other = board.author(first), board.author(second)
            found = verdict(author.id, question, said, value, why, other_candidate_id=other.id)
            board.hear((min(first, second), max(first, second)), found, why)

    def _concluded(self, candidate: Candidate, board: Answers) -> Judgement:
        if candidate.id in board.lacking:
            return _alone(candidate, board.lacking[candidate.id])
        text, others = board.place[candidate.id], board.others(candidate)
        if not others:
            return _alone(candidate, "no other answer to compare it with")
        about = [each for pair, said in board.heard.items() if text in pair for each in said]
        found = [1.0 if pair is None else board.agreement[pair] for pair in others]
        known = [each for each in found if each is not None]
        whys = [board.whys[pair] for pair in others if pair and board.agreement[pair] is None]
        score = fsum(known) / len(known) if known else None
        words = f"agreement {score:.4g} with {len(known)} others" if known else None
        reason = "; ".join(each for each in (words, _undecided(whys, len(others))) if each)
        own = tuple(each for each in about if each.candidate_id == candidate.id)
        plain = Verdict(candidate_id=candidate.id, raw=board.texts[text], value=score)
        return Judgement(
            candidate_id=candidate.id,
            score=score,
            status=without_score(about) if score is None else "ok",
            reason=reason,
            verdicts=own if self.by == "model" else (plain,),
        )


def _undecided(whys: Sequence[str], asked: int) -> str | None:
    if not whys:
        return None
    counted = ", ".join(f"{why} ({times})" for why, times in Counter(whys).most_common())
    return f"{len(whys)} of {asked} undecided: {counted}"


def _alone(candidate: Candidate, why: str) -> Judgement:
    said = Verdict(candidate_id=candidate.id, raw=why, status="abstained")
    return Judgement(
        candidate_id=candidate.id, score=None, status="abstained", reason=why, verdicts=(said,)
    )
