"""The callbacks as they are on the wire: paths, fields and values, over real connections."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from reconciler.api.about import HEALTH, ourselves
from reconciler.api.guard import MAX_BODY
from reconciler.api.listener import Listener
from reconciler.core.call import CallEvent
from reconciler.core.units import Endpoint
from reconciler.host.store import Store, events
from reconciler.host.store.inbox import Inbox
from reconciler.host.store.schema import VERSION
from tests.e2e.site import until
from tests.host.test_inbox import ACCEPTED, ENDED, JOB, OPEN, a_call, an_incremental, put

COMPLETE: Final = f"/api/v1/backups/{JOB}/complete"
TELEMETRY: Final = f"/api/v1/telemetry/backup/{JOB}"
RFC3339: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")

Answer = tuple[int, Any]


class Hub:
    """A listener, its store, and what it kicked and said."""

    def __init__(self, folder: Path, endpoint: Endpoint) -> None:
        self.folder, self.port = folder, endpoint.port
        self.store = Store(folder, "h")
        self.kicked: list[str] = []
        self.said: list[str] = []
        self.inbox = Inbox(folder)
        self.listener = Listener(
            endpoint,
            self.inbox,
            ourselves("h", str(folder), "reconciler test"),
            kick=self.kicked.append,
            say=self.said.append,
        )

    def ask(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers or {})
            answer = connection.getresponse()
            assert answer.getheader("Content-Type") == "application/json"
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.ask("GET", path)

    def post(self, path: str, body: object) -> Answer:
        return self.ask("POST", path, body)

    def end(self) -> None:
        self.listener.close()
        self.inbox.close()
        self.store.close()


@pytest.fixture
def hub(tmp_path: Path, endpoint: Endpoint) -> Iterator[Hub]:
    found = Hub(tmp_path, endpoint)
    yield found
    found.end()


def refused(answer: Answer, status: int, *words: str) -> None:
    """An error as every path answers it."""
    assert answer[0] == status, answer
    assert set(answer[1]) == {"error", "details", "timestamp"}
    assert all(isinstance(value, str) and value for value in answer[1].values())
    assert RFC3339.fullmatch(answer[1]["timestamp"])
    for word in words:
        assert word in answer[1]["details"]


# -- GET /api/v1/backups/changeid


def test_the_change_id_of_a_full_run_is_empty(hub: Hub) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    for query in ("vm_name=ctx-1&disk_id=1", "vm_name=name%20of%20ctx-1&disk_id=1"):
        status, found = hub.get(f"/api/v1/backups/changeid?{query}")
        assert status == 200
        assert set(found) == {"vm_name", "disk_id", "change_id", "backup_job_id", "message"}
        assert all(isinstance(value, str) for value in found.values())
        assert (found["disk_id"], found["change_id"], found["backup_job_id"]) == ("1", "", "")
    assert found["vm_name"] == "name of ctx-1"
    assert hub.get("/api/v1/backups/changeid?vm_name=ctx-1")[1]["disk_id"] == "0"


@pytest.mark.parametrize("state", OPEN)
def test_an_incremental_is_told_its_parents_change_id_from_the_intent_on(
    hub: Hub, state: str
) -> None:
    parent = put(hub.store, a_call(), *ACCEPTED)
    hub.post(COMPLETE, {"change_id": "52 d0/42", "disk_id": 0})
    hub.store.advance(parent, CallEvent.END, 5.0)
    put(hub.store, an_incremental(), *OPEN[state])
    assert hub.get("/api/v1/backups/changeid?vm_name=ctx-1&disk_id=1") == (200, {
        "vm_name": "ctx-1",
        "disk_id": "1",
        "change_id": "52 d0/42",
        "backup_job_id": JOB,
        "message": "run r2 of ctx-1 goes on from run r1",
    })  # fmt: skip


def test_questions_that_cannot_be_answered(hub: Hub) -> None:
    put(hub.store, a_call("ctx-1", display_name="db"), *ACCEPTED)
    put(hub.store, a_call("ctx-2", display_name="db"), *ACCEPTED)
    ask = "/api/v1/backups/changeid"
    refused(hub.get(f"{ask}?vm_name=nobody"), 404, "knows no VM 'nobody'")
    refused(hub.get(f"{ask}?vm_name="), 404)
    refused(hub.get(ask), 422, "vm_name")
    refused(hub.get(f"{ask}?vm_name=ctx-1&disk_id=x"), 422, "disk_id")
    refused(hub.get(f"{ask}?vm_name=db"), 409, "ctx-1 (run r1)", "ctx-2 (run r1)")
    refused(hub.ask("PUT", f"{ask}?vm_name=ctx-1"), 405)


# -- POST /api/v1/backups/{backup_id}/complete


def test_a_disk_is_reported_once_and_again(hub: Hub) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    body = {"change_id": "52 d0/7", "disk_id": 1, "bytes_transferred": 4096, "unknown": {"a": 1}}
    for times in (1, 2):
        status, found = hub.post(COMPLETE, body)
        assert status == 200
        assert set(found) == {"status", "backup_id", "change_id", "message", "timestamp"}
        assert (found["status"], found["backup_id"]) == ("completed", JOB)
        assert found["change_id"] == "52 d0/7"
        assert RFC3339.fullmatch(found["timestamp"])
        assert ("noted as complete" in found["message"]) is (times == 1)
    (report,) = hub.store.ledger().reports[JOB].values()
    assert (report.position, report.change_id, report.bytes) == (1, "52 d0/7", 4096)
    assert hub.kicked == ["ctx-1"]  # a repetition is no reason to look
    assert hub.said == ["callback: disk 2001 of run r1 of ctx-1 is noted as complete"]


def test_only_the_change_id_is_required_where_there_is_one_disk(hub: Hub) -> None:
    put(hub.store, a_call(disks=1), *ACCEPTED)
    assert hub.post(COMPLETE, {"change_id": "id"})[0] == 200
    assert set(hub.store.ledger().reports[JOB]) == {0}


def test_a_position_may_be_text_as_our_own_answers_write_it(hub: Hub) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    assert hub.post(COMPLETE, {"change_id": "id", "disk_id": "1"})[0] == 200
    assert set(hub.store.ledger().reports[JOB]) == {1}


def test_the_first_change_id_is_the_one_that_is_answered(hub: Hub) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    hub.post(COMPLETE, {"change_id": "first", "disk_id": 0})
    status, found = hub.post(COMPLETE, {"change_id": "second", "disk_id": 0})
    assert (status, found["change_id"]) == (200, "first")
    assert "the first counts" in found["message"]
    assert [e.reason for e in events(hub.folder, "ctx-1")] == ["ReportContradicts"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"disk_id": 0}, 422, "change_id"),
        ({"change_id": "", "disk_id": 0}, 400, "change_id"),
        ({"change_id": "   ", "disk_id": 0}, 400, "change_id"),
        ({"change_id": "a\nb", "disk_id": 0}, 400, "change_id"),
        ({"change_id": None, "disk_id": 0}, 422, "change_id"),
        ({"change_id": 7, "disk_id": 0}, 422, "change_id"),
        ({"change_id": "id", "disk_id": True}, 422, "disk_id"),
        ({"change_id": "id", "disk_id": 0.5}, 422, "disk_id"),
        ({"change_id": "id", "disk_id": "x"}, 422, "disk_id"),
        ({"change_id": "id", "disk_id": 0, "bytes_transferred": "many"}, 422, "bytes_transferred"),
        ({"change_id": "id", "disk_id": 7}, 404, "no disk at position 7; it has 0, 1"),
        ({"change_id": "id", "disk_id": -1}, 404, "no disk at position -1"),
        ({"change_id": "id", "disk_id": 1 << 80}, 404, "no disk at position"),
        ({"change_id": "id"}, 404, "say which disk"),
        ([], 422, ""),
        (b"{", 400, "JSON"),
        (b"", 400, "JSON"),
        (b"\xff\xfe", 400, "JSON"),
        (b'{"change_id": "\\ud800"}', 400, "JSON"),
        (b"[" * 100_000, 400, "JSON"),
    ],
)
def test_reports_that_are_refused_leave_nothing(
    hub: Hub, body: object, status: int, words: str
) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    refused(hub.post(COMPLETE, body), status, words)
    assert hub.store.ledger().reports == {}
    assert hub.kicked == []


def test_the_content_type_is_not_what_matters(hub: Hub) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    for position, kind in enumerate(("text/plain", "application/json; charset=utf-8")):
        body = {"change_id": "id", "disk_id": position}
        assert hub.ask("POST", COMPLETE, body, {"Content-Type": kind})[0] == 200


def test_an_unknown_job_is_not_found(hub: Hub) -> None:
    answer = hub.post("/api/v1/backups/nobody/complete", {"change_id": "id", "disk_id": 0})
    refused(answer, 404, "knows no job 'nobody'")
    refused(hub.post("/api/v1/telemetry/backup/nobody", {}), 404, "knows no job 'nobody'")
    refused(hub.post("/api/v1/backups/%00%ff/complete", {"change_id": "id"}), 404)


@pytest.mark.parametrize("state", ENDED)
def test_a_late_word_is_heard_and_changes_nothing(hub: Hub, state: str) -> None:
    put(hub.store, a_call(), *ENDED[state])
    status, found = hub.post(COMPLETE, {"change_id": "id", "disk_id": 0})
    assert (status, found["status"]) == (200, state.lower())
    assert f"had ended as {state}" in found["message"]
    status, found = hub.post(TELEMETRY, {"status": "running"})
    assert (status, found["status"]) == (200, "success")
    ledger = hub.store.ledger()
    assert (ledger.calls[0].state, ledger.reports, ledger.telemetry) == (state, {}, {})
    assert {e.reason for e in events(hub.folder, "ctx-1")} == {"LateReport"}
    assert hub.kicked == []


def test_a_report_of_a_run_that_nobody_asked_for_is_a_conflict(hub: Hub) -> None:
    put(hub.store, a_call())
    refused(hub.post(COMPLETE, {"change_id": "id", "disk_id": 0}), 409, "run r1 is DUE")
    refused(hub.post(TELEMETRY, {}), 409, "run r1 is DUE")


# -- POST /api/v1/telemetry/{job_type}/{job_id}


def a_word(**changes: Any) -> dict[str, Any]:
    """What the field's client posts."""
    return {
        "job_id": JOB,
        "job_type": "backup",
        "status": "running",
        "current_phase": "transferring",
        "bytes_transferred": 49,
        "total_bytes": 96,
        "transfer_speed_bps": 12,
        "eta_seconds": 4,
        "progress_percent": 51.04,
        "disks": [],
        "timestamp": "2026-11-23T15:04:05Z",
        **changes,
    }


def test_telemetry_is_noted_and_the_first_word_kicks(hub: Hub) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    disk = {"disk_index": 0, "bytes_transferred": 1, "total_bytes": 2, "status": "running",
            "progress_percent": 50.0}  # fmt: skip
    for word in (a_word(), a_word(disks=[disk]), a_word(status="completed", progress_percent=100)):
        status, found = hub.post(TELEMETRY, word)
        assert status == 200
        assert set(found) == {"status", "message", "timestamp"}
        assert found["status"] == "success"
        assert RFC3339.fullmatch(found["timestamp"])
    said = hub.store.ledger().telemetry[JOB]
    assert (said.status, said.phase, said.bytes, said.total) == (
        "completed", "transferring", 49, 96
    )  # fmt: skip
    assert (said.speed, said.percent, said.error) == (12, 100.0, "")
    assert hub.kicked == ["ctx-1"]
    assert hub.store.ledger().calls[0].state == "ACCEPTED"
    assert hub.store.ledger().reports == {}


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled", "success", "error"])
def test_no_status_of_telemetry_ends_a_run(hub: Hub, status: str) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    assert hub.post(TELEMETRY, a_word(status=status, progress_percent=100))[0] == 200
    ledger = hub.store.ledger()
    assert (ledger.calls[0].state, ledger.calls[0].changed) == ("ACCEPTED", 3.0)
    assert ledger.reports == {}


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ({"message": "no space", "code": "E28", "timestamp": "x"}, "no space (E28)"),
        ({"message": "no space", "timestamp": "x"}, "no space"),
        ({"message": "no space", "code": 28}, "no space (28)"),
        ({"code": "E28"}, "E28"),
        ({}, ""),
        (None, ""),
    ],
)
def test_an_error_in_telemetry_is_kept(hub: Hub, error: Any, text: str) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    assert hub.post(TELEMETRY, a_word(error=error))[0] == 200
    assert hub.store.ledger().telemetry[JOB].error == text
    told = [e.message for e in events(hub.folder, "ctx-1")]
    assert told == ([f"the client of SNA site-a reports: {text}"] if text else [])


def test_telemetry_may_leave_out_what_it_does_not_know(hub: Hub) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    assert hub.post(TELEMETRY, {})[0] == 200
    assert hub.post(TELEMETRY, dict.fromkeys(a_word()))[0] == 200
    said = hub.store.ledger().telemetry[JOB]
    assert (said.status, said.bytes, said.percent) == ("", 0, 0.0)


@pytest.mark.parametrize(
    ("word", "field"),
    [
        ({"progress_percent": "much"}, "progress_percent"),
        ({"bytes_transferred": [1]}, "bytes_transferred"),
        ({"status": 7}, "status"),
        ({"error": "no space"}, "error"),
    ],
)
def test_telemetry_of_another_shape_is_refused(hub: Hub, word: Any, field: str) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    refused(hub.post(TELEMETRY, a_word(**word)), 422, field)
    assert hub.store.ledger().telemetry == {}


def test_numbers_that_no_client_can_mean(hub: Hub) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    raw = b'{"progress_percent": NaN, "bytes_transferred": -5, "total_bytes": 1e400}'
    assert hub.post(TELEMETRY, raw)[0] == 200
    said = hub.store.ledger().telemetry[JOB]
    assert (said.percent, said.bytes, said.total) == (0.0, 0, (1 << 63) - 1)


# -- everything else


def test_health_says_who_listens(hub: Hub) -> None:
    status, found = hub.get(HEALTH)
    assert (status, found["status"]) == (200, "healthy")
    assert (found["hub"], found["state_id"]) == ("h", hub.store.state_id)
    assert found["state"] == str(hub.folder.resolve())
    assert found["command"] == "reconciler test"
    assert isinstance(found["pid"], int)
    assert RFC3339.fullmatch(found["timestamp"])


def test_a_store_that_cannot_be_used_is_not_ready(hub: Hub) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    with hub.store._write() as db:
        db.execute("PRAGMA user_version = 1")
    words = "the next apply brings it up"
    refused(hub.post(COMPLETE, {"change_id": "id", "disk_id": 0}), 503, words)
    refused(hub.post(TELEMETRY, a_word()), 503, words)
    refused(hub.get("/api/v1/backups/changeid?vm_name=ctx-1"), 503, words)
    status, found = hub.get(HEALTH)
    assert (status, found["status"], found["hub"]) == (503, "not ready", "h")
    assert words in found["details"]
    assert hub.said[0].startswith("callback refused: cannot use the store")
    with hub.store._write() as db:
        db.execute(f"PRAGMA user_version = {VERSION}")
    assert hub.post(COMPLETE, {"change_id": "id", "disk_id": 0})[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/api/v1/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", f"{HEALTH}/", 404),
        ("POST", HEALTH, 405),
        ("GET", COMPLETE, 405),
        ("DELETE", TELEMETRY, 405),
    ],
)
def test_what_is_not_there_is_an_error_like_the_others(
    hub: Hub, method: str, path: str, status: int
) -> None:
    refused(hub.ask(method, path), status, path)


def test_a_body_beyond_the_limit_is_refused_by_its_length_and_while_reading(hub: Hub) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    refused(hub.post(COMPLETE, b" " * (MAX_BODY + 1)), 413, "1048576 bytes")
    connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=20)
    pieces = iter([b" " * 65536] * 17)
    connection.request("POST", COMPLETE, pieces, encode_chunked=True,
                       headers={"Transfer-Encoding": "chunked"})  # fmt: skip
    answer = connection.getresponse()
    refused((answer.status, json.loads(answer.read())), 413, "1048576 bytes")
    connection.close()
    body = json.dumps({"change_id": "id", "disk_id": 0}).encode()
    assert hub.post(COMPLETE, body + b" " * (MAX_BODY - len(body)))[0] == 200


def test_a_body_that_says_it_is_too_long_is_not_waited_for(hub: Hub) -> None:
    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", hub.port), timeout=20) as client:
        client.sendall(head.encode())
        assert client.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_an_error_inside_is_answered_and_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(hub.inbox, "change_id", broken)
    refused(hub.get("/api/v1/backups/changeid?vm_name=ctx-1"), 500, "this is a bug: RuntimeError")
    until(lambda: bool(hub.said), "a word about it")
    assert hub.said == ["error: this is a bug: GET /api/v1/backups/changeid: RuntimeError: a bug"]
    monkeypatch.undo()
    assert hub.get("/api/v1/backups/changeid?vm_name=ctx-1")[0] == 404


def test_a_client_that_goes_away_in_the_middle_is_nobodys_trouble(hub: Hub) -> None:
    put(hub.store, a_call(), *ACCEPTED)
    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{{".encode()
    with socket.create_connection(("127.0.0.1", hub.port)) as gone:
        gone.sendall(head)
    with socket.create_connection(("127.0.0.1", hub.port)) as silly:
        silly.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        silly.recv(4096)
    assert hub.post(COMPLETE, {"change_id": "id", "disk_id": 0})[0] == 200
    assert hub.said == ["callback: disk 2000 of run r1 of ctx-1 is noted as complete"]


def test_many_at_once_each_count_once(hub: Hub) -> None:
    put(hub.store, a_call(disks=12), *ACCEPTED)
    answers: list[Answer] = []

    def tell(position: int) -> None:
        for path, body in ((TELEMETRY, a_word()), (COMPLETE, {"change_id": f"id-{position}",
                                                              "disk_id": position})):  # fmt: skip
            answers.append(hub.post(path, body))

    threads = [threading.Thread(target=tell, args=(n,)) for n in range(12) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {status for status, _ in answers} == {200}
    assert len(answers) == 48
    assert set(hub.store.ledger().reports[JOB]) == set(range(12))
    assert hub.kicked == ["ctx-1"] * 13
