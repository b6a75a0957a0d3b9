"""Keep hostile answers from scorers that would run them.

Some of reasoning-gym's scorers hand the answer to eval or to sympy's parser, which is eval too:
`__import__('os').system(...)` would be run, and `9**9**9**9` would never end. The answer is
parsed first, never run, and only what a right answer could be made of passes.
"""

from __future__ import annotations

import ast
import re

LONGEST_ANSWER = 10_000
"""Characters. Longer than any right answer but one whose reference is itself that long."""

EVALUATED_AS_LITERAL = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
EVALUATED_AS_FORMULA = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "simple_integration"}
)

_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
    | {"exp", "log", "ln", "sqrt", "Abs"}
)
_FORMULA = re.compile(r"[\w\s+\-*/().]*", re.ASCII)
# Twice what the references of these tasks need. Simplifying what still passes takes seconds at
# the worst; with exponents up to 100 it took 15.
_LONGEST_FORMULA = 500
_MOST_NODES = 200
_MOST_DIGITS = 300
_LARGEST_EXPONENT = 20
_DEEPEST_CALL = 2

# complex_arithmetic gives full marks to nan, and a Fraction of 1e999999999 fills the memory.
_NOT_FINITE = re.compile(r"\b(?:nan|inf|infinity)\b|\dj?e[+-]?\d{4,}", re.IGNORECASE)
_NO_CODE = re.compile(r"[\w\s]*")


def objection(task: str, answer: str, reference: str) -> str | None:
    """Why `answer` must not reach the scorer of `task`, in words; None when it may."""
    if answer.strip() == reference.strip():
        return None
    limit = max(LONGEST_ANSWER, 2 * len(reference))
    if len(answer) > limit:
        return f"it has {len(answer)} characters, more than {limit}"
    if _NOT_FINITE.search(answer) and not _NOT_FINITE.search(reference):
        return "it holds a number that is not finite or has a huge exponent"
    if task in EVALUATED_AS_LITERAL and not _is_literal(answer):
        return "it is neither words nor a Python literal"
    if task in EVALUATED_AS_FORMULA and not _is_formula(answer):
        return "it is not a formula of numbers, letters and functions of a modest size"
    return None


def _is_literal(answer: str) -> bool:
    if _NO_CODE.fullmatch(answer):
        return True
    try:
        ast.literal_eval(answer.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _is_formula(answer: str) -> bool:
    if len(answer) > _LONGEST_FORMULA or not _FORMULA.fullmatch(answer):
        return False
    try:
        tree = ast.parse(answer.strip(), mode="eval").body
        if sum(1 for _ in ast.walk(tree)) > _MOST_NODES:
            return False
        return _digits(tree, calls=0) <= _MOST_DIGITS
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _digits(node: ast.expr, calls: int) -> int:
    """At most how many digits the value could have. Raises ValueError for what is no formula."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return len(str(value))
        case ast.Name(id=name) if len(name) == 1 or name == "pi":
            return 1
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _digits(operand, calls)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _digits(left, calls) * max(1, _exponent(right))
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right=right):
            return _digits(left, calls) + _digits(right, calls)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if (
            name in _FUNCTIONS and calls < _DEEPEST_CALL
        ):
            return _digits(argument, calls + 1) + 1
    raise ValueError("not a formula")


def _exponent(node: ast.expr) -> int:
    """The size of an exponent that is written as a number: 2, -2, 1/2, 0.5."""
    match node:
        case ast.Constant(value=int() | float() as value) if value <= _LARGEST_EXPONENT:
            return int(value)
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _exponent(operand)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return max(_exponent(left), _exponent(right))
    raise ValueError("not a number for an exponent")
