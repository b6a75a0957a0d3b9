"""What there is to begin from: recipes, a file of settings, the judges that packages offer."""

from __future__ import annotations

import inspect
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from loop import config
from loop.report import Table
from roles import plugins
from store.errors import UserError

BEGINNING = """\
# A run of Ratchet. Everything below is as it is when left out; take a `#` away and change what
# you like.
# Check it with `loop plan --config FILE`, run it with `loop start --config FILE`.
#
# Prompts of your own, with "answer", or with answers that people preferred ("chosen", "rejected"):
#     [proposer]
#     use = "dataset"
#     path = "prompts.jsonl"              # paths are relative to this file
#
# A judge of your own, a class in a file (`loop judges list` shows those there are):
#     [judge]
#     use = "my_judge.py:MyJudge"         # every other key is an option of its __init__

"""


def beginning() -> str:
    """A file of settings to begin from: the default's, as comments, so that what is left as it
    is does not stand in the way of a recipe."""
    lines = recipe("default").splitlines()
    settings = next(place for place, line in enumerate(lines) if not line.startswith("#"))
    kept = "\n".join(lines[settings:]).strip().splitlines()
    return BEGINNING + "\n".join(_as_comment(line) for line in kept) + "\n"


def _as_comment(line: str) -> str:
    return line if not line or line.startswith(("[", "#")) else f"# {line}"


def recipes() -> list[Table]:
    """[{name, about}]: `about` is the first sentence of the comment that the file begins with."""
    return [
        {"name": name, "about": _first_sentence(opening(recipe(name))[0])}
        for name in config.recipes()
    ]


def recipe(name: str) -> str:
    """The recipe's TOML. Raises UserError for a name that is not there."""
    return config.recipe_path(name).read_text()


def opening(text: str) -> list[str]:
    """The paragraphs of the comment that a file opens with, in a line each; so are their items."""
    lines = text.splitlines()
    end = next((n for n, each in enumerate(lines) if not each.startswith("#")), len(lines))
    whole = "\n".join(each.removeprefix("#").strip() for each in lines[:end])
    paragraphs = [" ".join(each.split()) for each in whole.split("\n\n") if each.strip()]
    return [each.replace(" - ", "\n- ") for each in paragraphs]


def judges() -> list[Table]:
    """[{name, about, version, options [{option, type, default}], error}]. `default` None with
    `required` true: it must be given. `error` is why one that is offered cannot be used."""
    return [_judge(name) for name in plugins.names("judge")]


def _judge(name: str) -> Table:
    try:
        found = plugins.find("judge", name)
    except (UserError, ImportError) as error:
        why = f"{type(error).__name__}: {error}"
        return {"name": name, "about": "", "version": None, "options": [], "error": why}
    return {
        "name": name,
        "about": _first_sentence(inspect.getdoc(found) or ""),
        "version": str(getattr(found, "version", "1")),
        "options": _options(found),
        "error": None,
    }


def _options(found: type) -> list[Table]:
    if "__init__" not in dir(found) or found.__init__ is object.__init__:  # type: ignore[misc]
        return []
    return [
        {
            "option": each.name,
            "type": _written(each.annotation),
            "required": each.default is each.empty,
            "default": None if each.default is each.empty else each.default,
        }
        for each in inspect.signature(found, eval_str=True).parameters.values()
    ]


def _written(annotation: Any) -> str | None:
    """As a user needs it: the choices where there are some, bounds left out."""
    if annotation is inspect.Parameter.empty:
        return None
    kind, inside = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _written(inside[0])
    if kind is Literal:
        return " | ".join(map(repr, inside))
    if annotation is NoneType or annotation is Ellipsis:
        return "None" if annotation is NoneType else "..."
    parts = [str(_written(each)) for each in inside]
    if kind in (Union, UnionType):
        return " | ".join(dict.fromkeys(parts))
    return f"{kind.__name__}[{', '.join(parts)}]" if kind else inspect.formatannotation(annotation)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    end = paragraph.find(". ")
    return paragraph if end < 0 else paragraph[: end + 1]
