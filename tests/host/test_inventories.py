"""The inventory is read with a deadline, and what it said last is remembered."""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler import inventories
from reconciler.core.settings import SecretRef, Settings, SqlInventory
from reconciler.inventories import Answer, Reader, reader_of
from tests.core.builders import a_settings, says
from tests.databases import PASSWORD, Server, Tables

MIB = 1 << 20


class Site:
    """A state directory and an inventory in SQLite."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.state.mkdir()
        self.readers: list[Reader] = []
        self.file = folder / "inventory.db"
        self.connection = sqlite3.connect(self.file, isolation_level=None)
        self.tables = Tables(self.connection, "?")
        self.tables.create()
        self.settings = self.by(f"sqlite://{self.file}")

    def by(self, url: str, timeout: float = 5.0, query: str = "") -> Settings:
        password = folder_file(self.folder / "password", PASSWORD)
        vcenters = {
            "vc1": replace(a_settings().vcenters["vc1"], host="vc.example"),
            "vc2": replace(a_settings().vcenters["vc1"], host="vc2.example"),
        }
        sql = SqlInventory(url=url, password=password, query=query, timeout=timeout)
        return a_settings(state=str(self.state), inventory_sql=sql, vcenters=vcenters)

    def reader(self, settings: Settings | None = None) -> Reader:
        """As another process has it."""
        found = Reader(settings or self.settings, {})
        self.readers.append(found)
        return found


def folder_file(path: Path, text: str) -> SecretRef:
    path.write_text(text)
    return SecretRef("file", str(path))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path)
    found.tables.vm("ctx-1", [MIB, 2 * MIB])
    found.tables.vm("ctx-2")
    yield found
    for reader in found.readers:
        reader.close()
    found.connection.close()


def disks(answer: Answer, vm: str = "ctx-1") -> list[tuple[int, int]]:
    assert answer.inventory is not None
    return [(disk.key, disk.size) for disk in answer.inventory.vms[vm].disks]


def test_a_good_answer(site: Site) -> None:
    reader = site.reader()
    found = reader.read()
    assert disks(found) == [(2000, MIB), (2001, 2 * MIB)]
    assert disks(found, "ctx-2") == []
    assert (found.diagnostics, found.error) == ((), "")
    assert reader.read() == found
    site.tables.disk("ctx-1", "disk-2002", 512)
    again = reader.read()
    assert len(disks(again)) == 3
    assert again.digest != found.digest


def test_within_one_reading_of_the_source_it_is_asked_once(site: Site) -> None:
    reader = site.reader()
    began = time.monotonic()
    first = reader.read(since=began)
    site.tables.disk("ctx-1", "disk-2002", 512)
    assert reader.read(since=began) == first
    assert reader.read(since=time.monotonic()) != first


def test_without_an_answer_the_last_good_one_is_given_out_as_stale(site: Site) -> None:
    reader = site.reader()
    good = reader.read()
    os.rename(site.file, f"{site.file}.away")
    reader.close()  # or SQLite goes on with the open file
    found = reader.read()
    assert disks(found) == disks(good)
    assert found.digest != good.digest
    says(found.error, "there is no file")
    (told,) = found.diagnostics
    assert told.severity == "warning"
    says(told.summary, f"cannot read the inventory sqlite://{site.file}", "no run begins")
    assert found.inventory is not None
    says(
        found.inventory.told(), f"sqlite://{site.file}: it was read last at 20", "there is no file"
    )
    assert reader.read() == found  # the words are the same each time
    os.rename(f"{site.file}.away", site.file)
    assert reader.read() == good


def test_the_last_good_answer_survives_the_process(site: Site) -> None:
    first = site.reader()
    good = first.read()
    assert not (site.state / "inventory.json").exists()  # who only looks writes nothing
    first.remember()
    path = site.state / "inventory.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert PASSWORD not in path.read_text()
    at = path.stat().st_mtime
    os.rename(site.file, f"{site.file}.away")
    found = site.reader().read()
    assert disks(found) == disks(good)
    assert found.inventory is not None and found.inventory.stale is not None
    assert found.inventory.stale.since == pytest.approx(at)


def test_that_it_was_read_again_is_remembered_too(site: Site) -> None:
    reader = site.reader()
    reader.read()
    reader.remember()
    path = site.state / "inventory.json"
    before = path.stat()
    os.utime(path, (1, 1))
    reader.read()
    reader.remember()
    after = path.stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)  # not written anew
    assert after.st_mtime >= before.st_mtime


BROKEN = {
    "nothing": "",
    "another format": '{"format": 99}',
    "half": '{"format": 1, "ident',
    "a list": "[]",
    "no text": "\xff",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_what_cannot_be_read_of_it_is_nothing(site: Site, text: str) -> None:
    (site.state / "inventory.json").write_bytes(text.encode("latin-1"))
    os.rename(site.file, f"{site.file}.away")
    found = site.reader().read()
    assert found.inventory is not None
    assert not found.inventory.readable
    assert [one.severity for one in found.diagnostics] == ["error"]
    says(found.inventory.told(), "it was never read")


def test_the_answer_of_another_inventory_is_not_this_ones(site: Site) -> None:
    first = site.reader()
    first.read()
    first.remember()
    found = site.reader(site.by(f"sqlite://{site.folder}/other.db")).read()
    assert found.inventory is not None
    assert not found.inventory.readable


def test_an_empty_answer_is_not_believed(site: Site) -> None:
    reader = site.reader()
    good = reader.read()
    for table in ("vm_disks", "vm_replication_contexts"):
        site.tables.execute(f"DELETE FROM {table}")
    found = reader.read()
    says(found.error, "it knows no VM at all, which is not believed")
    assert disks(found) == disks(good)


def test_a_query_of_ones_own(site: Site) -> None:
    query = (
        "SELECT context_id AS vm, 2000 AS key, 512 AS size, vm_name AS name, vm_path AS path, "
        "'vc2' AS vcenter, 'more' AS more FROM vm_replication_contexts"
    )
    found = site.reader(site.by(f"sqlite://{site.file}", query=query)).read()
    assert disks(found, "ctx-2") == [(2000, 512)]
    assert found.inventory is not None
    assert found.inventory.vms["ctx-1"].vm.vcenter == "vc2"


def test_a_query_without_the_columns(site: Site) -> None:
    query = "SELECT context_id AS vm, vm_name AS name FROM vm_replication_contexts"
    found = site.reader(site.by(f"sqlite://{site.file}", query=query)).read()
    says(found.error, "no column key, size, path, vcenter", "it has vm, name")


# -- servers


@pytest.fixture(params=["mariadb", "postgres"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    found: Server = request.getfixturevalue(request.param)
    tables = found.tables()
    tables.vm("ctx-1", [MIB], display="pg1")
    tables.vm("ctx-2", [2 * MIB], display="pg1", host="vc2.example")
    tables.vm("ctx-3", [None])
    yield found
    tables.own.close()


def test_a_server_with_the_fields_tables(site: Site, server: Server) -> None:
    found = site.reader(site.by(server.url)).read()
    assert found.diagnostics == ()
    assert found.inventory is not None
    assert found.inventory.origin == f"{server.kind}://127.0.0.1:{server.port}/migratekit_oma"
    names = {name: (vm.vm.name, vm.vm.vcenter) for name, vm in found.inventory.vms.items()}
    assert names == {"ctx-1": ("pg1", "vc1"), "ctx-2": ("pg1", "vc2")}
    says(found.inventory.unusable["ctx-3"], "disk 2000", "NULL")


def test_a_server_that_stands_still_holds_nobody_up(site: Site, server: Server) -> None:
    reader = site.reader(site.by(server.url, timeout=0.5))
    began = time.monotonic()
    while (good := reader.read()).error:  # a slow machine, whose answer would come in between
        assert time.monotonic() - began < 60
    with server.silent():
        began = time.monotonic()
        for _ in range(3):
            found = reader.read()
            assert disks(found) == disks(good)
            says(found.error, "no answer within 500 ms")
        assert time.monotonic() - began < 20  # it stands still until we let it go on
        # Who asks it is freed, although it never says anything.
        first = [one for one in threading.enumerate() if one.name == "inventory"]
        while any(one.is_alive() for one in first):
            assert time.monotonic() - began < 60
            time.sleep(0.1)
            reader.read()
    while reader.read() != good:
        assert time.monotonic() - began < 60


def test_a_slow_query_is_given_up(site: Site, server: Server) -> None:
    slow = "SLEEP(30)" if server.kind == "mysql" else "CAST(pg_sleep(30) AS TEXT)"
    query = (
        f"SELECT {slow} AS vm, 1 AS size, 2000 AS disk_id, '' AS name, '' AS path, '' AS vcenter"
    )
    found = site.reader(site.by(server.url, timeout=0.5, query=query)).read()
    assert found.error


def test_a_password_that_cannot_be_read_is_told(site: Site, server: Server) -> None:
    settings = site.by(server.url)
    (site.folder / "password").unlink()
    found = site.reader(settings).read()
    says(found.error, "cannot read the secret file", "No such file")


def test_who_accepts_and_never_answers(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        for kind in ("mysql", "postgresql"):
            url = f"{kind}://hub@127.0.0.1:{mute.getsockname()[1]}/db"
            found = site.reader(site.by(url, timeout=0.3)).read()
            says(found.error, "no answer within 300 ms")


# -- the one of this process


def test_all_of_a_process_share_one_reader_until_the_config_changes(site: Site) -> None:
    try:
        first = reader_of(site.settings, {})
        assert reader_of(replace(site.settings), {}) is first
        assert reader_of(site.by(f"sqlite://{site.file}", timeout=7.0), {}) is not first
        assert reader_of(a_settings(state="/elsewhere"), {}).read() == Answer()
    finally:
        inventories.forget()
