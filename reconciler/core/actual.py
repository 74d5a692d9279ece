"""What was seen on the host: ours by mark, the rest foreign."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from reconciler.core.appliances import Health
from reconciler.core.call import Report
from reconciler.core.mark import Mark
from reconciler.core.tunnel_seen import Ssh, TunnelSeen
from reconciler.core.units import Bytes, Port, Seconds


class Identity(Struct, frozen=True):
    """One process for good: the kernel reuses `pid`, never the pair.

    `started` is in clock ticks since boot. Source: proc(5), /proc/PID/stat, field 22.
    """

    pid: int
    started: int


class Handshake(Struct, frozen=True):
    """What a server answered to an NBD handshake under an export name."""

    size: Bytes | None = None
    """None: it did not answer well; `error` says how."""
    read_only: bool = False
    description: str = ""
    error: str = ""

    @property
    def answered(self) -> bool:
        return self.size is not None


class Server(Struct, frozen=True, kw_only=True):
    """A qemu-nbd of ours."""

    identity: Identity
    argv: tuple[str, ...]
    mark: Mark
    starting: bool = False
    """Still the small step before exec."""
    age: Seconds = 0.0
    """How long it has lived, of one that is starting."""
    listening: bool = True
    """It holds the listening socket of its port, and no other."""
    holds_image: bool = True
    """The file that it has open is the one at its image's path."""
    clients: int = 0
    """Established connections of others than us."""
    handshake: Handshake | None = None

    @property
    def pid(self) -> int:
        return self.identity.pid


class Foreign(Struct, frozen=True, kw_only=True):
    """A qemu-nbd that is not ours: reported, never touched."""

    pid: int
    what: str
    image: str | None
    ports: tuple[Port, ...]


class Listener(Struct, frozen=True):
    """Somebody's listening socket in the range. `pid` None: not ours to see."""

    port: Port
    address: str
    pid: int | None = None
    name: str = ""

    def __str__(self) -> str:
        who = f"{self.name or 'a process'} (pid {self.pid})" if self.pid else "an unknown process"
        return f"{who} on {self.address}:{self.port}"


class Image(Struct, frozen=True, kw_only=True):
    """A file where an image should be."""

    path: str
    exists: bool
    format: str = ""
    size: Bytes = 0
    """Virtual size."""
    backing: str | None = None
    """Absolute path."""
    corrupt: bool = False
    """qemu has marked it so: what was read of it contradicted itself."""
    pristine: bool = False
    """Nothing was ever written into it."""
    allocated: Bytes = 0
    """What it takes of its file system."""
    written: Seconds = 0.0
    """When it was written into last; 0: not known."""
    device: int = 0
    """The file system that it is or would be on: st_dev. 0: not known."""
    outside: str | None = None
    """Where it really is, if symlinks lead out of its repository."""
    error: str = ""
    locked: bool = False
    """Some process holds a lock on it."""
    holder: str = ""
    """A foreign process that holds it open for writing, with its pid."""


class FileSystem(Struct, frozen=True, kw_only=True):
    """A file system that images are on."""

    mount: str
    """Where it is mounted, as far up as the images' paths lead."""
    free: Bytes
    """What an ordinary user may still take of it."""
    read_only: bool = False


class Mount(Struct, frozen=True):
    """The file system that a path is on, as the kernel's table of mounts has it."""

    point: str
    kind: str
    source: str
    options: str = ""

    def __str__(self) -> str:
        return f"{self.kind}, {self.source} at {self.point}"


class Actual(Struct, frozen=True, kw_only=True):
    """One look at the host."""

    servers: tuple[Server, ...] = ()
    foreign: tuple[Foreign, ...] = ()
    listeners: Mapping[Port, Listener] = field(default_factory=dict)
    """Foreign listeners in the port range."""
    images: Mapping[str, Image] = field(default_factory=dict)
    claims: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """(VM, run) → id of the state directory that claimed it."""
    rivals: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """(VM, run) → another state directory that claimed it and still exists."""
    intents: frozenset[tuple[str, str, int]] = frozenset()
    """(VM, run, attempt) whose repository says that an SNA may have been called."""
    tainted: frozenset[tuple[str, str, int]] = frozenset()
    """(VM, run, attempt) whose repository says that a server died under a client."""
    troubles: Mapping[str, str] = field(default_factory=dict)
    """VM → why its repository could not be looked at."""
    hangs: Mapping[str, str] = field(default_factory=dict)
    """VM → which repository of it gives no answer. Nothing that was asked of it is known."""
    file_systems: Mapping[int, FileSystem] = field(default_factory=dict)
    """By st_dev."""
    others: Mapping[str, Image] = field(default_factory=dict)
    """Images that only their space is asked of: of runs out of scope, and of earlier runs."""
    reports: Mapping[str, Report] = field(default_factory=dict)
    """Job id → what its SNA says."""
    appliances: Mapping[str, Health] | None = field(default_factory=dict)
    """SNA → what it answered to a health check, of those for which a run is to begin. None: none
    was asked, and what was found last counts."""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """vCenter or SNA → why its secret cannot be read."""
    tunnels: Mapping[str, TunnelSeen] = field(default_factory=dict)
    """`tunnel/NAME` → what was seen of it."""
    lines: tuple[Ssh, ...] = ()
    """Every ssh of ours, also of tunnels that are not in scope."""
    unheard: str = ""
    """Why nobody takes the callbacks of the active runs in scope; empty: somebody does, or there is
    no such run."""
    unbindable: frozenset[Port] = frozenset()
    """Ports that could not be bound although nobody is seen there."""
