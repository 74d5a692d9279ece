"""The configuration as plain values, defaults filled; light enough for `status`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct, field

from reconciler.core.places import state_directory as state_directory
from reconciler.core.units import Bytes, Endpoint, PortRange, Seconds


class Secret:
    """A text that cannot be printed, logged, compared or serialised by accident."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself. Only the code that sends it calls this."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(…)"

    __str__ = __repr__

    def __reduce__(self) -> Any:
        raise TypeError("cannot serialise a secret")


class SecretRef(Struct, frozen=True):
    """Where a secret is kept: `file` (a path), `env` (a name) or `credential` (systemd's); or
    `age`: in the config itself, encrypted."""

    kind: str
    name: str
    """Of what is encrypted: the beginning of its digest."""
    sealed: str = ""
    """What is encrypted: an armored text, or base64."""
    identity: SecretRef | None = None
    """Where the key is that opens it."""
    place: str = ""
    """file:line:column of what is encrypted."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    def __repr__(self) -> str:
        return f"SecretRef({self})"


class QemuNbd(Struct, frozen=True, kw_only=True):
    """How servers are run. Durations in seconds."""

    binary: str = "qemu-nbd"
    shared: int = 10
    """Clients at once; two connections per disk are the norm, a probe takes one."""
    start_timeout: Seconds = 10.0
    stop_grace: Seconds = 5.0
    cache: str | None = None
    aio: str | None = None
    discard: str | None = None
    detect_zeroes: str | None = None
    parallel: int = 0
    """Servers started at once; 0: four per core, where more gains nothing (measured)."""

    @property
    def safe(self) -> bool:
        """Nothing that a server acknowledges dies with it. Measured: 0 writes lost by kill -9."""
        return self.cache in ("writethrough", "directsync")


class Appliance(Struct, frozen=True, kw_only=True):
    """One SNA. Durations in seconds."""

    url: str
    connect_timeout: Seconds = 5.0
    timeout: Seconds = 30.0
    poll: Seconds = 10.0
    remembers_jobs: bool = False
    """It keeps its jobs over a restart, so that its "not found" is a no."""
    reports_end: bool = False
    """Its status may also end a run."""
    max_running: int = 8
    token: SecretRef | None = None


class VCenter(Struct, frozen=True, kw_only=True):
    """What the SNA needs to log in at a vCenter."""

    host: str
    user: str
    password: SecretRef


PORTS: Final = PortRange(10100, 10200)
"""The range that the field's tunnel forwards. Source: Sendense, October 2025."""
MIN_FREE: Final[Bytes] = 1 << 30
"""What a disk that was never backed up is reckoned to need: more than an idle system disk's first
minutes, less than would keep a small hub from beginning at all."""
DIGEST: Final = "sha256"
"""What is taken of a published image, where the config says nothing else."""
LISTEN: Final = Endpoint("127.0.0.1", 8082)
"""Where the field's client looks for the hub, by the tunnel. Source: Sendense, October 2025."""


TUNNEL_USER: Final = "tunnel"
"""As whom appliances come to the hub's sshd, where nothing else is said."""


API_SOCKET: Final = "api.sock"
"""The Unix socket in the state directory."""
REQUESTS: Final = "runs"
"""Where requests for runs are, in the state directory."""


class Limit(Struct, frozen=True):
    """How many VMs one revision may take away: a number, or a part of all in percent."""

    count: int = 0
    percent: float = 0.0
    least: int = 2
    """Even where the part is smaller: a hub of three VMs may lose one."""

    def of(self, total: int) -> int:
        """The most VMs that may go, of `total`."""
        return self.count or max(self.least, int(total * self.percent / 100))

    def __str__(self) -> str:
        return str(self.count) if self.count else f"max({self.least}, {self.percent:g} %)"


class Loop(Struct, frozen=True, kw_only=True):
    """How a directory is watched. Durations in seconds."""

    resync: Seconds = 30.0
    """Between two looks at a VM of which nothing was heard."""
    stale_after: Seconds = 300.0
    """How long the client of an accepted run may be silent before its SNA is asked about it."""
    healthy_after: Seconds = 60.0
    """How long a server lives before its end is an accident, and not the next of a crash loop."""
    prune: bool = False
    """Stop what the directory does not name any more."""
    max_delete: Limit = Limit(percent=25.0)
    """How much of that one revision may do without a person's word."""


class GitSource(Struct, frozen=True, kw_only=True):
    """The remote branch that is watched in place of a directory."""

    url: str = ""
    """Empty: none."""
    branch: str = "main"
    interval: Seconds = 30.0
    """From the end of one fetch to the next."""
    key: SecretRef | None = None
    """A file with the private key for ssh; `file` or `credential`, as ssh reads it itself."""
    token: SecretRef | None = None
    """For https."""
    allowed_signers: str | None = None
    """Absolute path of a file as in ssh-keygen(1); without a signature by one, no commit counts."""


class SqlInventory(Struct, frozen=True, kw_only=True):
    """A database that knows all disks. Durations in seconds."""

    url: str
    """`mysql://USER@HOST:PORT/DB`, `postgresql://USER@HOST:PORT/DB` or `sqlite:///PATH`; without a
    password."""
    password: SecretRef | None = None
    query: str = ""
    """Empty: that of the field's tables; see core/inventory_rows.py."""
    timeout: Seconds = 5.0
    """For all of one reading: to connect, to ask, and to take the answer."""

    @property
    def origin(self) -> str:
        """What people call it: without the user, and without options."""
        scheme, _, rest = self.url.partition("://")
        host, slash, name = rest.partition("?")[0].partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{name}"


class SpecRules(Struct, frozen=True, kw_only=True):
    """What specs may look at beside themselves."""

    root: str | None = None
    """Absolute path of the directory that files which specs name must lie in; None: the one that
    the specs were found in."""
    env: tuple[str, ...] = ()
    """Names, or globs of names, of the variables of the environment that they may read."""


class Notify(Struct, frozen=True, kw_only=True):
    """Who is told of troubles as they begin and end. Durations in seconds."""

    url: str = ""
    """Where messages are posted to; empty: nobody is told. Some receivers put a secret into it, so
    no error, log or document shows more of it than its host."""
    secret: SecretRef | None = None
    """What messages are signed with."""
    timeout: Seconds = 10.0
    """For the connection, and for the answer."""


class ApiToken(Struct, frozen=True):
    """Who may ask the API for what."""

    name: str
    secret: SecretRef
    scopes: tuple[str, ...]
    """Of core.access.SCOPES."""


class Tls(Struct, frozen=True):
    """Absolute paths of PEM files."""

    cert: str
    """The certificate, and those that lead from it to a root."""
    key: str
    client_ca: str | None = None
    """Who must have signed the certificate of each client; None: clients need none."""


class ApiLimits(Struct, frozen=True, kw_only=True):
    """How much the API takes. Durations in seconds."""

    body: Bytes = 1 << 20
    """Of a request. A telemetry post that names 100 disks has about 20 KiB."""
    headers: Bytes = 16 << 10
    """Of a request, with its path and query."""
    rate: float = 100.0
    """Requests a second of one client: of a token, a user of the socket, or an address. Twice as
    many may come at once. Callbacks are counted by themselves."""
    callback_rate: float = 1000.0
    """The same for callbacks: all clients come out of the tunnel with one address, and one that is
    turned away may not ask again."""
    concurrency: int = 32
    """Requests of one scope that are worked on at once; others wait for a place."""
    connections: int = 256
    """Open at once; beyond that, who has asked nothing for longest is let go."""
    timeout: Seconds = 10.0
    """Until a request that was begun must have arrived whole."""
    idle: Seconds = 75.0
    """How long a connection may rest between two requests. Longer than what clients leave between
    two posts of telemetry, so that none is sent into a connection that is just being closed."""


class Api(Struct, frozen=True, kw_only=True):
    """Who may ask, and how much."""

    tokens: tuple[ApiToken, ...] = ()
    callbacks_closed: bool = False
    """A token of the list may call back, so others may not."""
    socket: str | None = None
    """Absolute path; empty: there is none; None: that of the state directory."""
    group: str = ""
    """Whose members may use the socket; empty: the hub's own user and root alone."""
    tls: Tls | None = None
    limits: ApiLimits = field(default_factory=ApiLimits)


class Settings(Struct, frozen=True, kw_only=True):
    """What holds for the whole hub."""

    hub: str
    state: str
    repositories: Mapping[str, str]
    """Name → absolute root."""
    min_free: Mapping[str, Bytes] = field(default_factory=dict)
    """Repository → what a new image in it is reckoned to need at least; see core/space.py."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Repository → the digest that is taken of an image when its run is published: `sha256`, or
    `none`."""
    ports: PortRange = PORTS
    bind: str = "127.0.0.1"
    advertise: str = "127.0.0.1"
    qemu_nbd: QemuNbd = field(default_factory=QemuNbd)
    snas: Mapping[str, Appliance] = field(default_factory=dict)
    vcenters: Mapping[str, VCenter] = field(default_factory=dict)
    inventory: str | None = None
    """Absolute path of the file that knows all disks."""
    inventory_sql: SqlInventory | None = None
    """The database that does, in place of a file."""
    inventory_required: bool = False
    listen: Endpoint = LISTEN
    """Where the API is, and with it the callbacks of the appliances' clients."""
    api: Api = field(default_factory=Api)
    loop: Loop = field(default_factory=Loop)
    git: GitSource = field(default_factory=GitSource)
    notify: Notify = field(default_factory=Notify)
    specs: SpecRules = field(default_factory=SpecRules)
    tunnel_user: str = TUNNEL_USER
    """The account of this hub that its appliances' tunnels come to."""

    def repository_of(self, path: str) -> str | None:
        """The repository that a file lies in, by its path; the innermost, if one is in another."""
        inside = [n for n, root in self.repositories.items() if below(root, path)]
        return max(inside, key=lambda name: len(self.repositories[name]), default=None)

    def least_free(self, path: str) -> Bytes:
        """`min_free` of the repository that a file lies in."""
        return self.min_free.get(self.repository_of(path) or "", MIN_FREE)

    def digest(self, path: str) -> str:
        """`digest` of the repository that a file lies in: `sha256`, or `none`."""
        return self.digests.get(self.repository_of(path) or "", DIGEST)

    @property
    def secrets(self) -> tuple[SecretRef, ...]:
        """Every secret that the config names, and the keys to those that are encrypted."""
        found = [
            *(sna.token for sna in self.snas.values()),
            *(one.password for one in self.vcenters.values()),
            self.inventory_sql.password if self.inventory_sql else None,
            self.git.key,
            self.git.token,
            self.notify.secret,
            *(one.secret for one in self.api.tokens),
        ]
        refs = [ref for one in found if one for ref in (one, one.identity) if ref]
        return tuple(dict.fromkeys(refs))

    @property
    def api_socket(self) -> str:
        """The path of the API's Unix socket; empty: there is none."""
        return f"{self.state}/{API_SOCKET}" if self.api.socket is None else self.api.socket

    @property
    def requests(self) -> str:
        """Where requests for runs are: a file per VM."""
        return f"{self.state}/{REQUESTS}"

    @property
    def checkouts(self) -> str:
        """Where a remote branch is checked out."""
        return f"{self.state}/source"

    def to_json(self) -> dict[str, Any]:
        """What a later `status` needs to judge by; no secret, nor the way to one."""
        qemu = self.qemu_nbd
        return {
            "hub": self.hub,
            "state": self.state,
            "repositories": dict(self.repositories),
            "min_free": dict(self.min_free),
            "digests": dict(self.digests),
            "ports": str(self.ports),
            "bind": self.bind,
            "advertise": self.advertise,
            "qemu_nbd": {name: getattr(qemu, name) for name in QemuNbd.__struct_fields__},
            "snas": {
                name: {
                    "url": sna.url,
                    "max_running": sna.max_running,
                    "poll": sna.poll,
                    "reports_end": sna.reports_end,
                }
                for name, sna in self.snas.items()
            },
            "healthy_after": self.loop.healthy_after,
            "stale_after": self.loop.stale_after,
            "listen": str(self.listen),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Settings:
        return cls(
            hub=value["hub"],
            state=value["state"],
            repositories=value["repositories"],
            min_free=value.get("min_free", {}),  # a store of before it was there has none
            digests=value.get("digests", {}),
            ports=PortRange.parse(value["ports"]),
            bind=value["bind"],
            advertise=value["advertise"],
            qemu_nbd=QemuNbd(**value["qemu_nbd"]),
            snas={name: Appliance(**sna) for name, sna in value["snas"].items()},
            loop=Loop(
                healthy_after=value.get("healthy_after", Loop().healthy_after),
                stale_after=value.get("stale_after", Loop().stale_after),
            ),
            listen=Endpoint.parse(value["listen"]) if "listen" in value else LISTEN,
        )


def below(root: str, path: str) -> bool:
    """Whether a path lies in a directory, by their names alone."""
    return path.startswith(f"{root.rstrip('/')}/")


CONFIG_NAMES: Final = ("hub", "state", "repositories", "ports", "qemu_nbd", "snas", "vcenters")
