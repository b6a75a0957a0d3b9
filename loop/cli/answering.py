"""How a command ends, and how it prints what it was asked.

Exit codes: 0 done, 2 the user's mistake, 3 stopped by a rule, 4 a stage failed or a check found
something wrong, 5 waiting for a person, 130 interrupted; 1 is a bug, ours or, of `judges test`, of
the judge.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from store.errors import UserError, Waiting

if TYPE_CHECKING:
    from store.database import Store

UNSOUND, USER_ERROR, FAILED, WAITING, INTERRUPTED = 1, 2, 4, 5, 130


class Commands(TyperGroup):
    """What every command has in common: how it ends when it cannot go on."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            print(f"loop: {error}", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from None
        except Waiting as error:
            print(f"loop: {error}", file=sys.stderr)
            raise typer.Exit(WAITING) from None
        except KeyboardInterrupt:
            print("loop: interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


@contextmanager
def opened(given: Path | None, runs: Path) -> Iterator[Store]:
    """The store of the run that is meant."""
    from loop import meant, run

    with meant.opened(run.find_run(given, runs)) as store:
        yield store


def answer(found: Any, view: Callable[[Console, Any], None], as_json: bool) -> None:
    if as_json:
        print(json.dumps(_finite(found), indent=2, default=str, allow_nan=False))
    else:
        view(screen(), found)


def _finite(found: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def say(text: str) -> None:
    print(text)


def screen() -> Console:
    """Markup, emoji and highlighting are off: what is printed is what models and judges wrote."""
    return Console(markup=False, emoji=False, highlight=False)
