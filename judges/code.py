"""Run a candidate's program and see whether it does what the tests ask.

A program that nobody trusts runs in a sandbox of its own (`judges.sandbox`), and the tests in
another: it can neither end them early nor print, patch or exit its way to a verdict. What it
computes crosses as plain values, and those are compared where it cannot reach.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from judges.base import Opinion, PointwiseJudge
from judges.sandbox import Child, Limits, attend, require
from judges.sandbox.remote import ENDED
from roles.protocols import Policy
from store.errors import UserError
from store.records import Call, Completion, Prompt

Take = Literal["auto", "block", "whole"]

LONGEST_PROGRAM = 1_000_000
"""Characters."""

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_PYTHON = ("", "python", "python3", "py")


@dataclass(frozen=True)
class Result:
    """How many tests a program passed, and what the first that failed had to say."""

    passed: int
    total: int
    failed: tuple[tuple[int, str], ...]


class Code(PointwiseJudge):
    """A judge of Python programs: it runs them with the prompt's tests in a sandbox.

    take: where the program is: `block` the last fenced block of Python, `whole` the whole text,
    `auto` the block where there is one.
    tests: the column of the prompt with the tests. A text of Python, or a list of such, is run
    with what the program defines; a list of {"input": ..., "output": ...} is what the program
    reads and must print, white space at the ends of lines aside.
    partial: score the share of the tests passed instead of 1.0 for all and 0.0 otherwise.
    objects: let the program's own objects answer operators with the tests' values, as tests of a
    class with operators need. It lets a program return an object that equals everything.
    packages: let programs and tests import what is installed beside this one.
    time_s: of processor time, for each program and its tests; on the clock three times that.
    threads: a program has no processes but itself. output_kb: of what it prints.

    Whatever the program does wrong, crash, time-out and too much memory among it, is a score of
    0.0. A judge that could not run it has failed. Tests that change what they passed to a
    function, or ask of its value only whether it is true, are as weak here as anywhere.
    """

    version = "1"

    def __init__(
        self,
        take: Take = "auto",
        tests: str = "tests",
        partial: bool = False,
        objects: bool = False,
        packages: bool = False,
        time_s: Annotated[int, Field(ge=1, le=600)] = 5,
        memory_mb: Annotated[int, Field(ge=64)] = 512,
        threads: Annotated[int, Field(ge=1, le=256)] = 8,
        output_kb: Annotated[int, Field(ge=1, le=65536)] = 256,
        workers: Annotated[int, Field(ge=1, le=256)] = 4,
    ):
        self.take, self.tests, self.partial = take, tests, partial
        self.objects, self.packages = objects, packages
        self.limits = Limits(
            time_s=time_s, memory_mb=memory_mb, threads=threads, output_kb=output_kb
        )
        self.concurrency = workers
        self._threads = ThreadPoolExecutor(workers)
        require()

    async def score(
        self, prompt: Prompt, completion: Completion, policy: Policy | None, call: Call
    ) -> Opinion:
        tests = self._tests_of(prompt)
        program = find_program(completion.text, self.take)
        if program is None:
            return Opinion(score=0.0, raw="no program: looked for a fenced block")
        if len(program) > LONGEST_PROGRAM:
            return Opinion(score=0.0, raw=f"the program has more than {LONGEST_PROGRAM} characters")
        try:
            loop = asyncio.get_running_loop()
            result = await loop.run_in_executor(self._threads, self._run, program, tests)
        except OSError as error:
            why = f"the sandbox could not be started: {error}"
            return Opinion(score=None, raw="", status="failed", reason=why)
        right = result.passed == result.total
        share = result.passed / result.total
        return Opinion(score=share if self.partial else float(right), raw=_told(result))

    def _tests_of(self, prompt: Prompt) -> list[Any]:
        """Texts, or the pairs of what is read and what is printed. Raises UserError for others."""
        found = prompt.columns.get(self.tests)
        tests = [found] if isinstance(found, str) else found
        if not isinstance(tests, list) or not tests:
            raise _lacks(prompt, self.tests, f"found {_short(found)}")
        if all(isinstance(test, str) for test in tests):
            for test in tests:
                if (why := _objection(test)) is not None:
                    raise _lacks(prompt, self.tests, f"{why}: {_short(test)}")
            return tests
        for test in tests:
            fits = isinstance(test, dict) and set(test) == {"input", "output"}
            if not fits or not all(isinstance(each, str) for each in test.values()):
                raise _lacks(prompt, self.tests, f"found {_short(test)}")
        return [(test["input"], test["output"]) for test in tests]

    def _run(self, program: str, tests: Sequence[Any]) -> Result:
        run = self._run_asserts if isinstance(tests[0], str) else self._run_programs
        errors = run(program, tests)
        failed = tuple((at, error) for at, error in enumerate(errors, 1) if error is not None)
        return Result(passed=len(errors) - len(failed), total=len(tests), failed=failed)

    def _run_programs(self, program: str, tests: Sequence[tuple[str, str]]) -> list[str | None]:
        """The error of each test, None where it passed; unless `partial`, up to the first."""
        errors: list[str | None] = []
        for given, wanted in tests:
            errors.append(self._run_program(program, given, wanted))
            if errors[-1] is not None and not self.partial:
                break
        return errors

    def _run_program(self, program: str, given: str, wanted: str) -> str | None:
        child = Child(
            "program",
            {"code": program},
            self.limits,
            stdin=given.encode(),
            packages=self.packages,
        )
        attend([child], child, self.limits.wall_s)
        _raise_if_bare(child)
        if child.ended_by is not None:
            return child.ended_by
        if child.exit != 0:
            return _last_line(child) or f"it ended with {child.exit}"
        printed = child.out.decode(errors="replace")
        return None if _lines(printed) == _lines(wanted) else f"it printed {_short(printed)}"

    def _run_asserts(self, program: str, tests: Sequence[str]) -> list[str | None]:
        """As `_run_programs`. A program that is gone is started anew for the tests left."""
        errors: list[str | None] = []
        while len(errors) < len(tests):
            left = list(enumerate(tests))[len(errors) :]
            errors += self._run_pair(program, left)
            if not self.partial and any(errors):
                break
        return errors

    def _run_pair(self, program: str, tests: Sequence[tuple[int, str]]) -> list[str | None]:
        """The errors of the first tests, of one at least: up to where the program was gone."""
        questions, answers = os.pipe(), os.pipe()
        roles = (
            ("served", questions[0], answers[1], {"code": program}),
            (
                "testing",
                answers[0],
                questions[1],
                {
                    "tests": tests,
                    "answers_operators": self.objects,
                    "first_only": not self.partial,
                },
            ),
        )
        children: list[Child] = []
        try:
            for role, reads, writes, order in roles:
                order = {**order, "reads": reads, "writes": writes}
                ends = (reads, writes)
                children.append(
                    Child(role, order, self.limits, pass_fds=ends, packages=self.packages)
                )
        except BaseException:
            for child in children:
                child.close()
            raise
        finally:
            for end in (*questions, *answers):
                os.close(end)
        served, testing = children
        attend(children, testing, self.limits.wall_s)
        for child in children:
            _raise_if_bare(child)
        how = served.ended_by or _last_line(served) or ENDED
        errors = [how if error == ENDED else error for _, error in testing.reported]
        if testing.exit != 0:
            errors.append(served.ended_by or testing.ended_by or _last_line(testing) or ENDED)
        return errors


def find_program(text: str, take: Take) -> str | None:
    """The program in what a policy wrote; None when it is to be in a block and there is none.

    A block that is never closed goes on to the end of the text.
    """
    if take == "whole":
        return text
    blocks: list[list[str]] = []
    fence = ""
    inside: list[str] | None = None
    for line in text.splitlines():
        opens = _FENCE.match(line)
        rest = line[opens.end() :].strip() if opens else ""
        if fence and opens and not rest and opens[1].startswith(fence):
            fence, inside = "", None
        elif inside is not None:
            inside.append(line)
        elif opens and not fence and "`" not in rest:
            fence = opens[1]
            if (rest.split() or [""])[0].lower() in _PYTHON:
                blocks.append(inside := [])
    if blocks:
        return "\n".join(blocks[-1]) + "\n"
    return text if take == "auto" else None


def _objection(test: str) -> str | None:
    """Why a test cannot tell a right program from a wrong one; None when it may."""
    try:
        tree = ast.parse(test)
    except (SyntaxError, ValueError) as error:
        return f"a test is not Python ({error})"
    used, own = set[str](), set(dir(builtins))
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name):
                (used if isinstance(node.ctx, ast.Load) else own).add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                own.add(name)
            case ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)) | ast.arg(arg=name):
                own.add(name)
            case ast.alias(name=name, asname=other):
                own.add(other or name.partition(".")[0])
    return None if used - own else "a test uses nothing that a program could define"


def _raise_if_bare(child: Child) -> None:
    if child.lacks is not None:
        raise OSError(child.lacks)


def _told(result: Result) -> str:
    words = f"{result.passed} of {result.total} tests passed"
    failed = "; ".join(f"test {at}: {error}" for at, error in result.failed[:5])
    return f"{words}; {failed}" if failed else words


def _lines(printed: str) -> list[str]:
    return [line.rstrip() for line in printed.rstrip().split("\n")]


def _last_line(child: Child) -> str:
    lines = child.err.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def _lacks(prompt: Prompt, column: str, what: str) -> UserError:
    return UserError(
        f"the judge 'code' needs tests in the column {column!r}: Python that uses what a program "
        'defines, a list of such, or a list of {"input": text, "output": text}; '
        f"prompt {prompt.digest[:12]} ({_short(prompt.messages[-1].content, 60)}): {what}"
    )


def _short(value: object, longest: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= longest else text[:longest] + "…"
