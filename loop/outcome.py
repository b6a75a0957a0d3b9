"""What came of a task in another process, as a message: a result, a lack of memory, an error."""

from __future__ import annotations

import pickle
import traceback
from typing import Any

SHOWN = 200
"""Characters of an error in a line."""
OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch says in a RuntimeError of a processor's memory."""


class Lost(Exception):
    """A process ended or was ended before it had done its task, or lacked memory for it.

    memory: whether it did, or None, where that may be. Less at once then helps, or may.
    """

    def __init__(self, why: str, *, memory: bool | None = False) -> None:
        super().__init__(why)
        self.memory = memory


def told(error: BaseException) -> tuple[Any, ...]:
    """An error as a message: a lack of memory by its words, another whole where it can be."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    if is_of_memory(error):
        return "memory", words[:SHOWN]
    try:
        packed = pickle.dumps(error)
    except Exception:  # noqa: BLE001 - whatever a plug-in's own exception has in it
        packed = b""
    return "raised", packed, words, "".join(traceback.format_exception(error))


def heard(kind: str, *content: Any, where: str) -> Any:
    """What a message says: the result, or what it raises. Raises Lost for a lack of memory.

    where: the process, for a note on the error.
    """
    if kind == "memory":
        raise Lost(f"lacked memory ({content[0]})", memory=True)
    if kind != "raised":
        return content[0]
    packed, words, trace = content
    try:
        error: BaseException = pickle.loads(packed)
    except Exception:  # noqa: BLE001 - whatever a plug-in's own exception has in it
        error = RuntimeError(words)  # in words where it is known there alone
    error.add_note(f"In the process of {where}:\n{trace}")
    raise error


def is_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or any(
        said in str(error) for said in OF_MEMORY
    )
