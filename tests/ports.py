"""Loopback ports for tests: each range is dealt once, and was free when it was dealt."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator

FIRST = 20_000
PER_WORKER = 2_500
"""Below 32768, where the kernel takes ports for outgoing connections."""


class Dealer:
    """Hands out ranges, each worker of a parallel run from its own part."""

    def __init__(self) -> None:
        worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
        start = FIRST + (int(worker) % 5) * PER_WORKER
        self._next: Iterator[int] = itertools.cycle(range(start, start + PER_WORKER - 200, 1))

    def deal(self, count: int) -> range:
        """`count` consecutive free ports."""
        while True:
            first = next(self._next)
            wanted = range(first, first + count)
            if all(free(port) for port in wanted):
                for _ in range(count - 1):
                    next(self._next)
                return wanted


def free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
