"""A small NBD client: one connection, one request at a time.

Source: the NBD protocol, doc/proto.md; fixed newstyle, simple replies.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Final

from qmp import near

_OPTION: Final = 0x49484156454F5054
_GO, _ACK, _INFORMATION, _EXPORT = 7, 1, 3, 0
_FIXED_NO_ZEROES: Final = 3
_REQUEST, _REPLY = 0x25609513, 0x67446698
_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM, _ZERO = 0, 1, 2, 3, 4, 6
MOST: Final = 1 << 25
"""What one request may read or write. Bytes. Source: doc/proto.md, "Size constraints"."""
PATIENCE: Final = 600.0
"""For one answer. Seconds. Chosen: the hub restarts a server meanwhile, and a client waits."""


class Connection:
    """A connection to one export, by TCP or by a Unix socket. Raises OSError for every trouble."""

    def __init__(self, where: tuple[str, int] | Path, export: str) -> None:
        self.size = 0
        if isinstance(where, Path):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with near(where) as address:
                self._socket.connect(address)
        else:
            self._socket = socket.create_connection(where, PATIENCE)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(PATIENCE)
        try:
            self._negotiate(export)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._socket.sendall(struct.pack("!IHHQQI", _REQUEST, 0, _DISCONNECT, 0, 0, 0))
        self._socket.close()

    def read(self, offset: int, length: int) -> bytes:
        """Read so many bytes, in as many requests as that takes."""
        pieces = []
        for start in range(offset, offset + length, MOST):
            count = min(MOST, offset + length - start)
            pieces.append(self._ask(_READ, start, count, wanted=count))
        return b"".join(pieces)

    def write(self, offset: int, data: bytes) -> None:
        """Write, and return when that is acknowledged."""
        self._ask(_WRITE, offset, len(data), data)

    def zero(self, offset: int, length: int) -> None:
        """Write zeros without sending them."""
        self._ask(_ZERO, offset, length)

    def trim(self, offset: int, length: int) -> None:
        """Say that nobody needs what is there."""
        self._ask(_TRIM, offset, length)

    def flush(self) -> None:
        """Put on the disk what was acknowledged, to whichever client."""
        self._ask(_FLUSH, 0, 0)

    def _negotiate(self, export: str) -> None:
        if self._receive(18)[:16] != b"NBDMAGICIHAVEOPT":
            raise ConnectionError("it does not speak NBD")
        name = export.encode()
        body = struct.pack("!I", len(name)) + name + struct.pack("!H", 0)
        head = struct.pack("!IQII", _FIXED_NO_ZEROES, _OPTION, _GO, len(body))
        self._socket.sendall(head + body)
        kind = _INFORMATION
        while kind == _INFORMATION:
            _, _, kind, length = struct.unpack("!QIII", self._receive(20))
            data = self._receive(length)
            if kind == _INFORMATION and struct.unpack_from("!H", data)[0] == _EXPORT:
                (self.size,) = struct.unpack_from("!Q", data, 2)
        if kind != _ACK:
            raise ConnectionError(f"it refuses export {export!r}: error {kind:#x}")

    def _ask(
        self, kind: int, offset: int, length: int, data: bytes = b"", wanted: int = 0
    ) -> bytes:
        head = struct.pack("!IHHQQI", _REQUEST, 0, kind, 0, offset, length)
        self._socket.sendall(head + data)
        magic, code, _ = struct.unpack("!IIQ", self._receive(16))
        if magic != _REPLY:
            raise ConnectionError("its answer is not NBD")
        if code:
            raise OSError(code, os.strerror(code))
        return self._receive(wanted)

    def _receive(self, length: int) -> bytes:
        pieces = []
        while length:
            piece = self._socket.recv(length)
            if not piece:
                raise ConnectionResetError("the server has closed the connection")
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)
