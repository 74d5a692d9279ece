"""Leases and free ports → a port per disk; a whole VM or nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from reconciler.core.units import Port, PortRange


class Pool:
    """The free ports of one plan. Lowest first, so that the same inputs give the same plan."""

    def __init__(self, ports: PortRange, taken: Collection[Port]) -> None:
        busy = frozenset(taken)
        self._free = [port for port in ports if port not in busy]
        self._free.reverse()
        self.size = len(ports)

    def take(self, count: int) -> Sequence[Port] | None:
        """`count` ports, or None and nothing taken."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def __len__(self) -> int:
        return len(self._free)
