"""What the appliances' clients say, written down without the lock.

A callback must not wait for a long apply, so each word is a short transaction of its own, which
SQLite puts in order with those of the writer. A word is a fact; what follows from it for a call is
the planner's to decide, under the lock. So no call, lease or applied state is ever changed here,
nothing is created, and no store is migrated.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from enum import Enum, auto
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from reconciler.core.call import Call, CallState
from reconciler.core.desired import Export
from reconciler.core.ledger import Telemetry
from reconciler.core.units import Bytes, Seconds
from reconciler.host.effects import Effect, effect
from reconciler.host.store.rows import CALL, Event, call_of, insert_event, reports_of
from reconciler.host.store.window import OtherVersionError as OtherVersionError
from reconciler.host.store.window import Window

WHO: Final = "the appliance's client"
"""Who the events of this module are from."""
MOST_TEXT: Final = 500
"""Characters that are kept of a text that is only shown."""
MOST_NUMBER: Final = (1 << 63) - 1
"""What a column can hold."""
_ACTIVE: Final = tuple(str(state) for state in CallState if state.active)


class Word(Enum):
    """What became of something that was said."""

    NOTED = auto()
    """The first of its kind: worth a look at the VM."""
    REPEATED = auto()
    """Said before, or one more of many: nobody needs to look."""
    LATE = auto()
    """Its run has ended: an event, and nothing else."""
    UNASKED = auto()
    """Nobody asked for its run yet: an event, and nothing else."""
    UNKNOWN_JOB = auto()
    UNKNOWN_DISK = auto()


class Receipt(Struct, frozen=True, kw_only=True):
    """What became of a word, and the sentence that says so."""

    word: Word
    message: str
    vm: str = ""
    run: str = ""
    state: CallState = CallState.DUE
    """Where the call stands."""
    change_id: str = ""
    """The one that counts for this disk."""


class Question(Enum):
    """Whether a question could be answered."""

    ANSWERED = auto()
    UNKNOWN_VM = auto()
    UNKNOWN_DISK = auto()
    AMBIGUOUS = auto()


class Answer(Struct, frozen=True, kw_only=True):
    """The change id that an incremental goes on from; empty: there is none."""

    question: Question
    message: str
    change_id: str = ""
    job_id: str = ""
    """Of the run that the change id is of."""


class Identity(Struct, frozen=True):
    """Whose store this is."""

    hub: str
    state_id: str


class Inbox(Window):
    """The callbacks' view of a store, which need not exist yet. Safe to share between threads."""

    def identity(self) -> Identity | None:
        """Whose store it is; None: there is none yet. Raises StoreError."""
        with self.read() as db:
            if db is None:
                return None
            meta = dict(db.execute("SELECT name, value FROM meta").fetchall())
            return Identity(meta["hub"], meta["state_id"])

    # -- one disk has arrived

    def report(
        self, job_id: str, position: int | None, change_id: str, size: float, now: Seconds
    ) -> Receipt:
        """Note that a disk has arrived. `position` may be left out where there is one disk.

        Raises StoreError, ValueError (a change id that cannot be one).
        """
        change_id = change_id.strip()
        if not change_id or change_id != clean(change_id):
            raise ValueError(
                f"change_id must be 1 to {MOST_TEXT} printable characters, found "
                f"{clean(change_id)[:40]!r}: without one there is nothing to go on from"
            )
        with self.write() as db:
            call = _call(self.path, db, job_id)
            if db is None or call is None:
                return _unknown_job(job_id)
            export = _disk(call, position)
            if export is None:
                return _receipt(call, Word.UNKNOWN_DISK, _no_disk(call, position))
            what = f"disk {export.key} of run {call.run} of {call.vm}"
            known = reports_of(db, job_id).get(export.position)
            if known and known.change_id == change_id:
                said = f"{what} was reported before: nothing has changed"
                return _receipt(call, Word.REPEATED, said, change_id)
            if event := _out_of_time(call, export):
                return _told(db, call, event, now)
            if known:
                said = (
                    f"{what} was reported with the change id {known.change_id}, and now with "
                    f"{change_id}: the first counts"
                )
                _tell(db, _event(call, "ReportContradicts", said, export.key, "Warning"), now)
                return _receipt(call, Word.REPEATED, said, known.change_id)
            with effect(Effect.REPORT):
                db.execute(
                    "INSERT INTO reports (job_id, position, change_id, bytes, at) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (job_id, export.position, change_id, count(size), now),
                )
                db.execute("COMMIT")
            return _receipt(call, Word.NOTED, f"{what} is noted as complete", change_id)

    # -- how far a job is

    def telemetry(
        self,
        job_id: str,
        now: Seconds,
        *,
        status: str = "",
        phase: str = "",
        size: float = 0,
        total: float = 0,
        speed: float = 0,
        percent: float = 0.0,
        error: str = "",
    ) -> Receipt:
        """Note the last word about a job, within what it can mean. It moves no state, whatever
        its status says. Raises StoreError."""
        # The last word is replaced in a moment, so it does not wait for the disk.
        with self.write(durable=False) as db:
            call = _call(self.path, db, job_id)
            if db is None or call is None:
                return _unknown_job(job_id)
            if event := _out_of_time(call):
                return _told(db, call, event, now)
            if error := clean(error):
                said = f"the client of SNA {call.sna} reports: {error}"
                _tell(db, _event(call, "ApplianceReportsError", said, None, "Warning"), now)
            words = Telemetry(
                job_id=job_id,
                first=now,
                at=now,
                status=clean(status),
                phase=clean(phase),
                bytes=count(size),
                total=count(total),
                speed=count(speed),
                percent=float(min(100, max(0, percent))),
                error=error,
            )
            names = Telemetry.__struct_fields__
            kept = ("job_id", "first")
            known = db.execute("SELECT 1 FROM telemetry WHERE job_id = ?", (job_id,)).fetchone()
            db.execute(
                f"INSERT INTO telemetry ({', '.join(names)}) "  # noqa: S608 names are ours
                f"VALUES ({', '.join('?' * len(names))}) ON CONFLICT (job_id) DO UPDATE SET "
                + ", ".join(f"{name} = excluded.{name}" for name in names if name not in kept),
                [getattr(words, name) for name in names],
            )
            said = f"the progress of run {call.run} of {call.vm} is noted"
            return _receipt(call, Word.REPEATED if known else Word.NOTED, said)

    # -- what an incremental goes on from

    def change_id(self, vm_name: str, position: int) -> Answer:
        """The change id that the active run of a VM goes on from. Raises StoreError.

        `vm_name` is the VM's name in vCenter or its context. The active run is meant from its
        intent on: a client may ask before the answer to the call is here.
        """
        with self.read() as db:
            if db is None:
                return _unknown_vm(vm_name)
            calls = [
                one for one in _active(self.path, db) if vm_name in (one.vm, _display_name(db, one))
            ]
            if not calls:
                if not _known(db, vm_name):
                    return _unknown_vm(vm_name)
                said = f"no run of {vm_name} is active, so there is nothing to go on from"
                return Answer(question=Question.ANSWERED, message=said)
            if len(calls) > 1:
                both = " and ".join(f"{one.vm} (run {one.run})" for one in calls)
                said = f"{vm_name!r} may be {both}; ask by the VM context"
                return Answer(question=Question.AMBIGUOUS, message=said)
            return _parent(self.path, db, calls[0], position)


def clean(text: str) -> str:
    """A text as it can be shown: no control characters, not endless, one that can be stored."""
    short = text[: 2 * MOST_TEXT].encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else " " for c in short).strip()[:MOST_TEXT]


def count(number: float) -> Bytes:
    """A number of things: whole, not negative, and no more than can be stored. NaN is none."""
    return int(min(MOST_NUMBER, max(0, number)))


def _call(path: Path, db: sqlite3.Connection | None, job_id: str) -> Call | None:
    if db is None:
        return None
    row = db.execute(f"SELECT {CALL} FROM calls WHERE job_id = ?", (job_id,)).fetchone()  # noqa: S608
    return call_of(path, row) if row else None


def _disk(call: Call, position: int | None) -> Export | None:
    """The export that a client means by a position."""
    if position is None:
        return call.exports[0] if len(call.exports) == 1 else None
    return next((export for export in call.exports if export.position == position), None)


def _event(
    call: Call, reason: str, message: str, disk: int | None = None, severity: str = "Normal"
) -> Event:
    return Event(
        vm=call.vm, run=call.run, disk=disk, severity=severity, reason=reason, message=message
    )


def _out_of_time(call: Call, export: Export | None = None) -> Event | None:
    """The event, if something is said of a run that is not under way."""
    if call.state.active:
        return None
    what = f"disk {export.key} of it was reported complete" if export else "its client reported"
    disk = export.key if export else None
    if call.state.terminal:
        said = f"{what} after run {call.run} had ended as {call.state}: nothing follows from it"
        bad = call.state is not CallState.COMPLETED
        return _event(call, "LateReport", said, disk, "Warning" if bad else "Normal")
    said = (
        f"{what}, but run {call.run} is {call.state}: as far as this hub knows, nobody asked for "
        "it; see the appliance's log"
    )
    return _event(call, "ReportUnasked", said, disk, "Warning")


def _tell(db: sqlite3.Connection, event: Event, now: Seconds) -> None:
    """An event; one that was told of this run before only counts up."""
    known = db.execute(
        "SELECT id FROM events WHERE vm = ? AND run = ? AND reason = ? AND message = ? "
        "AND disk IS ? ORDER BY id DESC LIMIT 1",
        (event.vm, event.run, event.reason, event.message, event.disk),
    ).fetchone()
    if known:
        db.execute("UPDATE events SET count = count + 1, last = ? WHERE id = ?", (now, known[0]))
    else:
        insert_event(db, event, WHO, now)


def _told(db: sqlite3.Connection, call: Call, event: Event, now: Seconds) -> Receipt:
    """What was said is an event, and nothing else."""
    _tell(db, event, now)
    return _receipt(call, Word.LATE if call.state.terminal else Word.UNASKED, event.message)


def _receipt(call: Call, word: Word, message: str, change_id: str = "") -> Receipt:
    return Receipt(
        word=word,
        message=message,
        vm=call.vm,
        run=call.run,
        state=call.state,
        change_id=change_id,
    )


def _unknown_job(job_id: str) -> Receipt:
    said = f"this hub knows no job {clean(job_id)[:80]!r}"
    return Receipt(word=Word.UNKNOWN_JOB, message=said)


def _no_disk(call: Call, position: int | None) -> str:
    known = _positions(call.exports)
    if position is None:
        return f"say which disk of run {call.run} of {call.vm} is meant, as disk_id: {known}"
    return f"run {call.run} of {call.vm} has no disk at position {position}; it has {known}"


def _positions(exports: Iterable[Export]) -> str:
    return ", ".join(str(export.position) for export in exports) or "none that is known"


# -- of change ids


def _unknown_vm(vm_name: str) -> Answer:
    said = f"this hub knows no VM {clean(vm_name)[:80]!r}"
    return Answer(question=Question.UNKNOWN_VM, message=said)


def _active(path: Path, db: sqlite3.Connection) -> list[Call]:
    rows = db.execute(
        f"SELECT {CALL} FROM calls WHERE state IN ({', '.join('?' * len(_ACTIVE))}) "  # noqa: S608
        "ORDER BY vm, run, attempt",
        _ACTIVE,
    )
    return [call_of(path, row) for row in rows]


def _display_name(db: sqlite3.Connection, call: Call) -> str:
    """A call that only a claim told of, or an older version wrote, does not have it itself."""
    if call.display_name:
        return call.display_name
    row = db.execute("SELECT desired FROM applied WHERE vm = ?", (call.vm,)).fetchone()
    return _declared_name(row[0]) if row else ""


def _declared_name(desired: str) -> str:
    value: Any = json.loads(desired)
    return str(value.get("display_name") or "")


def _known(db: sqlite3.Connection, vm_name: str) -> bool:
    """Whether a VM was ever applied or backed up here, under one of its names."""
    by_call = db.execute(
        "SELECT 1 FROM calls WHERE vm = ? OR display_name = ? LIMIT 1", (vm_name, vm_name)
    ).fetchone()
    applied = db.execute("SELECT vm, desired FROM applied")
    return bool(vm_name) and bool(
        by_call or any(vm_name in (vm, _declared_name(desired)) for vm, desired in applied)
    )


def _parent(path: Path, db: sqlite3.Connection, call: Call, position: int) -> Answer:
    """What was reported of the disk that this run's disk is an overlay on."""
    if call.type == "full":
        said = f"run {call.run} of {call.vm} is full: it goes on from nothing"
        return Answer(question=Question.ANSWERED, message=said)
    export = _disk(call, position)
    if export is None:
        return Answer(question=Question.UNKNOWN_DISK, message=_no_disk(call, position))
    nothing = f"run {call.run} of {call.vm} has no change id for disk {export.key}:"
    rows = db.execute(
        f"SELECT {CALL} FROM calls WHERE state = ? AND instr(exports, ?) "  # noqa: S608
        "ORDER BY changed DESC",
        (str(CallState.COMPLETED), json.dumps(export.backing)),
    )
    parents = (one for one in (call_of(path, row) for row in rows) if _same_vm(one, call))
    for parent, was in ((one, was) for one in parents for was in one.exports):
        if (was.image, was.key) != (export.backing, export.key):
            continue
        report = reports_of(db, parent.job_id).get(was.position)
        if report is None:
            said = f"{nothing} none was reported of its parent, run {parent.run}"
            return Answer(question=Question.ANSWERED, message=said)
        return Answer(
            question=Question.ANSWERED,
            message=f"run {call.run} of {call.vm} goes on from run {parent.run}",
            change_id=report.change_id,
            job_id=parent.job_id,
        )
    said = f"{nothing} its parent {export.backing} is of no completed run of this VM"
    return Answer(question=Question.ANSWERED, message=said)


def _same_vm(one: Call, other: Call) -> bool:
    """A change id means nothing to another VM, whose disk has the same key as often as not."""
    same_path = (one.vcenter, one.path) == (other.vcenter, other.path)
    return one.vm == other.vm or (bool(one.path) and same_path)
