"""A program as a whole: it reads its standard input and writes its standard output."""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, TextIO


def main(order: Mapping[str, Any], report: TextIO) -> None:
    """Whatever the program raises ends the process as it would have ended it alone."""
    report.close()
    run(order["code"], "__main__")


def run(code: str, name: str) -> ModuleType:
    """The module that the code is, run under this name."""
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(code, "program.py", "exec", dont_inherit=True), vars(module))
    return module
