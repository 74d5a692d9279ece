"""The reference appliance and a live VM: whole disks, then what has changed, or a plain no."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import CHANGE_ID, LiveError, LiveVm, next_change_id
from nbd_client import Connection

from tests.e2e.test_appliance import (
    Export,
    Exporter,
    Hub,
    Node,
    export,
    hub,
    order,
    running,
    wait_for,
)
from tests.e2e.vms import SOURCE, Vm, living

__all__ = ["export", "hub"]  # fixtures

SIZES = {2000: 4 << 20, 2001: 1 << 20}
GRANULE = 1 << 16
FIRST = "52 00 00 00 00 00 00 00-00 00 00 00 00 00 00 0a"


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    with living(tmp_path / "sources" / "pgtest1", SIZES) as found:
        yield found


@pytest.fixture
def exports(export: Exporter) -> list[Export]:
    return [export(str(key), n, 0, size) for n, (key, size) in enumerate(SIZES.items())]


def write(vm: Vm, key: int, offset: int, data: bytes) -> None:
    with Connection(vm.socket, str(key)) as disk:
        disk.write(offset, data)


def now(vm: Vm) -> list[bytes]:
    """What the disks of a VM hold."""
    found = []
    for key, size in vm.sizes.items():
        with Connection(vm.socket, str(key)) as disk:
            found.append(disk.read(0, size))
    return found


def arrived(export: Export) -> bytes:
    """What an export holds."""
    _, _, address = export.target.partition("nbd://")
    place, _, name = address.partition("/")
    with Connection(("127.0.0.1", int(place.partition(":")[2])), name) as there:
        return there.read(0, there.size)


def back_up(node: Node, hub: Hub, job: str, exports: list[Export]) -> Json:
    """Run a job to its end, and let the hub know of its change ids."""
    node.post(order(job, *(one.target for one in exports)))
    end = node.end(job)
    for position, disk in enumerate(end["disks"]):
        hub.change_ids[position] = disk["change_id"] or hub.change_ids[position]
    return {disk["key"]: disk for disk in end["disks"]}


Json = dict[str, Any]


def test_whole_disks_then_what_has_changed_also_after_a_restart_of_the_vm(
    tmp_path: Path, vm: Vm, exports: list[Export], hub: Hub
) -> None:
    write(vm, 2000, 5 * GRANULE, b"a" * 10)
    with running(tmp_path, f"--hub={hub.url}") as node:
        full = back_up(node, hub, "job-1", exports)
        assert [arrived(one) for one in exports] == now(vm)
        assert [disk["bytes_transferred"] for disk in full.values()] == list(SIZES.values())
        for disk in full.values():
            assert CHANGE_ID.fullmatch(disk["change_id"])
            assert disk["change_id"].endswith("/1")

        write(vm, 2000, GRANULE - 1, b"bc")  # two granules
        with Connection(vm.socket, "2000") as there:
            there.zero(5 * GRANULE, GRANULE)  # what was there is gone: zeros must arrive
        second = back_up(node, hub, "job-2", exports)
        assert [arrived(one) for one in exports] == now(vm)
        assert [disk["bytes_transferred"] for disk in second.values()] == [3 * GRANULE, 0]
        assert [disk["phase"] for disk in second.values()] == ["completed"] * 2
        assert [disk["previous"] for disk in second.values()] == [
            disk["change_id"] for disk in full.values()
        ]
        assert node.status("job-2")["progress_percent"] == 100

        write(vm, 2001, 0, b"d")
        vm.end()
        vm.start()
        write(vm, 2001, 3 * GRANULE, b"e")
        third = back_up(node, hub, "job-3", exports)
        assert [arrived(one) for one in exports] == now(vm)
        assert [disk["bytes_transferred"] for disk in third.values()] == [0, 2 * GRANULE]
        assert all(disk["change_id"].endswith("/3") for disk in third.values())
        assert not list(vm.folder.glob("snap-*"))
        assert hub.completions("job-3")[0]["bytes_transferred"] in (0, 2 * GRANULE)


def test_two_connections_are_held_half_way(
    tmp_path: Path, vm: Vm, exports: list[Export], hub: Hub
) -> None:
    progress = "/api/v1/progress/job-1"
    with running(tmp_path, "--slow=1") as node:
        node.post(order("job-1", *(one.target for one in exports)))
        wait_for(lambda: json.loads(node.ask("GET", progress)[1])["percent"] == 50, "the half")
        assert [one.clients() for one in exports] == [2, 2]
        write(vm, 2000, 0, b"late")  # after the snapshot
        assert node.end("job-1")["status"] == "completed"
        assert arrived(exports[0]) == bytes(SIZES[2000])


def test_what_the_vm_cannot_say_fails_that_disk_alone(
    tmp_path: Path, vm: Vm, exports: list[Export], hub: Hub
) -> None:
    with running(tmp_path, f"--hub={hub.url}") as node:
        hub.change_ids = {0: f"{FIRST}/7"}
        node.post(order("job-1", *(one.target for one in exports)))
        end = node.end("job-1")
        assert [disk["phase"] for disk in end["disks"]] == ["failed", "completed"]
        assert f"what has changed since '{FIRST}/7'; ask for a full" in end["disks"][0]["error"]
        assert [body["disk_id"] for body in hub.completions("job-1")] == [1]


def test_an_export_that_is_too_small_is_told(tmp_path: Path, vm: Vm, export: Exporter) -> None:
    with running(tmp_path) as node:
        node.post(order("job-1", export("2000", 0, 0, 1 << 20).target))
        (disk,) = node.end("job-1")["disks"]
        assert disk["error"] == f"the export has {1 << 20} bytes, and the disk has {4 << 20}"


def test_a_disk_that_is_not_there_and_a_vm_that_does_not_run(
    tmp_path: Path, vm: Vm, export: Exporter
) -> None:
    stranger = export("2007", 0, 0, 1 << 20)
    with running(tmp_path) as node:
        node.post(order("job-1", stranger.target))
        (disk,) = node.end("job-1")["disks"]
        assert disk["error"] == f"the VM in {vm.folder} has no disk 2007"
        vm.kill()
        node.post(order("job-2", stranger.target))
        (disk,) = node.end("job-2")["disks"]
        assert disk["error"] == f"no VM runs in {vm.folder}; start source.py there"


def test_a_snapshot_that_was_left_behind_is_swept_away(vm: Vm) -> None:
    live = LiveVm(vm.folder)
    for number in (1, 2):
        taken = live.snapshot({"2000": "", "2001": ""})
        for key, size in vm.sizes.items():
            found = taken[str(key)]
            assert not isinstance(found, LiveError)
            assert found.change_id.endswith(f"/{number}")
            with Connection(found.socket, found.export) as disk:
                assert disk.read(0, size) == bytes(size)
    live.drop("2000")
    live.drop("2001")
    live.drop("2001")  # nothing is left
    assert not list(vm.folder.glob("snap-*"))


def bitmap(name: str, **changes: object) -> dict[str, object]:
    return {"name": name, "recording": True, **changes}


@pytest.mark.parametrize(
    ("bitmaps", "previous", "found"),
    [
        ([bitmap(f"{FIRST}/1")], "", f"{FIRST}/2"),
        ([bitmap(f"{FIRST}/9"), bitmap(f"{FIRST}/10")], f"{FIRST}/9", f"{FIRST}/11"),
        ([bitmap("other"), bitmap(f"{FIRST}/3"), {"recording": False}], "", f"{FIRST}/4"),
    ],
)
def test_change_ids_count_up(bitmaps: list[dict[str, object]], previous: str, found: str) -> None:
    assert next_change_id(bitmaps, previous) == found


def test_a_bitmap_that_was_lost_begins_a_new_count() -> None:
    lost = [bitmap(f"{FIRST}/1", recording=False, inconsistent=True)]
    with pytest.raises(LiveError, match="does not know what has changed since"):
        next_change_id(lost, f"{FIRST}/1")
    new = next_change_id(lost, "")
    assert new.endswith("/1")
    assert not new.startswith(FIRST)


@pytest.mark.parametrize("disk", ["2000", "2000=", "2000=0M", "2000=5", "x=1M", "2000=1T"])
def test_a_disk_that_cannot_be_is_refused(tmp_path: Path, disk: str) -> None:
    line = [sys.executable, str(SOURCE), str(tmp_path), f"--disk={disk}"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"cannot read '{disk}'; write 2000=64M" in done.stderr
