"""Who may come in, as the config says it: its tokens, its certificate, its group; read again at a
reload. Light: a command that only waits loads this."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from reconciler.core.access import Access, Key, Peer, keyring, sentence
from reconciler.core.errors import HostError
from reconciler.core.settings import ApiLimits, Settings
from reconciler.host import files, sockets, tls

if TYPE_CHECKING:
    import ssl

PEER: Final = "reconciler.peer"
"""Where a request says who is at the other end of the Unix socket (a Peer)."""
WHO: Final = "reconciler.who"
"""Where a request says who asks, in words; absent: somebody who was not asked."""
_PEERGROUPS: Final = 59
"""The option that tells the groups of a peer. Source: Linux, asm-generic/socket.h; since 4.13."""
_MOST_GROUPS: Final = 1024
"""Bytes of them that are read: 256 groups."""


class Gate:
    """What is asked of who comes in. `access` may change while it is in use."""

    def __init__(self, access: Access | None = None, limits: ApiLimits | None = None) -> None:
        """Without arguments: that of an address of loopback with no tokens."""
        self.access = access or Access(uid=os.geteuid())
        self.limits = limits or ApiLimits()
        self.tls: ssl.SSLContext | None = None

    @classmethod
    def of(cls, settings: Settings, environment: Mapping[str, str]) -> Gate:
        """Raises HostError: a token, a certificate or the group cannot be used."""
        api = settings.api
        gate = cls(
            Access(
                keys=_keys(settings, environment),
                loopback=settings.listen.loopback,
                callbacks_closed=api.callbacks_closed,
                uid=os.geteuid(),
                group=sockets.gid(api.group) if api.group else None,
            ),
            api.limits,
        )
        if api.tls:
            gate.tls = tls.context(api.tls)
        return gate

    def renew(self, settings: Settings, environment: Mapping[str, str]) -> None:
        """Take the tokens and the certificate as they are now; who is connected stays so.

        Raises HostError; then all is as it was.
        """
        api = settings.api
        keys = _keys(settings, environment)
        if not (self.access.loopback or keys):
            raise HostError("cannot do without a token: others than this machine can ask")
        if self.tls and api.tls:
            tls.context(api.tls)  # what cannot be used must not reach the one in use
            tls.load(self.tls, api.tls)
        self.access = replace(self.access, keys=keys, callbacks_closed=api.callbacks_closed)

    def sentence(self) -> str:
        """What a person should know of it; empty: nothing."""
        access = self.access
        return sentence(
            loopback=access.loopback,
            tokens=bool(access.keys),
            callbacks_closed=access.callbacks_closed,
        )


def _keys(settings: Settings, environment: Mapping[str, str]) -> tuple[Key, ...]:
    """Raises HostError."""
    tokens = settings.api.tokens
    return keyring(tokens, [files.secret(one.secret, environment).reveal() for one in tokens])


def peer_of(sock: socket.socket) -> Peer:
    """Who is at the other end of a Unix socket. Source: unix(7), SO_PEERCRED."""
    size = struct.calcsize("3i")
    _, uid, own = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    groups = {own}
    try:
        found = sock.getsockopt(socket.SOL_SOCKET, _PEERGROUPS, _MOST_GROUPS)
        groups.update(struct.unpack(f"{len(found) // 4}I", found))
    except OSError:
        pass  # more groups than are read, or an old kernel: then their own one counts
    return Peer(uid, _name_of(uid), frozenset(groups))


@lru_cache(maxsize=256)
def _name_of(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""
