"""The SSH tunnel between an appliance and its hub: what it carries, ssh's argv, and our mark in it.

The appliance dials the hub. Both sides are made from the same `Reach`: the forwards that its ssh
asks for, and what the hub's sshd permits.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct, convert, field
from msgspec import json as as_json

from reconciler.core.settings import LISTEN, PORTS, SecretRef
from reconciler.core.units import Endpoint, Port, PortRange, Seconds

PREFIX: Final = "tunnel/"
"""What the names of tunnels begin with wherever VMs are named too; no VM's can hold a slash."""
LOOPBACK: Final = "127.0.0.1"
"""Both ends of every forward, always written out: ssh asks for "localhost" where an address is left
out, which `PermitListen 127.0.0.1:PORT` does not permit. Measured with OpenSSH 9.2."""
REVERSE: Final[Port] = 9081
"""Where the hub finds the appliance. Source: Sendense, October 2025."""
APPLIANCE: Final = Endpoint(LOOPBACK, 8081)
"""Where an appliance's own API listens. Source: Sendense, October 2025."""
MARK: Final = "RECONCILER_TUNNEL"
"""The variable whose setting is our mark in ssh's argv. It goes nowhere: ssh sends variables with a
session, and with -N it opens none. Source: ssh(1), ssh_config(5) SetEnv."""
VERSION: Final = "1"
"""First word of the mark; it changes when its fields do."""
_NAME: Final = r"([A-Za-z0-9][A-Za-z0-9._-]{0,99})"
_MARK: Final = re.compile(f"SetEnv={MARK}={VERSION}:{_NAME}:{_NAME}:([a-z]+)")
_KEY: Final = re.compile(r"((?:ssh|ecdsa|sk)-[a-z0-9@.-]+)\s+([A-Za-z0-9+/]+=*)(?:\s.*)?")

WHOLE: Final = "whole"
CONTROL: Final = "control"
DATA: Final = "data"
"""The parts of a tunnel: a connection for all, or one for the APIs and one for exports."""


class HostKey(Struct, frozen=True):
    """A host key of the hub, as in a `.pub` file."""

    kind: str
    """`ssh-ed25519`, `ecdsa-sha2-nistp256`, `ssh-rsa` …"""
    blob: str
    """Base64."""

    @classmethod
    def parse(cls, text: str) -> HostKey:
        """From a line of a `.pub` or known_hosts file, a comment behind it allowed.

        Raises ValueError.
        """
        found = _KEY.search(text.strip())
        if found is None or (found.start() and not text.strip()[found.start() - 1].isspace()):
            raise ValueError("write a public host key, like `ssh-ed25519 AAAAC3…`")
        import base64  # late: `status` of a hub without tunnels loads neither this nor hashlib

        kind, blob = found.group(1), found.group(2)
        try:
            raw = base64.b64decode(blob, validate=True)
        except ValueError as error:
            raise ValueError(f"the host key is no base64: {error}") from error
        # The blob begins with its own kind. Source: RFC 4253, section 6.6.
        if not raw.startswith(len(kind).to_bytes(4, "big") + kind.encode()) or len(raw) < 32:
            raise ValueError(f"the host key is cut off, or no {kind} key")
        return cls(kind, blob)

    def __str__(self) -> str:
        return f"{self.kind} {self.blob}"

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` prints it. Source: RFC 4648 without padding, of SHA-256."""
        import base64
        import hashlib

        digest = hashlib.sha256(base64.b64decode(self.blob)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


class Reach(Struct, frozen=True, kw_only=True):
    """What a tunnel carries, the same for both of its ends."""

    ports: PortRange = PORTS
    """Exports: the hub's range, on the same numbers at the appliance."""
    api: Port = LISTEN.port
    """The hub's API."""
    reverse: Port = REVERSE
    """Where the hub finds this appliance; each has its own."""
    host: str = LOOPBACK
    """What the forwards name at the hub."""

    @property
    def opens(self) -> list[Endpoint]:
        """What the hub's sshd must let the appliance open: `PermitOpen`."""
        return [Endpoint(self.host, port) for port in (*self.ports, self.api)]

    @property
    def listens(self) -> Endpoint:
        """Where the hub's sshd must let it listen: `PermitListen`."""
        return Endpoint(self.host, self.reverse)


class Tunnel(Struct, frozen=True, kw_only=True):
    """What should be true of one tunnel, as its appliance's side wants it. Durations in seconds."""

    name: str
    up: bool = True
    host: str = ""
    port: Port = 443
    """Source: Sendense, October 2025."""
    user: str = ""
    identity: SecretRef | None = None
    """`file` or `credential`: ssh reads the private key itself."""
    host_key: HostKey | None = None
    host_key_file: str = ""
    """Absolute path of the file that has it, where the spec has not."""
    reach: Reach = field(default_factory=Reach)
    bind: str = LOOPBACK
    """Where the appliance's programs find the forwards."""
    appliance: Endpoint = APPLIANCE
    """What the reverse port leads to."""
    ciphers: tuple[str, ...] = ()
    """In the order of preference; empty: OpenSSH's own."""
    alive_interval: Seconds = 15.0
    alive_count: int = 3
    """So many unanswered questions, one each `alive_interval`, end a connection."""
    connect_timeout: Seconds = 10.0
    split: bool = False
    """Exports have a connection of their own, so that control never waits behind bulk data."""
    token: SecretRef | None = None
    """For the question which exports are up, where the hub's API asks for one."""
    place: str = ""
    """file:line of its declaration."""

    @property
    def subject(self) -> str:
        """Its name where VMs are named too."""
        return PREFIX + self.name

    @property
    def target(self) -> str:
        """The hub, for people."""
        return f"{self.user}@{Endpoint(self.host, self.port)}"

    @property
    def parts(self) -> tuple[str, ...]:
        """Its connections."""
        return (CONTROL, DATA) if self.split else (WHOLE,)

    def ports(self, part: str) -> tuple[Port, ...]:
        """The local ports that a connection listens on, in rising order."""
        data = tuple(self.reach.ports) if part != CONTROL else ()
        control = (self.reach.api,) if part != DATA else ()
        return tuple(sorted((*data, *control)))

    def to_json(self) -> dict[str, Any]:
        # As it comes back from the store, so that the two can be compared.
        value: dict[str, Any] = as_json.decode(as_json.encode(self))
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Tunnel:
        return convert(value, cls)


class TunnelMark(Struct, frozen=True):
    """Whose ssh this is, and for what."""

    hub: str
    """The `hub` of the config that dialled: the name of this side."""
    tunnel: str
    part: str

    def __str__(self) -> str:
        return f"{VERSION}:{self.hub}:{self.tunnel}:{self.part}"

    @property
    def subject(self) -> str:
        return PREFIX + self.tunnel


def mark_of(line: Sequence[str]) -> TunnelMark | None:
    """The mark in an argv, or None if it is not one of ours."""
    if not line or posixpath.basename(line[0]) != "ssh":
        return None
    for word in line:
        if found := _MARK.fullmatch(word):
            return TunnelMark(*found.groups())
    return None


def known_hosts(tunnel: Tunnel, key: HostKey) -> tuple[str, str]:
    """The file by which ssh knows the hub: its name and its text.

    The name holds a digest of the text, so that another key is another argv, and a restart.
    """
    import hashlib

    text = f"{tunnel.name} {key}\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{tunnel.name}-{digest}.known_hosts", text


def options(tunnel: Tunnel, identity: str, known: str) -> dict[str, str]:
    """What ssh is told of one connection, as ssh_config(5) names it, beside its forwards.

    `identity`, `known`: absolute paths of the private key and of the file with the host key. The
    same for a process of ours and for what `render tunnel` prints.
    """
    found = {
        "HostName": tunnel.host,
        "Port": str(tunnel.port),
        "User": tunnel.user,
        "IdentityFile": identity,
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "PreferredAuthentications": "publickey",
        "BatchMode": "yes",
        # Only the pinned key counts, under the tunnel's name, whatever the address is today.
        "HostKeyAlias": tunnel.name,
        "UserKnownHostsFile": known,
        "GlobalKnownHostsFile": "none",
        "StrictHostKeyChecking": "yes",
        "CheckHostIP": "no",
        "UpdateHostKeys": "no",
        # Half a tunnel is none: without it ssh goes on when the hub refuses the reverse port.
        "ExitOnForwardFailure": "yes",
        "ServerAliveInterval": f"{max(1, round(tunnel.alive_interval))}",
        "ServerAliveCountMax": str(tunnel.alive_count),
        "ConnectTimeout": f"{max(1, round(tunnel.connect_timeout))}",
        "ConnectionAttempts": "1",
        # Images are compressed, or do not compress: it costs most of the rate.
        "Compression": "no",
        # Without it bulk data is marked CS1, which networks may put behind everything else.
        "IPQoS": "none",
        "ControlMaster": "no",
        "ControlPath": "none",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "GatewayPorts": "no",
        "PermitLocalCommand": "no",
        "RequestTTY": "no",
        "LogLevel": "INFO",
    }
    if tunnel.ciphers:
        found["Ciphers"] = ",".join(tunnel.ciphers)
    return found


def forwards(tunnel: Tunnel, part: str) -> Iterator[tuple[str, str, str]]:
    """(`LocalForward` or `RemoteForward`, where is listened, where it leads) of a connection."""
    reach = tunnel.reach
    for port in tunnel.ports(part):
        yield (
            "LocalForward",
            str(Endpoint(tunnel.bind, port)),
            str(Endpoint(reach.host, port)),
        )
    if part != DATA:
        yield "RemoteForward", str(reach.listens), str(tunnel.appliance)


_FLAGS: Final = {"LocalForward": "-L", "RemoteForward": "-R"}


def argv(tunnel: Tunnel, part: str, hub: str, identity: str, known: str) -> tuple[str, ...]:
    """The command line of one connection: words, never a text for a shell. It holds no secret."""
    line = ["ssh", "-F", "none", "-N", "-T"]
    line += ["-o", f"SetEnv={MARK}={TunnelMark(hub, tunnel.name, part)}"]
    for name, value in options(tunnel, identity, known).items():
        if name != "HostName":
            line += ["-o", f"{name}={value}"]
    for name, listen, to in forwards(tunnel, part):
        line += [_FLAGS[name], f"{listen}:{to}"]
    return (*line, "--", tunnel.host)
