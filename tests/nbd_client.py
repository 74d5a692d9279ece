"""A client that writes as carelessly as the protocol allows: no FUA, no flush, plain sockets.

Source: the NBD protocol, doc/proto.md; only what these tests need, with simple replies.
"""

from __future__ import annotations

import os
import socket
import struct
from types import TracebackType
from typing import Final

_OPTION: Final = 0x49484156454F5054
_GO, _ACK, _INFORMATION = 7, 1, 3
_REQUEST, _REPLY = 0x25609513, 0x67446698
_READ, _WRITE, _DISCONNECT = 0, 1, 2
_PATIENCE: Final = 30.0
"""Seconds."""


class Client:
    """One connection in its transmission phase. Raises OSError when the server is gone."""

    def __init__(self, port: int, export: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE)
        assert self._receive(18)[:16] == b"NBDMAGICIHAVEOPT"
        name = export.encode()
        body = struct.pack("!I", len(name)) + name + struct.pack("!H", 0)
        self.socket.sendall(struct.pack("!IQII", 3, _OPTION, _GO, len(body)) + body)
        kind = _INFORMATION
        while kind == _INFORMATION:
            _, _, kind, length = struct.unpack("!QIII", self._receive(20))
            self._receive(length)
        assert kind == _ACK, f"{export} on {port}: reply {kind:#x}"

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def write(self, offset: int, data: bytes) -> None:
        """Returns when the server has acknowledged it, which says nothing about the disk."""
        self._ask(_WRITE, offset, len(data), data)

    def read(self, offset: int, length: int) -> bytes:
        self._ask(_READ, offset, length)
        return self._receive(length)

    def leave(self) -> None:
        """Say goodbye; the server flushes nothing for that."""
        self.socket.sendall(struct.pack("!IHHQQI", _REQUEST, 0, _DISCONNECT, 0, 0, 0))
        self.close()

    def _ask(self, kind: int, offset: int, length: int, data: bytes = b"") -> None:
        self.socket.sendall(struct.pack("!IHHQQI", _REQUEST, 0, kind, 1, offset, length) + data)
        magic, code, _ = struct.unpack("!IIQ", self._receive(16))
        assert magic == _REPLY
        if code:
            raise OSError(code, os.strerror(code))

    def _receive(self, length: int) -> bytes:
        found = b""
        while len(found) < length:
            piece = self.socket.recv(length - len(found))
            if not piece:
                raise ConnectionResetError("the server has closed the connection")
            found += piece
        return found
