"""Start one server on a bound socket, with a log of its own; and read its last words."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final, Protocol

from reconciler.core.errors import HostError
from reconciler.core.mark import ENTER
from reconciler.core.units import Seconds
from reconciler.host.effects import Effect, effect

LOG_LIMIT: Final = 1 << 20
"""Bytes of a server's log; a longer one is cut. A connection that is aborted leaves 108 of them."""
LOG_KEPT: Final = 1 << 18
"""Bytes at the end of a log that are left when it is cut."""
LAST_LINES: Final = 5
LINE_LIMIT: Final = 300
"""Characters of a line that a person is shown; what a terminal would obey is not among them."""


class HasFileno(Protocol):
    """A socket, as far as handing its descriptor over goes."""

    def fileno(self) -> int: ...


def find(binary: str) -> str:
    """The absolute path of qemu-nbd. Raises HostError with the command that installs it."""
    import shutil  # late: it loads seven modules, and commands that only look start nothing

    path = shutil.which(binary)
    if path is None:
        raise HostError(
            f"cannot find {binary}: install it with `apt-get install qemu-utils`, or name it in "
            "the config, `qemu_nbd: {binary: PATH}`",
            "QemuNbdMissing",
        )
    return str(Path(path).absolute())


def spawn(binary: str, argv: Sequence[str], listener: HasFileno, log: Path) -> int:
    """Start a server that takes over `listener`; returns its pid at once. Raises HostError.

    The shell is the small step that can say its own pid in LISTEN_PID, as socket activation
    wants. It gets the argv as words, never as text to read, and turns into the server.
    """
    directory = str(Path(binary).parent)
    environment = {"PATH": f"{directory}:/usr/bin:/bin", "LC_ALL": "C"}
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    opening = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    try:
        with effect(Effect.SPAWN):
            return os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", ENTER, *argv],
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 2, str(log), opening, 0o600),
                    (os.POSIX_SPAWN_DUP2, listener.fileno(), 3),
                ],
                setsid=True,  # Ctrl-C in our terminal is not for the servers
            )
    except OSError as error:
        raise HostError(f"cannot start {argv[0]}: {error}", "CannotStart") from error


def last_words(log: Path, since: int = 0) -> str:
    """The last lines that a server wrote after byte `since` of its log."""
    try:
        with log.open("rb") as file:
            file.seek(since)
            text = file.read(LOG_LIMIT).decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [re.sub(r"[^\x20-\x7e\u00a0-\uffff]", "?", line) for line in text.strip().splitlines()]
    return "\n".join(line[:LINE_LIMIT] for line in lines[-LAST_LINES:])


def log_name(vm: str, key: int, run: str) -> str:
    """The name of a server's log in the directory of logs."""
    return f"{vm}-{key}-{run}.log"


def cap(log: Path) -> None:
    """Cut a log that has grown too long; its end stays, and whoever has it open writes on there.

    Nothing else cuts it: the caller holds the lock of the hub. The server appends, so it goes on
    behind the new end; what it says between our last read and the cut, some microseconds, is lost.
    A log that cannot be cut now is cut another time.
    """
    with contextlib.suppress(OSError), log.open("r+b", buffering=0) as file:
        if os.fstat(file.fileno()).st_size <= LOG_LIMIT:
            return
        file.seek(-LOG_KEPT, os.SEEK_END)
        end = file.read()
        end = end[end.find(b"\n") + 1 :]  # from the first line that is whole
        os.pwrite(file.fileno(), end, 0)
        os.ftruncate(file.fileno(), len(end))


def tidy(logs: Path, keep: Collection[str], before: Seconds) -> None:
    """Cut the logs that have grown too long, and remove those that nobody needs any more: not
    written to since the moment `before`, and not in `keep`.

    One pass over the directory. What cannot be done is done another time.
    """
    try:
        with os.scandir(logs) as entries:
            found = [entry for entry in entries if entry.name.endswith(".log")]
    except OSError:
        return  # there are no logs yet, or the state directory has worse troubles, told elsewhere
    for entry in found:
        with contextlib.suppress(OSError):
            info = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(info.st_mode):
                continue
            if info.st_mtime < before and entry.name not in keep:
                os.unlink(entry.path)
            elif info.st_size > LOG_LIMIT:
                cap(Path(entry.path))


def log_size(log: Path) -> int:
    try:
        return log.stat().st_size
    except OSError:
        return 0


def close_inherited() -> None:
    """Keep descriptors that we were started with from leaking into every server."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) >= 3:
            with contextlib.suppress(OSError):
                os.set_inheritable(int(name), False)
