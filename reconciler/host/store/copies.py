"""Copies of the store: made while others work, looked into, and put back in its place."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.errors import HostError
from reconciler.core.units import Bytes, Seconds
from reconciler.host.store.files import (
    NAME,
    StoreError,
    damaged,
    explained,
    findings,
    looked_into,
    version_of,
)
from reconciler.host.store.reading import elsewhere
from reconciler.host.store.rows import identity

ASIDE: Final = f"{NAME}.before-restore-"
"""What a store is called that another was put in the place of; a time follows."""


class Facts(Struct, frozen=True, kw_only=True):
    """What a store or a copy of one holds."""

    path: str
    hub: str
    state_id: str
    home: str
    """The directory that it was last written in; empty: by a version that did not note it."""
    schema: int
    size: Bytes
    calls: Mapping[str, int]
    """State → how many."""
    leases: int
    events: int
    newest: Seconds
    """When a call last took a step; 0: there is none."""
    wrong: str
    """What SQLite finds wrong with it; empty: nothing."""


def facts(path: Path) -> Facts | None:
    """What is in a store or a copy. None: there is none. Raises StoreError."""
    return looked_into(path, lambda db: _facts(path, db))


def _facts(path: Path, db: sqlite3.Connection) -> Facts | None:
    schema = version_of(db, path)
    if not schema:
        return None
    found = [row[0] for row in db.execute("PRAGMA integrity_check(3)")]
    meta = identity(db, path)
    return Facts(
        path=str(path),
        hub=meta["hub"],
        state_id=meta["state_id"],
        home=meta.get("home", ""),
        schema=schema,
        size=path.stat().st_size,
        calls=dict(db.execute("SELECT state, count(*) FROM calls GROUP BY state ORDER BY state")),
        leases=db.execute("SELECT count(*) FROM leases").fetchone()[0],
        events=db.execute("SELECT count(*) FROM events").fetchone()[0],
        newest=db.execute("SELECT coalesce(max(changed), 0) FROM calls").fetchone()[0],
        wrong="" if found == ["ok"] else "; ".join(found).replace("\n", " "),
    )


def backup(directory: Path, target: Path, *, overwrite: bool = False) -> Facts:
    """Copy the store of a directory as it is at one moment; writers need not wait.

    The copy is looked into before it gets its name, and stands alone: no -wal belongs to it. What
    has that name already is only replaced by order. Raises HostError.
    """
    source = directory / NAME
    if target.name.startswith(NAME) and _same_place(target.parent, directory):
        raise HostError(f"cannot back up to {target}: that is the store itself; name another file")
    if os.path.lexists(target) and not overwrite:
        raise HostError(
            f"cannot back up to {target}: it is there already; name another file, or add --force"
        )
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    with _written(target, "back up to"), _sound_copy(source, temporary) as copied:
        if overwrite:
            os.rename(temporary, target)
        else:
            _name(temporary, target)
        _sync(target.parent)
    return replace(copied, path=str(target))


def check(file: Path, directory: Path) -> Facts:
    """Whether a copy may be put into a directory, and what is in it. Raises StoreError."""
    found = facts(file)
    if found is None:
        raise StoreError(f"cannot restore {file}: there is no store in it", "Store")
    with contextlib.suppress(FileNotFoundError):
        if os.path.samefile(file, directory / NAME):
            raise StoreError(f"cannot restore {file}: it is the store itself", "Store")
    if found.wrong:
        raise StoreError(
            f"cannot restore {file}: it is damaged ({found.wrong}); take an older copy",
            "StoreDamaged",
        )
    twin = elsewhere({"home": found.home, "state_id": found.state_id}, directory / NAME)
    if twin:
        raise StoreError(f"cannot restore {file} into {directory}: {twin}", "StateCopied")
    return found


def restore(file: Path, directory: Path) -> Path | None:
    """Put a copy in the place of a directory's store; where the store is now, if there was one.

    Made only by who holds the lock. At each instant there is a store, the old or the new, and what
    was there is kept. Raises HostError.
    """
    path = directory / NAME
    temporary = directory / f".{NAME}.restoring"
    with _written(path, f"restore {file} to"), _sound_copy(file, temporary):
        aside = _put_aside(path)
        _remove(*_beside(path))  # a -wal is of its own store only: to another it is poison
        _sync(directory)
        os.rename(temporary, path)
        if aside and _size(_beside(aside)[0]) == 0:
            _remove(_beside(aside)[0])
        _sync(directory)
    return aside


def _put_aside(path: Path) -> Path | None:
    """A second name for the store that is there, with what is not merged into it."""
    if not os.path.lexists(path):
        return None
    aside = _free(path.with_name(f"{ASIDE}{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"))
    if path.is_dir():
        os.rename(path, aside)
        return aside
    wal, aside_wal = _beside(path)[0], _beside(aside)[0]
    # Before SQLite looks at it: beside a store that it cannot read, it removes what is there. And
    # who has the store open, a callback's writer, may write into it until the very end.
    if wal.exists():
        os.link(wal, aside_wal)
    _merge(path)
    os.link(path, aside)
    _sync(path.parent)
    return aside


def _merge(path: Path) -> None:
    """Bring what is in the -wal into the store itself, so that one file is all of it."""
    # Where that cannot be done, as it is damaged, in use, or on a full disk, both go aside.
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _free(path: Path) -> Path:
    """The first of NAME, NAME-2, NAME-3 … that nothing has."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not os.path.lexists(name))


@contextlib.contextmanager
def _sound_copy(source: Path, temporary: Path) -> Iterator[Facts]:
    """A whole and checked copy at a name of ours, on the disk; gone afterwards, unless renamed."""

    def copy(db: sqlite3.Connection) -> str:
        if not version_of(db, source):
            return ""
        wrong = findings(db)
        if wrong:
            raise damaged(source, "copy", wrong)
        with explained(temporary, "write"), contextlib.closing(sqlite3.connect(temporary)) as out:
            db.backup(out)
            out.execute("PRAGMA journal_mode=DELETE")  # else its first reader makes a -wal
        return identity(db, source)["state_id"]

    _remove(temporary, *_beside(temporary))
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        state_id = looked_into(source, copy)
        if not state_id:
            raise StoreError(f"cannot copy {source}: there is no store yet", "Store")
        copied = facts(temporary)
        if copied is None or copied.wrong or copied.state_id != state_id:
            said = copied.wrong if copied else "it is empty"
            raise StoreError(
                f"cannot copy {source}: the copy is not what it should be: {said}", "Store"
            )
        _sync(temporary)
        yield copied
    finally:
        _remove(temporary, *_beside(temporary))


@contextlib.contextmanager
def _written(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(
            f"cannot {doing} {path}: {error.strerror}; nothing was changed", "Storage"
        ) from error


def _name(temporary: Path, target: Path) -> None:
    """Give a file its name only if the name is free. Raises FileExistsError."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        # A file system without hard links, as of a stick or a share.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        os.rename(temporary, target)


def _beside(path: Path) -> tuple[Path, Path]:
    """SQLite's -wal and -shm."""
    return path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return None


def _same_place(one: Path, two: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(one, two)
    return False


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
