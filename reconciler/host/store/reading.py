"""What can be read without the lock."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from reconciler.core.call import Call
from reconciler.core.ledger import Archived, Head, Kept, Ledger, Proof
from reconciler.core.units import Seconds
from reconciler.host.store.files import NAME, StoreError, looked_up
from reconciler.host.store.rows import (
    Event,
    Use,
    archived_of,
    calls_of,
    events_where,
    identity,
    kept_of,
    ledger_of,
    proofs_of,
    use_of,
)


def read(directory: Path) -> Ledger | None:
    """The ledger, without the lock and without writing anything. None: there is no store yet.

    Raises StoreError.
    """
    path = directory / NAME

    def again(heads: Sequence[Head]) -> Sequence[Call]:
        """Calls that had ended when we looked, and so are as they were."""
        found = looked_up(path, lambda db: calls_of(path, identity(db, path)["hub"], heads, db))
        return found or ()

    def kept(jobs: Sequence[str]) -> Mapping[str, Kept]:
        return looked_up(path, lambda db: kept_of(db, jobs)) or {}

    return looked_up(path, partial(ledger_of, path, again, kept))


def state_id_of(directory: Path) -> str | None:
    """Which state directory this is, without the lock. None: there is no store in it.

    Raises StoreError if that cannot be read.
    """
    path = directory / NAME
    return looked_up(path, lambda db: identity(db, path)["state_id"])


def use_of_plan(directory: Path, plan: str) -> Use | None:
    """Who applied a saved plan, without the lock. None: nobody. Raises StoreError."""
    return looked_up(directory / NAME, lambda db: use_of(db, plan))


def archived(directory: Path, job_id: str) -> Mapping[int, Archived]:
    """What is kept of a published job's disks, by position, without the lock. Raises StoreError."""
    return looked_up(directory / NAME, lambda db: archived_of(db, job_id)) or {}


def proofs(directory: Path, job_id: str) -> Mapping[str, Proof]:
    """What was proved of a job's images last, by kind, without the lock. Raises StoreError."""
    return looked_up(directory / NAME, lambda db: proofs_of(db, job_id)) or {}


def steps(directory: Path, vms: Collection[str]) -> list[tuple[object, ...]]:
    """Another value when a run of some VMs has taken a step, without the lock. Raises StoreError.

    It costs a millisecond, however many runs there are of other VMs.
    """
    where, names = _of(vms)
    line = f"SELECT vm, run, attempt, state, changed FROM calls WHERE 1 {where} ORDER BY rowid"  # noqa: S608
    return looked_up(directory / NAME, lambda db: db.execute(line, names).fetchall()) or []


def home_of(path: Path) -> str:
    """Where a store is, whatever way leads there; text that a table can hold."""
    return os.fsencode(os.path.realpath(path.parent)).decode(errors="backslashreplace")


def elsewhere(meta: Mapping[str, str], path: Path) -> str:
    """Why a store at `path` may not be written: it is a copy of one that is still in its place.

    Two directories of one state id are two writers that know nothing of each other. Empty: it may.
    """
    home = meta.get("home", "")
    original = Path(home) / NAME
    if not home or home == home_of(path):
        return ""
    with contextlib.suppress(OSError):
        if os.path.samefile(original, path):
            return ""  # the same directory, seen from somewhere else
    use = (
        f"use that one (`state: {home}` in the config, or RECONCILER_STATE={home}), or remove "
        "that one if it is given up"
    )
    try:
        there = state_id_of(Path(home))
    except StoreError as error:
        return f"it is a copy of {home}, and whether that is still there is not known: {error}"
    if there == meta["state_id"]:
        return f"it is a copy of {home}, which is still there with the same state id; {use}"
    return ""


def events(directory: Path, vm: str, limit: int = 20) -> list[Event]:
    """The newest events of a VM, newest first. Raises StoreError."""
    return newest_events(directory, [vm], limit=limit)[::-1]


def newest_events(
    directory: Path, vms: Collection[str] = (), *, limit: int, since: Seconds = 0.0
) -> list[Event]:
    """The newest events of some VMs, or of all, by when they came last. Raises StoreError."""
    where, names = _of(vms)
    found = _events(directory, f"last >= ? {where}", (since, *names), limit)
    return found[::-1]


def later_events(
    directory: Path, vms: Collection[str] = (), *, number: int, since: Seconds
) -> list[Event]:
    """The events that are newer than a number, or came again since a moment. Raises StoreError."""
    where, names = _of(vms)
    found = _events(directory, f"(id > ? OR last >= ?) {where}", (number, since, *names), -1)
    return found[::-1]


def _of(vms: Collection[str]) -> tuple[str, tuple[str, ...]]:
    places = ", ".join("?" * len(vms))
    return (f"AND vm IN ({places})" if vms else ""), tuple(vms)


def _events(directory: Path, where: str, values: Sequence[object], limit: int) -> list[Event]:
    """Newest first; all of them, if the limit is below 0."""
    ordered = f"{where} ORDER BY last DESC, id DESC"
    found = looked_up(directory / NAME, lambda db: list(events_where(db, ordered, values, limit)))
    return found or []
