"""Questions through a tunnel whose answers mean something; light, as `status` asks them.

A TCP connect proves nothing there: ssh takes it itself, whoever is or is not at the other end.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from reconciler.core.settings import Secret
from reconciler.core.units import Endpoint, Port, Seconds

GREETING: Final = b"NBDMAGICIHAVEOPT"
"""What an NBD server says first. Source: the NBD protocol, fixed newstyle negotiation."""
MOST: Final = 1 << 20
"""Bytes of an answer. A list of 100 backups of ten disks has 300 KiB."""
SETTLE: Final[Seconds] = 0.05
"""ssh writes its line and ends the connection at the same time; this is for a busy machine."""
TRIES: Final = 8
"""Of a forward, until nobody else fails at the same time."""
_FAILED: Final = b": open failed: "
_PROHIBITED: Final = b": open failed: administratively prohibited"
"""What ssh says of each forward that leads nowhere, and of one that the hub's policy refuses."""


class Answer(Struct, frozen=True):
    """What an HTTP GET came to."""

    status: int = 0
    body: bytes = b""
    error: str = ""
    """Why there is no answer; empty: there is."""
    silent: bool = False
    """Nothing came in time, not even an end."""


def http_get(to: Endpoint, path: str, timeout: Seconds, token: Secret | None = None) -> Answer:
    """One GET, within one deadline for all of it."""
    deadline = time.monotonic() + timeout
    lines = [f"GET {path} HTTP/1.1", f"Host: {to}", "Connection: close", "Accept: */*"]
    if token:
        lines.append(f"Authorization: Bearer {token.reveal()}")
    data = bytearray()
    try:
        with socket.create_connection((to.host, to.port), timeout) as line:
            line.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
            while len(data) < MOST:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                line.settimeout(left)
                piece = line.recv(1 << 16)
                if not piece:
                    break
                data += piece
                if _whole(data):
                    break
    except TimeoutError:
        got = f" after {len(data)} bytes" if data else ""
        return Answer(error=f"no answer within {timeout:g} s{got}", silent=not data)
    except ConnectionResetError:
        pass  # ssh's way to close what was not read
    except OSError as error:
        if not data:
            return Answer(error=error.strerror or str(error))
    if not data:
        return Answer(error="the connection was closed at once")
    return _parsed(bytes(data))


def _whole(data: bytearray) -> bool:
    """Whether an answer with a stated length is there in full."""
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return False
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:") and line[15:].strip().isdigit():
            return len(body) >= int(line[15:])
    return False


def _parsed(data: bytes) -> Answer:
    import http.client  # late: `status` without tunnels does not load it
    import io

    class Given:
        def makefile(self, *_: object) -> io.BytesIO:
            return io.BytesIO(data)

    reply = http.client.HTTPResponse(Given())  # type: ignore[arg-type]
    try:
        reply.begin()
        return Answer(reply.status, reply.read())
    except (http.client.HTTPException, ValueError, OSError):
        return Answer(error=f"what answers is no HTTP server: {data[:20]!r}")


def greets(ends: Sequence[Endpoint], timeout: Seconds) -> list[str]:
    """Per end: empty if an NBD server greets, else why not. All at once, within one deadline."""
    return [_told(data, timeout) for data in _hear(ends, timeout)]


def _told(data: bytes | str | None, timeout: Seconds) -> str:
    if data is None:
        return f"silence for {timeout:g} s"
    if isinstance(data, str):
        return data
    if data == GREETING:
        return ""
    return f"it says {data!r}" if data else "the connection was closed at once"


def _hear(ends: Sequence[Endpoint], timeout: Seconds) -> list[bytes | str | None]:
    """Per end: the first bytes, as many as a greeting has; fewer: it was closed. None: silence.
    A text: there was no connection."""
    found: list[bytes | str | None] = [None] * len(ends)
    heard = [b""] * len(ends)
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        waiting = 0
        for number, end in enumerate(ends):
            line = stack.enter_context(socket.socket(_family(end), socket.SOCK_STREAM))
            line.setblocking(False)
            error = line.connect_ex((end.host, end.port))
            if error not in (0, 115):  # EINPROGRESS
                found[number] = os.strerror(error)
                continue
            selector.register(line, selectors.EVENT_READ, number)
            waiting += 1
        while waiting and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                number, this = key.data, key.fileobj
                assert isinstance(this, socket.socket)
                try:
                    piece = this.recv(len(GREETING) - len(heard[number]))
                except BlockingIOError:
                    continue
                except OSError as error:
                    found[number] = error.strerror or str(error)
                    piece = b""
                heard[number] += piece
                if not piece or len(heard[number]) == len(GREETING):
                    if found[number] is None:
                        found[number] = heard[number]
                    selector.unregister(this)
                    waiting -= 1
    return found


def _family(end: Endpoint) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in end.host else socket.AF_INET


def refused_ports(ends: Sequence[Endpoint], log: Path, timeout: Seconds) -> list[Port]:
    """The forwards which the hub's sshd does not permit, by what ssh says when they are tried.

    It does not say which connection it speaks of. So if it said so at all, each that was closed is
    tried by itself.
    """
    count, answers = _tried(ends, log, timeout)
    if not count:
        return []
    closed = [end for end, answer in zip(ends, answers, strict=True) if not answer]
    return [end.port for end in closed if _alone(end, log, timeout)]


def refused_api(end: Endpoint, log: Path, timeout: Seconds = 1.0) -> bool:
    """The same of a forward behind which somebody waits to be asked, instead of greeting."""
    before = _size(log)
    answer = http_get(end, "/", timeout)
    return bool(answer.error) and bool(_said(log, before, _PROHIBITED))


def _alone(end: Endpoint, log: Path, timeout: Seconds) -> bool:
    """Whether the policy refuses this one, though other clients come and go meanwhile.

    ssh writes its line before it ends the connection, so ours is among those that came until then:
    if all are refusals, it is one. Where there are both kinds, it is tried again. Seen with OpenSSH
    9.2: 400 of 400 lines were there at the end of their connection.
    """
    for _ in range(TRIES):
        before = _size(log)
        refused, answers = _tried([end], log, timeout)
        if not refused or answers != [b""]:
            return False
        if refused == _said(log, before, _FAILED):
            return True
    return False


def _tried(
    ends: Sequence[Endpoint], log: Path, timeout: Seconds
) -> tuple[int, list[bytes | str | None]]:
    """How often ssh says that the policy refuses when these are tried, and what each answered."""
    before = _size(log)
    answers = _hear(ends, timeout)
    deadline = time.monotonic() + SETTLE
    while _said(log, before, _FAILED) < answers.count(b"") and time.monotonic() < deadline:
        time.sleep(0.002)
    return _said(log, before, _PROHIBITED), answers


def _said(log: Path, since: int, what: bytes) -> int:
    try:
        with log.open("rb") as file:
            file.seek(since if since <= _size(log) else 0)
            return file.read(MOST).count(what)
    except OSError:
        return 0


def _size(log: Path) -> int:
    try:
        return log.stat().st_size
    except OSError:
        return 0
