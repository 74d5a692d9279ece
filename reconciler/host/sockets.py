"""Reserve by bind: a port is taken when its socket listens, not when somebody says so."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from typing import Final, Protocol

from reconciler.core.errors import HostError
from reconciler.core.units import Port
from reconciler.host.effects import Effect, effect

BACKLOG: Final = 128
"""qemu-nbd never calls listen() on a socket it is given, so this is the server's. Measured: with
5, the seventh connect times out."""


class Bound(Protocol):
    """A bound and listening socket, as far as handing it over goes."""

    def fileno(self) -> int: ...
    def close(self) -> None: ...


class PortBusyError(HostError):
    """Somebody else has the port."""

    def __init__(self, port: Port, message: str) -> None:
        super().__init__(message, "PortTaken")
        self.port = port


def reserve(host: str, port: Port) -> socket.socket:
    """A listening socket for one export. Raises PortBusyError, HostError."""
    with effect(Effect.BIND):
        return listening(host, port, "ports: {bind: …}")


def listening(host: str, port: Port, setting: str) -> socket.socket:
    """A listening socket. `setting` is what says where. Raises PortBusyError, HostError.

    Accepted connections inherit TCP_NODELAY, which takes 44 ms off every client's handshake.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        message = f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}"
        if error.errno == errno.EADDRINUSE:
            raise PortBusyError(port, message) from error
        if error.errno == errno.EADDRNOTAVAIL:
            message += f" on this machine: correct `{setting}` in the config"
        raise HostError(message, "CannotListen") from error
    return sock


_PIDFD_GETFD: Final = 438
"""The number of pidfd_getfd(2), the same on every architecture since Linux 5.6."""
_LISTENER_FD: Final = 3
"""Where a server has its socket. Source: sd_listen_fds(3)."""


def fetched(pidfd: int, port: Port) -> socket.socket | None:
    """A copy of the listening socket of a running server; None: it is not ours to have.

    The kernel asks for the right to trace that process. Source: pidfd_getfd(2).
    """
    import ctypes  # late: only a daemon that finds servers needs it

    fd = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, _LISTENER_FD, 0)
    if fd < 0:
        return None
    try:
        copy = socket.socket(fileno=fd)  # close-on-exec is set: pidfd_getfd(2)
    except OSError:
        os.close(fd)
        return None
    try:
        listens = copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if listens and copy.getsockname()[1] == port:
            return copy
    except (OSError, IndexError, TypeError):
        pass
    copy.close()
    return None


def inode(sock: Bound) -> int:
    """What /proc/PID/fd calls this socket."""
    return os.fstat(sock.fileno()).st_ino


def gid(group: str) -> int:
    """The number of a group. Raises HostError."""
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise HostError(
            f"cannot let in the members of {group!r}: there is no such group: getent group {group}"
        ) from None


class Local:
    """A listening Unix socket at a path."""

    def __init__(self, path: str, group: int | None = None) -> None:
        """What an ended process left there is removed. Raises HostError.

        Its own user and root may connect, and the members of `group`. Two that come at once do not
        take each other's: both hold the directory's lock for as long as they look and bind.
        """
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _directory(path) as short:
                if _answers(short):
                    raise HostError(
                        f"cannot listen on {path}: another process does; end that, or set "
                        "`api: {socket: …}` in the config: ss -xlp",
                        "CannotListen",
                    )
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(short)
                self.sock.bind(short)
                if group is not None:
                    os.chown(short, -1, group)
                os.chmod(short, 0o600 if group is None else 0o660)
                self.sock.listen(BACKLOG)
        except OSError as error:
            self.sock.close()
            raise HostError(
                f"cannot listen on {path}: {error.strerror}; correct `api: {{socket: …}}` in the "
                f"config, or the rights there: ls -la {os.path.dirname(path)}",
                "CannotListen",
            ) from error
        except HostError:
            self.sock.close()
            raise

    def close(self) -> None:
        """Close it, and remove its file, unless another listens there by now."""
        self.sock.close()
        with contextlib.suppress(OSError), _directory(self.path) as short:  # else there is none
            if not _answers(short):
                os.unlink(short)


def _answers(path: str) -> bool:
    """Whether a process listens there. Raises OSError: what is there is no socket."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.ENOTSOCK, "what is there is no socket")
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:
            return True  # so many wait there already
    return True


@contextlib.contextmanager
def _directory(path: str) -> Iterator[str]:
    """The directory of a socket, locked; and the socket's path by a descriptor of it, as a path in
    full may be longer than a socket's may be. Source: unix(7), sun_path has 108 bytes."""
    folder, name = os.path.split(path)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
