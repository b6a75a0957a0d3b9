"""The exceptions that are not a bug: a mistake, and having to wait for somebody."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """What was asked, what was found and what would be right, in one sentence.

    The command line prints it without a traceback and exits with code 2.
    """


class Away(UserError):
    """A server that answered before does not, or has broken off what it was asked: it can be asked
    again when it is back."""


class Waiting(Exception):
    """A person is to do something before the run can go on; what, in a sentence.

    Neither a mistake nor a bug: the run ends as waiting, with exit code 5.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among those there are, with the nearest one that is."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    right = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or 'none'}"
    return UserError(f"no {kind} named {name!r}; {right}")
