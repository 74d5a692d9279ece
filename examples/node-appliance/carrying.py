"""How a snapshot of a live VM's disk reaches the hub: two connections, only what is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Final

from jobs import CopyError, Disk
from live import Snapshot
from nbd_client import Connection

CONNECTIONS: Final = 2
"""Per disk, as the field's client opens."""
PIECE: Final = 1 << 16
"""What is read and written at a time. Bytes. Source: the granularity of QEMU's dirty bitmaps."""
ZEROS: Final = bytes(PIECE)


def carry(snapshot: Snapshot, disk: Disk, gate: Callable[[], None]) -> None:
    """Copy what a snapshot has to give (raises CopyError, or OSError). Half-way, pass the gate.

    What is zero goes as an order to write zeros: in an incremental, it hides the parent's data. It
    is known by reading: a map of what is allocated looks into the overlay, then into the disk, and
    the VM may discard in between.
    """
    target = disk.target
    with ExitStack() as stack:
        pairs = [
            (
                stack.enter_context(Connection(snapshot.socket, snapshot.export)),
                stack.enter_context(Connection((target.host, target.port), target.export)),
            )
            for _ in range(CONNECTIONS)
        ]
        size, room = (side.size for side in pairs[0])
        if room < size:
            raise CopyError(f"the export has {room} bytes, and the disk has {size}")
        pieces = _Pieces(snapshot, gate)

        def work(pair: tuple[Connection, Connection]) -> None:
            source, there = pair
            for offset, length in pieces:
                data = source.read(offset, length)
                if data == ZEROS[:length]:
                    there.zero(offset, length)
                else:
                    there.write(offset, data)
                disk.add(length)
            there.flush()

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for done in [pool.submit(work, pair) for pair in pairs]:
                done.result()


class _Pieces:
    """The pieces of a snapshot, each dealt once; at half of them, the gate. For several threads."""

    def __init__(self, snapshot: Snapshot, gate: Callable[[], None]) -> None:
        self._pieces = [
            (offset, min(PIECE, area.offset + area.length - offset))
            for area in snapshot.areas
            for offset in range(area.offset, area.offset + area.length, PIECE)
        ]
        self._half = len(self._pieces) // 2
        self._gate: Callable[[], None] | None = gate
        self._dealt = 0
        self._lock = threading.Lock()
        self._broken: Exception | None = None

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._next, None)

    def _next(self) -> tuple[int, int] | None:
        with self._lock:
            if self._broken:
                raise self._broken
            if self._gate and self._dealt == self._half:
                gate, self._gate = self._gate, None
                try:
                    gate()
                except Exception as error:
                    self._broken = error
                    raise
            if self._dealt == len(self._pieces):
                return None
            self._dealt += 1
            return self._pieces[self._dealt - 1]
