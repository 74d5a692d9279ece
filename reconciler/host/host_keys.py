"""Host keys: ask a server for its own, by OpenSSH's ssh-keyscan; read and write the pinned one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Final

from reconciler.core.errors import HostError
from reconciler.core.trust import KINDS, in_order
from reconciler.core.tunnel import HostKey, Tunnel
from reconciler.core.units import Port, Seconds

MOST: Final = 1 << 16
"""Bytes of a file with a host key that are read."""
MODE: Final = 0o644
"""A host key is public, and a service of another user reads it too."""


def pinned(tunnel: Tunnel) -> tuple[HostKey | None, str]:
    """The host key that a tunnel is pinned to, and why there is none."""
    if tunnel.host_key or not tunnel.host_key_file:
        return tunnel.host_key, ""
    path = tunnel.host_key_file
    try:
        return read(path), ""
    except FileNotFoundError:
        return None, f"there is no {path} yet, so nobody has said which host key is the hub's"
    except OSError as error:
        return None, f"cannot read the host key in {path}: {error.strerror}"
    except ValueError as error:
        return None, f"cannot use the host key in {path}: {error}"


def read(path: str) -> HostKey:
    """The host key in a file. Raises OSError, and ValueError: it holds none."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return HostKey.parse(file.read(MOST))


def write(path: str, key: HostKey, comment: str) -> None:
    """Put a host key into a file, whole or not at all. Raises HostError."""
    target = os.path.realpath(path)
    fresh = ""
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        fd, fresh = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".host-key-")
        with open(fd, "w", encoding="utf-8") as file:
            file.write(f"{key} {comment}\n")
            os.fchmod(file.fileno(), MODE)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, target)
        directory = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise HostError(f"cannot write {path}: {error.strerror}") from error


def scan(host: str, port: Port, timeout: Seconds) -> list[HostKey]:
    """The host keys that a server shows, the best kind first. Raises HostError with the layer.

    Nothing is proven by that: whoever answers at the address has shown them.
    """
    import subprocess

    binary = shutil.which("ssh-keyscan")
    if binary is None:
        raise HostError(
            "cannot find ssh-keyscan: install it with `apt-get install openssh-client`",
            "SshMissing",
        )
    line = [binary, "-T", f"{max(1, round(timeout))}", "-p", str(port), "-t", ",".join(KINDS)]
    try:
        done = subprocess.run(
            [*line, "--", host],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout * len(KINDS) + 5,
            check=False,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(
            f"cannot ask {host} port {port} for its host keys: no end after {error.timeout:g} s",
            "HubSilent",
        ) from error
    except OSError as error:
        raise HostError(f"cannot start {binary}: {error.strerror}", "CannotStart") from error
    found = []
    for text in done.stdout.decode("utf-8", "replace").splitlines():
        if not text.startswith("#"):
            with contextlib.suppress(ValueError):
                found.append(HostKey.parse(text.partition(" ")[2]))
    if found:
        return in_order(found)
    reason, why = _silence(host, port, done.stderr.decode("utf-8", "replace"), timeout)
    raise HostError(f"cannot ask {host} port {port} for its host keys: {why}", reason)


def _silence(host: str, port: Port, words: str, timeout: Seconds) -> tuple[str, str]:
    """Which layer it was that gave no key; ssh-keyscan itself often says nothing."""
    if found := re.search(r"getaddrinfo [^:]*: ([^\n]+)", words):
        return "HubUnresolved", f"the name has no address: {found[1].strip()}"
    try:
        with socket.create_connection((host, port), timeout) as line:
            line.settimeout(timeout)
            said = line.recv(64)
    except TimeoutError:
        return "HubUnreachable", f"no answer within {timeout:g} s"
    except OSError as error:
        return "HubUnreachable", error.strerror or str(error)
    if said.startswith(b"SSH-"):
        return "HubNotSsh", f"it says {said[:40].decode('ascii', 'replace').strip()} and no more"
    heard = f"it says {said[:20]!r}" if said else "it closes the connection"
    return "HubNotSsh", f"no sshd listens there: {heard}"
