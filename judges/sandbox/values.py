"""Plain values as JSON, and back as equal ones of this interpreter's own classes."""

from __future__ import annotations

import builtins
import sys
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_SCALARS = (bool, int, float, str)


def encode(value: Any, mention: Callable[[Any], list[Any]]) -> Any:
    """mention: what stands for a value that is not plain: a word and a number.

    A value of a class derived from a plain one is written as the plain one.
    """
    if value is None or type(value) in _SCALARS:
        return value
    if isinstance(value, type):
        name = value.__name__
        return ["class", name] if getattr(builtins, name, None) is value else mention(value)
    for name, kind, taken, _ in _CONTAINERS:
        if isinstance(value, kind):
            return [name, *(encode(each, mention) for each in taken(value))]
    for scalar in _SCALARS[1:]:
        if isinstance(value, scalar):
            return scalar(value)
    for name, (module, class_name, told) in _WRITTEN.items():
        known: Any = getattr(sys.modules.get(module), class_name, None)
        if type(value) is known:
            return [name, *told(value)]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), mention)
    return mention(value)


def decode(said: Any, mentioned: Callable[[str, int], Any]) -> Any:
    """mentioned: the value that a word and a number stand for.

    Raises an exception of some kind for what `encode` does not write.
    """
    if said is None or type(said) in _SCALARS:
        return said
    name, *rest = said
    if name in ("mine", "yours"):
        return mentioned(name, *rest)
    if name == "class":
        found = getattr(builtins, rest[0])
        if not isinstance(found, type):
            raise ValueError(f"{rest[0]!r} is no class")
        return found
    if name in _WRITTEN:
        return _written(name, rest)
    return _MADE[name]([decode(each, mentioned) for each in rest])


def _pairs(flat: list[Any]) -> dict[Any, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _flat(value: dict[Any, Any]) -> list[Any]:
    return [each for pair in value.items() for each in pair]


# Name, class, what it holds, and how it is made of that.
_CONTAINERS: tuple[tuple[str, type, Callable[[Any], Any], Callable[[list[Any]], Any]], ...] = (
    ("list", list, list, list),
    ("tuple", tuple, tuple, tuple),
    ("dict", dict, _flat, _pairs),
    ("set", set, list, set),
    ("frozenset", frozenset, list, frozenset),
    ("deque", deque, list, deque),
    ("bytes", bytes, list, bytes),
    ("bytearray", bytearray, list, bytearray),
    ("complex", complex, lambda value: (value.real, value.imag), lambda parts: complex(*parts)),
    ("range", range, lambda value: (value.start, value.stop, value.step), lambda of: range(*of)),
)
_MADE = {name: made for name, _, _, made in _CONTAINERS}

# Name: module, class, the arguments that make an equal one.
_WRITTEN: dict[str, tuple[str, str, Callable[[Any], list[Any]]]] = {
    "Fraction": ("fractions", "Fraction", lambda value: [str(value)]),
    "Decimal": ("decimal", "Decimal", lambda value: [str(value)]),
    "date": ("datetime", "date", lambda value: [value.year, value.month, value.day]),
    "datetime": (
        "datetime",
        "datetime",
        lambda value: [*value.timetuple()[:6], value.microsecond],
    ),
    "timedelta": (
        "datetime",
        "timedelta",
        lambda value: [value.days, value.seconds, value.microseconds],
    ),
}


def _written(name: str, rest: list[Any]) -> Any:
    module, class_name, _ = _WRITTEN[name]
    return getattr(__import__(module), class_name)(
        *(each for each in rest if type(each) in (int, str))
    )


def refill(old: Any, new: Any) -> None:
    """Give what was passed to a call the contents that the call left it with."""
    if type(old) is not type(new):
        return
    if isinstance(old, (list, bytearray)):
        old[:] = new
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)
    elif isinstance(old, deque):
        old.clear()
        old.extend(new)
