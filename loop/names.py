"""Whether the packages that are imported are ours.

The five top-level names are common words. An installed package of the same name would be imported
in our place, or ours in its place, and fail far from the cause.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from store.errors import UserError

OURS = ("loop", "roles", "judges", "kernels", "store")


HOME = Path(__file__).resolve().parent.parent
"""Where all five lie."""


def is_ours(file: str) -> bool:
    """Whether a file of code is of one of the five."""
    return any(Path(file).absolute().is_relative_to(HOME / name) for name in OURS)


def check() -> None:
    """Raises UserError unless all five packages lie beside each other."""
    for name in OURS:
        spec = find_spec(name)
        origin = None if spec is None else spec.origin
        if origin is None or Path(origin).resolve().parent.parent != HOME:
            raise UserError(
                f"the package {name!r} is not Ratchet's: found {origin or 'nothing'}, expected "
                f"{HOME / name}; uninstall the package that put it there "
                "(Hugging Face's `kernels` cannot share an environment with Ratchet)"
            )
