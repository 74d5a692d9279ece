"""What systemd tells a service by its environment, and what the service tells it.

Every name and value here is sd_notify(3)'s and sd_listen_fds(3)'s.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, MutableMapping
from typing import Final

from reconciler.core.units import Seconds

FIRST: Final = 3
"""The first descriptor that is handed over. Source: SD_LISTEN_FDS_START."""
_UNNAMED: Final = "unknown"
"""What systemd calls a socket without a name."""


def notify(*lines: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Tell systemd how we are, like `READY=1`. False: nobody asked, or it does not hear us.

    A line break in a value would begin another line, so it becomes a space.
    """
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    text = "\n".join(line.replace("\n", " ") for line in lines)
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)  # a manager that does not read keeps nobody from healing
        path = "\0" + address[1:] if address.startswith("@") else address
        sender.sendto(text.encode(), path)
        return True
    return False


def watchdog(environment: Mapping[str, str] = os.environ) -> Seconds | None:
    """How often we have to say `WATCHDOG=1` at the latest; None: never."""
    microseconds = environment.get("WATCHDOG_USEC", "")
    meant_for = environment.get("WATCHDOG_PID", str(os.getpid()))
    if not microseconds.isdecimal() or meant_for != str(os.getpid()):
        return None
    return int(microseconds) / 1e6 or None


def listeners(environment: MutableMapping[str, str] = os.environ) -> dict[str, socket.socket]:
    """Name → a socket that listens and that systemd hands over; to be asked once.

    None of it goes on to a process that we start: the variables are taken away, the descriptors are
    closed on exec. A socket of an odd kind is closed.
    """
    meant_for = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if meant_for != str(os.getpid()) or not count.isdecimal():
        return {}
    found: dict[str, socket.socket] = {}
    for number in range(int(count)):
        name = names[number] if number < len(names) and names[number] else _UNNAMED
        given = _taken(FIRST + number)
        if given is None:
            continue
        if name in found:
            given.close()
            continue
        found[name] = given
    return found


def _taken(fd: int) -> socket.socket | None:
    try:
        os.set_inheritable(fd, False)
        given = socket.socket(fileno=fd)
    except OSError:
        return None  # it is no socket, or not there
    if given.type == socket.SOCK_STREAM and given.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        return given
    given.close()
    return None
