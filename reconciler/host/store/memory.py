"""The writer's ledger, read again where it moved: a commit costs what it changed, not all there is.

What this connection changes is noted by triggers of its own, in a table that lives in memory with
it. Another connection only ever adds what SNAs' clients say (`Inbox`), which is looked for by
itself; unless the store has another writer since, which it says: then all is read anew.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from reconciler.core.ledger import DiskReport, Head, Ledger, Load, Shelf
from reconciler.host.store.files import believed
from reconciler.host.store.rows import (
    LoadKept,
    entries,
    identity,
    ledger_of,
    reports_of,
    settings_of,
    source_of,
    telemetry_of,
    whole,
    words_of,
)

_BY_VM: Final = {
    "applied": "applied",
    "declared": "declared",
    "failures": "failures",
    "conditions": "transitions",
}
"""Tables with lines for each VM → what the ledger calls them; the VM's lines are read again."""
_WHOLE: Final = ("leases", "sightings", "pauses", "tunnels", "dialled")
"""Tables as small as what is going on; they are read again as they are."""
_KEYS: Final = {
    **dict.fromkeys((*_BY_VM, "calls"), "vm"),
    **dict.fromkeys(("reports", "telemetry", "archived", "proofs"), "job_id"),
    **dict.fromkeys((*_WHOLE, "meta"), "rowid"),
}
"""Table → what tells of a line that has changed."""


class Memory:
    """What was read of the store last. For one connection, and one thread at a time."""

    def __init__(
        self,
        path: Path,
        hub: str,
        db: sqlite3.Connection,
        load: Load,
        kept: LoadKept,
        token: str,
    ) -> None:
        """`token`: what the store says of its writer as long as that is who has this."""
        self.path, self.hub, self._db, self._token = path, hub, db, token
        self._load, self._kept = load, kept
        self._ledger: Ledger | None = None
        self._others = self._report = 0
        db.execute("PRAGMA temp_store=MEMORY")
        db.execute("CREATE TEMP TABLE touched (what TEXT, line)")
        for table, key in _KEYS.items():
            line = f"NEW.{key}" if key != "rowid" else "0"
            for event in ("INSERT", "UPDATE", "DELETE"):
                if event == "DELETE":
                    line = line.replace("NEW", "OLD")
                then = f"INSERT INTO touched VALUES ('{table}', {line})"  # noqa: S608 all ours
                db.execute(
                    f"CREATE TEMP TRIGGER {table}_{event} AFTER {event} ON main.{table} "
                    f"BEGIN {then}; END"
                )

    def ledger(self) -> Ledger:
        """Everything, as it is now. Raises StoreError."""
        # Moves with every commit of another connection.
        others = self._db.execute("PRAGMA data_version").fetchone()[0]
        touched: dict[str, set[Any]] = {}
        for what, line in self._db.execute("SELECT DISTINCT what, line FROM touched"):
            touched.setdefault(what, set()).add(line)
        before, heard = self._ledger, others != self._others
        if before is None or (heard and not self._sole()):
            report = self._last_report()
            found = ledger_of(self.path, self._load, self._kept, self._db)
        elif touched or heard:
            report = self._last_report()
            with believed(self.path):
                found = self._renewed(before, touched, heard=heard)
        else:
            return before
        self._db.execute("DELETE FROM touched")
        self._ledger, self._others, self._report = found, others, report
        return found

    def _sole(self) -> bool:
        """Whether nobody else has opened the store as its writer since."""
        row = self._db.execute("SELECT value FROM meta WHERE name = 'writer'").fetchone()
        return row is not None and row[0] == self._token

    def _last_report(self) -> int:
        return int(self._db.execute("SELECT coalesce(max(rowid), 0) FROM reports").fetchone()[0])

    def _renewed(self, before: Ledger, touched: dict[str, set[Any]], *, heard: bool) -> Ledger:
        db = self._db
        moved: dict[str, Any] = {"shelf": Shelf(self._kept)}
        for table, name in _BY_VM.items():
            if table in touched:
                moved[name] = self._lines(table, getattr(before, name), touched[table])
        moved |= {table: whole(db, table) for table in _WHOLE if table in touched}
        meta = None
        if "meta" in touched:
            meta = identity(db, self.path)
            moved |= {"settings": settings_of(meta), "source": source_of(meta)}
        ledger = replace(before, **moved)
        if "calls" in touched:
            ledger = ledger.renewed(self._heads(touched["calls"]))
        if "calls" in touched or "telemetry" in touched or "reports" in touched or heard or meta:
            active = {call.job_id for call in ledger.open if call.state.active}
            known = {} if heard or "telemetry" in touched else before.telemetry
            ledger = replace(
                ledger,
                reports=self._reports(before, ledger, active, touched, heard=heard),
                telemetry={
                    job: one for job in active if (one := known.get(job) or telemetry_of(db, job))
                },
                words=words_of(meta or identity(db, self.path), active),
            )
        return ledger

    def _lines(
        self, table: str, before: Mapping[Any, Any], vms: Collection[str]
    ) -> Mapping[Any, Any]:
        """A table's lines; only those of some VMs are read. A condition is never deleted."""
        found = dict(before)
        for vm in vms:
            found.pop(vm, None)
            found.update(entries(self._db, table, vm))
        return found

    def _heads(self, vms: Collection[str]) -> Iterator[Head]:
        for vm in sorted(vms):
            yield from self._db.execute(
                "SELECT vm, run, attempt, state, changed FROM calls WHERE hub = ? AND vm = ? "
                "ORDER BY rowid",
                (self.hub, vm),
            )

    def _reports(
        self,
        before: Ledger,
        ledger: Ledger,
        active: Collection[str],
        touched: Mapping[str, Collection[str]],
        *,
        heard: bool,
    ) -> Mapping[str, Mapping[int, DiskReport]]:
        """What was reported of active calls and of each VM's newest."""
        jobs = set(touched.get("reports", ()))
        if heard:
            later = "SELECT DISTINCT job_id FROM reports WHERE rowid > ?"
            jobs |= {job for (job,) in self._db.execute(later, (self._report,))}
        for vm in touched.get("calls", ()):
            jobs |= {call.job_id for one in (before, ledger) if (call := one.newest_of(vm))}
            jobs |= {call.job_id for one in (before, ledger) if (call := one.active(vm))}
        found = dict(before.reports)
        for job in jobs:
            found.pop(job, None)
            row = self._db.execute("SELECT vm FROM calls WHERE job_id = ?", (job,)).fetchone()
            newest = ledger.newest_of(row[0]) if row else None
            told = job in active or (newest is not None and newest.job_id == job)
            if told and (reports := reports_of(self._db, job)):
                found[job] = reports
        return found
