"""Copies of the store: whole, checked, never over anything, and put back without a loss."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler.core.call import CallEvent, CallState
from reconciler.core.errors import HostError
from reconciler.host.store import NAME, Store, StoreError, copies, read
from reconciler.host.store.schema import VERSION
from tests.host.test_store import call, lease, many_calls
from tests.mounts import fill, small


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A state directory with a leased port and a call that is due."""
    where = tmp_path / "state"
    where.mkdir()
    store = Store(where, "h")
    store.hold([lease()], replace(call(), changed=7.0))
    store.close()
    return where


def contents(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as db:
        return list(db.iterdump())


def names(where: Path) -> list[str]:
    return sorted(path.name for path in where.iterdir())


# -- made


def test_a_copy_is_what_the_store_is_and_stands_alone(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    found = copies.backup(home, out / "b.db")
    assert (found.hub, found.schema, found.leases, found.events) == ("h", VERSION, 1, 0)
    assert (found.calls, found.newest, found.wrong) == ({"DUE": 1}, 7.0, "")
    assert found.home == str(home)
    assert found.size == (out / "b.db").stat().st_size
    assert contents(out / "b.db") == contents(home / NAME)
    assert (out / "b.db").stat().st_mode & 0o777 == 0o600
    assert (out / "b.db").read_bytes()[18:20] == b"\1\1"  # not in WAL mode: needs no -wal
    (out / "b.db").chmod(0o400)
    assert copies.facts(out / "b.db") == found
    assert names(out) == ["b.db"]
    assert names(home) == [NAME]


def test_a_copy_is_of_one_moment_while_others_write(home: Path, tmp_path: Path) -> None:
    store = Store(home, "h")
    many_calls(store, vms=5, nights=200)  # many pages, so that there is time to come in between
    stop = threading.Event()

    def write() -> None:
        """Both ports or none, again and again."""
        pair = [lease("ctx-9", 2000, 10108), lease("ctx-9", 2001, 10109)]
        while not stop.is_set():
            store.hold(pair, None)
            store.release(pair)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(15):
            found = copies.backup(home, tmp_path / f"{number}.db")
            assert found.wrong == ""
            assert found.leases in (1, 3)
    finally:
        stop.set()
        writer.join(30)
        store.close()


def test_a_copy_overwrites_nothing_without_an_order(home: Path, tmp_path: Path) -> None:
    target = tmp_path / "b.db"
    target.write_text("last year's")
    with pytest.raises(HostError, match=r"it is there already; .* add --force"):
        copies.backup(home, target)
    assert target.read_text() == "last year's"
    copies.backup(home, target, overwrite=True)
    assert contents(target) == contents(home / NAME)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(HostError, match="it is there already"):
        copies.backup(home, tmp_path / "link")


def test_a_name_that_is_taken_meanwhile_is_kept(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "b.db"
    real = copies._name

    def late(temporary: Path, name: Path) -> None:
        target.write_text("another's")
        real(temporary, name)

    monkeypatch.setattr(copies, "_name", late)
    with pytest.raises(HostError, match="File exists"):
        copies.backup(home, target)
    assert target.read_text() == "another's"
    assert names(tmp_path) == ["b.db", "state"]


def test_the_store_itself_is_no_name_for_its_copy(home: Path) -> None:
    before = contents(home / NAME)
    for name in (NAME, f"{NAME}-wal", f"{NAME}-shm"):
        with pytest.raises(HostError, match="that is the store itself"):
            copies.backup(home, home / name, overwrite=True)
    assert contents(home / NAME) == before


def test_a_copy_of_nothing_or_of_a_damaged_store_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="there is no store yet"):
        copies.backup(tmp_path / "empty", tmp_path / "b.db")
    store = Store(home, "h")
    many_calls(store, vms=5, nights=100)
    store.close()
    with (home / NAME).open("r+b") as file:
        file.seek((home / NAME).stat().st_size // 8192 * 4096)
        file.write(b"\xa5" * 4096)
    with pytest.raises(StoreError, match="it is damaged"):
        copies.backup(home, tmp_path / "b.db")
    assert names(tmp_path) == ["empty", "state"]


def test_a_copy_for_which_there_is_no_room_leaves_nothing(home: Path, tmp_path: Path) -> None:
    with small(tmp_path / "stick", "64k") as stick:
        with pytest.raises(HostError, match=f"make room, then do this again: df {stick}"):
            copies.backup(home, stick / "b.db")
        assert names(stick) == []


def test_a_store_on_a_full_and_read_only_disk_can_be_copied(tmp_path: Path) -> None:
    with small(tmp_path / "state", "512k") as where:
        store = Store(where, "h")
        store.hold([lease()], None)
        store.close()
        fill(where)
        assert copies.backup(where, tmp_path / "b.db").leases == 1


# -- put back


def test_a_copy_is_put_back_and_what_was_there_is_kept(home: Path, tmp_path: Path) -> None:
    copies.backup(home, tmp_path / "b.db")
    store = Store(home, "h")
    store.advance(store.ledger().calls[0], CallEvent.INTEND, 9.0)
    store.close()
    newer = contents(home / NAME)
    assert copies.check(tmp_path / "b.db", home).calls == {"DUE": 1}
    aside = copies.restore(tmp_path / "b.db", home)
    assert aside is not None
    assert aside.name.startswith("state.db.before-restore-2")
    assert names(home) == [NAME, aside.name]
    assert contents(aside) == newer
    looked = read(home)
    assert looked is not None
    assert looked.calls[0].state is CallState.DUE
    assert (home / NAME).stat().st_mode & 0o777 == 0o600
    second = copies.restore(tmp_path / "b.db", home)
    assert second is not None
    assert second != aside
    assert contents(tmp_path / "b.db") == contents(home / NAME)


def test_what_a_killed_writer_had_not_merged_goes_aside_whole(home: Path, tmp_path: Path) -> None:
    """A -wal that is left beside another store would be applied to that."""
    copies.backup(home, tmp_path / "b.db")
    store = Store(home, "h")
    store.advance(store.ledger().calls[0], CallEvent.INTEND, 9.0)
    crashed = tmp_path / "crashed"
    shutil.copytree(home, crashed)  # with its -wal and -shm
    store.close()
    shutil.rmtree(home)
    crashed.rename(home)
    assert (home / f"{NAME}-wal").stat().st_size
    aside = copies.restore(tmp_path / "b.db", home)
    assert aside is not None
    assert names(home) == [NAME, aside.name]
    assert contents(home / NAME) == contents(tmp_path / "b.db")
    assert any("'INTENDED'" in line for line in contents(aside))


def test_a_reader_that_keeps_the_wal_from_being_merged_spoils_nothing(
    home: Path, tmp_path: Path
) -> None:
    copies.backup(home, tmp_path / "b.db")
    store = Store(home, "h")
    with closing(sqlite3.connect(home / NAME, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT state FROM calls").fetchall() == [("DUE",)]
        store.advance(store.ledger().calls[0], CallEvent.INTEND, 9.0)
        store.close()
        assert (home / f"{NAME}-wal").stat().st_size
        aside = copies.restore(tmp_path / "b.db", home)
        assert reader.execute("SELECT state FROM calls").fetchall() == [("DUE",)]
    assert aside is not None
    assert names(home) == [NAME, aside.name, f"{aside.name}-wal"]
    assert contents(home / NAME) == contents(tmp_path / "b.db")
    assert any("'INTENDED'" in line for line in contents(aside))


def test_what_is_written_while_it_is_put_aside_is_kept_aside(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callbacks are written without the lock, by a process that keeps the store open."""
    copies.backup(home, tmp_path / "b.db")
    real = copies._merge
    with closing(sqlite3.connect(home / NAME, isolation_level=None)) as callback:
        callback.execute("INSERT INTO reports VALUES ('j', 0, 'before', 1, 1.0)")

        def late(path: Path) -> None:
            real(path)
            callback.execute("INSERT INTO reports VALUES ('j', 1, 'late', 1, 1.0)")

        monkeypatch.setattr(copies, "_merge", late)
        aside = copies.restore(tmp_path / "b.db", home)
        assert contents(home / NAME) == contents(tmp_path / "b.db")
    assert aside is not None
    with closing(sqlite3.connect(aside)) as db:
        said = db.execute("SELECT change_id FROM reports ORDER BY position").fetchall()
    assert said == [("before",), ("late",)]
    Store(home, "h").close()


def test_a_store_that_cannot_be_read_goes_aside_as_it_is(home: Path, tmp_path: Path) -> None:
    copies.backup(home, tmp_path / "b.db")
    (home / NAME).write_bytes(b"rubbish" * 999)
    (home / f"{NAME}-wal").write_bytes(b"more rubbish")
    aside = copies.restore(tmp_path / "b.db", home)
    assert aside is not None
    assert aside.read_bytes() == b"rubbish" * 999
    assert aside.with_name(f"{aside.name}-wal").read_bytes() == b"more rubbish"
    assert contents(home / NAME) == contents(tmp_path / "b.db")
    Store(home, "h").close()
    (home / NAME).unlink()
    (home / NAME).mkdir()
    aside = copies.restore(tmp_path / "b.db", home)
    assert aside is not None
    assert aside.is_dir()
    Store(home, "h").close()


def test_a_lost_state_directory_gets_its_copy(home: Path, tmp_path: Path) -> None:
    copies.backup(home, tmp_path / "b.db")
    shutil.rmtree(home)
    home.mkdir()
    assert copies.restore(tmp_path / "b.db", home) is None
    assert names(home) == [NAME]
    Store(home, "h").close()


@pytest.mark.parametrize("moment", ["unlink", "rename"])
def test_a_crash_while_it_is_put_back_leaves_a_store(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    copies.backup(home, tmp_path / "b.db")
    before = contents(home / NAME)

    class Crash(BaseException):
        pass

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        if moment == "rename":
            patch.setattr(os, "rename", crash)
        else:
            patch.setattr(copies, "_remove", crash)
        with pytest.raises(Crash):
            copies.restore(tmp_path / "b.db", home)
    assert contents(home / NAME) == before
    copies.restore(tmp_path / "b.db", home)
    Store(home, "h").close()


def test_what_is_no_copy_of_this_is_not_put_back(home: Path, tmp_path: Path) -> None:
    before = contents(home / NAME)
    bad = tmp_path / "bad.db"

    def refused(words: str) -> None:
        with pytest.raises(StoreError, match=words):
            copies.check(bad, home)
        assert contents(home / NAME) == before
        assert names(home) == [NAME]

    refused("there is no store in it")
    bad.touch()
    refused("there is no store in it")
    bad.write_bytes(b"something else " * 999)
    refused("file is not a database; take another copy")
    shutil.copy(home / NAME, bad)
    with closing(sqlite3.connect(bad)) as db:
        db.execute("PRAGMA user_version = 99")
    refused("written by a newer version")
    bad.unlink()
    with closing(sqlite3.connect(bad)) as db:
        db.execute("CREATE TABLE songs (name)")
    refused("a database of something else")
    bad.unlink()
    bad.symlink_to(home / NAME)
    refused("it is the store itself")


def test_a_damaged_copy_is_not_put_back(home: Path, tmp_path: Path) -> None:
    store = Store(home, "h")
    many_calls(store, vms=5, nights=100)
    store.close()
    copy = tmp_path / "b.db"
    copies.backup(home, copy)
    with copy.open("r+b") as file:
        file.seek(copy.stat().st_size // 8192 * 4096)
        file.write(b"\xa5" * 4096)
    with pytest.raises(StoreError, match="malformed; take another copy"):
        copies.check(copy, home)
    with pytest.raises(StoreError):
        copies.restore(copy, home)
    Store(home, "h").close()


def test_a_copy_is_not_put_into_a_second_directory_beside_the_first(
    home: Path, tmp_path: Path
) -> None:
    copies.backup(home, tmp_path / "b.db")
    second = tmp_path / "second"
    second.mkdir()
    with pytest.raises(StoreError, match="which is still there with the same state id"):
        copies.check(tmp_path / "b.db", second)
    shutil.rmtree(home)
    copies.check(tmp_path / "b.db", second)
    copies.restore(tmp_path / "b.db", second)
    store = Store(second, "h")
    assert store.home == str(second)
    store.close()
