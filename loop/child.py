"""The other side of loop/apart.py: a process that performs the tasks it is sent, one by one.

It reads and writes one connection. What it prints goes to the log of its stage. When its driver is
gone, so is it.
"""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from loop import config as configuration
from loop import names
from loop.outcome import told
from loop.seat import Seat
from loop.settings import Config, Role
from roles import plugins

NO_DRIVER = 70
"""Exit status of a child whose driver is gone."""


class Channel:
    """The connection: anybody here may write, and one thread reads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._writing = threading.Lock()
        self.received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stopped = threading.Event()
        threading.Thread(target=self._read, name="driver", daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                kind, content = self._connection.recv()
            except (EOFError, OSError):
                os._exit(NO_DRIVER)
            except BaseException:  # noqa: BLE001 - what cannot be read would be waited for
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            if kind == "stop":
                self.stopped.set()
            else:
                self.received.put(content)

    def send(self, kind: str, *content: Any) -> None:
        packed = pickle.dumps((kind, *content))
        with self._writing:
            self._connection.send_bytes(packed)


def serve(connection: Connection) -> None:
    """Perform tasks until the driver is gone or says that there are no more."""
    channel = Channel(connection)
    tables, root = channel.received.get()
    config = configuration.validate(tables)
    seat = Seat(config, maker(config), Path(root), lambda line: channel.send("say", line))
    warnings.showwarning = shower(channel, warnings.showwarning)
    while (task := channel.received.get()) is not None:
        call = replace(
            task.call,
            progress=lambda done, total: channel.send("progress", done, total),
            stopping=channel.stopped.is_set,
        )
        try:
            done = replace(task, call=call).perform(seat)
        except BaseException as error:  # noqa: BLE001 - told to the driver, who raises it
            traceback.print_exc()
            channel.send(*told(error))
        else:
            channel.send("done", done)
        sys.stdout.flush()
        sys.stderr.flush()
    seat.close()


def maker(config: Config) -> Callable[[Role], Any]:
    """What fills a role, made when it is first asked for."""
    kinds = {id(role): kind for kind, role in config.roles()}
    made: dict[int, Any] = {}

    def make(role: Role) -> Any:
        if id(role) not in made:
            made[id(role)] = plugins.load(kinds[id(role)], role.use, role.options)
        return made[id(role)]

    return make


def shower(channel: Channel, otherwise: Callable[..., None]) -> Callable[..., None]:
    """Of our own parts a warning is the driver's to say; others' go to the log."""

    def show(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
        if names.is_ours(filename):
            channel.send("warn", str(message))
        else:
            otherwise(message, category, filename, *rest, **more)

    return show


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
