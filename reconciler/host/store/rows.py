"""Rows of the store ↔ values."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.call import Call, CallState
from reconciler.core.desired import Export
from reconciler.core.ledger import (
    Applied,
    Archived,
    Calls,
    Declaration,
    DiskReport,
    Head,
    Kept,
    Lease,
    Ledger,
    Load,
    Pause,
    Proof,
    Shelf,
    Sighting,
    Telemetry,
    Word,
    head_of,
)
from reconciler.core.tunnel_seen import Dialled
from reconciler.core.units import Seconds
from reconciler.host.store.files import StoreError, believed, damaged


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
    number: int = 0
    """Which one of its store; 0: it is not written down yet."""
    who: str = ""


_EVENT: Final = ", ".join("id" if name == "number" else name for name in Event.__struct_fields__)


def events_where(
    db: sqlite3.Connection, where: str, values: Sequence[object], limit: int
) -> Iterator[Event]:
    """The events that a condition is true of, in the order that it names; all of them, if the
    limit is below 0."""
    rows = db.execute(f"SELECT {_EVENT} FROM events WHERE {where} LIMIT ?", (*values, limit))  # noqa: S608
    for row in rows:
        yield Event(**dict(zip(Event.__struct_fields__, row, strict=True)))


def insert_event(db: sqlite3.Connection, event: Event, who: str, now: Seconds) -> None:
    """A new row, for something that happens the first time."""
    db.execute(
        "INSERT INTO events (first, last, vm, disk, run, severity, reason, message, who) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (now, now, event.vm, event.disk, event.run, event.severity, event.reason, event.message,
         who),
    )  # fmt: skip


COLUMNS: Final = Call.__struct_fields__
CALL: Final = ", ".join(COLUMNS)
"""What is selected for `call_of`."""
S = TypeVar("S", bound=Struct)
LoadKept: TypeAlias = Callable[[Sequence[str]], Mapping[str, Kept]]
"""Gets what is known of some published runs besides their calls, by job id."""
_EXPORTS: Final = msgspec.json.Decoder(tuple[Export, ...])


def insert_call(db: sqlite3.Connection, call: Call, *, replace_due: bool) -> None:
    values = {name: getattr(call, name) for name in COLUMNS}
    values["state"] = str(call.state)
    values["exports"] = json.dumps([export.to_json() for export in call.exports])
    values["tainted"] = int(call.tainted)
    conflict = "DO NOTHING"
    if replace_due:
        # Before the intent, a run is what the spec says last.
        conflict = (
            "(hub, vm, run, attempt) DO UPDATE SET sna = excluded.sna, type = excluded.type, "
            "request = excluded.request, exports = excluded.exports, job_id = excluded.job_id, "
            "display_name = excluded.display_name, path = excluded.path, "
            "vcenter = excluded.vcenter, who = excluded.who, fallback = excluded.fallback, "
            "policy = excluded.policy, tags = excluded.tags "
            "WHERE state IN ('DUE', 'REJECTED')"
        )
    places = ", ".join("?" * len(COLUMNS))
    db.execute(
        f"INSERT INTO calls ({CALL}) VALUES ({places}) ON CONFLICT {conflict}",  # noqa: S608
        tuple(values.values()),
    )


def call_of(path: Path, row: Sequence[Any]) -> Call:
    """Raises StoreError if it is nothing that was ever written."""
    values = dict(zip(COLUMNS, row, strict=True))
    with believed(path):
        values["state"] = CallState(values["state"])
        values["exports"] = _EXPORTS.decode(values["exports"])
        values["tainted"] = bool(values["tainted"])
        return Call(**values)


def calls_of(path: Path, hub: str, heads: Sequence[Head], db: sqlite3.Connection) -> Sequence[Call]:
    """The calls of some heads, in their order. Raises StoreError if one is not there."""
    where = f"SELECT {CALL} FROM calls WHERE hub = ? AND vm = ? AND run = ? AND attempt = ?"  # noqa: S608
    found = []
    for head in heads:
        row = db.execute(where, (hub, *head[:3])).fetchone()
        call = call_of(path, row) if row else None
        if call is None or head_of(call) != head:
            raise StoreError(
                f"cannot read the store {path}: run {head[1]} of {head[0]} is not as it was when "
                "we looked, so another store was put in its place; do this again",
                "Store",
            )
        found.append(call)
    return found


_LEASE: Final = (
    "hub, vm, disk, run, attempt, port, since, started, clients_seen, restarts, safe, up, deaths, "
    "rest"
)


def leases_of(db: sqlite3.Connection, call: Call) -> Iterator[Lease]:
    """The ports of one attempt of a run."""
    where = "hub = ? AND vm = ? AND run = ? AND attempt = ?"
    found = db.execute(f"SELECT {_LEASE} FROM leases WHERE {where}", (call.hub, *call.key))  # noqa: S608
    return map(_lease, found)


def _lease(row: Sequence[Any]) -> Lease:
    hub, vm, disk, run, attempt, port, since, started, clients_seen, restarts, safe, *last = row
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
        up=last[0],
        deaths=last[1],
        rest=last[2],
    )


def reports_of(db: sqlite3.Connection, job_id: str) -> Mapping[int, DiskReport]:
    """What was reported of a job's disks, by position."""
    found = _where(db, DiskReport, "reports", "job_id = ?", job_id)
    return {one.position: one for one in found}


def archived_of(db: sqlite3.Connection, job_id: str) -> Mapping[int, Archived]:
    """What is kept of a job's disks, by position; empty: it was not published, or long ago."""
    found = _where(db, Archived, "archived", "job_id = ? ORDER BY position", job_id)
    return {one.position: one for one in found}


def proofs_of(db: sqlite3.Connection, job_id: str) -> Mapping[str, Proof]:
    """What was proved of a job's images last, by kind."""
    found = _where(db, Proof, "proofs", "job_id = ?", job_id)
    return {one.kind: replace(one, ok=bool(one.ok)) for one in found}


def kept_of(db: sqlite3.Connection, jobs: Sequence[str]) -> Mapping[str, Kept]:
    """What is known of some published runs besides their calls, by job id."""
    return {
        job: Kept(
            archived=archived_of(db, job),
            reports=reports_of(db, job),
            heard=telemetry_of(db, job),
            proofs=proofs_of(db, job),
        )
        for job in jobs
    }


def telemetry_of(db: sqlite3.Connection, job_id: str) -> Telemetry | None:
    """The last word about a job."""
    return next(_where(db, Telemetry, "telemetry", "job_id = ?", job_id), None)


def _all(db: sqlite3.Connection, kind: type[S], table: str) -> Iterator[S]:
    """The rows of a table whose columns are the fields of `kind`."""
    return _where(db, kind, table, "1")


def _where(
    db: sqlite3.Connection, kind: type[S], table: str, condition: str, *values: object
) -> Iterator[S]:
    """The same, of the rows that a condition is true of."""
    names = kind.__struct_fields__
    line = f"SELECT {', '.join(names)} FROM {table} WHERE {condition}"  # noqa: S608 names are ours
    for row in db.execute(line, values):
        yield kind(**dict(zip(names, row, strict=True)))


def settings_of(meta: Mapping[str, str]) -> Mapping[str, Any]:
    """The settings that were applied last."""
    found: dict[str, Any] = json.loads(meta.get("settings", "{}"))
    return found


def source_of(meta: Mapping[str, str]) -> Mapping[str, Any]:
    """What was read of the watched directory, and which revision of it is approved, if one is."""
    found: dict[str, Any] = json.loads(meta.get("source", "{}"))
    return {**found, "approved": meta["approved"]} if "approved" in meta else found


def identity(db: sqlite3.Connection, path: Path) -> Mapping[str, str]:
    """What is said of the store as a whole; `hub` and `state_id` at least. Raises StoreError."""
    meta: dict[str, str] = dict(db.execute("SELECT name, value FROM meta").fetchall())
    missing = {"hub", "state_id"} - meta.keys()
    if missing:
        raise damaged(path, "read", f"it does not say its {' and '.join(sorted(missing))}")
    return meta


def words_of(meta: Mapping[str, str], jobs: Collection[str]) -> Mapping[str, Word]:
    """What the SNAs said last of some jobs."""
    known = msgspec.json.decode(meta.get("words", "{}"), type=dict[str, Word])
    return {job: word for job, word in known.items() if job in jobs}


_DIALLED: Final = ", ".join(Dialled.__struct_fields__)


def _dialled(row: Sequence[Any]) -> Dialled:
    values = dict(zip(Dialled.__struct_fields__, row, strict=True))
    return Dialled(**{**values, "refused": tuple(json.loads(values["refused"]))})


def ledger_of(path: Path, load: Load, kept: LoadKept, db: sqlite3.Connection) -> Ledger:
    """Everything, as it is at one moment; most calls that have ended are got by `load` if needed,
    and what else is known of those by `kept`.

    Raises StoreError.
    """
    meta = identity(db, path)
    heads = db.execute("SELECT vm, run, attempt, state, changed FROM calls ORDER BY rowid")
    calls = Calls(heads.fetchall(), load)
    calls.warm(lambda some: calls_of(path, meta["hub"], some, db))
    open_jobs = [call.job_id for call in calls.open if call.state.active]
    told = dict.fromkeys((*open_jobs, *(call.job_id for call in calls.newest)))
    with believed(path):
        return Ledger(
            hub=meta["hub"],
            state_id=meta["state_id"],
            leases=whole(db, "leases"),
            calls=calls,
            reports={job: found for job in told if (found := reports_of(db, job))},
            telemetry={one.job_id: one for job in open_jobs if (one := telemetry_of(db, job))},
            words=words_of(meta, open_jobs),
            sightings=whole(db, "sightings"),
            applied=dict(entries(db, "applied")),
            tunnels=whole(db, "tunnels"),
            dialled=whole(db, "dialled"),
            settings=settings_of(meta),
            pauses=whole(db, "pauses"),
            declared=dict(entries(db, "declared")),
            source=source_of(meta),
            shelf=Shelf(kept),
            failures=dict(entries(db, "failures")),
            transitions=dict(entries(db, "conditions")),
        )


def whole(db: sqlite3.Connection, table: str) -> Any:
    """A table that is small, as the ledger has it."""
    match table:
        case "leases":
            return tuple(map(_lease, db.execute(f"SELECT {_LEASE} FROM leases")))  # noqa: S608
        case "sightings":
            rows = db.execute("SELECT job_id, at, allocated FROM sightings")
            return {job: Sighting(at, allocated) for job, at, allocated in rows}
        case "tunnels":
            return {
                tunnel: Applied(vm=json.loads(desired), generation=generation, at=at)
                for tunnel, desired, generation, at in db.execute("SELECT * FROM tunnels")
            }
        case "dialled":
            lines = map(_dialled, db.execute(f"SELECT {_DIALLED} FROM dialled"))  # noqa: S608
            return {(one.tunnel, one.part): one for one in lines}
        case "pauses":
            return {one.vm: one for one in _all(db, Pause, "pauses")}
        case _:
            raise AssertionError(table)


_COLUMNS: Final = {
    "applied": "vm, desired, generation, at",
    "declared": ", ".join(Declaration.__struct_fields__),
    "failures": "vm, reason, message",
    "conditions": "vm, type, status, reason, since",
}


def entries(db: sqlite3.Connection, table: str, vm: str | None = None) -> Iterator[tuple[Any, Any]]:
    """Key and value of a table with a line or more for each VM, as the ledger has them; of one VM
    alone, where that is named."""
    where, values = ("WHERE vm = ?", (vm,)) if vm is not None else ("", ())
    for row in db.execute(f"SELECT {_COLUMNS[table]} FROM {table} {where}", values):  # noqa: S608
        match table:
            case "applied":
                yield row[0], Applied(vm=json.loads(row[1]), generation=row[2], at=row[3])
            case "declared":
                yield (
                    row[0],
                    Declaration(**dict(zip(Declaration.__struct_fields__, row, strict=True))),
                )
            case "failures":
                yield row[0], row[1:]
            case _:
                yield row[:2], row[2:]


class Use(Struct, frozen=True):
    """The one use of a saved plan."""

    at: Seconds
    who: str


def use_of(db: sqlite3.Connection, plan: str) -> Use | None:
    """Who applied a saved plan. None: nobody."""
    row = db.execute("SELECT used, who FROM plans WHERE id = ?", (plan,)).fetchone()
    return Use(*row) if row else None
