"""Generators that make several kinds of candidates, and the judge that goes by the kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from judges.made_as import MadeAs
from roles.generators.demonstrations import Demonstrations
from roles.generators.joined import Joined
from roles.generators.revised import Revised
from roles.generators.sampler import Sampler
from roles.generators.steered import Steered
from roles.protocols import Policy
from shown import ask, embedded
from store.errors import UserError
from store.records import (
    Call,
    Candidate,
    Completion,
    Group,
    Message,
    Prompt,
    Sampling,
    TokenLogprobs,
)

CALL = Call(seed=1, round=2, stage="generate")
BRIEF: dict[str, Any] = {"critique": "critique_brief", "revise": "revise_brief", "nonce": False}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return embedded(tmp_path_factory.mktemp("embedded"))


# Joined


def test_joined_gives_every_parts_completions_in_order(policy: Policy) -> None:
    joined = Joined(
        [
            {"use": "demonstrations"},
            {"use": "sampler", "n": 2, "max_tokens": 4},
            {"use": "sampler", "n": 2, "max_tokens": 4},
        ]
    )
    (made,) = joined.generate([ask("Why?", reference="Because.")], policy, CALL)
    assert made[0].text == "Because."
    assert made[0].sampling is None
    assert len(made) == 5
    # Two parts that are told the same do not draw the same.
    assert {one.token_ids for one in made[1:3]} != {one.token_ids for one in made[3:]}
    assert joined.generate([ask("Why?", reference="Because.")], policy, CALL) == [made]


def test_a_prompt_that_one_part_cannot_answer_gets_nothing(policy: Policy) -> None:
    joined = Joined([{"use": "demonstrations"}, "sampler"])
    assert joined.generate([ask("x " * 600, reference="y")], policy, CALL) == [[]]
    with pytest.raises(UserError, match="part 0 of joined is a table of a generator"):
        Joined([{"n": 3}])


# Steered


def test_steered_answers_follow_a_principle_and_are_kept_without_it(policy: Policy) -> None:
    steered = Steered(good="Be right.", bad="Be wrong.", n=3, plain=2, max_tokens=5)
    prompts = [ask("Why?"), ask("How?")]
    made = steered.generate(prompts, policy, CALL)
    for prompt, own in zip(prompts, made, strict=True):
        assert [one.made_as for one in own] == ["good"] * 3 + ["bad"] * 3 + [None] * 2
        alone = policy.logprobs([prompt] * len(own), own)
        assert [one.logprob for one in own] == pytest.approx([one.total for one in alone], abs=1e-4)
    # What was sampled is what the policy says after the principle.
    asked = Prompt(
        messages=(Message(role="system", content="Be right."), *prompts[0].messages),
    )
    seeds = [[one.seed or 0 for one in made[0][:3]]]
    (again,) = policy.sample([asked], sampling=steered.sampling, seeds=seeds)
    assert [one.token_ids for one in again] == [one.token_ids for one in made[0][:3]]


def test_a_principle_stands_behind_the_system_prompt_that_there_is(policy: Policy) -> None:
    from roles.proposers.messages import steered

    system = Message(role="system", content="You are brief.")
    said = steered((system, Message(role="user", content="Why?")), "Be right.")
    assert [each.content for each in said] == ["You are brief.\n\nBe right.", "Why?"]


def test_how_many_candidates_there_will_be_is_known_before_a_run() -> None:
    steered = Steered(good="a", bad="b", n=3, plain=2)
    joined = Joined([{"use": "demonstrations"}, {"use": "sampler", "n": 4}])
    assert (steered.n, Revised(n=3).n, joined.n) == (8, 6, 5)
    recorded = Joined([{"use": "recorded"}, {"use": "sampler", "n": 4, "max_tokens": 5}])
    assert (recorded.n, recorded.most_tokens) == (None, 20)


class Counting:
    """A policy that counts what is sampled of it."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.tokens = policy, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def sample(self, *args: Any, **options: Any) -> list[list[Completion]]:
        made = self.policy.sample(*args, **options)
        self.tokens += sum(len(one.token_ids) for own in made for one in own)
        return made


SAMPLED = {
    "sampler": Sampler(n=3, max_tokens=5),
    "steered": Steered(good="a", bad="b", n=3, plain=2, max_tokens=5),
    "revised": Revised(n=3, max_tokens=5, critique_tokens=7, **BRIEF),
    "extended": Revised(n=3, max_tokens=5, revise="extend_brief", nonce=False),
    "joined": Joined([{"use": "demonstrations"}, {"use": "sampler", "n": 4, "max_tokens": 5}]),
    "demonstrations": Demonstrations(n=4),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_no_more_is_sampled_than_was_said_before_and_hardly_less(name: str, policy: Policy) -> None:
    """Of random weights, which hardly ever end an answer."""
    counting, made = Counting(policy), SAMPLED[name]
    prompts = [ask(f"What is {n}?", reference="4") for n in range(8)]
    made.generate(prompts, cast(Policy, counting), CALL)
    assert 0.7 * made.most_tokens <= counting.tokens / len(prompts) <= made.most_tokens


def test_made_as_scores_a_candidate_by_its_kind_and_nothing_else() -> None:
    candidates = tuple(
        Candidate(id=n, asked_id=1, index=n, text="same", token_ids=(n,), made_as=kind)
        for n, kind in enumerate(["good", "bad", None, "odd"])
    )
    group = Group(asked_id=1, prompt=ask("Why?"), candidates=candidates)
    found = MadeAs({"good": 1.0, "bad": 0.0, "plain": 0.5}).judge([group], None, CALL)
    assert [each.score for each in found] == [1.0, 0.0, 0.5, None]
    assert found[3].reason == "made as odd, which has no score"
    with pytest.raises(UserError, match="needs scores"):
        MadeAs({})


# Revised


class Writer:
    """Answers "wrong" or "right" by the seed, finds fault with what is not right, and mends it;
    what it mends on the prompt "stubborn" is wrong again."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        return [
            [self._said(prompt.messages[-1].content, seed, sampling) for seed in own]
            for prompt, own in zip(prompts, seeds, strict=True)
        ]

    def _said(self, asked: str, seed: int, sampling: Sampling) -> Completion:
        self.asked.append(asked)
        if asked.endswith("Wrong?"):
            found = "Verdict: good" if "\nright\n" in asked else "It is wrong.\nVerdict: mend"
        elif asked.endswith("Anew:"):
            assert "Verdict: mend" in asked
            found = "wrong again" if "stubborn" in asked else "right"
        elif asked.endswith("Longer:"):
            found = asked.splitlines()[-3] + " and more"
        else:
            found = "right" if seed % 2 else "wrong"
        ids = tuple(found.encode())
        return Completion(text=found, token_ids=ids, seed=seed, sampling=sampling, logprob=-9.0)

    def logprobs(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], **_: Any
    ) -> list[TokenLogprobs]:
        return [TokenLogprobs(logprobs=(-0.5,) * len(one.token_ids)) for one in completions]


def test_an_answer_that_is_found_good_stands_alone_and_another_is_mended() -> None:
    writer: Any = Writer()
    (made,) = Revised(n=6, **BRIEF).generate([ask("easy")], writer, CALL)  # type: ignore[arg-type]
    kinds = [(one.text, one.made_as) for one in made]
    firsts = [one for one in made if one.made_as == "first"]
    assert set(kinds) == {("right", "accepted"), ("wrong", "first"), ("right", "revised")}
    assert len(made) == 6 + len(firsts)
    for place, one in enumerate(made):
        if one.made_as == "first":
            assert made[place + 1].text == "right"
            assert made[place + 1].made_with == "It is wrong.\nVerdict: mend"
            # Its log-probability is that of an answer to the prompt itself.
            assert made[place + 1].logprob == pytest.approx(-0.5 * len("right"))


def test_a_revision_that_is_found_fault_with_is_kept_as_unsettled() -> None:
    writer: Any = Writer()
    (made,) = Revised(n=4, **BRIEF).generate([ask("stubborn")], writer, CALL)  # type: ignore[arg-type]
    after = {one.made_as for one in made if one.text == "wrong again"}
    assert after == {"unsettled"}


def test_without_a_critique_every_answer_is_extended_and_nobody_is_asked_for_one() -> None:
    writer: Any = Writer()
    extending = Revised(n=2, revise="extend_brief", nonce=False)
    (made,) = extending.generate([ask("easy")], writer, CALL)
    assert [one.made_as for one in made] == ["first", "revised"] * 2
    assert [one.text for one in made[1::2]] == [f"{one.text} and more" for one in made[::2]]
    assert [one.made_with for one in made[1::2]] == [one.text for one in made[::2]]
    assert not [asked for asked in writer.asked if asked.endswith("Wrong?")]


def test_a_text_to_ask_with_is_refused_at_the_start_when_it_will_not_do(tmp_path: Path) -> None:
    lacking = tmp_path / "mine.txt"
    lacking.write_text("Say it again: {answer}")
    with pytest.raises(UserError, match=r"lacks \{question\}"):
        Revised(revise_path=lacking)
    with pytest.raises(UserError, match=r"no prompt named 'critik'.*critique"):
        Revised(critique="critik")
    with pytest.raises(UserError, match="is no pattern"):
        Revised(accepts="(")


def test_a_real_policy_is_asked_to_revise_and_every_answer_is_kept(policy: Policy) -> None:
    revised = Revised(n=2, max_tokens=4, critique_tokens=4, **BRIEF)  # type: ignore[arg-type]
    (made,) = revised.generate([ask("Why?")], policy, CALL)
    assert [one.made_as for one in made] == ["first", "unsettled"] * 2  # it says nothing sensible
    assert all(one.made_with is not None for one in made[1::2])
    assert revised.generate([ask("Why?")], policy, CALL) == [made]
