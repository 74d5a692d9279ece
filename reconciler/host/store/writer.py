"""The writer's view of the store; made only by who holds the lock."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from reconciler.core.call import Call, CallEvent, job_id, step
from reconciler.core.ledger import Lease, Ledger
from reconciler.core.units import Bytes, Seconds
from reconciler.host.effects import Effect, effect
from reconciler.host.store.files import BUSY_TIMEOUT, StoreError, WrongHubError, explained, newer
from reconciler.host.store.rows import CALL, Event, call_of, insert_call, insert_event, ledger_of
from reconciler.host.store.schema import VERSION, create, migrate

EVENT_DAYS: Final = 90
_EFFECTS: Final = {
    CallEvent.INTEND: Effect.INTENT,
    CallEvent.END: Effect.PUBLISH,
    **dict.fromkeys(
        (CallEvent.ACCEPT, CallEvent.REJECT, CallEvent.UNCLEAR, CallEvent.NOTHING_SENT),
        Effect.OUTCOME,
    ),
}
"""What it is for the world that a call takes a step; any other is a verdict."""


class Store:
    """The writer's view; made only by who holds the lock. Methods may be called from any thread."""

    def __init__(self, directory: Path, hub: str) -> None:
        """Opens or creates. Raises StoreError, WrongHubError."""
        self.path = directory / "state.db"
        self.hub = hub
        self._mutex = threading.Lock()
        with explained(self.path, "open"):
            # Only where there is none: closing a file drops all locks that this process has on it,
            # also those of its Inbox, whose -wal the next who closes the store would then delete.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            self._db = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            with self._write() as db:
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    self._create(db)
                migrate(db)
        if version > VERSION:
            self._db.close()
            raise StoreError(newer(self.path, version), "Store")
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
        create(db)
        values = (("hub", self.hub), ("state_id", os.urandom(8).hex()))
        db.executemany("INSERT INTO meta VALUES (?, ?)", values)

    def close(self) -> None:
        with self._mutex, contextlib.suppress(sqlite3.Error):
            self._db.close()

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._mutex, explained(self.path, "write to"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def ledger(self) -> Ledger:
        with self._mutex, explained(self.path, "read"):
            return ledger_of(self._db)

    # -- leases

    def hold(self, leases: Sequence[Lease], call: Call | None) -> None:
        """Commit the ports of a VM, and its run as DUE, in one step; all or nothing."""
        with effect(Effect.LEASE), self._write() as db:
            for lease in leases:
                db.execute(
                    "INSERT INTO leases (hub, vm, disk, run, attempt, port, since, safe) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (hub, vm, disk, run, attempt) "
                    "DO UPDATE SET started = started AND port = excluded.port, "
                    "port = excluded.port, since = excluded.since, safe = excluded.safe",
                    (self.hub, *lease.key, lease.port, lease.since, int(lease.safe)),
                )
            if call:
                insert_call(db, call, replace_due=True)

    def started(self, leases: Sequence[Lease], *, again: bool = False) -> None:
        """Their servers answered, for the first time or `again`."""
        with effect(Effect.STARTED), self._write() as db:
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

    def sightings(self, seen: Mapping[str, Bytes], gone: Iterable[str], now: Seconds) -> None:
        """Note of which jobs all disks have clients, and what the images take; once counts."""
        with self._write() as db:
            db.executemany("DELETE FROM sightings WHERE job_id = ?", [(job,) for job in gone])
            db.executemany(
                "INSERT INTO sightings VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                [(job, now, allocated) for job, allocated in seen.items()],
            )

    def release(self, leases: Sequence[Lease]) -> None:
        """Give ports back, those that are still these leases'."""
        with effect(Effect.RELEASE), self._write() as db:
            db.executemany(
                "DELETE FROM leases WHERE hub = ? AND vm = ? AND disk = ? AND run = ? "
                "AND attempt = ? AND port = ?",
                [(self.hub, *lease.key, lease.port) for lease in leases],
            )

    # -- calls

    def remember(self, call: Call) -> None:
        """A call that only a claim told of."""
        with self._write() as db:
            insert_call(db, call, replace_due=False)

    def advance(self, call: Call, event: CallEvent, now: Seconds, **changes: Any) -> Call:
        """Take one step of a call, if it still stands where `call` says.

        Raises ImpossibleStepError, StoreError (somebody else took a step).
        """
        state = step(call.state, event)
        columns = {
            "state": str(state),
            "changed": now,
            "reason": str(event),
            **({"called": now} if event is CallEvent.INTEND else {}),
            **({"ended": now} if state.terminal else {}),
            **{name: int(v) if isinstance(v, bool) else v for name, v in changes.items()},
        }
        with effect(_EFFECTS.get(event, Effect.VERDICT)), self._write() as db:
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
                f"SELECT {CALL} FROM calls WHERE hub = ? AND vm = ? AND run = ? AND attempt = ?",  # noqa: S608
                (self.hub, *call.key),
            ).fetchone()
        return call_of(row)

    def taint(self, call: Call) -> None:
        """A server died under a client of this run."""
        with effect(Effect.TAINT), self._write() as db:
            db.execute(
                "UPDATE calls SET tainted = 1 WHERE hub = ? AND vm = ? AND run = ? AND attempt = ?",
                (self.hub, *call.key),
            )

    def another_attempt(self, call: Call, now: Seconds, reason: str, who: str = "") -> None:
        """Close an attempt and open the next, DUE, in one step."""
        state = step(call.state, CallEvent.RESEND)
        following = job_id(self.hub, call.vm, call.run, call.attempt + 1)
        with self._write() as db:
            db.execute(
                "UPDATE calls SET state = ?, changed = ?, ended = ?, reason = ?, message = ? "
                "WHERE hub = ? AND vm = ? AND run = ? AND attempt = ? AND state = ?",
                (state, now, now, CallEvent.RESEND, reason, self.hub, *call.key, call.state),
            )
            db.execute(
                "INSERT INTO calls (hub, vm, run, attempt, state, job_id, sna, type, request, "
                "exports, created, changed, reason, message, who) SELECT hub, vm, run, "
                "attempt + 1, 'DUE', ?, sna, type, '', '[]', ?, ?, 'ResolvedResend', ?, ? "
                "FROM calls WHERE hub = ? AND vm = ? AND run = ? AND attempt = ?",
                (following, now, now, reason, who, self.hub, *call.key),
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
                insert_event(db, event, who, now)
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


def _same(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Whether two desired states of a VM differ at most in where they are written."""
    return {**one, "place": ""} == {**two, "place": ""}
