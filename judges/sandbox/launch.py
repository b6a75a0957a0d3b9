"""The first thing that runs in a child: confine the process, then become what was ordered.

It is run as a script with nothing but the standard library, so the packages it stands in are
named here and not imported: their own __init__ would load half of the project. What the modules
of a child import is paid for by every candidate, so they do without typing and pathlib.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from types import ModuleType


def main(order_at: int, report_at: int) -> None:
    with os.fdopen(order_at) as source:
        order = json.load(source)
    here = os.path.dirname(os.path.abspath(__file__))
    for name, folder in (("judges", os.path.dirname(here)), ("judges.sandbox", here)):
        package = ModuleType(name)
        package.__path__ = [folder]
        sys.modules[name] = package
    sys.path += order["packages"]
    sys.set_int_max_str_digits(0)
    role = importlib.import_module(f"judges.sandbox.{order['role']}")
    report = os.fdopen(report_at, "w", encoding="ascii")
    from judges.sandbox.confine import confine

    try:
        confine(order)
    except OSError as error:
        report.write(json.dumps({"lacks": str(error.strerror or error)}) + "\n")
        report.flush()
        os._exit(3)
    report.write("{}\n")
    report.flush()
    role.main(order, report)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
