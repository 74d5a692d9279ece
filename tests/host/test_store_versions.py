"""A store of any older version becomes one of this in one step, or stays as it was."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from reconciler.core.call import CallState
from reconciler.host.store import NAME, Store, StoreError, events, read, schema, state_id_of

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "cases" / "store"
HUB = "hub-a"
OLDER = range(1, schema.VERSION)


def put(version: int, directory: Path) -> Path:
    """A store of a version, as that version left it."""
    dump = CASES / f"v{version}.sql"
    assert dump.exists(), (
        f"there is no {dump}: when VERSION is raised, write the SQL dump of a store that the code "
        f"of version {version} made, with a row of every kind"
    )
    path = directory / NAME
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(dump.read_text())
        db.execute("PRAGMA journal_mode=WAL")
    return path


def rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Table → its rows."""
    with closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        names = [row["name"] for row in db.execute("SELECT name FROM sqlite_master "
                                                   "WHERE type = 'table'")]  # fmt: skip
        return {name: [dict(row) for row in db.execute(f"SELECT * FROM {name}")] for name in names}


def shape(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Table or index → its columns."""
    with closing(sqlite3.connect(path)) as db:
        found = {}
        for kind, name in db.execute("SELECT type, name FROM sqlite_master").fetchall():
            asked = "table_xinfo" if kind == "table" else "index_xinfo"
            found[name] = db.execute(f"PRAGMA {asked}({name})").fetchall()
        return found


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        found: int = db.execute("PRAGMA user_version").fetchone()[0]
        return found


@pytest.mark.parametrize("older", OLDER)
def test_every_older_version_has_a_store_to_test_with(tmp_path: Path, older: int) -> None:
    path = put(older, tmp_path)
    assert version(path) == older
    found = rows(path)
    assert {name for name, its in found.items() if not its} == set()
    assert {row["state"] for row in found["calls"]} == set(CallState)


@pytest.mark.parametrize("older", OLDER)
def test_an_older_store_loses_nothing(tmp_path: Path, older: int) -> None:
    path = put(older, tmp_path)
    before = rows(path)
    Store(tmp_path, HUB).close()
    after = rows(path)
    for name, its in before.items():
        now = [{k: v for k, v in row.items() if k in its[0]} for row in after[name]]
        if name == "meta":
            now = [row for row in now if row["name"] != "home"]
        assert now == its, name


@pytest.mark.parametrize("older", OLDER)
def test_an_older_store_becomes_what_a_new_one_is(tmp_path: Path, older: int) -> None:
    path = put(older, tmp_path)
    Store(tmp_path, HUB).close()
    (tmp_path / "new").mkdir()
    Store(tmp_path / "new", HUB).close()
    assert version(path) == schema.VERSION
    assert shape(path) == shape(tmp_path / "new" / NAME)


@pytest.mark.parametrize("older", OLDER)
def test_who_only_looks_sees_the_same_and_writes_nothing(tmp_path: Path, older: int) -> None:
    path = put(older, tmp_path)
    before = path.read_bytes()
    looked, id_, past = read(tmp_path), state_id_of(tmp_path), events(tmp_path, "ctx-2")
    assert looked is not None
    list(looked.calls)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [NAME]
    store = Store(tmp_path, HUB)
    assert store.ledger() == looked
    assert store.state_id == id_
    store.close()
    assert events(tmp_path, "ctx-2") == past != []


@pytest.mark.parametrize("older", OLDER)
def test_who_looks_while_another_writes_sees_what_was_committed(tmp_path: Path, older: int) -> None:
    path = put(older, tmp_path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("UPDATE calls SET message = 'committed' WHERE vm = 'ctx-5'")
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE calls SET message = 'not committed' WHERE vm = 'ctx-5'")
        looked = read(tmp_path)
        assert looked is not None
        found = looked.latest("ctx-5", "night-1")
        ended = looked.latest("ctx-1", "night-1")
        other.execute("ROLLBACK")
    assert found is not None
    assert found.message == "committed"
    assert ended is not None
    assert ended.state is CallState.COMPLETED
    assert version(path) == older


@pytest.mark.parametrize("older", OLDER)
def test_a_migration_that_fails_leaves_the_store_as_it_was(
    tmp_path: Path, older: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(older, tmp_path)
    before, shaped = rows(path), shape(path)
    broken = {**schema._MIGRATIONS}
    broken[schema.VERSION] += "; INSERT INTO nowhere VALUES (1)"
    with monkeypatch.context() as patch:
        patch.setattr(schema, "_MIGRATIONS", broken)
        with pytest.raises(StoreError, match="no such table: nowhere"):
            Store(tmp_path, HUB)
    assert (version(path), rows(path), shape(path)) == (older, before, shaped)
    Store(tmp_path, HUB).close()
    assert version(path) == schema.VERSION


def die_in_the_middle(directory: str) -> None:
    """Open a store, and end for good in the middle of its migration."""
    steps = [one for one in schema._MIGRATIONS[schema.VERSION].split(";") if one.strip()]
    real = sqlite3.connect

    class Dying(sqlite3.Connection):
        def execute(self, sql: str, *more: Any) -> sqlite3.Cursor:
            if sql == steps[len(steps) // 2]:
                os._exit(9)
            return super().execute(sql, *more)

    sqlite3.connect = lambda *a, **k: real(*a, **k, factory=Dying)  # type: ignore[assignment]
    Store(Path(directory), HUB)


@pytest.mark.parametrize("older", OLDER)
def test_a_crash_in_the_middle_of_a_migration_leaves_the_store_as_it_was(
    tmp_path: Path, older: int
) -> None:
    path = put(older, tmp_path)
    before = rows(path)
    line = f"import {__name__} as here; here.die_in_the_middle({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", line], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 9
    looked = read(tmp_path)
    assert (version(path), rows(path)) == (older, before)
    store = Store(tmp_path, HUB)
    assert store.ledger() == looked
    store.close()


def test_a_store_of_another_hub_is_not_migrated(tmp_path: Path) -> None:
    path = put(1, tmp_path)
    with pytest.raises(Exception, match="it belongs to hub 'hub-a'"):
        Store(tmp_path, "hub-b")
    assert version(path) == 1
