"""The one POST on the wire: what is sent, what is never done, and what each failure becomes."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from reconciler.core.call import CallEvent, judge
from reconciler.core.settings import Appliance, Secret
from reconciler.host.sna import MAX_BODY, Line, NothingSent

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


def whole(client: socket.socket) -> bytes:
    """One request with its body: what is left unread when a connection is closed resets it."""
    data = b""
    while piece := client.recv(65536):
        data += piece
        head, end, body = data.partition(b"\r\n\r\n")
        length = int((head.lower().partition(b"content-length:")[2].split() or [b"0"])[0])
        if end and len(body) >= length:
            break
    return data


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
                whole(client)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                if not whole(client):
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


def test_a_kept_connection_that_was_closed_is_not_used_again() -> None:
    with raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}") as (sna, connections):
        with Line(sna, None) as line:
            assert line.health().status == 200
            assert line.start(REQUEST, Secret("x")).status == 200  # it closes after that
            while not connections_over(line):
                pass
            assert line.health().status == 200
        assert len(connections) == 2


def connections_over(line: Line) -> bool:
    sock = line._http.sock
    return sock is None or sock.recv(1, socket.MSG_PEEK) == b""


def test_bytes_that_nobody_asked_for_are_no_answer() -> None:
    """What lies on a kept connection before the POST was not said about it."""
    stray = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    listener = socket.create_server(("127.0.0.1", 0))
    seen: list[bytes] = []
    read = threading.Event()

    def serve() -> None:
        for _ in range(2):
            client, _ = listener.accept()
            with client, suppress(ConnectionError):
                while data := client.recv(65536):
                    seen.append(data)
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                    read.wait(5)
                    client.sendall(stray)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    sna = Appliance(url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.5)
    with listener, Line(sna, None) as line:
        line.preflight()
        read.set()
        sock = line._http.sock
        assert sock is not None
        sock.recv(1, socket.MSG_PEEK)  # the stray bytes have come
        answer = line.start(REQUEST, Secret("x"))
    thread.join(5)
    assert answer.body == "ok"
    assert (b"".join(seen).count(b"GET /"), b"".join(seen).count(b"POST /")) == (1, 1)


@pytest.mark.parametrize(
    "token", ["a\nb", "a\r\nX-Other: 1", "\u20ac"], ids=["newline", "smuggled", "not latin-1"]
)
def test_a_token_that_no_header_can_have_is_not_shown(
    httpserver: HTTPServer, sna: Appliance, token: str
) -> None:
    with pytest.raises(NothingSent, match="a character that no header may have") as told:
        call(sna, Secret(token))
    assert token not in str(told.value)
    assert not httpserver.log


@pytest.mark.parametrize(
    "pieces",
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"3\r\n{\n}\r\n0\r\n\r\n"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{\n}",),
        (b"HTTP/1.0 200 OK\r\n\r\n{\n}",),  # its end is the end of the connection
    ],
    ids=["chunked", "continue", "until it closes"],
)
def test_answers_are_framed_in_each_way(pieces: tuple[bytes, ...]) -> None:
    with raw(*pieces) as (sna, _), Line(sna, None) as line:
        line.preflight()
        answer = line.start(REQUEST, Secret("x"))
        assert (answer.status, answer.body) == (200, "{\n}")


def test_a_chunked_answer_that_is_cut_is_none() -> None:
    with raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{}") as (sna, _):
        assert call(sna)[0] is CallEvent.UNCLEAR


def test_an_answer_without_end_is_read_so_far(httpserver: HTTPServer, sna: Appliance) -> None:
    httpserver.expect_request("/api/v1/backup/start").respond_with_data("x" * 1_000_000)
    with Line(sna, None) as line:
        line.preflight()
        assert len(line.start(REQUEST, Secret("x")).body) == MAX_BODY
        assert line.health().status == 200


def test_an_appliance_may_live_below_a_path_and_at_an_ipv6_address() -> None:
    listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    port = listener.getsockname()[1]
    asked: list[bytes] = []

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            asked.append(client.recv(65536))
            client.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listener, Line(Appliance(url=f"http://[::1]:{port}/sna/"), None) as line:
        assert line.health().status == 204
    thread.join(5)
    assert asked[0].startswith(b"GET /sna/api/v1/health HTTP/1.1\r\n")
    assert f"Host: [::1]:{port}\r\n".encode() in asked[0]


@pytest.mark.parametrize(
    ("url", "kind", "said"),
    [
        ("http://no-such-host.invalid", "dns", "not known"),
        (f"http://{'a' * 70}.example", "other", "label"),
    ],
)
def test_a_host_that_is_none(url: str, kind: str, said: str) -> None:
    with Line(Appliance(url=url), None) as line:
        health = line.health(2.0)
    assert health.kind == kind
    assert said in health.said


def test_plain_http_behind_https_is_told_as_tls(httpserver: HTTPServer, sna: Appliance) -> None:
    with Line(Appliance(url=sna.url.replace("http:", "https:")), None) as line:
        health = line.health(2.0)
        assert health.kind == "tls"
        assert not line.start(REQUEST, Secret("x")).sent
