"""Which package may import which: the floors of the house, read from its source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {
    "loop": {"judges", "roles", "kernels", "store"},
    "judges": {"roles", "kernels", "store"},
    "roles": {"kernels", "store"},
    "kernels": set(),
    "store": set(),
}
PERSISTENCE = {"connect", "database", "migrations", "rows", "session", "stages", "tables"}
"""Modules of the store that roles and judges do not see: roles compute, the loop persists."""
HEAVY = {"torch", "transformers", "trl", "vllm", "triton", "langgraph", "pydantic", "sqlmodel"}
HEAVY |= {"sqlalchemy", "numpy", "datasets", "accelerate", "reasoning_gym", "peft"}
CATCHES_EVERYTHING = {
    ("loop/run.py", "_drive"): "a failed stage ends the run with its traceback and exit code 4",
    ("roles/plugins.py", "_loading"): "what a user's module raises is told in a sentence, code 2",
    ("judges/sandbox/expressions.py", "expression"): "the grammar of LaTeX raises Exception itself",
    ("judges/sandbox/remote.py", "serve"): "what a program raises is for the tests to handle",
    ("judges/sandbox/remote.py", "told"): "a program's exception may raise when it is printed",
    ("judges/sandbox/testing.py", "_failure"): "whatever ends a test early fails it",
    ("loop/child.py", "serve"): "what a stage raises is told to the driver, which raises it",
    ("loop/outcome.py", "told"): "a plug-in's exception may raise when it is packed",
    ("loop/outcome.py", "heard"): "a plug-in's exception may raise when it is unpacked",
    ("loop/spread.py", "perform"): "what a task raises is told to the driver, which raises it",
    ("loop/child.py", "_read"): "what cannot be read would be waited for: the process ends",
    ("judges/contract.py", "_tried"): "whatever a judge raises is what the check found",
}
FILES = sorted(file for package in BELOW for file in (ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Every dotted name a tree imports, `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(each.name.split(".")) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((*node.module.split("."), each.name) for each in node.names)


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_only_what_lies_below_it(file):
    package = file.relative_to(ROOT).parts[0]
    for name in imported(parsed(file)):
        assert name[0] not in BELOW.keys() - BELOW[package] - {package}, ".".join(name)
        if package in ("roles", "judges") and name[0] == "store":
            assert name[1] not in PERSISTENCE, ".".join(name)


def test_the_command_line_starts_without_a_heavy_import():
    for file in (*(ROOT / "loop" / "cli").glob("*.py"), ROOT / "loop" / "__main__.py"):
        top = [node for node in parsed(file).body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in top:
            assert not {name[0] for name in imported(node)} & HEAVY, ast.unparse(node)
    # And none by way of a module of ours.
    ask = "import sys, loop.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & HEAVY


def handlers(tree: ast.Module) -> Iterator[tuple[str, ast.ExceptHandler]]:
    """Every exception handler, with the name of the innermost function around it."""

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, ast.ExceptHandler]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ExceptHandler):
                yield name, child
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from walk(child, child.name if named else name)

    return walk(tree, "")


def test_nothing_catches_everything_but_where_a_reason_is_given():
    found = set()
    for file in FILES:
        for name, handler in handlers(parsed(file)):
            caught = "" if handler.type is None else ast.unparse(handler.type)
            reraises = isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None
            everything = {"", "Exception", "BaseException"} & set(caught.strip("()").split(", "))
            if everything and not reraises:
                found.add((str(file.relative_to(ROOT)), name))
    assert found == set(CATCHES_EVERYTHING)
