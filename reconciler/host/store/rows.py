"""Rows of the store ↔ values."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Final

from msgspec import Struct

from reconciler.core.call import Call, CallState
from reconciler.core.desired import Export
from reconciler.core.ledger import Applied, DiskReport, Lease, Ledger, Sighting, Telemetry
from reconciler.core.units import Seconds


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


def insert_event(db: sqlite3.Connection, event: Event, who: str, now: Seconds) -> None:
    """A new row, for something that happens the first time."""
    db.execute(
        "INSERT INTO events (first, last, vm, disk, run, severity, reason, message, who) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (now, now, event.vm, event.disk, event.run, event.severity, event.reason, event.message,
         who),
    )  # fmt: skip


CALL: Final = (
    "hub, vm, run, attempt, state, job_id, sna, type, request, exports, targets, created, changed, "
    "reason, message, failures, retry_at, tainted, display_name, path, vcenter, who, called, ended"
)


def insert_call(db: sqlite3.Connection, call: Call, *, replace_due: bool) -> None:
    exports = json.dumps([export.to_json() for export in call.exports])
    conflict = "DO NOTHING"
    if replace_due:
        # Before the intent, a run is what the spec says last.
        conflict = (
            "(hub, vm, run, attempt) DO UPDATE SET sna = excluded.sna, type = excluded.type, "
            "request = excluded.request, exports = excluded.exports, job_id = excluded.job_id, "
            "display_name = excluded.display_name, path = excluded.path, "
            "vcenter = excluded.vcenter, who = excluded.who "
            "WHERE state IN ('DUE', 'REJECTED')"
        )
    db.execute(
        f"INSERT INTO calls ({CALL}) VALUES ({', '.join('?' * len(CALL.split(', ')))}) "  # noqa: S608
        f"ON CONFLICT {conflict}",
        (
            *(call.hub, call.vm, call.run, call.attempt, str(call.state), call.job_id, call.sna),
            *(call.type, call.request, exports, call.targets, call.created, call.changed),
            *(call.reason, call.message, call.failures, call.retry_at, int(call.tainted)),
            *(call.display_name, call.path, call.vcenter, call.who, call.called, call.ended),
        ),
    )


def call_of(row: Sequence[Any]) -> Call:
    values = dict(zip(CALL.split(", "), row, strict=True))
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


def reports_of(db: sqlite3.Connection, job_id: str) -> Mapping[int, DiskReport]:
    """What was reported of a job's disks, by position."""
    rows = db.execute(
        "SELECT job_id, position, change_id, bytes, at FROM reports WHERE job_id = ?", (job_id,)
    )
    names = DiskReport.__struct_fields__
    found = [DiskReport(**dict(zip(names, row, strict=True))) for row in rows]
    return {one.position: one for one in found}


def _telemetry(db: sqlite3.Connection, job_id: str) -> Telemetry | None:
    names = Telemetry.__struct_fields__
    row = db.execute(
        f"SELECT {', '.join(names)} FROM telemetry WHERE job_id = ?",  # noqa: S608 names are ours
        (job_id,),
    ).fetchone()
    return Telemetry(**dict(zip(names, row, strict=True))) if row else None


def ledger_of(db: sqlite3.Connection) -> Ledger:
    meta: dict[str, str] = dict(db.execute("SELECT name, value FROM meta").fetchall())
    leases = db.execute(
        "SELECT hub, vm, disk, run, attempt, port, since, started, clients_seen, restarts, safe "
        "FROM leases"
    )
    calls = tuple(call_of(row) for row in db.execute(f"SELECT {CALL} FROM calls"))  # noqa: S608
    open_jobs = [call.job_id for call in calls if call.state.active]
    newest = {call.vm: call.job_id for call in sorted(calls, key=lambda call: call.created)}
    told = dict.fromkeys((*open_jobs, *newest.values()))
    return Ledger(
        hub=meta["hub"],
        state_id=meta["state_id"],
        leases=tuple(map(_lease, leases)),
        calls=calls,
        reports={job: found for job in told if (found := reports_of(db, job))},
        telemetry={one.job_id: one for job in open_jobs if (one := _telemetry(db, job))},
        sightings={
            job: Sighting(at, allocated)
            for job, at, allocated in db.execute("SELECT job_id, at, allocated FROM sightings")
        },
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
