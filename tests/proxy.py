"""A TCP proxy before an appliance that can keep a POST, and deliver it when everybody forgot it."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Final

_PATIENCE: Final = 30.0
"""Seconds."""


class Proxy:
    """Passes bytes both ways; with `keep`, the next POST stays here until `deliver`."""

    def __init__(self, port: int) -> None:
        self.upstream = ("127.0.0.1", port)
        self.keep = False
        self.kept = b""
        self._server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def deliver(self) -> bytes:
        """Send the POST that was kept, and return what the appliance says to it."""
        with socket.create_connection(self.upstream, timeout=_PATIENCE) as line:
            line.sendall(self.kept)
            line.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := line.recv(65536):
                answer += piece
            return answer

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.upstream) as line:
            back = threading.Thread(target=self._pass, args=(line, client), daemon=True)
            back.start()
            keeping = False
            with contextlib.suppress(OSError):
                while piece := client.recv(65536):
                    keeping = keeping or (self.keep and piece.startswith(b"POST "))
                    if keeping:
                        self.kept += piece
                    else:
                        line.sendall(piece)
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            back.join(_PATIENCE)

    def _pass(self, line: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := line.recv(65536):
                client.sendall(piece)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
