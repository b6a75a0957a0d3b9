"""When a run is to stop: by signal, by `loop stop`, or because another process drives it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loop.progress import Progress
from store.database import Store
from store.errors import UserError

ASKED_EVERY_S = 1.0


class TakenOver(UserError):
    """Another process holds the lease; nothing more may be written."""


class Signals:
    """Plain attributes: a lock taken in a signal handler can be held by the code it broke into."""

    asked = False
    deaf = False


@contextmanager
def signals() -> Iterator[Signals]:
    """The first interrupt asks the run to stop after its batch; the second stops it at once."""
    found = Signals()

    def ask(number: int, frame: object) -> None:
        if found.deaf:
            return
        if found.asked:
            found.deaf = True
            raise KeyboardInterrupt
        found.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked(
    store: Store, lost: threading.Event, signals: Signals, progress: Progress
) -> Callable[[], bool]:
    """Whether the run is to stop, to be called again and again. Raises TakenOver."""
    last, said = 0.0, False

    def stopping() -> bool:
        nonlocal last, said
        if lost.is_set():
            raise TakenOver(f"another process has taken over {store.root}")
        if not signals.asked and time.monotonic() - last >= ASKED_EVERY_S:
            last = time.monotonic()
            signals.asked = store.stop_requested()
        if signals.asked and not said:
            said = True
            progress.say("stopping; what is committed is kept")
        return signals.asked

    return stopping
