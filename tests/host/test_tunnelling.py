"""Questions through a tunnel, at servers that behave as ssh and as what is behind it."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from reconciler.core.settings import Secret
from reconciler.core.units import Endpoint
from reconciler.host.tunnelling import GREETING, greets, http_get, refused_ports

PROHIBITED = "channel 101: open failed: administratively prohibited: open failed\n"
NOBODY = "channel 101: open failed: connect failed: Connection refused\n"
"""Seen with OpenSSH 9.2."""


class Ends:
    """Ports that each do one thing with whoever comes."""

    def __init__(self, stack: ExitStack, log: Path) -> None:
        self.stack, self.log = stack, log
        self.over = threading.Event()
        stack.callback(self.over.set)
        self._lock = threading.Lock()

    def add(self, does: Callable[[socket.socket], None]) -> Endpoint:
        server = self.stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
        server.settimeout(0.1)

        def serve() -> None:
            while not self.over.is_set():
                with suppress(TimeoutError, OSError):
                    line = server.accept()[0]
                    threading.Thread(target=self._one, args=(does, line), daemon=True).start()

        thread = threading.Thread(target=serve)
        thread.start()
        self.stack.callback(thread.join)
        self.stack.callback(self.over.set)
        return Endpoint("127.0.0.1", server.getsockname()[1])

    def _one(self, does: Callable[[socket.socket], None], line: socket.socket) -> None:
        with line, suppress(OSError):
            does(line)

    def say(self, words: str) -> None:
        with self._lock, self.log.open("a") as file:
            file.write(words)

    def fails(self, words: str, after: float) -> Endpoint:
        """A forward that leads nowhere, over a link with a round trip of `after` seconds."""

        def does(_: socket.socket) -> None:
            time.sleep(after)
            self.say(words)

        return self.add(does)

    def others(self, words: str, every: float) -> None:
        """Clients whose connections fail all the time."""

        def go() -> None:
            while not self.over.wait(every):
                self.say(words)

        thread = threading.Thread(target=go)
        thread.start()
        self.stack.callback(thread.join)
        self.stack.callback(self.over.set)


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    (tmp_path / "log").touch()
    with ExitStack() as stack:
        yield Ends(stack, tmp_path / "log")


def test_only_a_whole_greeting_is_one(ends: Ends) -> None:
    def halves(line: socket.socket) -> None:
        line.sendall(GREETING[:5])
        time.sleep(0.05)
        line.sendall(GREETING[5:])

    asked = [
        ends.add(lambda line: line.sendall(GREETING)),
        ends.add(halves),
        ends.add(lambda line: line.close()),
        ends.add(lambda line: time.sleep(1)),
        ends.add(lambda line: line.sendall(b"HTTP/1.1 400 Bad Request")),
        ends.add(lambda line: line.sendall(GREETING[:8])),
    ]
    with socket.create_server(("127.0.0.1", 0)) as gone:
        asked.append(Endpoint("127.0.0.1", gone.getsockname()[1]))
    began = time.monotonic()
    said = greets(asked, 0.5)
    assert time.monotonic() - began < 0.9
    assert said[:5] == [
        "",
        "",
        "the connection was closed at once",
        "silence for 0.5 s",
        "it says b'HTTP/1.1 400 Bad'",
    ]
    assert said[5] == "it says b'NBDMAGIC'"
    assert said[6] == "Connection refused"


def test_an_answer_in_drops_ends_with_its_deadline(ends: Ends) -> None:
    def drips(line: socket.socket) -> None:
        line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(100):
            line.sendall(b"x")
            time.sleep(0.05)

    began = time.monotonic()
    answer = http_get(ends.add(drips), "/", 0.4)
    assert 0.3 < time.monotonic() - began < 0.6
    assert "no answer within 0.4 s after" in answer.error

    def begins(line: socket.socket) -> None:
        time.sleep(0.3)
        line.sendall(b"HTTP/1.1 200 OK\r\n")
        time.sleep(1)

    began = time.monotonic()
    assert "no answer within 0.4 s after 17" in http_get(ends.add(begins), "/", 0.4).error
    assert time.monotonic() - began < 0.6


def test_a_token_goes_to_the_hub_and_into_no_error(ends: Ends) -> None:
    heard = []

    def answers(line: socket.socket) -> None:
        heard.append(line.recv(4096))
        line.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno")

    answer = http_get(ends.add(answers), "/healthz", 2, Secret("s3cret"))
    assert (answer.status, answer.body) == (503, b"no")
    assert b"Authorization: Bearer s3cret" in heard[0]
    strange = http_get(ends.add(lambda line: line.sendall(b"SSH-2.0-x\r\n")), "/", 2)
    assert "no HTTP server" in strange.error
    assert http_get(ends.add(lambda _: None), "/", 2).error == "the connection was closed at once"


def test_each_refused_port_is_named_and_who_has_no_server_is_not(ends: Ends) -> None:
    refused = [ends.fails(PROHIBITED, 0.01) for _ in range(2)]
    idle = [ends.fails(NOBODY, 0.01) for _ in range(3)]
    greeting = ends.add(lambda line: line.sendall(GREETING))
    silent = ends.add(lambda _: time.sleep(2))
    asked = [idle[0], refused[0], idle[1], greeting, refused[1], silent, idle[2]]
    assert refused_ports(asked, ends.log, 0.3) == [refused[0].port, refused[1].port]


def test_another_client_that_is_refused_all_the_time_accuses_no_port(ends: Ends) -> None:
    idle = [ends.fails(NOBODY, 0.1) for _ in range(3)]
    ends.others(PROHIBITED, 0.02)
    assert refused_ports(idle, ends.log, 1) == []


def test_other_clients_that_find_nobody_hide_no_refused_port(ends: Ends) -> None:
    tries = itertools.count()

    def does(_: socket.socket) -> None:
        ends.say(NOBODY + PROHIBITED if next(tries) < 3 else PROHIBITED)

    refused, idle = ends.add(does), ends.fails(NOBODY, 0.01)
    assert refused_ports([idle, refused], ends.log, 1) == [refused.port]
