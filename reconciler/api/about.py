"""Who listens: what we say of ourselves, and what another who has our address says."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
from typing import Final

from msgspec import Struct, ValidationError, convert

from reconciler.core.units import Endpoint, Seconds
from reconciler.host import proc

HEALTH: Final = "/api/v1/health"
ASK_TIMEOUT: Final[Seconds] = 3.0
"""For one answer of who has our address. A listener that is only starting takes about 1 s."""
MOST_ANSWER: Final = 65_536
"""Bytes of it that are read."""


class About(Struct, frozen=True, kw_only=True):
    """Who takes the callbacks of a hub."""

    hub: str
    state: str
    """The state directory, absolute and without symlinks."""
    state_id: str = ""
    """Of its store; empty: there is none yet."""
    pid: int = 0
    command: str = ""

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command})" if self.command else f"pid {self.pid}"

    def same_state(self, other: About) -> bool:
        """Both write what they hear into one store."""
        if self.hub != other.hub:
            return False
        if self.state_id and other.state_id:
            return self.state_id == other.state_id
        return self.state == other.state


class Holder(Struct, frozen=True):
    """Who has an address that we would listen on."""

    what: str
    """In words, with the pid where it can be seen."""
    about: About | None = None
    """What it says of itself, if it is a reconciler."""


def ourselves(hub: str, state: str, command: str) -> About:
    return About(hub=hub, state=os.path.realpath(state), pid=os.getpid(), command=command)


def holder(endpoint: Endpoint, local: str = "") -> Holder:
    """Who listens there, by the kernel's word and by its own.

    `local`: the path of a Unix socket at which it may answer who may not ask at the address.
    """
    about = _asked(http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=ASK_TIMEOUT))
    inodes = [
        one.inode
        for one in proc.tcp_sockets(established=False)
        if one.port == endpoint.port and one.listening and proc.meets(one.address, endpoint.host)
    ]
    pids = sorted(set(proc.holders(inodes).values()))
    if about is None and local:
        near = _asked(_Local(local))
        about = near if near and near.pid in pids else None
    if about:
        return Holder(f"the reconciler of hub {about.hub}, {about}", about)
    if pids:
        return Holder(" and ".join(f"{proc.name_of(pid)} (pid {pid})" for pid in pids))
    return Holder("a process of another user")


class _Local(http.client.HTTPConnection):
    """To a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=ASK_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _asked(connection: http.client.HTTPConnection) -> About | None:
    """What the listener says of itself; None: it is no reconciler, or does not say."""
    with contextlib.closing(connection):
        try:
            connection.request("GET", HEALTH)
            answer = connection.getresponse().read(MOST_ANSWER)
            return convert(json.loads(answer), About)
        except (OSError, http.client.HTTPException, ValueError, ValidationError):
            return None
