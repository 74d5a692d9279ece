"""Databases, real ones: one question, read-only, with deadlines."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.core.errors import HostError
from reconciler.core.inventory_rows import QUERY
from reconciler.core.settings import Secret
from reconciler.host.sql import Database
from tests.core.builders import says
from tests.databases import PASSWORD, Server, Tables

SLOW = {"mysql": "SELECT SLEEP(30)", "postgresql": "SELECT pg_sleep(30)"}


def password() -> Secret:
    return Secret(PASSWORD)


@pytest.fixture(params=["mariadb", "postgres"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with the field's tables and a VM of two disks in them."""
    found: Server = request.getfixturevalue(request.param)
    tables = found.tables()
    tables.vm("ctx-1", [512, 1024], display="pg1")
    yield found
    tables.own.close()


@pytest.fixture
def database(server: Server) -> Iterator[Database]:
    found = Database(server.url, 5.0)
    yield found
    found.close()


def refused(database: Database, query: str, word: Secret | None = None) -> str:
    with pytest.raises(HostError) as error:
        database.ask(query, lambda: word or password())
    assert error.value.reason == "InventoryUnreadable"
    assert PASSWORD not in str(error.value)
    return str(error.value)


def test_the_fields_tables(server: Server) -> None:
    for url in (server.url, server.by_socket):
        database = Database(url, 5.0)
        found = database.ask(QUERY, password)
        assert found.columns == ("vm", "disk_id", "size", "name", "path", "vcenter")
        assert sorted(map(tuple, found.rows)) == [
            ("ctx-1", "disk-2000", 512, "pg1", "/DC/vm/pg1", "vc.example"),
            ("ctx-1", "disk-2001", 1024, "pg1", "/DC/vm/pg1", "vc.example"),
        ]
        database.close()


def test_what_is_written_into_the_tables_is_seen_over_the_same_connection(
    server: Server, database: Database
) -> None:
    """A kept connection that stays in its transaction would see the tables of then for ever."""
    asked: list[str] = []

    def once() -> Secret:
        asked.append("")
        return password()

    assert len(database.ask(QUERY, once).rows) == 2
    tables = Tables(server.as_user())
    tables.disk("ctx-1", "disk-2002", 512)
    tables.own.close()
    assert len(database.ask(QUERY, once).rows) == 3
    assert len(asked) == 1


@pytest.mark.parametrize(
    "write",
    [
        "DELETE FROM vm_disks",
        "UPDATE vm_disks SET capacity_bytes = 1",
        "DROP TABLE vm_disks",
        "CREATE TABLE more (a INT)",
        "SELECT 1; DELETE FROM vm_disks",
        "COMMIT; DELETE FROM vm_disks",
        "SET SESSION TRANSACTION READ WRITE",
        "COMMIT",
    ],
)
def test_a_query_that_writes_is_refused_by_the_server(
    server: Server, database: Database, write: str
) -> None:
    """The user of the tests may write: what refuses it is the transaction."""
    for fresh in (False, True):
        if fresh:
            database.ask(QUERY, password)  # over a connection that is kept
        refused(database, write)
        assert len(database.ask(QUERY, password).rows) == 2


def test_what_refuses_a_write_says_so(database: Database) -> None:
    says(refused(database, "DELETE FROM vm_disks").lower(), "cannot execute", "transaction", "read")


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("SELECT * FROM vm_nothing", "vm_nothing"),
        ("SELECT capacity FROM vm_disks", "capacity"),
        ("SELEKT 1", "syntax"),
    ],
)
def test_another_schema_is_named(database: Database, query: str, word: str) -> None:
    assert word in refused(database, query)


def test_a_percent_sign_and_a_colon_are_what_they_are(database: Database) -> None:
    found = database.ask("SELECT context_id FROM vm_replication_contexts WHERE vm_name LIKE 'p%'"
                         " AND vm_path <> ':name' AND vm_path <> '%s'", password)  # fmt: skip
    assert [tuple(one) for one in found.rows] == [("ctx-1",)]


def test_a_wrong_password(database: Database) -> None:
    said = refused(database, QUERY, Secret("another-w0rd"))
    says(said, "cannot connect", "hub")
    assert "another-w0rd" not in said


def test_the_server_ends_a_query_that_takes_too_long(server: Server) -> None:
    database = Database(server.url, 0.5)
    assert "time" in refused(database, SLOW[server.kind])
    database.timeout = 5.0
    assert len(database.ask(QUERY, password).rows) == 2
    database.close()


def test_a_server_that_ended_meanwhile_is_asked_over_a_new_connection(
    server: Server, database: Database
) -> None:
    database.ask(QUERY, password)
    server.stop()
    says(refused(database, QUERY), "cannot connect")
    server.start()
    assert len(database.ask(QUERY, password).rows) == 2
    server.stop()
    server.start()
    assert len(database.ask(QUERY, password).rows) == 2  # the one that was kept is dead


# -- SQLite


@pytest.fixture
def sqlite(tmp_path: Path) -> Path:
    path = tmp_path / "a b?c.db"
    with sqlite3.connect(path) as connection:
        tables = Tables(connection, "?")
        tables.create()
        tables.vm("ctx-1", [512])
    connection.close()
    return path


def of(path: Path) -> Database:
    return Database(f"sqlite://{path}".replace("?", "%3F").replace(" ", "%20"), 5.0)


def nothing() -> None:
    return None


def test_a_file_of_sqlite(sqlite: Path) -> None:
    database = of(sqlite)
    for _ in range(2):
        assert [row[:3] for row in database.ask(QUERY, nothing).rows] == [
            ("ctx-1", "disk-2000", 512)
        ]
    with sqlite3.connect(sqlite) as connection:  # nobody is kept from writing
        connection.execute("DELETE FROM vm_disks")
    connection.close()
    assert [row[1] for row in database.ask(QUERY, nothing).rows] == [None]
    database.close()


def test_a_file_of_sqlite_is_not_written_nor_made(sqlite: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    for query in (
        "DELETE FROM vm_disks",
        f"ATTACH DATABASE '{other}' AS x",
        f"VACUUM INTO '{other}'",
    ):
        database = of(sqlite)
        with pytest.raises(HostError):
            database.ask(query, nothing)
        database.close()
    with pytest.raises(HostError, match=r"there is no file .*/other\.db"):
        of(other).ask(QUERY, nothing)
    assert not other.exists()


def test_a_query_of_sqlite_that_takes_too_long(sqlite: Path) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    database = Database(str(of(sqlite).url), 0.2)
    with pytest.raises(HostError, match="interrupted"):
        database.ask(endless, nothing)
    database.close()


def test_a_driver_is_loaded_only_where_its_database_is_asked() -> None:
    code = (
        "import sys, reconciler.inventories\n"
        "print({'pymysql', 'psycopg', 'sqlite3', 'pyrage'} & set(sys.modules))"
    )
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
