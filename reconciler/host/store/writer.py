"""The writer's view of the store; made only by who holds the lock."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import to_builtins
from msgspec.structs import astuple

from reconciler.core.call import Call, CallEvent, CallState, Report, job_id, step
from reconciler.core.ledger import (
    Archived,
    Declaration,
    Head,
    Kept,
    Lease,
    Ledger,
    Pause,
    Proof,
    Word,
)
from reconciler.core.notices import Notice, Turn
from reconciler.core.tunnel_seen import Dialled
from reconciler.core.units import Bytes, Seconds
from reconciler.host.effects import Effect, effect
from reconciler.host.store import outbox
from reconciler.host.store.files import (
    BUSY_TIMEOUT,
    NAME,
    StoreError,
    WrongHubError,
    damaged,
    explained,
    findings,
    version_of,
)
from reconciler.host.store.outbox import Letter
from reconciler.host.store.reading import elsewhere, home_of
from reconciler.host.store.rows import (
    CALL,
    Event,
    Use,
    call_of,
    calls_of,
    identity,
    insert_call,
    insert_event,
    kept_of,
    use_of,
)
from reconciler.host.store.schema import create, migrate

EVENT_DAYS: Final = 90
REPEATS: Final[Seconds] = 3600.0
"""How long after an event the same one only counts up; longer than the longest back-off."""
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
        self.path = directory / NAME
        self.hub = hub
        self.home = home_of(self.path)
        self._mutex = threading.RLock()
        self._token = os.urandom(8).hex()
        self._known = True
        """Whether the store says that this is who wrote last; see `Memory`. Said with what is
        written first, once the store is open."""
        with explained(self.path, "open"):
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            # Only where there is none: closing a file drops all locks that this process has on it,
            # also those of its Inbox, whose -wal the next who closes the store would then delete.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            self._db = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            try:
                self.state_id = self._ready()
                self._known = False
                from reconciler.host.store.memory import Memory  # who only looks needs none

                self._memory = Memory(
                    self.path, self.hub, self._db, self._calls_of, self._kept_of, self._token
                )
            except BaseException:
                self._db.close()
                raise

    def _ready(self) -> str:
        """Look before anything is written; then bring it to this version. Its state id."""
        if version_of(self._db, self.path):
            # Before anything is built on it: a page that is damaged may be one that is read late.
            wrong = findings(self._db)
            if wrong:
                raise damaged(self.path, "open", wrong)
            self._check_owner(identity(self._db, self.path))
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        with self._write() as db:
            if not version_of(db, self.path):
                create(db)
                values = (("hub", self.hub), ("state_id", os.urandom(8).hex()))
                db.executemany("INSERT INTO meta VALUES (?, ?)", values)
            migrate(db)
            db.execute(
                "INSERT INTO meta VALUES ('home', ?) ON CONFLICT (name) DO UPDATE SET "
                "value = excluded.value WHERE value != excluded.value",
                (self.home,),
            )
            return identity(db, self.path)["state_id"]

    def _check_owner(self, meta: Mapping[str, str]) -> None:
        """Whether the store is this hub's, and no copy of one that is still in its place."""
        known = meta["hub"]
        if known != self.hub:
            raise WrongHubError(
                f"cannot use {self.home} for hub {self.hub!r}: it belongs to hub {known!r}, whose "
                f"servers carry that name; write `hub: {known}`, or use another state directory"
            )
        twin = elsewhere(meta, self.path)
        if twin:
            raise StoreError(f"cannot use {self.home}: {twin}", "StateCopied")

    def close(self) -> None:
        with self._mutex, contextlib.suppress(sqlite3.Error):
            self._db.close()

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._mutex, explained(self.path, "write to"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                if not self._known:
                    self._db.execute(
                        "INSERT INTO meta VALUES ('writer', ?) ON CONFLICT (name) DO UPDATE SET "
                        "value = excluded.value",
                        (self._token,),
                    )
                yield self._db
                self._db.execute("COMMIT")
                self._known = True
            except BaseException:
                if self._db.in_transaction:  # on a full disk, SQLite has rolled back by itself
                    self._db.execute("ROLLBACK")
                raise

    def ledger(self) -> Ledger:
        """Everything, at one moment. What nobody has written to since is not read again."""
        with self._mutex, explained(self.path, "read"):
            return self._memory.ledger()

    def _calls_of(self, heads: Sequence[Head]) -> Sequence[Call]:
        with self._mutex, explained(self.path, "read"):
            return calls_of(self.path, self.hub, heads, self._db)

    def _kept_of(self, jobs: Sequence[str]) -> Mapping[str, Kept]:
        with self._mutex, explained(self.path, "read"):
            return kept_of(self._db, jobs)

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

    def started(self, leases: Sequence[Lease], now: Seconds, *, again: bool = False) -> None:
        """Their servers answered at `now`, for the first time or `again`.

        How often they died before that, and how long they rest if they die again, is as the leases
        say.
        """
        with effect(Effect.STARTED), self._write() as db:
            db.executemany(
                "UPDATE leases SET started = 1, restarts = restarts + ?, up = ?, deaths = ?, "
                "rest = ? WHERE hub = ? AND vm = ? AND disk = ? AND run = ? AND attempt = ?",
                [
                    (int(again), now, lease.deaths, lease.rest, self.hub, *lease.key)
                    for lease in leases
                ],
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

    def words(self, said: Mapping[str, Report], now: Seconds) -> None:
        """Note what SNAs say of jobs, for who looks and does not ask; forget it of ended ones.

        Beside the settings, in no table of its own: a handful of lines that are never looked up.
        """
        with self._write() as db:
            row = db.execute("SELECT value FROM meta WHERE name = 'words'").fetchone()
            known = msgspec.json.decode(row[0], type=dict[str, Word]) if row else {}
            known |= {job: Word(report=report, since=now) for job, report in said.items()}
            question = "SELECT state FROM calls WHERE job_id = ?"
            states = {job: db.execute(question, (job,)).fetchone() for job in known}
            left = {
                job: word
                for job, word in known.items()
                if (state := states[job]) and CallState(state[0]).active
            }
            text = msgspec.json.encode(left).decode()
            db.execute("INSERT OR REPLACE INTO meta VALUES ('words', ?)", (text,))

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

    def advance(
        self,
        call: Call,
        event: CallEvent,
        now: Seconds,
        *,
        archived: Iterable[Archived] = (),
        **changes: Any,
    ) -> Call:
        """Take one step of a call, if it still stands where `call` says; and with it note what is
        kept of the run's disks, where that is its end.

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
            db.executemany(
                "INSERT OR REPLACE INTO archived "
                "(job_id, position, size, allocated, digest, at, removed) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                [astuple(one) for one in archived],
            )
            row = db.execute(
                f"SELECT {CALL} FROM calls WHERE hub = ? AND vm = ? AND run = ? AND attempt = ?",  # noqa: S608
                (self.hub, *call.key),
            ).fetchone()
        return call_of(self.path, row)

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
                "exports, created, changed, reason, message, who, policy, tags) SELECT hub, vm, "
                "run, attempt + 1, 'DUE', ?, sna, type, '', '[]', ?, ?, 'ResolvedResend', ?, ?, "
                "policy, tags FROM calls WHERE hub = ? AND vm = ? AND run = ? AND attempt = ?",
                (following, now, now, reason, who, self.hub, *call.key),
            )

    # -- what is kept of published runs

    def removed(self, job_id: str, now: Seconds, positions: Iterable[int] = ()) -> None:
        """The images of a published run are about to be removed.

        `positions`: its disks; of a run that was published before anything was kept of them, this
        is kept.
        """
        with effect(Effect.FORGET), self._write() as db:
            db.executemany(
                "INSERT OR IGNORE INTO archived (job_id, position, size, allocated, digest, at) "
                "VALUES (?, ?, 0, 0, '', 0)",
                [(job_id, position) for position in positions],
            )
            db.execute(
                "UPDATE archived SET removed = ? WHERE job_id = ? AND removed = 0", (now, job_id)
            )

    def prove(self, proof: Proof) -> None:
        """Note what was found of a published run; in the place of what was found before."""
        with self._write() as db:
            db.execute(
                "INSERT OR REPLACE INTO proofs (job_id, kind, at, ok, result, who) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (proof.job_id, proof.kind, proof.at, int(proof.ok), proof.result, proof.who),
            )

    # -- pauses, and what the watched directory says

    def pause(self, pauses: Iterable[Pause]) -> None:
        """Pause VMs, or every one; in the place of their pauses so far."""
        with self._write() as db:
            db.executemany(
                "INSERT OR REPLACE INTO pauses (vm, reason, since, until, who) "
                "VALUES (?, ?, ?, ?, ?)",
                [(one.vm, one.reason, one.since, one.until, one.who) for one in pauses],
            )

    def resume(self, vms: Iterable[str]) -> None:
        """End pauses."""
        with self._write() as db:
            db.executemany("DELETE FROM pauses WHERE vm = ?", [(vm,) for vm in vms])

    def declare(
        self, source: Mapping[str, Any], found: Iterable[Declaration], gone: Iterable[str] = ()
    ) -> None:
        """Note what the watched directory says, in one step; of VMs in `gone` nothing any more.

        What was approved of another revision is over.
        """
        text = json.dumps(source, sort_keys=True)
        digest = str(source.get("revision", {}).get("digest", ""))
        with self._write() as db:
            db.execute("DELETE FROM meta WHERE name = 'approved' AND value != ?", (digest,))
            db.execute("INSERT OR REPLACE INTO meta VALUES ('source', ?)", (text,))
            db.executemany(
                "INSERT OR REPLACE INTO declared (vm, file, revision, at, gone) "
                "VALUES (?, ?, ?, ?, ?)",
                [(one.vm, one.file, one.revision, one.at, one.gone) for one in found],
            )
            db.executemany("DELETE FROM declared WHERE vm = ?", [(vm,) for vm in gone])

    def approve(self, digest: str) -> None:
        """A person says that what one revision of the directory takes away may go."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('approved', ?)", (digest,))

    # -- saved plans

    def use(self, plan: str, expires: Seconds, who: str, now: Seconds) -> Use | None:
        """Note that a saved plan is being applied, before it has its first effect. None: from now
        on; else who applied it before, and nothing is noted.

        Nobody can apply a plan that has expired, so of those that did long ago nothing is kept.
        """
        with self._write() as db:
            before = use_of(db, plan)
            if before is None:
                db.execute("DELETE FROM plans WHERE expires < ?", (now - EVENT_DAYS * 86400,))
                db.execute("INSERT INTO plans VALUES (?, ?, ?, ?)", (plan, now, who, expires))
            return before

    def used(self, plan: str) -> Use | None:
        """Who applied a saved plan. None: nobody."""
        with self._mutex, explained(self.path, "read"):
            return use_of(self._db, plan)

    # -- who is told

    def notices(self) -> list[Notice]:
        """The troubles that somebody was told of and that are not over."""
        with self._mutex, explained(self.path, "read"):
            return outbox.notices(self._db)

    def notify(self, found: Turn, bodies: Sequence[str], now: Seconds) -> None:
        """Take note of what began and what is over, and of what is to be said of it, in one step.

        What waits is bounded: the oldest messages are dropped, and an event says so.
        """
        with self._write() as db:
            dropped = outbox.note(db, found, bodies, now)
            if dropped:
                said = (
                    f"{dropped} of the oldest messages were dropped: more than {outbox.MOST} wait "
                    "for the receiver of `notify: {url: …}`"
                )
                self._dropped(db, said, now)

    def outbox(self, limit: int = 1) -> list[Letter]:
        """The oldest messages that wait."""
        with self._mutex, explained(self.path, "read"):
            return outbox.waiting(self._db, limit)

    def sent(self, letter: int) -> None:
        """A message has arrived."""
        with self._write() as db:
            db.execute("DELETE FROM outbox WHERE id = ?", (letter,))

    def failed(self, letter: int, error: str, again_at: Seconds) -> None:
        """A message has not arrived; it is tried again then."""
        with self._write() as db:
            db.execute(
                "UPDATE outbox SET tries = tries + 1, error = ?, next = ? WHERE id = ?",
                (error, again_at, letter),
            )

    def given_up(self, letter: int, error: str, now: Seconds) -> None:
        """A message will never arrive."""
        with self._write() as db:
            db.execute("DELETE FROM outbox WHERE id = ?", (letter,))
            self._dropped(db, f"a message was dropped: {error}", now)

    def _dropped(self, db: sqlite3.Connection, said: str, now: Seconds) -> None:
        event = Event(vm="", severity="Warning", reason="NoticesDropped", message=said)
        insert_event(db, event, "reconciler watch", now)

    # -- for people

    def record(self, events: Iterable[Event], who: str, now: Seconds) -> None:
        """Write events down; one that repeats another of its VM within an hour only counts up.

        Also if others came in between: what is tried again and again makes a few rows, not many.
        """
        with self._write() as db:
            for event in events:
                same = (event.vm, event.reason, event.message, event.disk, event.run)
                known = db.execute(
                    "SELECT max(id) FROM events WHERE vm = ? AND reason = ? AND message = ? "
                    "AND disk IS ? AND run = ? AND last > ?",
                    (*same, now - REPEATS),
                ).fetchone()[0]
                if known:
                    db.execute(
                        "UPDATE events SET count = count + 1, last = ? WHERE id = ?", (now, known)
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

    def apply_tunnels(self, tunnels: Mapping[str, Mapping[str, Any]], now: Seconds) -> None:
        """The same for tunnels: `tunnel/NAME` → what is wanted."""
        with self._write() as db:
            for name, tunnel in tunnels.items():
                db.execute(
                    "INSERT INTO tunnels VALUES (?, ?, 1, ?) ON CONFLICT (tunnel) DO UPDATE SET "
                    "desired = excluded.desired, at = excluded.at, generation = generation + 1",
                    (name, json.dumps(tunnel, sort_keys=True), now),
                )

    def dialled(self, found: Dialled) -> None:
        """Note how a connection of a tunnel stands."""
        values = to_builtins(found)
        values["refused"] = json.dumps(values["refused"])
        with self._write() as db:
            db.execute(
                "INSERT OR REPLACE INTO dialled VALUES (:tunnel, :part, :failures, :rest, :reason, "
                ":message, :up, :pid, :started, :refused, :restarts)",
                values,
            )

    def hung_up(self, tunnel: str, part: str) -> None:
        """A connection was ended by us: nothing is remembered of it."""
        with self._write() as db:
            db.execute("DELETE FROM dialled WHERE tunnel = ? AND part = ?", (tunnel, part))

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
    places = {"place": "", "run_place": ""}
    return {**one, **places} == {**two, **places}
