"""Whether the packages that are imported are ours.

The five top-level names are common words. An installed package of the same name would be imported
in our place, or ours in its place, and fail far from the cause.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from store.errors import UserError

OURS = ("loop", "roles", "judges", "kernels", "store")


def check() -> None:
    """Raises UserError unless all five packages lie beside each other."""
    home = Path(__file__).resolve().parent.parent
    for name in OURS:
        spec = find_spec(name)
        origin = None if spec is None else spec.origin
        if origin is None or Path(origin).resolve().parent.parent != home:
            raise UserError(
                f"the package {name!r} is not Ratchet's: found {origin or 'nothing'}, expected "
                f"{home / name}; uninstall the package that put it there "
                "(Hugging Face's `kernels` cannot share an environment with Ratchet)"
            )
