"""Following runs over real connections: nobody who goes away leaves anything behind."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reconciler.api import streams
from reconciler.api.about import ourselves
from reconciler.api.listener import Listener
from reconciler.api.streams import Streams
from reconciler.core.call import CallEvent
from reconciler.core.units import Endpoint
from reconciler.host.store import Event
from tests.api.played import Played
from tests.e2e.site import until
from tests.host.test_inbox import ACCEPTED

EVENTS = "/api/v1/backups/j/events"


class Followed:
    """A run that goes on, and a listener that can be asked about it."""

    def __init__(self, hub: Played, endpoint: Endpoint) -> None:
        self.hub, self.endpoint = hub, endpoint
        self.call = hub.past("ctx-1", "r1", *ACCEPTED, job_id="j")
        self.listener = Listener(
            endpoint,
            hub.inbox,
            ourselves("hub-a", hub.settings.state, "reconciler test"),
            kick=lambda _: None,
            say=hub.said.append,
            desk=lambda: hub.played,
        )

    def stream(self, after: int = 0) -> tuple[http.client.HTTPConnection, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.endpoint.port, timeout=60)
        connection.request("GET", EVENTS, headers={"Last-Event-ID": str(after)})
        return connection, connection.getresponse()

    @property
    def streams(self) -> Streams:
        assert self.listener._server
        app: Any = self.listener._server.config.app
        routes = app.routes.app.router.routes
        endpoint = next(one.endpoint for one in routes if one.path.endswith("/events"))
        found: Streams = endpoint.__self__.streams
        return found

    def happens(self, word: str) -> None:
        event = Event(vm="ctx-1", run="r1", reason=word, message=word)
        self.hub.store.record([event], "t", self.hub.now())


@pytest.fixture
def followed(
    tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Followed]:
    monkeypatch.chdir(tmp_path)
    hub = Played(tmp_path)
    found = Followed(hub, endpoint)
    yield found
    found.listener.close()
    hub.close()


def next_of(answer: Any) -> tuple[str, str, Any]:
    """(event, id, data) of the next message; a heartbeat is `:`."""
    lines: dict[str, str] = {}
    for raw in answer:
        line = raw.decode().rstrip("\n")
        if line.startswith(":"):
            lines["event"] = ":"
        elif line:
            name, _, value = line.partition(": ")
            lines[name] = value
        elif lines:
            data = json.loads(lines["data"]) if "data" in lines else None
            return lines["event"], lines.get("id", ""), data
    raise AssertionError("the stream ended")


def test_a_run_is_followed_from_where_somebody_was_to_its_end(followed: Followed) -> None:
    connection, answer = followed.stream()
    assert answer.getheader("Content-Type") == "text/event-stream; charset=utf-8"
    assert answer.getheader("Cache-Control") == "no-store"
    kind, _, data = next_of(answer)
    assert (kind, data["status"], data["backup_id"]) == ("status", "running", "j")
    followed.happens("One")
    kind, number, data = next_of(answer)
    assert (kind, data["reason"], data["message"]) == ("log", "One", "One")
    connection.close()
    followed.happens("Two")
    connection, answer = followed.stream(int(number))
    assert next_of(answer)[2]["reason"] == "Two"
    assert next_of(answer)[0] == "status"
    followed.hub.inbox.telemetry("j", 9.0, phase="copying", size=5)
    kind, _, data = next_of(answer)
    assert (kind, data["current_phase"], data["bytes_transferred"]) == ("status", "copying", 5)
    followed.hub.store.advance(followed.call, CallEvent.END, followed.hub.now())
    followed.happens("Last")
    found = [next_of(answer), next_of(answer)]
    assert [kind for kind, _, _ in found] == ["log", "end"]
    assert found[1][2]["status"] == "completed"
    assert answer.read() == b""
    connection.close()


def test_silence_is_broken_by_a_comment(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT", 0.0)
    connection, answer = followed.stream()
    assert next_of(answer)[0] == "status"
    assert next_of(answer)[0] == ":"
    connection.close()


def test_who_goes_away_leaves_nothing_behind(followed: Followed) -> None:
    before = threading.active_count()
    there = [followed.stream() for _ in range(20)]
    for _, answer in there:
        next_of(answer)
    assert followed.streams.open == 20
    assert threading.active_count() <= before + 2 * streams_threads()
    for connection, answer in there:
        assert connection.sock is None or connection.sock.shutdown(socket.SHUT_RDWR) is None
        answer.close()
        connection.close()
    until(lambda: followed.streams.open == 0, "nobody follows")


def streams_threads() -> int:
    """Threads that looks are made in, however many follow."""
    from reconciler.api.backups import PLACES

    return PLACES


def test_more_than_the_most_are_sent_away(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MOST", 2)
    there = [followed.stream() for _ in range(2)]
    connection, answer = followed.stream()
    assert (answer.status, answer.getheader("Retry-After")) == (503, "5")
    assert "2 runs are being followed" in json.loads(answer.read())["details"]
    connection.close()
    for connection, answer in there:
        answer.close()
        connection.close()


def test_the_end_of_the_process_ends_every_stream_in_order(followed: Followed) -> None:
    connection, answer = followed.stream()
    next_of(answer)
    followed.listener.close()
    assert not followed.listener._thread.is_alive()
    assert answer.read() == b""  # whole: the last piece came
    connection.close()
    assert followed.hub.said == []
