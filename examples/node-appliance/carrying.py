"""How a disk reaches the hub piece by piece: two connections, only what is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Final, Protocol

from areas import Area
from jobs import CopyError, Disk
from nbd_client import Connection

CONNECTIONS: Final = 2
"""Per disk, as the field's client opens."""
PIECE: Final = 1 << 16
"""What is read and written at a time. Bytes. Source: the granularity of QEMU's dirty bitmaps."""
ZEROS: Final = bytes(PIECE)


class Reader(Protocol):
    """A disk that is read."""

    size: int

    def read(self, offset: int, length: int) -> bytes: ...


class Source(Protocol):
    """What a disk is read from, by several connections."""

    def opened(self) -> AbstractContextManager[Reader]: ...


def carry(source: Source, areas: Sequence[Area], disk: Disk, gate: Callable[[], None]) -> None:
    """Copy parts of a disk (raises CopyError, or OSError). Half-way, pass the gate.

    What is zero goes as an order to write zeros: in an incremental, it hides the parent's data. It
    is known by reading: a map of what is allocated looks into the overlay, then into the disk, and
    the VM may discard in between.
    """
    target = disk.target
    with ExitStack() as stack:
        pairs = [
            (
                stack.enter_context(source.opened()),
                stack.enter_context(Connection((target.host, target.port), target.export)),
            )
            for _ in range(CONNECTIONS)
        ]
        size, room = (side.size for side in pairs[0])
        if room < size:
            raise CopyError(f"the export has {room} bytes, and the disk has {size}")
        pieces = _Pieces(areas, gate)

        def work(pair: tuple[Reader, Connection]) -> None:
            here, there = pair
            for offset, length in pieces:
                data = here.read(offset, length)
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
    """The pieces of a disk, each dealt once; at half of them, the gate. For several threads."""

    def __init__(self, areas: Sequence[Area], gate: Callable[[], None]) -> None:
        self._pieces = [
            (offset, min(PIECE, area.offset + area.length - offset))
            for area in areas
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
