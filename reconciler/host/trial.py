"""Try what a hub does to a directory: a file of ours is made, linked, and gone again."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from typing import Final

from reconciler.core.doctor import Room, Trial
from reconciler.core.units import Seconds

LEFT: Final[Seconds] = 3600.0
"""Age of a trial file that is certainly nobody's any more."""
TRIAL: Final = ".reconciler-doctor-"


def attempt(directory: str, *, direct: bool = False) -> Trial:
    """Write a file of ours as an image is published: create, fsync, link, unlink, fsync; then it
    is gone again, whatever happens. Never raises."""
    name = os.path.join(directory, f"{TRIAL}{os.getpid()}")
    other = f"{name}-linked"
    step = "look into it"
    try:
        _sweep(directory)
        step = "create a file"
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            step = "write"
            os.write(fd, b"reconciler doctor\n")
            step, begun = "fsync a file", time.monotonic()
            os.fsync(fd)
            took = time.monotonic() - begun
        finally:
            os.close(fd)
        step = "link(2), which gives an image its name"
        os.link(name, other)
        os.unlink(name)
        step, begun = "fsync the directory", time.monotonic()
        _sync(directory)
        took += time.monotonic() - begun
        return Trial(fsync=took, direct=_direct(other) if direct else "")
    except OSError as error:
        return Trial(failed=f"cannot {step}: {error.strerror}")
    finally:
        for one in (name, other):
            with contextlib.suppress(OSError):
                os.unlink(one)


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _direct(path: str) -> str:
    """Write one aligned block past the page cache, as `cache: none` does. Source: open(2)."""
    import mmap  # aligned memory

    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return error.strerror or str(error)
    try:
        with mmap.mmap(-1, 4096) as block:
            os.pwrite(fd, block, 0)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        os.close(fd)
    return ""


def _sweep(directory: str) -> None:
    """Remove what a trial left that was killed in the middle. Only by its own name, and its age."""
    with os.scandir(directory) as entries:
        old = [entry.path for entry in entries if entry.name.startswith(TRIAL) and _old(entry)]
    for path in old:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _old(entry: os.DirEntry[str]) -> bool:
    try:
        info = entry.stat(follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISREG(info.st_mode) and info.st_mtime < time.time() - LEFT


def room(path: str) -> Room:
    """Look at a directory that should be there. Never raises."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        above = path
        while not os.path.isdir(above) and above != "/":
            above = os.path.dirname(above)
        writable = os.access(above, os.W_OK | os.X_OK)
        return Room(exists=False, nearest=above, makeable=writable)
    except OSError as error:
        return Room(exists=True, error=error.strerror or str(error))
    try:
        system = os.statvfs(path)
    except OSError as error:
        return Room(exists=True, error=error.strerror or str(error))
    return Room(
        exists=True,
        real=os.path.realpath(path),
        directory=stat.S_ISDIR(info.st_mode),
        mode=stat.S_IMODE(info.st_mode),
        owner=info.st_uid,
        free=system.f_bavail * system.f_frsize,
        inodes=system.f_favail if system.f_files else None,
        read_only=bool(system.f_flag & os.ST_RDONLY),
    )
