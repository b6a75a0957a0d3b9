"""Code that a user names in an option, called with what it takes."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judges.asking import timed
from roles import plugins
from store.errors import UserError


@dataclass(frozen=True)
class Function:
    """A function of the user's, and where it is named."""

    spec: str
    code: Callable[..., Any]

    @property
    def name(self) -> str:
        return str(getattr(self.code, "__name__", type(self.code).__name__))

    @property
    def is_async(self) -> bool:
        """Whether it says so. One that returns what can be awaited need not say so."""
        call = getattr(self.code, "__call__", None)  # noqa: B004
        return inspect.iscoroutinefunction(self.code) or inspect.iscoroutinefunction(call)

    def taken(self, offered: Mapping[str, Any]) -> dict[str, Any]:
        """What of `offered` its signature takes. Raises UserError when it wants more than that."""
        parameters = inspect.signature(self.code).parameters.values()
        named = [
            each
            for each in parameters
            if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        ]
        for each in named:
            if each.default is each.empty and each.name not in offered:
                raise UserError(
                    f"{self.spec!r} wants {each.name!r}, and the prompts have no such column; "
                    f"there are: {', '.join(offered)}"
                )
        if any(each.kind == each.VAR_KEYWORD for each in parameters):
            return dict(offered)
        return {each.name: offered[each.name] for each in named if each.name in offered}

    def question(self, *given: Any, **named: Any) -> Callable[[], Any]:
        """A call that can be made later: what it returned, and the seconds."""
        return timed(self.code, *given, **named)


def find(what: str, spec: str, default: str | None = None) -> Any:
    """What `path/file.py:name` or `module:name` names. Raises UserError where there is nothing.

    default: the name that is meant where `spec` is a file alone.
    """
    if default is not None and spec.endswith(".py"):
        spec = f"{spec}:{default}"
    return plugins.find_code(what, spec)


def find_function(what: str, spec: str, arguments: Mapping[str, Any] | None = None) -> Function:
    """The function that `spec` names, or with `arguments` the one that what it names returns."""
    found = find(what, spec)
    if callable(found) and (arguments is not None or inspect.isclass(found)):
        found = plugins.made(what, spec, found, arguments or {})
    if not callable(found):
        raise UserError(f"{spec!r} is not a {what}: it is {_kind(found)}, and cannot be called")
    return Function(spec, found)


def version_of(own: str, *codes: Any) -> str:
    """A judge's version of which the text of these codes' modules is a part."""
    files = {_file_of(code) for code in codes} - {None}
    texts = [Path(file).read_bytes() for file in sorted(map(str, files))]
    return f"{own} {hashlib.sha256(b''.join(texts)).hexdigest()[:12]}"


def _file_of(code: Any) -> str | None:
    # An instance is known by its class, and what functools made of a function by the function.
    code = inspect.unwrap(getattr(code, "func", code))
    name = getattr(code, "__module__", None) or type(code).__module__
    return getattr(sys.modules.get(name), "__file__", None)


def _kind(found: Any) -> str:
    name = type(found).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
