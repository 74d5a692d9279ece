"""Files of saved plans: written whole or not at all, over nothing of others."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from reconciler.core.errors import HostError

MOST: Final = 256 << 20
"""Bytes. A plan of 10,000 VMs with 20,000 disks has 60 MiB."""


def read(path: Path) -> bytes:
    """Raises HostError."""
    try:
        with open(path, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise HostError(f"cannot read {path}: it is no file")
            data = file.read(MOST + 1)
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MOST:
        raise HostError(f"cannot read {path}: it has more than {MOST >> 20} MiB, as no plan has")
    return data


def refuse_other(path: Path, ours: Callable[[bytes], bool]) -> None:
    """Raises HostError if there is something that is not `ours`."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}") from error
    if not stat.S_ISREG(kind) or not ours(read(path)):
        raise HostError(
            f"cannot write {path}: what is there is no saved plan, and stays; name another file"
        )


def write(path: Path, data: bytes, ours: Callable[[bytes], bool]) -> None:
    """Put a plan there, in the place of an older one at most. Raises HostError.

    It is on the disk before it has its name, so no reader ever sees a part of it.
    """
    refuse_other(path, ours)
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        if os.path.lexists(path):
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # unlike a rename, over nothing that came meanwhile
            os.unlink(temporary)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise HostError(
            f"cannot write {path}: {error.strerror}; see to the space and the rights: "
            f"df {path.parent}",
            "Storage",
        ) from error
