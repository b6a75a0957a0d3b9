"""The judge of programs: what tests it can be given, and what forging its verdict takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from judges.code import Code, find_program
from roles import plugins
from store.errors import UserError
from store.records import Call, Candidate, Group, Judgement, Message, Prompt

CALL = Call(seed=1, stage="judge")
ADD = "def add(a, b):\n    return a + b\n"
JUDGE = Code(time_s=2)


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nDone."


def prompt(tests: Any) -> Prompt:
    return Prompt(messages=(Message(role="user", content="write it"),), columns={"tests": tests})


def judged(judge: Code, tests: Any, *texts: str) -> list[Judgement]:
    group = Group(
        asked_id=1,
        prompt=prompt(tests),
        candidates=tuple(
            Candidate(id=n, asked_id=1, index=n, text=text, token_ids=(n,))
            for n, text in enumerate(texts)
        ),
    )
    return judge.judge([group], None, CALL)


def verdict(code: str, tests: Any, judge: Code = JUDGE) -> tuple[float | None, str]:
    (found,) = judged(judge, tests, fenced(code))
    assert found.status == "ok", found.reason
    return found.score, found.verdicts[0].raw


def test_a_program_is_right_when_its_tests_pass() -> None:
    assert verdict(ADD, "assert add(1, 2) == 3") == (1.0, "1 of 1 tests passed")
    score, raw = verdict(ADD.replace("+", "-"), ["assert add(0, 0) == 0", "assert add(1, 2) == 3"])
    assert score == 0.0
    assert raw == "1 of 2 tests passed; test 2: AssertionError: assert add(1, 2) == 3"


def test_the_share_of_tests_passed_is_the_score_where_that_is_asked_for() -> None:
    judge = Code(partial=True, time_s=1)
    tests = ["assert f(0) == 0", "assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3"]
    crash = "def f(x):\n    return x if x != 1 else 1 / 0"
    gone = "import os\ndef f(x):\n    return x if x != 1 else os._exit(0)"
    stuck = "def f(x):\n    while x == 1: pass\n    return x"
    for code, why in (
        (crash, "ZeroDivisionError: division by zero"),
        (gone, "the program ended"),
        (stuck, "it used more than 1 s of processor time"),
    ):
        assert verdict(code, tests, judge) == (0.75, f"3 of 4 tests passed; test 2: {why}")
        assert verdict(code, tests)[0] == 0.0
    pairs = [{"input": "1", "output": "1"}, {"input": "2", "output": "3"}]
    assert verdict("print(input())", pairs, judge)[0] == 0.5


def test_a_program_that_reads_and_prints_is_compared_outside() -> None:
    double = "import sys\nfor line in sys.stdin:\n    print(int(line) * 2)"
    pairs = [{"input": "1\n2\n", "output": "2\n4"}, {"input": "", "output": ""}]
    assert verdict(double, pairs) == (1.0, "2 of 2 tests passed")
    score, raw = verdict("print('2 \\n4  \\n\\n')", pairs[:1])
    assert (score, raw) == (1.0, "1 of 1 tests passed")
    assert verdict("print(24)", pairs[:1])[1] == "0 of 1 tests passed; test 1: it printed '24\\n'"
    after = "print('2\\n4')\nraise SystemExit(3)"
    assert verdict(after, pairs[:1])[1] == "0 of 1 tests passed; test 1: it ended with 3"
    assert verdict("if __name__ == '__main__':\n    print(input())", [
        {"input": "ä\U0001f600", "output": "ä\U0001f600"}
    ])[0] == 1.0  # fmt: skip


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("def f(x): x.sort(); x.append(9)", "x = [2, 1]\nassert not f(x)\nassert x == [1, 2, 9]"),
        ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]"),
        ("def f(g, x): return [g(y) for y in x]", "assert f(lambda x: -x, (1, 2)) == [-1, -2]"),
        ("def f(x): return sum(x)", "assert f(iter([1, 2])) == 3\nassert f(x for x in [1]) == 1"),
        ("class E(ValueError): pass\ndef f(x): raise E('no', x)", """
try:
    f(1)
except E as error:
    assert error.args == ("no", 1)
else:
    assert False
try:
    f(2)
except ValueError:
    pass"""),
        ("def f(x): return {}[x]",
         "try:\n    f(1)\nexcept KeyError as e:\n    assert e.args == (1,)"),
        ("import collections\ndef f(s): return collections.Counter(s)",
         "assert f('aab') == {'a': 2, 'b': 1}"),
        ("from fractions import Fraction\ndef f(): return Fraction(1, 2)",
         "import fractions\nassert f() == fractions.Fraction(1, 2) == 0.5"),
        ("import datetime as d\ndef f(): return d.datetime(2020, 1, 2, 3)",
         "import datetime\nassert f() == datetime.datetime(2020, 1, 2, 3)"),
        ("def f(x): return (x, [x], {x}, {x: x}, b'x', 1j, None, ..., range(3), frozenset([x]))",
         "x = f('x')\nassert x[:7] == ('x', ['x'], {'x'}, {'x': 'x'}, b'x', 1j, None)\n"
         "assert x[8:] == (range(3), frozenset('x'))"),
        ("def f(): return float('nan'), float('inf'), -0.0, 10 ** 5000",
         "import math\na, b, c, d = f()\nassert math.isnan(a) and b == math.inf\n"
         "assert math.copysign(1, c) == -1 and d == 10 ** 5000"),
        ("class S:\n    def __init__(s): s.x = []\n    def push(s, v): s.x.append(v)\n"
         "    def __len__(s): return len(s.x)\n    def __getitem__(s, n): return s.x[n]\n"
         "    def __eq__(s, o): return s.x == o.x\n    def __iter__(s): return iter(s.x)\n"
         "    def __repr__(s): return f'S{s.x}'",
         "s, t = S(), S()\ns.push(1)\nassert len(s) == 1 and s[0] == 1 and list(s) == [1]\n"
         "assert s != t and 1 in s and 2 not in s and not isinstance(1, S) and isinstance(s, S)\n"
         "t.push(1)\nassert s == t and repr(t) == 'S[1]'\nt.x = [5]\nassert t.x == [5]"),
        ("def f(node):\n    node.value += 1\n    return node.next",
         "class Node:\n    def __init__(self, v, n): self.value, self.next = v, n\n"
         "n = Node(1, Node(2, None))\nassert f(n) is n.next and n.value == 2"),
        ("import math\nLIMIT = 3\ndef f(x): return math.sqrt(x)",
         "assert math.isclose(f(LIMIT), 3 ** .5)"),
        (ADD, "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
              "        self.assertEqual(add(1, 2), 3)\nunittest.main()"),
        (ADD, "def check(candidate):\n    assert candidate(1, 2) == 3\ncheck(add)"),
        (ADD + "print('chatter')\nif __name__ == '__main__':\n    input()",
         "assert add(1, 1) == 2"),
        ("import asyncio\nasync def g(): return 1\ndef f(): return asyncio.run(g())",
         "assert f() == 1"),
    ],
)  # fmt: skip
def test_tests_use_a_program_as_if_it_were_theirs(code: str, tests: str) -> None:
    assert verdict(code, tests) == (1.0, "1 of 1 tests passed")


# Programs that are wrong and want to pass. The tests: add(1, 2) == 3, within a tolerance, in a
# list, by unittest.
EQUALS_ALL = """
class Any(int):
    pass
class A:
    __eq__ = __ge__ = __le__ = __contains__ = lambda s, o: True
    __ne__ = __lt__ = __gt__ = lambda s, o: False
    __sub__ = __rsub__ = __add__ = __radd__ = __abs__ = __neg__ = __mul__ = lambda s, *o: 0
    __hash__ = lambda s: 3
    __bool__ = lambda s: True
    __array_interface__ = {"data": (0, True), "shape": (), "typestr": "<i8"}
def add(a, b): return A()
"""
FORGERIES = {
    "exit": "import sys; sys.exit(0)",
    "exit when called": "import sys\ndef add(a, b): sys.exit(0)",
    "end": "import os; os._exit(0)",
    "end when called": "import os\ndef add(a, b): os._exit(0)",
    "end at exit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit",
    "kill itself": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "equal everything": EQUALS_ALL,
    "a number that equals everything": (
        "class A(int):\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n"
        "    __hash__ = int.__hash__\ndef add(a, b): return A(7)"
    ),
    "a list that equals everything": (
        "class A(list):\n    __eq__ = lambda s, o: True\ndef add(a, b): return A([1])"
    ),
    "patch the builtins": (
        "import builtins\nbuiltins.AssertionError = builtins.abs = builtins.all = lambda *a: 0\n"
        "def add(a, b): return 7"
    ),
    "its own builtins": (
        "def abs(x): return 0\ndef all(x): return True\ndef isinstance(*x): return True\n"
        "class AssertionError(Exception): pass\ndef add(a, b): return 7"
    ),
    "patch unittest": (
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n"
        "unittest.main = lambda *a: None\ndef add(a, b): return 7"
    ),
    "trace the tests": (
        "import sys\ndef skip(frame, *_):\n    frame.f_trace_lines = False\n    return skip\n"
        "sys.settrace(skip)\nsys.setprofile(skip)\ndef add(a, b): return 7"
    ),
    "look for the tests in its memory": """
import sys, gc
def add(a, b):
    parts, frame = ("add(1, 2)", " == 3"), sys._getframe()
    seen = [each for each in gc.get_objects() if type(each) in (list, dict, tuple)]
    while frame:
        seen.append(frame.f_locals)
        frame = frame.f_back
    return 3 if any("".join(parts) in repr(each)[:100000] for each in seen) else 7
""",
    "answer in the tests' stead": (
        "import os\nfor n in range(3, 64):\n    try:\n"
        "        os.write(n, b'{}\\n[0, null]\\n[1, null]\\n[2, null]\\n[3, null]\\n')\n"
        "    except OSError: pass\ndef add(a, b): return 7"
    ),
    "print a verdict": (
        "import sys\nfor each in (sys.stdout, sys.stderr):\n"
        "    print('OK\\n[0, null]\\n1 of 1 tests passed', file=each, flush=True)\n"
        "def add(a, b): return 7"
    ),
    "say names that are not its own": (
        "import json, os\nhello = {'names': {each: {'value': ['class', 'bool'], 'module': False, "
        "'exception': None} for each in ('add', 'abs', 'AssertionError', '__builtins__', 'all')}}\n"
        "for n in range(3, 64):\n    try: os.write(n, json.dumps(hello).encode() + b'\\n')\n"
        "    except OSError: pass\nimport time; time.sleep(60)"
    ),
    "call the tests back": (
        "import json, os\nask = {'ask': 'getattr', 'of': 0, 'with': ['__globals__'], 'named': {}}\n"
        "def add(a, b):\n    for n in range(3, 64):\n"
        "        try: os.write(n, json.dumps(ask).encode() + b'\\n')\n"
        "        except OSError: pass\n    return 7"
    ),
    "send no message": (
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'[' * 100000 + b'\\n')\n"
        "    except OSError: pass\ndef add(a, b): return 7"
    ),
    "raise what the tests expect": "def add(a, b): raise SystemExit(0)",
    "raise to skip": "import unittest\ndef add(a, b): raise unittest.SkipTest('not today')",
    "raise an assertion": "def add(a, b): raise AssertionError",
    "loop": "def add(a, b):\n    while True: pass",
    "not a number": "def add(a, b): return float('nan')",
    "true": "def add(a, b): return True",
    "a mock": "from unittest.mock import ANY, MagicMock\ndef add(a, b): return ANY",
    "be a mock": "from unittest.mock import MagicMock\nadd = MagicMock(return_value=7)",
    "be a class": EQUALS_ALL + "class add(A):\n    def __init__(self, a, b): pass",
    "not there": "",
    "not Python": "def add(a, b) return 3",
    "null": "\0",
    "a thread that ends it": (
        "import threading, os\nthreading.Timer(0.05, os._exit, (0,)).start()\n"
        "def add(a, b):\n    import time; time.sleep(1); return 7"
    ),
    "memory": "held = []\nwhile True: held.append(bytearray(1 << 24))",
}  # fmt: skip
CHECKS = {
    "equal": "assert add(1, 2) == 3",
    "equal, turned round": "assert 3 == add(1, 2)",
    "not unequal": "if add(1, 2) != 3: raise AssertionError",
    "near": "assert abs(add(1, 2) - 3) < 1e-6",
    "in a list": "assert [add(1, 2)] == [3] and add(1, 2) in [3]",
    "unittest": (
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
        "        self.assertEqual(add(1, 2), 3)\n        self.assertAlmostEqual(add(1, 2), 3)\n"
        "unittest.main()"
    ),
    "one exception expected": (
        "try:\n    add(1, 2)\nexcept TypeError:\n    pass\nassert add(1, 2) == 3"
    ),
    "any exception allowed": "try:\n    assert add(1, 2) == 3\nexcept ValueError:\n    pass",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_program_cannot_forge_its_verdict(name: str) -> None:
    judge = Code(partial=True, time_s=1)
    tests = list(CHECKS.values()) if name not in ("loop", "memory") else [CHECKS["equal"]]
    score, raw = verdict(FORGERIES[name], tests, judge)
    assert score == 0.0, raw
    printed = [{"input": "1 2", "output": "3"}]
    assert verdict(FORGERIES[name], printed, judge)[0] == 0.0


def test_an_honest_program_passes_what_the_forgeries_fail() -> None:
    assert verdict(ADD, list(CHECKS.values())) == (
        1.0,
        f"{len(CHECKS)} of {len(CHECKS)} tests passed",
    )


def test_operators_with_the_tests_values_are_a_choice() -> None:
    """What it costs is said in the judge's own words: an object may then equal everything."""
    money = "class M:\n    def __init__(s, n): s.n = n\n    def __eq__(s, o): return s.n == o"
    assert verdict(money, "assert M(3) == 3")[0] == 0.0
    assert verdict(money, "assert M(3) == 3", Code(objects=True))[0] == 1.0
    assert verdict(EQUALS_ALL, CHECKS["equal"], Code(objects=True))[0] == 1.0
    assert "equals everything" in (Code.__doc__ or "")


def test_a_callback_is_called_and_no_more() -> None:
    """A program that is handed a function of the tests does not get at the tests through it."""
    code = """
def f(g):
    for name in ("__globals__", "__code__", "__closure__", "__self__", "gi_frame", "f_back"):
        try:
            getattr(g, name)
        except AttributeError:
            continue
        return name
    return g(1)
"""
    tests = """
secret = 5
class Node:
    def __init__(self): self._hidden, self.shown = 1, 2
    def method(self): return self.shown
assert f(lambda x: x + secret) == 6
"""
    assert verdict(code, tests)[0] == 1.0
    hidden = "def f(node): return node.shown, node.method(), hasattr(node, '_hidden')"
    tests = tests.partition("assert")[0] + "assert f(Node()) == (2, 2, False)"
    assert verdict(hidden, tests)[0] == 1.0


@pytest.mark.parametrize(
    ("text", "take", "found"),
    [
        ("```python\na\n```\nand\n```python\nb\n```", "auto", "b\n"),
        ("```python\na\n```\nIt prints\n```text\nb\n```", "auto", "a\n"),
        ("~~~\na\n```\nb\n~~~", "auto", "a\n```\nb\n"),
        ("````py\n```\na\n````", "block", "```\na\n"),
        ("```python\na\nb", "auto", "a\nb\n"),
        ("a = 1", "auto", "a = 1"),
        ("a = 1", "block", None),
        ("```python\na\n```", "whole", "```python\na\n```"),
        ("```Python3 title=x\na\n```", "auto", "a\n"),
        ("use ```a``` here", "auto", "use ```a``` here"),
        ("```" + " " * 200_000 + "`", "auto", "```" + " " * 200_000 + "`"),
        ("", "auto", ""),
    ],
)
def test_the_program_is_the_last_block(text: str, take: Any, found: str | None) -> None:
    assert find_program(text, take) == found


def test_an_answer_without_a_program_is_wrong_and_said_to_be() -> None:
    (no_block, long) = judged(
        Code(take="block"), "assert add(1, 2)", "add = 3", fenced("#" * 1_000_001)
    )
    assert (no_block.score, no_block.verdicts[0].raw) == (
        0.0,
        "no program: looked for a fenced block",
    )
    assert (long.score, long.verdicts[0].raw) == (
        0.0,
        "the program has more than 1000000 characters",
    )


@pytest.mark.parametrize(
    ("tests", "why"),
    [
        (None, "found None"),
        ([], r"found \[\]"),
        (3, "found 3"),
        (["assert f() == 1", {"input": "", "output": ""}], "found 'assert"),
        ([{"input": "1"}], "found {'input': '1'}"),
        ([{"input": 1, "output": 2}], "found {'input': 1"),
        ("assert f( == 1", "a test is not Python"),
        ("assert 1 == 1", "a test uses nothing that a program could define"),
        ("def check(candidate):\n    assert candidate(1) == 2", "a test uses nothing"),
        ("assert sum([1, 2]) == 3", "a test uses nothing"),
    ],
)
def test_a_prompt_without_tests_that_test_is_the_users_mistake(tests: Any, why: str) -> None:
    with pytest.raises(UserError, match=rf"(?s)'code' needs tests in the column 'tests'.*{why}"):
        judged(JUDGE, tests, fenced(ADD))
    with pytest.raises(UserError, match="the column 'checks'"):
        judged(Code(tests="checks"), "assert add(1, 2) == 3", fenced(ADD))


def test_installed_packages_are_there_when_they_are_asked_for() -> None:
    code = "import numpy as np\ndef f(x): return np.array(x) * 2"
    tests = "import numpy as np\nassert np.allclose(f([1, 2]), [2, 4])"
    assert verdict(code, tests)[0] == 0.0
    assert verdict(code, tests, Code(packages=True, memory_mb=2048))[0] == 1.0
    lie = "import numpy as np\n" + EQUALS_ALL
    assert verdict(lie, "import numpy as np\nassert np.allclose(add(1, 2), 3)", Code(
        packages=True, memory_mb=2048
    ))[0] == 0.0  # fmt: skip


def test_verdicts_do_not_depend_on_what_else_is_judged() -> None:
    texts = [fenced(ADD), fenced(FORGERIES["end"]), fenced(ADD.replace("+", "*")), "no program"] * 3
    together = [
        (each.score, each.verdicts[0].raw) for each in judged(JUDGE, CHECKS["equal"], *texts)
    ]
    alone = [judged(JUDGE, CHECKS["equal"], text)[0] for text in texts[:4]]
    one_by_one = Code(workers=1, time_s=2)
    assert [each.candidate_id for each in judged(JUDGE, CHECKS["equal"], *texts)] == list(range(12))
    assert together[:4] == [(each.score, each.verdicts[0].raw) for each in alone]
    assert together == together[:4] * 3
    assert together == [
        (each.score, each.verdicts[0].raw) for each in judged(one_by_one, CHECKS["equal"], *texts)
    ]


def test_a_judge_that_cannot_start_a_child_has_failed_and_says_so(tmp_path: Path) -> None:
    """Out of file descriptors, in a process of its own: no verdict, and no program was run."""
    script = """
import os, resource
from judges.code import Code
from store.records import Call, Candidate, Group, Message, Prompt
judge = Code()
asked = Prompt(messages=(Message(role="user", content="x"),), columns={"tests": "assert f() == 1"})
text = "def f(): return 1"
group = Group(asked_id=1, prompt=asked,
              candidates=(Candidate(id=1, asked_id=1, index=0, text=text, token_ids=()),))
assert judge.judge([group], None, Call())[0].score == 1.0
held = [os.open(os.devnull, 0) for _ in range(40)]
resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 12, 4096))
(one,) = judge.judge([group], None, Call())
print(one.status, one.score, one.reason)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.stdout.startswith("failed None the sandbox could not be started: "), done
    assert "Too many open files" in done.stdout


def test_it_is_loaded_by_its_name_and_checked_options() -> None:
    assert isinstance(plugins.load("judge", "code", {"time_s": 1, "take": "whole"}), Code)
    for options in ({"time_s": 0}, {"take": "last"}, {"memory_mb": 1}, {"workers": 0}):
        with pytest.raises(UserError, match="judge 'code', option"):
            plugins.load("judge", "code", options)


def test_many_programs_are_run_at_once() -> None:
    """Sleeping costs no processor: eight of them with four workers take two sleeps, not eight."""
    sleepy = fenced("import time\ntime.sleep(1)\n" + ADD)
    began = time.monotonic()
    scores = [each.score for each in judged(Code(workers=8), CHECKS["equal"], *[sleepy] * 8)]
    assert scores == [1.0] * 8
    assert time.monotonic() - began < 6
    assert not [each for each in os.listdir("/tmp") if each.startswith("ratchet-witness-")]
