"""Every set of disks that a completed run brings is of one instant, and the check can fail.

"One instant" is defined in examples/node-appliance/records.py, where the check is, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import records

from tests.e2e.site import Appliance, Site
from tests.e2e.vms import ask, completed, content, living
from tests.e2e.watching import watching

DISK = 4 << 20
TWO = dict.fromkeys((2000, 2001), DISK)
FIVE = dict.fromkeys((2000, 2001, 2016, 2017, 3000), DISK)

Count = Callable[[str, int], None]


@pytest.fixture
def telling(tmp_path: Path, site: Site) -> Iterator[Appliance]:
    """The reference appliance, whose client tells the hub how it goes."""
    found = Appliance(tmp_path / "sna", "--hub", f"http://127.0.0.1:{site.api}")
    site.appliance_at(found.url)
    yield found
    found.end()


def restored(site: Site, vm: str, sizes: dict[int, int], run: str) -> list[bytes]:
    return [content(site, vm, key, run) for key in sizes]


@pytest.mark.parametrize(
    ("backups", "pause"), [(3, 0.005), pytest.param(50, 0.0, marks=pytest.mark.soak)]
)
def test_every_completed_run_of_a_writing_vm_is_of_one_instant(
    site: Site, telling: Appliance, count: Count, backups: int, pause: float
) -> None:
    """Two VMs at a time, of two disks and of five; each begins full and goes on in increments."""
    vms = {"ctx-two": TWO, "ctx-five": FIVE}
    with (
        living(telling.sources / "ctx-two", TWO, pause) as two,
        living(telling.sources / "ctx-five", FIVE, pause) as five,
        watching(site),
    ):
        seen: dict[str, list[int]] = {vm: [] for vm in vms}
        for number in range(backups):
            run = f"n{number}"
            for vm, sizes in vms.items():
                ask(site, vm, sizes, run, "incremental" if number % 10 else "full")
            for vm, sizes in vms.items():
                completed(site, vm, run)
                disks = restored(site, vm, sizes, run)
                assert records.faults(disks) == []
                seen[vm].append(records.newest(disks[0], 0))
                count("restored sets checked", 1)
        for vm in vms:
            assert sorted(set(seen[vm])) == seen[vm], "the guest did not write meanwhile"
            assert seen[vm][0] > 0
        for guest, vm in ((two, "ctx-two"), (five, "ctx-five")):
            assert int(guest.end().removeprefix("last record: ")) > seen[vm][-1]


@pytest.mark.parametrize(
    ("backups", "pause"), [(3, 0.005), pytest.param(50, 0.0, marks=pytest.mark.soak)]
)
def test_snapshots_that_are_taken_one_by_one_are_found_torn(
    site: Site, telling: Appliance, count: Count, backups: int, pause: float
) -> None:
    telling.misbehave("torn")
    with living(telling.sources / "ctx-1", TWO, pause), watching(site):
        torn = 0
        for number in range(backups):
            run = f"n{number}"
            ask(site, "ctx-1", TWO, run)
            completed(site, "ctx-1", run)
            disks = restored(site, "ctx-1", TWO, run)
            assert [records.torn_within(disk, n) for n, disk in enumerate(disks)] == [[], []]
            torn += bool(records.faults(disks))
        count("sets of one snapshot per disk checked", backups)
        count("of these found torn", torn)
        assert torn > 0


# -- the check itself


def a_set(*newest: int, blocks: int = 4) -> list[bytes]:
    """Disks of a writer that has come to these records."""
    disks = []
    for position, last in enumerate(newest):
        disk = bytearray(blocks * records.BLOCK)
        for number in range(1, last + 1):
            start = number % blocks * records.BLOCK
            disk[start : start + records.BLOCK] = records.record(number, position)
        disks.append(bytes(disk))
    return disks


@pytest.mark.parametrize(
    "newest", [(0, 0), (1, 0), (1, 1), (9, 9, 9), (9, 9, 8), (9, 8, 8), (4, 4, 4, 4, 3)]
)
def test_a_set_within_one_write_is_of_one_instant(newest: tuple[int, ...]) -> None:
    disks = a_set(*newest)
    assert [records.newest(disk, n) for n, disk in enumerate(disks)] == list(newest)
    assert records.faults(disks) == []


@pytest.mark.parametrize("newest", [(2, 0), (0, 1), (8, 9), (9, 8, 9), (9, 8, 7), (9, 9, 8, 9)])
def test_any_other_set_is_torn(newest: tuple[int, ...]) -> None:
    (fault,) = records.faults(a_set(*newest))
    assert fault.endswith(": not of one instant")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bytes(records.BLOCK), "block 1: something else instead of record 5"),
        (records.record(1, 1), "block 1: record 1, or a part of it, instead of record 5"),
        (records.record(5, 0), "block 1: record 5, or a part of it, instead of record 5"),
        (records.record(5, 1)[:-1] + b"x", "block 1: record 5, or a part of it, instead of"),
        (records.record(9, 1), "block 3: record 3, or a part of it, instead of record 7"),
    ],
)
def test_a_block_that_is_not_of_its_moment_is_found(data: bytes, said: str) -> None:
    """Lost, stale, another disk's, half-written, or too new."""
    first, second = a_set(6, 6)
    second = second[: records.BLOCK] + data + second[2 * records.BLOCK :]
    assert any(f"disk 1, {said}" in fault for fault in records.faults([first, second]))
