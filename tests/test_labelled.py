"""Answers of known worth, prompts for each judge's form, and the table that rests on both."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent / "benchmarks"))

import agreement
import labelled
import measures
from form_server import PLANS, conclusion, plan
from labelled import SPELLING, WRONG, Apart, LabelledSet, as_bytes
from programs import PROGRAMS
from served import served_rows

from judges.gym import score_entry
from judges.judging import SHAPES, Form, Judging, compared
from judges.meta_ranking import MetaRanking
from loop import config, meant, run
from roles import plugins
from store.records import Call, Candidate, Completion, Group, Judgement, Message, Prompt, Sampling

CALL = Call(seed=3, stage="judge")
FORMS: list[Form] = list(SHAPES)
PROPOSER = {"use": "reasoning_gym", "tasks": [SPELLING]}


class Said:
    """A model that says of each question what `say` makes of it."""

    def __init__(self, say: Any) -> None:
        self.say = say
        self.asked: list[Prompt] = []

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        self.asked += prompts
        both = zip(prompts, seeds, strict=True)
        return [[as_bytes(self.say(prompt)) for _ in own] for prompt, own in both]


# Labelled sets.


SETS = {
    "spelling": lambda seed: labelled.spelling(12, seed, as_bytes),
    "maths": lambda seed: labelled.maths(24, seed, as_bytes),
    "programs": lambda seed: labelled.programs(1, seed, as_bytes),
    "judgements": lambda seed: labelled.judgements(12, seed, as_bytes),
}


@pytest.mark.parametrize("name", SETS)
def test_a_labelled_set_hangs_on_its_seed_alone_and_has_every_kind_in_each_group(name: str) -> None:
    one = SETS[name](5)
    assert one == SETS[name](5)
    assert one != SETS[name](6)
    for group in one.groups:
        kinds = [one.kinds[each.id] for each in group.candidates]
        assert set(kinds) == {"right", *WRONG}
        assert [each.index for each in group.candidates] == list(range(len(kinds)))
    places = {
        next(n for n, each in enumerate(group.candidates) if one.kinds[each.id] == "right")
        for group in one.groups
    }
    assert len(places) > 1, "where the right answer stands would tell it"


@pytest.mark.parametrize("name", ["spelling", "maths"])
def test_the_tasks_own_scorer_says_what_is_right(name: str) -> None:
    one = SETS[name](7)
    for prompt, each in one.candidates:
        bare = each.text.rpartition("Answer: ")[2]
        assert (score_entry(prompt, bare)[0] == 1.0) == (one.kinds[each.id] == "right"), each.text


def test_right_answers_come_in_other_forms_and_wrong_ones_with_a_derivation() -> None:
    one = SETS["maths"](8)
    other, derived = 0, 0
    for group in one.groups:
        right = group.prompt.reference
        for each in group.candidates:
            kind, (_, _, last) = one.kinds[each.id], each.text.rpartition("Answer: ")
            other += kind == "right" and last != right
            if kind == "well_written":
                assert f"tempted to answer {right}" in each.text
                assert len(each.text) > 100
                derived += 1
    assert other > 5
    assert derived >= len(one.groups)


def test_words_that_a_model_has_learnt_are_not_asked() -> None:
    first = SETS["spelling"](9)
    learnt = frozenset(group.prompt.digest for group in first.groups)
    other = labelled.spelling(12, 9, as_bytes, learnt)
    assert not learnt & {group.prompt.digest for group in other.groups}


@pytest.mark.parametrize("task", PROGRAMS)
def test_the_tasks_scorer_finds_right_programs_always_right_and_the_others_not(task: str) -> None:
    shares = [
        (kind, labelled.share_right(task, text, 150, 11)) for kind, text in PROGRAMS[task].kinds
    ]
    assert all((share == 1.0) == (kind == "right") for kind, share in shares), shares
    assert [kind for kind, _ in shares].count("right") == 2


# Prompts to learn a judge's form from.


def judging(form: Form, **options: Any) -> Judging:
    return Judging(PROPOSER, form, f"{form}_brief", **{"nonce": False, "mistakes": 0.6} | options)


def propose(proposer: Judging, count: int) -> list[Prompt]:
    return proposer.propose(count, "train", Apart(), None, CALL)  # type: ignore[arg-type]


def group_of(prompt: Prompt, *texts: str) -> Group:
    return Group(
        asked_id=1,
        prompt=prompt,
        candidates=tuple(
            Candidate(id=n, asked_id=1, index=n, text=text, token_ids=(n,))
            for n, text in enumerate(texts)
        ),
    )


def judge_of(form: Form, folder: Path) -> Any:
    options = agreement.asking(labelled.write_references(folder / "r.jsonl", EMPTY, frozenset()))
    use, given = options["consistency, model" if form == "consistency" else form]
    return plugins.load("judge", use, given)


EMPTY = LabelledSet("none", (), {})


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_of_a_form_is_the_one_its_judge_asks_and_the_judgement_one_it_reads(
    form: Form, tmp_path: Path
) -> None:
    judge = judge_of(form, tmp_path)
    for made in propose(judging(form, worst=3), 40):
        answers = made.columns.get("answers", [made.columns["answer"]])
        own = Prompt(
            messages=(Message(role="user", content=made.columns["question"]),),
            reference=made.columns["reference"],
        )
        if form == "meta_ranking":
            # It compares with labelled answers to other questions: this one's is in the prompt.
            turn = made.messages[0].content.split("===\n")
            row = json.dumps({"question": turn[5].strip(), "answer": answers[1], "label": True})
            other = json.dumps({"question": "?", "answer": "!", "label": False})
            (tmp_path / "r.jsonl").write_text(f"{row}\n{other}\n")
            judge = MetaRanking(**agreement.brief(form, references_path=tmp_path / "r.jsonl"), k=2)
            answers = answers[:1]
        model = Said({made.digest: made.reference}.get)
        model.say = lambda prompt, made=made: made.reference if prompt.digest == made.digest else ""
        if form == "consistency" and len(set(answers)) == 1:
            continue
        said = judge.judge([group_of(own, *answers)], model, CALL)
        asked = {each.digest for each in model.asked}
        if form == "listwise":
            # The judge draws its own orders: one that it asked is as good as the one here.
            assert all(
                one.messages[0].content.count("Answer ") == len(answers) for one in model.asked
            )
            assert set(sorted_lines(made)) == set(sorted_lines(model.asked[0]))
            continue
        assert made.digest in asked
        heard = [each for one in said for each in one.verdicts if each.prompt_digest == made.digest]
        assert heard
        assert {each.status for each in heard} <= {"ok", "abstained"}
        assert all(each.value is not None or "tie" in each.raw for each in heard)


def sorted_lines(prompt: Prompt) -> list[str]:
    return sorted(prompt.messages[0].content.splitlines())


@pytest.mark.parametrize("form", FORMS)
def test_the_right_judgement_concludes_what_the_comparison_says(form: Form) -> None:
    prompts = propose(judging(form, worst=3, judgement="{comparison}|{verdict}"), 60)
    for made in prompts:
        assert made.reference is not None
        comparison, _, verdict = made.reference.rpartition("|")
        wrong = [line.count("-") for line in comparison.splitlines()]
        match form:
            case "rubric" | "reference":
                assert (verdict == "5") == (wrong == [0])
            case "pairwise":
                assert verdict == "AB"[wrong.index(min(wrong))]
                assert wrong[0] != wrong[1]
            case "listwise":
                ranked = [wrong["ABCD".index(letter)] for letter in verdict.split(" > ")]
                assert ranked == sorted(wrong)
            case "consistency":
                assert verdict == ("yes" if wrong == [0] else "no")
            case "meta_ranking":
                right = [each == 0 for each in wrong]
                tie = right[0] == right[1]
                assert verdict == ("tie" if tie else "AB"[right.index(True)])
    assert len({made.reference.rpartition("|")[2] for made in prompts if made.reference}) > 1


def test_the_configuration_that_trains_the_small_judge_names_parts_that_are_there() -> None:
    assert run.load_roles(config.read(agreement.HERE / "judges.toml"))


# The table.


def cell(cells: Sequence[str], head: str) -> str:
    return cells[measures.HEADS.index(head)]


def test_a_judge_that_is_always_right_and_one_that_is_always_wrong_get_one_and_zero() -> None:
    words = SETS["spelling"](1)

    class Oracle:
        def __init__(self, sign: float) -> None:
            self.sign = sign

        def judge(self, groups: Sequence[Group], policy: Any, call: Call) -> list[Judgement]:
            return [
                Judgement(
                    candidate_id=one.id, score=self.sign * (one.text == group.prompt.reference)
                )
                for group in groups
                for one in group.candidates
            ]

    right = measures.row("one", "–", Oracle(1.0), words)
    wrong = measures.row("two", "–", Oracle(-1.0), words)
    same = measures.row("three", "–", Oracle(0.0), words)
    assert cell(right, "agreement") == "1.00 [1.00, 1.00]"
    assert cell(wrong, "agreement") == "0.00 [0.00, 0.00]"
    assert cell(same, "agreement") == "0.50 [0.50, 0.50]"
    assert (cell(right, "accuracy"), cell(same, "accuracy")) == ("1.00", "0.00")
    assert (cell(right, "κ"), cell(wrong, "unscored")) == ("1.00", "0.00")
    counted = sum(
        one.text == group.prompt.reference and other.text != group.prompt.reference
        for group in words.groups
        for one in group.candidates
        for other in group.candidates
    )
    assert cell(right, "pairs") == str(counted)


def test_a_model_that_writes_each_judgement_rightly_is_found_to_be_a_good_judge(
    tmp_path: Path,
) -> None:
    words = SETS["spelling"](2)
    perfect = Said(_rightly)
    known = labelled.write_references(tmp_path / "r.jsonl", words, frozenset())
    for name, (use, options) in agreement.asking(known).items():
        if name in ("mbr", "consistency, model"):
            continue
        cells = measures.row(name, "oracle", plugins.load("judge", use, options), words, perfect)
        assert cell(cells, "agreement") == "1.00 [1.00, 1.00]", cells
        assert cell(cells, "unscored") == "0.00"
        if cell(cells, "flips") != "–":
            assert cell(cells, "flips") == "0.00"


def test_a_comparison_that_goes_by_place_is_counted_as_a_flip(tmp_path: Path) -> None:
    words = SETS["spelling"](2)
    known = labelled.write_references(tmp_path / "r.jsonl", words, frozenset())
    use, options = agreement.asking(known)["pairwise"]
    first = Said(lambda prompt: "The first.\nWinner: A")
    cells = measures.row("x", "y", plugins.load("judge", use, options), words, first)
    assert cell(cells, "flips") == "1.00"
    assert cell(cells, "unscored") == "1.00"
    assert cell(cells, "agreement") == "–"


def _rightly(prompt: Prompt) -> str:
    """The right judgement of what a brief text asks, of spellings."""
    *parts, asks = prompt.messages[0].content.split("===\n")
    texts = [each.strip() for each in parts[1::2]]
    rights = [each.rpartition(" ")[2][::-1] if "backward" in each else None for each in texts]
    answers = [each for each, right in zip(texts, rights, strict=True) if right is None]
    known = [each for each in rights if each is not None]
    if asks.startswith("Like it"):
        _, answer = answers
        answers = [answer]
    wrong = [
        compared(right, answer).count("-")
        for right, answer in zip(known * len(answers), answers, strict=False)
    ]
    match re.match(r"(Winner, A, B|Winner|Ranking|)", asks):
        case re.Match() as found if found[1] == "Winner, A, B":
            first, second = (each == 0 for each in wrong)
            return f"Why.\nWinner: {'tie' if first == second else 'A' if first else 'B'}"
        case re.Match() as found if found[1] == "Winner":
            return f"Why.\nWinner: {'AB'[min((0, 1), key=lambda n: (wrong[n], answers[n]))]}"
        case re.Match() as found if found[1] == "Ranking":
            ranked = sorted(range(len(wrong)), key=lambda n: wrong[n])
            return "Why.\nRanking: " + " > ".join("ABCDE"[n] for n in ranked)
    return f"Why.\nScore: {max(0, 5 - wrong[0])}"


def test_judges_that_ask_no_model_make_rows_of_the_table() -> None:
    rows = {cells[0]: cells for cells in agreement.plain_rows(agreement.QUICK)}
    assert all(len(cells) == len(measures.HEADS) for cells in rows.values())
    for name in ("verifier", "recorded"):
        assert cell(rows[name], "agreement") == "1.00 [1.00, 1.00]"
    for name in ("math", "code"):
        assert float(cell(rows[name], "agreement").split()[0]) > 0.8
    assert {cell(cells, "unscored") for cells in rows.values()} == {"0.00"}


def test_every_verdict_through_a_server_has_the_status_that_it_was_told_to_have(
    tmp_path: Path,
) -> None:
    seen = set()
    for cells in served_rows(2, tmp_path):
        told = cell(cells, "verdicts, as told").split(", ")
        for each in told:
            status, heard, wanted = re.fullmatch(r"(\w+) (\d+) of (\d+)", each).groups()  # type: ignore[union-attr]
            assert heard == wanted, cells
            seen.add(status)
    assert seen >= {"ok", "unparsed", "refused", "abstained"}


def test_what_a_server_is_told_hangs_on_the_question_alone_and_comes_in_every_way() -> None:
    plans = [plan(f"{n}\nScore: <number>") for n in range(400)]
    assert set(plans) == set(PLANS)
    assert conclusion("Answer A:\nAnswer B:\nRanking: <letter>")[1] in (["A", "B"], ["B", "A"])
    with pytest.raises(ValueError, match="names no form"):
        conclusion("What is it?")


def test_a_run_that_is_there_is_used_and_its_words_are_not_asked(tmp_path: Path) -> None:
    from runs import scripted_toml, start

    root, _ = start(scripted_toml(tmp_path), tmp_path / "runs", ["rounds=1"])
    learnt = agreement.learnt_from(root)
    assert len(learnt) == 24
    with meant.opened(root) as store:
        held = store.query("SELECT digest FROM prompt WHERE split != 'train'")
    assert held
    assert not learnt & {each["digest"] for each in held}
    assert agreement._run(tmp_path / "runs") == root


def test_an_untrained_model_makes_rows_whose_failures_are_counted(tmp_path: Path) -> None:
    from roles.policy.embedded import build
    from roles.policy.transformers import TransformersEngine
    from store import checkpoints

    build(tmp_path / "model", 0)
    policy = TransformersEngine(device="cpu").open(
        checkpoints.measure(tmp_path / "model", "policy")
    )
    sizes = replace(agreement.QUICK, spelling=2)
    made = agreement.model_rows("nobody", policy, sizes, tmp_path, frozenset())
    for cells in islice(made, 2):
        assert cell(cells, "unscored") == "1.00"
        assert (cell(cells, "pairs"), cell(cells, "agreement")) == ("0", "–")
        assert int(cell(cells, "tokens").replace(",", "")) > 0
