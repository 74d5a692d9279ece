"""The socket that systemd hands over, if it does."""

from __future__ import annotations

import socket

from reconciler.core.errors import HostError
from reconciler.core.units import Endpoint
from reconciler.host import systemd

NAME = "api"
"""`FileDescriptorName=` of the socket on which callbacks are taken."""


def handed_over(endpoint: Endpoint) -> socket.socket | None:
    """The listening socket for callbacks, which outlives us; None: we listen by ourselves.

    It has to be where the config says: who is told that address has to find us there, and the API,
    which asks nobody who they are, has to stay on loopback. Raises HostError.
    """
    given = systemd.listeners()
    found = given.pop(NAME, None)
    for other in given.values():
        other.close()
    if found is None:
        return None
    name = found.getsockname()
    at = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name)
    host = "127.0.0.1" if endpoint.host == "localhost" else endpoint.host
    if isinstance(name, tuple) and (name[0], name[1]) == (host, endpoint.port):
        return found
    found.close()
    raise HostError(
        f"cannot take callbacks: systemd hands over a socket at {at}, and the config says "
        f"`api: {{listen: {endpoint}}}`; make the unit anew with `reconciler render systemd`, then "
        "`systemctl daemon-reload && systemctl restart reconciler.socket`"
    )
