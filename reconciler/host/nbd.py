"""NBD handshake: export name, size, flags, description, of many servers at once, by a deadline.

The protocol is a generator that is fed bytes and says what to send; one poll(2) drives any number
of them. Source: the NBD protocol, doc/proto.md, "fixed newstyle negotiation".
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from reconciler.core.actual import Handshake
from reconciler.core.errors import HostError
from reconciler.core.units import Bytes, Port, Seconds

GREETING: Final = b"NBDMAGICIHAVEOPT"
_OPTION: Final = 0x49484156454F5054
_REPLY: Final = 0x0003E889045565A9
_ABORT, _INFO, _GO = 2, 6, 7
_ACK, _INFORMATION = 1, 3
_EXPORT, _DESCRIPTION = 0, 2
_CLIENT_FLAGS: Final = 0x3  # fixed newstyle, no zeroes
_READ_ONLY, _CAN_FLUSH = 0x2, 0x4
_REQUEST: Final = 0x25609513
_SIMPLE_REPLY: Final = 0x67446698
_READ, _DISCONNECT, _FLUSH = 0, 2, 3
_MAX_REPLY: Final = 65536
MAX_READ: Final[Bytes] = 1 << 20
"""Bytes of one request to read; the protocol lets a client ask for 32 MiB at most."""
_ERRORS: Final = {
    0x80000001: "it does not know the question",
    0x80000002: "forbidden by its policy",
    0x80000003: "it calls the question invalid",
    0x80000005: "it demands TLS first",
    0x80000006: "it has no export of that name",
    0x80000007: "it is shutting down",
}


class _Malformed(Exception):  # noqa: N818 never leaves this module
    pass


def negotiate(
    name: str, *, flush: bool = False, stay: bool = False
) -> Generator[tuple[bytes, int], bytes, Handshake]:
    """The client's side: yields (bytes to send, bytes wanted next), is sent those bytes.

    With `flush`, everything that the server has acknowledged to anybody is on the disk when this
    ends well. With `stay`, the server is ready to be read from then.
    """
    greeting = yield b"", 18
    if greeting[:16] != GREETING:
        raise _Malformed("it does not speak NBD")
    encoded = name.encode()
    body = struct.pack("!I", len(encoded)) + encoded + struct.pack("!HH", 1, _DESCRIPTION)
    size: int | None = None
    flags, description = 0, ""
    option = _GO if flush or stay else _INFO
    out = struct.pack("!IQII", _CLIENT_FLAGS, _OPTION, option, len(body)) + body
    while True:
        magic, _, kind, length = struct.unpack("!QIII", (yield out, 20))
        out = b""
        if magic != _REPLY or length > _MAX_REPLY:
            raise _Malformed("its answer is not NBD")
        data = (yield b"", length) if length else b""
        if kind == _ACK:
            break
        if kind >= 1 << 31:
            said = data.decode("utf-8", "replace").strip()
            meaning = _ERRORS.get(kind, f"error {kind:#x}")
            return Handshake(error=f"{meaning} ({said})" if said else meaning)
        if kind == _INFORMATION and len(data) >= 2:
            what = struct.unpack_from("!H", data)[0]
            if what == _EXPORT and len(data) >= 12:
                size, flags = struct.unpack_from("!QH", data, 2)
            elif what == _DESCRIPTION:
                description = data[2:].decode("utf-8", "replace")
    if size is None:
        raise _Malformed("it named no size")
    if flush:
        yield from _flushed(flags)
    if flush or stay:
        return Handshake(size, bool(flags & _READ_ONLY), description)
    # Leave in order: a connection that just closes costs the server a line on its stderr.
    yield struct.pack("!QII", _OPTION, _ABORT, 0), 20
    return Handshake(size, bool(flags & _READ_ONLY), description)


def _flushed(flags: int) -> Generator[tuple[bytes, int], bytes, None]:
    """Ask a server that is in its transmission phase to flush, and leave in order."""
    if not flags & _CAN_FLUSH:
        raise _Malformed("it cannot flush")
    reply = yield struct.pack("!IHHQQI", _REQUEST, 0, _FLUSH, 1, 0, 0), 16
    magic, code, handle = struct.unpack("!IIQ", reply)
    if magic != _SIMPLE_REPLY or handle != 1:
        raise _Malformed("its answer is not NBD")
    if code:
        raise _Malformed(f"it cannot flush: {os.strerror(code)}")
    yield struct.pack("!IHHQQI", _REQUEST, 0, _DISCONNECT, 2, 0, 0), 0


class Target(Struct, frozen=True):
    """Where an export should answer. With `pidfd`, the end of that process ends the wait."""

    host: str
    port: Port
    name: str
    pidfd: int | None = None


def handshake(
    targets: Sequence[Target], timeout: Seconds, *, flush: bool = False
) -> list[Handshake]:
    """What each target answers, in their order; all at once, none longer than `timeout`.

    With `flush`, each is also told to put on the disk what it has acknowledged.
    """
    deadline = time.monotonic() + timeout
    # poll(2) and not a selector: that would cost a third of the time of a handshake with one.
    poll = select.poll()
    waiting: dict[int, Callable[[], None]] = {}
    talks = [_Talk(target, poll, waiting, flush=flush) for target in targets]
    while waiting:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        for fd, _ in poll.poll(left * 1000):
            if fd in waiting:  # the end of its process may have ended it a moment ago
                waiting[fd]()
    for talk in talks:
        talk.end(Handshake(error=f"no answer within {timeout:g} s"))
    return [talk.result or Handshake(error="not asked") for talk in talks]


class _Talk:
    """One connection in the middle of its negotiation."""

    def __init__(
        self,
        target: Target,
        poll: select.poll,
        waiting: dict[int, Callable[[], None]],
        *,
        flush: bool = False,
    ) -> None:
        """`waiting`: descriptor → what is to be done when something comes there."""
        self.poll, self.waiting = poll, waiting
        self.result: Handshake | None = None
        self.protocol = negotiate(target.name, flush=flush)
        self.out, self.wanted = next(self.protocol)
        self.got = b""
        self.heard = False
        self.pidfd: int | None = None
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.sock.connect((target.host, target.port))
        except BlockingIOError:
            pass
        except OSError as error:
            self.end(Handshake(error=f"cannot connect: {os.strerror(error.errno or 0)}"))
            return
        # The server speaks first, so a connection that fails is one whose first byte cannot be had.
        self.wait(self.sock.fileno(), self.readable)
        if target.pidfd is not None:
            self.pidfd = os.dup(target.pidfd)
            self.wait(self.pidfd, self.exited)

    def wait(self, fd: int, then: Callable[[], None]) -> None:
        self.poll.register(fd, select.POLLIN)
        self.waiting[fd] = then

    def end(self, result: Handshake) -> None:
        if self.result is not None:
            return
        self.result = result
        for fd in (self.sock.fileno(), self.pidfd):
            if fd in self.waiting:
                del self.waiting[fd]
                self.poll.unregister(fd)
        self.sock.close()
        if self.pidfd is not None:
            os.close(self.pidfd)

    def exited(self) -> None:
        self.end(Handshake(error="it ended"))

    def readable(self) -> None:
        try:
            # qemu-nbd 7.2 answers in small writes: without this, our delayed ACK costs 44 ms.
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            data = self.sock.recv(_MAX_REPLY)
        except BlockingIOError:
            return
        except OSError as error:
            what = "it dropped the connection" if self.heard else "cannot connect"
            self.end(Handshake(error=f"{what}: {os.strerror(error.errno or 0)}"))
            return
        if not data:
            self.end(Handshake(error="it closed the connection"))
            return
        self.heard = True
        self.got += data
        while len(self.got) >= self.wanted and self.result is None:
            piece, self.got = self.got[: self.wanted], self.got[self.wanted :]
            try:
                self.out, self.wanted = self.protocol.send(piece)
                if self.out:
                    self.sock.sendall(self.out)  # under 4 KiB into an empty buffer: no blocking
            except StopIteration as stop:
                self.end(stop.value)
            except _Malformed as error:
                self.end(Handshake(error=str(error)))
            except OSError as error:
                self.end(Handshake(error=f"it dropped the connection: {error.strerror}"))


class Reader:
    """One connection to a server on a Unix socket, to read ranges of its disk."""

    def __init__(self, path: Path, name: str, timeout: Seconds) -> None:
        """Connects and negotiates. Raises HostError. `timeout` is that of each answer."""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(timeout)
        protocol = negotiate(name, stay=True)
        try:
            self._sock.connect(str(path))
            out, wanted = next(protocol)
            while True:
                self._sock.sendall(out)
                out, wanted = protocol.send(self._exactly(wanted))
        except StopIteration as stop:
            shaken: Handshake = stop.value
            if shaken.size is None:
                self.close()
                raise HostError(f"cannot read {name}: {shaken.error}", "NoAnswer") from None
            self.size: Bytes = shaken.size
        except (OSError, _Malformed) as error:
            self.close()
            raise HostError(f"cannot read {name}: {_said(error)}", "NoAnswer") from error

    def read(self, offset: Bytes, length: Bytes) -> bytes:
        """Raises HostError, which names the place that cannot be read."""
        found = bytearray()
        while len(found) < length:
            at = offset + len(found)
            part = min(MAX_READ, length - len(found))
            try:
                self._sock.sendall(struct.pack("!IHHQQI", _REQUEST, 0, _READ, at, at, part))
                magic, code, handle = struct.unpack("!IIQ", self._exactly(16))
                if magic != _SIMPLE_REPLY or handle != at:
                    raise _Malformed("its answer is not NBD")
                if code:
                    raise OSError(code, os.strerror(code))
                found += self._exactly(part)
            except (OSError, _Malformed) as error:
                raise HostError(
                    f"cannot read {part} bytes at byte {at} of the disk: {_said(error)}",
                    "Unreadable",
                ) from error
        return bytes(found)

    def close(self) -> None:
        """Leave; in order, where the server still listens."""
        with contextlib.suppress(OSError):
            self._sock.sendall(struct.pack("!IHHQQI", _REQUEST, 0, _DISCONNECT, 0, 0, 0))
        self._sock.close()

    def _exactly(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            piece = self._sock.recv(size - len(found))
            if not piece:
                raise _Malformed("it closed the connection")
            found += piece
        return bytes(found)


def _said(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "strerror", None) or str(error)
