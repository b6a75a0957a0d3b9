"""Proposers whose prompts ask for a judgement or a revision, and the one that asks again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from judges.answered import Answered
from judges.contrasting import Contrasting
from judges.judging import QUESTION, Judging
from judges.meta import Meta
from judges.meta_judging import MetaJudging
from judges.pairwise import Pairwise
from judges.revising import Revising
from judges.rubric import Rubric
from judges.verifier import Verifier
from roles.generators.revised import Revised
from roles.proposers.extending import Extending
from roles.proposers.repeated import Repeated
from store.errors import UserError
from store.records import (
    Call,
    Candidate,
    Completion,
    Group,
    Judgement,
    Prompt,
    Sampling,
)
from test_rubric import WORDS, ask, propose
from test_rubric import Past as Nothing

CALL = Call(seed=5, round=1, track="main", stage="propose")


@dataclass(frozen=True)
class Past(Nothing):
    """A run whose rounds asked and judged this."""

    rounds: dict[int, list[Prompt]] = field(default_factory=dict)
    said: tuple[tuple[Group, list[Judgement]], ...] = ()

    def asked_in(self, call: Call) -> list[Prompt]:
        return self.rounds[call.round]

    def judged(self, call: Call) -> list[tuple[Group, list[Judgement]]]:
        assert (call.round, call.track) == (1, "main")
        return list(self.said)


# Again


def test_repeated_gives_what_was_asked_first_whatever_the_other_proposer_would_say() -> None:
    first = propose(Repeated(WORDS), 5, call=CALL)
    history = Past(before=tuple(first), rounds={1: first})
    for number in (2, 3):
        again = propose(Repeated(WORDS), 5, past=history, call=Call(seed=5, round=number))
        assert [each.digest for each in again] == [each.digest for each in first]
    held = propose(Repeated(WORDS), 5, "gate", past=history, call=Call(seed=5, round=2))
    assert not {each.digest for each in held} & {each.digest for each in first}


def test_repeated_can_change_its_prompts_every_so_many_rounds() -> None:
    first = propose(Repeated(WORDS, rounds=2), 5, call=CALL)
    history = Past(before=tuple(first), rounds={1: first})
    second, third = (
        propose(Repeated(WORDS, rounds=2), 5, past=history, call=Call(seed=5, round=number))
        for number in (2, 3)
    )
    assert [each.digest for each in second] == [each.digest for each in first]
    assert not {each.digest for each in third} & {each.digest for each in first}


# Contrasts


class Speller:
    """Answers every word with itself in capitals."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        self.asked += [prompt.messages[-1].content for prompt in prompts]
        said = [prompt.messages[-1].content.upper() for prompt in prompts]
        return [[Completion(text=text, token_ids=tuple(text.encode()))] for text in said]


def contrasts(count: int = 30, **options: Any) -> list[Prompt]:
    policy: Any = Speller()
    return Contrasting(WORDS, by="letters", **options).propose(count, "train", Past(), policy, CALL)


def test_the_answer_to_the_question_is_the_better_one_and_the_other_is_to_one_like_it() -> None:
    prompts = contrasts()
    assert len(prompts) > 20
    firsts = 0
    for prompt in prompts:
        word, answers = prompt.columns["question"], prompt.columns["answers"]
        winner = answers["AB".index((prompt.reference or "")[-1])]
        loser = next(each for each in answers if each != winner)
        assert prompt.reference == f"Winner: {'AB'[answers.index(winner)]}"
        assert winner == word.upper()
        # The nearest of thirty words of three letters out of ten has one in common, nearly always.
        assert set(loser.lower()) & set(word) or len(set(word)) < 3
        firsts += answers.index(winner) == 0
    assert 5 < firsts < len(prompts) - 5  # which stands first is drawn


def test_a_contrast_is_what_the_pairwise_judge_asks_and_the_verifier_reads_its_verdict() -> None:
    judge = Pairwise()
    for prompt in contrasts(10):
        own = ask(prompt.columns["question"])
        sides = [Completion(text=text, token_ids=()) for text in prompt.columns["answers"]]
        assert judge.question(own, *sides).digest == prompt.digest
        right = f"Because.\n{prompt.reference}"
        wrong = right[:-1] + ("B" if right[-1] == "A" else "A")
        verifier = Verifier(scorer="exact", answer="last_line")
        scores = [
            verifier.score(prompt, Completion(text=text, token_ids=()), None, CALL).score
            for text in (right, wrong)
        ]
        assert scores == [1.0, 0.0]


def test_a_question_whose_two_answers_read_the_same_is_left_out() -> None:
    class Same(Speller):
        def sample(self, prompts: Any, **more: Any) -> list[list[Completion]]:
            return [[Completion(text="same", token_ids=(1,))] for _ in prompts]

    policy: Any = Same()
    assert Contrasting(WORDS).propose(10, "train", Past(), policy, CALL) == []


# Judgements of what the policy answered


def judged(number: int, *answers: tuple[str, float | None, float]) -> tuple[Group, list[Judgement]]:
    prompt = ask(f"word{number}", reference=f"word{number}")
    candidates = tuple(
        Candidate(id=10 * number + n, asked_id=number, index=n, text=text, token_ids=(n,))
        for n, (text, _, _) in enumerate(answers)
    )
    said = [
        Judgement(
            candidate_id=one.id,
            score=score,
            status="unparsed" if score is None else "ok",
            variance=variance,
        )
        for one, (_, score, variance) in zip(candidates, answers, strict=True)
    ]
    return Group(asked_id=number, prompt=prompt, candidates=candidates), said


def test_the_answers_of_the_last_round_are_judged_that_the_judge_was_least_sure_of() -> None:
    said = (
        judged(1, ("sure", 5.0, 0.0), ("unsure", 2.0, 4.0)),
        judged(2, ("surer", 3.0, 1.0), ("unread", None, 9.0)),
        judged(3, ("unread", None, 9.0)),
    )
    proposer = Answered(WORDS, prompt="rubric_brief")
    second = Call(seed=5, round=2, track="judging", stage="propose")
    prompts = propose(proposer, 9, past=Past(said=said), call=second)
    assert [each.columns["answer"] for each in prompts] == ["unsure", "surer"]
    assert [each.parent_candidate_id for each in prompts] == [11, 20]
    assert all(each.origin == "derived" for each in prompts)
    assert [each.columns["reference"] for each in prompts] == ["word1", "word2"]
    assert len(propose(proposer, 1, past=Past(said=said), call=second)) == 1
    rubric = Judging(WORDS, prompt="rubric_brief")
    assert prompts[0].digest == rubric._asked([said[0][0].prompt], ["unsure"]).digest


def test_in_the_first_round_answers_are_made_up() -> None:
    made = propose(Answered(WORDS), 5, call=CALL)
    assert len(made) == 5
    assert all(each.parent_candidate_id is None for each in made)


# Judgements of judgements


def test_a_prompt_for_a_meta_judge_is_what_meta_asks_and_the_right_judgement_wins() -> None:
    proposer = MetaJudging(WORDS, prompt="meta_brief", nonce=False, worst=2)
    prompts = propose(proposer, 20, call=CALL)
    assert len(prompts) == 20
    winners = set()
    for prompt in prompts:
        right, verdict = (prompt.reference or "").rsplit("\n", 1)
        assert verdict in ("Winner: A", "Winner: B")
        winners.add(verdict)
        shown = prompt.messages[-1].content
        fenced = shown.split("===")
        both = [fenced[-4].strip(), fenced[-2].strip()]
        assert both.index(right) == "AB".index(verdict[-1])
        assert both[0] != both[1]
    assert winners == {"Winner: A", "Winner: B"}
    assert proposer.meta.template.digest == Meta(prompt="meta_brief").template.digest


# Revisions


def test_an_extension_goes_on_from_an_answer_that_stopped_early_and_is_right_so_far() -> None:
    long = {"use": WORDS["use"], "letters": 8}
    proposer = Revising(long, of="extension", revise="extend_brief", nonce=False, longer=(2, 3))
    prompts = propose(proposer, 20, call=CALL)
    assert len(prompts) == 20
    for prompt in prompts:
        right, begun = prompt.columns["reference"], prompt.columns["answer"]
        assert right.startswith(prompt.reference)
        assert (prompt.reference or "").startswith(begun)
        assert 2 <= len(prompt.reference or "") - len(begun) <= 3
        assert prompt.messages[-1].content.endswith("Longer:")


def test_what_a_revision_came_to_is_to_be_learned_in_the_next_round() -> None:
    def one(number: int, text: str, kind: str | None, told: str | None = None) -> Candidate:
        return Candidate(
            id=number,
            asked_id=1,
            index=number,
            text=text,
            token_ids=(number,),
            made_as=kind,
            made_with=told,
        )

    answers = [one(0, "ab", "first"), one(1, "abcd", "revised", "ab"), one(2, "good", "accepted")]
    answers += [one(3, "x", "first"), one(4, "x", "revised"), one(5, "y", "first")]
    answers += [one(6, "odd", "unsettled")]
    group = Group(asked_id=1, prompt=ask("word"), candidates=tuple(answers))
    history = Past(said=((group, []),))
    extending = Extending(revise="extend_brief", nonce=False)
    second = Call(seed=5, round=2, track="extender", stage="propose")
    (prompt,) = propose(extending, 5, past=history, call=second)
    assert (prompt.reference, prompt.parent_candidate_id) == ("abcd", 1)
    asked = Revised(revise="extend_brief", nonce=False).revising
    assert prompt.digest == asked.fill(question="word", answer="ab").digest
    assert propose(extending, 5, past=history, call=CALL) == []


@pytest.mark.parametrize("of", ["critique", "revision"])
def test_a_prompt_for_a_revision_is_what_the_generator_asks_word_for_word(of: Any) -> None:
    revised = Revised(critique="critique_brief", revise="revise_brief", nonce=False)
    asking = revised.criticism if of == "critique" else revised.revising
    assert asking is not None
    proposer = Revising(
        WORDS, of=of, critique="critique_brief", revise="revise_brief", nonce=False, mistakes=0.5
    )
    good = 0
    for prompt in propose(proposer, 20, call=CALL):
        parts = prompt.columns
        critique = f"The right answer is {parts['reference']}.\nVerdict: "
        is_right = parts["answer"] == parts["reference"]
        critique += "good" if is_right else "mend"
        good += is_right
        again = asking.fill(question=parts["question"], answer=parts["answer"], critique=critique)
        assert again.digest == prompt.digest
        assert prompt.reference == (critique if of == "critique" else parts["reference"])
        assert revised.accepts.search(critique) is not None or not is_right
        assert QUESTION in parts
    assert (0 < good < 20) if of == "critique" else good == 0


def test_a_proposer_inside_another_is_named_when_it_is_no_table() -> None:
    with pytest.raises(UserError, match="repeated's proposer is a table of a proposer"):
        Repeated({})
    with pytest.raises(UserError, match="revising's proposer"):
        Revising({"tasks": []})


def test_a_rubric_is_asked_by_the_name_of_a_shipped_text_like_any_judge() -> None:
    assert Rubric(prompt="rubric_brief").template.text != Rubric().template.text
    assert Meta(prompt="meta_brief").template.text != Meta().template.text
    with pytest.raises(UserError, match="no prompt named 'metta'"):
        Meta(prompt="metta")
