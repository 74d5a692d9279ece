"""The little of QMP that is needed: one command at a time, and waiting for an event.

Source: QEMU, docs/interop/qmp-spec.txt.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

PATIENCE: Final = 60.0
"""For one answer. Seconds. Chosen: a snapshot waits for the writes that are under way."""


class QmpError(Exception):
    """A command that was not carried out: which, and what was said."""


@contextlib.contextmanager
def near(path: Path) -> Iterator[str]:
    """Name a socket by a short path: an address holds 107 bytes. Source: unix(7)."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class Monitor:
    """A connection to a QMP socket. Raises OSError if there is nobody, QmpError for a refusal."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(PATIENCE)
        self._events: list[dict[str, Any]] = []
        try:
            with near(path) as address:
                self._socket.connect(address)
            self._file = self._socket.makefile("rb")
            self._next()  # the greeting
            self.do("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def do(self, command: str, **arguments: object) -> Any:
        """Carry out one command; `_` in the name of an argument stands for `-`."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        order = json.dumps({"execute": command, "arguments": named})
        self._socket.sendall(order.encode())
        while True:
            answer = self._next()
            if "event" in answer:
                self._events.append(answer)
            elif "error" in answer:
                raise QmpError(f"{command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def wait(self, event: str, **data: object) -> None:
        """Wait for an event that says this, unless it has come since the connection began."""
        while True:
            for found in self._events:
                if found["event"] == event and data.items() <= found["data"].items():
                    self._events.remove(found)
                    return
            self._events.append(self._next())

    def _next(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise ConnectionResetError("the VM has closed its QMP connection")
        found: dict[str, Any] = json.loads(line)
        return found
