"""Score each candidate against the others as if they were right: minimum Bayes risk.

Nobody knows the right answer. The candidate that agrees best with what else the policy says has
the least loss to expect, and it need not be the commonest wording.
"""

# No `from __future__ import annotations` here: see judges/model_judge.py.

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from judges.model_judge import told, without_score
from judges.rubric import Grader
from roles.proposers.similarity import rouge_l
from roles.protocols import Policy
from roles.template import Template, conversation
from store.records import ALONE, Call, Candidate, Group, Judgement, Prompt, Verdict


class _Pair(NamedTuple):
    asked: Prompt
    one: Candidate
    other: Candidate


@dataclass(kw_only=True)
class Mbr(Grader):
    """A judge that holds each candidate against the other candidates as its references.

    A candidate's score is its mean utility over them. Source: "Better Instruction-Following
    Through Minimum Bayes Risk" (arXiv 2410.02902): the utility is a judge that sees a reference.

    utility: `model` asks how well a candidate agrees with a reference, n(n - 1) questions for n
    candidates; `rouge_l` is the share of words that they have in common in order, in [0, 1];
    `exact` is 1 where they are the same text, white space around it aside.
    references: how many of the other candidates are drawn for each; left out, all of them are.
    votes, min_votes: of each pair.
    prompt_path: a text of your own with {question}, {answer} and {reference}.
    """

    votes: Annotated[int, Field(ge=1)] = 1
    utility: Literal["model", "rouge_l", "exact"] = "model"
    references: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.utility != "model":
            self.asks_model = False  # type: ignore[misc]
            self.version = f"{type(self).version} {self.utility}"  # type: ignore[misc]

    def _template(self) -> Template:
        return self.take_template("mbr", ("question", "answer", "reference"))

    def judge(
        self, groups: Sequence[Group], policy: Policy | None = None, call: Call = ALONE
    ) -> list[Judgement]:
        pairs = [
            _Pair(group.prompt, one, other)
            for group in groups
            for one in group.candidates
            for other in self._references(group, one, call)
        ]
        if self.utility == "model":
            judged = self._asked(pairs, policy, call)
        else:
            judged = [self._computed(pair) for pair in pairs]
        held: dict[int, list[Judgement]] = {}
        for pair, judgement in zip(pairs, judged, strict=True):
            held.setdefault(pair.one.id, []).append(judgement)
        return [_mean(one, held.get(one.id, [])) for group in groups for one in group.candidates]

    def _references(self, group: Group, one: Candidate, call: Call) -> list[Candidate]:
        others = [each for each in group.candidates if each.id != one.id]
        if self.references is None or self.references >= len(others):
            return others
        chance = random.Random(call.seed_for(group.prompt.digest, one.index, "references"))
        drawn = chance.sample(range(len(others)), self.references)
        return [others[n] for n in sorted(drawn)]

    def _asked(self, pairs: Sequence[_Pair], policy: Policy | None, call: Call) -> list[Judgement]:
        """What each pair came to, all asked in one call."""
        questions = [
            self.template.fill(question=conversation(asked), answer=one.text, reference=other.text)
            for asked, one, other in pairs
        ]
        seeds = [
            [call.seed_for(asked.digest, one.index, other.index, n) for n in range(self.votes)]
            for asked, one, other in pairs
        ]
        replies = self.ask(policy, questions, seeds, call, self.reading.schema)
        return [
            self._concluded(pair.one, question, said, other_candidate_id=pair.other.id)
            for pair, question, said in zip(pairs, questions, replies, strict=True)
        ]

    def _computed(self, pair: _Pair) -> Judgement:
        one, other = pair.one.text, pair.other.text
        if self.utility == "rouge_l":
            value = rouge_l(one, other)
        else:
            value = float(one.strip() == other.strip())
        said = Verdict(
            candidate_id=pair.one.id,
            other_candidate_id=pair.other.id,
            raw=f"{self.utility} {value:.4g}",
            value=value,
        )
        return Judgement(candidate_id=pair.one.id, score=value, verdicts=(said,))


def _mean(candidate: Candidate, held: Sequence[Judgement]) -> Judgement:
    """held: what it came to against each of its references."""
    values = [each.score for each in held if each.score is not None]
    verdicts = tuple(said for each in held for said in each.verdicts)
    lacking = [each.reason or each.status for each in held if each.score is None]
    return Judgement(
        candidate_id=candidate.id,
        score=fmean(values) if values else None,
        status="ok" if values else without_score(verdicts),
        reason=told(lacking, len(held)) if held else "nothing to compare it with",
        variance=pvariance(values) if len(values) > 1 else None,
        verdicts=verdicts,
    )
