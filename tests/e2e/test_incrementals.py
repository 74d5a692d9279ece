"""A full run and incrementals on it, each restored and compared bit for bit with what was."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from nbd_client import Connection

from tests.e2e.site import Appliance, Site
from tests.e2e.vms import Vm, ask, completed, content, lines, living, moved
from tests.e2e.watching import watching

MIB = 1 << 20
GRANULE = 1 << 16
"""What a dirty bitmap notes at a time. Bytes. Source: QEMU's default."""
SIZES = {2000: 8 * MIB, 2001: 4 * MIB}

Count = Callable[[str, int], None]


class Touched:
    """The granules of one disk that were written, and those that were discarded: QEMU discards,
    and notes, only whole clusters."""

    def __init__(self) -> None:
        self.written: set[int] = set()
        self.discarded: set[int] = set()

    def bytes(self) -> range:
        """How much a backup has to carry over."""
        most = len(self.written | self.discarded) * GRANULE
        return range(len(self.written) * GRANULE, most + 1, GRANULE)


class Guest:
    """Writes on a VM's disks, and remembers every byte."""

    def __init__(self, vm: Vm, seed: int) -> None:
        self.vm, self.dice = vm, random.Random(seed)
        self.disks = {key: bytearray(size) for key, size in vm.sizes.items()}
        self.touched = {key: Touched() for key in vm.sizes}

    def work(self, times: int) -> None:
        """Data, zeros and discards, anywhere, aligned to granules or not."""
        for key, disk in self.disks.items():
            with Connection(self.vm.socket, str(key)) as there:
                for _ in range(times):
                    length = self.dice.choice([512, 4096, GRANULE, 3 * GRANULE + 512])
                    offset = self.dice.randrange(0, len(disk) - length, 512)
                    what = self.dice.choice(["write", "write", "zero", "discard"])
                    match what:
                        case "write":
                            there.write(offset, self.dice.randbytes(length))
                        case "zero":
                            there.zero(offset, length)
                        case _:
                            there.trim(offset, length)
                    disk[offset : offset + length] = there.read(offset, length)
                    touched = self.touched[key]
                    found = touched.discarded if what == "discard" else touched.written
                    found |= set(range(offset // GRANULE, (offset + length - 1) // GRANULE + 1))

    def snapshot(self) -> tuple[dict[int, bytes], dict[int, range]]:
        """What the disks are, and how much a backup has to carry over that goes on from the last
        snapshot; from now on it is about the next one."""
        due = {key: touched.bytes() for key, touched in self.touched.items()}
        self.touched = {key: Touched() for key in self.disks}
        return {key: bytes(disk) for key, disk in self.disks.items()}, due


@pytest.mark.parametrize("incrementals", [2, pytest.param(5, marks=pytest.mark.soak)])
def test_every_point_of_a_chain_is_what_the_disks_were(
    site: Site, tmp_path: Path, count: Count, incrementals: int
) -> None:
    """The guest goes on while the copies are held half-way: that is the next run's."""
    hub = f"http://127.0.0.1:{site.api}"
    appliance = Appliance(tmp_path / "sna", "--hub", hub, "--slow", "0.5")
    site.appliance_at(appliance.url)
    frozen: list[dict[int, bytes]] = []
    try:
        with living(appliance.sources / "ctx-1", SIZES) as vm, watching(site):
            guest = Guest(vm, seed=7)
            guest.work(40)
            for number in range(incrementals + 1):
                disks, due = guest.snapshot()
                frozen.append(disks)
                ask(site, "ctx-1", SIZES, f"n{number}", "incremental" if number else "full")
                lines(appliance, "snapshot", number)
                guest.work(5)
                completed(site, "ctx-1", f"n{number}")
                guest.work(5)
                told = moved(appliance, number)
                count(f"bytes moved by run {number}, of {sum(SIZES.values())}", sum(told.values()))
                if number:
                    assert all(told[key] in due[key] for key in SIZES), (told, due)
                else:
                    assert told == SIZES
            for number, disks in enumerate(frozen):
                for key, was in disks.items():
                    assert content(site, "ctx-1", key, f"n{number}") == was, (number, key)
                    count("disks compared bit for bit", 1)
    finally:
        appliance.end()
    for key in SIZES:
        assert len({disks[key] for disks in frozen}) == incrementals + 1, "nothing was changed"
