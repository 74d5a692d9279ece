"""One writer: a kernel lock on the state directory, with its holder in readable words."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

from reconciler.core.errors import HostError, LockError
from reconciler.core.units import Seconds, format_duration

_PAUSE: Final[Seconds] = 0.05
_PATIENCE: Final[Seconds] = 0.5
"""A wait that is over before this is not worth a word: `serve` takes the lock again and again."""


class Holder(Struct, frozen=True):
    """Who holds the lock, by their own word."""

    pid: int
    command: str
    since: Seconds

    def __str__(self) -> str:
        for_long = format_duration(max(0.0, time.time() - self.since))
        return f"pid {self.pid} ({self.command}) for {for_long}"


def holder(path: Path) -> Holder | None:
    """Who holds the lock now; None: nobody."""
    try:
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _read(path)
    except OSError:
        pass
    return None


def _read(path: Path) -> Holder | None:
    try:
        value = json.loads(path.read_text())
        return Holder(int(value["pid"]), str(value["command"]), float(value["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is being written just now


def _refused(doing: str, path: Path, error: OSError) -> HostError:
    where = path.parent
    return HostError(
        f"cannot {doing} the lock {path}: {error.strerror}; nothing was changed; see to the space "
        f"and the rights there: df {where}; findmnt -T {where}; ls -la {where}",
        "Storage",
    )


@contextlib.contextmanager
def held(
    path: Path,
    command: str,
    timeout: Seconds,
    waiting: Callable[[Holder | None], None] = lambda _: None,
) -> Iterator[None]:
    """Hold the lock. `waiting` is told who has it, if that lasts. Raises LockError, HostError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise _refused("open", path, error) from error
    try:
        begun = time.monotonic()
        deadline = begun + timeout
        told = False
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                who = _read(path)
                if time.monotonic() >= deadline:
                    raise LockError(
                        f"cannot change this hub: it is being changed by {who or 'another process'}"
                        "; try again when that has ended, or wait longer with --lock-timeout"
                    ) from None
                if not told and who and time.monotonic() >= begun + _PATIENCE:
                    told = True
                    waiting(who)
                time.sleep(_PAUSE)
        text = json.dumps({"pid": os.getpid(), "command": command, "since": time.time()}).encode()
        try:
            os.pwrite(fd, text, 0)  # before the cut, so that a full disk has room for it
            os.ftruncate(fd, len(text))
        except OSError as error:
            raise _refused("write", path, error) from error
        yield
    finally:
        os.close(fd)  # and with it the lock
