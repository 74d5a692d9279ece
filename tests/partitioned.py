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


def lvm(data: bytes, group: str = "vg0", volume: str = "root") -> bytes:
    """A physical volume with one logical volume in it, which holds `data`, whole MiB.

    Source: lvm2's lib/format_text/layout.h, and lib/misc/crc.c for the checksum.
    """
    mib, at, extents = 1 << 20, 4096, len(data) >> 20
    ids = ["".join(chr(97 + n) * part for part in (6, 4, 4, 4, 4, 4, 6)) for n in range(3)]
    dashed = ["-".join(chr(97 + n) * part for part in (6, 4, 4, 4, 4, 4, 6)) for n in range(3)]
    text = (
        f"""{group} {{
id = "{dashed[0]}"
seqno = 1
format = "lvm2"
status = ["RESIZEABLE", "READ", "WRITE"]
flags = []
extent_size = 2048
max_lv = 0
max_pv = 0
metadata_copies = 0
physical_volumes {{
pv0 {{
id = "{dashed[1]}"
device = "/dev/any"
status = ["ALLOCATABLE"]
flags = []
dev_size = {(extents + 1) * 2048}
pe_start = 2048
pe_count = {extents}
}}
}}
logical_volumes {{
{volume} {{
id = "{dashed[2]}"
status = ["READ", "WRITE", "VISIBLE"]
flags = []
segment_count = 1
segment1 {{
start_extent = 0
extent_count = {extents}
type = "striped"
stripe_count = 1
stripes = ["pv0", 0]
}}
}}
}}
}}
contents = "Text Format Volume Group"
version = 1
""".encode()
        + bytes(1)
    )
    size = len(data) + mib
    areas = struct.pack("<QQQQQQQQ", mib, 0, 0, 0, at, mib - at, 0, 0)
    body = struct.pack("<I8s", 32, b"LVM2 001") + ids[1].encode() + struct.pack("<Q", size) + areas
    body = body.ljust(SECTOR - 20, b"\0")
    label = b"LABELONE" + struct.pack("<QI", 1, _lvm_crc(body)) + body
    head = struct.pack("<16sIQQ", b" LVM2 x[5A%r0N*>", 1, at, mib - at)
    head += struct.pack("<QQII", SECTOR, len(text), _lvm_crc(text), 0)
    head = head.ljust(SECTOR - 4, b"\0")
    disk = bytearray(size)
    put(disk, 1, label)
    put(disk, at // SECTOR, struct.pack("<I", _lvm_crc(head)) + head + text)
    put(disk, mib // SECTOR, data)
    return bytes(disk)


def _lvm_crc(data: bytes) -> int:
    """CRC-32 from LVM's own beginning, and not inverted at the end."""
    return ~zlib.crc32(data, ~0xF597A6CF & 0xFFFFFFFF) & 0xFFFFFFFF
