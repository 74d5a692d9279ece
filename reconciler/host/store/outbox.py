"""What somebody is to be told: the open notices, and the messages that wait to be sent."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Final

from msgspec import Struct

from reconciler.core.notices import Notice, Turn
from reconciler.core.units import Seconds

MOST: Final = 1_000
"""Messages that wait at most. Each has about 600 bytes; who was away for so many looks at `status`
and not through all of them."""


class Letter(Struct, frozen=True, kw_only=True):
    """A message that waits."""

    id: int
    body: str
    created: Seconds
    tries: int
    next: Seconds
    """Not tried again before."""


def notices(db: sqlite3.Connection) -> list[Notice]:
    """The open ones, in the order in which they began."""
    names = ("vm", "run", "reason", "since", "message", "gone")
    rows = db.execute(f"SELECT {', '.join(names)} FROM notices ORDER BY since, rowid")  # noqa: S608
    return [Notice(**dict(zip(names, row, strict=True))) for row in rows]


def note(db: sqlite3.Connection, found: Turn, bodies: Sequence[str], now: Seconds) -> int:
    """Take note of what began and what is over, with its messages. How many did not fit in."""
    db.executemany(
        "INSERT OR IGNORE INTO notices (vm, run, reason, since, message) VALUES (?, ?, ?, ?, ?)",
        [(*one.key, one.since, one.message) for one in found.begun],
    )
    _gone(db, [(one.gone, *one.key) for one in found.ebbed])
    _gone(db, [(0.0, *one.key) for one in found.back])
    db.executemany(
        "DELETE FROM notices WHERE vm = ? AND run = ? AND reason = ?",
        [one.key for one in found.resolved],
    )
    db.executemany(
        "INSERT INTO outbox (body, created) VALUES (?, ?)", [(body, now) for body in bodies]
    )
    dropped = db.execute(
        "DELETE FROM outbox WHERE id IN (SELECT id FROM outbox ORDER BY id DESC LIMIT -1 OFFSET ?)",
        (MOST,),
    )
    return dropped.rowcount


def _gone(db: sqlite3.Connection, values: Iterable[tuple[Seconds, str, str, str]]) -> None:
    db.executemany(
        "UPDATE notices SET gone = ? WHERE vm = ? AND run = ? AND reason = ?", list(values)
    )


def waiting(db: sqlite3.Connection, limit: int) -> list[Letter]:
    """The oldest messages."""
    names = ("id", "body", "created", "tries", "next")
    rows = db.execute(
        f"SELECT {', '.join(names)} FROM outbox ORDER BY id LIMIT ?",  # noqa: S608 names are ours
        (limit,),
    )
    return [Letter(**dict(zip(names, row, strict=True))) for row in rows]
