"""A store that cannot be read or written says why, and what helps; nothing of it is half done."""

from __future__ import annotations

import os
import re
import select
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from reconciler.core.call import CallEvent, CallState
from reconciler.core.errors import Exit, HostError
from reconciler.host import lock
from reconciler.host.store import Event, Store, StoreError, StoreLockedError, files, read
from tests.host.test_store import call, lease, many_calls
from tests.mounts import fill, small

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def locked_by_another(path: Path, how: str) -> Iterator[int]:
    """Another process that keeps the store locked; its pid."""
    script = (
        "import sqlite3, sys\n"
        f"db = sqlite3.connect({str(path)!r}, isolation_level=None)\n"
        f"for one in {how.split('; ')!r}: db.execute(one).fetchall()\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    try:
        assert select.select([process.stdout], [], [], 30)[0]
        assert process.stdout.readline() == b"locked\n"
        yield process.pid
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


HOLDS = [
    "BEGIN EXCLUSIVE",
    "BEGIN IMMEDIATE",
    "PRAGMA locking_mode = EXCLUSIVE; INSERT INTO meta VALUES (1, 2)",
]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("files", "writer"):
        monkeypatch.setattr(f"reconciler.host.store.{module}.BUSY_TIMEOUT", 0.05)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("how", HOLDS)
def test_who_locks_the_store_is_named(tmp_path: Path, how: str) -> None:
    Store(tmp_path, "h").close()
    with locked_by_another(tmp_path / "state.db", how) as pid:
        with pytest.raises(StoreLockedError) as refused:
            Store(tmp_path, "h")
        said = str(refused.value)
        assert re.search(rf"it was locked by \S+ \(pid {pid}\) for 50 ms", said), said
        assert refused.value.exit is Exit.LOCKED
    Store(tmp_path, "h").close()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("how", HOLDS[:2])
def test_who_only_looks_does_not_wait_for_who_writes(tmp_path: Path, how: str) -> None:
    store = Store(tmp_path, "h")
    store.hold([lease()], None)
    store.close()
    with locked_by_another(tmp_path / "state.db", how):
        found = read(tmp_path)
    assert found is not None
    assert found.leases == (lease(),)


@pytest.mark.usefixtures("hasty")
def test_a_lock_that_keeps_everybody_out_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(tmp_path, "h").close()
    tries: list[str] = []
    real = sqlite3.connect

    def counted(name: str, **options: Any) -> Any:
        tries.append(name)
        found: sqlite3.Connection = real(name, **options)
        return found

    with locked_by_another(tmp_path / "state.db", HOLDS[2]) as pid:
        monkeypatch.setattr("reconciler.host.store.files.sqlite3.connect", counted)
        with pytest.raises(StoreLockedError, match=f"pid {pid}"):
            read(tmp_path)
    assert len(tries) == 1


def test_who_has_not_the_file_open_is_not_who_locks_it(tmp_path: Path) -> None:
    """/proc/locks has numbers of files, and those are of one file system each."""
    path = tmp_path / "state.db"
    with locked_by_another(tmp_path / "other", "CREATE TABLE t (a); BEGIN IMMEDIATE") as pid:
        path.symlink_to("other")
        assert [who.split("pid ")[1] for who in files.lockers(path)] == [f"{pid})"]
        path.unlink()
        os.link(tmp_path / "other", path)  # the same number, by a name that nobody has open
        assert files.lockers(path) == []


# -- damage


def overwrite(path: Path, at: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xa5" * length)


def a_long_one(directory: Path) -> Path:
    store = Store(directory, "h")
    many_calls(store, vms=5, nights=100)
    store.close()
    return directory / "state.db"


@pytest.mark.parametrize("where", ["the header", "a page in the middle"])
def test_a_damaged_store_is_not_written_and_says_what_to_do(tmp_path: Path, where: str) -> None:
    path = a_long_one(tmp_path)
    overwrite(path, 0 if where == "the header" else path.stat().st_size // 8192 * 4096, 4096)
    before = path.read_bytes()
    with pytest.raises(StoreError) as refused:
        Store(tmp_path, "h")
    assert refused.value.reason == "StoreDamaged"
    for word in (str(path), "reconciler state restore FILE", "UNKNOWN"):
        assert word in str(refused.value)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["state.db"]


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("UPDATE calls SET state = 'WHATEVER'", "'WHATEVER' is not a valid CallState"),
        ("UPDATE calls SET exports = '[{'", "damaged"),
        ("""UPDATE calls SET exports = '[{"vm": 7}]'""", "Expected `str`, got `int`"),
        ("UPDATE calls SET message = CAST(x'ff' AS TEXT)", "Could not decode to UTF-8"),
        ("UPDATE applied SET desired = '{'", "damaged"),
        ("DELETE FROM meta WHERE name = 'state_id'", "it does not say its state_id"),
    ],
)
def test_a_row_that_was_never_written_like_this_is_damage(
    tmp_path: Path, sql: str, words: str
) -> None:
    store = Store(tmp_path, "h")
    store.hold([], call())
    store.apply({}, {"ctx-1": {}}, 1.0)
    store.close()
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        db.execute(sql)
        db.commit()
    with pytest.raises(StoreError, match="it is damaged") as refused:
        read(tmp_path)
    assert words in str(refused.value)
    with pytest.raises(StoreError, match="it is damaged"):
        Store(tmp_path, "h").ledger()


def test_an_empty_file_is_a_store_that_never_was(tmp_path: Path) -> None:
    (tmp_path / "state.db").touch()
    assert read(tmp_path) is None
    Store(tmp_path, "h").close()
    assert read(tmp_path) is not None


def test_a_directory_in_the_place_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "state.db").mkdir()
    looks: list[Callable[[], object]] = [lambda: Store(tmp_path, "h"), lambda: read(tmp_path)]
    for look in looks:
        with pytest.raises(StoreError, match="Is a directory; move it away"):
            look()


def test_a_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE songs (name)")
    before = path.read_bytes()
    looks: list[Callable[[], object]] = [lambda: Store(tmp_path, "h"), lambda: read(tmp_path)]
    for look in looks:
        with pytest.raises(StoreError, match="it is a database of something else"):
            look()
    assert path.read_bytes() == before


# -- no space, no right to write


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    with small(tmp_path / "tiny", "512k") as found:
        yield found


def test_a_full_disk_takes_no_step(tiny: Path) -> None:
    store = Store(tiny, "h")
    store.hold([], call())
    filling = fill(tiny)
    for _ in range(2):  # the second finds no transaction left open by the first
        with pytest.raises(StoreError, match=f"make room, then do this again: df {tiny}") as full:
            store.advance(call(), CallEvent.INTEND, 2.0, targets="t" * 9999)
        assert full.value.reason == "StoreFull"
    looked = read(tiny)
    assert looked is not None
    assert looked.calls[0].state is CallState.DUE
    filling.unlink()
    assert store.advance(call(), CallEvent.INTEND, 2.0).state is CallState.INTENDED
    store.close()


def test_a_store_cannot_be_opened_for_writing_on_a_full_disk_and_can_be_looked_at(
    tiny: Path,
) -> None:
    store = Store(tiny, "h")
    store.hold([lease()], None)
    store.close()
    filling = fill(tiny)
    for _ in range(2):
        with pytest.raises(StoreError, match="make room") as full:
            Store(tiny, "h")
        assert full.value.reason == "StoreFull"
        found = read(tiny)  # also beside what the failed opening left
        assert found is not None
        assert found.leases == (lease(),)
    filling.unlink()
    Store(tiny, "h").close()


def test_a_new_store_on_a_full_disk_is_made_when_there_is_room(tiny: Path) -> None:
    filling = fill(tiny)
    with pytest.raises(StoreError, match="make room"):
        Store(tiny, "h")
    assert read(tiny) is None
    filling.unlink()
    Store(tiny, "h").close()


def test_a_file_system_that_is_read_only(tiny: Path) -> None:
    store = Store(tiny, "h")
    store.hold([lease()], None)
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(tiny)], check=True)
    with pytest.raises(StoreError, match=f"mounted read-only: findmnt -T {tiny}") as refused:
        Store(tiny, "h")
    assert refused.value.reason == "StoreReadOnly"
    found = read(tiny)
    assert found is not None
    assert found.leases == (lease(),)


def test_what_a_killed_writer_left_is_read_on_a_read_only_file_system(tiny: Path) -> None:
    script = (
        "import os; from pathlib import Path; from reconciler.host.store import Store, Event\n"
        f"store = Store(Path({str(tiny)!r}), 'h')\n"
        "store.apply({}, {'ctx-1': {}}, 1.0)\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    assert (tiny / "state.db-wal").stat().st_size
    subprocess.run(["mount", "-o", "remount,ro", str(tiny)], check=True)
    found = read(tiny)
    assert found is not None
    assert list(found.applied) == ["ctx-1"]


def test_the_lock_says_what_keeps_it_from_being_taken(tiny: Path) -> None:
    filling = fill(tiny)
    with (
        pytest.raises(HostError, match=f"No space left.*df {tiny}"),
        lock.held(tiny / "lock", "x", 1),
    ):
        pass
    filling.unlink()
    with lock.held(tiny / "lock", "a long command that was there before", 1):
        pass
    filling = fill(tiny)
    with lock.held(tiny / "lock", "x", 1):  # it has its room already
        holder = lock.holder(tiny / "lock")
        assert holder is not None
        assert (holder.pid, holder.command) == (os.getpid(), "x")
    subprocess.run(["mount", "-o", "remount,ro", str(tiny)], check=True)
    with (
        pytest.raises(HostError, match=f"Read-only.*findmnt -T {tiny}"),
        lock.held(tiny / "lock", "x", 1),
    ):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_told_whose_it_is(tmp_path: Path) -> None:
    Store(tmp_path, "h").close()
    script = (
        "import os, sys; from pathlib import Path\n"
        "from reconciler.host.store import Store, read\n"
        f"where = Path({str(tmp_path)!r})\n"
        "read(where)\n"  # loads what is loaded late, while it can be
        "os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "for look in (lambda: read(where), lambda: Store(where, 'h')):\n"
        "    try: look()\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    for mode, said in ((0o755, "belongs to root: run this as root"), (0o000, "Permission denied")):
        for parent in tmp_path.parents:
            if parent.stat().st_mode & 0o001 == 0:
                parent.chmod(parent.stat().st_mode | 0o001)
        tmp_path.chmod(mode)
        line = [sys.executable, "-c", script]
        done = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        assert len(lines) == 2, done
        assert lines[0].startswith("StoreError cannot read the store")
        assert lines[1].startswith("StoreError cannot open the store")
        assert [said in one for one in lines] == [True, True], lines


def test_an_event_that_cannot_be_written_is_no_half_event(tiny: Path) -> None:
    store = Store(tiny, "h")
    filling = fill(tiny)
    many = [Event(vm="ctx-1", reason=f"R{n}", message="m" * 4000) for n in range(50)]
    with pytest.raises(StoreError):
        store.record(many, "me", 1.0)
    filling.unlink()
    store.record(many[:1], "me", 1.0)
    with closing(sqlite3.connect(tiny / "state.db")) as db:
        assert db.execute("SELECT reason FROM events").fetchall() == [("R0",)]
    store.close()
