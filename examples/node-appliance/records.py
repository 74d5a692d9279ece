"""What the writer of a live VM leaves on its disks, and the proof that a set is of one instant.

The writer has one counter for all disks. Record n is one block; it goes to the first disk, then to
the second and so on, each write acknowledged before the next begins. A disk is a ring: record n
lies in block n modulo the number of blocks.

One instant, within the order of a single write: the disks, in the writer's order, hold n up to some
disk and n - 1 from there on. Two counters that differ by more, or that rise from one disk to the
next, cannot have been there together. Each disk by itself must be whole: every block holds the
newest record that had been written to it by then.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

BLOCK: Final = 4096
"""One record. Bytes. Chosen: one page of a database."""
HEAD: Final = struct.Struct(">8sQQ")
MAGIC: Final = b"one time"


def record(number: int, position: int) -> bytes:
    """Make record `number` of the disk at that position. Its padding is its checksum, repeated."""
    head = HEAD.pack(MAGIC, number, position)
    digest = hashlib.sha256(head).digest()
    return head + (digest * (BLOCK // len(digest)))[HEAD.size :]


def newest(disk: bytes, position: int) -> int:
    """Say the highest number of the whole records of a disk; 0 if there is none."""
    found = 0
    for offset in range(0, len(disk), BLOCK):
        magic, number, _ = HEAD.unpack_from(disk, offset)
        higher = magic == MAGIC and number > found
        if higher and disk[offset : offset + BLOCK] == record(number, position):
            found = number
    return found


def torn_within(disk: bytes, position: int) -> list[str]:
    """Say which blocks of one disk do not belong to the moment of its newest record."""
    blocks, last = len(disk) // BLOCK, newest(disk, position)
    faults = []
    for block in range(blocks):
        due = last - (last - block) % blocks  # the newest record of this block
        wanted = record(due, position) if due > 0 else bytes(BLOCK)
        have = disk[block * BLOCK : (block + 1) * BLOCK]
        if have != wanted:
            magic, number, _ = HEAD.unpack_from(have)
            what = f"record {number}, or a part of it," if magic == MAGIC else "something else"
            faults.append(f"disk {position}, block {block}: {what} instead of record {due}")
    return faults


def torn_between(newest: Sequence[int]) -> str:
    """Say why disks with these newest records, in the writer's order, are not of one instant."""
    falls = all(after <= before for before, after in pairwise(newest))
    if falls and newest[0] - newest[-1] <= 1:
        return ""
    return f"the newest records are {', '.join(map(str, newest))}: not of one instant"


def faults(disks: Sequence[bytes]) -> list[str]:
    """Say all that shows that these disks, in the writer's order, are not of one instant."""
    found = [fault for position, disk in enumerate(disks) for fault in torn_within(disk, position)]
    between = torn_between([newest(disk, position) for position, disk in enumerate(disks)])
    return [*found, between] if between else found
