"""What can be read without the lock."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from reconciler.core.ledger import Ledger
from reconciler.host.store.files import looked_up
from reconciler.host.store.rows import Event, ledger_of


def read(directory: Path) -> Ledger | None:
    """The ledger, without the lock and without writing anything. None: there is no store yet.

    Raises StoreError.
    """
    return looked_up(directory, ledger_of)


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

    return looked_up(directory, query) or []
