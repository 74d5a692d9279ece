"""The partition table of a disk: MBR with its logical partitions, or GPT; read, never repaired.

Sources: the UEFI specification 2.10, chapter 5 (GPT, and the MBR in 5.2); for logical partitions
the layout that Linux reads, block/partitions/msdos.c.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Callable
from typing import Final, TypeAlias

from msgspec import Struct

from reconciler.core.units import SECTOR, Bytes

_SIGNATURE: Final = b"\x55\xaa"
_GPT: Final = b"EFI PART"
_PROTECTIVE: Final = 0xEE
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
_BOOT_CODE: Final = 446
"""Bytes before the four entries of an MBR."""
_MOST_ENTRIES: Final = 1024
"""Of a GPT; the usual number is 128. More are taken for damage."""
_MOST_LOGICAL: Final = 128
"""Logical partitions; a chain that is longer is taken for a ring."""

Read: TypeAlias = Callable[[Bytes, Bytes], bytes]
"""(offset, length) → that many bytes of the disk."""


class Partition(Struct, frozen=True, kw_only=True):
    """One partition, where it is on its disk."""

    number: int
    """As Linux counts: logical ones from 5 on."""
    start: Bytes
    size: Bytes
    type: str
    """GPT: the type's GUID; MBR: its byte, `0x83`."""
    name: str = ""
    """GPT only."""


class Table(Struct, frozen=True, kw_only=True):
    """What divides a disk."""

    kind: str
    """`gpt`, `mbr` or `none`."""
    partitions: tuple[Partition, ...] = ()
    problem: str = ""
    """What is damaged in it; empty: nothing."""


def table(read: Read, size: Bytes) -> Table:
    """The table of a disk of `size` bytes. What `read` raises is raised."""
    if size < 2 * SECTOR:
        return Table(kind="none")
    first = read(0, SECTOR)
    entries = _entries(first)
    if first[-2:] != _SIGNATURE or not _plausible(first, entries):
        # A GPT whose protective MBR is gone is still a GPT to whom it matters.
        return _gpt(read, size) if read(SECTOR, 8) == _GPT else Table(kind="none")
    if any(kind == _PROTECTIVE for kind, _, _ in entries):
        return _gpt(read, size)
    return _mbr(read, size, entries)


def _entries(sector: bytes) -> list[tuple[int, int, int]]:
    """(type, first sector, sectors) of the four entries."""
    found = []
    for number in range(4):
        at = _BOOT_CODE + 16 * number
        kind = sector[at + 4]
        start, count = struct.unpack_from("<II", sector, at + 8)
        found.append((kind, start, count))
    return found


def _plausible(sector: bytes, entries: list[tuple[int, int, int]]) -> bool:
    """Whether a sector that ends in 55 AA is an MBR: the boot sectors of FAT and NTFS do, too.

    An entry's first byte is 0 or 0x80, and something is in one of them. Source: UEFI 5.2.1.
    """
    flags = [sector[_BOOT_CODE + 16 * number] for number in range(4)]
    return all(one in (0, 0x80) for one in flags) and any(
        kind and start and count for kind, start, count in entries
    )


def _mbr(read: Read, size: Bytes, entries: list[tuple[int, int, int]]) -> Table:
    found: list[Partition] = []
    problem = ""
    for number, (kind, start, count) in enumerate(entries, 1):
        if not kind or not count:
            continue
        if kind in _EXTENDED:
            logical, problem = _logical(read, size, start)
            found += logical
            continue
        found.append(_partition(number, start, count, kind))
    problem = problem or _outside(found, size)
    return Table(kind="mbr", partitions=tuple(found), problem=problem)


def _partition(number: int, start: int, count: int, kind: int) -> Partition:
    return Partition(number=number, start=start * SECTOR, size=count * SECTOR, type=f"0x{kind:02x}")


def _logical(read: Read, size: Bytes, base: int) -> tuple[list[Partition], str]:
    """The logical partitions of the extended one at sector `base`, and what is wrong with them."""
    found: list[Partition] = []
    at = base
    for number in range(5, 5 + _MOST_LOGICAL):
        if (at + 1) * SECTOR > size:
            return found, f"the chain of logical partitions leads to sector {at}, behind the end"
        sector = read(at * SECTOR, SECTOR)
        if sector[-2:] != _SIGNATURE:
            return found, f"sector {at} should begin a logical partition, and does not"
        (kind, start, count), (_, following, more), *_ = _entries(sector)
        if kind and count:
            found.append(_partition(number, at + start, count, kind))
        if not more:
            return found, ""
        at = base + following
    return found, f"there are more than {_MOST_LOGICAL} logical partitions, or they form a ring"


def _gpt(read: Read, size: Bytes) -> Table:
    """By the first header, or by the second at the end of the disk where the first is damaged."""
    first, wrong = _header(read, size, 1)
    if first is not None:
        problem = _outside(list(first), size)
        return Table(kind="gpt", partitions=first, problem=problem)
    last = size // SECTOR - 1
    second, also = _header(read, size, last)
    if second is None:
        return Table(kind="gpt", problem=f"{wrong}; its copy at sector {last}: {also}")
    return Table(kind="gpt", partitions=second, problem=f"{wrong}; its copy at the end is whole")


def _header(read: Read, size: Bytes, at: int) -> tuple[tuple[Partition, ...] | None, str]:
    """The partitions by the header at sector `at`; None, and why, if it cannot be used."""
    head = read(at * SECTOR, SECTOR)
    if head[:8] != _GPT:
        return None, f"there is no GPT header at sector {at}"
    length, checksum = struct.unpack_from("<II", head, 12)
    if not 92 <= length <= SECTOR:
        return None, f"the GPT header at sector {at} says that it has {length} bytes"
    if zlib.crc32(head[:16] + bytes(4) + head[20:length]) != checksum:
        return None, f"the checksum of the GPT header at sector {at} is wrong"
    where, count, width, checksum = struct.unpack_from("<QIII", head, 72)
    end = where * SECTOR + count * width
    if not (count <= _MOST_ENTRIES and 128 <= width <= 4096 and end <= size):
        return None, f"the GPT header at sector {at} describes a table that cannot be"
    entries = read(where * SECTOR, count * width)
    if zlib.crc32(entries) != checksum:
        return None, f"the checksum of the GPT entries at sector {where} is wrong"
    found = []
    for number in range(count):
        entry = entries[number * width : (number + 1) * width]
        kind = entry[:16]
        if not any(kind):
            continue
        first, last = struct.unpack_from("<QQ", entry, 32)
        if last < first:
            return None, f"GPT partition {number + 1} ends before it begins"
        name = entry[56:128].decode("utf-16-le", "replace").split("\0")[0]
        found.append(
            Partition(
                number=number + 1,
                start=first * SECTOR,
                size=(last - first + 1) * SECTOR,
                type=str(uuid.UUID(bytes_le=kind)),
                name=name,
            )
        )
    return tuple(found), ""


def _outside(partitions: list[Partition], size: Bytes) -> str:
    """Whether a partition is not on its disk."""
    for one in partitions:
        if one.start + one.size > size:
            return f"partition {one.number} ends at byte {one.start + one.size}, the disk at {size}"
    return ""
