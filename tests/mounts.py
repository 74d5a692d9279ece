"""Real mounts for tests: a small file system, and one that never answers.

They are made in a mount namespace of the test process, so that nobody else on the machine sees
them, and they go with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_NEW_NAMESPACE: Final = 0x00020000  # CLONE_NEWNS, sched.h
_DETACH: Final = 2  # MNT_DETACH, sys/mount.h
_READ_ONLY: Final = 1  # MS_RDONLY
_REMOUNT: Final = 32  # MS_REMOUNT
_PRIVATE: Final = 1 << 18  # MS_PRIVATE
_RECURSIVE: Final = 1 << 14  # MS_REC


def _called(name: str, *arguments: object) -> None:
    if getattr(_LIBC, name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _mount(source: str, target: Path | str, kind: str, flags: int, options: str) -> None:
    """mount(2). Raises OSError."""
    words = (one.encode() for one in (source, str(target), kind))
    _called("mount", *words, ctypes.c_ulong(flags), options.encode())


def _unmount(target: Path) -> None:
    _called("umount2", str(target).encode(), _DETACH)


class Mounts:
    """What a test may mount. Everything is gone when the test is over."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def small(self, at: Path, mib: int) -> Small:
        """An empty file system of a few MiB."""
        at.mkdir(parents=True, exist_ok=True)
        _mount("small", at, "tmpfs", 0, f"size={mib}m")
        self._stack.callback(_gone, at)
        return Small(at)

    def hung(self, at: Path) -> Hung:
        """A file system of which no question is ever answered, on top of what is there."""
        found = Hung(at)
        self._stack.callback(found.end)
        return found


class Small:
    """A tmpfs."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def resize(self, mib: int) -> None:
        _mount("small", self.at, "tmpfs", _REMOUNT, f"size={mib}m")

    def read_only(self, on: bool = True) -> None:
        _mount("small", self.at, "tmpfs", _REMOUNT | (_READ_ONLY if on else 0), "")

    def fill(self, leave: int) -> Path:
        """A file that leaves `leave` bytes free."""
        found = os.statvfs(self.at)
        path = self.at / "filler"
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - leave)
        return path


class Hung:
    """A FUSE mount whose requests nobody reads: who asks it anything waits, and can be killed."""

    def __init__(self, at: Path) -> None:
        at.mkdir(parents=True, exist_ok=True)
        self.at = at
        self._fd = os.open("/dev/fuse", os.O_RDWR)
        try:
            options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0"
            _mount("hung", at, "fuse", 0, options)
        except OSError:
            os.close(self._fd)
            raise

    def end(self) -> None:
        """The storage is back: what is below answers again, and who waited is told of an error."""
        if self._fd >= 0:
            _unmount(self.at)
            os.close(self._fd)
            self._fd = -1


def _gone(at: Path) -> None:
    with contextlib.suppress(OSError):
        _unmount(at)


_private = False


def private() -> None:
    """Give this process mounts of its own, once. Raises OSError where that is not permitted."""
    global _private
    if not _private:
        _called("unshare", _NEW_NAMESPACE)
        _mount("none", "/", "", _PRIVATE | _RECURSIVE, "")
        _private = True


@contextlib.contextmanager
def small(where: Path, size: str) -> Iterator[Path]:
    """A tmpfs of a size at a directory; skips the test where nothing may be mounted."""
    where.mkdir(parents=True, exist_ok=True)
    try:
        private()
        _mount("small", where, "tmpfs", 0, f"size={size},mode=0700")
    except OSError as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    try:
        yield where
    finally:
        _unmount(where)


def fill(where: Path) -> Path:
    """Take all the space of a file system; the file that has it."""
    path = where / "filling"
    with path.open("ab", buffering=0) as file:
        for block in (1 << 16, 1 << 12, 1):
            while _written(file.fileno(), block):
                pass
    return path


def _written(fd: int, block: int) -> bool:
    try:
        return os.write(fd, b"x" * block) == block
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
