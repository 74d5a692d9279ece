"""One YAML file, plan, apply: every disk served and proven, one call, and all of it gone again."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

from reconciler.host import nbd, proc
from tests.e2e.site import PASSWORD, Appliance, Site, until

MIB = 1 << 20


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_the_main_job(site: Site, ending: Appliance) -> None:
    data = {2000: os.urandom(3 * MIB), 2001: os.urandom(5 * MIB)}
    for key, content in data.items():
        ending.source("pg", key, content)
    vm = {"path": "/DC/vm/pg", "name": "pg"}
    site.spec(site.vm("ctx-1", [len(data[2000]), len(data[2001])], vm=vm))
    site.real_starts = True  # as a person types them

    planned = site.run("plan")
    assert "create 3 MiB qcow2, serve as ctx-1-r1-disk0" in planned
    assert "Plan: 2 to create, 2 to start, 1 call." in planned
    assert not (site.folder / "state").exists()
    assert not (site.folder / "repository").exists()
    site.run("plan", "--detailed-exitcode", code=2)

    site.apply("--wait", "--timeout", "60s")
    assert len(ending.starts()) == 1
    first, last = site.ports[0], site.ports[1]
    start = ending.starts()[0]
    assert start["nbd_targets"] == (
        f"2000:nbd://127.0.0.1:{first}/ctx-1-r1-disk0,2001:nbd://127.0.0.1:{last}/ctx-1-r1-disk1"
    )
    assert start["idempotency_key"] == start["job_id"]
    assert site.status()["ctx-1"]["call"]["state"] == "COMPLETED"
    assert site.servers() == {}
    for key, content in data.items():
        source = site.folder / "compare.raw"
        source.write_bytes(content)
        line = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2"]
        done = subprocess.run([*line, str(source), str(site.image("ctx-1", key))], check=False)
        assert done.returncode == 0

    assert "No changes" in site.run("plan")
    site.run("diff", code=0)
    site.apply()
    assert len(ending.starts()) == 1

    site.spec({"name": "ctx-1", "state": "absent"})
    site.apply()
    assert site.listening() == set()
    assert site.image("ctx-1").exists()
    assert site.json("status")["vms"] == []


def test_a_run_is_not_asked_for_again_through_absent_and_back(
    site: Site, ending: Appliance
) -> None:
    ending.source("ctx-1", 2000, os.urandom(MIB))
    spec = site.vm("ctx-1")
    site.spec(spec)
    site.apply("--wait", "--timeout", "60s")
    site.spec({"name": "ctx-1", "state": "absent"})
    site.apply()
    site.spec(spec)
    assert site.changes() == []
    site.apply()
    assert len(ending.starts()) == 1
    spec["backup"] = {"run": "r2"}
    site.spec(spec)
    site.apply("--wait", "--timeout", "60s")
    assert len({start["job_id"] for start in ending.starts()}) == 2


def test_every_disk_answers_a_handshake_under_its_name_with_its_size(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1", [MIB, 2 * MIB, 3 * MIB]))
    site.apply()
    for index, disk in enumerate(site.status()["ctx-1"]["disks"]):
        target = nbd.Target("127.0.0.1", disk["port"], disk["export"])
        answer = nbd.handshake([target], 5)[0]
        assert (answer.size, answer.read_only) == ((index + 1) * MIB, False)
        assert f"vm=ctx-1 disk={disk['key']} run=r1" in answer.description
        wrong = nbd.Target("127.0.0.1", disk["port"], "another-name")
        assert "no export of that name" in nbd.handshake([wrong], 5)[0].error
        assert disk["ready"]


def test_servers_listen_on_loopback_and_nowhere_else(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply()
    for pid in site.pids().values():
        held = proc.socket_inodes(pid)
        found = [s for s in proc.tcp_sockets() if s.listening and s.inode in held]
        assert [one.address for one in found] == ["127.0.0.1"]


def test_two_clients_at_once_on_one_export_and_flushed_bytes_stay(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1", [8 * MIB]))
    site.apply()
    disk = site.status()["ctx-1"]["disks"][0]
    uri = f"nbd://127.0.0.1:{disk['port']}/{disk['export']}"
    content = os.urandom(8 * MIB)
    source = site.folder / "client.raw"
    source.write_bytes(content)
    lines = [["nbdcopy", "--flush", str(source), uri], ["nbdcopy", uri, str(site.folder / "back")]]
    clients = [subprocess.Popen(line) for line in lines]
    assert [client.wait(60) for client in clients] == [0, 0]
    site.run("stop", "ctx-1", "--cancel-run", "-y")
    line = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(source)]
    assert subprocess.run([*line, str(site.image("ctx-1"))], check=False).returncode == 0


def test_killing_one_server_restarts_that_one_on_its_port(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1", [MIB, MIB, MIB]))
    site.apply()
    before, ports = site.pids(), {d["key"]: d["port"] for d in site.status()["ctx-1"]["disks"]}
    site.kill(before["ctx-1", 2001])
    assert site.changes() == [("ctx-1", "2001", "restart")]
    assert site.status()["ctx-1"]["disks"][1] | {"restarts": 0} == {
        "key": "2001", "export": "ctx-1-r1-disk1", "port": None, "pid": None,
        "image": str(site.image("ctx-1", 2001)), "ready": False, "clients": 0, "restarts": 0,
        "reported": False,
    }  # fmt: skip
    site.apply()
    after = site.pids()
    assert after["ctx-1", 2000] == before["ctx-1", 2000]
    assert after["ctx-1", 2002] == before["ctx-1", 2002]
    assert after["ctx-1", 2001] != before["ctx-1", 2001]
    now = site.status()["ctx-1"]["disks"]
    assert {d["key"]: d["port"] for d in now} == ports
    assert [d["restarts"] for d in now] == [0, 1, 0]
    assert len(appliance.starts()) == 1
    assert site.changes() == []


@pytest.mark.parametrize("many", [12, pytest.param(50, marks=pytest.mark.soak)])
def test_many_applies_at_once_are_one(site: Site, appliance: Appliance, many: int) -> None:
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    processes = [site.start("apply", "-y") for _ in range(many)]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * many, outputs
    assert len(appliance.starts()) == 1
    assert len(site.servers()) == 2
    assert len(site.listening()) == 2


def test_a_restore_is_read_only_and_calls_nobody(site: Site, ending: Appliance) -> None:
    ending.source("ctx-1", 2000, os.urandom(MIB))
    site.spec(site.vm("ctx-1"))
    site.apply("--wait", "--timeout", "60s")
    site.spec({"name": "look", "for": "restore", "of": {"vm": "ctx-1", "run": "r1"}}, file="r.yaml")
    site.apply("-f", "specs/r.yaml")
    disk = site.status()["look"]["disks"][0]
    target = nbd.Target("127.0.0.1", disk["port"], disk["export"])
    answer = nbd.handshake([target], 5)[0]
    assert (answer.size, answer.read_only) == (MIB, True)
    assert len(ending.starts()) == 1
    assert site.status()["look"]["call"] is None
    site.spec({"name": "look", "state": "absent"}, file="r.yaml")
    site.apply("-f", "specs/r.yaml")
    assert site.servers() == {}


def test_an_incremental_builds_on_the_newest_completed_run(site: Site, ending: Appliance) -> None:
    ending.source("ctx-1", 2000, os.urandom(MIB))
    site.spec(site.vm("ctx-1"))
    site.apply("--wait", "--timeout", "60s")
    site.spec(site.vm("ctx-1", backup={"run": "r2", "type": "incremental"}))
    assert "NoChangeId" in site.apply(code=1)
    assert len(ending.starts()) == 1
    site.reported("ctx-1")
    site.apply("--wait", "--timeout", "60s")
    image = site.image("ctx-1", run="r2")
    info = json.loads(
        subprocess.run(
            ["qemu-img", "info", "--output=json", str(image)],
            capture_output=True, check=True, text=True,
        ).stdout
    )  # fmt: skip
    assert info["backing-filename"] == "r1.qcow2"
    assert info["backing-filename-format"] == "qcow2"
    assert ending.starts()[1]["backup_type"] == "incremental"
    assert ending.starts()[1]["previous_change_id"]


def test_an_incremental_without_a_completed_run_is_refused(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1", backup={"run": "r1", "type": "incremental"}))
    text = site.apply(code=65)
    assert "no completed run to build an incremental on" in text
    assert appliance.starts() == []


def test_applying_some_specs_leaves_other_vms_alone(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"), file="a.yaml")
    site.spec(site.vm("ctx-2"), file="b.yaml")
    site.apply()
    before = site.pids()
    text = site.apply("-f", "specs/a.yaml")
    assert "untouched, as this is about others: ctx-2" in text
    (site.specs / "b.yaml").unlink()
    site.apply()
    assert site.pids() == before
    site.apply("--prune", code=4)  # its run is ACCEPTED: the appliance may be writing
    assert site.pids() == before
    site.run("resolve", "ctx-2", "--failed", "--reason", "test", "-y")
    site.apply("--prune")
    assert set(site.pids()) == {("ctx-1", 2000)}


def test_absent_holds_while_the_appliance_may_be_writing(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    pids = site.pids()
    site.spec({"name": "ctx-1", "state": "absent"})
    text = site.apply(code=4)
    assert "its run r1 is ACCEPTED" in text
    assert "reconciler resolve ctx-1 --failed --reason WHY (or --completed)" in text
    assert site.pids() == pids
    site.run("resolve", "ctx-1", "--completed", "--reason", "seen in the appliance's log", "-y")
    site.apply()
    assert site.servers() == {}
    assert site.listening() == set()


def torn(image: bytes) -> bytes:
    """A qcow2 file whose table of the first level leads beyond its end."""
    (table,) = struct.unpack_from("!Q", image, 40)
    return image[:table] + struct.pack("!Q", (1 << 63) | (1 << 40)) + image[table + 8 :]


def test_what_a_person_calls_completed_is_measured_as_at_any_other_end(
    site: Site, appliance: Appliance
) -> None:
    site.spec(*(site.vm(f"ctx-{number}") for number in (1, 2, 3)))
    site.apply()
    by_vm = {mark.vm: identity for identity, mark in site.servers().items()}
    site.kill(by_vm["ctx-2"].pid)  # nobody was connected: nothing is lost with it
    port = site.status()["ctx-3"]["disks"][0]["port"]
    said = {}
    with socket.create_connection(("127.0.0.1", port)) as client:
        assert client.recv(8) == b"NBDMAGIC"
        image = site.image("ctx-1")
        whole = image.read_bytes()
        image.write_bytes(torn(whole))
        order = ("resolve", "ctx-1", "--completed", "--reason", "its log", "-y")
        assert "completed: its images are damaged: disk 2000 (" in site.run(*order, code=1)
        image.write_bytes(whole)
        for vm in ("ctx-1", "ctx-2", "ctx-3"):
            said[vm] = site.run("resolve", vm, "--completed", "--reason", "its log", "-y")
    assert "known" not in said["ctx-1"] + said["ctx-2"]
    assert "what its images take is not known, nor their digests" in said["ctx-3"]
    site.apply()
    assert site.servers() == {}
    for vm in ("ctx-1", "ctx-2"):
        (chain,) = site.json("chain", vm)["chains"]
        (disk,) = chain["backups"][0]["disks"]
        assert (chain["unmeasured"], disk["allocated"] > 0) == (0, True)
        assert "digests verified: 1 image as published" in site.run("verify", vm, "--digests")
    assert " unknown " in site.run("chain", "ctx-3")
    assert "r1: size unknown; " in site.run("retain", "ctx-3", "--dry-run")


def test_a_server_in_use_is_not_stopped(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("look", release="keep"))
    site.apply()
    site.run("resolve", "look", "--failed", "--reason", "test", "-y")
    port = site.status()["look"]["disks"][0]["port"]
    with socket.create_connection(("127.0.0.1", port)):
        site.spec({"name": "look", "state": "absent"})
        text = site.apply(code=4)
        assert f"1 client is connected to port {port}" in text
        assert len(site.servers()) == 1
        assert site.status()["look"]["conditions"][0]["reason"] == "InUse"
        site.run("stop", "look", "--kill-clients", "-y")
    assert site.servers() == {}


def test_two_sets_of_servers_with_other_hub_names_do_not_touch(
    site: Site, appliance: Appliance, tmp_path: Path
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    folder = tmp_path / "second"
    folder.mkdir()
    other = Site(folder, site.ports)
    try:
        other.appliance_at(appliance.url, reports_end=False)
        other.spec(other.vm("ctx-1"))
        assert f"a qemu-nbd of hub {site.hub}" in other.apply()
        assert len(site.servers()) == 1
        assert len(other.servers()) == 1
        assert {m.port for m in other.servers().values()} == {site.ports[1]}
        other.run("stop", "ctx-1", "--cancel-run", "-y")
        assert len(site.servers()) == 1
    finally:
        other.clean_up()


def test_the_password_is_nowhere(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.real_starts = True
    process = site.start("apply", "-y")
    seen = b""
    while process.poll() is None:
        for other in proc.processes(b""):
            seen += "\0".join(other.argv).encode("utf-8", "surrogateescape")
        time.sleep(0.01)
    process.communicate()
    assert PASSWORD.encode() not in seen
    for path in (site.folder / "state").rglob("*"):
        assert path.is_dir() or PASSWORD.encode() not in path.read_bytes()
    assert PASSWORD not in appliance.log.read_text()


def test_the_state_is_private(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    assert (site.folder / "state").stat().st_mode & 0o777 == 0o700
    assert (site.folder / "state" / "state.db").stat().st_mode & 0o777 == 0o600


def test_another_hub_name_later_is_refused(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    mine = site.hub
    site.write_config(hub="renamed")
    for command in (["plan"], ["apply", "-y"]):
        text = site.run(*command, code=78)
        assert f"it belongs to hub {mine!r}" in text
        assert f"write `hub: {mine}`" in text


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_a_signal_in_the_middle_ends_in_order_and_apply_goes_on(
    site: Site, appliance: Appliance, signal_name: str
) -> None:
    import signal

    appliance.misbehave("hang-after")
    site.appliance_at(appliance.url, timeout="3s")
    site.spec(site.vm("ctx-1"))
    process = site.start("apply", "-y")
    until(lambda: bool(appliance.starts()), "the call")
    process.send_signal(getattr(signal, signal_name))
    process.communicate(timeout=60)
    assert process.returncode == (130 if signal_name == "SIGINT" else 143)
    assert site.status()["ctx-1"]["call"]["state"] == "UNKNOWN"
    assert len(site.servers()) == 1
    assert len(appliance.starts()) == 1


def test_what_is_applied_again_is_no_new_generation(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1", [1 << 20, 1 << 20], labels={"tier": "gold"}))
    for _ in range(3):
        site.apply()
    assert site.status()["ctx-1"]["observedGeneration"] == 1
    site.spec(site.vm("ctx-1", [1 << 20, 1 << 20], labels={"tier": "silver"}))
    site.apply()
    assert site.status()["ctx-1"]["observedGeneration"] == 2
