"""Opening the store's file, and what is said when that fails."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from reconciler.core.errors import HostError
from reconciler.core.units import Seconds
from reconciler.host.store.schema import VERSION, of_today

BUSY_TIMEOUT: Final[Seconds] = 10.0


class WrongHubError(HostError):
    """The state directory is another hub's."""


class StoreError(HostError):
    """The store cannot be read or written."""


@contextlib.contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        said = str(error)
        hint = ""
        if "malformed" in said or "not a database" in said:
            hint = (
                "; move the file away and apply again: what runs is found by its marks, and a run "
                "that was asked for is held as UNKNOWN"
            )
        elif "locked" in said:
            hint = "; another process has it open for writing: see `fuser` on that file"
        elif "full" in said or "disk I/O" in said or "readonly" in said or "unable to open" in said:
            hint = f"; see to the space and the rights of {path.parent}: df {path.parent}"
        raise StoreError(f"cannot {doing} the store {path}: {said}{hint}", "Store") from error
    except OSError as error:
        raise StoreError(f"cannot {doing} the store {path}: {error.strerror}", "Store") from error


def newer(path: Path, version: int) -> str:
    return (
        f"cannot use the store {path}: it was written by a newer version (schema {version}, this "
        f"one knows {VERSION}); use that version"
    )


_T = TypeVar("_T")


def looked_up(directory: Path, query: Callable[[sqlite3.Connection], _T]) -> _T | None:
    """What a query finds, over a connection that cannot write, not even the files beside.

    With no writer there is no -wal file and nothing but the database to read: as `immutable`,
    SQLite then makes no -shm either. A writer that came meanwhile makes the look void.
    """
    path = directory / "state.db"
    wal = path.with_name("state.db-wal")
    quoted = str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    for last in (False, False, False, True):
        with explained(path, "read"):
            alone = not wal.exists()
            before = path.stat() if path.exists() else None
            if before is None or not before.st_size:
                return None
            mode = "mode=ro&immutable=1" if alone else "mode=ro"
            db = sqlite3.connect(
                f"file:{quoted}?{mode}", uri=True, timeout=BUSY_TIMEOUT, isolation_level=None
            )
            try:
                db.execute("BEGIN")
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version > VERSION:
                    raise StoreError(newer(path, version), "Store")
                found = query(of_today(db, version)) if version else None
            except sqlite3.DatabaseError:
                if last or (alone and not wal.exists()):
                    raise
                continue
            finally:
                db.close()
            after = path.stat()
        if not alone or (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size):
            return found
    return found
