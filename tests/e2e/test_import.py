"""`reconciler import` on real servers of others, and of this hub after it forgot them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reconciler.core.foreign import document
from reconciler.core.mark import Mark
from reconciler.core.units import Port
from reconciler.foreign import strangers
from reconciler.host import nbd, proc
from reconciler.loop import current, load_settings
from tests.e2e.site import Appliance, Site, until
from tests.e2e.watching import watching
from tests.nbd_client import Client
from tests.ports import Dealer

MIB = 1 << 20
NBD = "qemu-nbd"
ME = os.getpid()
SEVEN, EIGHT, NINE, LOOK = f"ctx-{ME}7", f"ctx-{ME}8", f"ctx-{ME}9", f"look-{ME}"
"""VMs of this process alone: others may test here too, and all servers of the machine are seen."""


class Old:
    """Another hub's servers, as it starts them."""

    def __init__(self, site: Site, ports: range) -> None:
        self.site, self.ports = site, iter(ports)
        self.pids: dict[int, Port] = {}

    def serve(self, image: str, export: str, *more: str, format_: str = "qcow2") -> Port:
        path = self.site.folder / "repository" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            subprocess.run(
                ["qemu-img", "create", "-q", "-f", format_, str(path), str(MIB)], check=True
            )
        port = next(self.ports)
        process = self.site.other(
            NBD, "-b", "127.0.0.1", "-p", str(port), "-f", format_, "-x", export, *more, str(path)
        )
        until(lambda: self.listens(port), "an old server")
        self.pids[process.pid] = port
        return port

    def listens(self, port: Port) -> bool:
        return any(one.listening and one.port == port for one in proc.tcp_sockets())

    def untouched(self) -> bool:
        return all(proc.identify(pid) and self.listens(port) for pid, port in self.pids.items())


@pytest.fixture
def old(site: Site, dealer: Dealer) -> Iterator[Old]:
    found = Old(site, dealer.deal(6))
    yield found
    assert found.untouched()


def servers(site: Site) -> dict[str, dict[str, Any]]:
    """Export name → what is said of its server, without a process of its own for it."""
    settings = load_settings(str(site.folder / "reconciler.yaml"), {})
    seen = strangers(settings, current(settings))
    told = json.loads(json.dumps(document(seen, settings, "")))["servers"]
    mine = [one for one in told if str(site.folder) in one["argv"]]  # others may test here too
    return {one["export"]: one for one in mine}


def test_read_only_servers_are_imported_and_served_beside(site: Site, old: Old) -> None:
    ports = [
        old.serve(f"{SEVEN}/{key}/a.qcow2", f"{SEVEN}-disk{i}", "-r", "-t", "-e", "5")
        for i, key in enumerate((2000, 2001))
    ]
    site.run("import", SEVEN, "--out", "specs/old.yaml")
    assert "1 VM valid, 0 errors" in site.run("validate")
    site.apply()
    assert set(site.pids()) == {(f"{SEVEN}-restore", 2000), (f"{SEVEN}-restore", 2001)}
    ours = [mark.port for mark in site.servers().values()]
    for i in (0, 1):
        with (
            Client(ports[i], f"{SEVEN}-disk{i}"),
            Client(sorted(ours)[i], f"{SEVEN}-disk{i}") as two,
        ):
            assert two.read(0, 512) == bytes(512)
    assert SEVEN not in {one["vm"] for one in servers(site).values() if one["hub"] == site.hub}


def test_what_is_known_and_how(site: Site, old: Old) -> None:
    old.serve(f"{SEVEN}/2000/a.qcow2", f"{SEVEN}-disk0", "-r", "-t", "-e", "5")
    old.serve(f"{EIGHT}/disk-0/b.qcow2", f"{EIGHT}-disk0")
    found = servers(site)
    seven, eight = found[f"{SEVEN}-disk0"], found[f"{EIGHT}-disk0"]
    assert (seven["vm"], seven["disk"], seven["size"]) == (SEVEN, "2000", MIB)
    assert (seven["repository"], seven["format"], seven["hub"]) == ("local", "qcow2", None)
    assert (eight["vm"], eight["disk"], eight["position"]) == (EIGHT, None, 0)
    assert eight["size"] == MIB  # by its header: it was not asked
    text = site.run("import", EIGHT)
    assert "bytes by the image's header" in text
    assert "key:   # TODO" in text
    site.run("import", SEVEN, EIGHT, "--out", "specs/old.yaml")
    wrong = site.run("validate", code=65)
    assert "specs/old.yaml" in wrong
    assert "key: expected a whole number" in wrong
    assert f"did you mean '{EIGHT}'?" in site.run("import", f"{EIGHT}8", code=64)


def test_a_server_that_a_question_would_disturb_is_not_asked(site: Site, old: Old) -> None:
    """One slot, taken by a client; and one that ends with its first client."""
    full = old.serve(f"{SEVEN}/2000/a.qcow2", f"{SEVEN}-disk0", "-t")
    once = old.serve(f"{EIGHT}/2000/b.qcow2", f"{EIGHT}-disk0")
    with Client(full, f"{SEVEN}-disk0") as client:
        found = servers(site)
        assert found[f"{SEVEN}-disk0"]["clients"] == 1
        assert found[f"{SEVEN}-disk0"]["size"] == MIB
        client.write(0, b"x" * 512)
    assert old.listens(once)


def test_a_spec_is_never_written_over_another(site: Site, old: Old) -> None:
    old.serve(f"{SEVEN}/2000/a.qcow2", f"{SEVEN}-disk0", "-r", "-t")
    (site.specs / "mine.yaml").write_text("vms: []\n")
    out = site.run("import", "--out", "specs/mine.yaml", code=1)
    assert "specs/mine.yaml is there already" in out
    assert (site.specs / "mine.yaml").read_text() == "vms: []\n"


def test_no_secret_of_an_argv_is_shown_and_no_line_of_it_becomes_yaml(site: Site, old: Old) -> None:
    secret = ("--object", "secret,id=s,data=hunter22")
    old.serve(f"{SEVEN}/2000/a.qcow2", "a\n  - name: evil", "-r", "-t", *secret)
    for arguments in (("import",), ("import", "-o", "json"), ("import", "--adopt")):
        out = site.run(*arguments, code=None)
        assert "hunter22" not in out
        assert "\n  - name: evil" not in out
    site.run("import", SEVEN, "--out", "specs/old.yaml")
    assert "1 VM valid" in site.run("validate")


def test_adopt_takes_over_no_stranger_and_says_why(site: Site, old: Old) -> None:
    old.serve(f"{SEVEN}/2000/a.qcow2", f"{SEVEN}-disk0", "-r", "-t", "-e", "5")
    old.serve(f"{EIGHT}/2000/b.qcow2", f"{EIGHT}-disk0")
    mark = Mark("elsewhere", NINE, 2000, "r1", 1, 1)
    old.serve(f"{NINE}/2000/r1.qcow2", f"{NINE}-r1-disk0", "-r", "-D", str(mark))
    out = site.run("import", "--adopt", "-y", SEVEN, EIGHT, NINE, code=4)
    assert "it carries no mark, and a running server cannot be given one" in out
    assert "it is writable" in out
    assert "--shared 1" in out
    assert "the mark of hub elsewhere" in out
    assert f"reconciler backup {EIGHT} --run NAME --apply" in out
    assert not site.servers()
    assert not (site.folder / "state").exists()


def restore(site: Site) -> dict[str, Any]:
    """A restore of two images that are there."""
    for key in (2000, 2001):
        path = site.image("ctx-1", key)
        path.parent.mkdir(parents=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    disks = [{"key": key, "image": f"ctx-1/{key}/r1.qcow2"} for key in (2000, 2001)]
    return {"name": LOOK, "for": "restore", "disks": disks}


def test_what_the_hub_forgot_is_adopted_by_its_mark(site: Site) -> None:
    site.spec(restore(site))
    site.apply()
    assert not any(one["hub"] == site.hub for one in servers(site).values())  # it knows them
    before = site.servers()
    shutil.rmtree(site.folder / "state")
    assert {one["vm"] for one in servers(site).values()} == {LOOK}
    out = site.run("import", "--adopt", LOOK, "-y")
    assert "adopt" in out
    assert site.servers() == before
    assert site.status()[LOOK]["disks"][0]["pid"] in {one.pid for one in before}
    assert not servers(site)
    assert site.changes() == []  # the spec as it was written says the same


def test_a_backup_that_the_hub_forgot_is_adopted_and_not_called_again(
    site: Site, appliance: Appliance
) -> None:
    site.inventory({"ctx-1": {2000: MIB, 2001: MIB}})
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply()
    before = site.servers()
    shutil.rmtree(site.folder / "state")
    site.run("import", "--adopt", "-y", "ctx-1", code=7)  # what became of the call is not known
    assert site.servers() == before
    assert len(appliance.starts()) == 1
    assert site.status()["ctx-1"]["call"]["state"] == "UNKNOWN"


def test_adopt_does_nothing_but_adopt(site: Site) -> None:
    """One that would be started anew, since the config asks for other options by now."""
    site.spec(restore(site))
    site.apply()
    before = site.servers()
    shutil.rmtree(site.folder / "state")
    site.write_config(qemu_nbd={"shared": 7})
    out = site.run("import", "--adopt", "-y", LOOK, code=4)
    assert f"it would also restart {LOOK} disk 2000" in out
    assert site.servers() == before
    assert not (site.folder / "state" / "state.db").exists()


def test_what_is_not_known_of_a_marked_server_is_asked_for(
    site: Site, appliance: Appliance
) -> None:
    """No inventory, and its path in vCenter was in the spec alone."""
    site.spec(site.vm("ctx-1"))
    site.apply()
    before = site.servers()
    shutil.rmtree(site.folder / "state")
    out = site.run("import", "--adopt", "-y", "ctx-1", code=65)
    assert "vm: expected" in out
    assert "reconciler import --out FILE" in out
    assert site.servers() == before


def test_a_daemon_does_it_where_one_holds_the_hub(site: Site) -> None:
    spec = site.spec(restore(site))
    site.apply()
    before = site.servers()
    spec.unlink()
    shutil.rmtree(site.folder / "state")
    with watching(site, "--allow-empty"):
        site.run("import", "--adopt", "-y", LOOK)
        assert site.servers() == before
        assert not servers(site)


def test_a_handshake_does_not_end_a_server_without_persistent(old: Old) -> None:
    """So says QEMU 7.2; we do not rely on it, and would want to know if it changed."""
    port = old.serve(f"{SEVEN}/2000/a.qcow2", f"{SEVEN}-disk0")
    answer = nbd.handshake([nbd.Target("127.0.0.1", port, f"{SEVEN}-disk0")], 5.0)[0]
    assert answer.size == MIB
    with socket.create_connection(("127.0.0.1", port), 5.0) as near:
        assert near.recv(8) == b"NBDMAGIC"


def test_a_relative_image_is_found_among_what_the_server_holds(site: Site, old: Old) -> None:
    old.serve(f"{SEVEN}/2000/a.qcow2", "x-disk0", "-r", "-t")
    image = site.folder / "repository" / SEVEN / "2000" / "a.qcow2"
    port = next(old.ports)
    process = subprocess.Popen(
        [NBD, "-b", "127.0.0.1", "-p", str(port), "-r", "-t", "-f", "qcow2", "-x", "y-disk0",
         "a.qcow2"],
        cwd=image.parent,
    )  # fmt: skip
    site.others.append(process)
    until(lambda: old.listens(port), "a server")
    said = site.json("import")
    (one,) = [one for one in said["servers"] if one["pid"] == process.pid]
    assert one["image"] == str(Path(image).resolve())
    assert (one["vm"], one["disk"]) == (SEVEN, "2000")
