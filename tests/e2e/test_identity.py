"""Whose a server is: two hubs on one machine, a new qemu-nbd, slots that are all taken."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from tests.e2e import crashes
from tests.e2e.site import Appliance, Site, until

MIB: Final = 1 << 20
SLOTS: Final = 10
"""What `--shared` is by default."""


@pytest.fixture
def other(site: Site, appliance: Appliance, tmp_path: Path) -> Iterator[Site]:
    """A second hub on this machine: its own name, state and repository, the same range of ports."""
    folder = tmp_path / "other"
    folder.mkdir()
    found = Site(folder, site.ports)
    found.appliance_at(appliance.url)
    yield found
    found.clean_up()


def test_two_hubs_on_one_machine_never_touch_each_other(
    site: Site, other: Site, appliance: Appliance
) -> None:
    """Both apply, heal, stop and prune in turn, with VMs of one name in one range of ports."""
    for one in (site, other):
        one.spec(one.vm("ctx-1", [MIB, MIB]), file="a.yaml")
        one.spec(one.vm("ctx-2", vm={"path": "/DC/vm/two", "vcenter": "vc1"}), file="b.yaml")

    def untouched(acting: Site, idle: Site, *command: str, code: int | None = 0) -> str:
        before, text = idle.servers(), acting.run(*command, code=code)
        assert idle.servers() == before
        assert acting.listening() == acting_and(acting, idle)
        return text

    for acting, idle in ((site, other), (other, site)):
        untouched(acting, idle, "apply", "-y")
    assert len(site.servers()) == len(other.servers()) == 3
    assert f"a qemu-nbd of hub {other.hub}" in site.run("plan")
    for acting, idle in ((site, other), (other, site)):
        acting.kill(acting.pids()["ctx-1", 2001])
        untouched(acting, idle, "apply", "-y")
        assert len(acting.servers()) == 3
    for acting, idle in ((site, other), (other, site)):
        untouched(acting, idle, "stop", "ctx-1", "--cancel-run", "-y")
        assert len(acting.servers()) == 1
        untouched(acting, idle, "resolve", "ctx-2", "--failed", "--reason", "a test", "-y")
    for acting, idle in ((site, other), (other, site)):
        (acting.specs / "b.yaml").unlink()
        untouched(acting, idle, "apply", "-y", "--prune", code=3)  # the run of ctx-1 is CANCELLED
        assert acting.servers() == {}
    assert site.listening() == set()
    assert len(appliance.starts()) == 4


def acting_and(one: Site, two: Site) -> set[int]:
    """The ports of both hubs' servers."""
    return {mark.port for hub in (one, two) for mark in hub.servers().values()}


def test_a_hub_of_another_name_takes_over_nothing_when_its_own_state_is_empty(
    site: Site, other: Site
) -> None:
    """Not even with the other's repository and spec before it."""
    site.spec(site.vm("ctx-1"))
    site.apply()
    before = site.servers()
    other.write_config(repositories={"local": {"root": str(site.folder / "repository")}})
    other.spec(other.vm("ctx-1"))
    other.run("apply", "-y", code=None)
    other.run("apply", "-y", "--prune", code=None)
    assert site.servers() == before
    assert other.servers() == {}


def upgraded(binary: Path) -> None:
    """Another file at the same path, as a package manager puts it there."""
    fresh = binary.with_name("qemu-nbd.new")
    shutil.copy2(binary, fresh)
    fresh.replace(binary)


def executable(pid: int) -> tuple[int, int]:
    found = os.stat(f"/proc/{pid}/exe")
    return found.st_dev, found.st_ino


def test_an_upgrade_of_qemu_nbd_leaves_running_servers_alone_and_a_heal_uses_the_new_file(
    site: Site, appliance: Appliance
) -> None:
    real = shutil.which("qemu-nbd")
    assert real
    binary = site.folder / "bin" / "qemu-nbd"
    binary.parent.mkdir()
    shutil.copy2(real, binary)
    site.write_config(qemu_nbd={"binary": str(binary)})
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply()
    before = site.pids()
    old = executable(before["ctx-1", 2000])
    upgraded(binary)
    new = (binary.stat().st_dev, binary.stat().st_ino)
    assert old != new
    assert crashes.plan(site) == []
    site.apply()
    assert site.pids() == before
    site.kill(before["ctx-1", 2001])
    site.apply()
    after = site.pids()
    assert after["ctx-1", 2000] == before["ctx-1", 2000]
    assert executable(after["ctx-1", 2000]) == old
    assert executable(after["ctx-1", 2001]) == new
    assert crashes.plan(site) == []
    assert len(appliance.starts()) == 1


def test_clients_that_fill_every_slot_hold_a_healthy_server(
    site: Site, appliance: Appliance
) -> None:
    """Nobody answers a probe then, and the server is well: it is held, and not restarted."""
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply()
    before = site.servers()
    port = next(mark.port for mark in before.values() if mark.disk == 2000)
    with ExitStack() as idle:
        for _ in range(SLOTS):
            idle.enter_context(socket.create_connection(("127.0.0.1", port)))
        for _ in range(2):
            text = site.apply(code=4)
            assert "NoAnswerInUse" in text
            assert f"all {SLOTS} slots are in use" in text
            assert site.servers() == before
        assert crashes.condition(site, "ctx-1", "Stalled") == ("True", "NoAnswerInUse")
    until(lambda: not crashes.plan(site), "that the server is told to be well")
    site.apply()
    assert site.servers() == before
    assert len(appliance.starts()) == 1
