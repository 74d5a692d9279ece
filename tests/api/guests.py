"""Who comes to the API in tests: by TCP, by TLS, by the Unix socket, and with bad manners."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from reconciler.api.about import ourselves
from reconciler.api.gate import Gate
from reconciler.api.guard import Guarded
from reconciler.api.listener import Listener
from reconciler.asking import Desk
from reconciler.core.access import Access, Key, Scope, key
from reconciler.core.settings import ApiLimits, Settings
from reconciler.core.units import Endpoint
from reconciler.host.store import Store
from reconciler.host.store.inbox import Inbox

PATIENCE = 20.0

TOKENS = {scope: f"{scope}-0123456789abcdef" for scope in Scope if scope is not Scope.WATCH}
"""One that may do one thing each."""


def keys() -> tuple[Key, ...]:
    return tuple(key(str(scope), text, [scope]) for scope, text in TOKENS.items())


class Answer(NamedTuple):
    status: int
    body: Any
    """Decoded, where it is JSON."""
    headers: Mapping[str, str]


class Whole:
    """What a process that is well says of itself."""

    def alive(self) -> str:
        return ""

    def ready(self) -> str:
        return ""

    def exposition(self) -> tuple[bytes, str]:
        return b"", "text/plain"


class Door:
    """A listener over a real store, and its guests."""

    def __init__(self, folder: Path, endpoint: Endpoint, gate: Gate, local: bool = False) -> None:
        self.endpoint, self.gate = endpoint, gate
        self.path = str(folder / "api.sock")
        self.said: list[str] = []
        root = str(folder / "repository")
        self.settings = Settings(hub="h", state=str(folder), repositories={"local": root})
        self.store = Store(folder, "h")
        self.inbox = Inbox(folder)
        self.listener = Listener(
            endpoint,
            self.inbox,
            ourselves("h", str(folder), "reconciler test"),
            kick=lambda _: None,
            say=self.said.append,
            gate=gate,
            local=self.path if local else "",
            vital=Whole(),
            desk=lambda: Desk(lambda: self.settings, {}, lambda _: None),
        )

    @property
    def app(self) -> Guarded:
        """What serves here."""
        assert self.ask("GET", "/").status  # it is loaded by then
        assert self.listener._server
        found = self.listener._server.config.app
        assert isinstance(found, Guarded)
        return found

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        token: str = "",
        local: bool = False,
        tls: ssl.SSLContext | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        connection = http.client.HTTPConnection("localhost", timeout=PATIENCE)
        connection.sock = self.connected(local)
        if tls:
            connection.sock = tls.wrap_socket(connection.sock, server_hostname="localhost")
        sent = dict(headers or {})
        if token:
            sent["Authorization"] = f"Bearer {token}"
        try:
            connection.request(method, path, body, sent)
            return answered(connection.getresponse())
        finally:
            connection.close()

    def connected(self, local: bool = False) -> socket.socket:
        if not local:
            return socket.create_connection(
                (self.endpoint.host, self.endpoint.port), timeout=PATIENCE
            )
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(PATIENCE)
        sock.connect(self.path)
        return sock

    def raw(self, *pieces: bytes) -> Answer:
        """What is answered to bytes."""
        with self.connected() as sock:
            for piece in pieces:
                sock.sendall(piece)
            return heard(sock)

    def close(self) -> None:
        self.listener.close()
        self.inbox.close()
        self.store.close()


def heard(sock: socket.socket) -> Answer:
    """The next answer on a connection."""
    response = http.client.HTTPResponse(sock)
    response.begin()
    return answered(response)


def answered(response: http.client.HTTPResponse) -> Answer:
    body = response.read()
    kind = response.getheader("Content-Type", "")
    return Answer(
        response.status,
        json.loads(body) if kind == "application/json" else body,
        {name.lower(): value for name, value in response.getheaders()},
    )


def refused(answer: Answer, status: int, *words: str) -> None:
    """An error in the form that every path has."""
    assert answer.status == status, answer
    assert set(answer.body) == {"error", "details", "timestamp"}
    for word in words:
        assert word in answer.body["details"]


Doors = Callable[..., Door]


@contextmanager
def doors(folder: Path, deal: Callable[[], Endpoint]) -> Iterator[Doors]:
    """Makes doors, and closes them."""
    made: list[Door] = []

    def one(
        *, access: Access | None = None, limits: ApiLimits | None = None, **changes: Any
    ) -> Door:
        gate = changes.pop("gate", None) or Gate(access, limits)
        made.append(Door(folder, deal(), gate, **changes))
        return made[-1]

    yield one
    for door in made:
        door.close()


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """One that signs itself, for localhost, and its key."""
    cert, private = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", str(private)),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, private
