"""Who has the address, what waits for us while we load, and how we let go of it."""

from __future__ import annotations

import http.client
import http.server
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from reconciler.api import about, app
from reconciler.api import listener as api_listener
from reconciler.api.about import HEALTH, About, holder, ourselves
from reconciler.api.listener import Listener
from reconciler.core.errors import HostError
from reconciler.core.units import Endpoint
from reconciler.host.sockets import PortBusyError, listening
from reconciler.host.store import Store
from reconciler.host.store.inbox import Inbox
from tests.e2e.site import until

Make = Callable[..., Listener]


@pytest.fixture
def make(tmp_path: Path, endpoint: Endpoint) -> Iterator[Make]:
    """Listeners at one address for the hub h, closed at the end."""
    made: list[Listener] = []

    def one(**changes: Any) -> Listener:
        us = ourselves("h", str(tmp_path), "reconciler test")
        inbox = Inbox(tmp_path)
        made.append(
            Listener(endpoint, inbox, us, kick=lambda _: None, say=lambda _: None, **changes)
        )
        return made[-1]

    yield one
    for listener in made:
        listener.close()


def ask(endpoint: Endpoint, path: str = HEALTH) -> int:
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=20)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def test_who_connects_while_we_load_waits_and_is_answered(
    make: Make, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = threading.Event()
    create = app.create_app

    def slow(*arguments: object) -> object:
        assert loaded.wait(20)
        return create(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(app, "create_app", slow)
    make()
    with socket.create_connection((endpoint.host, endpoint.port), timeout=20) as early:
        early.sendall(f"GET {HEALTH} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        loaded.set()
        assert early.recv(65536).startswith(b"HTTP/1.1 200 OK")


def test_an_address_that_another_has_is_refused_and_the_other_is_named(
    make: Make, endpoint: Endpoint, tmp_path: Path
) -> None:
    make()
    with pytest.raises(PortBusyError, match=f"cannot listen on {endpoint}: Address already in use"):
        make()
    Store(tmp_path, "h").close()
    found = holder(endpoint)
    assert found.about is not None
    assert (found.about.hub, found.about.pid) == ("h", os.getpid())
    assert found.about.state == str(tmp_path.resolve())
    assert found.about.state_id
    assert found.what == f"the reconciler of hub h, pid {os.getpid()} (reconciler test)"


def test_a_stranger_is_named_by_the_kernels_word(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(about, "ASK_TIMEOUT", 0.1)
    with listening(endpoint.host, endpoint.port, "x"):  # it accepts, and says nothing
        found = holder(endpoint)
    assert found.about is None
    assert f"(pid {os.getpid()})" in found.what


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b"{}", b'{"hub": 7, "state": "x"}', b"<html>", b"x" * (1 << 20)]
)
def test_what_answers_and_is_no_reconciler_is_a_stranger(endpoint: Endpoint, answer: bytes) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer((endpoint.host, endpoint.port), Other) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            assert holder(endpoint).about is None
        finally:
            server.shutdown()
            thread.join(20)


def test_a_listener_lets_go_of_its_address_and_of_idle_clients(
    make: Make, endpoint: Endpoint
) -> None:
    first = make()
    kept = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=20)
    kept.request("GET", HEALTH)
    assert kept.getresponse().read()
    first.close()
    assert first.failure is None
    make()
    assert ask(endpoint) == 200
    kept.close()


def test_what_was_asked_before_the_end_is_answered(
    make: Make, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def slow(_: Inbox) -> None:
        asked.set()
        assert go_on.wait(20)

    monkeypatch.setattr(Inbox, "identity", slow)
    monkeypatch.setattr(api_listener, "GRACE", 20.0)  # however busy the machine is
    listener = make()
    statuses: list[int] = []
    client = threading.Thread(target=lambda: statuses.append(ask(endpoint)))
    client.start()
    assert asked.wait(20)
    closing = threading.Thread(target=listener.close)
    closing.start()
    go_on.set()
    client.join(20)
    closing.join(20)
    assert statuses == [200]


def test_a_listener_that_is_closed_before_it_is_loaded_never_serves(
    make: Make, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = threading.Event()
    create = app.create_app

    def slow(*arguments: object) -> object:
        assert loaded.wait(20)
        return create(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(app, "create_app", slow)
    listener = make()
    listener.close()
    loaded.set()

    def free() -> bool:
        try:
            listening(endpoint.host, endpoint.port, "x").close()
        except PortBusyError:
            return False
        return True

    until(free, "the address to be free")
    assert listener.failure is None


def test_a_thread_that_ends_by_itself_is_told_with_its_reason(
    make: Make, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(app, "create_app", broken)
    ended = threading.Event()
    listener = make(ended=ended.set)
    assert ended.wait(20)
    with pytest.raises(HostError, match=f"at {endpoint} any more: RuntimeError: a bug"):
        listener.check()
    listening(endpoint.host, endpoint.port, "x").close()  # and the address is free


def test_a_listener_that_runs_passes_its_check(make: Make, endpoint: Endpoint) -> None:
    listener = make()
    assert ask(endpoint) == 200
    listener.check()


def test_an_address_of_another_machine_cannot_be_taken() -> None:
    with pytest.raises(HostError, match=r"on this machine: correct `api: \{listen: …\}`"):
        listening("192.0.2.1", 8082, "api: {listen: …}")


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"hub": "g"}, False),
        ({"state": "/other"}, True),  # the same directory by another name
        ({"state_id": "b"}, False),
        ({"state_id": ""}, True),
        ({"state_id": "", "state": "/other"}, False),
        ({"pid": 7, "command": "other"}, True),
    ],
)
def test_two_listeners_of_one_store_know_each_other(changes: dict[str, str], same: bool) -> None:
    us = About(hub="h", state="/s", state_id="a", pid=1, command="c")
    other = replace(us, **changes)
    assert us.same_state(other) is same
    assert other.same_state(us) is same
