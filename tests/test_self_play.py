"""Problems that the policy makes up: their value, how often they are solved, and the next round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from judges.solvable import Solvable
from roles.arithmetic import value_of
from roles.proposers.conjectures import Conjectures
from store.records import Call, Candidate, Completion, Group, Judgement, Prompt, Sampling
from test_judging_tracks import Past
from test_rubric import WORDS, ask, propose

CALL = Call(seed=2, round=2, track="main", stage="propose")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("State the final answer to the following arithmetic problem: 4 - 1 - 7 =", "-4"),
        ("What is 2 * (3 + 4)?", "14"),
        ("7 / 2 =", "7/2"),
        ("1.5 + 1.5 =", "3"),
        ("-3 + 5 =", "2"),
        ("Add 12 and 4.", None),
        ("How old is 42?", None),
        ("1 / 0 =", None),
        ("3 + + =", None),
        ("(((((", None),
        ("9**9**9**9 =", None),
        ("", None),
    ],
)
def test_the_value_of_a_problem_is_read_from_its_text(text: str, value: str | None) -> None:
    assert value_of(text) == value


def problems(*texts: str) -> Group:
    candidates = tuple(
        Candidate(id=n, asked_id=1, index=n, text=text, token_ids=(n,))
        for n, text in enumerate(texts)
    )
    return Group(asked_id=1, prompt=ask("One more:"), candidates=candidates)


class Adder:
    """Adds rightly in a share of its attempts that the sum's first digit says: 0 to 9 tenths."""

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        found = []
        for prompt, own in zip(prompts, seeds, strict=True):
            text = prompt.messages[-1].content
            right, skill = str(value_of(text)), int(text[0])
            said = [right if seed % 10 < skill else "0" for seed in own]
            found.append([Completion(text=each, token_ids=(1, 2)) for each in said])
        return found


def test_a_problem_scores_where_it_is_solved_now_and_then() -> None:
    policy: Any = Adder()
    texts = ["0 + 5 =", "3 + 5 =", "9 + 5 =", "no problem"]
    found = Solvable(attempts=400).judge([problems(*texts)], policy, CALL)
    assert [each.score for each in found] == [0.0, 1.0, 0.0, 0.0]
    assert found[1].verdicts[0].value == pytest.approx(0.3, abs=0.1)
    assert found[1].verdicts[0].tokens == 800
    assert found[3].reason == "no arithmetic problem"
    again = Solvable(attempts=400).judge([problems(*texts)], policy, CALL)
    assert again == found


def test_barely_solvable_problems_of_the_last_round_are_asked_beside_given_ones() -> None:
    group = problems("3 + 5 =", "9 + 5 =", "30 + 5 =", "3 + 5 =")
    said = [Judgement(candidate_id=n, score=score) for n, score in enumerate([1.0, 0.0, 1.0, 1.0])]

    class History(Past):
        def judged(self, call: Call) -> list[tuple[Group, list[Judgement]]]:
            assert (call.round, call.track) == (1, "conjectures")
            return [(group, said)]

    proposer = Conjectures(WORDS, share=0.5)
    prompts = propose(proposer, 8, past=History(), call=CALL)
    assert len(prompts) == 8
    own = [each for each in prompts if each.task == "conjecture"]
    assert [(each.messages[0].content, each.reference) for each in own] == [
        ("3 + 5 =", "8"),
        ("30 + 5 =", "35"),
    ]
    assert [each.parent_candidate_id for each in own] == [0, 2]
    assert all(each.origin == "proposed" for each in own)
    asked_before = History(before=tuple(own))
    again = propose(proposer, 8, past=asked_before, call=CALL)
    assert not [each for each in again if each.task == "conjecture"]
    assert len(propose(proposer, 8, past=History(), call=Call(seed=2, round=1))) == 8
    assert not [each for each in propose(proposer, 8, "gate", History(), CALL) if each.task]
