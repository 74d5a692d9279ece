"""Pages of runs for who only asks, each one moment of the store, without the ledger as a whole."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct

from reconciler.core.call import Call, CallState
from reconciler.core.ledger import DiskReport, Lease, Telemetry
from reconciler.core.units import Bytes, Seconds
from reconciler.host.store.rows import (
    CALL,
    Event,
    call_of,
    events_where,
    leases_of,
    reports_of,
    telemetry_of,
)
from reconciler.host.store.window import Window

EVENTS: Final = 500
"""Events of one answer; who follows a run asks for the next ones."""


class Filter(Struct, frozen=True, kw_only=True):
    """Which runs are meant; None: whatever it is."""

    vm: str | None = None
    """The VM's context."""
    name: str | None = None
    """The VM's name in vCenter, or its context."""
    type: str | None = None
    states: tuple[CallState, ...] | None = None
    inside: str | None = None
    """Root of a repository that its images lie in."""
    outside: tuple[str, ...] = ()
    """Roots within that one of other repositories."""

    def sql(self) -> tuple[str, list[Any]]:
        """A condition on `calls`, and its values."""
        parts: list[tuple[str, Sequence[Any]]] = [("1", ())]
        if self.vm is not None:
            parts.append(("vm = ?", [self.vm]))
        if self.name is not None:
            parts.append(("(vm = ? OR display_name = ?)", [self.name, self.name]))
        if self.type is not None:
            parts.append(("type = ?", [self.type]))
        if self.states is not None:
            places = ", ".join("?" * len(self.states))
            parts.append((f"state IN ({places})", [str(state) for state in self.states]))
        if self.inside is not None:
            parts.append(("instr(exports, ?)", [_below(self.inside)]))
        parts += [("NOT instr(exports, ?)", [_below(root)]) for root in self.outside]
        return " AND ".join(sql for sql, _ in parts), [v for _, values in parts for v in values]


def _below(root: str) -> str:
    """How the path of an image in a repository begins in a row. Source: rows.insert_call."""
    return f'"image": {json.dumps(root.rstrip("/") + "/")[:-1]}'


class Shown(Struct, frozen=True, kw_only=True):
    """A run with what is told of it."""

    call: Call
    telemetry: Telemetry | None
    reports: Mapping[int, DiskReport]
    leases: tuple[Lease, ...]
    """The ports of this attempt."""


class Totals(Struct, frozen=True, kw_only=True):
    """What some backups come to."""

    count: int = 0
    """Completed runs of which an image is kept."""
    size: Bytes = 0
    """What their files take on their file systems, as far as it was written down."""
    last: Seconds = 0.0
    """When the newest ended; 0: there is none."""


class Listing(Window):
    """A reader of its own, so that no callback waits for it."""

    def page(self, which: Filter, limit: int, offset: int) -> tuple[list[Shown], int]:
        """Some runs, the newest first, and how many there are. Raises StoreError."""
        where, values = which.sql()
        with self.read() as db:
            if db is None:
                return [], 0
            total = db.execute(f"SELECT count(*) FROM calls WHERE {where}", values)  # noqa: S608
            rows = db.execute(
                f"SELECT {CALL} FROM calls WHERE {where} "  # noqa: S608 names are ours
                "ORDER BY created DESC, rowid DESC LIMIT ? OFFSET ?",
                (*values, limit, offset),
            )
            found = [self._shown(db, row) for row in rows.fetchall()]
            return found, total.fetchone()[0]

    def find(self, job_id: str) -> Shown | None:
        """The run of a job; None: there is none. Raises StoreError."""
        with self.read() as db:
            if db is None:
                return None
            row = db.execute(f"SELECT {CALL} FROM calls WHERE job_id = ?", (job_id,)).fetchone()  # noqa: S608
            return self._shown(db, row) if row else None

    def _shown(self, db: sqlite3.Connection, row: Sequence[Any]) -> Shown:
        call = call_of(self.path, row)
        return Shown(
            call=call,
            telemetry=telemetry_of(db, call.job_id),
            reports=reports_of(db, call.job_id),
            leases=tuple(leases_of(db, call)),
        )

    def known(self, jobs: Collection[str]) -> set[str]:
        """Those of some jobs that the ledger has. Raises StoreError."""
        with self.read() as db:
            if db is None:
                return set()
            some = "SELECT job_id FROM calls WHERE job_id IN (SELECT value FROM json_each(?))"
            return {job for (job,) in db.execute(some, (json.dumps(list(jobs)),))}

    def vms(self, name: str) -> list[str]:
        """The VM contexts that a name means: the context itself, else those of that name in
        vCenter. Raises StoreError."""
        with self.read() as db:
            if db is None:
                return []
            if db.execute("SELECT 1 FROM calls WHERE vm = ? LIMIT 1", (name,)).fetchone():
                return [name]
            rows = db.execute("SELECT DISTINCT vm FROM calls WHERE display_name = ?", (name,))
            return sorted(vm for (vm,) in rows)

    def totals(self, which: Filter) -> Totals:
        """What the backups among some runs come to. Raises StoreError."""
        where, values = which.sql()
        gone = "SELECT 1 FROM archived a WHERE a.job_id = calls.job_id AND a.removed"
        with self.read() as db:
            if db is None:
                return Totals()
            count, last = db.execute(
                f"SELECT count(*), max(max(ended, changed)) FROM calls WHERE {where} "  # noqa: S608
                f"AND state = 'COMPLETED' AND NOT EXISTS ({gone})",
                values,
            ).fetchone()
            (size,) = db.execute(
                "SELECT sum(allocated) FROM archived WHERE NOT removed AND job_id IN "  # noqa: S608
                f"(SELECT job_id FROM calls WHERE {where} AND state = 'COMPLETED')",
                values,
            ).fetchone()
            return Totals(count=count, size=size or 0, last=last or 0.0)

    def events(self, vm: str, run: str, after: int) -> list[Event]:
        """What happened to a run since an event, oldest first. Raises StoreError."""
        with self.read() as db:
            if db is None:
                return []
            where = "vm = ? AND run = ? AND id > ? ORDER BY id"
            return list(events_where(db, where, (vm, run, after), EVENTS))

    def version(self) -> object:
        """Another one when anything was written since. Raises StoreError."""
        with self.read() as db:
            if db is None:
                return None
            # Moves with every commit of another connection, and this one makes none.
            return self._file, db.execute("PRAGMA data_version").fetchone()[0]
