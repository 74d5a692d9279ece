"""End and wait for a process, by pidfd: it cannot be mistaken for a later one of the same pid."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Final

from reconciler.core.actual import Identity
from reconciler.core.errors import HostError
from reconciler.core.units import Seconds


class Gone(HostError):  # noqa: N818 a state, not a fault
    """The process has ended already."""


class Handle:
    """A hold on one process, its own child or not. Use as a context manager.

    Raises Gone if the process has ended or its pid is another's now.
    """

    def __init__(self, identity: Identity, identify: Callable[[int], Identity | None]) -> None:
        try:
            self.fd = os.pidfd_open(identity.pid)
        except ProcessLookupError as error:
            raise Gone(f"pid {identity.pid} has ended") from error
        # Only now is it sure that what is read of /proc/PID is of the process that we hold.
        if identify(identity.pid) != identity:
            self.close()
            raise Gone(f"pid {identity.pid} has ended; the pid is another process's now")
        self.identity = identity

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)

    def ended(self, timeout: Seconds) -> bool:
        """Whether it ends within `timeout`. A child of ours is reaped."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(max(0, round(timeout * 1000))):
            return False
        reap(self.identity.pid)
        return True

    def end(self, grace: Seconds) -> bool:
        """SIGTERM, `grace`, SIGKILL; returns whether SIGKILL was needed. Raises HostError."""
        pid = self.identity.pid
        try:
            signal.pidfd_send_signal(self.fd, signal.SIGTERM)
        except ProcessLookupError:
            return False
        except PermissionError as error:
            raise HostError(
                f"cannot end pid {pid}: it runs as another user", "NotPermitted"
            ) from error
        if self.ended(grace):
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, signal.SIGKILL)
        if not self.ended(10.0):
            raise HostError(
                f"cannot end pid {pid}: it survives SIGKILL, so it hangs in the kernel, most "
                "likely on its storage",
                "Unkillable",
            )
        return True


_M_ARENA_MAX: Final = -8
"""Source: mallopt(3), malloc.h."""


def all_files() -> int:
    """Take as many open files as this process may have without asking anybody; how many that is.

    The usual 1024 is the soft limit, and meant for programs that use select(2), which none of ours
    and no server does. Source: setrlimit(2); systemd.exec(5), LimitNOFILE=.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def few_arenas() -> None:
    """Have all threads share a little of the C library's memory, instead of a part for each.

    Measured: a daemon that had 100 looks at once for a moment keeps 70 MiB, and 125 without this.
    Another C library than glibc may not know how; then nothing happens.
    """
    import ctypes  # late: only a daemon lives long enough

    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def reap(pid: int) -> int | None:
    """The wait status of an ended child of ours; None: not a child, or not ended."""
    with contextlib.suppress(ChildProcessError):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
    return None


def described(status: int | None) -> str:
    """`exit status 1`, `killed by SIGKILL`."""
    if status is None:
        return "it ended"
    code = os.waitstatus_to_exitcode(status)
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
