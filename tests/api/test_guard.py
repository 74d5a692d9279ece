"""Who is let in, how often and how much; and who only pretends. Over real connections."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from fastapi import FastAPI
from starlette.routing import Route

from reconciler.api import guard
from reconciler.api.about import HEALTH, holder
from reconciler.api.gate import PEER, WHO, Gate
from reconciler.api.guard import Routes, declared, needs
from reconciler.core.access import ALL, Access, Caller, Peer, Scope, key
from reconciler.core.errors import HostError
from reconciler.core.settings import Api, ApiLimits, ApiToken, SecretRef, Settings, Tls
from reconciler.core.units import Endpoint
from reconciler.host.sockets import Local
from reconciler.host.store.inbox import Inbox
from tests.api.guests import (
    TOKENS,
    Answer,
    Door,
    Doors,
    certificate,
    doors,
    heard,
    keys,
    refused,
)
from tests.e2e.site import until
from tests.ports import Dealer

CHANGE_ID: Final = "/api/v1/backups/changeid?vm_name=x"
TELEMETRY: Final = "/api/v1/telemetry/backup/x"
WHOLE: Final = "the-whole-token-0123456789"
OPEN: Final = Access(uid=os.geteuid())
CLOSED: Final = Access(keys=keys(), callbacks_closed=True, uid=os.geteuid())
LET_IN: Final = 404
"""What a callback about a VM or a job that nobody knows is answered."""


@pytest.fixture
def door(tmp_path: Path, dealer: Dealer) -> Iterator[Doors]:
    with doors(tmp_path, lambda: Endpoint("127.0.0.1", dealer.deal(1)[0])) as made:
        yield made


def routes(here: Door) -> list[Route]:
    found = [one for one in here.app.routes.app.router.routes if isinstance(one, Route)]
    assert {"/metrics", HEALTH, "/api/v1/backups/changeid"} <= {one.path for one in found}
    return found


# -- what each route needs


def test_every_route_says_what_it_needs(door: Doors) -> None:
    silent = [one.path for one in routes(door()) if declared(one) is None]
    assert not silent, "these say no scope, so they are taken for the most dangerous"


def test_a_route_that_says_nothing_is_not_for_everybody() -> None:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_api_route("/new", lambda: None, methods=["GET"])
    app.add_api_route("/said", lambda: None, methods=["GET"], openapi_extra=needs(Scope.CALLBACK))
    app.add_api_route("/said", lambda: None, methods=["DELETE"], openapi_extra=needs(Scope.OPERATE))
    app.add_api_route("/figures", lambda: None, methods=["GET"], openapi_extra=needs(Scope.WATCH))
    needed = Routes(app).needed
    for method, path, scope in (
        ("GET", "/new", Scope.OPERATE),
        ("GET", "/said", Scope.CALLBACK),
        ("DELETE", "/said", Scope.OPERATE),
        ("PUT", "/said", Scope.OPERATE),  # as much as the most that is there
        ("PUT", "/figures", Scope.WATCH),
        ("GET", "/nowhere", Scope.READ),
        ("GET", "/said/../new", Scope.READ),
    ):
        asked = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
        assert needed(asked) is scope, (method, path)


def test_what_each_scope_opens_of_every_route(door: Doors) -> None:
    here = door(access=CLOSED)
    for route in routes(here):
        path, needed = route.path.replace("{", "").replace("}", ""), declared(route)
        assert needed is not None
        for method in route.methods or ():
            for scope, token in TOKENS.items():
                answer = here.ask(method, path, b"{}", token=token)
                if needed in (scope, Scope.WATCH):
                    assert answer.status not in (401, 403), (method, path, answer)
                else:
                    words = (f"needs the scope {needed}", f"token {scope} has {scope}")
                    refused(answer, 403, *words)
            if needed is not Scope.WATCH:
                refused(here.ask(method, path, b"{}"), 401)


# -- tokens


def test_without_tokens_whoever_is_on_this_machine_is_let_in(door: Doors) -> None:
    here = door(access=OPEN)
    for token in ("", "whatever-it-is-0123456789"):
        assert here.ask("GET", CHANGE_ID, token=token).status == LET_IN
        assert here.ask("GET", HEALTH, token=token).status == 200


def test_callbacks_are_open_until_a_token_is_made_for_them(door: Doors) -> None:
    reader = Access(keys=(key("reader", TOKENS[Scope.READ], [Scope.READ]),))
    here = door(access=reader)
    assert here.ask("GET", CHANGE_ID).status == LET_IN
    refused(here.ask("GET", "/nowhere"), 401)
    refused(here.ask("GET", CHANGE_ID, token=TOKENS[Scope.READ]), 403, "needs the scope callback")
    here.gate.access = CLOSED
    refused(here.ask("GET", CHANGE_ID), 401)
    assert here.ask("GET", CHANGE_ID, token=TOKENS[Scope.CALLBACK]).status == LET_IN


def test_beyond_this_machine_nothing_is_open(door: Doors) -> None:
    here = door(access=Access(keys=keys(), loopback=False))
    for path in (HEALTH, CHANGE_ID, "/metrics", "/nowhere"):
        answer = here.ask("GET", path)
        refused(answer, 401, "send `Authorization: Bearer TOKEN`")
        assert answer.headers["www-authenticate"].startswith("Bearer")
    assert here.ask("GET", HEALTH, token=TOKENS[Scope.CALLBACK]).status == 200


TOKEN: Final = TOKENS[Scope.CALLBACK].encode()


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer " + TOKEN[:-1],
        b"Bearer " + TOKEN + b"x",
        b"Bearer " + TOKEN.upper(),
        b"Bearer " + TOKEN + b", Bearer " + TOKEN,
        b"Bearer " + TOKEN + b" " + TOKEN,
        b"Bearer " + TOKEN + b"\xc3\xa4",
        b"Bearer \xff\xfe" + b"x" * 20,
        b"Bearer " + b"x" * 8000,
        b"Basic " + TOKEN,
        TOKEN,
    ],
)
def test_what_is_no_token_of_ours(door: Doors, value: bytes) -> None:
    here = door(access=CLOSED)
    answer = here.raw(
        b"GET /api/v1/backups/changeid?vm_name=x HTTP/1.1\r\nHost: a\r\nAuthorization: "
        + value
        + b"\r\n\r\n"
    )
    refused(answer, 401)
    assert answer.headers["www-authenticate"] == 'Bearer realm="reconciler"'
    assert not here.said


@pytest.mark.parametrize("value", [b"Bearer " + TOKEN, b"bearer  " + TOKEN + b" "])
def test_a_token_of_ours(door: Doors, value: bytes) -> None:
    here = door(access=CLOSED)
    answer = here.raw(
        b"GET /api/v1/backups/changeid?vm_name=x HTTP/1.1\r\nHost: a\r\nauthorization: "
        + value
        + b"\r\n\r\n"
    )
    assert answer.status == LET_IN


@pytest.mark.parametrize("second", [TOKEN, b"another"])
def test_two_tokens_in_one_request_are_refused(door: Doors, second: bytes) -> None:
    sent = b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(
        b"Authorization: Bearer " + one + b"\r\n" for one in (TOKEN, second)
    )
    refused(door(access=CLOSED).raw(sent + b"\r\n"), 400, "stands twice")


def test_who_asks_is_told_to_the_route(door: Doors) -> None:
    seen: list[dict[str, Any]] = []
    here = door(access=CLOSED, local=True)
    app = here.app
    inner = app.app

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        await inner(scope, receive, send)

    app.app = watched
    here.ask("GET", CHANGE_ID, token=TOKENS[Scope.CALLBACK])
    here.ask("GET", HEALTH)
    here.ask("GET", HEALTH, local=True)
    user = pwd.getpwuid(os.geteuid()).pw_name
    assert [one.get(WHO) for one in seen] == [
        "token callback",
        None,
        f"uid {os.geteuid()} ({user}) by the socket",
    ]


def test_a_page_in_a_browser_starts_nothing_for_who_is_not_known(door: Doors) -> None:
    page = {"Origin": "http://evil.example"}
    here = door(access=OPEN)
    refused(here.ask("POST", TELEMETRY, b"{}", headers=page), 403, "a page in a browser")
    assert here.ask("GET", CHANGE_ID, headers=page).status == LET_IN
    here.gate.access = CLOSED
    assert (
        here.ask("POST", TELEMETRY, b"{}", token=TOKENS[Scope.CALLBACK], headers=page).status == 404
    )


# -- the Unix socket


def test_the_unix_socket_asks_the_kernel_who_it_is(door: Doors) -> None:
    here = door(access=CLOSED, local=True)
    assert stat.S_IMODE(os.stat(here.path).st_mode) == 0o600
    assert here.ask("GET", CHANGE_ID, local=True).status == LET_IN
    assert here.ask("GET", "/nowhere", local=True).status == 404
    here.gate.access = Access(keys=keys(), uid=os.geteuid() + 1)
    if os.geteuid() != 0:
        refused(here.ask("GET", "/nowhere", local=True), 403, f"uid {os.geteuid()}")


def test_a_stranger_at_the_unix_socket_is_refused_and_a_member_operates(
    door: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Peer(4242, "ann", frozenset({4242, 77}))
    monkeypatch.setattr("reconciler.api.connection.peer_of", lambda _: stranger)
    here = door(access=OPEN, local=True)  # what is open at the address is not open here
    refused(here.ask("GET", "/nowhere", local=True), 403, "uid 4242 (ann) by the socket has no sc")
    refused(here.ask("GET", CHANGE_ID, local=True), 403)
    here.gate.access = Access(uid=os.geteuid(), group=77)
    assert here.ask("GET", "/nowhere", local=True).status == 404
    refused(here.ask("GET", CHANGE_ID, local=True), 403, "needs the scope callback")


def test_nobody_can_say_by_a_header_that_they_came_by_the_socket(door: Doors) -> None:
    here = door(access=CLOSED)
    for name in (PEER, WHO, "X-Forwarded-For", "Forwarded"):
        refused(here.ask("GET", "/nowhere", headers={name: "uid 0"}), 401)


def test_a_group_opens_the_file_to_its_members(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give a file to any group")
    local = Local(str(tmp_path / "a"), group=12345)
    found = os.stat(tmp_path / "a")
    assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 0o660)
    local.close()
    assert not (tmp_path / "a").exists()


def test_what_an_ended_process_left_is_replaced_and_one_that_lives_is_not(tmp_path: Path) -> None:
    path = tmp_path / ("long-" * 30) / "a"  # longer than a socket's path may be
    path.parent.mkdir()
    first = Local(str(path))
    with pytest.raises(HostError, match="another process does"):
        Local(str(path))
    first.sock.close()  # as when it is killed: the file stays
    second = Local(str(path))
    first.close()  # and one that ends late does not take another's
    assert path.exists()
    second.close()
    assert not path.exists()


def test_what_is_no_socket_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("precious")
    with pytest.raises(HostError, match="what is there is no socket"):
        Local(str(path))
    assert path.read_text() == "precious"
    with pytest.raises(HostError, match="No such file"):
        Local(str(tmp_path / "missing" / "a"))


def test_of_many_that_come_at_once_one_has_the_socket(tmp_path: Path) -> None:
    path, got = tmp_path / "a", []
    stale = Local(str(path))
    stale.sock.close()
    start = threading.Barrier(8)

    def come() -> None:
        start.wait(20)
        with contextlib.suppress(HostError):
            got.append(Local(str(path)))

    threads = [threading.Thread(target=come) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
    assert len(got) == 1
    got[0].close()


def test_who_comes_waits_until_another_has_looked_and_bound(tmp_path: Path) -> None:
    made: list[Local] = []
    coming = threading.Thread(target=lambda: made.append(Local(str(tmp_path / "a"))))
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        coming.start()
        coming.join(0.3)
        assert not made
    finally:
        os.close(fd)
    coming.join(20)
    made[0].close()


def test_who_has_an_address_is_asked_by_the_socket_where_the_address_is_closed(
    door: Doors,
) -> None:
    here = door(access=Access(keys=keys(), loopback=False, uid=os.geteuid()), local=True)
    assert holder(here.endpoint).about is None
    found = holder(here.endpoint, here.path)
    assert found.about is not None
    assert found.about.hub == "h"


def test_a_listener_leaves_no_socket_behind(door: Doors) -> None:
    here = door(access=OPEN, local=True)
    assert here.ask("GET", HEALTH, local=True).status == 200
    here.listener.close()
    until(lambda: not os.path.exists(here.path), "the socket to be removed")


# -- limits


def a_limit(**changes: Any) -> ApiLimits:
    return ApiLimits(**{"timeout": 20.0, **changes})


def test_more_than_its_rate_is_turned_away_and_others_are_not(door: Doors) -> None:
    here = door(access=CLOSED, limits=a_limit(rate=0.01, callback_rate=1000.0), local=True)
    answers = [here.ask("GET", "/nowhere", token=TOKENS[Scope.READ]) for _ in range(3)]
    assert [one.status for one in answers] == [404, 429, 429]
    refused(answers[-1], 429, "0.01 requests a second")
    assert int(answers[-1].headers["retry-after"]) >= 1
    # callbacks, other tokens, other scopes of one token and the socket have buckets of their own
    assert here.ask("GET", CHANGE_ID, token=TOKENS[Scope.CALLBACK]).status == LET_IN
    refused(here.ask("GET", "/nowhere", token=TOKENS[Scope.OPERATE]), 403)
    assert here.ask("GET", HEALTH, token=TOKENS[Scope.READ]).status == 200
    assert here.ask("GET", "/nowhere", local=True).status == 404


def test_guessing_tokens_is_slowed(door: Doors) -> None:
    here = door(access=CLOSED, limits=a_limit(rate=1.0))
    found = {here.ask("GET", "/nowhere", token=f"guess-{i}-0123456789").status for i in range(6)}
    assert found == {401, 429}


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X-Bomb: " + b"x" * 40_000,
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(4000)),
        b"GET /?" + b"q" * 40_000,
        b"GET /" + b"../" * 10_000 + b" HTTP/1.1\r\n",
    ],
)
def test_more_headers_than_are_read(door: Doors, head: bytes) -> None:
    here = door(limits=a_limit(headers=16 << 10))
    refused(here.raw(head), 431, "16384 bytes")
    assert here.ask("GET", HEALTH).status == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n\r\n\x00\x01\x02 what\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer x\x00y\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,  # TLS, where there is none
    ],
)
def test_what_is_no_http_is_answered_in_the_form_of_all_errors(door: Doors, sent: bytes) -> None:
    here = door(access=CLOSED)
    answer = here.raw(sent)
    assert answer.status in (400, 501)
    assert set(answer.body) == {"error", "details", "timestamp"}
    assert answer.headers["connection"] == "close"
    assert here.ask("GET", HEALTH).status == 200


@pytest.mark.parametrize("path", ["/api/v1/../../etc/passwd", "/%2e%2e/%2e%2e/etc", "//", "/%00"])
def test_a_path_that_leads_elsewhere_leads_nowhere(door: Doors, path: str) -> None:
    here = door(access=OPEN)
    assert here.ask("GET", path).status == 404


def test_a_body_without_length_is_limited_too(door: Doors) -> None:
    here = door(limits=a_limit(body=4096))
    refused(here.ask("POST", TELEMETRY, b"{" + b" " * 4096), 413, "4096 bytes")
    head = f"POST {TELEMETRY} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    refused(here.raw(head, *([b"400\r\n" + b" " * 1024 + b"\r\n"] * 8)), 413, "4096 bytes")
    claimed = f"POST {TELEMETRY} HTTP/1.1\r\nHost: a\r\nContent-Length: {10**15}\r\n\r\n".encode()
    refused(here.raw(claimed), 413)


def test_who_is_refused_is_refused_before_the_body(door: Doors) -> None:
    here = door(access=CLOSED)
    head = f"POST {TELEMETRY} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n".encode()
    refused(here.raw(head), 401)  # none of the thousand bytes was sent


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"GET /api",
        b"GET / HTTP/1.1\r\nHost: a\r\n",
        f"POST {TELEMETRY} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{{".encode(),
        f"POST {TELEMETRY} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode(),
    ],
)
def test_a_request_that_does_not_arrive_is_not_waited_for(door: Doors, begun: bytes) -> None:
    here = door(limits=a_limit(timeout=0.2))
    refused(here.raw(begun), 408, "within 0.2 s")
    assert here.ask("GET", HEALTH).status == 200
    assert not here.said


def test_one_byte_now_and_then_is_no_progress(door: Doors) -> None:
    here = door(limits=a_limit(timeout=0.5))
    with here.connected() as sock:
        began = time.monotonic()
        sock.settimeout(0.05)
        answer = b""
        while not answer and time.monotonic() - began < 20:
            try:
                sock.sendall(b"G" if time.monotonic() - began < 0.01 else b"X")
                answer = sock.recv(100)
            except TimeoutError:
                pass
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_body_that_goes_on_after_the_answer_ends_with_the_connection(door: Doors) -> None:
    here = door(limits=a_limit(timeout=0.5))
    with here.connected() as sock:
        sock.sendall(b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        assert heard(sock).status == 404
        deadline = time.monotonic() + 20
        with pytest.raises(OSError):
            while time.monotonic() < deadline:
                sock.sendall(b"x")
                if not sock.recv(1):
                    raise ConnectionResetError


def test_what_is_asked_in_one_go_is_answered_in_order(door: Doors) -> None:
    here = door(limits=a_limit(timeout=0.5))
    one = f"GET {HEALTH} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    two = f"GET {CHANGE_ID} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    with here.connected() as sock:
        sock.sendall(one + two + one + b"GET /begun")
        stream = sock.makefile("rb")
        found = []
        for _ in range(4):  # the last is not whole, and is not waited for
            status = stream.readline().split()[1]
            length = 0
            while (line := stream.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length"):
                    length = int(line.split()[1])
            stream.read(length)
            found.append(int(status))
    assert found == [200, LET_IN, 200, 408]


def test_a_connection_rests_between_two_requests_as_long_as_it_may(door: Doors) -> None:
    here = door(limits=a_limit(timeout=0.1, idle=20.0))
    with here.connected() as sock:
        for _ in range(2):
            sock.sendall(f"GET {HEALTH} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            assert heard(sock).status == 200
            time.sleep(0.3)  # longer than a request may take to arrive


def test_who_rests_longest_makes_room(door: Doors) -> None:
    here = door(limits=a_limit(connections=8))
    assert here.ask("GET", HEALTH).status == 200
    held = [here.connected() for _ in range(40)]
    try:
        assert here.ask("GET", HEALTH).status == 200
        until(lambda: _gone(held[0]), "the oldest to be let go")
        assert not _gone(held[-1])
    finally:
        for sock in held:
            sock.close()


def _gone(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_where_all_are_busy_who_comes_is_turned_away(
    door: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, busy = threading.Event(), threading.Semaphore(0)

    def slow(_: Inbox) -> None:
        busy.release()
        assert go_on.wait(20)

    monkeypatch.setattr(Inbox, "identity", slow)
    here = door(limits=a_limit(connections=8))
    asking = [threading.Thread(target=here.ask, args=("GET", HEALTH)) for _ in range(8)]
    for one in asking:
        one.start()
    try:
        assert all(busy.acquire(timeout=20) for _ in asking)
        refused(here.raw(b""), 503, "too many are connected")
    finally:
        go_on.set()
        for one in asking:
            one.join(20)
    assert here.ask("GET", CHANGE_ID).status == LET_IN


def test_requests_wait_for_a_place_and_callbacks_have_places_of_their_own(
    door: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, busy = threading.Event(), threading.Semaphore(0)

    def slow(_: Inbox) -> None:
        busy.release()
        assert go_on.wait(20)

    monkeypatch.setattr(Inbox, "identity", slow)
    here = door(limits=a_limit(concurrency=2))
    answers: list[Answer] = []
    asking = [
        threading.Thread(target=lambda: answers.append(here.ask("GET", HEALTH))) for _ in range(4)
    ]
    for one in asking:
        one.start()
    assert busy.acquire(timeout=20)
    assert busy.acquire(timeout=20)
    assert here.ask("GET", CHANGE_ID).status == LET_IN  # while nothing of the others moves
    assert not busy.acquire(timeout=0.2)  # the other two wait
    monkeypatch.setattr(guard, "PLACE", 0.1)
    refused(here.ask("GET", HEALTH), 503, "too much is asked at once")
    go_on.set()
    for one in asking:
        one.join(20)
    assert [one.status for one in answers] == [200] * 4
    assert here.ask("GET", HEALTH).status == 200  # every place was given back


# -- TLS


def settings(folder: Path, endpoint: Endpoint, **api: Any) -> Settings:
    return Settings(
        hub="h",
        state=str(folder),
        repositories={},
        listen=endpoint,
        api=Api(**api),
    )


def trusting(cert: Path) -> ssl.SSLContext:
    found = ssl.create_default_context(cafile=str(cert))
    found.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return found


def test_tls_at_the_address_and_none_at_the_socket(tmp_path: Path, dealer: Dealer) -> None:
    cert, private = certificate(tmp_path, "one")
    (tmp_path / "token").write_text(f"{WHOLE}\n")
    endpoint = Endpoint("127.0.0.1", dealer.deal(1)[0])
    token = ApiToken("a", SecretRef("file", str(tmp_path / "token")), ("callback",))
    config = settings(
        tmp_path,
        endpoint,
        tokens=(token,),
        callbacks_closed=True,
        tls=Tls(str(cert), str(private)),
    )
    gate = Gate.of(config, {})
    with doors(tmp_path, lambda: endpoint) as made:
        here = made(gate=gate, local=True)
        ask = partial(here.ask, "GET", CHANGE_ID, token=WHOLE)
        assert ask(tls=trusting(cert)).status == LET_IN
        assert here.ask("GET", HEALTH, local=True).status == 200
        with pytest.raises((OSError, ValueError)):
            ask()  # in plain words
        # another certificate and another token are taken while it runs; bad ones are not
        other, its_key = certificate(tmp_path, "two")
        first = trusting(cert)
        cert.write_bytes(other.read_bytes())
        with pytest.raises(HostError, match="cannot use the certificate"):
            gate.renew(config, {})  # the key is still the other's
        assert ask(tls=first).status == LET_IN
        private.write_bytes(its_key.read_bytes())
        (tmp_path / "token").write_text("short")
        with pytest.raises(HostError, match="it has 5 characters"):
            gate.renew(config, {})
        (tmp_path / "token").write_text(WHOLE[::-1])
        gate.renew(config, {})
        refused(ask(tls=trusting(other)), 401)
        assert here.ask("GET", CHANGE_ID, token=WHOLE[::-1], tls=trusting(other)).status == LET_IN


def test_a_client_without_the_certificate_that_is_wanted(tmp_path: Path, dealer: Dealer) -> None:
    cert, private = certificate(tmp_path, "hub")
    theirs, their_key = certificate(tmp_path, "client")
    endpoint = Endpoint("127.0.0.1", dealer.deal(1)[0])
    config = settings(tmp_path, endpoint, tls=Tls(str(cert), str(private), str(theirs)))
    with doors(tmp_path, lambda: endpoint) as made:
        here = made(gate=Gate.of(config, {}))
        with pytest.raises(OSError):
            here.ask("GET", HEALTH, tls=trusting(cert))
        shown = trusting(cert)
        shown.load_cert_chain(theirs, their_key)
        assert here.ask("GET", HEALTH, tls=shown).status == 200


def test_what_tls_cannot_be_spoken_with(tmp_path: Path) -> None:
    cert, private = certificate(tmp_path, "one")
    (tmp_path / "text").write_text("nothing")
    (tmp_path / "locked").write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMA==\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    for one, other, ca, said in (
        (tmp_path / "missing", private, None, "cannot read .*missing.*No such file"),
        (cert, tmp_path / "missing", None, "cannot read .*missing.*No such file"),
        (cert, tmp_path / "text", None, "cannot use the certificate .*one.pem with the key"),
        (tmp_path / "text", private, None, "cannot use the certificate"),
        (cert, private, str(tmp_path / "missing"), "client_ca: .*missing"),
    ):
        tls = Tls(str(one), str(other), ca)
        with pytest.raises(HostError, match=said):
            Gate.of(settings(tmp_path, Endpoint("127.0.0.1", 1), tls=tls), {})


# -- what the config names


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (("",), "cannot read the secret|it is empty"),
        (("x" * 15,), "cannot use token t0 of `api`.*it has 15 characters"),
        (("x" * 20, "x" * 20), "cannot use token t1 of `api`.*it is the same as t0's"),
    ],
)
def test_tokens_that_cannot_be_used(tmp_path: Path, texts: tuple[str, ...], said: str) -> None:
    tokens = []
    for number, text in enumerate(texts):
        (tmp_path / f"t{number}").write_text(text)
        ref = SecretRef("file", str(tmp_path / f"t{number}"))
        tokens.append(ApiToken(f"t{number}", ref, ("read",)))
    config = settings(tmp_path, Endpoint("127.0.0.1", 1), tokens=tuple(tokens))
    with pytest.raises(HostError, match=said) as refusal:
        Gate.of(config, {})
    assert "x" * 15 not in str(refusal.value)


def test_a_reload_cannot_leave_an_address_open_to_others(tmp_path: Path) -> None:
    (tmp_path / "t").write_text(WHOLE)
    ref = SecretRef("file", str(tmp_path / "t"))
    config = settings(tmp_path, Endpoint("0.0.0.0", 1), tokens=(ApiToken("t", ref, ("read",)),))
    gate = Gate.of(config, {})
    before = gate.access
    with pytest.raises(HostError, match="cannot do without a token"):
        gate.renew(settings(tmp_path, Endpoint("0.0.0.0", 1)), {})
    assert gate.access is before
    assert before.holder(WHOLE.encode()) == Caller("token t", frozenset({Scope.READ}))
    assert ALL - {Scope.READ}


def test_a_group_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="there is no such group: getent group no-such"):
        Gate.of(settings(tmp_path, Endpoint("127.0.0.1", 1), group="no-such"), {})
