"""Use what a program defines from another process, as if it were here.

Plain values cross as copies: what arrives is a list or a number of this interpreter's own, and
whether it equals another is for this interpreter to say. Everything else stays where it is and
is used through a `Remote`. So a program can lie about what it computed and about nothing else.
"""

from __future__ import annotations

import builtins
import json
import operator

from judges.sandbox import values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, BinaryIO

_LONGEST_MESSAGE = 1 << 26
_BROKEN = (ValueError, KeyError, TypeError, IndexError, AttributeError, MemoryError, RecursionError)

ENDED = "the program ended"


class Gone(BaseException):
    """The other process ended, or said what cannot be understood.

    No Exception, so that a test which expects some exception does not take it for that one.
    """


class ProgramError(Exception):
    """An exception of a class that is not known here."""


class Peer:
    """One end of the connection. Both ends may ask; who waits for an answer also answers.

    guarded: the other end may call what it was shown and use its operators, and reads and sets
    only public attributes of objects whose class is defined here. Otherwise it may do anything.
    answers_operators: whether the other end's objects answer operators with plain values.
    """

    def __init__(
        self, reads: BinaryIO, writes: BinaryIO, *, guarded: bool, answers_operators: bool = False
    ) -> None:
        self._reads, self._writes = reads, writes
        self._guarded = guarded
        self.answers_operators = answers_operators
        self._shown: list[Any] = []
        self._numbers: dict[int, int] = {}
        self.exceptions: dict[str, type[Exception]] = {}
        self.gone: str | None = None

    def send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        try:
            self._writes.write(line)
            self._writes.flush()
        except OSError:
            self._lose(ENDED)

    def receive(self) -> dict[str, Any]:
        """The next message. Raises Gone where there is none."""
        line = b""
        if self.gone is None:
            line = self._reads.readline(_LONGEST_MESSAGE)
        if not line.endswith(b"\n"):
            self._lose(ENDED)
        try:
            message = json.loads(line)
        except _BROKEN:
            message = None
        if not isinstance(message, dict):
            self._lose("the program sent what is no message")
        return dict(message)

    def _lose(self, why: str) -> None:
        self.gone = self.gone or why
        raise Gone(self.gone)

    def ask(self, what: str, number: int, *given: Any, **named: Any) -> Any:
        """What the other end's object gives, when it is called or whatever else is asked."""
        asked = [self.encode(each) for each in given]
        words = {name: self.encode(each) for name, each in named.items()}
        self.send({"ask": what, "of": number, "with": asked, "named": words})
        while "ask" in (heard := self.receive()):
            self.serve(heard)
        try:
            after = [self.decode(each) for each in heard.get("after", ())]
            raised = self._raised(*heard["raises"]) if "raises" in heard else None
            value = None if raised else self.decode(heard["gives"])
        except _BROKEN:
            self._lose("the program sent what is no message")
        for old, new in zip(given, after, strict=False):
            values.refill(old, new)
        if raised is not None:
            raise raised
        return value

    def serve(self, message: dict[str, Any]) -> None:
        """Do what the other end asks and send what comes of it."""
        try:
            target = self._shown[message["of"]]
            given = [self.decode(each) for each in message["with"]]
            named = {str(name): self.decode(each) for name, each in message["named"].items()}
            value = self._done(message["ask"], target, given, named)
            answer: dict[str, Any] = {"gives": self.encode(value)}
            if message["ask"] == "call":
                after = [self.encode(each) for each in given]
                answer |= {"after": after} if after != message["with"] else {}
        except Gone:
            raise
        except BaseException as error:  # noqa: BLE001 - it is the other end's to handle
            answer = {"raises": self.told(error)}
        self.send(answer)

    def _done(self, what: str, target: Any, given: list[Any], named: dict[str, Any]) -> Any:
        if what == "call":
            return target(*given, **named)
        if what in ("getattr", "setattr", "delattr"):
            own = type(target).__module__ == "__main__"
            if self._guarded and (not own or given[0].startswith("_")):
                raise AttributeError(given[0])
            return getattr(builtins, what)(target, *given)
        return OPERATIONS[what](target, *given)

    def told(self, error: BaseException) -> list[Any]:
        """An exception as it crosses: the names of its classes, its arguments, its text."""
        names = [each.__name__ for each in type(error).__mro__]
        try:
            return [names, self.encode(list(error.args)), str(error)]
        except Exception:  # noqa: BLE001 - the program's own __str__ may do whatever it likes
            return [names, ["list"], ""]

    def _raised(self, names: list[str], args: Any, text: str) -> Exception:
        known = self.exceptions
        for name in names:
            found = known.get(name) or getattr(builtins, name, None)
            if not (isinstance(found, type) and issubclass(found, Exception)):
                break
            if found is Exception and name != names[0]:
                break
            try:
                return found(*self.decode(args))
            except TypeError:
                break
        return ProgramError(f"{names[0]}: {text}")

    def encode(self, value: Any) -> Any:
        """JSON that says a plain value, or which object is meant."""
        return values.encode(value, self._mention)

    def decode(self, said: Any) -> Any:
        return values.decode(said, self._mentioned)

    def _mention(self, value: Any) -> list[Any]:
        if isinstance(value, Remote):
            return ["yours", object.__getattribute__(value, "_number")]
        return ["mine", self._number_of(value)]

    def _mentioned(self, whose: str, number: int) -> Any:
        return Remote(self, int(number)) if whose == "mine" else self._shown[number]

    def _number_of(self, value: Any) -> int:
        number = self._numbers.setdefault(id(value), len(self._shown))
        if number == len(self._shown):
            self._shown.append(value)
        return number


_UNARY = ("__neg__", "__pos__", "__invert__", "__abs__", "__index__")
_ITEMS = ("__getitem__", "__setitem__", "__delitem__")
_COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
_ARITHMETIC = (
    *("__add__", "__sub__", "__mul__", "__truediv__", "__floordiv__", "__mod__", "__pow__"),
    *("__matmul__", "__and__", "__or__", "__xor__", "__lshift__", "__rshift__"),
)


def _reflected(name: str) -> str:
    return f"__r{name[2:]}"


def _swapped(do: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda own, other: do(other, own)


OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in (*_UNARY, *_ITEMS, *_COMPARISONS, *_ARITHMETIC)},
    **{_reflected(name): _swapped(getattr(operator, name)) for name in _ARITHMETIC},
    **{f"__{do.__name__}__": do for do in (len, iter, next, bool, str, repr, hash, int, float)},
    **{f"__{do.__name__}__": do for do in (round, reversed, format)},
    "__contains__": operator.contains,
    "__instancecheck__": lambda own, other: isinstance(other, own),
}


_DESCRIPTIONS = ("__name__", "__qualname__", "__doc__", "__dict__")


class Remote:
    """An object of the other process.

    It answers operators with the other process's objects. With a value of this one it does not,
    unless it was decided that it may: an object that says it equals whatever it is shown would
    pass every test.
    """

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return _ask(self, "call", *given, **named)

    def __getattr__(self, name: str) -> Any:
        # Libraries look for methods of such names and trust what they return, numpy's
        # __array_interface__ to be an address.
        if name.startswith("__") and name not in _DESCRIPTIONS:
            raise AttributeError(name)
        return _ask(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "setattr", name, value)

    def __delattr__(self, name: str) -> None:
        _ask(self, "delattr", name)

    def __contains__(self, item: Any) -> bool:
        if _answers(self, item):
            return bool(_ask(self, "__contains__", item))
        return any(each is item or each == item for each in self)  # type: ignore[attr-defined]


def _ask(remote: Remote, what: str, *given: Any, **named: Any) -> Any:
    peer: Peer = object.__getattribute__(remote, "_peer")
    return peer.ask(what, object.__getattribute__(remote, "_number"), *given, **named)


def _answers(remote: Remote, other: Any) -> bool:
    peer: Peer = object.__getattribute__(remote, "_peer")
    return peer.answers_operators or isinstance(other, Remote)


def _forwards(name: str, with_values: bool) -> Callable[..., Any]:
    def forward(self: Remote, *given: Any) -> Any:
        if not with_values and not _answers(self, given[0]):
            return NotImplemented
        return _ask(self, name, *given)

    return forward


for _name in OPERATIONS:
    if _name != "__contains__":
        _shows_values = _name in (*_COMPARISONS, *_ARITHMETIC, *map(_reflected, _ARITHMETIC))
        setattr(Remote, _name, _forwards(_name, not _shows_values))
