"""What cannot be looked at: leases, calls, events, the last applied state. SQLite, one writer.

Every change is one transaction that is on the disk when the method returns.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from msgspec import Struct

from reconciler.core.call import Call, CallEvent, CallState, job_id, step
from reconciler.core.desired import Export
from reconciler.core.errors import HostError
from reconciler.core.ledger import Applied, Lease, Ledger
from reconciler.core.units import Seconds

VERSION: Final = 1
"""Schema version, in PRAGMA user_version."""
BUSY_TIMEOUT: Final[Seconds] = 10.0
EVENT_DAYS: Final = 90

_SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE leases (
    hub TEXT NOT NULL, vm TEXT NOT NULL, disk INTEGER NOT NULL, run TEXT NOT NULL,
    attempt INTEGER NOT NULL, port INTEGER NOT NULL, since REAL NOT NULL,
    started INTEGER NOT NULL DEFAULT 0, clients_seen INTEGER NOT NULL DEFAULT 0,
    restarts INTEGER NOT NULL DEFAULT 0, safe INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (hub, vm, disk, run, attempt), UNIQUE (hub, port)) STRICT;
CREATE TABLE calls (
    hub TEXT NOT NULL, vm TEXT NOT NULL, run TEXT NOT NULL, attempt INTEGER NOT NULL,
    state TEXT NOT NULL, job_id TEXT NOT NULL, sna TEXT NOT NULL, type TEXT NOT NULL,
    request TEXT NOT NULL, exports TEXT NOT NULL, targets TEXT NOT NULL DEFAULT '',
    created REAL NOT NULL, changed REAL NOT NULL, reason TEXT NOT NULL, message TEXT NOT NULL,
    failures INTEGER NOT NULL DEFAULT 0, retry_at REAL NOT NULL DEFAULT 0,
    tainted INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (hub, vm, run, attempt)) STRICT;
CREATE TABLE events (
    id INTEGER PRIMARY KEY, first REAL NOT NULL, last REAL NOT NULL,
    count INTEGER NOT NULL DEFAULT 1, vm TEXT NOT NULL, disk INTEGER, run TEXT NOT NULL,
    severity TEXT NOT NULL, reason TEXT NOT NULL, message TEXT NOT NULL, who TEXT NOT NULL) STRICT;
CREATE INDEX events_by_vm ON events (vm, id);
CREATE INDEX events_by_age ON events (last);
CREATE TABLE applied (
    vm TEXT PRIMARY KEY, desired TEXT NOT NULL, generation INTEGER NOT NULL, at REAL NOT NULL)
    STRICT;
CREATE TABLE conditions (
    vm TEXT NOT NULL, type TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL,
    since REAL NOT NULL, PRIMARY KEY (vm, type)) STRICT;
CREATE TABLE failures (vm TEXT PRIMARY KEY, reason TEXT NOT NULL, message TEXT NOT NULL) STRICT;
"""


class Event(Struct, frozen=True, kw_only=True):
    """Something that happened, once or `count` times in a row."""

    vm: str
    reason: str
    message: str
    severity: str = "Normal"
    disk: int | None = None
    run: str = ""
    first: Seconds = 0.0
    last: Seconds = 0.0
    count: int = 1


class WrongHubError(HostError):
    """The state directory is another hub's."""


class StoreError(HostError):
    """The store cannot be read or written."""


@contextlib.contextmanager
def _explained(path: Path, doing: str) -> Iterator[None]:
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


class Store:
    """The writer's view; made only by who holds the lock. Methods may be called from any thread."""

    def __init__(self, directory: Path, hub: str) -> None:
        """Opens or creates. Raises StoreError, WrongHubError."""
        self.path = directory / "state.db"
        self.hub = hub
        self._mutex = threading.Lock()
        with _explained(self.path, "open"):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            with self._write() as db:
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    self._create(db)
        if version > VERSION:
            self._db.close()
            raise StoreError(_newer(self.path, version), "Store")
        meta = dict(self._db.execute("SELECT name, value FROM meta").fetchall())
        known = meta["hub"]
        self.state_id: str = meta["state_id"]
        if known != hub:
            self._db.close()
            raise WrongHubError(
                f"cannot use {directory} for hub {hub!r}: it belongs to hub {known!r}, whose "
                f"servers carry that name; write `hub: {known}`, or use another state directory"
            )

    def _create(self, db: sqlite3.Connection) -> None:
        for statement in _SCHEMA.split(";"):
            if statement.strip():
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {VERSION}")
        values = (("hub", self.hub), ("state_id", os.urandom(8).hex()))
        db.executemany("INSERT INTO meta VALUES (?, ?)", values)

    def close(self) -> None:
        with self._mutex, contextlib.suppress(sqlite3.Error):
            self._db.close()

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._mutex, _explained(self.path, "write to"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def ledger(self) -> Ledger:
        with self._mutex, _explained(self.path, "read"):
            return _ledger(self._db)

    # -- leases

    def hold(self, leases: Sequence[Lease], call: Call | None) -> None:
        """Commit the ports of a VM, and its run as DUE, in one step; all or nothing."""
        with self._write() as db:
            for lease in leases:
                db.execute(
                    "INSERT INTO leases (hub, vm, disk, run, attempt, port, since, safe) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (hub, vm, disk, run, attempt) "
                    "DO UPDATE SET started = started AND port = excluded.port, "
                    "port = excluded.port, since = excluded.since, safe = excluded.safe",
                    (self.hub, *lease.key, lease.port, lease.since, int(lease.safe)),
                )
            if call:
                _insert(db, call, replace_due=True)

    def started(self, leases: Sequence[Lease], *, again: bool = False) -> None:
        """Their servers answered, for the first time or `again`."""
        with self._write() as db:
            db.executemany(
                "UPDATE leases SET started = 1, restarts = restarts + ? WHERE hub = ? AND vm = ? "
                "AND disk = ? AND run = ? AND attempt = ?",
                [(int(again), self.hub, *lease.key) for lease in leases],
            )

    def clients_seen(self, leases: Sequence[Lease]) -> None:
        """Clients were seen on their ports."""
        with self._write() as db:
            db.executemany(
                "UPDATE leases SET clients_seen = 1 WHERE hub = ? AND vm = ? AND disk = ? "
                "AND run = ? AND attempt = ?",
                [(self.hub, *lease.key) for lease in leases],
            )

    def release(self, leases: Sequence[Lease]) -> None:
        """Give ports back, those that are still these leases'."""
        with self._write() as db:
            db.executemany(
                "DELETE FROM leases WHERE hub = ? AND vm = ? AND disk = ? AND run = ? "
                "AND attempt = ? AND port = ?",
                [(self.hub, *lease.key, lease.port) for lease in leases],
            )

    # -- calls

    def remember(self, call: Call) -> None:
        """A call that only a claim told of."""
        with self._write() as db:
            _insert(db, call, replace_due=False)

    def advance(self, call: Call, event: CallEvent, now: Seconds, **changes: Any) -> Call:
        """Take one step of a call, if it still stands where `call` says.

        Raises ImpossibleStepError, StoreError (somebody else took a step).
        """
        state = step(call.state, event)
        columns = {
            "state": str(state),
            "changed": now,
            "reason": str(event),
            **{name: int(v) if isinstance(v, bool) else v for name, v in changes.items()},
        }
        with self._write() as db:
            assignments = ", ".join(f"{name} = ?" for name in columns)
            done = db.execute(
                f"UPDATE calls SET {assignments} "  # noqa: S608 names are ours
                "WHERE hub = ? AND vm = ? AND run = ? AND attempt = ? AND state = ?",
                (*columns.values(), self.hub, *call.key, str(call.state)),
            )
            if done.rowcount != 1:
                raise StoreError(
                    f"cannot take {event} of run {call.run} of {call.vm}: it is not "
                    f"{call.state} any more",
                    "Store",
                )
            row = db.execute(
                f"SELECT {_CALL} FROM calls WHERE hub = ? AND vm = ? AND run = ? AND attempt = ?",  # noqa: S608
                (self.hub, *call.key),
            ).fetchone()
        return _call(row)

    def taint(self, call: Call) -> None:
        """A server died under a client of this run."""
        with self._write() as db:
            db.execute(
                "UPDATE calls SET tainted = 1 WHERE hub = ? AND vm = ? AND run = ? AND attempt = ?",
                (self.hub, *call.key),
            )

    def another_attempt(self, call: Call, now: Seconds, reason: str) -> None:
        """Close an attempt and open the next, DUE, in one step."""
        state = step(call.state, CallEvent.RESEND)
        following = job_id(self.hub, call.vm, call.run, call.attempt + 1)
        with self._write() as db:
            db.execute(
                "UPDATE calls SET state = ?, changed = ?, reason = ?, message = ? "
                "WHERE hub = ? AND vm = ? AND run = ? AND attempt = ? AND state = ?",
                (state, now, CallEvent.RESEND, reason, self.hub, *call.key, call.state),
            )
            db.execute(
                "INSERT INTO calls (hub, vm, run, attempt, state, job_id, sna, type, request, "
                "exports, created, changed, reason, message) SELECT hub, vm, run, attempt + 1, "
                "'DUE', ?, sna, type, '', '[]', ?, ?, 'ResolvedResend', ? FROM calls "
                "WHERE hub = ? AND vm = ? AND run = ? AND attempt = ?",
                (following, now, now, reason, self.hub, *call.key),
            )

    # -- for people

    def record(self, events: Iterable[Event], who: str, now: Seconds) -> None:
        """Write events down; one that repeats the last of its VM only counts up."""
        with self._write() as db:
            for event in events:
                last = db.execute(
                    "SELECT id, reason, message, disk, run FROM events WHERE vm = ? "
                    "ORDER BY id DESC LIMIT 1",
                    (event.vm,),
                ).fetchone()
                same = (event.reason, event.message, event.disk, event.run)
                if last and tuple(last[1:]) == same:
                    db.execute(
                        "UPDATE events SET count = count + 1, last = ? WHERE id = ?", (now, last[0])
                    )
                    continue
                db.execute(
                    "INSERT INTO events (first, last, vm, disk, run, severity, reason, message, "
                    "who) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (now, now, event.vm, event.disk, event.run, event.severity, event.reason,
                     event.message, who),
                )  # fmt: skip
            db.execute("DELETE FROM events WHERE last < ?", (now - EVENT_DAYS * 86400,))

    def apply(
        self, settings: Mapping[str, Any], vms: Mapping[str, Mapping[str, Any]], now: Seconds
    ) -> None:
        """Note the desired state that is being applied; a changed VM gets the next generation."""
        text = json.dumps(settings, sort_keys=True)
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('settings', ?)", (text,))
            for name, vm in vms.items():
                row = db.execute("SELECT desired FROM applied WHERE vm = ?", (name,)).fetchone()
                moved = row is not None and _same(json.loads(row[0]), vm)
                db.execute(
                    "INSERT INTO applied VALUES (?, ?, 1, ?) ON CONFLICT (vm) DO UPDATE SET "
                    "desired = excluded.desired, at = excluded.at, generation = generation + ?",
                    (name, json.dumps(vm, sort_keys=True), now, int(not moved)),
                )

    def failures(self, scope: Iterable[str], found: Mapping[str, tuple[str, str]]) -> None:
        """Note what could not be done about the VMs in scope, and forget what could."""
        with self._write() as db:
            db.executemany("DELETE FROM failures WHERE vm = ?", [(vm,) for vm in scope])
            db.executemany(
                "INSERT INTO failures VALUES (?, ?, ?)", [(vm, *why) for vm, why in found.items()]
            )

    def transitions(self, found: Mapping[tuple[str, str], tuple[str, str]], now: Seconds) -> None:
        """Note (VM, condition) → (status, reason); `since` moves only with the status."""
        with self._write() as db:
            db.executemany(
                "INSERT INTO conditions VALUES (?, ?, ?, ?, ?) ON CONFLICT (vm, type) DO UPDATE "
                "SET since = CASE WHEN status = excluded.status THEN since ELSE excluded.since "
                "END, status = excluded.status, reason = excluded.reason",
                [(vm, kind, *value, now) for (vm, kind), value in found.items()],
            )


def read(directory: Path) -> Ledger | None:
    """The ledger, without the lock and without writing anything. None: there is no store yet.

    Raises StoreError.
    """
    return _looked_up(directory, _ledger)


def events(directory: Path, vm: str, limit: int = 20) -> list[Event]:
    """The newest events of a VM, newest first. Raises StoreError."""

    def query(db: sqlite3.Connection) -> list[Event]:
        rows = db.execute(
            "SELECT vm, reason, message, severity, disk, run, first, last, count FROM events "
            "WHERE vm = ? ORDER BY id DESC LIMIT ?",
            (vm, limit),
        )
        names = ("vm", "reason", "message", "severity", "disk", "run", "first", "last", "count")
        return [Event(**dict(zip(names, row, strict=True))) for row in rows]

    return _looked_up(directory, query) or []


_T = TypeVar("_T")


def _looked_up(directory: Path, query: Callable[[sqlite3.Connection], _T]) -> _T | None:
    """What a query finds, over a connection that cannot write, not even the files beside.

    With no writer there is no -wal file and nothing but the database to read: as `immutable`,
    SQLite then makes no -shm either. A writer that came meanwhile makes the look void.
    """
    path = directory / "state.db"
    wal = path.with_name("state.db-wal")
    quoted = str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    for last in (False, False, False, True):
        with _explained(path, "read"):
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
                    raise StoreError(_newer(path, version), "Store")
                found = query(db) if version else None
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


def _newer(path: Path, version: int) -> str:
    return (
        f"cannot use the store {path}: it was written by a newer version (schema {version}, this "
        f"one knows {VERSION}); use that version"
    )


def _same(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Whether two desired states of a VM differ at most in where they are written."""
    return {**one, "place": ""} == {**two, "place": ""}


_CALL: Final = (
    "hub, vm, run, attempt, state, job_id, sna, type, request, exports, created, changed, reason, "
    "message, failures, retry_at, tainted"
)


def _insert(db: sqlite3.Connection, call: Call, *, replace_due: bool) -> None:
    exports = json.dumps([export.to_json() for export in call.exports])
    conflict = "DO NOTHING"
    if replace_due:
        # Before the intent, a run is what the spec says last.
        conflict = (
            "(hub, vm, run, attempt) DO UPDATE SET sna = excluded.sna, type = excluded.type, "
            "request = excluded.request, exports = excluded.exports, job_id = excluded.job_id "
            "WHERE state IN ('DUE', 'REJECTED')"
        )
    db.execute(
        f"INSERT INTO calls ({_CALL}) VALUES ({', '.join('?' * len(_CALL.split(', ')))}) "  # noqa: S608
        f"ON CONFLICT {conflict}",
        (
            *(call.hub, call.vm, call.run, call.attempt, str(call.state), call.job_id, call.sna),
            *(call.type, call.request, exports, call.created, call.changed, call.reason),
            *(call.message, call.failures, call.retry_at, int(call.tainted)),
        ),
    )


def _call(row: Sequence[Any]) -> Call:
    values = dict(zip(_CALL.split(", "), row, strict=True))
    values["state"] = CallState(values["state"])
    values["exports"] = tuple(Export(**one) for one in json.loads(values["exports"]))
    values["tainted"] = bool(values["tainted"])
    return Call(**values)


def _lease(row: Sequence[Any]) -> Lease:
    hub, vm, disk, run, attempt, port, since, started, clients_seen, restarts, safe = row
    return Lease(
        hub=hub,
        vm=vm,
        disk=disk,
        run=run,
        attempt=attempt,
        port=port,
        since=since,
        started=bool(started),
        clients_seen=bool(clients_seen),
        restarts=restarts,
        safe=bool(safe),
    )


def _ledger(db: sqlite3.Connection) -> Ledger:
    meta: dict[str, str] = dict(db.execute("SELECT name, value FROM meta").fetchall())
    leases = db.execute(
        "SELECT hub, vm, disk, run, attempt, port, since, started, clients_seen, restarts, safe "
        "FROM leases"
    )
    return Ledger(
        hub=meta["hub"],
        state_id=meta["state_id"],
        leases=tuple(map(_lease, leases)),
        calls=tuple(_call(row) for row in db.execute(f"SELECT {_CALL} FROM calls")),  # noqa: S608
        applied={
            vm: Applied(vm=json.loads(desired), generation=generation, at=at)
            for vm, desired, generation, at in db.execute("SELECT * FROM applied")
        },
        settings=json.loads(meta.get("settings", "{}")),
        failures={
            vm: (reason, message)
            for vm, reason, message in db.execute("SELECT vm, reason, message FROM failures")
        },
        transitions={
            (vm, kind): (status, reason, since)
            for vm, kind, status, reason, since in db.execute("SELECT * FROM conditions")
        },
    )
