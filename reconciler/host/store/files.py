"""Opening the store's file, and what is said when that fails."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Final, TypeVar

from msgspec import MsgspecError

from reconciler.core.errors import Exit, HostError
from reconciler.core.units import Seconds, format_duration
from reconciler.host.store.schema import VERSION, of_today

NAME: Final = "state.db"
"""The store's file in its state directory; SQLite keeps a -wal and a -shm beside it."""
BUSY_TIMEOUT: Final[Seconds] = 10.0
"""How long another process may keep the file locked. Our own writers have it for milliseconds."""


class WrongHubError(HostError):
    """The state directory is another hub's."""


class StoreError(HostError):
    """The store cannot be read or written."""


class StoreLockedError(StoreError):
    """Another process keeps the store's file locked."""

    exit: ClassVar[Exit] = Exit.LOCKED


_CODES: Final = {
    sqlite3.SQLITE_CORRUPT: errno.EBADMSG,
    sqlite3.SQLITE_NOTADB: errno.EBADMSG,
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_CANTOPEN: errno.EROFS,
    sqlite3.SQLITE_IOERR: errno.EIO,
}
"""SQLite's primary result codes → what the system would call it."""


@contextlib.contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Errors of SQLite and of the system as a StoreError that says what helps."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreLockedError(_locked(path, doing), "StoreLocked") from error
        undecodable = not code and "decode to UTF-8" in str(error)
        if undecodable:
            raise damaged(path, doing, str(error)) from error
        raise _failed(path, doing, str(error), _CODES.get(code, 0)) from error
    except OSError as error:
        raise _failed(path, doing, error.strerror or str(error), error.errno or 0) from error


@contextlib.contextmanager
def believed(path: Path) -> Iterator[None]:
    """What is in a row and is nothing that was ever written as a StoreError."""
    try:
        yield
    except (ValueError, MsgspecError) as error:  # in old versions of msgspec, two kinds
        raise damaged(path, "read", str(error)) from error


def damaged(path: Path, doing: str, said: str) -> StoreError:
    """What to say of a store that cannot be believed."""
    return _failed(path, doing, f"it is damaged ({said})", errno.EBADMSG)


def _failed(path: Path, doing: str, said: str, code: int) -> StoreError:
    reason, hint = "Store", ""
    directory = path.parent
    if code == errno.EBADMSG and path.name != NAME:
        reason, hint = "StoreDamaged", "; take another copy"
    elif code == errno.EBADMSG:
        reason = "StoreDamaged"
        hint = (
            f"; put a backup back with `reconciler state restore FILE`, or move {path}* away and "
            "apply again: what runs is found by its marks, and a run that was asked for is held "
            "as UNKNOWN"
        )
    elif code in (errno.EISDIR, errno.ENOTDIR) and path.name == NAME:
        hint = "; move it away, or use another state directory"
    elif code in (errno.EACCES, errno.EPERM):
        hint = _owner(path)
    elif code in (errno.ENOSPC, errno.EDQUOT) or (code and _full(directory)):
        reason = "StoreFull"
        said = said if "full" in said else f"{said}, its file system is full"
        hint = f"; make room, then do this again: df {directory}"
    elif code == errno.EROFS and _read_only(directory):
        reason = "StoreReadOnly"
        hint = f"; its file system is mounted read-only: findmnt -T {directory}"
    elif code == errno.EROFS:
        hint = _owner(path)
    elif code == errno.EIO:
        hint = f"; see to its storage: dmesg, df {directory}"
    return StoreError(f"cannot {doing} the store {path}: {said}{hint}", reason)


def _full(directory: Path) -> bool:
    """SQLite says of some writes only that they failed."""
    with contextlib.suppress(OSError):
        found = os.statvfs(directory)
        no_space = bool(found.f_blocks) and not found.f_bavail
        return no_space or (bool(found.f_files) and not found.f_favail)
    return False


def _read_only(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)
    return False


def _owner(path: Path) -> str:
    """Whose it is, if that is not who we are."""
    import pwd  # late: only for a refusal

    for one in (path, path.parent):
        with contextlib.suppress(OSError, KeyError):
            uid = one.stat().st_uid
            if uid != os.geteuid():
                name = pwd.getpwuid(uid).pw_name
                return f"; {one} belongs to {name}: run this as {name}"
    return f"; see to the rights: ls -la {path.parent}"


def _locked(path: Path, doing: str) -> str:
    who = lockers(path)
    holder = f"by {', '.join(who)}" if who else "by another process"
    help_ = "end that" if who else f"see which with `fuser -v {path}`, and end it"
    return (
        f"cannot {doing} the store {path}: it was locked {holder} for "
        f"{format_duration(BUSY_TIMEOUT)}; {help_}, then do this again"
    )


def lockers(path: Path) -> list[str]:
    """The other processes that keep the store from being written, as far as they can be seen."""
    found: dict[int, str] = {}
    seen = [_stat(path), _stat(path.with_name(f"{path.name}-shm"))]
    inodes = {one.st_ino for one in seen if one}
    with contextlib.suppress(OSError):  # a kernel that does not tell
        for line in Path("/proc/locks").read_text().splitlines():
            # 1: POSIX  ADVISORY  WRITE 4711 fe:01:131 120 120. Source: proc_locks(5).
            words = line.split()
            if "->" in words or words[3] != "WRITE":
                continue
            pid, inode = int(words[4]), int(words[5].rsplit(":", 1)[1])
            if inode in inodes and pid > 0 and pid != os.getpid() and _has_open(pid, path):
                found[pid] = f"{_name(pid)} (pid {pid})"
    return list(found.values())


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process has the file or one beside it open; inode numbers are of one file system.

    True where its descriptors are not ours to see.
    """
    real = os.path.realpath(path)
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return True
    for one in descriptors:
        with contextlib.suppress(OSError):
            if os.readlink(one).startswith(real):
                return True
    return False


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "a process"


def newer(path: Path, version: int) -> StoreError:
    return StoreError(
        f"cannot use the store {path}: it was written by a newer version (schema {version}, this "
        f"one knows {VERSION}); use that version",
        "StoreNewer",
    )


def version_of(db: sqlite3.Connection, path: Path) -> int:
    """The schema version; 0: nothing was ever written. Raises StoreError if it is not ours."""
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise newer(path, version)
    if not version and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise StoreError(
            f"cannot use the store {path}: it is a database of something else; move it away, or "
            "use another state directory",
            "Store",
        )
    return version


_T = TypeVar("_T")


def looked_up(path: Path, query: Callable[[sqlite3.Connection], _T]) -> _T | None:
    """What a query finds in a store as this version has it. None: there is none.

    See `looked_into`. Raises StoreError.
    """

    def today(db: sqlite3.Connection) -> _T | None:
        version = version_of(db, path)
        if not version:
            return None
        with of_today(db, version) as current:
            return query(current)

    return looked_into(path, today)


def looked_into(path: Path, query: Callable[[sqlite3.Connection], _T]) -> _T | None:
    """What a query finds, over a connection that cannot write, not even the files beside.

    With no writer there is no -wal file, or an empty one where a writer failed on a full disk, and
    nothing but the database to read: as `immutable`, SQLite then makes no -shm either. A writer
    that came meanwhile makes the look void. None: there is no file, or an empty one. Raises
    StoreError.
    """
    wal = path.with_name(f"{path.name}-wal")
    quoted = str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    for last in (False, False, False, True):
        with explained(path, "read"):
            alone = _empty(wal)
            before = _stat(path)
            if before is not None and stat.S_ISDIR(before.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if before is None or not before.st_size:
                return None
            mode = "mode=ro&immutable=1" if alone else "mode=ro"
            db = sqlite3.connect(
                f"file:{quoted}?{mode}", uri=True, timeout=BUSY_TIMEOUT, isolation_level=None
            )
            try:
                db.execute("BEGIN")
                found = query(db)
            except sqlite3.DatabaseError as error:
                busy = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
                if last or busy or (alone and _empty(wal)):
                    raise
                continue
            finally:
                db.close()
            after = path.stat()
        if not alone or (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size):
            return found
    return found


def _stat(path: Path) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat()
    return None


def _empty(path: Path) -> bool:
    found = _stat(path)
    return found is None or not found.st_size


def findings(db: sqlite3.Connection) -> str:
    """What SQLite finds wrong with the file's structure; empty: nothing.

    2.3 ms per 1,000 calls (with 3,000 events), measured.
    """
    said: str = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    return "" if said == "ok" else said.replace("\n", " ")
