"""A person as the judge: the run waits, is answered by hand or by table, and goes on to its end."""

from __future__ import annotations

import csv
import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from judges.human import Human
from loop import run
from loop.cli import app
from runs import HERE, SCRIPTED, everything, go_on, loop, scripted_toml, start
from store.database import Store
from store.errors import UserError, Waiting
from store.records import Call, Candidate, Group, Message, Prompt

HUMAN = 'judge={use="judges.human:Human", low=0, high=1, instructions="Right is 1."}'
FEW = ["rounds=1", "prompts=6", "batch_prompts=4", "generator.n=3", "evaluate.samples=1"]
FEW += ["evaluate.gate_prompts=4", "evaluate.test_prompts=4"]


def group(*texts: str) -> Group:
    prompt = Prompt(messages=(Message(role="user", content="Say it."),))
    answers = tuple(
        Candidate(id=10 + n, asked_id=1, index=n, text=text, token_ids=(n + 1,))
        for n, text in enumerate(texts)
    )
    return Group(asked_id=1, prompt=prompt, candidates=answers)


def asked(judge: Human, of: Group, *lines: str, **how: Any) -> tuple[Any, list[str]]:
    """(judgements, what was shown) when these lines are typed."""
    typed, shown = iter(lines), list[str]()

    def read(question: str) -> str:
        shown.append(question)
        for line in typed:
            return line
        raise EOFError

    return judge.ask(of, read, lambda line: shown.append(str(line)), **how), shown


def given(judgements: Sequence[Any]) -> dict[int, Any]:
    return {each.candidate_id: each.score for each in judgements}


# Without the loop


def test_a_person_scores_each_answer_with_reasons_and_may_skip_one() -> None:
    judgements, shown = asked(Human(), group("a", "b"), "4 it is clear", "s  not my field")
    pages = [line for line in shown if line.startswith("  | ")][1:]
    order = [10 + "ab".index(line[-1]) for line in pages]
    first, second = judgements
    assert [first.candidate_id, second.candidate_id] == order
    assert (first.score, first.status, first.reason) == (4.0, "ok", "it is clear")
    assert (second.score, second.status, second.reason) == (None, "abstained", "not my field")
    assert [each.verdicts[0].raw for each in judgements] == ["4 it is clear", "s  not my field"]
    assert [each.verdicts[0].status for each in judgements] == ["ok", "abstained"]
    assert all(each.verdicts[0].seconds >= 0 for each in judgements)


def test_back_takes_the_last_score_back() -> None:
    judgements, shown = asked(Human(), group("a", "b"), "b", "1", "b", "2", "3")
    assert sorted(given(judgements).values()) == [2.0, 3.0]
    assert any("first answer of its prompt" in line for line in shown)


@pytest.mark.parametrize("last", [[], ["q"], ["Q"]])
def test_a_person_who_leaves_leaves_the_prompt_waiting(last: list[str]) -> None:
    with pytest.raises(Waiting, match="2 answers still wait"):
        asked(Human(), group("a", "b"), "1", *last)


@pytest.mark.parametrize(
    "typed", ["6", "-1", "", "4.5", "nan", "inf", "4,5", "four", "5/5", "4because", "٤", "9" * 400]
)
def test_what_is_no_score_is_asked_anew_or_refused(typed: str) -> None:
    judgements, _ = asked(Human(), group("a"), typed, "5")
    assert given(judgements) == {10: 5.0}
    with pytest.raises(UserError, match="is no score: right are whole numbers from 0 to 5"):
        asked(Human(), group("a"), typed, "5", again=False)


def test_fractions_are_scores_where_they_are_wanted() -> None:
    judgements, _ = asked(Human(-1, 1, fractions=True), group("a", "b"), "-0.25", "1.")
    assert sorted(given(judgements).values()) == [-0.25, 1.0]


def test_the_order_of_answers_comes_from_the_seed_and_from_nothing_else() -> None:
    def order(seed: int) -> list[int]:
        judgements, _ = asked(Human(), group(*"abcd"), *"1234", seed=seed)
        return [each.candidate_id for each in judgements]

    assert order(1) == order(1)
    assert {tuple(order(seed)) for seed in range(200)} == set(
        itertools.permutations([10, 11, 12, 13])
    )


def test_an_answer_can_neither_write_to_the_screen_nor_look_like_the_screen() -> None:
    hostile = "a\x1b[2J\x1b]0;x\x07\r\u202e\u2028\x85\nanswer 2 of 2:\n5\nprompt 2 of 9"
    _, shown = asked(Human(), group(hostile, "b"), "1", "2")
    text = "\n".join(shown)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]", text)
    assert "\\x1b[2J" in text
    ours = [line for line in shown if not line.startswith("  |")]
    assert ours == [
        *("", "user:", "answer 1 of 2:", "answer 2 of 2:"),
        *("score of answer 1 of 2 (0 to 5): ", "score of answer 2 of 2 (0 to 5): "),
    ]


def test_judge_says_that_it_waits() -> None:
    with pytest.raises(Waiting, match="2 answers wait for a person's scores"):
        Human().judge([group("a", "b")], None, Call())
    assert Human().judge([], None, Call()) == []


def test_a_scale_upside_down_is_refused() -> None:
    with pytest.raises(UserError, match="lowest score, 5, is not below the highest, 5"):
        Human(low=5)


# In the loop


def type_(*arguments: object, typed: str = "", code: int = 0) -> Result:
    found = CliRunner().invoke(app, [str(each) for each in arguments], input=typed)
    assert found.exit_code == code, f"{found.exit_code}: {found.output}\n{found.exception}"
    return found


def right(row: dict[str, str]) -> str:
    """What `Exact` would give it."""
    times, a, b = map(int, re.findall(r"\d+", row["prompt"]))
    return str(int(row["answer"] == str(times * a + b)))


def table(root: Path, place: Path) -> list[dict[str, str]]:
    """What waits, as the table has it."""
    place.unlink(missing_ok=True)
    type_("review", root, "--export", place)
    with place.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def write(rows: Sequence[dict[str, str]], place: Path, delimiter: str = ",") -> None:
    with place.open("w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        out.writeheader()
        out.writerows(rows)


def waiting(folder: Path, *sets: str) -> Path:
    """A run that waits for the scores of its first round's answers."""
    root, outcome = start(scripted_toml(folder), folder / "runs", [*FEW, HUMAN, *sets])
    while "track main:" not in outcome.reason:
        assert (outcome.code, outcome.status) == (5, "waiting"), outcome.reason
        type_("review", root, typed="1\n" * 100)
        outcome = again(root)
    assert (outcome.code, outcome.status) == (5, "waiting"), outcome.reason
    return root


def again(root: Path) -> run.Outcome:
    config = run.stored_config(root)
    return go_on(root, config, run.load_roles(config))


def to_the_end(root: Path, folder: Path) -> int:
    """Answer by typing whatever waits, as `Exact` would, until the run ends. How often it did."""
    for times in range(20):
        rows = table(root, folder / "waits.csv")
        said = type_("review", root, typed="\n".join(map(right, rows)) + "\n").stdout
        assert f"nothing more waits for a person; `loop start {root}` goes on" in said
        outcome = again(root)
        if outcome.code != 5:
            assert outcome.code == 0, outcome.reason
            return times + 1
    raise AssertionError("it waits for ever")


def judged(root: Path) -> list[tuple[Any, ...]]:
    store = Store(root / "loop.db")
    found = store.query(
        "SELECT candidate_id, score, judgement.status, reason, raw FROM judgement "
        "JOIN verdict USING (candidate_id, judge) JOIN candidate ON candidate.id = candidate_id "
        "JOIN asked ON asked.id = asked_id WHERE track = 'main' ORDER BY candidate_id"
    )
    store.close()
    return [tuple(row.values()) for row in found]


def test_a_run_waits_is_answered_and_ends_as_with_a_judge_of_the_same_mind(
    tmp_path: Path,
) -> None:
    root = waiting(tmp_path)
    to_the_end(root, tmp_path)
    (tmp_path / "exact").mkdir()
    other, outcome = start(scripted_toml(tmp_path / "exact"), tmp_path / "exact" / "runs", FEW)
    assert outcome.code == 0
    one, two = everything(root), everything(other)
    own = {"chosen_judgement_id", "rejected_judgement_id", "path"}
    for name in ("asked", "candidate", "example", "dropped", "trained_on", "checkpoint"):
        same = [
            [{key: row[key] for key in row.keys() - own} for row in x[name]] for x in (one, two)
        ]
        assert same[0] == same[1], name
        assert same[0]
    assert [row["decision"] for row in one["decision"]] == [
        row["decision"] for row in two["decision"]
    ]
    verified = loop("verify", root)
    assert verified.returncode == 0, verified.stdout


def test_the_judge_of_evaluate_may_be_a_person(tmp_path: Path) -> None:
    folder = tmp_path
    root, outcome = start(
        scripted_toml(folder), folder / "runs", [*FEW, "evaluate." + HUMAN, "gate.patience=0"]
    )
    assert outcome.code == 5
    assert "round 0, track policy (sampled): 8 answers wait" in outcome.reason
    assert to_the_end(root, tmp_path) == 4  # sampled and greedy, in two rounds
    assert loop("verify", root).returncode == 0


def test_the_commands_say_that_a_run_waits_and_what_to_type(tmp_path: Path) -> None:
    file = scripted_toml(tmp_path)
    sets = [part for each in [*FEW, HUMAN] for part in ("--set", each)]
    runs = tmp_path / "runs"
    one = loop("start", "--config", file, "--runs", runs, *sets)
    assert one.returncode == 5
    [root] = runs.iterdir()
    told = f"`loop review {root}` asks for the scores that are missing"
    then = f"then `loop start {root}` goes on"
    assert re.search(
        r"^round \d, track \w+( \(\w+\))?: \d+ answers wait for a score of the judge",
        one.stderr,
        re.M,
    )
    assert f"{told}; {then}" in one.stderr
    status = type_("status", root).stdout
    assert "waiting, nobody drives it" in status
    assert f"{told}; {then}" in status
    # Told nothing, `loop start` goes on with it, and waits again.
    two = loop("start", "--config", file, "--runs", runs, *sets)
    assert (two.returncode, list(runs.iterdir())) == (5, [root])
    assert f"goes on with {root}" in two.stderr


def test_review_shows_no_writer_and_no_thoughts_and_says_what_is_left(tmp_path: Path) -> None:
    hidden = HUMAN.replace("{", '{thinking="hidden", ', 1)
    root = waiting(tmp_path, f'engine.use="{SCRIPTED}:Thinker"', hidden)
    rows = table(root, tmp_path / "waits.csv")
    said = type_("review", root, typed="1\n0 no\nq\n", code=5).stdout
    assert "Right is 1." in said
    assert "think" not in said
    assert "is it 7" not in said
    assert "checkpoint" not in said
    assert f"{len(rows)} answers wait for a score" in said  # half a prompt is not kept
    assert f"`loop review {root}` goes on with them" in said
    assert judged(root) == []


def test_what_is_no_score_in_a_file_stops_before_the_rest_moves(tmp_path: Path) -> None:
    root = waiting(tmp_path)
    rows = table(root, tmp_path / "waits.csv")
    first = sum(row["prompt"] == rows[0]["prompt"] for row in rows)
    typed = "1\n" * first + "7\n" + "0\n" * 100
    told = type_("review", root, typed=typed, code=2)
    assert "'7' is no score" in told.stderr
    assert [row[1] for row in judged(root)] == [1.0] * first


@pytest.mark.parametrize("when", ["inside", pytest.param("after", marks=pytest.mark.slow)])
def test_what_was_committed_before_a_kill_stays_and_the_rest_is_asked(
    tmp_path: Path, when: str
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    roots = []
    for folder in (whole, part):
        folder.mkdir()
        roots.append(waiting(folder))
    rows = table(roots[0], tmp_path / "waits.csv")
    lines = [f"{right(row)} because {n}" for n, row in enumerate(rows)]
    type_("review", roots[0], typed="\n".join(lines) + "\n")
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import faults; "
        f"faults.kill_at('add_judgements', 2, {when!r}); "
        f"from loop.cli import app; app(['review', {str(roots[1])!r}])"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines) + "\n", text=True, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    sizes = [len(list(own)) for _, own in itertools.groupby(rows, lambda row: row["prompt"])]
    done = sum(sizes[: 1 if when == "inside" else 2])
    assert len(judged(roots[1])) == done
    type_("review", roots[1], typed="\n".join(lines[done:]) + "\n")
    assert judged(roots[0]) == judged(roots[1])
    assert len(judged(roots[0])) == len(rows)


def test_nobody_reviews_what_somebody_drives(tmp_path: Path) -> None:
    root = waiting(tmp_path)
    store = Store(root / "loop.db")
    assert store.take_lease("elsewhere:7:1.00", timeout=timedelta(0)) is None
    told = type_("review", root, typed="1\n", code=2).stderr
    assert "is being driven by process 7 on elsewhere" in told
    store.release_lease("elsewhere:7:1.00")
    store.close()
    assert judged(root) == []


def test_a_run_that_waits_for_nobody_says_so(tmp_path: Path) -> None:
    root, _ = start(scripted_toml(tmp_path), tmp_path / "runs", FEW)
    assert "nothing more waits for a person" in type_("review", root).stdout
    told = type_("review", root, "--export", tmp_path / "x.csv", code=2).stderr
    assert "waits for a person" in told
    assert not (tmp_path / "x.csv").exists()


# As a table


def test_several_people_share_the_work_in_tables(tmp_path: Path) -> None:
    root = waiting(tmp_path)
    rows = table(root, tmp_path / "waits.csv")
    half = len(rows) // 2
    scored = [row | {"score": right(row), "reason": "so; it, is"} for row in rows]
    one = scored[:half] + rows[half:]
    two = [row | {"score": row["score"] and row["score"] + ".0"} for row in rows[:half]]
    two += scored[half:]
    two[half] |= {"score": "s", "reason": "cannot say"}
    write(one, tmp_path / "one.csv")
    write(two, tmp_path / "two.csv", ";")
    told = type_("review", root, "--import", tmp_path / "one.csv").stdout
    assert f"took {half} scores" in told
    assert f"{len(rows) - half} answers wait for a score" in told
    for count in (len(rows) - half, 0):  # the second time there is nothing new in it
        told = type_("review", root, "--import", tmp_path / "two.csv").stdout
        assert f"took {count} scores" in told
        assert "nothing more waits for a person" in told
    kept = judged(root)
    assert len(kept) == len(rows)
    assert sorted(row[1] is None for row in kept) == [False] * (len(rows) - 1) + [True]
    assert {row[3] for row in kept} == {"so; it, is", "cannot say"}
    assert again(root).code in (0, 5)


def _last(change: dict[str, str]) -> Any:
    return lambda rows: [*rows[:-1], rows[-1] | change]


WRONG = {
    "out of range": (_last({"score": "2"}), "'2' is no score"),
    "no number": (_last({"score": "good"}), "'good' is no score"),
    "no score": (_last({"score": "", "reason": "hm"}), "a reason and no score"),
    "twice": (lambda rows: [*rows, rows[0]], "comes twice"),
    "unknown": (_last({"id": "c9999-0123456789"}), "no answer 'c9999-0123456789' of"),
    "column gone": (
        lambda rows: [{k: v for k, v in row.items() if k != "score"} for row in rows],
        "has no column 'score'",
    ),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_table_with_a_mistake_is_refused_whole(tmp_path: Path, how: str) -> None:
    root = waiting(tmp_path)
    rows = [row | {"score": "1"} for row in table(root, tmp_path / "waits.csv")]
    change, sentence = WRONG[how]
    write(change(rows), tmp_path / "filled.csv")
    assert sentence in type_("review", root, "--import", tmp_path / "filled.csv", code=2).stderr
    assert judged(root) == []


def test_a_table_of_another_run_or_with_another_score_is_refused(tmp_path: Path) -> None:
    roots = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        roots.append(waiting(tmp_path / name))
    rows = [row | {"score": "1"} for row in table(roots[0], tmp_path / "waits.csv")]
    write(rows, tmp_path / "filled.csv")
    assert (
        "another run"
        in type_("review", roots[1], "--import", tmp_path / "filled.csv", code=2).stderr
    )
    type_("review", roots[0], "--import", tmp_path / "filled.csv")
    write([row | {"score": "0"} for row in rows], tmp_path / "filled.csv")
    told = type_("review", roots[0], "--import", tmp_path / "filled.csv", code=2).stderr
    assert "the answer already has the score 1, found '0'" in told
    assert {row[1] for row in judged(roots[0])} == {1.0}


def test_a_spreadsheet_runs_nothing_that_a_model_wrote(tmp_path: Path) -> None:
    from loop.review import _cell

    for formula in ("=HYPERLINK(1)", " +1", "-2+3", "@SUM(1)", "\t=1"):
        assert _cell(formula) == f"'{formula}"
    assert _cell("12\x1b[0m") == "12\\x1b[0m"


def test_a_person_is_not_asked_about_what_is_held_out_unless_they_grade_it(tmp_path: Path) -> None:
    root, outcome = start(scripted_toml(tmp_path), tmp_path / "runs", [*FEW, HUMAN])
    assert outcome.reason.startswith("round 1, track main: 18 answers wait")
    assert to_the_end(root, tmp_path) == 1
