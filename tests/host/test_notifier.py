"""Messages arrive in order, once, signed, and outlive who sends them; the loop never waits."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from reconciler.core.errors import HostError
from reconciler.core.notices import SETTLED, Seen
from reconciler.core.settings import Notify, Secret
from reconciler.core.status import Condition
from reconciler.host import webhook
from reconciler.host.store import Store, events
from reconciler.host.store import outbox as store_outbox
from reconciler.notifier import OLD, Notifier, note_notices
from tests.e2e.site import until

FINE = Condition("Stalled", "False", "NotStalled", "nothing stands in the way")


def seen(vm: str = "ctx-1", reason: str = "") -> dict[str, Seen]:
    held = Condition("Stalled", "True", reason, "something stands in the way")
    return {vm: Seen("r1", [held if reason else FINE])}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(tmp_path, "h")
    yield found
    found.close()


class Receiver:
    """Takes messages, and answers as it is told to."""

    def __init__(self, server: HTTPServer) -> None:
        self.requests: list[Request] = []
        self.answers: list[int] = []
        server.expect_request("/in/the-way-in", method="POST").respond_with_handler(self.take)
        self.url = server.url_for("/in/the-way-in")

    def take(self, request: Request) -> Response:
        request.get_data()
        self.requests.append(request)
        return Response(status=self.answers.pop(0) if self.answers else 204)

    def reasons(self) -> list[str]:
        return [json.loads(one.get_data())["data"]["reason"] for one in self.requests]


@pytest.fixture
def receiver(httpserver: HTTPServer) -> Receiver:
    return Receiver(httpserver)


def notifier(
    store: Store, url: str, secret: Secret | None = None, timeout: float = 5.0
) -> tuple[Notifier, list[str]]:
    said: list[str] = []
    settings = Notify(url=url, timeout=timeout)
    return Notifier(store, lambda: settings, lambda: secret, said.append), said


def test_troubles_arrive_once_each_and_in_order(store: Store, receiver: Receiver) -> None:
    one, said = notifier(store, receiver.url)
    now = time.time()
    assert note_notices(store, seen(reason="A") | seen("ctx-2", "B"), now)
    assert not note_notices(store, seen(reason="A") | seen("ctx-2", "B"), now + 30)
    assert not note_notices(store, seen(), now + 60)
    assert note_notices(store, {}, now + 60 + SETTLED)
    one.start()
    one.kick()
    until(lambda: len(receiver.requests) == 3, "three messages")
    one.close()
    assert one.failure is None
    assert said == []
    types = [json.loads(request.get_data())["type"] for request in receiver.requests]
    assert receiver.reasons() == ["A", "B", "A"]
    assert [one.rpartition(".")[2] for one in types] == ["begun", "begun", "resolved"]
    first = receiver.requests[0]
    assert first.content_type == "application/cloudevents+json; charset=utf-8"
    assert webhook.SIGNATURE not in first.headers
    assert store.outbox() == []


def test_what_was_told_and_what_waits_outlive_the_process(
    tmp_path: Path, receiver: Receiver
) -> None:
    before = Store(tmp_path, "h")
    note_notices(before, seen(reason="A"), 1.0)
    before.close()
    after = Store(tmp_path, "h")
    assert not note_notices(after, seen(reason="A"), 31.0)
    one, _ = notifier(after, receiver.url)
    assert one.send(40.0) == 0.0
    assert one.send(40.0) is None
    after.close()
    assert receiver.reasons() == ["A"]


def test_a_message_is_signed_with_its_time(store: Store, receiver: Receiver) -> None:
    note_notices(store, seen(reason="A"), 1.0)
    one, _ = notifier(store, receiver.url, Secret("key"))
    one.send(1234.5)
    (request,) = receiver.requests
    assert request.headers[webhook.TIMESTAMP] == "1234"
    text = b"1234." + request.get_data()
    expected = hmac.new(b"key", text, hashlib.sha256).hexdigest()
    assert request.headers[webhook.SIGNATURE] == f"sha256={expected}"


@pytest.mark.parametrize("answer", [500, 503, 429, 404, 401, 302])
def test_what_is_not_taken_now_is_tried_again_later(
    store: Store, receiver: Receiver, answer: int
) -> None:
    note_notices(store, seen(reason="A") | seen("ctx-2", "B"), 1.0)
    one, said = notifier(store, receiver.url)
    receiver.answers = [answer, answer]
    assert one.send(10.0) == 2.0
    assert one.send(11.0) == 1.0
    assert len(receiver.requests) == 1
    assert one.send(12.0) == 4.0
    assert one.send(16.0) == 0.0
    assert one.send(16.0) == 0.0
    assert receiver.reasons() == ["A", "A", "A", "B"]
    ids = {json.loads(request.get_data())["id"] for request in receiver.requests}
    assert len(ids) == 2
    assert len(said) == 2
    assert f"it answers {answer}" in said[0]
    assert "the-way-in" not in said[0]
    assert said[1] == "messages arrive again"


@pytest.mark.parametrize("answer", sorted(webhook.USELESS))
def test_what_will_never_be_taken_does_not_hold_up_the_rest(
    store: Store, receiver: Receiver, tmp_path: Path, answer: int
) -> None:
    note_notices(store, seen(reason="A") | seen("ctx-2", "B"), 1.0)
    one, _ = notifier(store, receiver.url)
    receiver.answers = [answer]
    assert one.send(10.0) == 0.0
    assert one.send(10.0) == 0.0
    assert receiver.reasons() == ["A", "B"]
    (event,) = events(tmp_path, "")
    assert (event.reason, event.severity) == ("NoticesDropped", "Warning")
    assert f"it answers {answer}" in event.message


def test_what_could_not_be_sent_for_a_day_is_dropped(
    store: Store, receiver: Receiver, tmp_path: Path
) -> None:
    note_notices(store, seen(reason="A"), 1.0)
    one, _ = notifier(store, receiver.url)
    assert one.send(OLD + 2.0) == 0.0
    assert one.send(OLD + 2.0) is None
    assert receiver.requests == []
    assert [event.reason for event in events(tmp_path, "")] == ["NoticesDropped"]


def test_what_waits_is_bounded_and_the_oldest_go_first(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_outbox, "MOST", 3)
    note_notices(store, seen(reason="A") | seen("ctx-2", "B"), 1.0)
    note_notices(store, seen("ctx-3", "C") | seen("ctx-4", "D") | seen("ctx-5", "E"), 2.0)
    waiting = [json.loads(letter.body)["data"]["reason"] for letter in store.outbox(10)]
    assert waiting == ["C", "D", "E"]
    (event,) = events(tmp_path, "")
    assert event.reason == "NoticesDropped"
    assert event.message.startswith("2 of the oldest")
    assert len(store.notices()) == 5


def test_notices_and_messages_are_written_together_or_not_at_all(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the power goes")

    monkeypatch.setattr(store, "_dropped", broken)
    monkeypatch.setattr(store_outbox, "MOST", 0)
    with pytest.raises(RuntimeError):
        note_notices(store, seen(reason="A"), 1.0)
    assert store.notices() == []
    assert store.outbox() == []


def test_who_takes_the_connection_and_says_nothing_holds_up_nobody(store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        one, said = notifier(store, url, timeout=0.1)
        note_notices(store, seen(reason="A"), time.time())
        one.start()
        until(lambda: bool(said), "the deadline")
        assert note_notices(store, seen("ctx-2", "B"), time.time())
        began = time.monotonic()
        one.close()
        assert time.monotonic() - began < 2.0
    assert one.failure is None
    assert "no answer in time" in said[0]
    assert [letter.tries for letter in store.outbox(9)] == [1, 0]


def test_who_is_not_there_is_said_once(store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}/the-way-in"
    one, said = notifier(store, url)
    note_notices(store, seen(reason="A"), 1.0)
    now = 1.0
    for _ in range(3):
        now += one.send(now) or 0.0
    assert len(said) == 1
    assert "Connection refused" in said[0]
    assert "the-way-in" not in said[0]
    assert store.outbox()[0].tries == 3


def test_a_secret_that_cannot_be_read_holds_the_messages(store: Store, receiver: Receiver) -> None:
    def unreadable() -> Secret:
        raise HostError("cannot read the secret file /x: gone", "SecretUnreadable")

    one = Notifier(store, lambda: Notify(url=receiver.url), unreadable)
    note_notices(store, seen(reason="A"), 1.0)
    assert one.send(2.0) == 2.0
    assert receiver.requests == []
    assert store.outbox()[0].tries == 1


def test_without_a_receiver_what_waits_stays(store: Store) -> None:
    note_notices(store, seen(reason="A"), 1.0)
    one, _ = notifier(store, "")
    assert one.send(2.0) is None
    assert len(store.outbox()) == 1


def test_a_notifier_that_breaks_says_why(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()

    def broken(_: float) -> float:
        done.set()
        raise RuntimeError("a bug")

    one, _ = notifier(store, "http://127.0.0.1:1/")
    monkeypatch.setattr(one, "send", broken)
    one.start()
    assert done.wait(20)
    until(lambda: one.failure, "its failure")
    one.close()
    assert str(one.failure) == "a bug"


def test_a_redirect_is_not_followed(store: Store, httpserver: HTTPServer) -> None:
    elsewhere = Receiver(httpserver)
    away = Response(status=307, headers={"Location": elsewhere.url})
    httpserver.expect_request("/away").respond_with_response(away)
    one, said = notifier(store, httpserver.url_for("/away"))
    note_notices(store, seen(reason="A"), 1.0)
    assert one.send(2.0) == 2.0
    assert elsewhere.requests == []
    assert "it answers 307" in said[0]


def test_only_the_host_of_a_url_is_shown() -> None:
    assert webhook.host_of("https://a.example:8443/b/c?token=d") == "https://a.example:8443"
