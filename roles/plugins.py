"""Find a role's class by name and make it from the options a configuration gives.

A built-in is a plug-in like any other: an entry point. `__init__`'s signature is the list of
options; nothing is registered by import and no file is put on sys.path.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from roles import protocols
from store.errors import UserError, unknown

PROTOCOLS: dict[str, type] = {
    "engine": protocols.Engine,
    "proposer": protocols.Proposer,
    "generator": protocols.Generator,
    "judge": protocols.Judge,
    "filter": protocols.Filter,
    "trainer": protocols.Trainer,
}
GROUPS = {role: f"loop.{role}s" for role in PROTOCOLS}


def names(role: str) -> list[str]:
    """The names that installed packages offer for a role."""
    return sorted({point.name for point in entry_points(group=GROUPS[role])})


def find(role: str, spec: str) -> type:
    """The class that `spec` names: an entry point, `module:Name` or `path/file.py:Name`."""
    if ":" not in spec:
        points = {point.name: point for point in entry_points(group=GROUPS[role])}
        if spec not in points:
            raise unknown(role, spec, points)
        with _loading(role, spec):
            found = points[spec].load()
    else:
        found = find_code(role, spec, names(role), inspect.isclass)
    return _checked(role, spec, found)


def find_code(
    role: str,
    spec: str,
    known: Sequence[str] = (),
    suits: Callable[[Any], bool] = callable,
) -> Any:
    """What `module:name` or `path/file.py:name` names, whatever it is.

    role: what it is wanted as, in words. known: names that would do as well. suits: what may be
    suggested in place of a name that is not there.
    """
    place, _, name = spec.rpartition(":")
    in_file = place.endswith(".py")
    if not name or not (in_file or all(place.split("."))):
        short = f"a name, as {', '.join(known)}, " if known else ""
        raise UserError(
            f"{spec!r} names no {role}; right are {short}module:Name or path/file.py:Name"
        )
    with _loading(role, spec):
        module = _from_file(role, Path(place)) if in_file else _module(role, place)
    if not hasattr(module, name):
        own = [
            key
            for key, value in vars(module).items()
            if suits(value) and getattr(value, "__module__", None) == module.__name__
        ]
        raise unknown(f"{role} in {place}", name, own)
    return getattr(module, name)


def made(role: str, spec: str, found: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """What `found` makes of `options`. Raises UserError where the plug-in's own code fails."""
    with _loading(role, spec):
        return found(**options)


def load(role: str, spec: str, options: Mapping[str, Any]) -> Any:
    """The role that `spec` names, made with `options`.

    Raises UserError for a name that is not there, an option it does not have, a value that does
    not fit the option's annotation, or code of the plug-in that fails.
    """
    found = find(role, spec)
    valid = checked_options(role, spec, found, options)
    return made(role, spec, found, valid)


def inner(role: str, table: Any, place: str) -> Any:
    """The role that another one's option says it is made of: a table with `use`, or a name alone.

    place: the option, in words. Raises UserError as `load` does.
    """
    options = {"use": table} if isinstance(table, str) else dict(table or {})
    use = options.pop("use", None)
    if not isinstance(use, str):
        raise UserError(
            f'{place} is a table of a {role}, as in {{ use = "{_USUAL[role]}", ... }}; '
            f"found {table}"
        )
    return load(role, use, options)


_USUAL = {"proposer": "reasoning_gym", "generator": "sampler"}
"""What is often used inside another role."""


def checked_options(
    role: str, spec: str, found: type, options: Mapping[str, Any]
) -> dict[str, Any]:
    """`options` converted to what the annotations of `found.__init__` say, defaults left out."""
    parameters: list[inspect.Parameter] = []
    kinds: dict[str, Any] = {}
    if found.__init__ is not object.__init__:  # type: ignore[misc]
        parameters = list(inspect.signature(found).parameters.values())
        # A dataclass inherits fields whose annotations are to be read in the module of their own
        # class; any other __init__ stands in one module.
        whose = found if is_dataclass(found) else found.__init__  # type: ignore[misc]
        try:
            kinds = get_type_hints(whose, include_extras=True)
        except (NameError, AttributeError, TypeError, SyntaxError) as error:
            raise UserError(
                f"{role} {spec!r}: an annotation of its __init__ cannot be read: {error}"
            ) from error
    fields: dict[str, Any] = {}
    for parameter in parameters:
        kind = kinds.get(parameter.name, Any)
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (kind, default)
    for key in options:
        if key not in fields:
            near = get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(fields) or "none"
            raise UserError(f"{role} {spec!r} has no option {key!r}; {hint}its options: {known}")
    model = create_model(
        "Options", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields
    )
    try:
        valid = model(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{role} {spec!r}, option {where!r}: {first['msg']} (found {first.get('input')!r})"
        ) from None
    for key, value in options.items():
        if isinstance(value, bool) and _is_number(fields[key][0]):
            raise UserError(
                f"{role} {spec!r}, option {key!r}: it is a number (found {str(value).lower()})"
            )
    return {name: getattr(valid, name) for name in valid.model_fields_set}


def _is_number(kind: Any) -> bool:
    """Whether an annotation asks for a number. A truth value, which Python counts as one, is none
    that anybody meant."""
    if get_origin(kind) is Annotated:
        return _is_number(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return any(map(_is_number, get_args(kind))) and bool not in get_args(kind)
    return kind in (int, float)


@contextmanager
def _loading(role: str, spec: str) -> Iterator[None]:
    """Whatever the plug-in's own code raises becomes a sentence that says where."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
        raise UserError(
            f"{role} {spec!r} cannot be loaded: {type(error).__name__}"
            f"{': ' if said else ''}{said}{_place(error)}"
        ) from error


def _place(error: BaseException) -> str:
    """The file and line of the innermost frame in the plug-in, whose frames follow importlib's."""
    if isinstance(error, SyntaxError) and error.filename:
        return _shown(error.filename, error.lineno)
    importing = str(Path(importlib.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<", importing)) and frame.filename != __file__
    ]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return _shown(own[-1].filename, own[-1].lineno) if own else ""


def _shown(file: str, line: int | None) -> str:
    here = Path.cwd()
    near = Path(file).relative_to(here) if Path(file).is_relative_to(here) else file
    return f" ({near}:{line})" if line else f" ({near})"


def _a(role: str) -> str:
    return f"{'an' if role[0] in 'aeiou' else 'a'} {role}"


def _module(role: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"no module named {name!r} to take {_a(role)} from; "
            f"for a file write its path, as in path/to/{name.rsplit('.', 1)[-1]}.py:Name"
        ) from None


def _from_file(role: str, path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no file {str(path)!r} to take {_a(role)} from")
    # The name holds the path, so two files of one name do not meet, and a record made by the
    # module can still find its own annotations through sys.modules.
    name = f"_plugin_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _checked(role: str, spec: str, found: Any) -> type:
    protocol = PROTOCOLS[role]
    needed = [name for name in vars(protocol) if not name.startswith("_")]
    missing = [name for name in needed if not callable(getattr(found, name, None))]
    # A judge without `score` would be found out when it is made, as a bug of ours.
    missing += sorted(getattr(found, "__abstractmethods__", ()))
    if not inspect.isclass(found) or missing:
        lacks = f"it has no method {', '.join(missing)}" if missing else "it is not a class"
        raise UserError(f"{spec!r} is not {_a(role)}: {lacks}")
    return found
