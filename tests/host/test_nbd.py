"""Handshakes with servers that behave in every other way."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import pytest

from reconciler.host.nbd import GREETING, Target, handshake

Talk: TypeAlias = Callable[[socket.socket], object]
REPLY = 0x0003E889045565A9


@contextmanager
def serving(talk: Talk) -> Iterator[int]:
    """A server on a port of its own that runs `talk` with each client."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                talk(client)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def greet(client: socket.socket) -> bytes:
    client.sendall(GREETING + struct.pack("!H", 3))
    return client.recv(4096)


def reply(kind: int, data: bytes = b"") -> bytes:
    return struct.pack("!QIII", REPLY, 6, kind, len(data)) + data


def info(size: int, flags: int = 1) -> bytes:
    return reply(3, struct.pack("!HQH", 0, size, flags))


def one(port: int, timeout: float = 5.0) -> tuple[int | None, str]:
    answer = handshake([Target("127.0.0.1", port, "x")], timeout)[0]
    return answer.size, answer.error


def test_a_good_answer_byte_by_byte() -> None:
    def talk(client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in GREETING + struct.pack("!H", 3):
            client.sendall(bytes([byte]))
        client.recv(4096)
        for byte in info(4096, 3) + reply(3, b"\0\2hello") + reply(1):
            client.sendall(bytes([byte]))
        client.recv(4096)
        client.sendall(reply(1))

    with serving(talk) as port:
        answer = handshake([Target("127.0.0.1", port, "x")], 5)[0]
    assert (answer.size, answer.read_only, answer.description) == (4096, True, "hello")


@pytest.mark.parametrize(
    ("talk", "error"),
    [
        (lambda c: c.close(), "closed the connection"),
        (lambda c: c.sendall(b"SSH-2.0-OpenSSH_9.2\r\nxxxxxx"), "does not speak NBD"),
        (lambda c: (greet(c), c.sendall(b"\0" * 20)), "its answer is not NBD"),
        (lambda c: (greet(c), c.sendall(reply(0x80000006, b"gone"))), "no export of that name"),
        (lambda c: (greet(c), c.sendall(reply(0x80000005))), "demands TLS first"),
        (lambda c: (greet(c), c.sendall(reply(1))), "it named no size"),
        (
            lambda c: (greet(c), c.sendall(struct.pack("!QIII", REPLY, 6, 3, 1 << 30))),
            "its answer is not NBD",
        ),
    ],
)
def test_a_bad_answer_says_how(talk: Talk, error: str) -> None:
    with serving(talk) as port:
        size, said = one(port)
    assert size is None
    assert error in said


def test_a_mute_server_costs_one_deadline_and_not_one_each() -> None:
    hold = threading.Event()
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(20)]
    try:
        targets = [Target("127.0.0.1", one.getsockname()[1], "x") for one in listeners]
        answers = handshake(targets, 0.3)  # twenty in a row would be six seconds
        assert {answer.error for answer in answers} == {"no answer within 0.3 s"}
    finally:
        hold.set()
        for listener in listeners:
            listener.close()


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "Connection refused" in one(port)[1]


def test_the_end_of_the_process_ends_the_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = subprocess.Popen(["sleep", "600"])
        pidfd = os.pidfd_open(child.pid)
        try:
            threading.Timer(0.1, child.kill).start()
            target = Target("127.0.0.1", listener.getsockname()[1], "x", pidfd)
            assert handshake([target], 60)[0].error == "it ended"
        finally:
            os.close(pidfd)
            child.wait(10)


def test_no_targets_no_answers() -> None:
    assert handshake([], 1) == []
