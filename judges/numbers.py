"""Read a number the way people write one.

Exact fractions inside, so that 1/3 meets 0.3333333 by the tolerance alone.
"""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(
    r"(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?P<decimals>\.\d*)?(?:[eE](?P<exponent>[+-]?\d{1,3}))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
# An exponent or a number longer than these costs memory and minutes to write out.
_LONGEST = 300


def read_number(text: str) -> Fraction | None:
    """`text` as a number, or None when it is not one.

    Takes a sign, thousands separators, decimals, an exponent, a fraction (3/4, \\frac{3}{4}) and
    dollar signs around it: $1,234.50, $\\frac{1}{2}$.
    """
    text = text.strip().replace("\u2212", "-").strip("$").strip()
    if not text or len(text) > _LONGEST:
        return None
    sign = -1 if text[0] == "-" else 1
    text = text.removeprefix("-" if sign < 0 else "+").lstrip().removeprefix("$")
    if latex := _FRACTION.fullmatch(text):
        text = "/".join(latex.groups())
    over, slash, under = text.partition("/")
    numerator = _unsigned(over.strip())
    if numerator is None or not slash:
        return None if numerator is None else sign * numerator
    denominator = _unsigned(under.strip())
    return sign * numerator / denominator if denominator else None


def _unsigned(text: str) -> Fraction | None:
    number = _NUMBER.fullmatch(text)
    if number is None or not text.isascii():
        return None
    digits = number["whole"].replace(",", "")
    decimals = (number["decimals"] or "").removeprefix(".")
    if not digits + decimals:
        return None
    scale = int(number["exponent"] or 0) - len(decimals)
    return int(digits + decimals) * Fraction(10) ** scale
