"""The contract: every judge of the shelf keeps it, and each bad one is found out by its clause."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from judges import PointwiseJudge
from judges.bench import examples, group_of
from judges.contract import CLAUSES, check
from judges.reading import Reading
from judges.rubric import Rubric
from judges.verifier import Verifier
from roles.protocols import Policy
from shelf import ASKING, SPECS, on_the_shelf
from store.errors import UserError
from store.records import Call, Completion, Group, Judgement, Prompt, Reply, Sampling


def failures(judge: Any) -> dict[str, str]:
    return {each.name: each.why for each in check(judge) if each.outcome == "failed"}


@pytest.mark.parametrize("name", sorted({*SPECS, *ASKING}))
def test_every_judge_that_is_shipped_keeps_the_contract(name: str, tmp_path: Path) -> None:
    judge = on_the_shelf(name.partition(",")[0], tmp_path, **ASKING.get(name, {}))
    found = check(judge)
    assert [each for each in found if each.outcome == "failed"] == []
    assert [each.name for each in found] == list(CLAUSES)
    if name in ASKING:
        assert [each for each in found if each.outcome != "passed"] == []


def test_what_does_not_apply_says_why() -> None:
    found = {each.name: each for each in check(Verifier())}
    assert found["same seed"].outcome == "passed"
    assert found["time-outs"].outcome == "not applicable"
    assert found["time-outs"].why == "it asks no model"


def test_a_judge_is_tried_on_groups_of_its_own_or_of_its_authors() -> None:
    with pytest.raises(UserError, match="needs a reference answer"):
        check(Verifier(scorer="exact"), [_without_reference()])

    class OnItsOwn(Verifier):
        def examples(self) -> list[Group]:
            return [_without_reference()]

    with pytest.raises(UserError, match="needs a reference answer"):
        check(OnItsOwn(scorer="exact"))
    assert not any(each.outcome == "failed" for each in check(OnItsOwn(), examples()))


def _without_reference() -> Group:
    group = examples()[0]
    return replace(group, prompt=replace(group.prompt, reference=None))


# Bad judges, each good but for one thing.


class ZipsAndDrops(Rubric):
    """Drops what it cannot read, and gives the rest to whoever comes next."""

    def judge(self, groups: Sequence[Group], policy: Policy | None, call: Call) -> list[Judgement]:
        judged = super().judge(groups, policy, call)
        read = [each for each in judged if each.score is not None]
        ids = [one.id for group in groups for one in group.candidates]
        return [
            replace(each, candidate_id=one, verdicts=())
            for one, each in zip(ids, read, strict=False)
        ]


class ZeroOnFailure(Rubric):
    def judge(self, groups: Sequence[Group], policy: Policy | None, call: Call) -> list[Judgement]:
        return [
            each if each.score is not None else replace(each, score=0.0, status="ok")
            for each in super().judge(groups, policy, call)
        ]


class FirstIsBest(PointwiseJudge):
    """Whoever stands first in a group gets more."""

    def judge(self, groups: Sequence[Group], policy: Policy | None, call: Call) -> list[Judgement]:
        return [
            Judgement(candidate_id=one.id, score=float(place == 0))
            for group in groups
            for place, one in enumerate(group.candidates)
        ]

    def score(self, *_: Any) -> float:
        return 0.0


class HangsOnItsBatch(PointwiseJudge):
    """What it gives hangs on how much it was given."""

    def judge(self, groups: Sequence[Group], policy: Policy | None, call: Call) -> list[Judgement]:
        ids = [one.id for group in groups for one in group.candidates]
        return [Judgement(candidate_id=one, score=float(len(groups))) for one in ids]

    def score(self, *_: Any) -> float:
        return 0.0


class FirstGroupIsBest(HangsOnItsBatch):
    def judge(self, groups: Sequence[Group], policy: Policy | None, call: Call) -> list[Judgement]:
        return [
            Judgement(candidate_id=one.id, score=float(place == 0 and len(groups) > 1))
            for place, group in enumerate(groups)
            for one in group.candidates
        ]


@dataclass(frozen=True)
class FirstMatch(Reading):
    def read(self, said: Reply, prompt: Prompt) -> tuple[float | None, str]:
        found = re.search(r"score: *([0-5])\b", said.text, re.IGNORECASE)
        if said.structured or said.status != "ok" or said.finish_reason == "length" or not found:
            return super().read(said, prompt)
        return float(found[1]), ""


class ReadsTheFirstMatch(Rubric):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.reading = FirstMatch(self.pattern, 0, 5, False, True)


class Chance(PointwiseJudge):
    def score(self, prompt: Prompt, completion: Completion, policy: Any, call: Call) -> float:
        return random.random()


class NeedsText(PointwiseJudge):
    def score(self, prompt: Prompt, completion: Completion, policy: Any, call: Call) -> float:
        return float(len(completion.text.split()[0]))


class GivesUpOnLongOnes(PointwiseJudge):
    def score(self, prompt: Prompt, completion: Completion, policy: Any, call: Call) -> float:
        if len(completion.text) > 99_000 and " " not in completion.text[:50]:
            raise RecursionError("too deep")
        return float(len(completion.text))


class AsciiAlone(PointwiseJudge):
    def score(self, prompt: Prompt, completion: Completion, policy: Any, call: Call) -> float:
        return float(len(completion.text.replace("\u00a0", " ").encode("ascii")))


class NotFinite(PointwiseJudge):
    def score(self, prompt: Prompt, completion: Completion, policy: Any, call: Call) -> float:
        return float("nan")


class WrongId(PointwiseJudge):
    def judge(self, groups: Sequence[Group], policy: Policy | None, call: Call) -> list[Judgement]:
        ids = [n for group in groups for n, _ in enumerate(group.candidates)]
        return [Judgement(candidate_id=one, score=1.0) for one in ids]

    def score(self, *_: Any) -> float:
        return 0.0


class NoReason(PointwiseJudge):
    def judge(self, groups: Sequence[Group], policy: Policy | None, call: Call) -> list[Judgement]:
        ids = [one.id for group in groups for one in group.candidates]
        return [Judgement(candidate_id=one, score=None, status="abstained") for one in ids]

    def score(self, *_: Any) -> float:
        return 0.0


class CallsAllFailuresAbstained(Rubric):
    def judge(self, groups: Sequence[Group], policy: Policy | None, call: Call) -> list[Judgement]:
        return [
            each if each.score is not None else replace(each, status="abstained")
            for each in super().judge(groups, policy, call)
        ]


class TakesWhatWasCutOff(Rubric):
    def ask(self, *given: Any, **named: Any) -> list[list[Reply]]:
        asked = super().ask(*given, **named)
        return [[replace(each, finish_reason="stop") for each in said] for said in asked]


class SamplesByItself(PointwiseJudge):
    """Asks a policy as a first judge of one's own does, and forgets that it may say nothing."""

    def score(
        self, prompt: Prompt, completion: Completion, policy: Any, call: Call
    ) -> float | None:
        sampling = Sampling(max_tokens=9)
        [[said]] = policy.sample([prompt], sampling=sampling, seeds=[[1]])
        return 3.0 if said.text.startswith("A stand-in") and said.finish_reason == "stop" else None


NO_SCORE = {"silly replies", "cut-off replies", "time-outs", "refusals"}


@pytest.mark.parametrize(
    ("bad", "clauses"),
    [
        (ZipsAndDrops, {"failures among others"}),
        (ZeroOnFailure, NO_SCORE),
        (FirstIsBest, {"order of candidates"}),
        (FirstGroupIsBest, {"order of groups", "size of the batch"}),
        (HangsOnItsBatch, {"size of the batch"}),
        (ReadsTheFirstMatch, {"attacks"}),
        (Chance, {"same seed"}),
        (NeedsText, {"empty answers"}),
        (GivesUpOnLongOnes, {"long answers"}),
        (AsciiAlone, {"strange characters"}),
        (NotFinite, {"one judgement each"}),
        (WrongId, {"one judgement each"}),
        (NoReason, {"verdicts and reasons"}),
        (CallsAllFailuresAbstained, {"time-outs", "refusals"}),
        (TakesWhatWasCutOff, {"cut-off replies"}),
        (SamplesByItself, {"time-outs", "refusals"}),
    ],
)
def test_a_bad_judge_fails_the_clause_that_is_about_it(bad: type, clauses: set[str]) -> None:
    assert failures(bad()).keys() == clauses


def test_a_failed_clause_says_what_happened() -> None:
    assert "without one: [17, 20, 23, 117" in failures(WrongId())["one judgement each"]
    assert failures(NeedsText())["empty answers"] == "it raised IndexError: list index out of range"
    assert failures(ZeroOnFailure())["time-outs"] == (
        "the reply is timed_out, and a candidate gets 0"
    )
    assert "is read as what it says itself" in failures(ReadsTheFirstMatch())["attacks"]


def test_a_judge_that_cannot_judge_the_examples_is_tried_no_further() -> None:
    first, *others = check(NotFinite())
    assert (first.outcome, {each.outcome for each in others}) == ("failed", {"not applicable"})
    assert "nan" in first.why


def test_candidates_of_an_example_have_ids_that_are_no_places() -> None:
    group = group_of(examples()[0].prompt, ["a", "b"], 7)
    assert [one.id for one in group.candidates] == [7, 10]
    ids = [one.id for each in examples() for one in each.candidates]
    assert len({*ids}) == len(ids)
