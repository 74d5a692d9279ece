"""Directories that say when what is read in them may have changed: inotify, one watch each."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Final

from inotify_simple import Event, INotify, flags  # type: ignore[import-untyped]

from reconciler.core.errors import HostError

SUFFIXES: Final = (".yaml", ".yml")
MAX_LINKS: Final = 40
"""Symlinks on the way to one file. Source: path_resolution(7)."""
_NAMES: Final = (
    flags.MOVED_TO
    | flags.MOVED_FROM
    | flags.DELETE
    | flags.CREATE
    | flags.DELETE_SELF
    | flags.MOVE_SELF
    | flags.ONLYDIR
)
"""What happens to names. A directory in which only a name counts is not asked about contents."""
_CONTENTS: Final = _NAMES | flags.CLOSE_WRITE
_GONE: Final = flags.DELETE_SELF | flags.MOVE_SELF | flags.UNMOUNT | flags.IGNORED


@dataclass(slots=True)
class _Interest:
    """What counts in one directory."""

    specs: bool = False
    """Spec files and folders."""
    names: set[str] = field(default_factory=set)
    """What a path leads through: symlinks, files, and what is missing."""
    contents: bool = False

    @property
    def mask(self) -> int:
        return int(_CONTENTS if self.contents else _NAMES)


class Watch:
    """Tells that something may have happened to what is read below some paths; not what.

    For one thread, which waits for `fileno()` to be readable and then calls `drain()`.
    """

    def __init__(self) -> None:
        """Raises HostError."""
        try:
            self._inotify = INotify(nonblocking=True)
        except OSError as error:
            raise HostError(f"cannot watch directories: {_explained(error)}", "Watch") from error
        self._mutex = threading.Lock()
        self._files: set[str] = set()
        self._more = True
        """More has happened than `_files` can tell."""
        self._interests: dict[int, tuple[str, _Interest]] = {}
        """Watch descriptor → the directory, without symlinks, and what counts in it."""

    def fileno(self) -> int:
        return int(self._inotify.fileno())

    def close(self) -> None:
        self._inotify.close()

    def arm(self, paths: Collection[str]) -> None:
        """Watch these directories, each by itself, and these files; nothing else any more.

        Also all that decides what a path leads to: a symlink on the way, and the nearest directory
        that is there of what is missing. Raises HostError, after as much is watched as can be.
        """
        before, trouble = self._interests, None
        self._interests = {}
        for directory, interest in _interests(paths).items():
            try:
                # Again each time: a directory that was removed and made again is another one.
                found = self._inotify.add_watch(directory, interest.mask)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                    trouble = HostError(f"cannot watch {directory}: {_explained(error)}", "Watch")
                continue
            self._interests[found] = (directory, interest)
        for gone in before.keys() - self._interests.keys():
            with contextlib.suppress(OSError):  # the kernel drops what is deleted by itself
                self._inotify.rm_watch(gone)
        if trouble:
            raise trouble

    def drain(self) -> bool:
        """Take all that happened, without waiting; whether any of it may matter."""
        mattered = [event for event in self._inotify.read(timeout=0) if self._matters(event)]
        with self._mutex:
            for event in mattered:
                directory, interest = self._interests.get(event.wd, ("", _Interest()))
                plain = interest.specs and event.name and event.name not in interest.names
                if not plain or event.mask & (_GONE | flags.ISDIR | flags.Q_OVERFLOW):
                    self._more = True
                self._files.add(os.path.join(directory, event.name))
        return bool(mattered)

    def files(self) -> set[str] | None:
        """The files of which `drain` heard since this was asked, each below its directory without
        symlinks. None: of more than files, or there was too much to tell. For any thread."""
        with self._mutex:
            taken, self._files = self._files, set()
            more, self._more = self._more, False
        return None if more else taken

    def _matters(self, event: Event) -> bool:
        if event.mask & flags.Q_OVERFLOW:
            return True  # more happened than was kept
        if event.wd not in self._interests:
            return False
        directory, interest = self._interests[event.wd]
        if event.mask & _GONE:
            return True
        made = event.mask & flags.CREATE and not event.mask & flags.ISDIR
        if made and not _whole(os.path.join(directory, event.name)):
            return False  # it is empty yet, and counts when whoever writes it closes it
        if event.name in interest.names:
            return True
        if not interest.specs or event.name.startswith("."):
            return False
        return bool(event.mask & flags.ISDIR) or event.name.endswith(SUFFIXES)


def _explained(error: OSError) -> str:
    limits = {
        errno.ENOSPC: "all watches are in use: raise sysctl fs.inotify.max_user_watches",
        errno.EMFILE: "all instances are in use: raise sysctl fs.inotify.max_user_instances",
    }
    return limits.get(error.errno or 0, error.strerror or str(error))


def _whole(path: str) -> bool:
    """Whether a new name is of something that has its content already: a link, hard or symbolic."""
    try:
        found = os.lstat(path)
    except OSError:
        return False  # gone again, which is told, too
    return stat.S_ISLNK(found.st_mode) or found.st_nlink > 1


def _interests(paths: Collection[str]) -> dict[str, _Interest]:
    """Directory, without symlinks → what counts in it."""
    found: dict[str, _Interest] = {}
    for path in paths:
        at = os.path.abspath(path)
        for parent, name in _way(at):
            at = os.path.join(parent, name)
            found.setdefault(parent, _Interest()).names.add(name)
        if os.path.isdir(at):
            one = found.setdefault(at, _Interest())
            one.specs = one.contents = True
        else:  # a file, or what may become one
            found.setdefault(os.path.dirname(at), _Interest()).contents = True
    return found


def _way(path: str) -> Iterator[tuple[str, str]]:
    """(directory, name) of each symlink on the way to what a path leads to, and of that at last.

    It ends early at what is missing.
    """
    at, rest, links = "/", _parts(path), 0
    while rest:
        name = rest.pop(0)
        here = os.path.dirname(at) if name == ".." else os.path.join(at, name)
        try:
            target = os.readlink(here)
        except OSError:
            if not rest or not os.path.lexists(here):
                yield os.path.dirname(here), os.path.basename(here)
                return
            at = here
            continue
        yield at, name
        links += 1
        if links > MAX_LINKS:
            return
        rest[:0] = _parts(target)
        at = "/" if target.startswith("/") else at


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]
