"""The ledger on disk: one step at a time, one owner per port, and readers that write nothing."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from reconciler.core.call import (
    Call,
    CallEvent,
    CallState,
    ImpossibleStepError,
    Report,
    job_id,
)
from reconciler.core.desired import Export
from reconciler.core.ledger import Archived, Lease, Ledger, Proof, Word
from reconciler.host.store import (
    Event,
    Store,
    StoreError,
    StoreLockedError,
    WrongHubError,
    archived,
    events,
    proofs,
    read,
    rows,
    state_id_of,
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
    store.started([replace(lease(), deaths=3, rest=9.0)], 5.0)
    store.clients_seen([lease()])
    risen = replace(lease(), started=True, clients_seen=True, up=5.0, deaths=3, rest=9.0)
    for ledger in (store.ledger(), read(tmp_path)):
        assert ledger is not None
        assert ledger.leases == (risen,)
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


def test_what_is_kept_of_a_run_is_noted_with_its_end_or_not_at_all(
    store: Store, tmp_path: Path
) -> None:
    store.hold([], call())
    kept = Archived(
        job_id=call().job_id, position=0, size=1024, allocated=512, digest="sha256:0", at=4.0
    )
    accepted = call()
    for event in (CallEvent.INTEND, CallEvent.ACCEPT):
        accepted = store.advance(accepted, event, 2.0)
    with pytest.raises(StoreError, match="it is not DUE any more"):
        store.advance(replace(call(), state=CallState.DUE), CallEvent.CANCEL, 3.0, archived=[kept])
    assert archived(tmp_path, kept.job_id) == {}
    store.advance(accepted, CallEvent.END, 4.0, archived=[kept])
    assert archived(tmp_path, kept.job_id) == {0: kept}
    for moment in (5.0, 6.0):
        store.removed(kept.job_id, moment)
        assert archived(tmp_path, kept.job_id) == {0: replace(kept, removed=5.0)}


def test_of_each_kind_the_last_proof_counts(store: Store, tmp_path: Path) -> None:
    first = Proof(job_id="j", kind="verify", at=1.0, ok=False, result="{}", who="a")
    second, other = replace(first, at=2.0, ok=True), replace(first, kind="restore")
    for one in (first, other, second):
        store.prove(one)
    assert proofs(tmp_path, "j") == {"verify": second, "restore": other}
    assert proofs(tmp_path, "k") == {}


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


def many_calls(store: Store, vms: int, nights: int) -> None:
    """An ended call a night for each VM; of the last night, one that goes on."""
    with store._write() as db:
        for night in range(nights):
            for number in range(vms):
                state = CallState.COMPLETED if night < nights - 1 else CallState.ACCEPTED
                one = replace(call(f"ctx-{number}", f"r{night}"), state=state)
                rows.insert_call(db, one, replace_due=False)


def test_a_look_reads_of_a_long_past_what_it_needs(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_calls(store, vms=10, nights=100)
    decoded: list[Call] = []
    real = rows.call_of

    def counted(path: Path, row: Sequence[Any]) -> Call:
        decoded.append(real(path, row))
        return decoded[-1]

    monkeypatch.setattr(rows, "call_of", counted)
    looks: list[Callable[[], Ledger | None]] = [store.ledger, lambda: read(tmp_path)]
    for look in looks:
        decoded.clear()
        ledger = look()
        assert ledger is not None
        assert len(ledger.calls) == 1000
        assert [ledger.active(f"ctx-{number}") is not None for number in range(10)] == [True] * 10
        assert ledger.completed_runs("ctx-3") == [f"r{night}" for night in range(99)]
        assert ledger.newest_completed("ctx-3", 2000, "/r") is not None
        assert len(decoded) == 20
        old = ledger.latest("ctx-3", "r7")
        assert old is not None
        assert (old.run, old.state) == ("r7", CallState.COMPLETED)
        assert len(decoded) == 21
        assert len(list(ledger.calls)) == 1000
    store.close()


def test_a_past_that_is_another_since_we_looked_is_not_believed(
    store: Store, tmp_path: Path
) -> None:
    many_calls(store, vms=1, nights=9)
    lazy = [store.ledger(), read(tmp_path)]
    with store._write() as db:
        db.execute("UPDATE calls SET state = 'FAILED' WHERE run = 'r1'")
        db.execute("DELETE FROM calls WHERE run = 'r2'")
    for ledger in lazy:
        assert ledger is not None
        for run in ("r1", "r2"):
            with pytest.raises(StoreError, match=f"run {run} of ctx-0 is not as it was"):
                ledger.latest("ctx-0", run)
    store.close()


# -- one directory, one writer


def test_the_state_id_is_read_without_the_lock(store: Store, tmp_path: Path) -> None:
    assert state_id_of(tmp_path) == store.state_id
    store.close()
    assert state_id_of(tmp_path) == store.state_id
    assert state_id_of(tmp_path / "none") is None
    (tmp_path / "state.db").write_bytes(b"no database " * 999)
    with pytest.raises(StoreError, match="not a database"):
        state_id_of(tmp_path)


def home(directory: Path) -> str:
    with closing(sqlite3.connect(directory / "state.db")) as db:
        found: str = db.execute("SELECT value FROM meta WHERE name = 'home'").fetchone()[0]
        return found


def a_store(directory: Path) -> Path:
    directory.mkdir()
    store = Store(directory, "h")
    store.hold([lease()], None)
    store.close()
    return directory


def test_a_directory_that_was_moved_is_used_where_it_is(tmp_path: Path) -> None:
    old = a_store(tmp_path / "old")
    assert home(old) == str(old)
    new = old.rename(tmp_path / "new")
    store = Store(new, "h")
    assert len(store.ledger().leases) == 1
    assert store.home == str(new)
    store.close()
    assert home(new) == str(new)


def test_a_copied_directory_is_refused_while_the_original_is_there(tmp_path: Path) -> None:
    old = a_store(tmp_path / "old")
    new = Path(shutil.copytree(old, tmp_path / "new"))
    before = (new / "state.db").read_bytes()
    with pytest.raises(StoreError, match="is a copy of") as refused:
        Store(new, "h")
    assert refused.value.reason == "StateCopied"
    for word in (str(new), f"RECONCILER_STATE={old}", "remove that one"):
        assert word in str(refused.value)
    assert (new / "state.db").read_bytes() == before
    assert read(new) is not None  # looking is no harm
    Store(old, "h").close()
    shutil.rmtree(old)
    Store(new, "h").close()
    assert home(new) == str(new)


def test_a_copy_is_refused_where_nobody_can_tell_of_the_original(tmp_path: Path) -> None:
    old = a_store(tmp_path / "old")
    new = Path(shutil.copytree(old, tmp_path / "new"))
    (old / "state.db").write_bytes(b"no database " * 999)
    with pytest.raises(StoreError, match="whether that is still there is not known"):
        Store(new, "h")


def test_another_store_in_the_old_place_is_no_hindrance(tmp_path: Path) -> None:
    new = a_store(tmp_path / "old").rename(tmp_path / "new")
    a_store(tmp_path / "old")
    Store(new, "h").close()
    assert home(new) == str(new)


def test_one_directory_by_two_names_is_one(tmp_path: Path) -> None:
    old = a_store(tmp_path / "old")
    (tmp_path / "link").symlink_to(old)
    Store(tmp_path / "link", "h").close()
    assert home(old) == str(old)
    # as it looks through a bind mount: another path, the same file
    (tmp_path / "mount").mkdir()
    os.link(old / "state.db", tmp_path / "mount" / "state.db")
    Store(tmp_path / "mount", "h").close()


def test_a_store_that_does_not_say_its_home_gets_one(tmp_path: Path) -> None:
    old = a_store(tmp_path / "old")
    with closing(sqlite3.connect(old / "state.db")) as db:
        db.execute("DELETE FROM meta WHERE name = 'home'")
        db.commit()
    Store(old, "h").close()
    assert home(old) == str(old)


def test_a_directory_may_have_any_name(tmp_path: Path) -> None:
    where = tmp_path / os.fsdecode(b"caf\xe9 #1?%41")
    a_store(where)
    Store(where, "h").close()
    assert state_id_of(where) is not None


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


def test_an_event_that_comes_again_between_others_only_counts_up(
    store: Store, tmp_path: Path
) -> None:
    """As those of a crash loop do: its start, its end, its start …"""
    again = [
        Event(vm="ctx-1", reason="CrashLoop", message="again and again", disk=2000),
        Event(vm="ctx-1", reason="Restarted", message="answers", disk=2000),
    ]
    for number in range(10):
        store.record(again, "watch", 300.0 * number)
    other = Event(vm="ctx-1", reason="CrashLoop", message="again and again", disk=2001)
    store.record([other], "watch", 3000.0)
    found = events(tmp_path, "ctx-1")
    assert [(one.reason, one.disk, one.count, one.last) for one in found] == [
        ("CrashLoop", 2001, 1, 3000.0),
        ("Restarted", 2000, 10, 2700.0),
        ("CrashLoop", 2000, 10, 2700.0),
    ]
    store.record(again[:1], "watch", 2700.0 + 3601)
    assert len(events(tmp_path, "ctx-1")) == 4  # another story
    store.close()


def test_what_an_appliance_said_is_kept_until_its_run_has_ended(
    store: Store, tmp_path: Path
) -> None:
    store.hold([], call())
    store.hold([], call("ctx-2"))
    for one in (call(), call("ctx-2")):
        due = store.advance(one, CallEvent.INTEND, 2.0)
        store.advance(due, CallEvent.ACCEPT, 3.0)
    first, second = job_id("h", "ctx-1", "r1", 1), job_id("h", "ctx-2", "r1", 1)
    store.words({first: Report(True, "running"), second: Report(None, message="refused")}, 4.0)
    store.words({first: Report(True, "failed", "full")}, 5.0)
    for ledger in (store.ledger(), read(tmp_path)):
        assert ledger is not None
        assert ledger.words == {
            first: Word(report=Report(True, "failed", "full"), since=5.0),
            second: Word(report=Report(None, message="refused"), since=4.0),
        }
    ended = store.ledger().active("ctx-2")
    assert ended
    store.advance(ended, CallEvent.FAIL, 6.0)
    assert store.ledger().words.keys() == {first}
    store.words({first: Report(False)}, 7.0)
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        (text,) = db.execute("SELECT value FROM meta WHERE name = 'words'").fetchone()
    assert second not in text, "of what has ended nothing stays"
