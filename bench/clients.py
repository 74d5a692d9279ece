"""What asks servers and appliances where the tool does not, and an appliance that counts."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from typing import Any, Final

from bench.workplace import DEADLINE, HERE, BenchError

PORTS: Final = (11000, 20000)
"""Where a free range is looked for: below those that tests deal themselves, and those that the
kernel gives to clients."""


def handshake(port: int, name: str) -> None:
    """One NBD handshake, tried until it answers. Raises BenchError."""
    deadline = time.monotonic() + DEADLINE
    while True:
        with socket.socket() as sock:
            sock.settimeout(DEADLINE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                sock.connect(("127.0.0.1", port))
                return _negotiate(sock, name)
            except OSError as error:
                if time.monotonic() > deadline:
                    raise BenchError(f"no export {name} on port {port}: {error}") from error
        time.sleep(0.0005)


def _negotiate(sock: socket.socket, name: str) -> None:
    """Ask for the export's information and leave in order. Source: the NBD protocol, proto.md."""

    def read(count: int) -> bytes:
        data = b""
        while len(data) < count:
            # qemu-nbd answers in small writes: without this, our delayed ACK costs 44 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            piece = sock.recv(count - len(data))
            if not piece:
                raise ConnectionError("it closed the connection")
            data += piece
        return data

    option, info, abort, ack, information = 0x49484156454F5054, 6, 2, 1, 3
    read(18)
    encoded = name.encode()
    body = struct.pack("!I", len(encoded)) + encoded + struct.pack("!H", 0)
    sock.sendall(struct.pack("!IQII", 3, option, info, len(body)) + body)
    while True:
        _, _, kind, length = struct.unpack("!QIII", read(20))
        read(length)
        if kind == ack:
            break
        if kind != information:
            raise BenchError(f"export {name} answers {kind:#x}")
    sock.sendall(struct.pack("!QII", option, abort, 0))
    read(20)


def call(url: str, request: Mapping[str, str]) -> None:
    """GET health and POST, over one connection. Raises BenchError."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(request).encode()
    health = f"GET /api/v1/health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    start = f"POST /api/v1/backup/start HTTP/1.1\r\nHost: {host}\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as sock:
        for message in (health, start + f"Content-Length: {len(body)}\r\n\r\n".encode() + body):
            sock.sendall(message)
            answer = sock.recv(65536)  # one write of under 1 KiB over loopback comes whole
            if not answer.startswith(b"HTTP/1.1 200"):
                raise BenchError(f"the appliance answers {answer!r}")


class Appliance:
    """The stand-in for a node appliance; a process of its own that ends when we do."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "appliance.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the bench alone
        )
        assert self.process.stdout
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def counted(self, *, clear: bool = False) -> Mapping[str, Any]:
        """How often each job was started, and when the last start came."""
        method = "DELETE" if clear else "GET"
        request = urllib.request.Request(f"{self.url}/count", method=method)
        with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
            value: Mapping[str, Any] = json.load(answer)
        return value


def free_ports(count: int) -> range:
    """So many ports in a row on which nobody listens now. Raises BenchError."""
    for first in range(PORTS[0] + os.getpid() % 97, PORTS[1] - count, count):
        ports = range(first, first + count)
        if all(map(_is_free, ports)):
            return ports
    raise BenchError(f"cannot find {count} free ports in a row in {PORTS[0]}-{PORTS[1]}")


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
