"""The health question to SNAs for which runs are to begin: side by side, and not too often."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.appliances import FRESH, Health, Holder, layer, near_end, rest
from reconciler.core.errors import HostError
from reconciler.core.units import Port, Seconds, format_duration
from reconciler.host import proc

Ask = Callable[[str], Health | None]
"""One question to one SNA; None: it cannot be asked, for a reason that is told elsewhere."""
SLACK: Final[Seconds] = 0.5
"""Beyond the deadline of a question, in which it ends by itself as a rule."""
_SESSION: Final = re.compile(r"sshd(?:-session)?: ([^\s@\[]+)")
"""What the process of an SSH session calls itself: `sshd: NAME`. Source: OpenSSH, session.c."""


def side_by_side(names: Collection[str], ask: Ask, deadline: Seconds) -> dict[str, Health]:
    """Ask some SNAs at once; one that takes longer than `deadline` has not answered.

    A name server that is silent is waited for by the C library, which no timeout of ours ends: so
    such a question is left to its thread.
    """
    answers: dict[str, Health | None] = {}
    failed: list[BaseException] = []

    def one(name: str) -> None:
        try:
            answers[name] = ask(name)
        except BaseException as error:
            failed.append(error)

    threads = {
        name: threading.Thread(target=one, args=(name,), name=f"health {name}", daemon=True)
        for name in names
    }
    for thread in threads.values():
        thread.start()
    end = time.monotonic() + deadline
    for name, thread in threads.items():
        thread.join(max(0.0, end - time.monotonic()))
        if thread.is_alive():
            said = f"no answer within {format_duration(deadline)}"
            answers.setdefault(name, Health(kind="timeout", said=said))
    if failed:
        raise failed[0]
    return {name: found for name in names if (found := answers.get(name)) is not None}


# -- who holds the port


def with_holder(url: str, found: Health) -> Health:
    """The answer of an SNA that is not well, with who listens on this machine in its place."""
    near = None if found.well else near_end(url)
    if near is None:
        return found
    try:
        return replace(found, here=True, holder=holder(*near))
    except HostError:  # the kernel does not tell: then only what was answered is known
        return found


def holder(host: str, port: Port) -> Holder | None:
    """Who listens at an address of this machine; None: nobody. Raises HostError."""
    sockets = proc.tcp_sockets()
    wanted = {host, f"::ffff:{host}", "0.0.0.0", "::"}  # noqa: S104
    there = [one for one in sockets if one.listening and one.port == port]
    found = min(
        (one for one in there if one.address in wanted),
        key=lambda one: one.address != host,  # who listens there alone goes before who has it all
        default=None,
    )
    if found is None:
        return None
    pid = proc.holders([found.inode]).get(found.inode)
    if pid is None:
        return Holder(user=_name_of(found.uid))
    process = proc.process(pid)
    named = _SESSION.match(process.argv[0]) if process and process.argv else None
    return Holder(
        pid=pid,
        name=proc.name_of(pid),
        user=named[1] if named else _name_of(found.uid),
        peer=_peer(pid, port, sockets),
        since=proc.began(process.identity) if process else 0.0,
    )


def _name_of(uid: int) -> str:
    import pwd  # late: only where somebody is to be named

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _peer(pid: int, port: Port, sockets: Collection[proc.Socket]) -> str:
    """The other end of an SSH session: of the connection at a port where somebody listens. What is
    forwarded to the hub's ports begins at a port of its own; what comes through `port` is ours."""
    mine = proc.socket_inodes(pid)
    listening = {one.port for one in sockets if one.listening} - {port}
    for one in sockets:
        if one.inode in mine and not one.listening and one.port in listening:
            _, address, far = one.peer
            return f"[{address}]:{far}" if ":" in address else f"{address}:{far}"
    return ""


# -- for a process that lives on


class _Known(Struct):
    """What is known of one SNA."""

    health: Health | None = None
    at: Seconds = 0.0
    """When it was asked, by the monotonic clock."""
    failures: int = 0
    """How often in a row it was not well."""
    asking: bool = False
    """A thread was begun for that."""

    @property
    def due(self) -> Seconds:
        """When one that is not well is asked again."""
        return self.at + rest(self.failures)


class Reach:
    """What SNAs answered last, for all who want to know. Safe for threads.

    One that is not well is asked again by `poll` alone, with back-off: those who wait for it take
    the last answer, however many they are.
    """

    def __init__(
        self,
        ask: Callable[[Collection[str]], Mapping[str, Health]],
        moved: Callable[[str, Health], None] = lambda _name, _health: None,
        asked: Callable[[str, bool | None], None] = lambda _name, _well: None,
        clock: Callable[[], Seconds] = time.monotonic,
    ) -> None:
        """`moved`: told of an SNA that is not well, once for each way in which it is not, and when
        it is well again; `asked`: of each answer, whether it is a good one, and None of one that
        was not, when nobody waits for it any more."""
        self._ask, self._moved, self._asked, self._clock = ask, moved, asked, clock
        self._mutex = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._turns: dict[str, threading.Lock] = {}

    def known(self, names: Collection[str]) -> dict[str, Health]:
        """What counts still of what is known; asks nobody."""
        with self._mutex:
            return {name: found for name in names if (found := self._counts(name)) is not None}

    def _counts(self, name: str) -> Health | None:
        one = self._known.get(name)
        if one is None or one.health is None:
            return None
        last = one.at + FRESH if one.health.well else one.due + FRESH
        return one.health if self._clock() < last else None

    def of(self, names: Collection[str]) -> dict[str, Health]:
        """What counts still, and of the others what they answer now: those who want to know it at
        once share one question."""
        return self._answered(names, since=None)

    def now(self, names: Collection[str]) -> dict[str, Health]:
        """What they answer now; a person waits for it."""
        return self._answered(names, since=self._clock())

    def _answered(self, names: Collection[str], since: Seconds | None) -> dict[str, Health]:
        """Answers no older than `since`; None: those that count."""

        def there() -> dict[str, Health]:
            if since is None:
                return self.known(names)
            with self._mutex:
                return {
                    name: one.health
                    for name in names
                    if (one := self._known.get(name)) and one.health and one.at >= since
                }

        missing = sorted(set(names) - there().keys())
        if missing:
            threads = [partial(self._in_turn, name, since) for name in missing]
            _at_once(threads)
        return there()

    def _in_turn(self, name: str, since: Seconds | None) -> None:
        """Ask one SNA, unless another has while we waited for our turn."""
        with self._mutex:
            turn = self._turns.setdefault(name, threading.Lock())
        with turn:
            with self._mutex:
                one = self._known.get(name)
                at = one.at if one and one.health else None
                fresh = self._counts(name) is not None if since is None else (at or 0.0) >= since
            if not fresh:
                self._put(name)

    def _put(self, name: str) -> None:
        begun = self._clock()
        health = self._ask([name]).get(name)
        with self._mutex:
            one = self._known.setdefault(name, _Known())
            before = one.health
            if health is None:
                del self._known[name]
                return
            one.failures = 0 if health.well else one.failures + 1
            one.health, one.at, one.asking = health, begun, False
        self._asked(name, health.well)
        told = "" if before is None or before.well else layer(before)
        if told != ("" if health.well else layer(health)):
            self._moved(name, health)

    def forget(self) -> None:
        """What was asked was asked by another config."""
        with self._mutex:
            names = [name for name, one in self._known.items() if one.health]
            self._known.clear()
        for name in names:
            self._asked(name, None)

    # -- asked again by the clock

    def unwell(self, name: str) -> bool:
        """Whether runs wait for it, and `poll` will tell of it."""
        with self._mutex:
            one = self._known.get(name)
            return bool(one and one.health and not one.health.well)

    def next_at(self) -> Seconds | None:
        """When somebody is to be asked again, by the monotonic clock; None: nobody."""
        with self._mutex:
            times = [
                one.due
                for one in self._known.values()
                if one.health and not one.health.well and not one.asking
            ]
        return min(times, default=None)

    def take(self, wanted: Collection[str]) -> list[str]:
        """Those of whom it is time to be polled. Nobody waits for others than `wanted` any more:
        they are forgotten."""
        now = self._clock()
        found, left = [], []
        with self._mutex:
            for name, one in list(self._known.items()):
                if one.health is None or one.health.well or one.asking or one.due > now:
                    continue
                if name in wanted:
                    one.asking = True
                    found.append(name)
                else:
                    del self._known[name]
                    left.append(name)
        for name in left:
            self._asked(name, None)
        return found

    def poll(self, name: str) -> None:
        """Ask one that is not well again."""
        with self._mutex:
            turn = self._turns.setdefault(name, threading.Lock())
        with turn:
            self._put(name)


def _at_once(jobs: Collection[Callable[[], None]]) -> None:
    """Do some things side by side. Raises what one of them raised."""
    if len(jobs) == 1:
        next(iter(jobs))()
        return
    failed: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
