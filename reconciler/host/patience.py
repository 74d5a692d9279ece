"""Ask storage that may hang: in a thread beside, with a deadline; what hangs is left behind.

A system call on a dead mount does not return, and a thread that is in one cannot be ended. So a
root that hangs costs one thread and one deadline: as long as that thread has not come back, nothing
more is asked of the root, and who asks is told so at once. The threads are daemons: they keep no
process from ending.

But the kernel can: a process is gone only when all its threads are, and a thread can wait in a way
that no signal ends, for a dead disk, or behind another process that asks for the same name. So
before a look asks a root anything in a thread, a process of its own touches it, 1 ms, and can be
left behind for good.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, Generic, TypeVar

from reconciler.core.errors import HostError
from reconciler.core.units import Seconds

QUIET: Final[Seconds] = 5.0
"""How long no question is answered before storage is said to hang. A healthy root answers each in
under 0.1 ms, measured; a disk that spins up, or a server that fails over, may take seconds."""
LONGEST: Final[Seconds] = 30.0
"""For all questions of one look, so that storage that answers at a crawl holds nobody up either."""

AGAIN: Final[Seconds] = 0.5
"""The same for a root that did not answer when it was touched last: it is not waited for anew."""

T = TypeVar("T")


class Work(threading.Thread, Generic[T]):
    """Some things asked of one root, one after the other."""

    def __init__(self, root: str, asked: Sequence[Callable[[], T]]) -> None:
        super().__init__(name=f"storage {root}", daemon=True)
        self.root, self.asked = root, asked
        self.answers: list[T] = []
        """Of the first of them, in their order."""
        self.failed: BaseException | None = None
        self.given_up = False
        self.moved = time.monotonic()
        """When the last answer came."""
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            for one in self.asked:
                if self.given_up:
                    return
                self.answers.append(one())
                self.moved = time.monotonic()
        except BaseException as error:  # raised again where the answer is waited for
            self.failed = error
        finally:
            self._ended.set()

    def ended(self, quiet: Seconds, longest: Seconds) -> bool:
        """Whether it ends in time; if not, nothing more of it is begun."""
        last = time.monotonic() + longest
        while True:
            now = time.monotonic()
            left = min(self.moved + quiet, last) - now
            if self._ended.wait(max(0.0, left)):
                return True
            if left <= 0:
                self.given_up = True
                with _mutex:
                    _behind.setdefault(self.root, []).append(self)
                return False


_mutex: Final = threading.Lock()
_behind: Final[dict[str, list[threading.Thread]]] = {}
"""Root → the threads of this process that were left behind in it."""


def hangs(root: str) -> bool:
    """Whether something that was asked of this root earlier has still not come back."""
    with _mutex:
        alive = [one for one in _behind.pop(root, []) if one.is_alive()]
        if alive:
            _behind[root] = alive
        return bool(alive)


_untouchable: Final[set[str]] = set()
"""Roots that did not answer when they were touched last."""


def touched(roots: Collection[str]) -> set[str]:
    """The roots that answer at all; each is touched by a process that nobody needs to wait for."""
    try:
        begun = {root: os.posix_spawn("/bin/sh", [*_TOUCH, root], {}) for root in roots}
    except OSError as error:
        raise HostError(f"cannot start a process: {error.strerror}", "CannotStart") from error
    start, answered = time.monotonic(), set()
    for root, pid in begun.items():
        left = start + (AGAIN if root in _untouchable else QUIET) - time.monotonic()
        if _ends(pid, max(0.0, left)):
            answered.add(root)
    _untouchable.difference_update(answered)
    _untouchable.update(begun.keys() - answered)
    return answered


_TOUCH: Final = ("sh", "-c", 'test -e "$1"', "sh")


def _ends(pid: int, timeout: Seconds) -> bool:
    """Whether a child ends in time; if not, it is killed, and whether that helps is not our care.

    It is not waited for: one that cannot be killed would not end either.
    """
    fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        in_time = bool(poll.poll(timeout * 1000))
        if not in_time:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            poll.poll(100)
    finally:
        os.close(fd)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return in_time


def ask(
    questions: Mapping[str, Sequence[Callable[[], T]]],
) -> tuple[dict[str, Sequence[T]], dict[str, Seconds]]:
    """Root → the answers to its questions, in their order; and how long was waited in vain for
    those that did not answer all.

    The roots are asked side by side, so that the slowest is what it takes. Raises what a question
    raises.
    """
    ready = touched([root for root in questions if not hangs(root)])
    begun = {root: Work(root, asked) for root, asked in questions.items() if root in ready}
    for work in begun.values():
        work.start()
    silent = dict.fromkeys(questions.keys() - begun.keys(), QUIET)
    answers: dict[str, Sequence[T]] = dict.fromkeys(silent, ())
    for root, work in begun.items():
        if not work.ended(QUIET, LONGEST):
            silent[root] = QUIET if time.monotonic() - work.moved >= QUIET else LONGEST
        elif work.failed:
            raise work.failed
        answers[root] = tuple(work.answers)
    return answers, silent


def do(
    doing: str,
    root: str,
    effect: Callable[[], T],
    deadline: Seconds,
    given_up: threading.Event | None = None,
) -> T:
    """Do one thing to a root, or give it up: it may still happen later, and `given_up` is set.

    Raises HostError with the reason StorageHangs, and what `effect` raises.
    """
    work = Work(root, [effect])
    known = hangs(root) or (root in _untouchable and not touched([root]))
    if not known:
        work.start()
    if known or not work.ended(deadline, deadline):
        if given_up:
            given_up.set()
        since = "still" if known else f"within {deadline:g} s"
        raise HostError(f"cannot {doing}: {silence(root)} {since}", "StorageHangs")
    if work.failed:
        raise work.failed
    return work.answers[0]


def silence(root: str) -> str:
    """`no answer from the storage of ROOT (nfs4, server:/export at /mnt)`.

    Read from the kernel's table of mounts: the storage itself is not asked again.
    """
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            table = file.read()
    except OSError:
        table = ""
    return f"no answer from the storage of {root}{_mounted(root, table)}"


def _mounted(path: str, table: str) -> str:
    """The mount that a path is below, by its name; empty for the root file system.

    Source: proc(5), /proc/PID/mountinfo: the mount point is field 5; behind a dash come the type
    and the source.
    """
    best, found = "/", ""
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        point = _unescaped(before.split(" ")[4])
        inside = path == point or path.startswith(f"{point}/")
        if inside and len(point) >= len(best):  # of two on one point, the later one is seen
            kind, source = after.split(" ")[:2]
            best, found = point, f" ({kind}, {_unescaped(source)} at {point})"
    return found


def _unescaped(text: str) -> str:
    """A name in the table has its blanks as `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)
