"""The one POST on the wire: what is sent, what is never done, and what each failure becomes."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from reconciler.core.call import CallEvent, judge
from reconciler.core.settings import Appliance, Secret
from reconciler.host.sna import Line, NothingSent

REQUEST = {"job_id": "job-1", "vm_name": "vm"}
STARTED = {"job_id": "job-1", "status": "started", "message": "", "started_at": "", "pid": 1}


@pytest.fixture
def sna(httpserver: HTTPServer) -> Appliance:
    httpserver.expect_request("/api/v1/health").respond_with_json({"status": "ok"})
    return Appliance(url=httpserver.url_for("").rstrip("/"), timeout=1.0, connect_timeout=0.5)


def call(sna: Appliance, token: Secret | None = None) -> tuple[CallEvent, str]:
    with Line(sna, token) as line:
        line.preflight()
        return judge(line.start(REQUEST, Secret("hunter2")), "job-1")


def test_what_is_sent(httpserver: HTTPServer, sna: Appliance) -> None:
    httpserver.expect_request("/api/v1/backup/start", method="POST").respond_with_json(STARTED)
    event, _ = call(sna, Secret("tok"))
    assert event is CallEvent.ACCEPT
    request: Request = httpserver.log[-1][0]
    assert json.loads(request.data) == {**REQUEST, "vcenter_password": "hunter2"}
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["Idempotency-Key"] == "job-1"
    assert request.headers["Authorization"] == "Bearer tok"


@pytest.mark.parametrize(
    ("status", "event"),
    [
        *((code, CallEvent.REJECT) for code in (400, 401, 403, 404, 405, 413, 415, 422)),
        *((code, CallEvent.UNCLEAR) for code in (201, 202, 204, 301, 302, 307, 408, 409, 418)),
        *((code, CallEvent.UNCLEAR) for code in (429, 500, 502, 503, 504)),
    ],
)
def test_each_status_is_posted_once(
    httpserver: HTTPServer, sna: Appliance, status: int, event: CallEvent
) -> None:
    answer = Response("why", status, headers={"Location": httpserver.url_for("/elsewhere")})
    httpserver.expect_request("/api/v1/backup/start").respond_with_response(answer)
    assert call(sna)[0] is event
    assert [entry[0].path for entry in httpserver.log] == ["/api/v1/health", "/api/v1/backup/start"]


@pytest.mark.parametrize(
    "body",
    ["", "job not found", "[]", '{"job_id": "job-1"}', '{"job_id": "other", "status": "started"}'],
)
def test_a_strangers_200_is_not_a_yes(httpserver: HTTPServer, sna: Appliance, body: str) -> None:
    httpserver.expect_request("/api/v1/backup/start").respond_with_data(body)
    assert call(sna)[0] is CallEvent.UNCLEAR


def test_an_unhealthy_appliance_is_sent_nothing(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/api/v1/health").respond_with_data("no", 503)
    with pytest.raises(NothingSent, match="it answers 503"):
        call(Appliance(url=httpserver.url_for("").rstrip("/")))
    assert {entry[0].path for entry in httpserver.log} == {"/api/v1/health"}


def test_a_health_check_may_fail_once(httpserver: HTTPServer) -> None:
    httpserver.expect_ordered_request("/api/v1/health").respond_with_data("no", 503)
    httpserver.expect_ordered_request("/api/v1/health").respond_with_data("yes")
    httpserver.expect_ordered_request("/api/v1/backup/start").respond_with_json(STARTED)
    event, _ = call(Appliance(url=httpserver.url_for("").rstrip("/")))
    assert event is CallEvent.ACCEPT


def test_nobody_there_is_nothing_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(NothingSent, match="/api/v1/health"):
        call(Appliance(url=f"http://127.0.0.1:{port}"))


def test_proxies_of_the_environment_are_not_used(
    httpserver: HTTPServer, sna: Appliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    httpserver.expect_request("/api/v1/backup/start").respond_with_json(STARTED)
    assert call(sna)[0] is CallEvent.ACCEPT


@contextmanager
def raw(*pieces: bytes, pause: float = 0.0) -> Iterator[tuple[Appliance, list[int]]]:
    """Health answers well; the POST is answered with these bytes, and the connection closed."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[int] = []
    stop = threading.Event()

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            connections.append(client.fileno())
            with client:
                client.recv(65536)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                if not client.recv(65536):
                    continue
                try:
                    for piece in pieces:
                        client.sendall(piece)
                        if stop.wait(pause):
                            return
                except OSError:
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield Appliance(url=url, timeout=0.5), connections
    finally:
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


@pytest.mark.parametrize(
    ("pieces", "pause"),
    [
        ((), 0.0),  # it drops the connection
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",), 0.0),  # in mid-answer
        ((b"garbage\r\n\r\n",), 0.0),
        ((b"",), 30.0),  # it hangs
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", *([b" "] * 98)), 0.1),  # it trickles
    ],
)
def test_what_breaks_after_the_post_is_unclear_and_not_repeated(
    pieces: tuple[bytes, ...], pause: float
) -> None:
    with raw(*pieces, pause=pause) as (sna, connections):
        event, message = call(sna)
        assert event is CallEvent.UNCLEAR, message
        assert "no answer came" in message
        assert len(connections) == 1  # the POST went over the connection of the health check


def test_what_a_witness_says(httpserver: HTTPServer, sna: Appliance) -> None:
    known = {"job_id": "job-1", "status": "running", "progress_percent": 12.5}
    httpserver.expect_request("/api/v1/status/job-1").respond_with_json(known)
    httpserver.expect_request("/api/v1/status/job-2").respond_with_data("no", 404)
    httpserver.expect_request("/api/v1/status/job-3").respond_with_data("job not found")
    httpserver.expect_request("/api/v1/status/job-4").respond_with_json(known)
    with Line(sna, None) as line:
        first = line.ask("job-1")
        assert (first.known, first.status, first.percent) == (True, "running", 12.5)
        assert line.ask("job-2").known is False
        assert line.ask("job-3").known is None
        assert line.ask("job-4").known is None
