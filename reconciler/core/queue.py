"""Which VM is looked at next. Names only, never news: one look serves every reason for it."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from enum import IntEnum
from typing import Final

from msgspec import Struct

from reconciler.core.units import Seconds

AGE: Final[Seconds] = 5.0
"""A name that has waited this long is as urgent as a fresh one of the next priority, so that
nothing starves, however much else there is to do."""


class Priority(IntEnum):
    """Why a VM is worth a look; a smaller number goes first."""

    CHANGED = 0
    """What is wanted of it has changed, or a person asks."""
    CRASHED = 1
    """Something of it has ended or moved by itself."""
    RESYNC = 2
    """It is time, no more."""


class Item(Struct, frozen=True):
    """A name that waits for a look."""

    name: str
    priority: Priority
    since: Seconds

    def rank(self, now: Seconds) -> float:
        """Smaller is more urgent."""
        return self.priority - max(0.0, now - self.since) / AGE


class Queue:
    """Names that wait, each once; names in work, each by one worker; names that rest until a time.

    The time is an argument, so a test can live through a day. Not safe for threads: who uses it
    from several has a lock.
    """

    def __init__(self) -> None:
        self._waiting: dict[Priority, dict[str, Item]] = {one: {} for one in Priority}
        """By priority, those that have waited longest first."""
        self._timers: dict[str, tuple[Seconds, Priority]] = {}
        self._times: list[tuple[Seconds, str]] = []
        """A heap over the timers; an entry that is not its name's timer any more is left out."""
        self._working: dict[str, Seconds] = {}
        self._reserved: set[str] = set()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def working(self) -> Collection[str]:
        """The names that a worker has."""
        return self._working.keys()

    def add(self, name: str, priority: Priority, now: Seconds) -> bool:
        """Look at this name. False: it waits already, and as urgently."""
        since = now
        for other, waiting in self._waiting.items():
            known = waiting.get(name)
            if known and other <= priority:
                return False
            if known:
                since = known.since  # urgency never costs it the time that it has waited
                del waiting[name]
        self._waiting[priority][name] = Item(name, priority, since)
        return True

    def add_at(self, name: str, when: Seconds, priority: Priority = Priority.RESYNC) -> None:
        """Look at this name at a time, at the latest: an earlier timer of it stays."""
        known = self._timers.get(name)
        if known is None or when < known[0]:
            self._timers[name] = (when, priority)
            heapq.heappush(self._times, (when, name))

    def forget_timer(self, name: str) -> None:
        """What the name was to wait for counts no more."""
        self._timers.pop(name, None)

    def ripen(self, now: Seconds) -> None:
        """Timers that are over put their names into the queue."""
        while (when := self.next_at()) is not None and when <= now:
            _, name = heapq.heappop(self._times)
            _, priority = self._timers.pop(name)
            self.add(name, priority, now)

    def next_at(self) -> Seconds | None:
        """When the next timer is over; None: there is none."""
        while self._times:
            when, name = self._times[0]
            if self._timers.get(name, (None,))[0] == when:
                return when
            heapq.heappop(self._times)
        return None

    def take(self, now: Seconds) -> Item | None:
        """The most urgent name that nobody works on; it is in work until `done`."""
        self.ripen(now)
        firsts = [item for waiting in self._waiting.values() if (item := self._first(waiting))]
        if not firsts:
            return None
        item = min(firsts, key=lambda one: (one.rank(now), one.since))
        del self._waiting[item.priority][item.name]
        self._working[item.name] = now
        return item

    def _first(self, waiting: Mapping[str, Item]) -> Item | None:
        return next(
            (
                item
                for name, item in waiting.items()
                if name not in self._working and name not in self._reserved
            ),
            None,
        )

    def done(self, name: str) -> None:
        """The look is over. A name that was added meanwhile waits for the next."""
        self._working.pop(name, None)

    def reserve(self, names: Iterable[str]) -> bool:
        """Keep some names from being taken, all or none: another works on them. See `free`."""
        wanted = set(names)
        if wanted & (self._working.keys() | self._reserved):
            return False
        self._reserved |= wanted
        return True

    def free(self, names: Iterable[str]) -> None:
        """They can be taken again."""
        self._reserved.difference_update(names)

    def stuck(self, now: Seconds, after: Seconds) -> int:
        """How many names have been in work for longer than that."""
        return sum(now - since > after for since in self._working.values())

    def durations(self, now: Seconds) -> list[Seconds]:
        """For how long each name has been in work."""
        return [now - since for since in self._working.values()]
