"""The daemon's log: what a line holds, for whom it is written, and that no secret is in it."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator

import pytest
import structlog

from reconciler import logs
from reconciler.core.settings import Secret


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_where_nobody_looks() -> None:
    stream = io.StringIO()
    logs.configure(stream, {})
    logs.log("Started", vm="ctx-1", disk="2000", run=None, detail="")
    (line,) = lines(stream)
    assert line.pop("timestamp")
    assert line == {"message": "Started", "level": "info", "vm": "ctx-1", "disk": "2000"}


def test_a_line_is_text_on_a_terminal() -> None:
    stream = Terminal()
    logs.configure(stream, {})
    logs.log("Started", vm="ctx-1")
    assert "Started" in stream.getvalue() and not stream.getvalue().startswith("{")


def test_what_is_bound_is_on_every_line_of_its_thread_alone() -> None:
    stream = io.StringIO()
    logs.configure(stream, {})
    logs.bind(reconcile_id="1", vm="ctx-1")
    logs.log("a")
    other = threading.Thread(target=lambda: logs.log("b"))
    other.start()
    other.join()
    logs.bind(reconcile_id="2")
    logs.log("c")
    a, b, c = lines(stream)
    assert (a["reconcile_id"], a["vm"]) == ("1", "ctx-1")
    assert "reconcile_id" not in b
    assert c["reconcile_id"] == "2" and "vm" not in c


def test_the_journal_is_told_how_bad_it_is() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream, os.fdopen(read) as reader:
        found = os.fstat(stream.fileno())
        logs.configure(stream, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
        logs.log("a")
        logs.log("b", level="warning")
        logs.configure(stream, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + 1}"})
        logs.log("c")
        stream.flush()
        written = [reader.readline() for _ in range(3)]
    assert [line[:3] for line in written] == ["<6>", "<4>", written[2][:3]]
    assert json.loads(written[2])["message"] == "c"
    assert json.loads(written[0][3:])["message"] == "a"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_secret_is_never_written(stream: io.StringIO) -> None:
    logs.configure(stream, {})
    key = Secret("the-secret")
    logs.log("a", key=key, inside={"key": key}, several=[key])
    assert "the-secret" not in stream.getvalue()
    assert "Secret(…)" in stream.getvalue() or "Secret(\\u2026)" in stream.getvalue()


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    class Full(io.StringIO):
        def write(self, text: str, /) -> int:
            raise OSError(28, "No space left on device")

    logs.configure(Full(), {})
    logs.log("a")
