"""Full, change files, incremental, restore, and the changed file listed; what a restore needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.core.call import CallState
from reconciler.host import nbd, reading
from reconciler.host.store import proofs, read
from tests.core.builders import says
from tests.e2e.site import ROOT, Appliance, Site, until
from tests.e2e.watching import watching

MIB = 1 << 20
ACT = ROOT / "examples" / "demo" / "second-act.sh"


@pytest.fixture
def telling(tmp_path: Path, site: Site) -> Iterator[Appliance]:
    """The reference appliance, whose client tells the hub its change ids, and when it is done."""
    found = Appliance(tmp_path / "appliance", "--hub", f"http://127.0.0.1:{site.api}")
    site.appliance_at(found.url)
    yield found
    found.end()


def ext4(path: Path, files: dict[str, str], mib: int = 8) -> None:
    """A source disk with a file system on it."""
    folder = path.parent / "files"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    with path.open("wb") as file:
        file.truncate(mib * MIB)
    tool = reading.find("mke2fs") or "mke2fs"
    subprocess.run([tool, "-q", "-F", "-t", "ext4", "-d", folder, path], check=True)


def state_of(site: Site, run: str, vm: str = "ctx-1") -> CallState | None:
    found = read(site.folder / "state")
    call = found.latest(vm, run) if found else None
    return call.state if call else None


def test_full_incremental_restore_and_the_changed_file(site: Site, telling: Appliance) -> None:
    """The second act of the demo, by its own script."""
    source = telling.sources / "ctx-1" / "2000.raw"
    ext4(source, {"who-am-i": "as it was"})
    site.spec(site.vm("ctx-1", [8 * MIB]))
    site.apply("--wait", "--timeout", "60s")
    full = site.image("ctx-1").read_bytes()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    script = f"set -euo pipefail; . {ACT}; second_act ctx-1 2000 {source} r2 specs"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RECONCILER_")}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=site.folder,
        env={**environment, "PATH": path, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    says(
        done.stdout,
        "news.txt",
        "written after the full backup, before r2",
        "the restored disk is the source, bit for bit",
        "2 images deep",
        "ok: 1 disk, 1 file system (ext4), 1 file read back",
        "restore test ok",
    )
    assert "as it was" not in done.stdout
    assert site.image("ctx-1").read_bytes() == full
    assert [start["backup_type"] for start in telling.starts()] == ["full", "incremental"]
    moved = [end["disks"][0]["bytes_transferred"] for end in telling.log_lines("end")]
    assert 0 < moved[1] < MIB < moved[0], moved
    assert site.servers() == {}
    assert site.listening() == set()


def test_a_restore_and_its_test_beside_a_running_backup(site: Site, telling: Appliance) -> None:
    """A chain is read while the VM's next run builds on it; nobody disturbs anybody."""
    source = telling.sources / "ctx-1" / "2000.raw"
    ext4(source, {"file": "first"})
    site.spec(site.vm("ctx-1", [8 * MIB]))
    with watching(site):
        until(lambda: state_of(site, "r1") is CallState.COMPLETED, "the full run", 60)
        site.spec(site.vm("ctx-1", [8 * MIB], backup={"run": "r2", "type": "incremental"}))
        until(lambda: state_of(site, "r2") is CallState.COMPLETED, "the incremental", 60)
        look = {"name": "look", "for": "restore", "of": {"vm": "ctx-1", "run": "r2"}}
        site.spec(look, file="look.yaml")
        until(lambda: ("look", 2000) in site.pids(), "the restore", 60)
        serving = site.pids()["look", 2000]

        telling.misbehave("die")  # half-way: its end is never heard
        site.spec(site.vm("ctx-1", [8 * MIB], backup={"run": "r3", "type": "incremental"}))
        until(lambda: state_of(site, "r3") is CallState.ACCEPTED, "the next run", 60)
        before = (site.pids(), site.listening())
        tests = [site.start("restore-test", "ctx-1", "-o", "json") for _ in range(2)]
        outputs = [process.communicate(timeout=120) for process in tests]
        assert [process.returncode for process in tests] == [0, 0], outputs
        for out, _ in outputs:
            found = json.loads(out)
            assert (found["run"], found["ok"], found["disks"][0]["layers"]) == ("r2", True, 2)
        assert (site.pids(), site.listening()) == before
        assert site.pids()["look", 2000] == serving
        assert site.condition("look", "Ready")[0] == "True"
        disk = site.status()["look"]["disks"][0]
        target = nbd.Target("127.0.0.1", disk["port"], disk["export"])
        assert nbd.handshake([target], 20)[0].read_only

        ledger = read(site.folder / "state")
        call = ledger.latest("ctx-1", "r2") if ledger else None
        assert call is not None
        proof = proofs(site.folder / "state", call.job_id)["restore"]
        assert (proof.ok, proof.who.split(" (")[0]) == (True, "reconciler restore-test")

        base = site.image("ctx-1")
        moved = base.rename(base.with_name("elsewhere.qcow2"))
        text = site.run("restore-test", "ctx-1", code=1)
        says(text, f"builds on {base}, which is missing", "next: reconciler verify ctx-1 --run r2")
        assert state_of(site, "r3") is CallState.ACCEPTED
        assert site.pids()["look", 2000] == serving
        again = {**look, "name": "look-again"}
        site.spec(again, file="again.yaml")
        until(lambda: "look-again" in site.status(), "the other restore", 60)
        assert site.condition("look-again", "Ready")[1] == "ChainBroken"
        moved.rename(base)
        site.spec({**again, "labels": {"look": "anew"}}, file="again.yaml")
        until(lambda: ("look-again", 2000) in site.pids(), "the chain is whole again", 60)
