"""The judge of what an answer means, and expressions that would hang or run whoever reads them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from judges.math import LONGEST_ANSWER, Math
from roles import plugins
from store.errors import UserError
from store.records import Call, Candidate, Group, Judgement, Message, Prompt

CALL = Call(seed=1, stage="judge")
JUDGE = Math()


def judged(judge: Math, reference: str | None, *texts: str) -> list[Judgement]:
    group = Group(
        asked_id=1,
        prompt=Prompt(messages=(Message(role="user", content="how many?"),), reference=reference),
        candidates=tuple(
            Candidate(id=n, asked_id=1, index=n, text=text, token_ids=(n,))
            for n, text in enumerate(texts)
        ),
    )
    return judge.judge([group], None, CALL)


def scores(reference: str, *texts: str, judge: Math = JUDGE) -> list[float | None]:
    return [each.score for each in judged(judge, reference, *texts)]


EQUAL = {
    "1/2": ("0.5", r"\frac{1}{2}", r"\frac12", "50%", r"\dfrac{2}{4}", "$0.50$", "2/4."),
    "0.333333": ("1/3", r"\frac{1}{3}"),
    "1,234,567": ("1234567", "1 234 567", r"1{,}234{,}567", r"1\,234\,567", "1234567.0"),
    "2.5": ("2 1/2", r"2\frac12", "5/2", r"\frac{5}{2}", "25e-1"),
    r"\sqrt{8}": (r"2\sqrt2", "2*sqrt(2)", "8^{1/2}", "8**(1/2)", "2√2".replace("√2", r"\sqrt{2}")),
    r"(x+1)^2": ("x^2+2x+1", "x**2 + 2*x + 1", "(1+x)(x+1)"),
    r"\{1, 2, 3\}": ("{3, 2, 1}", r"\{1,2,3\}", "1, 2 and 3"),
    "(1, 2)": ("(1,2)", r"\left(1, 2\right)", "(1.0, 4/2)"),
    "[0, 1)": ("[0,1)", r"\left[0, 1\right)", r"0 \le x < 1"),
    r"(-\infty, 3] \cup (5, \infty)": (r"(5,\infty)\cup(-\infty,3]",),
    "x = 3": ("3", "x=3", "3 = x"),
    "y = 2x + 1": ("2x + 1 = y", "y - 2x = 1", "2x + 1"),
    r"72 \text{ km}": ("72", "72 km", r"72\text{ km}"),
    "$15": ("15", r"\$15", "$15.00", r"\(15\)"),
    r"\frac{\pi}{2}": (r"\pi/2", "pi/2", "π/2", "0.5*pi"),
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}": (r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}",),
    "6": ("3!", "2*3", r"2 \times 3", "2·3", "12/2", "−(−6)", r"\log_2 64"),
    r"\infty": ("∞", "inf"),
    "The total is 10.\n#### 10": ("10", "so\n#### 10.0", r"\boxed{10}", "<answer>20/2</answer>"),
}  # fmt: skip

WRONG = {
    "1/2": ("0.51", "1/3", "2", "-1/2", "x/2", "0.5000019", "1/2, 1/3", "1/2 or 1/3", r"\frac21"),
    "3": (
        *("1, 2, 3", "1 or 2 or 3", "{1, 2, 3}", "[1, 2, 3]", "3 or 4", "3 4", "3\n4", "4\n3"),
        *("34", "3 1/2", "3;4", "3_4", "3.4.5", "$3$ and $4$", "$3$ $4$", "3 & 4", r"3 \quad 4"),
        *(r"3 \\ 4", "1 2", r"1 \ 2", "3x", "x", "x = 3 or x = 4", r"3 \pm 1", "(3, 3)", "(2, 4)"),
        *("3 < x", "x > 2", "three", "I think 3", "3?", "3...", "~3", "[3", "3)", "3 )( 3", "3 \\"),
        *("1/0", "0/0", "nan", "inf", "-3", "3i", "3^3", "3+0/0", r"\text{3 or 4}"),
        r"\boxed{4} \boxed{3, 4}",
    ),
    "(1, 2)": ("(2, 1)", "[1, 2]", "(1, 2]", "1", "(1, 2, 3)"),
    r"\{1, 2\}": (r"\{1, 2, 3\}", r"\{1\}", r"\{1, 3\}"),
    "x = 3": ("y = 3", "x = 4", "x > 3", "x = 3 = 4"),
    "y = 2x + 1": ("y = 2x", "2x", "y = 2z + 1"),
    r"\infty": ("10^{100}", r"-\infty", "nan", "1/0"),
}  # fmt: skip


@pytest.mark.parametrize("reference", EQUAL)
def test_what_means_the_same_is_right(reference: str) -> None:
    assert dict(zip(EQUAL[reference], scores(reference, *EQUAL[reference]), strict=True)) == (
        dict.fromkeys(EQUAL[reference], 1.0)
    )


@pytest.mark.parametrize("reference", WRONG)
def test_what_does_not_is_wrong(reference: str) -> None:
    assert dict(zip(WRONG[reference], scores(reference, *WRONG[reference]), strict=True)) == (
        dict.fromkeys(WRONG[reference], 0.0)
    )


def test_the_last_answer_is_the_answer() -> None:
    right, wrong = judged(JUDGE, "3", r"\boxed{4}, no, \boxed{3}", r"\boxed{3}, no, \boxed{4}")
    assert (right.score, wrong.score) == (1.0, 0.0)
    (missing,) = judged(Math(answer="boxed"), "3", "3")
    assert (missing.score, missing.verdicts[0].raw) == (0.0, "no final answer: looked for 'boxed'")


def test_the_verdict_says_what_was_compared() -> None:
    right, wrong, unreadable = judged(JUDGE, "1/2", "0.5", "0.6", "???")
    assert right.verdicts[0].raw == "answer '0.5' is '1/2'"
    assert wrong.verdicts[0].raw == "answer '0.6' is not '1/2'"
    assert unreadable.verdicts[0].raw.startswith("answer '???' cannot be read: ")
    assert [each.status for each in (right, wrong, unreadable)] == ["ok"] * 3


HOSTILE = {
    "code": "__import__('os').system('touch {there}')",
    "code in braces": r"\text{{__import__('os').system('touch {there}')}}",
    "code as an exponent": "2**__import__('os').system('touch {there}')",
    "a tower": "9**9**9**9",
    "a tower in braces": "9^{{9^{{9^{{9}}}}}}",
    "a factorial": "99999999999!",
    "factorials": "9!!!!!!!!",
    "a product": r"\prod_{{i=1}}^{{10^{{10}}}} i",
    "a sum": r"\sum_{{i=1}}^{{10^{{12}}}} \frac{{1}}{{i}}",
    "an integral": r"\int_0^1 \sin(x^{{x^{{x}}}})^{{99}} e^{{x^9}} dx",
    "a power of a sum": "(a+b+c+d+e+f+g)^{{99}}",
    "deep": "(" * 450 + "3" + ")" * 450,
    "deep braces": "{{" * 450 + "3" + "}}" * 450,
    "deep fractions": r"\frac{{1}}{{" * 80 + "3" + "}}" * 80,
    "deep roots": r"\sqrt{{" * 140 + "3" + "}}" * 140,
    "long": "1+" * 499 + "1",
    "a list": "1," * 499 + "1",
    "digits": "9" * 999,
    "an exponent": "1e9999",
    "backslashes": "\\" * 999,
    "dollars": "$" * 999,
    "boxes": r"\boxed{{" * 140,
    "too long": "1" * 100_000,
    "text": "\u202e\u0000\ud7ff\U0001f600",
    "a template": "{{{{7*7}}}}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_expression_is_not_right_and_harms_nobody(name: str, tmp_path: Path) -> None:
    judge = Math(time_s=1.5)
    answer = HOSTILE[name].format(there=tmp_path / "there")
    began = time.monotonic()
    before, hostile, after = judged(judge, "1/2", "0.5", answer, "2/4")
    assert time.monotonic() - began < 30
    assert (before.score, after.score) == (1.0, 1.0)
    assert hostile.score in (0.0, None)
    assert hostile.status in ("ok", "timed_out")
    assert not (tmp_path / "there").exists()
    judge.close()


def test_what_takes_too_long_has_no_score_and_its_process_is_replaced() -> None:
    judge = Math(time_s=1, workers=1)
    (quick,) = judged(judge, "1/2", "0.5")
    pids = judge.pids()
    (slow,) = judged(judge, "3", "99999999999!")
    assert (slow.score, slow.status) == (None, "timed_out")
    assert slow.reason == "answer '99999999999!' took more than 1 s to compare"
    assert not Path(f"/proc/{pids[0]}").exists()
    (again,) = judged(judge, "1/2", "0.5")
    assert quick.score == again.score == 1.0
    assert judge.pids() != pids
    judge.close()


def test_an_answer_that_is_too_long_is_not_even_read() -> None:
    (long,) = judged(JUDGE, "3", "3" + " " * LONGEST_ANSWER + "+ 0")
    words = f"the answer has {LONGEST_ANSWER + 4} characters, more than {LONGEST_ANSWER}"
    assert (long.score, long.verdicts[0].raw) == (0.0, words)
    reference = "+".join(["1"] * 600)
    assert scores(reference, "600", "+".join(["1"] * 599), "1+" + "+".join(["1"] * 599)) == [
        1.0,
        0.0,
        1.0,
    ]


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        (None, "it has none"),
        ("???", r"'\?\?\?' cannot be read: "),
        ("", "'' cannot be read: "),
        ("3 4", "'3 4' cannot be read: it is several numbers"),
        ("99999999999!", "'99999999999!' takes more than 2 s"),
    ],
)
def test_a_reference_that_cannot_be_read_is_the_users_mistake(
    reference: str | None, why: str
) -> None:
    with pytest.raises(UserError, match=rf"'math' needs a reference answer.*{why}"):
        judged(Math(time_s=2), reference, "1/2")


def test_verdicts_do_not_depend_on_what_else_is_judged() -> None:
    texts = ["0.5", "1/3", "nan", "(" * 20, "1/2, 1/3", "x", "50%", r"\frac{1}{2}"]
    alone = [scores("1/2", text)[0] for text in texts]
    judge = Math(workers=3)
    assert scores("1/2", *texts * 3, judge=judge) == alone * 3
    assert scores("1/2", *reversed(texts), judge=judge) == alone[::-1]
    judge.close()


def test_options_say_how_close_and_how_strict() -> None:
    assert scores("0.333", "1/3", "0.3334") == [0.0, 0.0]
    assert scores("0.333", "1/3", "0.3334", judge=Math(digits=3)) == [1.0, 1.0]
    assert scores("x + 1", "y + 1") == [0.0]
    assert scores("x + 1", "y + 1", judge=Math(strict=False)) == [1.0]
    for options in ({"digits": 16}, {"time_s": 0}, {"answer": "first"}, {"workers": 0}):
        with pytest.raises(UserError, match="judge 'math', option"):
            plugins.load("judge", "math", options)


def test_no_process_is_left_when_it_is_closed_or_forgotten() -> None:
    judge = Math(workers=2)
    judged(judge, "1/2", *["0.5", "0.25", "2/4", "3"] * 2)
    pids = judge.pids()
    assert 1 <= len(pids) <= 2
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    judge.close()
    assert judge.pids() == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert scores("1/2", "0.5", judge=judge) == [1.0]
    (pid,) = judge.pids()
    del judge
    # A thread that asked it may be about to end, and holds it until then.
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("end", ["", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_process_outlives_the_judges(end: str, tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, "tests")
from test_math import Math, judged
judge = Math()
judged(judge, "1/2", "0.5")
print(*judge.pids(), flush=True)
{end}
"""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    pids = done.stdout.split()
    assert pids, done.stderr
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_that_is_killed_is_a_failure_and_not_a_verdict() -> None:
    judge = Math(workers=1)
    judged(judge, "1/2", "0.5")
    os.kill(judge.pids()[0], 9)
    time.sleep(0.2)
    (failed,) = judged(judge, "1/2", "0.5")
    assert (failed.score, failed.status) == (None, "failed")
    assert failed.reason == "the process that reads expressions ended"
    assert scores("1/2", "0.5", judge=judge) == [1.0]
    judge.close()


def test_without_the_library_it_says_what_to_install(tmp_path: Path) -> None:
    """In an environment that has every package but that one: a folder of links to the others."""
    installed = Path(next(each for each in sys.path if each.endswith("site-packages")))
    for each in installed.iterdir():
        if not each.name.startswith("math_verify"):
            (tmp_path / each.name).symlink_to(each)
    root = Path(__file__).parent.parent
    script = f"import sys; sys.path += [{str(root)!r}, {str(tmp_path)!r}]\n"
    script += "from judges.math import Math\nfrom store.errors import UserError\n"
    script += "try:\n    Math()\nexcept UserError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True)
    assert done.stdout == (
        "judge 'math' needs the package math-verify, which is not installed; "
        "install ratchet-loop[math]\n"
    ), done.stderr
