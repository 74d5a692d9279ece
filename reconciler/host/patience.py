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

from reconciler.core.actual import Mount
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
    start, answered = time.monotonic(), set()
    asked = {root: _toucher(root) for root in sorted(roots)}
    with contextlib.ExitStack() as stack:
        for toucher in asked.values():
            stack.enter_context(toucher.mutex)  # by name, so that no two wait for each other
            toucher.ask()
        for root, toucher in asked.items():
            left = start + (AGAIN if root in _untouchable else QUIET) - time.monotonic()
            if toucher.answers(max(0.0, left)):
                answered.add(root)
            else:
                toucher.leave()
    _untouchable.difference_update(answered)
    _untouchable.update(asked.keys() - answered)
    return answered


_TOUCH: Final = (
    "sh",
    "-c",
    'while read -r _; do if test -e "$1"; then echo; else echo; fi; done',
    "sh",
)
"""Answers each line with a line, after it has looked at the root; ends with its input."""


class _Toucher:
    """A process that looks at one root whenever it is asked to. Only its own life hangs on that."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.mutex = threading.Lock()
        self._pid = 0
        """Our child; 0: there is none now."""
        self._out = self._back = -1
        self._left: list[int] = []
        """Those that were killed and had not ended yet."""

    def ask(self) -> None:
        """Have it look. Raises HostError if there is none and none can be started."""
        self._left = [pid for pid in self._left if not _ended(pid)]
        if self._pid and _ended(self._pid):
            self._close()
        if not self._pid:
            self._start()
        with contextlib.suppress(BrokenPipeError):
            os.write(self._out, b"\n")

    def _start(self) -> None:
        theirs, self._out = os.pipe2(os.O_CLOEXEC)
        self._back, answers = os.pipe2(os.O_CLOEXEC)
        try:
            self._pid = os.posix_spawn(
                "/bin/sh",
                [*_TOUCH, self.root],
                {},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, theirs, 0),
                    (os.POSIX_SPAWN_DUP2, answers, 1),
                    (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
                ],
                setsid=True,
            )
        except OSError as error:
            self._close()
            raise HostError(f"cannot start a process: {error.strerror}", "CannotStart") from error
        finally:
            os.close(theirs)
            os.close(answers)

    def answers(self, timeout: Seconds) -> bool:
        """Whether it does in time."""
        poll = select.poll()
        poll.register(self._back, select.POLLIN)
        return bool(poll.poll(timeout * 1000)) and bool(os.read(self._back, 1))

    def leave(self) -> None:
        """Kill it. Whether that helps is not our care: one that cannot be killed would not end, so
        it is not waited for."""
        if not _ended(self._pid):
            os.kill(self._pid, signal.SIGKILL)  # our child, not reaped: the pid is nobody else's
            self._left.append(self._pid)
        self._close()

    def _close(self) -> None:
        os.close(self._out)
        os.close(self._back)
        self._pid = 0


def _ended(pid: int) -> bool:
    """Whether a child of ours has; it is reaped then."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return True


_touchers: Final[dict[str, _Toucher]] = {}


def _toucher(root: str) -> _Toucher:
    return _touchers.setdefault(root, _Toucher(root))


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
    found = mount_of(root)
    named = f" ({found})" if found and found.point != "/" else ""
    return f"no answer from the storage of {root}{named}"


def mount_of(path: str) -> Mount | None:
    """The mount that a path is below, by its name; the storage is not asked. None: not told."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            return _mounted(path, file.read())
    except OSError:
        return None


def _mounted(path: str, table: str) -> Mount | None:
    """Source: proc(5), /proc/PID/mountinfo: the mount point is field 5, its options field 6; behind
    a dash come the type and the source."""
    found: Mount | None = None
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        point, options = before.split(" ")[4:6]
        point = _unescaped(point)
        inside = path == point or path.startswith(f"{point.rstrip('/')}/")
        # Of two on one point, the later one is seen.
        if inside and (found is None or len(point) >= len(found.point)):
            kind, source = after.split(" ")[:2]
            found = Mount(point, kind, _unescaped(source), options)
    return found


def _unescaped(text: str) -> str:
    """A name in the table has its blanks as `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)
