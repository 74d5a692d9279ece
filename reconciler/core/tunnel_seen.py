"""What was seen of a tunnel: its ssh processes, who is in their way, what answers through it."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from reconciler.core.tunnel import HostKey, TunnelMark
from reconciler.core.units import Port, Seconds


class Ssh(Struct, frozen=True, kw_only=True):
    """An ssh of ours."""

    pid: int
    started: int
    """In clock ticks since boot: with `pid`, one process for good. Source: proc(5)."""
    argv: tuple[str, ...]
    mark: TunnelMark
    age: Seconds = 0.0
    listening: frozenset[Port] = frozenset()
    """Local ports that it listens on: ssh does when the hub has let it in."""
    clients: int = 0
    """Established connections of others than us to these ports."""


class Check(Struct, frozen=True):
    """One question that was asked through a tunnel, or at its ends."""

    reason: str
    """A CamelCase word for the layer that fails; empty: it answers as it should."""
    message: str
    skipped: bool = False
    """It could not be asked, which is no fault of the tunnel."""


class TunnelSeen(Struct, frozen=True, kw_only=True):
    """One look at a tunnel."""

    lines: tuple[Ssh, ...] = ()
    busy: Mapping[Port, str] = field(default_factory=dict)
    """Local ports of its forwards that somebody else listens on → who."""
    key: HostKey | None = None
    """The pinned host key, wherever it is kept."""
    key_error: str = ""
    identity: str = ""
    """Absolute path of the private key."""
    identity_error: str = ""
    ssh_error: str = ""
    """Why there is no ssh to start."""
    known: str = ""
    """Absolute path of the file by which ssh knows the hub."""
    words: Mapping[str, Check] = field(default_factory=dict)
    """Part → what its last ssh said before it ended."""
    checks: tuple[Check, ...] = ()
    """Asked only where every connection is up."""


class Dialled(Struct, frozen=True, kw_only=True):
    """What is remembered of one connection of a tunnel."""

    tunnel: str
    """`tunnel/NAME`."""
    part: str
    failures: int = 0
    """How often in a row it could not be brought up, or ended soon after it was."""
    rest: Seconds = 0.0
    """Until when it is not dialled again; 0: at once."""
    reason: str = ""
    """Of the last failure; empty: it came up."""
    message: str = ""
    up: Seconds = 0.0
    """When it came up last; 0: it did not since the last failure."""
    pid: int = 0
    started: int = 0
    """Of the ssh that came up."""
    refused: tuple[Port, ...] = ()
    """Forwards of that ssh which the hub's sshd does not permit."""
    restarts: int = 0

    def is_of(self, line: Ssh) -> bool:
        """Whether this is remembered of that very process."""
        return (self.pid, self.started) == (line.pid, line.started)

    @property
    def hurried(self) -> bool:
        """An operator is asking, so no rest holds."""
        return self.rest < 0
