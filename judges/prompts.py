"""The prompts that judges are shipped with: text files of this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from roles.template import Template

HERE = Path(__file__).parent


def prompt_of(
    name: str,
    path: Path | None,
    needs: Sequence[str],
    may: Sequence[str] = (),
    nonce: bool = True,
) -> Template:
    """A judge's prompt; the arguments are Template's."""
    return Template(name, path, needs, may, nonce, folder=HERE)
