"""A port per disk, a whole VM or nothing, and nothing of a stranger's."""

from __future__ import annotations

import socket
import subprocess
import sys

from tests.e2e.site import Appliance, Site, until
from tests.ports import Dealer

MIB = 1 << 20


def taken(port: int) -> socket.socket:
    """A stranger's listener."""
    return socket.create_server(("127.0.0.1", port))


def test_a_full_range_makes_the_last_vm_wait_and_a_free_port_lets_it_go_on(
    site: Site, appliance: Appliance, dealer: Dealer
) -> None:
    ports = dealer.deal(101)
    site.ports = ports
    site.write_config(ports={"range": f"{ports[0]}-{ports[-1]}"})
    vms = [site.vm(f"ctx-{number}") for number in range(1, 103)]
    site.spec(*vms)
    text = site.apply(code=3)
    assert "PortPoolExhausted" in text
    assert len(site.listening()) == 101
    last = site.status()["ctx-102"]
    assert last["conditions"][0]["reason"] == "PortPoolExhausted"
    assert last["disks"][0]["port"] is None
    assert not site.image("ctx-102").exists()
    assert not (site.folder / "repository" / "ctx-102").exists()
    assert len(appliance.starts()) == 101
    site.run("resolve", "ctx-50", "--failed", "--reason", "test", "-y")
    before = site.pids()
    site.spec(*[{"name": "ctx-50", "state": "absent"} if v["name"] == "ctx-50" else v for v in vms])
    site.apply()
    after = site.pids()
    assert set(after) - set(before) == {("ctx-102", 2000)}
    assert set(before) - set(after) == {("ctx-50", 2000)}
    assert len(appliance.starts()) == 102


def test_three_disks_with_two_ports_left_hold_none(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("big", [MIB] * 8), site.vm("three", [MIB] * 3))
    text = site.apply(code=3)
    assert "3 ports are needed, 2 of" in text
    assert {vm for vm, _ in site.pids()} == {"big"}
    assert len(site.listening()) == 8
    assert [start["vm_name"] for start in appliance.starts()] == ["big"]


def test_a_foreign_listener_is_skipped_named_and_alive(site: Site, appliance: Appliance) -> None:
    first = site.ports[0]
    stranger = site.other(
        sys.executable, "-c",
        f"import socket, time; s = socket.create_server(('127.0.0.1', {first})); time.sleep(600)",
    )  # fmt: skip
    until(lambda: first in site.listening(), "the stranger")
    site.spec(site.vm("ctx-1"))
    planned = site.run("plan")
    assert f"(pid {stranger.pid}) on 127.0.0.1:{first} is in the port range; skipped" in planned
    site.apply()
    assert site.status()["ctx-1"]["disks"][0]["port"] == site.ports[1]
    assert stranger.poll() is None


def test_a_foreign_qemu_nbd_is_skipped_named_and_alive(site: Site, appliance: Appliance) -> None:
    first = site.ports[0]
    image = site.folder / "foreign.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"], check=True)
    stranger = site.other("qemu-nbd", "-t", "-p", str(first), "-b", "127.0.0.1",
                          "-f", "qcow2", str(image))  # fmt: skip
    until(lambda: first in site.listening(), "the stranger")
    site.spec(site.vm("ctx-1"))
    planned = site.run("plan")
    assert f"not ours: a qemu-nbd without our mark, pid {stranger.pid} (port {first}" in planned
    site.apply()
    site.run("stop", "ctx-1", "--cancel-run", "-y")
    assert stranger.poll() is None
    assert first in site.listening()


def test_an_image_that_a_foreign_process_has_locked_is_refused_with_its_pid(
    site: Site, appliance: Appliance
) -> None:
    image = site.image("ctx-1")
    image.parent.mkdir(parents=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"], check=True)
    port = site.ports[9]
    holder = site.other("qemu-nbd", "-t", "-p", str(port), "-b", "127.0.0.1",
                        "-f", "qcow2", str(image))  # fmt: skip
    until(lambda: port in site.listening(), "the holder")
    site.spec(site.vm("ctx-1"))
    text = site.apply(code=1)
    assert f"(pid {holder.pid})" in text
    assert "ImageLocked" in text
    assert holder.poll() is None
    assert site.servers() == {}
    assert appliance.starts() == []


def test_a_stranger_on_a_leased_port_before_the_intent_moves_the_vm(
    site: Site, appliance: Appliance
) -> None:
    appliance.misbehave("sickens")
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply(code=1)
    first = site.ports[0]
    site.kill(site.pids()["ctx-1", 2000])
    with taken(first):
        appliance.misbehave("none")
        site.apply()
        disks = site.status()["ctx-1"]["disks"]
        assert [disk["port"] for disk in disks] == [site.ports[2], site.ports[1]]
        assert f":{site.ports[2]}/" in appliance.starts()[0]["nbd_targets"]


def test_a_stranger_on_a_leased_port_after_the_call_is_named_and_the_port_kept(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    first = site.ports[0]
    site.kill(site.pids()["ctx-1", 2000])
    stranger = site.other(
        sys.executable, "-c",
        f"import socket, time; s = socket.create_server(('127.0.0.1', {first})); time.sleep(600)",
    )  # fmt: skip
    until(lambda: first in site.listening(), "the stranger")
    text = site.apply(code=4)
    assert "PortTaken" in text
    assert f"(pid {stranger.pid})" in text
    assert site.condition("ctx-1", "Stalled")[:2] == ("True", "PortTaken")
    stranger.kill()
    stranger.wait(10)
    site.apply()
    assert site.status()["ctx-1"]["disks"][0]["port"] == first
    assert len(appliance.starts()) == 1


def test_a_disk_that_fails_leaves_the_others_up_and_makes_no_call(
    site: Site, appliance: Appliance
) -> None:
    image = site.image("ctx-1", 2001)
    image.parent.mkdir(parents=True)
    line = ["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"]
    subprocess.run(line, check=True)
    content = bytearray(image.read_bytes())
    content[72:80] = (1 << 63 | 1).to_bytes(8)  # an incompatible feature that nobody knows
    image.write_bytes(content)
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    text = site.apply(code=1)
    assert "cannot serve" in text
    assert "exit status 1" in text
    assert "feature" in text  # qemu-nbd's own last words
    assert set(site.pids()) == {("ctx-1", 2000)}
    assert appliance.starts() == []
    image.unlink()
    before = site.pids()["ctx-1", 2000]
    site.apply()
    assert site.pids()["ctx-1", 2000] == before
    assert len(appliance.starts()) == 1
