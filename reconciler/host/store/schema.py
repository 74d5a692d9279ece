"""The tables of the store, and how a store of any older version becomes one of this."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import Final

VERSION: Final = 6
"""Schema version, in PRAGMA user_version."""

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
"""Version 1. A store of any version is this and the steps after it; see `_MIGRATIONS`."""
_MIGRATIONS: Final = {
    2: """
ALTER TABLE calls ADD COLUMN display_name TEXT NOT NULL DEFAULT '';
ALTER TABLE calls ADD COLUMN path TEXT NOT NULL DEFAULT '';
ALTER TABLE calls ADD COLUMN vcenter TEXT NOT NULL DEFAULT '';
ALTER TABLE calls ADD COLUMN who TEXT NOT NULL DEFAULT '';
ALTER TABLE calls ADD COLUMN called REAL NOT NULL DEFAULT 0;
ALTER TABLE calls ADD COLUMN ended REAL NOT NULL DEFAULT 0;
CREATE INDEX calls_by_job ON calls (job_id);
CREATE TABLE reports (
    job_id TEXT NOT NULL, position INTEGER NOT NULL, change_id TEXT NOT NULL,
    bytes INTEGER NOT NULL, at REAL NOT NULL, PRIMARY KEY (job_id, position)) STRICT;
CREATE TABLE telemetry (
    job_id TEXT PRIMARY KEY, first REAL NOT NULL, at REAL NOT NULL, status TEXT NOT NULL,
    phase TEXT NOT NULL, bytes INTEGER NOT NULL, total INTEGER NOT NULL, speed INTEGER NOT NULL,
    percent REAL NOT NULL, error TEXT NOT NULL) STRICT;
CREATE TABLE sightings (
    job_id TEXT PRIMARY KEY, at REAL NOT NULL, allocated INTEGER NOT NULL) STRICT;
""",
    3: """
ALTER TABLE leases ADD COLUMN up REAL NOT NULL DEFAULT 0;
ALTER TABLE leases ADD COLUMN deaths INTEGER NOT NULL DEFAULT 0;
ALTER TABLE leases ADD COLUMN rest REAL NOT NULL DEFAULT 0;
CREATE TABLE pauses (
    vm TEXT PRIMARY KEY, reason TEXT NOT NULL, since REAL NOT NULL, until REAL NOT NULL,
    who TEXT NOT NULL) STRICT;
CREATE TABLE declared (
    vm TEXT PRIMARY KEY, file TEXT NOT NULL, revision TEXT NOT NULL, at REAL NOT NULL,
    gone REAL NOT NULL DEFAULT 0) STRICT;
CREATE TABLE notices (
    vm TEXT NOT NULL, run TEXT NOT NULL, reason TEXT NOT NULL, since REAL NOT NULL,
    message TEXT NOT NULL, gone REAL NOT NULL DEFAULT 0, PRIMARY KEY (vm, run, reason)) STRICT;
CREATE TABLE outbox (
    id INTEGER PRIMARY KEY, body TEXT NOT NULL, created REAL NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0, next REAL NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '') STRICT;
""",
    4: """
CREATE TABLE plans (
    id TEXT PRIMARY KEY, used REAL NOT NULL, who TEXT NOT NULL, expires REAL NOT NULL) STRICT;
""",
    5: """
ALTER TABLE calls ADD COLUMN fallback TEXT NOT NULL DEFAULT '';
ALTER TABLE calls ADD COLUMN doubt TEXT NOT NULL DEFAULT '';
ALTER TABLE calls ADD COLUMN policy TEXT NOT NULL DEFAULT '';
ALTER TABLE calls ADD COLUMN tags TEXT NOT NULL DEFAULT '{}';
CREATE INDEX calls_by_age ON calls (created);
CREATE TABLE archived (
    job_id TEXT NOT NULL, position INTEGER NOT NULL, size INTEGER NOT NULL,
    allocated INTEGER NOT NULL, digest TEXT NOT NULL, at REAL NOT NULL,
    removed REAL NOT NULL DEFAULT 0, PRIMARY KEY (job_id, position)) STRICT;
CREATE TABLE proofs (
    job_id TEXT NOT NULL, kind TEXT NOT NULL, at REAL NOT NULL, ok INTEGER NOT NULL,
    result TEXT NOT NULL, who TEXT NOT NULL, PRIMARY KEY (job_id, kind)) STRICT;
""",
    6: """
CREATE TABLE tunnels (
    tunnel TEXT PRIMARY KEY, desired TEXT NOT NULL, generation INTEGER NOT NULL, at REAL NOT NULL)
    STRICT;
CREATE TABLE dialled (
    tunnel TEXT NOT NULL, part TEXT NOT NULL, failures INTEGER NOT NULL, rest REAL NOT NULL,
    reason TEXT NOT NULL, message TEXT NOT NULL, up REAL NOT NULL, pid INTEGER NOT NULL,
    started INTEGER NOT NULL, refused TEXT NOT NULL, restarts INTEGER NOT NULL,
    PRIMARY KEY (tunnel, part)) STRICT;
""",
}
"""Version → what makes it of the one before."""


def create(db: sqlite3.Connection) -> None:
    """Make a new store, inside the transaction that is open."""
    _execute(db, _SCHEMA, 1)
    migrate(db)


def migrate(db: sqlite3.Connection) -> None:
    """Bring a store to this version, inside the transaction that is open. A newer one stays."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    for following in range(version + 1, VERSION + 1):
        _execute(db, _MIGRATIONS[following], following)


def _execute(db: sqlite3.Connection, statements: str, version: int) -> None:
    for statement in statements.split(";"):
        if statement.strip():
            db.execute(statement)
    db.execute(f"PRAGMA user_version = {version}")


@contextlib.contextmanager
def of_today(db: sqlite3.Connection, version: int) -> Iterator[sqlite3.Connection]:
    """The same store as this version has it: who only looks migrates a copy, in memory."""
    if version == VERSION:
        yield db
        return
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
        db.backup(copy)
        migrate(copy)
        yield copy
