"""A store's file from a process that does not own it: a short transaction at a time.

Nothing is created, and no store is migrated. The file may come late, and may be replaced.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from reconciler.host.store.files import BUSY_TIMEOUT, NAME, StoreError, explained, newer
from reconciler.host.store.schema import VERSION


class OtherVersionError(StoreError):
    """The store is of another version than this: it is not read, and not migrated from here."""


class Window:
    """A connection of its own to a store, which need not exist yet. Safe for threads, which have
    their turn one after the other."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self._mutex = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    def close(self) -> None:
        with self._mutex:
            self._leave()

    def write(
        self, *, durable: bool = True
    ) -> contextlib.AbstractContextManager[sqlite3.Connection | None]:
        """A transaction; None: there is no store yet. Its end is the commit, unless that was
        before; then it is on the disk, if it is `durable`."""
        level = "FULL" if durable else "NORMAL"
        return self._transaction("write to", f"PRAGMA synchronous={level}", "BEGIN IMMEDIATE")

    def read(self) -> contextlib.AbstractContextManager[sqlite3.Connection | None]:
        """One moment of the store; None: there is none yet."""
        return self._transaction("read", "BEGIN")

    @contextlib.contextmanager
    def _transaction(self, doing: str, *begin: str) -> Iterator[sqlite3.Connection | None]:
        with self._mutex, explained(self.path, doing):
            db = self._connected()
            if db is None:
                yield None
                return
            try:
                for statement in begin:
                    db.execute(statement)
                yield db if self._of_this_version(db) else None
                if db.in_transaction:
                    db.execute("COMMIT")
            except BaseException:
                self._leave()  # which rolls back; the next word begins anew
                raise

    def _of_this_version(self, db: sqlite3.Connection) -> bool:
        """False: the store is only about to be made. Raises OtherVersionError."""
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise OtherVersionError(str(newer(self.path, version)), "StoreNewer")
        if 0 < version < VERSION:
            raise OtherVersionError(
                f"cannot use the store {self.path} yet: it is of an older version (schema "
                f"{version}, this one knows {VERSION}); the next apply brings it up",
                "Store",
            )
        return bool(version)

    def _leave(self) -> None:
        if self._db:
            self._db.close()
            self._db = None

    def _connected(self) -> sqlite3.Connection | None:
        """A connection to the file that is there now."""
        now = _identity_of(self.path)
        if now != self._file:
            self._leave()  # of a file that was replaced; SQLite leaves the -wal of the new alone
        if self._db is None and now is not None:
            quoted = str(self.path.absolute())
            for character in "%?#":
                quoted = quoted.replace(character, f"%{ord(character):02x}")
            self._db = sqlite3.connect(
                f"file:{quoted}?mode=rw",
                uri=True,
                timeout=BUSY_TIMEOUT,
                isolation_level=None,
                check_same_thread=False,
            )
            self._file = now
        return self._db


def _identity_of(path: Path) -> tuple[int, int] | None:
    """Which file is there; None: none, or one that is only about to become a store."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) if found.st_size else None
