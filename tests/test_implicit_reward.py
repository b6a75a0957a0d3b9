"""The judge that reads a reward off a trained model's and its reference's log-probabilities."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import small_model
from judges import Models
from judges.implicit_reward import ImplicitReward, step_ends
from roles.plugins import load
from roles.policy.embedded import build
from roles.policy.transformers import TransformersEngine, TransformersPolicy
from roles.trainers.preference import Preference
from store.errors import UserError
from store.records import (
    Call,
    Candidate,
    Completion,
    Example,
    Group,
    Judgement,
    Message,
    Prompt,
    TokenLogprobs,
)

CALL = Call(seed=2, stage="judge")
LINES = "2 + 3 = 5\n\n5 * 2 = 10\nso it is 10"


def asked(text: str) -> Prompt:
    return Prompt(messages=(Message(role="user", content=text),))


def group_of(policy: TransformersPolicy, number: int, *texts: str) -> Group:
    candidates = []
    for index, text in enumerate(texts):
        wrote = policy.write(text)
        candidates.append(
            Candidate(
                id=10 * number + index,
                asked_id=number,
                index=index,
                text=text,
                token_ids=wrote.token_ids,
            )
        )
    return Group(asked_id=number, prompt=asked(f"say {number}"), candidates=tuple(candidates))


def wanted_and_not(policy: TransformersPolicy, first: int, count: int) -> list[Group]:
    return [
        group_of(policy, number, f"it is {number}.", f"no letters of {number}")
        for number in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TransformersPolicy:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "base"
    build(folder, seed=0)
    return opened(folder)


def opened(folder: Path) -> TransformersPolicy:
    return TransformersEngine(device="cpu").open(small_model.checkpoint(folder))


@pytest.fixture(scope="module")
def trained(
    base: TransformersPolicy, tmp_path_factory: pytest.TempPathFactory
) -> TransformersPolicy:
    """A copy of the base that a few pairs have moved."""
    pairs = [
        Example(
            kind="pair",
            id=group.asked_id,
            asked_id=group.asked_id,
            prompt=group.prompt,
            chosen=group.candidates[0],
            rejected=group.candidates[1],
            rule="test",
        )
        for group in wanted_and_not(base, 1, 24)
    ]
    begun = small_model.checkpoint(base._path)
    into = tmp_path_factory.mktemp("models") / "trained"
    into.mkdir()
    trainer = Preference(learning_rate=3e-4, batch_size=8, device="cpu", dtype="float32")
    assert trainer.train(pairs, begun, begun, into, CALL).status == "trained"
    return opened(into)


def judged(policy: Any, reference: Any, groups: Sequence[Group], **options: Any) -> list[Judgement]:
    models = Models(policy, {"checkpoint:base": reference})
    return ImplicitReward(**options).judge(groups, models, CALL)  # type: ignore[arg-type]


def scores(judgements: Sequence[Judgement]) -> list[float]:
    assert {each.status for each in judgements} == {"ok"}
    return [each.score for each in judgements if each.score is not None]


def ratios(policy: Any, reference: Any, group: Group) -> list[list[float]]:
    """Of each candidate's tokens, one answer at a time."""
    found = []
    for one in group.candidates:
        (own,), (held,) = (model.logprobs([group.prompt], [one]) for model in (policy, reference))
        found.append([a - b for a, b in zip(own.logprobs, held.logprobs, strict=True)])
    return found


def test_a_score_is_beta_times_the_difference_of_the_log_probabilities(
    trained: TransformersPolicy, base: TransformersPolicy
) -> None:
    groups = [*wanted_and_not(base, 100, 3), group_of(base, 200, LINES, "7")]
    plain = [sum(each) for group in groups for each in ratios(trained, base, group)]
    assert max(map(abs, plain)) > 0.5, "the two models are hardly different"
    found = judged(trained, base, groups, beta=1.0)
    assert scores(found) == pytest.approx(plain, abs=1e-4)
    assert [each.candidate_id for each in found] == [
        one.id for group in groups for one in group.candidates
    ]
    half = scores(judged(trained, base, groups, beta=0.5))
    assert half == pytest.approx([each / 2 for each in plain], abs=1e-4)


def test_tokens_and_steps_add_up_to_the_sequence(
    trained: TransformersPolicy, base: TransformersPolicy
) -> None:
    group = group_of(base, 200, LINES, "7", "\n\n7\n")
    whole = scores(judged(trained, base, [group]))
    for by in ("token", "step"):
        found = judged(trained, base, [group], by=by)
        assert scores(found) == pytest.approx(whole, abs=1e-9)
        for judgement, one in zip(found, group.candidates, strict=True):
            kept = json.loads(judgement.verdicts[0].raw)
            assert sum(kept["rewards"]) == pytest.approx(judgement.score, abs=1e-3)
            assert kept["reward"] == pytest.approx(judgement.score, abs=1e-4)
            assert 0.1 * (kept["model"] - kept["reference"]) == pytest.approx(
                judgement.score, abs=1e-4
            )
            if by == "token":
                assert len(kept["rewards"]) == kept["tokens"] == len(one.token_ids)
            else:
                assert len(kept["rewards"]) == len(kept["ends"])
                assert kept["ends"][-1] == len(one.token_ids)


def test_a_step_is_a_line_and_its_reward_is_that_of_its_tokens(
    trained: TransformersPolicy, base: TransformersPolicy
) -> None:
    group = group_of(base, 200, LINES)
    (plain,) = ratios(trained, base, group)
    (judgement,) = judged(trained, base, [group], by="step", beta=1.0)
    kept = json.loads(judgement.verdicts[0].raw)
    ids = group.candidates[0].token_ids
    starts = [0, *kept["ends"][:-1]]
    steps = [base.decode(ids[a:b]) for a, b in zip(starts, kept["ends"], strict=True)]
    assert steps == ["2 + 3 = 5\n\n", "5 * 2 = 10\n", "so it is 10"]
    sums = [sum(plain[a:b]) for a, b in zip(starts, kept["ends"], strict=True)]
    assert kept["rewards"] == pytest.approx(sums, abs=1e-4)
    means = {
        "sum": sum(sums), "mean": sum(sums) / 3, "min": min(sums), "last": sums[-1]
    }  # fmt: skip
    for aggregate, expected in means.items():
        (found,) = judged(trained, base, [group], by="step", aggregate=aggregate, beta=1.0)
        assert found.score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("pieces", "separator", "steps"),
    [
        (["a", "\n", "b"], "\n", ["a\n", "b"]),
        (["a\nb", "c\n", "d"], "\n", ["a\nb", "c\n", "d"]),
        (["a\n", "\n", " ", "\n", "b"], "\n", ["a\n\n \n", "b"]),
        (["\n", "\n", "a", "\n"], "\n", ["\n\na\n"]),
        (["a", "\n\n", "b\n", "c"], "\n\n", ["a\n\n", "b\nc"]),
        (["a", ";", ";", "b;c;d", "e"], ";", ["a;;", "b;c;d", "e"]),
        (["a"], "\n", ["a"]),
        (["", "\n"], "\n", ["\n"]),
    ],
)
def test_every_token_belongs_to_one_step(
    pieces: list[str], separator: str, steps: list[str]
) -> None:
    def decode(ids: Sequence[int]) -> str:
        return "".join(pieces[each] for each in ids)

    ends = step_ends(range(len(pieces)), decode, separator)
    starts = [0, *ends[:-1]]
    assert all(a < b for a, b in zip(starts, ends, strict=True))
    assert [decode(range(a, b)) for a, b in zip(starts, ends, strict=True)] == steps


def test_steps_are_found_among_characters_of_several_tokens(base: TransformersPolicy) -> None:
    ids = base.write("é😀\n\n日本語 😀é\n🙂").token_ids
    ends = step_ends(ids, base.decode, "\n")
    steps = [base.decode(ids[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    assert steps == ["é😀\n\n", "日本語 😀é\n", "🙂"]


def test_a_model_that_is_its_reference_gives_0(base: TransformersPolicy) -> None:
    found = judged(base, base, wanted_and_not(base, 1, 3), by="token", aggregate="min")
    assert scores(found) == [0.0] * 6


def test_it_prefers_what_the_model_was_trained_toward(
    trained: TransformersPolicy, base: TransformersPolicy
) -> None:
    found = scores(judged(trained, base, wanted_and_not(base, 100, 20)))
    assert sum(found[at] > found[at + 1] for at in range(0, 40, 2)) >= 19


def test_a_token_can_cost(trained: TransformersPolicy, base: TransformersPolicy) -> None:
    group = group_of(base, 200, LINES, "7")
    free = scores(judged(trained, base, [group]))
    dear = scores(judged(trained, base, [group], length_weight=0.5))
    cost = [0.5 * len(one.token_ids) for one in group.candidates]
    assert dear == pytest.approx([a - b for a, b in zip(free, cost, strict=True)])


def test_tokens_that_the_model_did_not_write_have_no_reward(
    trained: TransformersPolicy, base: TransformersPolicy
) -> None:
    group = group_of(base, 200, LINES)
    (one,) = group.candidates
    tool = step_ends(one.token_ids, base.decode, "\n")[1]
    mask = tuple(place >= tool for place in range(len(one.token_ids)))
    masked = replace(group, candidates=(replace(one, trained_mask=mask),))
    (plain,) = ratios(trained, base, group)
    (found,) = judged(trained, base, [masked], by="step", beta=1.0)
    kept = json.loads(found.verdicts[0].raw)
    assert found.score == pytest.approx(math.fsum(plain[tool:]), abs=1e-4)
    assert (len(kept["rewards"]), kept["tokens"]) == (1, sum(mask))


def test_an_answer_without_tokens_or_too_long_is_failed(
    trained: TransformersPolicy, base: TransformersPolicy
) -> None:
    group = group_of(base, 1, "7", "8", "9")
    first, second, third = group.candidates
    candidates = (replace(first, token_ids=()), second, replace(third, token_ids=(9,) * 600))
    empty, fine, long = judged(trained, base, [replace(group, candidates=candidates)])
    assert (empty.status, empty.score) == ("failed", None)
    assert empty.reason == "the answer has no token that a model wrote"
    assert fine.score == pytest.approx(scores(judged(trained, base, [group]))[1], abs=1e-6)
    assert long.status == "failed"
    assert "too long for the context" in str(long.reason)


def test_a_probability_that_is_not_finite_is_failed(
    trained: TransformersPolicy, base: TransformersPolicy
) -> None:
    class Hopeless:
        """Says of answers that begin with a 7 that they cannot be."""

        def __getattr__(self, name: str) -> Any:
            return getattr(base, name)

        def logprobs(
            self, prompts: Sequence[Prompt], completions: Sequence[Completion]
        ) -> list[TokenLogprobs]:
            found = base.logprobs(prompts, completions)
            return [
                replace(each, logprobs=(-math.inf, *each.logprobs[1:]))
                if one.text.startswith("7")
                else each
                for each, one in zip(found, completions, strict=True)
            ]

    sure, fine = judged(trained, Hopeless(), [group_of(base, 1, "7", "8")])
    assert (sure.status, fine.status) == ("failed", "ok")
    assert "no finite probability" in str(sure.reason)


def test_the_models_are_asked_one_after_the_other(base: TransformersPolicy) -> None:
    asked_of: list[str] = []

    class Watched:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, name: str) -> Any:
            asked_of.append(self.name)
            return getattr(base, name)

    groups = wanted_and_not(base, 1, 3)
    judged(Watched("own"), Watched("held"), groups, by="step")
    turn = asked_of.index("held")
    assert set(asked_of[:turn]) == {"own"}
    assert set(asked_of[turn:]) == {"held"}


def test_what_it_cannot_compare_is_said(base: TransformersPolicy, tmp_path: Path) -> None:
    groups = wanted_and_not(base, 1, 1)
    with pytest.raises(UserError, match=r"needs log-probabilities, and judge\.model gives none"):
        ImplicitReward().judge(groups, None, CALL)
    with pytest.raises(UserError, match="was handed one model alone"):
        ImplicitReward().judge(groups, base, CALL)
    other = opened(small_model.build(tmp_path / "other"))
    with pytest.raises(UserError, match="both need one tokenizer and chat template"):
        judged(base, other, groups)
    with pytest.raises(UserError, match="is one reward; set by"):
        load("judge", "implicit_reward", {"aggregate": "min"})
    with pytest.raises(UserError, match="takes length_weight off a sum"):
        load("judge", "implicit_reward", {"by": "token", "aggregate": "mean", "length_weight": 1})
    with pytest.raises(UserError, match="beta"):
        load("judge", "implicit_reward", {"beta": 0})
    named = load("judge", "implicit_reward", {"reference": "checkpoint:some/where"})
    assert named.models == ("checkpoint:some/where",)
