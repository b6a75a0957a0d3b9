"""The value of an arithmetic problem, read from its own text: nobody has to know its answer."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

_EXPRESSION = re.compile(r"[-+*/() \d.]*\d[-+*/() \d.]*")
_LONGEST = 200
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value_of(text: str) -> str | None:
    """What the last expression in a text comes to, as an integer or a fraction in digits; None
    where there is none that has an operation in it, or that has a value."""
    found = [each.strip(" .") for each in _EXPRESSION.findall(text[-_LONGEST:])]
    written = [each for each in found if re.search(r"[\d)]\s*[-+*/]\s*[-(\d]", each)]
    if not written:
        return None
    try:
        value = _value(ast.parse(written[-1], mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return None
    return str(value)


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=inside):
            return -_value(inside)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(left), _value(right))
    raise ValueError("no arithmetic")
