"""What vLLM's processes have from us (`worker_extension_cls`).

They tell their weights, and end with whoever began them.

vLLM's own watch nobody: a run that is killed would leave them behind, with all their memory. This
is imported before a model is read.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import suppress

from roles.policy.fingerprint import Worker

__all__ = ["DRIVER", "Worker"]
DRIVER = "RATCHET_VLLM_DRIVER"
"""The environment variable with the id of the process that they end with."""
_POLLED_S = 1.0


def _follow(driver: int) -> None:
    """Wait until the driver is gone, then end this process: with it vLLM ends its others."""
    with suppress(ProcessLookupError):
        if hasattr(os, "pidfd_open"):
            select.select([os.pidfd_open(driver)], [], [])  # ends also for one nobody buried
        else:
            while True:
                os.kill(driver, 0)
                time.sleep(_POLLED_S)
    os.kill(os.getpid(), signal.SIGKILL)


if (_driver := os.environ.get(DRIVER)) and int(_driver) != os.getpid():
    threading.Thread(target=_follow, args=(int(_driver),), daemon=True).start()
