"""Observe: one pass over /proc for argv, one question to the kernel for sockets.

Light enough for `status`: no process is started and nothing outside the standard library is used.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from msgspec import Struct

from reconciler.core.actual import Identity
from reconciler.core.errors import HostError
from reconciler.core.units import Port, Seconds


class Process(Struct, frozen=True):
    """A process whose argv speaks of qemu-nbd."""

    identity: Identity
    argv: tuple[str, ...]


class Socket(Struct, frozen=True):
    """A TCP socket of this network namespace."""

    port: Port
    address: str
    inode: int
    listening: bool
    peer: tuple[Port, str, Port] = (0, "", 0)
    """Our port, the other end's address and port: one connection."""
    uid: int = -1
    """Whose it is."""


def processes(word: bytes = b"qemu-nbd") -> list[Process]:
    """Every live process with `word` in its argv. Zombies have no argv and are not among them."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                line = file.read()
        except OSError:
            continue  # it ended while we looked
        if word not in line:
            continue
        identity = identify(int(name))
        if identity:
            found.append(Process(identity, _words(line)))
    return found


def process(pid: int) -> Process | None:
    """One process with its argv; None: it is gone, or a zombie."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            line = file.read()
    except OSError:
        return None
    identity = identify(pid) if line else None
    return Process(identity, _words(line)) if identity else None


def _words(line: bytes) -> tuple[str, ...]:
    words = line.decode("utf-8", "surrogateescape").split("\0")
    return tuple(words[:-1] if words[-1] == "" else words)


def identify(pid: int) -> Identity | None:
    """(pid, start time) of a process that lives; None: it is gone, or a zombie.

    Source: proc(5), /proc/PID/stat: the state is field 3, the start time field 22.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            line = file.read()
    except OSError:
        return None
    fields = line[line.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else Identity(pid, int(fields[19]))


def age(identity: Identity) -> Seconds:
    """How long ago a process began. Source: sysconf(3), _SC_CLK_TCK; clock_gettime(2)."""
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    return max(0.0, since_boot - identity.started / os.sysconf("SC_CLK_TCK"))


def began(identity: Identity) -> Seconds:
    """When a process began, to the second: the same in each look. Seconds since the epoch; 0: the
    kernel does not tell. Source: proc(5), /proc/stat, btime; sysconf(3), _SC_CLK_TCK."""
    with contextlib.suppress(OSError, ValueError), open("/proc/stat") as file:
        for line in file:
            if line.startswith("btime "):
                return float(int(line.split()[1]) + identity.started // os.sysconf("SC_CLK_TCK"))
    return 0.0


def name_of(pid: int) -> str:
    """The short name of a process, for people."""
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return "a process"


def socket_inodes(pid: int) -> set[int]:
    """The sockets that a process holds. Empty if it is not ours to see."""
    inodes = set()
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                inodes.add(_socket_inode(os.readlink(f"/proc/{pid}/fd/{fd}")))
    inodes.discard(0)
    return inodes


def listener_inode(pid: int) -> int:
    """The socket at fd 3, where a server of ours has its listener; 0: none there."""
    try:
        return _socket_inode(os.readlink(f"/proc/{pid}/fd/3"))
    except OSError:
        return 0


def _socket_inode(link: str) -> int:
    return int(link[8:-1]) if link.startswith("socket:[") else 0


def holders(inodes: Iterable[int]) -> Mapping[int, int]:
    """Socket inode → pid of a process that holds it; a walk over every fd, so only when asked."""
    wanted = set(inodes)
    found: dict[int, int] = {}
    if not wanted:
        return found
    for name in os.listdir("/proc"):
        if name.isdigit():
            for inode in socket_inodes(int(name)) & wanted:
                found.setdefault(inode, int(name))
    return found


def openers(path: str, ignore: Iterable[int] = ()) -> list[int]:
    """The processes that hold a file open for writing; the ignored ones are left out."""
    try:
        fd = os.open(path, os.O_PATH)
    except OSError:
        return []
    try:
        wanted, inode = os.fstat(fd), _described("self", fd).get("ino")
    finally:
        os.close(fd)
    skip = {*ignore, os.getpid()}
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return sorted(pid for pid in pids if pid not in skip and _holds(str(pid), wanted, inode))


def users(path: str) -> list[int]:
    """The other processes that have a file open, however they use it."""
    try:
        wanted = os.stat(path)
    except OSError:
        return []
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    inode = str(wanted.st_ino)
    me = os.getpid()
    return sorted(
        pid for pid in pids if pid != me and _holds(str(pid), wanted, inode, writing=False)
    )


def has_open(pid: int, path: str) -> bool:
    """Whether a process has the file at `path` open; True too where that is not ours to see."""
    try:
        wanted = os.stat(path)
    except OSError:
        return False
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return True
    for fd in descriptors:
        with contextlib.suppress(OSError):
            found = os.stat(f"/proc/{pid}/fd/{fd}")
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def _described(name: str, fd: str | int) -> dict[str, str]:
    """What the kernel itself knows of an open file. Source: proc(5), /proc/PID/fdinfo."""
    with open(f"/proc/{name}/fdinfo/{fd}") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


def _holds(name: str, wanted: os.stat_result, inode: str | None, *, writing: bool = True) -> bool:
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{name}/fd"):
            with contextlib.suppress(OSError, ValueError):
                known = _described(name, fd)
                if known.get("ino") != inode:
                    continue  # not asked of its file system, which may hang; since Linux 5.14
                found = os.stat(f"/proc/{name}/fd/{fd}")
                if (found.st_dev, found.st_ino) != (wanted.st_dev, wanted.st_ino):
                    continue
                if not writing or int(known["flags"], 8) & os.O_ACCMODE != os.O_RDONLY:
                    return True
    return False


def meets(address: str, host: str) -> bool:
    """Whether a listener at `address` is the one that `host` leads to."""
    mine = "127.0.0.1" if host == "localhost" else host
    return address in (mine, f"::ffff:{mine}", "0.0.0.0", "::")  # noqa: S104 seen, not bound


_DUMP: Final = 0x300 | 0x1  # NLM_F_DUMP | NLM_F_REQUEST
_BY_FAMILY: Final = 20  # SOCK_DIAG_BY_FAMILY
_ESTABLISHED: Final = 1
_LISTEN: Final = 10
"""TCP states. Source: include/net/tcp_states.h."""


def tcp_sockets(*, established: bool = True) -> list[Socket]:
    """Every listening or established TCP socket, in one question to the kernel (sock_diag(7)).

    100 listeners take 0.2 ms; connections take 2 ms more, as the kernel walks its whole hash.
    Raises HostError.
    """
    found: list[Socket] = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 4) as diag:  # NETLINK_SOCK_DIAG
            for family in (socket.AF_INET, socket.AF_INET6):
                states = 1 << _LISTEN | (1 << _ESTABLISHED if established else 0)
                wanted = struct.pack("=BBBxI48x", family, socket.IPPROTO_TCP, 0, states)
                diag.send(struct.pack("=IHHII", 16 + len(wanted), _BY_FAMILY, _DUMP, 1, 0) + wanted)
                found.extend(_answers(diag))
    except OSError as error:
        raise HostError(f"cannot ask the kernel for its TCP sockets: {error}") from error
    return found


def _answers(diag: socket.socket) -> Iterator[Socket]:
    while True:
        data = diag.recv(1 << 18)
        offset = 0
        while offset + 16 <= len(data):
            length, kind = struct.unpack_from("=IH", data, offset)
            if kind == 3:  # NLMSG_DONE
                return
            if kind == 2:  # NLMSG_ERROR
                code = -struct.unpack_from("=i", data, offset + 16)[0]
                if code in (2, 97):  # no such family on this kernel
                    return
                raise OSError(code, os.strerror(code))
            family, state = struct.unpack_from("=BB", data, offset + 16)
            port = struct.unpack_from("!H", data, offset + 20)[0]
            raw = data[offset + 24 : offset + (28 if family == socket.AF_INET else 40)]
            uid, inode = struct.unpack_from("=II", data, offset + 16 + 64)
            far = struct.unpack_from("!H", data, offset + 22)[0]
            far_raw = data[offset + 40 : offset + (44 if family == socket.AF_INET else 56)]
            peer = (port, socket.inet_ntop(family, far_raw), far)
            yield Socket(port, socket.inet_ntop(family, raw), inode, state == _LISTEN, peer, uid)
            offset += (length + 3) & ~3
