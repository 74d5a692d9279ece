"""Loopback ports for tests: each range is dealt once, and was free when it was dealt."""

from __future__ import annotations

import fcntl
import functools
import itertools
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

FIRST = 20_000
PER_WORKER = 2_500
"""Below 32768, where the kernel takes ports for outgoing connections."""


TAKEN = Path(tempfile.gettempdir()) / f"nbd-reconciler-test-ports-{os.getuid()}"
"""A file whose n-th byte is locked by who has been dealt port n, until that process ends."""


@functools.cache
def _part() -> Iterator[int]:
    """This process's ports. One for all its dealers: a lock keeps out other processes alone."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    start = FIRST + (int(worker) % 5) * PER_WORKER
    return itertools.cycle(range(start, start + PER_WORKER - 200))


class Dealer:
    """Hands out ranges, each worker of a parallel run from its own part."""

    def __init__(self) -> None:
        self._taken = os.open(TAKEN, os.O_RDWR | os.O_CREAT, 0o666)
        self._next = _part()

    def deal(self, count: int) -> range:
        """`count` consecutive free ports, which no other run of these tests has been dealt."""
        while True:
            first = next(self._next)
            wanted = range(first, first + count)
            if all(free(port) for port in wanted) and self._take(wanted):
                for _ in range(count - 1):
                    next(self._next)
                return wanted

    def _take(self, wanted: range) -> bool:
        """Lock the bytes of a range; False if another process has one of them."""
        try:
            fcntl.lockf(self._taken, fcntl.LOCK_EX | fcntl.LOCK_NB, len(wanted), wanted[0])
        except BlockingIOError:
            return False
        return True


def free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
