"""Look at the qemu-nbd servers of this machine that the ledger does not know. Only looks."""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from collections import Counter
from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from reconciler.core.actual import Image
from reconciler.core.errors import HostError
from reconciler.core.foreign import Options, Seen, options
from reconciler.core.ledger import Ledger
from reconciler.core.mark import parse
from reconciler.core.settings import Settings
from reconciler.core.units import Endpoint, Seconds
from reconciler.doctor import TRIAL
from reconciler.host import images, nbd, patience, proc

HANDSHAKE: Final[Seconds] = 2.0
"""For a stranger. One that is well answers in under 1 ms."""


def strangers(settings: Settings, ledger: Ledger) -> list[Seen]:
    """Every qemu-nbd that has no lease here, by pid. Raises HostError."""
    sockets = proc.tcp_sockets()
    clients = Counter(one.port for one in sockets if not one.listening)
    leases = {lease.key: lease.port for lease in ledger.leases}
    found = []
    for process in proc.processes():
        served = parse(process.argv)
        if served is None or served.starting or _trial(served.argv):
            continue
        mark = served.mark
        ours = mark is not None and mark.hub == settings.hub
        if mark and ours and leases.get(mark.key) == mark.port:
            continue
        pid = process.identity.pid
        said = options(served.argv)
        listeners, visible = _listeners(pid, said, sockets)
        path = _path(pid, said)
        image = _look(path, settings)
        seen = Seen(
            identity=process.identity,
            argv=served.argv,
            mark=mark,
            listeners=listeners,
            visible=visible,
            clients=sum(clients[one.port] for one in listeners),
            path=path,
            image=image,
        )
        found.append(_sized(seen))
    return sorted(found, key=lambda one: one.pid)


def _trial(line: Iterable[str]) -> bool:
    """A server of a `doctor` that is at work."""
    return any(word.startswith(TRIAL) for word in line)


def _listeners(
    pid: int, said: Options, sockets: Iterable[proc.Socket]
) -> tuple[tuple[Endpoint, ...], bool]:
    """Where a server listens, and whether that was seen and not only said."""
    visible = os.access(f"/proc/{pid}/fd", os.R_OK | os.X_OK)
    held = proc.socket_inodes(pid)
    found = {Endpoint(s.address, s.port) for s in sockets if s.listening and s.inode in held}
    if not visible and "socket" not in said.values and "connect" not in said.values:
        text = said.values.get("port", "10809")  # source: qemu-nbd(8), --port
        if text.isdigit():
            host = said.values.get("bind", "0.0.0.0")  # noqa: S104 qemu-nbd's own default
            found.add(Endpoint(host, int(text)))
    return tuple(sorted(found, key=lambda one: (one.port, one.host))), visible


def _path(pid: int, said: Options) -> str:
    """The file that a server has open, absolute. Empty: it is not known.

    A relative name counts from where the server was started, and it may be elsewhere since: with
    --fork it is. So the name is looked for among the files that it holds.
    """
    name = said.image
    if "image-opts" in said.values or "://" in name or name.startswith(("json:", "nbd:")):
        return ""
    if posixpath.isabs(name):
        return posixpath.normpath(name)
    base = posixpath.basename(name)
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
                if base and posixpath.basename(target) == base and posixpath.isabs(target):
                    return target
    return ""


def _look(path: str, settings: Settings) -> Image | None:
    """The header of an image; None: its storage gives no answer."""
    if not path:
        return None
    name = settings.repository_of(path)
    root = settings.repositories[name] if name else posixpath.dirname(path)
    with contextlib.suppress(HostError):
        if root in patience.touched([root]):
            return patience.do("look", root, lambda: _header(path, root), patience.QUIET)
    return None


def _header(path: str, root: str) -> Image:
    image = images.look(path, root)
    if image.error and stat.S_ISBLK(_mode(path)):
        return replace(image, error="it is a block device")
    return image


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


def _sized(one: Seen) -> Seen:
    """With its size: by its own word where asking disturbs nobody, else by its image's header."""
    said = one.options
    slots = said.shared - one.clients
    harmless = one.visible and said.persistent and (said.shared == 0 or slots > 1)
    for listener in one.listeners if harmless else ():
        host = _reached(listener)
        if host:
            answer = nbd.handshake([nbd.Target(host, listener.port, said.export)], HANDSHAKE)[0]
            if answer.answered:
                return replace(one, size=answer.size, source="its handshake")
    image = one.image
    if image and image.exists and not image.error and image.size:
        return replace(one, size=image.size, source="the image's header")
    return one


def _reached(listener: Endpoint) -> str:
    """By which address a listener is reached from here, by IPv4. Empty: by none."""
    if listener.host in ("0.0.0.0", "::"):  # noqa: S104 read, not bound
        return "127.0.0.1"
    return "" if ":" in listener.host else listener.host
