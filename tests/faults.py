"""Start a run that kills itself at a named moment: `faults.py FILE RUNS METHOD NTH WHEN [SET ...]`.

METHOD is a method of Store that writes, NTH which of its transactions, WHEN "inside" (all is
written and not yet committed) or "after" (it is committed). The kill is SIGKILL, placed by
listening to SQLAlchemy's own events: nothing of the loop is changed for it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

sys.path.insert(0, str(Path(__file__).parent))


def method_in_progress() -> str:
    """The outermost method of Store on the stack."""
    frame, found = sys._getframe(), ""
    while frame is not None:
        inside = isinstance(frame.f_locals.get("self"), _store())
        if inside and not frame.f_code.co_name.startswith("_"):
            found = frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _store() -> type:
    from store.database import Store

    return Store


def kill_at(method: str, nth: int, when: str) -> None:
    """Kill this process at the `nth` transaction of `method`."""
    seen = {"count": 0, "due": False}

    @event.listens_for(Engine, "commit")
    def committing(connection: Any) -> None:
        writes = connection.get_execution_options().get("writes")
        if writes and method_in_progress() == method:
            seen["count"] += 1
            if seen["count"] == nth and when == "inside":
                os.kill(os.getpid(), signal.SIGKILL)
            seen["due"] = seen["count"] == nth and when == "after"

    @event.listens_for(Engine, "checkin")
    def committed(connection: Any, record: Any) -> None:
        if seen["due"]:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    file, runs, method, nth, when, *sets = sys.argv[1:]
    kill_at(method, int(nth), when)
    from runs import start

    outcome = start(Path(file), Path(runs), sets)[1]
    print(outcome.reason, file=sys.stderr)
    sys.exit(outcome.code)
