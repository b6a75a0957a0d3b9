"""The program's end: run the code, say what it defines, and do what the tests ask."""

from __future__ import annotations

import builtins
import os
import sys

from judges.sandbox.program import run
from judges.sandbox.remote import Gone, Peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType
    from typing import Any, TextIO


def main(order: Mapping[str, Any], report: TextIO) -> None:
    report.close()
    peer = Peer(os.fdopen(order["reads"], "rb"), os.fdopen(order["writes"], "wb"), guarded=False)
    try:
        try:
            names = _defined(run(order["code"], "program"), peer)
        except BaseException as error:
            peer.send({"raises": peer.told(error)})
            raise
        peer.send({"names": names})
        while True:
            peer.serve(peer.receive())
    except Gone:
        sys.exit()


def _defined(program: ModuleType, peer: Peer) -> dict[str, Any]:
    """Each name that the program defines: its value, and what the tests make of their own."""
    names = {}
    for name, value in vars(program).items():
        if name.startswith("__") or hasattr(builtins, name):
            continue
        is_exception = isinstance(value, type) and issubclass(value, Exception)
        names[name] = {
            "value": peer.encode(value),
            "module": isinstance(value, type(os)),
            "exception": [each.__name__ for each in value.__mro__] if is_exception else None,
        }
    return names
