"""What may be written about tunnels, checked, and what it means with the config that holds."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from msgspec import Struct
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from reconciler.core.config import Duration, Path, SecretModel, _address, _endpoint, _range
from reconciler.core.document import Document
from reconciler.core.document import Path as Keys
from reconciler.core.errors import Diagnostic, Place
from reconciler.core.settings import LISTEN, TUNNEL_USER, SecretRef, Settings
from reconciler.core.spec import Name, Strict
from reconciler.core.tunnel import APPLIANCE, LOOPBACK, PREFIX, REVERSE, HostKey, Reach, Tunnel
from reconciler.core.units import Endpoint, PortRange


def checked_host(value: str) -> str:
    """A host's name or address; it begins with no dash. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}|[0-9A-Fa-f:]{2,39}", value):
        raise ValueError(f"{value[:60]!r} is no host name or address")
    return value


def checked_user(value: str) -> str:
    """The name of an account. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", value):
        raise ValueError(f"{value[:60]!r} is no user's name")
    return value


def _cipher(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9@.-]{0,63}", value):
        raise ValueError(f"{value[:60]!r} is no cipher of `ssh -Q cipher`")
    return value


def _host_key(value: object) -> object:
    if isinstance(value, str):
        HostKey.parse(value)
    return value


TcpPort = Annotated[int, Field(ge=1, le=65535)]


class HubSpec(Strict):
    """Where the appliance finds the hub's sshd."""

    host: Annotated[str, AfterValidator(checked_host)]
    port: TcpPort = 443


class IdentitySpec(Strict):
    """Where the private key is; ssh reads it itself, so it is a file."""

    file: Path | None = None
    credential: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> IdentitySpec:
        if (self.file is None) == (self.credential is None):
            raise ValueError("name exactly one of file and credential: ssh reads the key itself")
        return self


class KeyFileSpec(Strict):
    """A file with the host key, which `reconciler tunnel trust` writes."""

    file: Path


class ForwardSpec(Strict):
    """What the appliance reaches at the hub, on the same numbers."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    ports: Annotated[PortRange, BeforeValidator(_range)] | None = None
    api: TcpPort | None = None
    bind: Annotated[str, AfterValidator(_address)] = LOOPBACK
    to: Annotated[str, AfterValidator(_address)] = LOOPBACK


class ReverseSpec(Strict):
    """How the hub reaches the appliance."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    port: TcpPort = REVERSE
    to: Annotated[Endpoint, BeforeValidator(_endpoint)] = APPLIANCE


class KeepaliveSpec(Strict):
    """When a connection of which nothing is heard is given up."""

    interval: Duration = 15.0
    count: Annotated[int, Field(ge=1, le=100)] = 3


class TunnelSpec(Strict):
    """One tunnel as a person writes it, at the appliance's side."""

    name: Name
    state: Literal["up", "down"] = "up"
    hub: HubSpec | None = None
    user: Annotated[str, AfterValidator(checked_user)] = TUNNEL_USER
    identity: IdentitySpec | None = None
    host_key: Annotated[str | KeyFileSpec, BeforeValidator(_host_key)] | None = None
    forward: ForwardSpec = ForwardSpec()
    reverse: ReverseSpec = ReverseSpec()
    ciphers: Annotated[
        list[Annotated[str, AfterValidator(_cipher)]] | None, Field(min_length=1)
    ] = None
    keepalive: KeepaliveSpec = KeepaliveSpec()
    connect_timeout: Duration = 10.0
    split: bool = False
    token: SecretModel | None = None


class DeclaredTunnel(Struct, frozen=True):
    """A checked tunnel with the way back to the text that declares it."""

    spec: TunnelSpec
    document: Document
    path: Keys
    base: str
    """Absolute path of the directory that its relative paths start from."""

    def place(self, *path: str | int, key: bool = False) -> Place:
        return self.document.place((*self.path, *path), key=key)

    @property
    def subject(self) -> str:
        """Its name where VMs are named too."""
        return PREFIX + self.spec.name


def contradictions(one: DeclaredTunnel) -> Iterator[Diagnostic]:
    """What no single key can tell."""
    spec = one.spec

    def error(summary: str, *path: str | int) -> Diagnostic:
        return Diagnostic("error", f"tunnel {spec.name}: {summary}", one.place(*path), one.subject)

    if spec.token and spec.token.age is not None:
        yield error("`age` is for the config; name a file, env or credential here", "token", "age")
    if spec.state == "down":
        return
    if spec.hub is None:
        yield error("the key 'hub' is missing: write `hub: {host: NAME, port: 443}`")
    if spec.identity is None:
        yield error("the key 'identity' is missing: write `identity: {file: PATH}`")
    if spec.host_key is None:
        yield error(
            "the key 'host_key' is missing, and without it anybody could be the hub: write "
            "`host_key: {file: PATH}`, then reconciler tunnel trust " + spec.name
        )


def clashes(tunnels: Sequence[DeclaredTunnel]) -> Iterator[Diagnostic]:
    """What two tunnels cannot both have; neither is used."""
    names: dict[str, DeclaredTunnel] = {}
    for one in tunnels:
        first = names.setdefault(one.subject, one)
        if first is not one:
            yield Diagnostic(
                "error",
                f"the tunnel {one.spec.name!r} is declared twice (first at {first.place('name')}); "
                "neither is used: keep one",
                one.place("name"),
                one.subject,
            )


def definite(one: DeclaredTunnel, settings: Settings) -> Tunnel:
    """The tunnel with all that the config says filled in."""
    spec = one.spec

    def path(text: str) -> str:
        return posixpath.normpath(posixpath.join(one.base, text))

    def secret(model: SecretModel | None) -> SecretRef | None:
        if model is None:
            return None
        if model.file is not None:
            return SecretRef("file", path(model.file))
        if model.env is not None:
            return SecretRef("env", model.env)
        return SecretRef("credential", model.credential or "")

    identity = None
    if spec.identity:
        identity = (
            SecretRef("file", path(spec.identity.file))
            if spec.identity.file is not None
            else SecretRef("credential", spec.identity.credential or "")
        )
    key, forward = spec.host_key, spec.forward
    return Tunnel(
        name=spec.name,
        up=spec.state == "up",
        host=spec.hub.host if spec.hub else "",
        port=spec.hub.port if spec.hub else 443,
        user=spec.user,
        identity=identity,
        host_key=HostKey.parse(key) if isinstance(key, str) else None,
        host_key_file=path(key.file) if isinstance(key, KeyFileSpec) else "",
        reach=Reach(
            ports=forward.ports or settings.ports,
            api=forward.api or LISTEN.port,
            reverse=spec.reverse.port,
            host=forward.to,
        ),
        bind=forward.bind,
        appliance=spec.reverse.to,
        ciphers=tuple(spec.ciphers or ()),
        alive_interval=spec.keepalive.interval,
        alive_count=spec.keepalive.count,
        connect_timeout=spec.connect_timeout,
        split=spec.split,
        token=secret(spec.token),
        place=f"{one.place('name')}",
    )


def build(
    tunnels: Sequence[DeclaredTunnel], settings: Settings
) -> tuple[Mapping[str, Tunnel], list[Diagnostic]]:
    """`tunnel/NAME` → the tunnel; and what is wrong with those that cannot be used."""
    found: dict[str, tuple[DeclaredTunnel, Tunnel]] = {}
    wrong: list[Diagnostic] = []
    taken: dict[object, str] = {}
    for one in tunnels:
        tunnel = definite(one, settings)
        if tunnel.up:
            own = settings.listen
            if own.port == tunnel.reach.api and own.host in (tunnel.bind, "localhost"):
                wrong.append(
                    Diagnostic(
                        "error",
                        f"tunnel {tunnel.name}: it brings the hub's API to {own}, where this "
                        "machine's own API listens: write another `api: {listen: "
                        f'"{own.host}:{own.port + 1}"}}` into the config',
                        one.place("name"),
                        one.subject,
                    )
                )
                continue
            uses: dict[object, str] = {
                (tunnel.bind, port): f"{tunnel.bind}:{port}" for port in tunnel.ports("whole")
            }
            there = (tunnel.host, tunnel.port, tunnel.reach.reverse)
            uses[there] = f"port {tunnel.reach.reverse} of {tunnel.host}"
            other = next((use for use in uses if use in taken), None)
            if other is not None:
                wrong.append(
                    Diagnostic(
                        "error",
                        f"tunnel {tunnel.name}: {uses[other]} is the tunnel {taken[other]}'s "
                        "already; give one of them another `bind`, other ports, or another "
                        "`reverse` port",
                        one.place("name"),
                        one.subject,
                    )
                )
                continue
            taken |= dict.fromkeys(uses, tunnel.name)
        found[one.subject] = (one, tunnel)
    return {subject: tunnel for subject, (_, tunnel) in found.items()}, wrong


def dumped(one: DeclaredTunnel) -> str:
    """All that is written of a tunnel, as text to compare."""
    return repr(one.spec)
