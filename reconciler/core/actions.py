"""The steps a plan is made of; each says why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, TypeAlias

from msgspec import Struct, field

from reconciler.core.actual import Server
from reconciler.core.call import Call, CallEvent
from reconciler.core.desired import Export, Vm
from reconciler.core.ledger import Lease
from reconciler.core.tunnel import Tunnel
from reconciler.core.tunnel_seen import Dialled, Ssh
from reconciler.core.units import Bytes, Seconds, format_size, stamp

KINDS = ("create", "start", "adopt", "restart", "stop", "release", "call", "wait", "hold", "refuse")
"""Every word that an action can have in JSON."""
CHANGES = frozenset(KINDS[:7])
"""Those that change something; the other three say why nothing does."""


class _Action(Struct, frozen=True, kw_only=True, tag=True):
    kind: ClassVar[str]
    vm: str
    disk: int | None = None
    """Disk key; None: the whole VM."""
    cause: str
    """A CamelCase word that programs can rely on."""
    why: str


class Create(_Action, frozen=True, kw_only=True):
    """Make an image of the right size where none is."""

    kind = "create"
    export: Export

    def what(self) -> str:
        size = format_size(self.export.size or 0)
        return f"create {size} qcow2" + (" overlay" if self.export.backing else "")


class Start(_Action, frozen=True, kw_only=True):
    """Bind the port, lease it and serve the image on it."""

    kind = "start"
    export: Export
    lease: Lease

    def what(self) -> str:
        return f"serve as {self.export.name} on {self.lease.port}"


class Restart(_Action, frozen=True, kw_only=True):
    """Serve again on the same port; `server` is what still runs, None if it is gone."""

    kind = "restart"
    export: Export
    lease: Lease
    server: Server | None
    taints: bool = False
    """A client may have lost acknowledged writes: the run can only fail."""
    leased: bool = False
    """The ledger has its lease already, with this very port."""

    def what(self) -> str:
        return f"restart on {self.lease.port}"


class Adopt(_Action, frozen=True, kw_only=True):
    """Take a running server of ours into the ledger; it is not touched."""

    kind = "adopt"
    export: Export
    lease: Lease
    server: Server

    def what(self) -> str:
        return f"adopt pid {self.server.pid} on {self.lease.port}"


class Witness(_Action, frozen=True, kw_only=True):
    """A witness knows what became of a call; the ledger takes it."""

    kind = "adopt"
    call: Call
    event: CallEvent

    def what(self) -> str:
        return "note what became of the call"


class Stop(_Action, frozen=True, kw_only=True):
    """End a server, wait until it is gone, release its port."""

    kind = "stop"
    server: Server
    lease: Lease | None

    def what(self) -> str:
        return f"stop pid {self.server.pid}, port {self.server.mark.port} released"


class Release(_Action, frozen=True, kw_only=True):
    """Give back a port that no server holds any more."""

    kind = "release"
    lease: Lease

    def what(self) -> str:
        return f"release port {self.lease.port}"


class Conclude(_Action, frozen=True, kw_only=True):
    """The run is over; its exports are no longer protected."""

    kind = "release"
    call: Call
    event: CallEvent
    servers: tuple[Server, ...] = ()
    """Those of a run that is complete, to be flushed first."""
    told: Mapping[int, Bytes] = field(default_factory=dict)
    """Position → how much the SNA's client says that it transferred."""

    def what(self) -> str:
        return f"end run {self.call.run}"


class Notify(_Action, frozen=True, kw_only=True):
    """The one call, made when every disk of the VM answers."""

    kind = "call"
    target: Vm

    def what(self) -> str:
        count = len(self.target.exports)
        return f"POST backup/start, once, when {count} of {count} disks answer"


class Wait(_Action, frozen=True, kw_only=True):
    """Nothing to do until something else has happened; no person is needed."""

    kind = "wait"
    until: Seconds = 0.0
    """When it ends by the clock alone; 0: something else ends it."""

    def what(self) -> str:
        return f"wait until {stamp(self.until)}" if self.until else "wait"


class Hold(_Action, frozen=True, kw_only=True):
    """A guard keeps us from a change; a person, or time, can lift it."""

    kind = "hold"
    subject: str = "nothing is changed"
    call: Call | None = None
    event: CallEvent | None = None
    """What the ledger takes note of about `call`."""
    remember: bool = False
    """The ledger does not have `call` yet and should."""
    until: Seconds = 0.0
    """When it ends by the clock alone; 0: it does not."""

    def what(self) -> str:
        return self.subject


class Refuse(_Action, frozen=True, kw_only=True):
    """What was asked for cannot be right; an edit or an order is needed."""

    kind = "refuse"

    def what(self) -> str:
        return "refused"


class _OfTunnel(_Action, frozen=True, kw_only=True):
    """About one connection of a tunnel; `vm` is `tunnel/NAME`."""

    tunnel: Tunnel
    part: str

    def connection(self) -> str:
        """Which one, for people."""
        reach = self.tunnel.reach
        forwards = len(self.tunnel.ports(self.part))
        back = "" if self.part == "data" else f", {reach.listens} back to {self.tunnel.appliance}"
        which = "" if self.part == "whole" else f" for {self.part}"
        return f"{self.tunnel.target}{which}: {forwards} forward{'s' * (forwards != 1)}{back}"


class Dial(_OfTunnel, frozen=True, kw_only=True):
    """Start the ssh of a connection, and wait until what it carries answers."""

    kind = "start"
    argv: tuple[str, ...]
    known: Dialled

    def what(self) -> str:
        return f"dial {self.connection()}"


class Redial(_OfTunnel, frozen=True, kw_only=True):
    """Dial a connection again; `ssh` is what still runs, None if it is gone."""

    kind = "restart"
    argv: tuple[str, ...]
    known: Dialled
    ssh: Ssh | None

    def what(self) -> str:
        return f"dial again {self.connection()}"


class TakeOver(_OfTunnel, frozen=True, kw_only=True):
    """Take a running ssh of ours into the ledger; it is not touched."""

    kind = "adopt"
    ssh: Ssh

    def what(self) -> str:
        return f"adopt pid {self.ssh.pid}"


class HangUp(_Action, frozen=True, kw_only=True):
    """End the ssh of a connection."""

    kind = "stop"
    ssh: Ssh

    def what(self) -> str:
        return f"stop pid {self.ssh.pid}, the {self.ssh.mark.part} connection"


Action: TypeAlias = (
    Create
    | Start
    | Restart
    | Adopt
    | Witness
    | Stop
    | Release
    | Conclude
    | Notify
    | Wait
    | Hold
    | Refuse
    | Dial
    | Redial
    | TakeOver
    | HangUp
)
