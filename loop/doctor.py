"""What stands in the way of a run, found before it begins: what is there, what does not fit
together, and what to type to mend it.

Only Python's own library is imported at the top, because what is missing may be any other package.
What hangs on the configuration is loop/fitness.py's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loop import names
from store.errors import UserError

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.console import Console

OURS = "ratchet-loop"
State = Literal["ok", "note", "wrong"]
TOLD = ("torch", "transformers", "trl")
EXTRAS = ("peft", "bitsandbytes", "math", "server", "vllm", "postgres", "ray")
"""Whose packages a configuration may ask for."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. wrong: it stands in the way; note: the run can do without."""

    what: str
    state: State
    said: str
    """One clause."""
    type: str | None = None
    """The command that mends it."""


@dataclass(frozen=True)
class Wish:
    """What `loop doctor` was told."""

    run: Path | None = None
    file: Path | None = None
    recipe: str | None = None
    sets: Sequence[str] = ()
    runs: Path = Path("runs")
    gpu_gib: float | None = None


def examine(wish: Wish) -> dict[str, Any]:
    """{ok, findings [{what, state, said, type}]}: ok unless one of them is wrong."""
    findings = list(_installed())
    if any(each.state == "wrong" and MISSING in each.said for each in findings):
        said = "the rest is looked at when packages are there"
        findings.append(Finding("configuration", "note", said))
    else:
        findings += _names()
        from loop import fitness

        findings += fitness.examine(wish)
    return {
        "ok": all(each.state != "wrong" for each in findings),
        "findings": [asdict(each) for each in findings],
    }


def view(console: Console, found: dict[str, Any]) -> None:
    """A line a finding."""
    findings = found["findings"]
    widest = max(len(each["what"]) for each in findings)
    for each in findings:
        mend = f"; type: {each['type']}" if each["type"] else ""
        said = f"{each['what']:<{widest}}  {each['state']:<5}  {each['said']}{mend}"
        console.print(said, markup=False, highlight=False, emoji=False, soft_wrap=True)
    wrong = sum(each["state"] == "wrong" for each in findings)
    last = "nothing stands in the way" if found["ok"] else f"{wrong} to mend before a run begins"
    console.print(last, markup=False, highlight=False)


MISSING = "not installed"


def _installed() -> Iterator[Finding]:
    """Python and packages, against what pyproject.toml asks for; of its extras, those there are."""
    python = ".".join(map(str, sys.version_info[:3]))
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet

        wanted = [Requirement(each) for each in metadata.requires(OURS) or ()]
        right = SpecifierSet(metadata.metadata(OURS)["Requires-Python"] or "")
    except ImportError:  # or it is Ratchet's own distribution that is not found
        here = Path(__file__).resolve().parent.parent
        said = f"{OURS} or packaging is {MISSING}, so its parts are not found"
        yield Finding("packages", "wrong", said, f"pip install --editable {here}")
        return
    if right.contains(python, prereleases=True):
        yield Finding("python", "ok", f"{python} in {sys.prefix}")
    else:
        said = f"{python} runs this, and {right} is needed"
        yield Finding("python", "wrong", said, "make start PYTHON=python3.12")
    core = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    wrong = [found for each in core if (found := _misfit(each)) is not None]
    yield from wrong
    if not wrong:
        told = ", ".join(f"{each} {metadata.version(each)}" for each in TOLD)
        yield Finding("packages", "ok", f"all {len(core)} as they are asked for, {told}")
    for extra in EXTRAS:
        for need in wanted:
            if need in core or not (need.marker and need.marker.evaluate({"extra": extra})):
                continue
            found = _misfit(need)
            if found is not None and MISSING not in found.said:
                yield Finding(found.what, "note", found.said, found.type)


def _misfit(need: Requirement) -> Finding | None:
    """What is wrong with an installed package; None when it is as it is asked for."""
    asked = f"{need.name}{need.specifier}"
    command = f"pip install '{asked}'"
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return Finding(need.name, "wrong", f"{MISSING}, and {asked} is needed", command)
    if need.specifier.contains(version, prereleases=True):
        return None
    return Finding(need.name, "wrong", f"{version} is installed, and {asked} is needed", command)


def vllm(used: bool) -> Finding:
    """Whether vLLM, which is built against one torch and says which, goes with the one here."""
    from roles.policy import vllm_version

    version = vllm_version.version()
    if version is None:
        if used:
            return Finding("vllm", "wrong", MISSING, vllm_version.INSTALL)
        return Finding("vllm", "ok", f"{MISSING}, and this configuration needs none")
    said = vllm_version.misfit()
    if said is not None:
        return Finding("vllm", "wrong" if used else "note", said, vllm_version.INSTALL)
    return Finding("vllm", "ok", f"{version}, which goes with torch {metadata.version('torch')}")


def _names() -> Iterator[Finding]:
    try:
        names.check()
    except UserError as error:
        other = next(each for each in names.OURS if repr(each) in str(error))
        yield Finding("names", "wrong", str(error), f"pip uninstall {other}")
