"""Generators with a real tiny policy."""

from __future__ import annotations

import random

import pytest

from roles import plugins
from roles.generators.demonstrations import Demonstrations, with_mistake
from roles.generators.recorded import Recorded
from roles.generators.sampler import Sampler
from roles.policy.embedded import build
from roles.policy.transformers import TransformersEngine
from roles.protocols import Generator, Policy
from store.errors import UserError
from store.records import Call, Checkpoint, Message, Prompt


def ask(text: str, **rest: object) -> Prompt:
    return Prompt(messages=(Message(role="user", content=text),), **rest)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    path = tmp_path_factory.mktemp("embedded")
    build(path, seed=0)
    return TransformersEngine(device="cpu").open(
        Checkpoint(
            model="main", path=path, digest="d", tokenizer_digest="t", template_digest="c", bytes=1
        )
    )


def test_the_sampler_gives_n_different_completions_of_each_prompt(policy: Policy) -> None:
    groups = Sampler(n=3, max_tokens=6).generate([ask("Why?"), ask("How?")], policy, Call())
    assert [len(group) for group in groups] == [3, 3]
    assert len({completion.token_ids for group in groups for completion in group}) == 6
    assert all(len(completion.token_ids) <= 6 for group in groups for completion in group)


def test_what_the_sampler_draws_hangs_on_run_round_prompt_and_index_and_not_on_company(
    policy: Policy,
) -> None:
    sampler = Sampler(n=2, max_tokens=6)
    why, how = ask("Why?"), ask("How?")
    both = sampler.generate([why, how], policy, Call(seed=1))
    assert sampler.generate([how], policy, Call(seed=1))[0][0].seed == both[1][0].seed
    assert [c.token_ids for c in sampler.generate([how], policy, Call(seed=1))[0]] == [
        c.token_ids for c in both[1]
    ]
    assert sampler.generate([why, how], policy, Call(seed=2)) != both
    assert sampler.generate([why, how], policy, Call(seed=1, round=1)) != both


def test_the_samplers_settings_reach_the_policy(policy: Policy) -> None:
    options = {"n": 2, "temperature": 0, "max_tokens": 5, "stop": ["###"]}
    sampler = plugins.load("generator", "sampler", options)
    assert isinstance(sampler, Generator)
    first, second = sampler.generate([ask("Why?")], policy, Call())[0]
    assert first.token_ids == second.token_ids
    assert first.sampling is not None
    assert first.sampling.stop == ("###",)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_tokens": 0},
        {"stop": [""]},
        {"beams": 3},
    ],
)
def test_an_option_out_of_bounds_is_the_users_mistake(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        plugins.load("generator", "sampler", options)


def test_a_demonstration_is_the_reference_answer_as_the_policy_writes_it(policy: Policy) -> None:
    prompts = [ask("2 + 2?", reference="4"), ask("3 + 3?", reference="6")]
    groups = Demonstrations().generate(prompts, policy, Call())
    assert groups == [[policy.write("4")], [policy.write("6")]]


def test_a_demonstration_can_come_from_a_column(policy: Policy) -> None:
    prompt = ask("2 + 2?", reference="4", columns={"worked": "2 + 2 = 4"})
    groups = Demonstrations(column="worked").generate([prompt], policy, Call())
    assert groups[0][0].text == "2 + 2 = 4"


@pytest.mark.parametrize("column", [None, "worked"])
def test_a_prompt_with_nothing_to_demonstrate_is_named(policy: Policy, column: str | None) -> None:
    with pytest.raises(UserError, match=r"'Why\?' has no (reference|text)"):
        Demonstrations(column=column).generate([ask("Why?")], policy, Call())


RECORDED = {
    "recorded": [
        {"chosen": "Because.", "rejected": "No."},
        {"chosen": "So.", "rejected": "No."},
        {"completion": "Well.", "label": False},
        {"completion": "Hm."},
    ]
}


def test_without_a_reference_a_demonstration_is_a_wanted_answer_of_the_data(policy: Policy) -> None:
    prompt = ask("Why?", columns=RECORDED)
    (group,) = Demonstrations(n=4).generate([prompt], policy, Call())
    assert [each.text for each in group] == ["Because.", "So.", "Hm.", "Because."]
    (group,) = Demonstrations().generate(
        [ask("Why?", columns=RECORDED, reference="R")], policy, Call()
    )
    assert [each.text for each in group] == ["R"]


def test_recorded_answers_are_candidates_once_each_and_in_their_order(policy: Policy) -> None:
    (group,) = Recorded().generate([ask("Why?", columns=RECORDED)], policy, Call())
    assert group == [policy.write(text) for text in ("Because.", "No.", "So.", "Well.", "Hm.")]


def test_recorded_answers_that_do_not_fit_behind_the_prompt_are_left_out(policy: Policy) -> None:
    long = {"recorded": [{"completion": "word " * 600}]}
    groups = Recorded().generate(
        [ask("Why?", columns=long), ask("Why?", columns=RECORDED)], policy, Call()
    )
    assert [len(group) for group in groups] == [0, 5]


def test_a_prompt_without_a_recorded_answer_is_named(policy: Policy) -> None:
    with pytest.raises(UserError, match=r"'Why\?' has no recorded answer; the proposer 'dataset'"):
        Recorded().generate([ask("Why?", reference="R")], policy, Call())


def test_mistakes_are_as_frequent_as_asked_and_the_same_every_time(policy: Policy) -> None:
    prompts = [ask(f"{n} + {n}?", reference=f"{2 * n}") for n in range(10, 410)]
    generator = Demonstrations(mistakes=0.4)
    groups = generator.generate(prompts, policy, Call(seed=3))
    wrong = [
        (prompt.reference, group[0].text)
        for prompt, group in zip(prompts, groups, strict=True)
        if group[0].text != prompt.reference
    ]
    assert 0.3 < len(wrong) / len(prompts) < 0.5
    assert generator.generate(prompts[::-1], policy, Call(seed=3)) == groups[::-1]
    for right, text in wrong:
        assert right is not None
        assert text.isdigit()
        assert sum(a != b for a, b in zip(right, text, strict=True)) == 1


def test_a_mistake_keeps_a_characters_class() -> None:
    for seed in range(50):
        digit, lower, upper = (
            with_mistake(text, random.Random(seed)) for text in ("-7.", "é b", "É B")
        )
        assert digit != "-7."
        assert digit[1].isdigit()
        assert lower[:2] == "é "
        assert lower[2].islower()
        assert lower != "é b"
        assert upper[2].isupper()
        assert upper != "É B"


def test_text_without_digits_and_letters_is_rotated_or_left() -> None:
    assert with_mistake("+-", random.Random(0)) == "-+"
    assert with_mistake("?", random.Random(0)) == "?"
    assert with_mistake("", random.Random(0)) == ""


def test_demonstrations_are_a_plug_in_whose_share_of_mistakes_has_bounds() -> None:
    assert isinstance(plugins.load("generator", "demonstrations", {"mistakes": 0.4}), Generator)
    with pytest.raises(UserError, match="mistakes"):
        plugins.load("generator", "demonstrations", {"mistakes": 1.5})


def test_demonstrations_can_begin_with_a_line_that_people_write_before_an_answer(
    policy: Policy,
) -> None:
    wordy = Demonstrations(n=40, preamble="well", preambles=3)
    (made,) = wordy.generate([ask("Why?", reference="So.")], policy, Call(seed=1))
    assert {one.text for one in made} == {"well\n" * n + "So." for n in range(4)}
    with pytest.raises(UserError, match="need a preamble and how many"):
        Demonstrations(preamble="well")


def test_demonstrations_can_stop_early_the_way_people_do(policy: Policy) -> None:
    short = Demonstrations(n=60, cut=(2, 4))
    (made,) = short.generate([ask("Why?", reference="drawer")], policy, Call(seed=1))
    assert {one.text for one in made} == {"dr", "dra", "draw"}
    assert short.generate([ask("Why?", reference="drawer")], policy, Call(seed=1)) == [made]
    with pytest.raises(UserError, match=r"from the least to the most; found \[3, 2\]"):
        Demonstrations(cut=(3, 2))
