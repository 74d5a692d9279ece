"""The ledger on disk: one step at a time, one owner per port, and readers that write nothing."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler.core.call import Call, CallEvent, CallState, ImpossibleStepError, job_id
from reconciler.core.desired import Export
from reconciler.core.ledger import Lease
from reconciler.host.store import (
    Event,
    Store,
    StoreError,
    StoreLockedError,
    WrongHubError,
    events,
    read,
)


def lease(vm: str = "ctx-1", disk: int = 2000, port: int = 10100, attempt: int = 1) -> Lease:
    return Lease(hub="h", vm=vm, disk=disk, run="r1", attempt=attempt, port=port, since=1.0)


def call(vm: str = "ctx-1", run: str = "r1") -> Call:
    export = Export(vm=vm, key=2000, position=0, run=run, attempt=1, name=f"{vm}-{run}-disk0",
                    image="/r/i.qcow2", size=512)  # fmt: skip
    return Call(hub="h", vm=vm, run=run, attempt=1, state=CallState.DUE, sna="a", type="full",
                request="d", job_id=job_id("h", vm, run, 1), exports=(export,), created=1.0,
                changed=1.0)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, "h")


def test_what_is_written_is_read_back(store: Store, tmp_path: Path) -> None:
    store.hold([lease()], call())
    store.started([lease()])
    store.clients_seen([lease()])
    for ledger in (store.ledger(), read(tmp_path)):
        assert ledger is not None
        assert ledger.leases == (replace(lease(), started=True, clients_seen=True),)
        assert ledger.calls == (call(),)
    store.close()


def test_two_owners_of_a_port_are_refused_and_nothing_of_the_second_stays(store: Store) -> None:
    store.hold([lease()], None)
    with pytest.raises(StoreError):
        store.hold(
            [lease("ctx-2", port=10101), lease("ctx-2", disk=2001, port=10100)], call("ctx-2")
        )
    ledger = store.ledger()
    assert [one.vm for one in ledger.leases] == ["ctx-1"]
    assert ledger.calls == ()


def test_a_port_is_released_by_its_owner_only(store: Store) -> None:
    store.hold([lease()], None)
    store.release([replace(lease(), port=10101)])
    store.release([lease("ctx-2")])
    assert len(store.ledger().leases) == 1
    store.release([lease()])
    assert store.ledger().leases == ()


def test_a_step_is_taken_once(store: Store) -> None:
    store.hold([], call())
    intended = store.advance(call(), CallEvent.INTEND, 2.0, targets="t")
    assert (intended.state, intended.changed) == (CallState.INTENDED, 2.0)
    with pytest.raises(StoreError, match="it is not DUE any more"):
        store.advance(call(), CallEvent.INTEND, 3.0)
    with pytest.raises(ImpossibleStepError):
        store.advance(intended, CallEvent.END, 3.0)


def test_before_the_intent_a_run_is_what_the_spec_says_last_and_after_it_is_frozen(
    store: Store,
) -> None:
    store.hold([], call())
    store.hold([], replace(call(), sna="b"))
    assert store.ledger().calls[0].sna == "b"
    store.advance(store.ledger().calls[0], CallEvent.INTEND, 2.0)
    store.hold([], replace(call(), sna="c"))
    assert (store.ledger().calls[0].sna, store.ledger().calls[0].state) == ("b", "INTENDED")


def test_another_attempt_is_opened_in_one_step(store: Store) -> None:
    store.hold([], call())
    unknown = store.advance(
        store.advance(call(), CallEvent.INTEND, 2.0), CallEvent.UNCLEAR, 3.0, message="?"
    )
    store.another_attempt(unknown, 4.0, "because")
    first, second = sorted(store.ledger().calls, key=lambda one: one.attempt)
    assert (first.state, second.state, second.attempt) == ("CANCELLED", "DUE", 2)
    assert first.job_id != second.job_id == job_id("h", "ctx-1", "r1", 2)


def test_reading_writes_nothing_not_even_beside_the_database(store: Store, tmp_path: Path) -> None:
    store.hold([lease()], None)
    store.close()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert read(tmp_path) is not None
    assert events(tmp_path, "ctx-1") == []
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert set(before) == {"state.db"}


def test_reading_while_somebody_writes_sees_one_moment(store: Store, tmp_path: Path) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def look() -> None:
        try:
            while not stop.is_set():
                ledger = read(tmp_path)
                assert ledger is not None
                assert len(ledger.leases) in (0, 2)
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(50):
        store.hold([lease(), lease(disk=2001, port=10101)], None)
        with store._write() as db:
            db.execute("DELETE FROM leases")
    stop.set()
    reader.join(30)
    assert failures == []
    store.close()


def test_no_store_yet(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_another_hub_is_refused(tmp_path: Path) -> None:
    Store(tmp_path, "h").close()
    with pytest.raises(WrongHubError, match="it belongs to hub 'h'"):
        Store(tmp_path, "g")


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    Store(tmp_path, "h").close()
    db = sqlite3.connect(tmp_path / "state.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="written by a newer version"):
        Store(tmp_path, "h")
    with pytest.raises(StoreError, match="written by a newer version"):
        read(tmp_path)


def test_a_damaged_store_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"this is no database at all, whatever it looks like" * 99)
    with pytest.raises(
        StoreError, match=r"reconciler state restore FILE.*, or move .*state.db\* away"
    ):
        Store(tmp_path, "h")
    with pytest.raises(StoreError, match="not a database"):
        read(tmp_path)


def test_a_locked_store_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reconciler.host.store.writer.BUSY_TIMEOUT", 0.05)
    store = Store(tmp_path, "h")
    other = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # of our own process, which is not to be named
    with pytest.raises(StoreLockedError, match="locked by another process") as refused:
        store.hold([lease()], None)
    assert "fuser -v" in str(refused.value)
    other.execute("ROLLBACK")
    other.close()
    store.hold([lease()], None)
    store.close()


def test_events_that_repeat_count_up(store: Store, tmp_path: Path) -> None:
    same = Event(vm="ctx-1", reason="Down", message="it is down", severity="Warning")
    store.record([same, same], "me", 5.0)
    store.record([same], "me", 6.0)
    store.record([Event(vm="ctx-1", reason="Up", message="it is up")], "me", 7.0)
    found = events(tmp_path, "ctx-1")
    assert [(one.reason, one.count, one.last) for one in found] == [
        ("Up", 1, 7.0),
        ("Down", 3, 6.0),
    ]
    store.record([Event(vm="x", reason="Later", message="")], "me", 7.0 + 91 * 86400)
    assert events(tmp_path, "ctx-1") == []
    store.close()


def test_a_condition_keeps_its_since_until_its_status_changes(store: Store) -> None:
    key = ("ctx-1", "Ready")
    store.transitions({key: ("False", "A")}, 1.0)
    store.transitions({key: ("False", "B")}, 2.0)
    assert store.ledger().transitions[key] == ("False", "B", 1.0)
    store.transitions({key: ("True", "C")}, 3.0)
    assert store.ledger().transitions[key] == ("True", "C", 3.0)


def test_a_changed_vm_gets_the_next_generation(store: Store) -> None:
    for desired in ({"a": 1}, {"a": 1}, {"a": 2}):
        store.apply({}, {"ctx-1": desired}, 1.0)
    assert store.ledger().applied["ctx-1"].generation == 2


def test_the_store_is_nobody_elses_to_read(store: Store, tmp_path: Path) -> None:
    store.hold([lease()], None)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    assert os.listdir(tmp_path)
    store.close()
