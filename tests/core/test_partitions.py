"""What divides a disk, whole and damaged."""

from __future__ import annotations

import random

import pytest

from reconciler.core.partitions import Read, Table, table
from tests.core.builders import says
from tests.partitioned import SECTOR, gpt, mbr_sector, put

SECTORS = 4096


def reading(disk: bytes | bytearray) -> Read:
    """Reads as a server does: nothing behind the end."""

    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(disk), (offset, length)
        return bytes(disk[offset : offset + length])

    return read


def found(disk: bytes | bytearray) -> Table:
    return table(reading(disk), len(disk))


def places(divided: Table) -> list[tuple[int, int, int]]:
    """(number, first sector, sectors)."""
    return [(one.number, one.start // SECTOR, one.size // SECTOR) for one in divided.partitions]


def a_gpt() -> bytearray:
    disk = bytearray(SECTORS * SECTOR)
    gpt(disk, [(64, 100, "efi"), (200, 1000, "räka")])
    return disk


def test_a_gpt_with_its_names() -> None:
    divided = found(a_gpt())
    assert (divided.kind, divided.problem) == ("gpt", "")
    assert places(divided) == [(1, 64, 100), (2, 200, 1000)]
    assert [one.name for one in divided.partitions] == ["efi", "räka"]
    assert divided.partitions[0].type == "0fc63daf-8483-4772-8e79-3d69d8477de4"


def test_an_mbr_with_logical_partitions() -> None:
    disk = bytearray(SECTORS * SECTOR)
    put(disk, 0, mbr_sector([(0x83, 64, 100), (0x05, 1000, 2000), (0, 0, 0), (0x07, 3500, 90)]))
    put(disk, 1000, mbr_sector([(0x83, 8, 50), (0x05, 500, 600)]))
    put(disk, 1500, mbr_sector([(0x82, 16, 60)]))
    divided = found(disk)
    assert (divided.kind, divided.problem) == ("mbr", "")
    assert places(divided) == [(1, 64, 100), (5, 1008, 50), (6, 1516, 60), (4, 3500, 90)]
    assert [one.type for one in divided.partitions] == ["0x83", "0x83", "0x82", "0x07"]


@pytest.mark.parametrize("size", [0, 512, 1 << 20])
def test_an_empty_disk_has_no_table(size: int) -> None:
    assert found(bytes(size)) == Table(kind="none")


def test_a_boot_sector_of_a_file_system_is_no_table() -> None:
    """FAT and NTFS have code where an MBR has its entries, and the same last two bytes."""
    disk = bytearray(SECTORS * SECTOR)
    disk[:510] = random.Random(7).randbytes(510)
    disk[446] = 0x33
    disk[510:512] = b"\x55\xaa"
    assert found(disk).kind == "none"


def test_a_gpt_is_found_without_its_protective_mbr() -> None:
    disk = a_gpt()
    put(disk, 0, bytes(SECTOR))
    assert (found(disk).kind, len(found(disk).partitions)) == ("gpt", 2)


@pytest.mark.parametrize(
    ("sector", "words"),
    [
        (1, ["no GPT header at sector 1", "its copy at the end is whole"]),
        (2, ["checksum of the GPT entries at sector 2", "its copy at the end is whole"]),
    ],
)
def test_the_copy_at_the_end_serves_where_the_first_is_damaged(
    sector: int, words: list[str]
) -> None:
    disk = a_gpt()
    put(disk, sector, bytes(SECTOR))
    divided = found(disk)
    assert places(divided) == [(1, 64, 100), (2, 200, 1000)]
    says(divided.problem, *words)


def test_a_gpt_of_which_nothing_is_left() -> None:
    disk = a_gpt()
    disk[SECTOR + 40] ^= 1
    put(disk, SECTORS - 1, bytes(SECTOR))
    divided = found(disk)
    assert not divided.partitions
    says(divided.problem, "checksum of the GPT header at sector 1 is wrong", "its copy", "no GPT")


def test_what_lies_behind_the_end_of_the_disk_is_told() -> None:
    disk = bytearray(SECTORS * SECTOR)
    put(disk, 0, mbr_sector([(0x83, 64, SECTORS)]))
    says(found(disk).problem, "partition 1 ends at byte 2129920, the disk at 2097152")


def test_a_ring_of_logical_partitions_ends() -> None:
    disk = bytearray(SECTORS * SECTOR)
    put(disk, 0, mbr_sector([(0x05, 1000, 2000)]))
    put(disk, 1000, mbr_sector([(0x83, 8, 50), (0x05, 0, 600)]))
    says(found(disk).problem, "more than 128 logical partitions, or they form a ring")
    put(disk, 1000, mbr_sector([(0x83, 8, 50), (0x05, 100, 600)]))
    says(found(disk).problem, "sector 1100 should begin a logical partition")
    put(disk, 1000, mbr_sector([(0x83, 8, 50), (0x05, 9000, 600)]))
    says(found(disk).problem, "leads to sector 10000, behind the end")


def test_no_damage_is_more_than_told() -> None:
    """Whatever is flipped in the table: an answer, nothing read behind the end."""
    dice = random.Random(11)
    for _ in range(2000):
        disk = a_gpt()
        for _ in range(dice.randrange(1, 9)):
            disk[dice.randrange(34 * SECTOR)] = dice.randrange(256)
        put(disk, SECTORS - 1, bytes(SECTOR))
        assert found(disk).kind in ("gpt", "mbr", "none")
