"""A hub whose disks are known by a database, on real servers: the database goes, backups stay."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from typing import Any

import pyrage
import pytest

from tests.databases import PASSWORD, Server, Tables
from tests.e2e.site import Appliance, Site, until
from tests.e2e.watching import watching

MIB = 1 << 20


def asking(name: str, run: str = "r1") -> dict[str, Any]:
    return {"name": name, "disks": "inventory", "backup": {"run": run}}


class Known:
    """The site's inventory, in a database."""

    def __init__(self, site: Site, tables: Tables, url: str, **sql: Any) -> None:
        self.site, self.tables = site, tables
        site.write_config(inventory={"sql": {"url": url, "timeout": "5s", **sql}})


@pytest.fixture
def sqlite(site: Site) -> Iterator[Known]:
    connection = sqlite3.connect(site.folder / "inventory.db", isolation_level=None)
    tables = Tables(connection, "?")
    tables.create()
    yield Known(site, tables, f"sqlite://{site.folder}/inventory.db")
    connection.close()


@pytest.fixture
def server(mariadb: Server) -> Server:
    """What differs between servers is tested without a hub: see tests/host/test_sql.py."""
    return mariadb


@pytest.fixture
def known(site: Site, server: Server) -> Iterator[Known]:
    (site.folder / "db-password").write_text(PASSWORD + "\n")
    tables = server.tables()
    yield Known(site, tables, server.url, password={"file": "db-password"})
    tables.own.close()


def away(site: Site) -> None:
    (site.folder / "inventory.db").rename(site.folder / "away.db")


def test_disks_and_addresses_come_from_the_database(
    site: Site, appliance: Appliance, known: Known
) -> None:
    known.tables.vm("ctx-1", [2 * MIB, MIB], keys=["disk-2001", "disk-2000"], display="pg1")
    known.tables.vm("ctx-2", [None])
    site.spec(asking("ctx-1"))
    said = site.apply()
    assert PASSWORD not in said
    (start,) = appliance.starts()
    assert "2000:nbd://" in json.dumps(start)
    disks = site.status()["ctx-1"]["disks"]
    assert [(one["key"], one["export"]) for one in disks] == [
        ("2000", "ctx-1-r1-disk0"),
        ("2001", "ctx-1-r1-disk1"),
    ]
    assert all(one["ready"] for one in disks)
    assert "No changes" in site.run("plan") or not site.changes()
    found = site.run("validate")
    assert "VM ctx-2: disk 2000: its size is not known" in found


def test_the_server_stops_and_the_exports_stay(
    site: Site, appliance: Appliance, known: Known, server: Server
) -> None:
    known.tables.vm("ctx-1", [MIB])
    known.tables.vm("ctx-2", [MIB])
    site.spec(asking("ctx-1"))
    site.apply()
    pids = site.pids()
    server.stop()
    site.spec(asking("ctx-1"), asking("ctx-2"))
    said = site.apply(code=3)
    assert "InventoryStale" in said
    assert "cannot connect" in said
    assert PASSWORD not in said
    assert site.pids() == pids
    assert not site.image("ctx-2").exists()
    assert len(appliance.starts()) == 1
    assert site.condition("ctx-2", "Stalled")[1] == "InventoryStale"
    site.kill(pids["ctx-1", 2000])  # what has begun is mended without it
    site.apply(code=3)
    assert site.pids().keys() == pids.keys()
    server.start()
    site.apply()
    assert {vm for vm, _ in site.pids()} == {"ctx-1", "ctx-2"}
    assert len(appliance.starts()) == 2


def test_a_run_that_was_not_called_yet_is_not_called_without_it(
    site: Site, appliance: Appliance, sqlite: Known
) -> None:
    """Its exports are up, and a disk may have been added since."""
    sqlite.tables.vm("ctx-1", [MIB])
    site.spec(asking("ctx-1"))
    appliance.misbehave("sickens")
    site.apply(code=None)
    pids = site.pids()
    assert pids
    away(site)
    appliance.misbehave("none")
    assert "InventoryStale" in site.apply(code=None)
    assert appliance.starts() == []
    assert site.pids() == pids
    (site.folder / "away.db").rename(site.folder / "inventory.db")
    site.apply()
    assert len(appliance.starts()) == 1


def test_listed_disks_are_no_way_past_it(site: Site, appliance: Appliance, sqlite: Known) -> None:
    sqlite.tables.vm("ctx-1", [MIB, MIB])
    away(site)
    site.spec(site.vm("ctx-1"))
    said = site.apply(code=65)
    assert "InventoryStale" in said
    assert "it was never read" in said
    assert appliance.starts() == []


def test_a_disk_that_was_added_is_seen_at_the_next_plan(
    site: Site, appliance: Appliance, sqlite: Known
) -> None:
    sqlite.tables.vm("ctx-1", [MIB])
    sqlite.tables.vm("ctx-2", [MIB])
    site.spec(asking("ctx-1"), site.vm("ctx-2", [MIB]))
    site.apply()
    pids = site.pids()
    for vm in ("ctx-1", "ctx-2"):
        sqlite.tables.disk(vm, "disk-2001", MIB)
    said = site.apply(code=None)
    assert "RunChanged" in said  # one that has begun is not another
    assert "the inventory knows 2000 (1 MiB), 2001 (1 MiB)" in said
    assert site.pids() == pids
    for vm in ("ctx-1", "ctx-2"):
        site.run("resolve", vm, "--failed", "-y", "--reason", "test")
    site.spec(asking("ctx-1", "r2"), site.vm("ctx-2", [MIB], backup={"run": "r2"}))
    said = site.apply(code=65)
    assert {key for vm, key in site.pids() if vm == "ctx-1"} == {2000, 2001}
    assert "VM ctx-2: the spec lists the disks 2000 (1 MiB)" in said


def test_who_only_looks_writes_nothing(site: Site, appliance: Appliance, sqlite: Known) -> None:
    sqlite.tables.vm("ctx-1", [MIB])
    site.spec(asking("ctx-1"))
    for command in ("plan", "validate"):
        site.run(command, code=None)
    assert not (site.folder / "state").exists()
    site.apply()
    assert (site.folder / "state" / "inventory.json").exists()


def test_a_password_in_the_url_is_refused_and_not_repeated(site: Site) -> None:
    site.spec(site.vm("ctx-1"))
    for command, url in (("plan", "hub:hunter2@db/oma"), ("apply", "hub:x/hunter2@db:port/oma")):
        site.write_config(inventory={"sql": {"url": f"mysql://{url}"}})
        said = site.run(command, code=78)
        assert "a URL with a password in it" in said
        assert "write `password: {file: …}`" in said
        assert "reconciler.yaml" in said
        assert "hunter2" not in said


def test_a_daemon_sees_what_the_database_says(
    site: Site, appliance: Appliance, known: Known, server: Server
) -> None:
    known.tables.vm("ctx-1", [MIB])
    site.write_config(loop={"resync": "500ms"})
    site.spec(asking("ctx-1"), asking("ctx-2"))
    with watching(site) as daemon:
        until(lambda: site.pids().keys() == {("ctx-1", 2000)}, "ctx-1")
        known.tables.vm("ctx-2", [MIB, MIB])  # nobody saves a file
        keys = {("ctx-1", 2000), ("ctx-2", 2000), ("ctx-2", 2001)}
        until(lambda: site.pids().keys() == keys, "ctx-2")
        until(lambda: len(appliance.starts()) == 2, "both calls")
        pids = site.pids()
        server.stop()
        until(lambda: site.json("status")["source"]["inventory"]["error"], "stale")
        text = site.run("status")
        assert "was not read since 20" in text
        site.spec(asking("ctx-1"), asking("ctx-2"), asking("ctx-3"))
        site.run("apply", "-y", code=None)  # the daemon's work, by the daemon's inventory
        assert site.pids() == pids
        site.kill(pids["ctx-1", 2000])
        until(lambda: site.pids().keys() == keys, "its heal")
        server.start()
        known.tables.own.close()
        known.tables.own = server.as_user()
        known.tables.vm("ctx-3", [MIB])
        until(lambda: ("ctx-3", 2000) in site.pids(), "ctx-3")
        until(lambda: not site.json("status")["source"]["inventory"]["error"], "readable")
        assert "InventoryStale" in site.run("events")
        assert PASSWORD not in daemon.log
    assert len(appliance.starts()) == 3


def test_secrets_in_the_config(site: Site, appliance: Appliance, known: Known) -> None:
    """Both passwords are in the config, encrypted, and `secret encrypt` made them."""
    key = pyrage.x25519.Identity.generate()
    (site.folder / "key.txt").write_text(f"# a key\n{key}\n")
    (site.folder / "secret").write_text(PASSWORD)
    sealed = []
    for file in ("secret", "password"):
        said = site.run(
            "secret", "encrypt", "-r", str(key.to_public()), "--file", str(site.folder / file)
        )
        first, *lines = said.splitlines()
        assert first == "age: |"
        sealed.append("\n".join(line.removeprefix("  ") for line in lines))
    for path in ("secret", "password", "db-password"):
        (site.folder / path).unlink()
    url = site.config["inventory"]["sql"]["url"]
    site.write_config(
        secrets={"age_identity": {"file": "key.txt"}},
        inventory={"sql": {"url": url, "password": {"age": sealed[0]}}},
        vcenters={"vc1": {"host": "vc.example", "user": "u", "password": {"age": sealed[1]}}},
    )
    known.tables.vm("ctx-1", [MIB])
    site.spec(asking("ctx-1"))
    said = site.apply()
    assert len(appliance.starts()) == 1
    for one in site.folder.joinpath("state").rglob("*"):
        if one.is_file():
            content = one.read_bytes()
            assert PASSWORD.encode() not in content, one
            assert sealed[0].splitlines()[1].encode() not in content, one
    assert PASSWORD not in said


def test_the_identity_of_a_vm_with_a_key_that_does_not_fit(
    site: Site, appliance: Appliance
) -> None:
    """Servers come up, and the call waits for the secret."""
    one, other = pyrage.x25519.Identity.generate(), pyrage.x25519.Identity.generate()
    (site.folder / "key.txt").write_text(f"{one}\n")
    text = pyrage.encrypt(b"x", [other.to_public()], armored=True).decode()
    site.write_config(
        secrets={"age_identity": {"file": "key.txt"}},
        vcenters={"vc1": {"host": "vc.example", "user": "u", "password": {"age": text}}},
    )
    site.spec(site.vm("ctx-1"))
    assert "0 errors" in site.run("validate")  # where configs are reviewed is no key
    checked = site.run("doctor", "--only", "secrets", code=1)
    assert "was encrypted for none of the 1 keys in file" in checked
    said = site.apply(code=1)
    assert "SecretUnreadable" in said
    assert "was encrypted for none of the 1 keys in file" in said
    assert "the secret at reconciler.yaml:" in said
    assert site.pids()
    assert appliance.starts() == []
