"""What is said and done when the record and the world do not agree."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys

import pytest

from tests.e2e.site import Appliance, Site, until

MIB = 1 << 20


def test_a_state_directory_put_back_from_before_the_call_does_not_call_again(
    site: Site, appliance: Appliance
) -> None:
    appliance.misbehave("sickens")
    site.spec(site.vm("ctx-1"))
    site.apply(code=1)
    shutil.copytree(site.folder / "state", site.folder / "copy")
    appliance.misbehave("none")
    site.apply()
    assert len(appliance.starts()) == 1
    appliance.misbehave("forget")
    shutil.rmtree(site.folder / "state")
    (site.folder / "copy").rename(site.folder / "state")
    for _ in range(2):
        assert "CallUnknown" in site.apply(code=7)
        assert len(appliance.starts()) == 1
        assert len(site.servers()) == 1
    site.run("resolve", "ctx-1", "--accepted", "--reason", "its log shows the job", "-y")
    site.apply()
    assert len(appliance.starts()) == 1


def test_a_lost_state_directory_is_unknown_and_the_servers_are_kept(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply()
    before = site.pids()
    appliance.misbehave("forget")
    shutil.rmtree(site.folder / "state")
    assert "is claimed by" not in site.run("status")
    for _ in range(2):
        text = site.apply(code=7)
        assert "CallUnknown" in text
        assert site.pids() == before
    assert site.status()["ctx-1"]["call"]["state"] == "UNKNOWN"
    assert {d["ready"] for d in site.status()["ctx-1"]["disks"]} == {True}
    assert len(appliance.starts()) == 1
    site.spec({"name": "ctx-1", "state": "absent"})
    site.apply(code=7)
    assert site.pids() == before


def test_another_state_directory_on_the_same_repository_does_not_call_again(
    site: Site, appliance: Appliance
) -> None:
    appliance.source("ctx-1", 2000, os.urandom(MIB))
    site.appliance_at(appliance.url, reports_end=True)
    site.spec(site.vm("ctx-1"))
    site.apply("--wait", "--timeout", "60s")
    appliance.misbehave("forget")
    site.write_config(state="second")
    text = site.apply(code=7)
    assert f"claimed by the state directory {site.folder / 'state'}, which exists" in text
    assert site.status()["ctx-1"]["call"]["state"] == "UNKNOWN"
    assert "work in the state directory that is named above" in site.run("explain", "ctx-1")
    (site.folder / "state").rename(site.folder / "moved")
    assert "another state directory, which is gone" in site.apply(code=7)
    assert site.status()["ctx-1"]["call"]["state"] == "UNKNOWN"
    assert len(appliance.starts()) == 1
    site.run("resolve", "ctx-1", "--resend", "--reason", "the first state directory is gone", "-y")
    appliance.misbehave("none")
    site.apply("--wait", "--timeout", "60s")
    assert [s["nbd_targets"].rsplit("/", 1)[1] for s in appliance.starts()] == [
        "ctx-1-r1-disk0", "ctx-1-r1-a2-disk0",
    ]  # fmt: skip


def test_a_tainted_run_cannot_be_called_complete_and_is_shown(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1", [4 * MIB]))
    site.apply()
    disk = site.status()["ctx-1"]["disks"][0]
    source = site.folder / "written.raw"
    source.write_bytes(b"y" * MIB + bytes(3 * MIB))
    uri = f"nbd://127.0.0.1:{disk['port']}/{disk['export']}"
    subprocess.run(["nbdcopy", str(source), uri], check=True)
    site.kill(disk["pid"])
    text = site.run("resolve", "ctx-1", "--completed", "--reason", "x", "-y", code=1)
    assert "a server died under a client" in text, "also before an apply has noted that"
    assert "(ServerDied)" in site.run("plan")
    assert "the run can only fail" in site.apply(code=1)
    assert site.condition("ctx-1", "Ready")[:2] == ("False", "ServerDied")
    assert "acknowledged writes may be gone" in site.run("explain", "ctx-1")
    text = site.run("resolve", "ctx-1", "--completed", "--reason", "x", "-y", code=1)
    assert "reconciler resolve ctx-1 --failed --reason WHY, and ask for a new run" in text
    site.run("resolve", "ctx-1", "--failed", "--reason", "x", "-y")


def test_a_server_that_died_before_anybody_wrote_taints_nothing(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    site.kill(site.pids()["ctx-1", 2000])
    assert "ServerDied" not in site.run("plan")
    site.apply()
    assert site.status()["ctx-1"]["call"]["tainted"] is False
    site.run("resolve", "ctx-1", "--completed", "--reason", "x", "-y")


def test_what_is_not_a_backup_is_not_built_on(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    site.run("resolve", "ctx-1", "--failed", "--reason", "x", "-y")
    disks = [{"key": 2000, "size": MIB, "backing": "ctx-1/2000/r1.qcow2"}]
    site.spec(site.vm("ctx-1", backup={"run": "r2", "type": "incremental"}, disks=disks))
    assert "which is FAILED and so not a backup" in site.apply(code=65)
    assert len(appliance.starts()) == 1


def test_status_says_what_the_last_apply_could_not_do(site: Site, appliance: Appliance) -> None:
    appliance.misbehave("refuse", 1)
    site.spec(site.vm("ctx-1"))
    site.apply(code=1)
    assert site.condition("ctx-1", "Ready")[:2] == ("False", "CallRejected")
    assert "reconciler retry ctx-1" in site.run("explain", "ctx-1")
    (site.folder / "password").rename(site.folder / "elsewhere")
    site.run("retry", "ctx-1")
    site.apply(code=1)
    assert site.condition("ctx-1", "Stalled")[:2] == ("True", "SecretUnreadable")
    (site.folder / "elsewhere").rename(site.folder / "password")
    site.apply()
    assert site.condition("ctx-1", "Ready")[:2] == ("True", "Converged")
    assert site.condition("ctx-1", "Stalled")[0] == "False"


def test_a_stop_that_is_held_leaves_the_vm_declared(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    text = site.run("stop", "ctx-1", "-y", code=4)
    assert "--cancel-run" in text
    assert site.status()["ctx-1"]["state"] == "exported"
    site.run("stop", "ctx-1", "-y", "--cancel-run")
    assert site.json("status")["vms"] == []
    assert site.servers() == {}
    assert "run r1 is CANCELLED" in site.apply(code=1)
    assert len(appliance.starts()) == 1


def test_a_range_that_can_never_hold_the_vm_is_refused_and_not_waited_for(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1", [MIB] * 11), site.vm("ctx-2"))
    text = site.apply(code=3)
    assert "RangeTooSmall: 11 ports are needed" in text
    assert set(site.pids()) == {("ctx-2", 2000)}


def test_a_frozen_server_is_replaced_when_nobody_uses_it(site: Site, appliance: Appliance) -> None:
    import signal

    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply()
    before = site.pids()
    os.kill(before["ctx-1", 2001], signal.SIGSTOP)
    assert site.changes() == [("ctx-1", "2001", "restart")]
    site.apply()
    after = site.pids()
    assert after["ctx-1", 2000] == before["ctx-1", 2000]
    assert after["ctx-1", 2001] != before["ctx-1", 2001]
    assert site.status()["ctx-1"]["disks"][1]["ready"]


def test_options_that_changed_restart_a_server_only_when_no_run_is_active(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1", release="keep"))
    site.apply()
    before = site.pids()
    site.write_config(qemu_nbd={"shared": 20})
    text = site.apply(code=4)
    assert "--shared 10, wanted is --shared 20, but its run r1 is ACCEPTED" in text
    assert site.pids() == before
    site.run("resolve", "ctx-1", "--completed", "--reason", "x", "-y")
    assert site.changes() == [("ctx-1", "2000", "restart")]
    site.apply()
    assert site.pids() != before
    assert len(appliance.starts()) == 1


def test_a_full_disk_under_the_output_stops_no_backup(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    line = [sys.executable, "-m", "reconciler", "apply", "-y"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, cwd=site.folder, stdout=full, stderr=full, check=False)
    assert done.returncode == 0  # the code speaks of the job
    assert site.status()["ctx-1"]["call"]["state"] == "ACCEPTED"
    assert len(site.servers()) == 2
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "reconciler", "status"]
        told = subprocess.run(
            line, cwd=site.folder, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (told.returncode, told.stderr) == (1, "error: cannot go on: No space left on device\n")


def test_a_server_that_also_listens_elsewhere_is_not_called_for(
    site: Site, appliance: Appliance
) -> None:
    real = shutil.which("qemu-nbd")
    wrapper = site.folder / "bin" / "qemu-nbd"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f"#!{sys.executable}\n"
        "import os, socket, sys\n"
        "other = socket.create_server(('127.0.0.1', 0))\n"
        "other.set_inheritable(True)\n"
        f"os.execv({real!r}, ['qemu-nbd', *sys.argv[1:]])\n"
    )
    wrapper.chmod(0o755)
    site.write_config(qemu_nbd={"binary": str(wrapper)})
    site.spec(site.vm("ctx-1"))
    assert "also listens on 127.0.0.1:" in site.apply(code=1)
    assert appliance.starts() == []


@pytest.mark.parametrize("how", ["delete", "replace", "truncate", "move the directory"])
def test_an_image_that_was_taken_from_under_its_server_is_never_a_backup(
    site: Site, ending: Appliance, how: str
) -> None:
    for key in (2000, 2001):
        ending.source("ctx-1", key, os.urandom(MIB))
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply()
    until(lambda: bool(ending.log_lines("end")), "the end of the copy")
    image = site.image("ctx-1", 2001)
    if how == "truncate":
        image.write_bytes(b"")
    elif how == "move the directory":
        image.parents[1].rename(site.folder / "elsewhere")
    else:
        image.unlink()
    if how == "replace":
        line = ["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"]
        subprocess.run(line, check=True)
    text = site.apply(code=1)
    assert "moved, deleted or replaced under its server" in text
    assert str(image) in text
    assert site.condition("ctx-1", "Ready")[:2] == ("False", "RunFailed")
    of = {"vm": "ctx-1", "run": "r1"}
    site.spec({"name": "look", "for": "restore", "of": of}, file="r.yaml")
    assert "is FAILED, so it is not a backup" in site.run("validate", "-f", "specs/r.yaml", code=65)


def test_an_image_that_is_taken_away_while_the_run_goes_on_is_held(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    image = site.image("ctx-1")
    image.rename(image.with_suffix(".away"))
    text = site.apply(code=4)
    assert "ImageReplaced" in text
    assert "put it back, or the run can only fail" in text
    assert site.condition("ctx-1", "Ready")[:2] == ("False", "ImageReplaced")
    image.with_suffix(".away").rename(image)
    site.apply()


def test_an_image_that_is_taken_away_before_the_call_is_made_anew(
    site: Site, ending: Appliance
) -> None:
    ending.source("ctx-1", 2000, os.urandom(MIB))
    ending.misbehave("sickens")
    site.spec(site.vm("ctx-1"))
    site.apply(code=1)
    site.image("ctx-1").unlink()
    ending.misbehave("none")
    assert [kind for _, _, kind in site.changes()] == ["create", "restart", "call"]
    site.apply("--wait", "--timeout", "60s")
    assert site.image("ctx-1").exists()


def test_another_image_before_the_call_is_created_first(site: Site, appliance: Appliance) -> None:
    appliance.misbehave("sickens")
    site.spec(site.vm("ctx-1"))
    site.apply(code=1)
    appliance.misbehave("none")
    disks = [{"key": 2000, "size": MIB, "image": "other/a.qcow2"}]
    site.spec(site.vm("ctx-1", disks=disks))
    assert [kind for _, _, kind in site.changes()] == ["create", "restart", "call"]
    site.apply()
    assert (site.folder / "repository/other/a.qcow2").exists()


def test_a_run_is_not_cancelled_where_its_servers_cannot_be_stopped(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    port = site.status()["ctx-1"]["disks"][0]["port"]
    with socket.create_connection(("127.0.0.1", port)):
        text = site.run("stop", "ctx-1", "-y", "--cancel-run", code=1)
        assert "its run is not cancelled" in text
        assert "--kill-clients" in text
    assert site.status()["ctx-1"]["call"]["state"] == "ACCEPTED"


def test_endless_input_is_refused(site: Site) -> None:
    assert "cannot read /dev/zero: it is no file" in site.run("plan", "-f", "/dev/zero", code=65)
