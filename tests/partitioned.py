"""Disks with a partition table, as bytes. Source: the UEFI specification 2.10, chapter 5."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Sequence
from typing import Final

SECTOR: Final = 512
ENTRIES: Final = 128
LINUX: Final = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
"""Source: the Discoverable Partitions Specification, "generic Linux data"."""


def mbr_sector(entries: Sequence[tuple[int, int, int]]) -> bytearray:
    """(type, first sector, sectors) of up to four entries."""
    sector = bytearray(SECTOR)
    for number, (kind, start, count) in enumerate(entries):
        struct.pack_into("<B3xB3xII", sector, 446 + 16 * number, 0, kind, start, count)
    sector[510:] = b"\x55\xaa"
    return sector


def gpt(disk: bytearray, partitions: Sequence[tuple[int, int, str]]) -> None:
    """Write both copies of a GPT with (first sector, sectors, name) into a disk."""
    last = len(disk) // SECTOR - 1
    disk[:SECTOR] = mbr_sector([(0xEE, 1, min(last, 0xFFFFFFFF))])
    entries = b"".join(
        LINUX.bytes_le
        + uuid.uuid4().bytes_le
        + struct.pack("<QQQ", start, start + count - 1, 0)
        + name.encode("utf-16-le").ljust(72, b"\0")
        for start, count, name in partitions
    ).ljust(ENTRIES * 128, b"\0")
    identity = uuid.uuid4().bytes_le
    for mine, other, table in ((1, last, 2), (last, 1, last - 32)):
        head = struct.pack(
            "<8sIIIIQQQQ16sQIII",
            *(b"EFI PART", 0x10000, 92, 0, 0, mine, other, 34, last - 33, identity),
            *(table, ENTRIES, 128, zlib.crc32(entries)),
        )
        head = head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:]
        put(disk, mine, head)
        put(disk, table, entries)


def put(disk: bytearray, sector: int, data: bytes | bytearray) -> None:
    disk[sector * SECTOR : sector * SECTOR + len(data)] = data


def holding(contents: Sequence[tuple[str, bytes]], spare: int = 2048) -> bytearray:
    """A disk with a GPT and these partitions; `spare`: sectors before, between and behind them."""
    at, partitions = spare, []
    for name, data in contents:
        partitions.append((at, len(data) // SECTOR, name))
        at += len(data) // SECTOR + spare
    disk = bytearray((at + spare) * SECTOR)
    for (start, _, _), (_, data) in zip(partitions, contents, strict=True):
        put(disk, start, data)
    gpt(disk, partitions)
    return disk
