"""Whether two mathematical expressions are equal, by math-verify, asked again and again.

Reading an expression is not evaluating Python: it goes through a grammar of LaTeX, and all of it
must fit. What it means is worked out by sympy, which may take for ever: whoever asks keeps the
time and kills.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, TextIO

_PLAIN = {"−": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty "}
_PLAIN |= {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in "}
_PAIRS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))

# What people write outside LaTeX, and what it means in it.
_MEANT = (
    (re.compile(r"\*\*\s*(-?\w+)"), r"^{\1}"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})(?![\w.])"), r"\1 \\cdot 10^{\2}"),
    (re.compile(r"(?<![\w.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])"), r"(\1+\\frac{\2}{\3})"),
    (re.compile(r"(?<=\d)(?: |\\,)(?=\d{3}(?!\d))"), ""),
)
# The grammar takes "1 2" for a sum, "1.2.3" for a product and "1_2" for 1. A number may follow
# the 2 of \log_2.
_NO_ONE_NUMBER = re.compile(r"(?<![_^\d.])\d+(?:\.\d*)?(?:\s|\\[ ,;:!])+\d|\.\d+\.|\d\s*_")


class Unreadable(Exception):
    """It is no expression, in words."""


def main(order: Mapping[str, Any], report: TextIO) -> None:
    """Answer each line of the standard input with a line of the report."""
    import logging

    import math_verify  # noqa: F401 - so that no question has to wait for it
    import sympy  # type: ignore[import-untyped]  # noqa: F401

    logging.disable()
    _say(report, {"ready": True})
    for line in sys.stdin:
        question = json.loads(line)
        # Should whoever asked be gone, nobody else would end this.
        signal.alarm(int(question["time_s"]) + 2)
        _say(report, _answer(question))
        signal.alarm(0)
    os._exit(0)


def _say(report: TextIO, answer: Mapping[str, Any]) -> None:
    report.write(json.dumps(answer) + "\n")
    report.flush()


def _answer(question: Mapping[str, Any]) -> dict[str, Any]:
    from math_verify import verify
    from sympy.core.cache import clear_cache  # type: ignore[import-untyped]

    clear_cache()  # an answer's verdict must not depend on how much memory others have used
    read = {}
    for which in ("reference", "answer"):
        try:
            read[which] = expression(question[which])
        except Unreadable as error:
            return {"unreadable": which, "why": str(error)}
    right = verify(
        read["reference"],
        read["answer"],
        float_rounding=question["digits"],
        strict=question["strict"],
        allow_set_relation_comp=True,
        timeout_seconds=None,
    )
    return {"right": bool(right)}


def expression(text: str) -> Any:
    """What the whole text means, as sympy has it. Raises Unreadable."""
    from latex2sympy2_extended.latex2sympy2 import (  # type: ignore[import-untyped]
        NormalizationConfig,
        latex2sympy,
        normalize_latex,
    )
    from math_verify.grader import should_treat_as_complex

    meant = _as_latex(text)
    rules = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none"
    )
    try:
        normal = normalize_latex(meant, config=rules)
        if _NO_ONE_NUMBER.search(meant) or _NO_ONE_NUMBER.search(normal):
            raise Unreadable("it is several numbers")
        if not _is_whole(normal):
            raise Unreadable("it does not end where the expression does")
        return latex2sympy(
            normal, is_real=not should_treat_as_complex(normal), normalization_config=None
        )
    except Unreadable:
        raise
    except Exception as error:  # the grammar raises Exception itself
        raise Unreadable(str(error).partition("\n")[0] or type(error).__name__) from error


def _as_latex(text: str) -> str:
    text = text.strip()
    for opening, closing in _PAIRS:
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening):
            text = inner.strip()
            break
    text = text.removesuffix(".").strip()
    for sign, meant in _PLAIN.items():
        text = text.replace(sign, meant)
    for pattern, meaning in _MEANT:
        text = pattern.sub(meaning, text)
    if "$" in text.replace(r"\$", "").lstrip("$"):
        raise Unreadable("it is several expressions")
    return text


def _is_whole(latex: str) -> bool:
    """Whether the grammar takes all of it: it is content with a beginning that fits."""
    from antlr4 import CommonTokenStream, InputStream, Token  # type: ignore[import-untyped]
    from latex2sympy2_extended.antlr_parser import (  # type: ignore[import-untyped]
        PSLexer,
        PSParser,
    )

    lexer = PSLexer(InputStream(latex))
    lexer.removeErrorListeners()
    tokens = CommonTokenStream(lexer)
    parser = PSParser(tokens)
    parser.removeErrorListeners()
    parser.math()
    return bool(tokens.LA(1) == Token.EOF)
