"""Proposing prompts: what the policy is shown, which of its prompts are kept, and likeness."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from roles import plugins
from roles.policy.embedded import build
from roles.policy.transformers import TransformersEngine
from roles.proposers.proposing import Proposing
from roles.proposers.self_instruct import SelfInstruct, last_asked
from roles.proposers.similarity import NearTexts, common_words, rouge_l, words_of
from roles.protocols import Proposer
from runs import SCRIPTED, everything, loop, scripted_toml, start
from store.errors import UserError
from store.records import Call, Checkpoint, Completion, Message, Prompt
from test_proposers import digests, write

CALL = Call(seed=3, round=1, stage="propose")
SELF_INSTRUCT = "roles.proposers.self_instruct:SelfInstruct"


@dataclass(frozen=True)
class Past:
    """A run's prompts so far, as a proposer may ask for them."""

    so_far: tuple[Prompt, ...] = ()

    def asked(self):
        return frozenset(one.digest for one in self.so_far if one.split == "train")

    def held_out(self):
        return frozenset(one.digest for one in self.so_far if one.split != "train")

    def prompts(self, *splits):
        return [one for split in splits for one in self.so_far if one.split == split]


@dataclass
class Writer:
    """A policy that says what it is told to, each seed one of the answers."""

    answers: list[str]
    cut: bool = False
    room: int = 100_000
    asked: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def sample(self, prompts, *, sampling, seeds):
        self.asked += [prompt.messages[-1].content for prompt in prompts]
        self.seeds += [seed for own in seeds for seed in own]
        return [
            [self._say(seed, sampling) for seed in own]
            if len(prompt.messages[-1].content) < self.room
            else []
            for prompt, own in zip(prompts, seeds, strict=True)
        ]

    def _say(self, seed, sampling):
        text = random.Random(seed).choice(self.answers)
        reason = "length" if self.cut else "stop"
        return Completion(
            text=text, token_ids=(1,), finish_reason=reason, seed=seed, sampling=sampling
        )


NEW = [
    f"Tell me of {thing}: its {thing}ness, {thing}hood and {thing}dom."
    for thing in ("tide", "bread", "chess", "moss", "ferry", "violin", "comet", "loom", "otter")
]


@pytest.fixture
def seeds(tmp_path):
    rows = [{"prompt": f"Explain {word} to a child who is {n}."} for n, word in enumerate(WORDS)]
    return write(tmp_path / "seeds.jsonl", *rows)


WORDS = ("gravity", "money", "sleep", "rain", "taxes", "yeast", "echoes", "rust", "thunder", "salt")


def ask(text, **more):
    return Prompt(messages=(Message(role="user", content=text),), **more)


def propose(proposer, count, policy, past=Past(), split="train", call=CALL):
    return proposer.propose(count, split, past, policy, call)


def contents(prompts):
    return [prompt.messages[-1].content for prompt in prompts]


def test_a_proposal_is_sampled_behind_examples_of_seed_prompts(seeds):
    policy = Writer(NEW)
    made = propose(SelfInstruct(seeds, shots=3), 5, policy)
    assert len(made) == 5
    assert set(contents(made)) <= set(NEW)
    assert policy.asked[0].count("<prompt>\nExplain ") == 3
    assert "{shots}" not in policy.asked[0]
    assert len(set(policy.asked)) > 5
    assert len(set(policy.seeds)) == len(policy.seeds)
    for prompt in made:
        assert (prompt.origin, prompt.split, prompt.reference) == ("proposed", "train", None)
        assert len(prompt.columns["shots"]) == 3


def test_proposals_are_the_same_for_the_same_call_and_others_for_another(seeds):
    first = propose(SelfInstruct(seeds), 6, Writer(NEW))
    assert first == propose(SelfInstruct(seeds), 6, Writer(NEW))
    other = propose(SelfInstruct(seeds), 6, Writer(NEW), call=Call(seed=3, round=2))
    assert digests(first) != digests(other)


def test_some_examples_are_proposals_of_earlier_rounds_and_the_first_stored_is_the_parent(seeds):
    earlier = tuple(ask(f"An earlier idea on {n}", origin="proposed", id=70 + n) for n in range(5))
    other = ask("Asked of the seeds before", id=99)
    policy = Writer(NEW)
    made = propose(SelfInstruct(seeds, own=2), 4, policy, Past((*earlier, other)))
    assert {text.count("An earlier idea") for text in policy.asked} == {2}
    assert {text.count("Explain") for text in policy.asked} == {6}
    assert not any("Asked of the seeds" in text for text in policy.asked)
    ids = {one.digest: one.id for one in earlier}
    for prompt in made:
        shown = [ids[digest] for digest in prompt.columns["shots"] if digest in ids]
        assert prompt.parent_prompt_id == shown[0]


@pytest.mark.parametrize("split", ["train", "gate", "test", "anchor"])
def test_a_prompt_like_an_earlier_or_held_out_one_is_left_out(seeds, split):
    held = ask("Why would anybody care about tides?", split=split)
    like = "Why would anybody ever care about tides?"
    assert rouge_l(like, held.messages[0].content) > 0.7
    made = propose(SelfInstruct(seeds), 3, Writer([like, *NEW]), Past((held,)))
    assert made
    assert like not in contents(made)
    assert like in contents(propose(SelfInstruct(seeds), 3, Writer([like])))


def test_prompts_of_one_batch_and_seed_prompts_are_not_repeated(seeds):
    answers = ["Name a river that flows north.", "Name one river that flows north."]
    assert len(propose(SelfInstruct(seeds), 2, Writer(answers))) == 1
    with pytest.raises(UserError, match="too like another 12"):
        propose(SelfInstruct(seeds), 3, Writer(["Explain gravity to a child who is 0."]))


def test_without_a_limit_only_the_same_text_is_left_out(seeds):
    answers = ["Name a river that flows north.", "Name one river that flows north."]
    made = propose(SelfInstruct(seeds, similarity=1.0), 3, Writer(answers))
    assert sorted(contents(made)) == answers


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("<prompt>\nWhy is the sky blue?\n</prompt>\nIt is not.", "Why is the sky blue?"),
        ("Here is one: <prompt>Why is the sky blue?", "Why is the sky blue?"),
        (" Why is the sky blue? ", "Why is the sky blue?"),
        ("9. Why is the sky blue?", "Why is the sky blue?"),
        ("空はなぜ青いのですか", "空はなぜ青いのですか"),
        ("¿Por qué es azul el cielo?", "¿Por qué es azul el cielo?"),
    ],
)
def test_an_answer_is_one_prompt_without_what_is_around_it(seeds, said, kept):
    assert contents(propose(SelfInstruct(seeds), 1, Writer([said]))) == [kept]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("", "no text"),
        ("?!", "no text"),
        ("Why is the sky \ufffd blue?", "no text"),
        ("Why is the sky \x07 blue?", "no text"),
        ("- why is the sky blue?", "begins with punctuation"),
        ("Why so blue?", "too short"),
        ("blue " * 151, "too long"),
        ("Draw the image of a sky.", "banned word"),
    ],
)
def test_what_is_no_prompt_is_counted_with_its_reason(seeds, said, reason):
    proposer = SelfInstruct(seeds, banned=("Image",))
    with pytest.raises(UserError, match=rf"0 of 2 kept; lost: {reason} 8\)"):
        propose(proposer, 2, Writer([said]))


def test_a_cut_off_answer_is_kept_only_if_its_prompt_was_closed(seeds):
    with pytest.raises(UserError, match="cut off 8"):
        propose(SelfInstruct(seeds), 2, Writer(["<prompt>Why is the sky"], cut=True))
    closed = Writer(["<prompt>Why is the sky blue?</prompt> Because"], cut=True)
    assert contents(propose(SelfInstruct(seeds), 1, closed)) == ["Why is the sky blue?"]


def test_examples_longer_than_the_context_are_told(seeds):
    with pytest.raises(UserError, match="question longer than the context 8"):
        propose(SelfInstruct(seeds), 2, Writer(NEW, room=50))


def test_samples_are_bounded_and_fewer_prompts_than_asked_for_are_said(seeds, caplog):
    policy = Writer(NEW[:2])
    made = propose(SelfInstruct(seeds, attempts=3), 30, policy)
    assert len(made) == 2
    assert len(policy.asked) == 90
    assert "90 sampled, 2 of 30 kept; lost: too like another 88" in caplog.text


def test_a_share_is_proposed_and_the_rest_comes_from_the_source(seeds):
    made = propose(SelfInstruct(seeds, seeds=5, share=0.25), 8, Writer(NEW))
    assert [prompt.origin for prompt in made] == ["seed"] * 6 + ["proposed"] * 2
    assert len(set(digests(made))) == 8


def test_prompts_that_are_held_out_come_from_the_source(seeds):
    policy = Writer(NEW)
    gate = propose(SelfInstruct(seeds), 3, policy, split="gate")
    assert {(prompt.split, prompt.origin) for prompt in gate} == {("gate", "seed")}
    assert not policy.asked


def test_another_proposer_can_be_the_source(seeds):
    table = {"use": "reasoning_gym", "tasks": [{"name": "gcd"}]}
    proposer = plugins.load("proposer", SELF_INSTRUCT, {"proposer": table, "seeds": 4})
    assert isinstance(proposer, Proposer)
    policy = Writer(NEW)
    assert len(propose(proposer, 2, policy)) == 2
    assert policy.asked[0].count("Greatest Common Divisor") == 4


def test_a_system_prompt_stands_before_seeds_and_proposals_alike(seeds):
    proposer = SelfInstruct(seeds, system="Be brief.", share=0.5)
    made = propose(proposer, 4, Writer(NEW))
    assert [prompt.messages[0].content for prompt in made] == ["Be brief."] * 4


def test_a_template_of_ones_own_needs_no_examples(seeds, tmp_path):
    template = tmp_path / "ask.txt"
    template.write_text("Propose a prompt.\n")
    options = {"path": str(seeds), "template_path": str(template)}
    policy = Writer(NEW)
    made = propose(plugins.load("proposer", SELF_INSTRUCT, options), 5, policy)
    assert len(made) == 5
    assert set(policy.asked) == {"Propose a prompt."}
    assert {len(prompt.columns["shots"]) for prompt in made} == {0}
    assert len(set(policy.seeds)) == len(policy.asked)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "found neither"),
        ({"path": "seeds.jsonl", "proposer": {"use": "reasoning_gym"}}, "found both"),
        ({"proposer": {"tasks": []}}, "is a table of a proposer"),
        ({"proposer": {"use": "reasoning_gim"}}, "did you mean 'reasoning_gym'"),
        ({"proposer": {"use": "reasoning_gym", "task": []}}, "did you mean 'tasks'"),
        ({"path": "seeds.jsonl", "share": 0}, "share"),
        ({"path": "seeds.jsonl", "template_path": "none.txt"}, "cannot read .* template"),
        ({"path": "seeds.jsonl", "template_path": "empty.txt"}, "is empty"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_at_the_start(seeds, monkeypatch, options, words):
    monkeypatch.chdir(seeds.parent)
    Path("empty.txt").write_text(" ")
    with pytest.raises(UserError, match=words):
        plugins.load("proposer", SELF_INSTRUCT, options)


def test_a_run_that_is_told_to_stop_stops_between_batches(seeds):
    policy = Writer(["?"])
    stopping = Call(seed=3, stopping=lambda: len(policy.asked) >= 64)
    with pytest.raises(KeyboardInterrupt):
        propose(SelfInstruct(seeds), 100, policy, call=stopping)
    assert len(policy.asked) == 64


def test_a_real_model_proposes_the_same_prompts_again_none_of_them_held_out(seeds, tmp_path):
    build(tmp_path / "model", seed=0)
    policy = TransformersEngine(device="cpu").open(
        Checkpoint(
            model="main",
            path=tmp_path / "model",
            digest="d",
            tokenizer_digest="t",
            template_digest="c",
            bytes=1,
        )
    )
    # It has learnt nothing: what it writes is short and without a meaning.
    proposer = SelfInstruct(
        seeds, shots=2, max_tokens=30, min_words=1, temperature=1.0, top_p=1.0, stop=("e", "a", " ")
    )
    first = propose(proposer, 8, policy)
    assert first == propose(proposer, 8, policy)
    held = Past((ask(first[0].messages[0].content, split="test"),))
    again = propose(proposer, 8, policy, held)
    assert again
    assert first[0].digest not in digests(again)


def test_a_run_stores_its_proposals_with_the_proposal_they_came_from(tmp_path):
    file = scripted_toml(tmp_path)
    (tmp_path / "short.txt").write_text("{shots}")  # the scripted policy's context is 100 letters
    text = file.read_text().replace(f'proposer = "{SCRIPTED}:Sums"', "")
    file.write_text(
        text.replace('use = "right_wrong"', 'use = "everything"')
        + f"""
[proposer]
use = "{SELF_INSTRUCT}"
proposer = {{ use = "{SCRIPTED}:Sums" }}
template_path = "short.txt"
shots = 1
own = 1
min_words = 1
share = 0.1
attempts = 50
"""
    )
    root, outcome = start(file, tmp_path / "runs", ["rounds=2"])
    assert outcome.code == 0
    made = [row for row in everything(root)["prompt"] if row["origin"] == "proposed"]
    # The policy answers what has no right answer with 0 to 5, so that two a round are new twice.
    assert len(made) == 4
    assert [row["parent_prompt_id"] for row in made[:2]] == [None, None]
    assert {row["parent_prompt_id"] for row in made[2:]} <= {row["id"] for row in made[:2]}
    assert loop("verify", root).returncode == 0


# ROUGE-L


def plain_common_words(one, other):
    """The textbook's table."""
    above = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for n, against in enumerate(other):
            row.append(above[n] + 1 if word == against else max(above[n + 1], row[n]))
        above = row
    return above[-1]


def test_the_common_words_are_those_of_the_plain_table():
    chance = random.Random(0)
    for _ in range(500):
        one, other = (
            [chance.choice("abcd") for _ in range(chance.randrange(90))] for _ in range(2)
        )
        assert common_words(one, other) == plain_common_words(one, other)


def test_rouge_l_is_the_harmonic_mean_of_what_each_text_has_of_the_other():
    # Lin 2004, section 3.1: the candidates "police kill the gunman" and "the gunman kill police"
    # of "police killed the gunman" have common subsequences of 3 and 2 of 4 words.
    assert rouge_l("police killed the gunman", "Police kill the gunman!") == 0.75
    assert rouge_l("police killed the gunman", "the gunman kill police") == 0.5
    assert rouge_l("a b c d", "a b") == pytest.approx(2 * 2 / 6)
    assert rouge_l("?", "!") == 0.0
    assert words_of("Don't say 水曜日 twice") == ["don", "t", "say", "水", "曜", "日", "twice"]


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.7, 1.0])
def test_the_bounds_never_change_what_is_near(limit):
    chance = random.Random(1)
    texts = [
        " ".join(chance.choice("abcdefgh") for _ in range(chance.randint(1, 12)))
        for _ in range(300)
    ]
    near = NearTexts(limit, texts[:150])
    found = [near.near(text) for text in texts[150:]]
    plain = []
    for text in texts[150:]:
        hits = (
            known
            for known in texts[:150]
            if known == text
            or 2 * plain_common_words(known.split(), text.split())
            > limit * (len(known.split()) + len(text.split()))
        )
        plain.append(next(hits, None))
    assert found == plain
    assert limit in (0.0, 0.3) or None in found


def test_hundreds_of_prompts_against_thousands_take_seconds():
    chance = random.Random(2)
    words = [f"w{n}" for n in range(300)]
    texts = [" ".join(chance.choices(words, k=chance.randint(8, 30))) for _ in range(4200)]
    near = NearTexts(0.7, texts[:4000])
    began = time.perf_counter()
    assert not any(near.near(text) for text in texts[4000:])
    assert time.perf_counter() - began < 20


def test_proposing_asks_as_self_instruct_does_and_knows_a_prompt_that_fits() -> None:
    table = {"use": "reasoning_gym", "tasks": [{"name": "spell_backward"}]}
    made = Proposing(proposer=table, shots=3).propose(40, "train", Past(), Writer([]), Call(seed=1))
    assert len(made) == 40
    texts = {
        last_asked(one)
        for one in SelfInstruct(proposer=table).source.propose(
            40, "train", Past(), Writer([]), Call(seed=1)
        )
    }
    for one in made:
        asked = one.messages[0].content
        assert one.reference in texts
        assert asked.count("<prompt>\n") == 3
        assert f"<prompt>\n{one.reference}\n" not in asked
        assert one.task == "proposing"


def test_proposing_needs_more_prompts_than_it_shows() -> None:
    table = {"use": "reasoning_gym", "tasks": [{"name": "spell_backward"}]}
    with pytest.raises(UserError, match=r"shows 8 examples .* gave 5 prompts"):
        Proposing(proposer=table).propose(5, "train", Past(), Writer([]), Call(seed=1))
