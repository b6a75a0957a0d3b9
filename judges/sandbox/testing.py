"""The tests' end: run each test with what the program defines, and report which failed how."""

from __future__ import annotations

import builtins
import importlib
import json
import os
import sys
import traceback
from types import ModuleType

from judges.sandbox.remote import Gone, Peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, TextIO

_LONGEST_ERROR = 300


def main(order: Mapping[str, Any], report: TextIO) -> None:
    """Report [number, None or the error] of each test. What is not reported did not end."""
    peer = Peer(
        os.fdopen(order["reads"], "rb"),
        os.fdopen(order["writes"], "wb"),
        guarded=True,
        answers_operators=order["answers_operators"],
    )
    names, error = _greeted(peer)
    for number, test in order["tests"]:
        if error is None:
            failed = _failure(test, names, peer)
        report.write(json.dumps([number, error or failed]) + "\n")
        report.flush()
        if error is None and (peer.gone or (failed and order["first_only"])):
            break
    # Not through an orderly exit: what the tests left behind is not run after the report.
    os._exit(0)


def _greeted(peer: Peer) -> tuple[dict[str, Any], str | None]:
    """What the program defines, or why it does not even run."""
    try:
        said = peer.receive()
        if "raises" in said:
            names, _, text = said["raises"]
            return {}, _short(f"{names[0]}: {text}")
        theirs = {name: each for name, each in said["names"].items() if _is_free(name)}
        return {name: _value(peer, name, each) for name, each in theirs.items()}, None
    except Gone as error:
        return {}, str(error)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return {}, "the program sent what is no message"


def _is_free(name: str) -> bool:
    """Whether a program may define it here: a program's own `sorted` must not sort its answer."""
    return not name.startswith("__") and not hasattr(builtins, name)


def _value(peer: Peer, name: str, said: Mapping[str, Any]) -> Any:
    if said["module"] and name in sys.stdlib_module_names:
        return importlib.import_module(name)
    if said["exception"] is not None:
        _, *above = said["exception"]
        known = (peer.exceptions.get(each) or getattr(builtins, each, None) for each in above)
        base = next((each for each in known if isinstance(each, type)), Exception)
        if issubclass(base, Exception):
            return peer.exceptions.setdefault(str(said["exception"][0]), type(name, (base,), {}))
    return peer.decode(said["value"])


def _failure(test: str, names: Mapping[str, Any], peer: Peer) -> str | None:
    """The last line of the error that the test ended with; None when it passed."""
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["tests.py"]
    vars(module).update(names)
    try:
        exec(compile(test, "tests.py", "exec", dont_inherit=True), vars(module))
    except SystemExit as error:
        if error.code not in (None, 0):  # unittest.main() ends so, with False when all passed
            return "SystemExit"
    except BaseException as error:  # noqa: BLE001 - whatever ends a test early fails it
        return peer.gone or _told(error, test)
    return peer.gone


def _told(error: BaseException, test: str) -> str:
    text = str(error)
    if not text:
        places = traceback.extract_tb(error.__traceback__)
        own = [each.lineno for each in places if each.filename == "tests.py" and each.lineno]
        text = test.splitlines()[own[-1] - 1].strip() if own else ""
    return _short(f"{type(error).__name__}: {text}")


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_ERROR else text[:_LONGEST_ERROR] + "…"
