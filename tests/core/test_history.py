"""The runs of one VM, as they are shown."""

from __future__ import annotations

import json
from typing import Any

import pytest

from reconciler.core.call import CallState
from reconciler.core.history import document, duration, ended, runs
from reconciler.core.ledger import Proof
from reconciler.core.units import stamp
from tests.core.builders import HUB, NOW, a_call, a_vm, remembered

S = CallState


def test_runs_come_newest_first_and_attempts_with_them() -> None:
    calls = [
        a_call(a_vm(run="r1"), S.CANCELLED, created=NOW),
        a_call(a_vm(run="r2"), S.DUE, created=NOW + 9),
        a_call(a_vm(run="r1"), S.COMPLETED, created=NOW, attempt=2),
        a_call(a_vm("ctx-2", run="r9"), created=NOW + 99),
    ]
    found = runs(remembered(calls=calls), "ctx-1")
    assert [(call.run, call.attempt) for call in found] == [("r2", 1), ("r1", 2), ("r1", 1)]
    assert runs(remembered(), "ctx-1") == []


@pytest.mark.parametrize(
    ("state", "times", "end", "took"),
    [
        (S.DUE, {}, None, None),
        (S.REJECTED, {"called": NOW - 30}, None, None),
        (S.ACCEPTED, {"called": NOW - 30}, None, 30),
        (S.UNKNOWN, {"called": NOW + 5}, None, 0),
        (S.COMPLETED, {"called": NOW - 30, "ended": NOW - 10}, NOW - 10, 20),
        (S.FAILED, {"called": NOW - 30, "changed": NOW - 20}, NOW - 20, 10),
        (S.CANCELLED, {"ended": NOW - 10}, NOW - 10, None),
    ],
)
def test_when_a_run_ended_and_how_long_it_took(
    state: CallState, times: dict[str, Any], end: float | None, took: float | None
) -> None:
    call = a_call(state=state, **times)
    assert (ended(call), duration(call, NOW)) == (end, took)


def test_the_document_has_everything_there_is_to_know() -> None:
    call = a_call(
        state=S.FAILED,
        called=NOW - 30,
        ended=NOW - 10,
        targets="2000:nbd://h:1/x",
        who="timer (root)",
        reason="ReportedFailed",
        message="datastore full",
        tainted=True,
        doubt="disk 2001: nothing came",
    )
    result = {"ok": False, "summary": "disk 2000: its image is missing"}
    found = Proof(
        job_id=call.job_id,
        kind="restore",
        at=NOW - 5,
        ok=False,
        result=json.dumps(result),
        who="ann",
    )
    value = document("ctx-1", [call], 7, HUB, NOW, {call.job_id: {"restore": found}}, {})
    expected: dict[str, Any] = {
        "run": "r1",
        "attempt": 1,
        "type": "full",
        "state": "FAILED",
        "reason": "ReportedFailed",
        "message": "datastore full",
        "asked": stamp(NOW - 100),
        "called": stamp(NOW - 30),
        "ended": stamp(NOW - 10),
        "seconds": 20,
        "sna": "site-a",
        "job_id": call.job_id,
        "nbd_targets": "2000:nbd://h:1/x",
        "who": "timer (root)",
        "tainted": True,
        "fallback": None,
        "doubt": "disk 2001: nothing came",
        "proofs": {
            "restore": {
                "ok": False,
                "at": stamp(NOW - 5),
                "who": "ann",
                "summary": "disk 2000: its image is missing",
                "result": result,
            }
        },
    }
    assert value == {
        "format_version": "1.0",
        "hub": HUB,
        "vm": "ctx-1",
        "total": 7,
        "runs": [expected],
    }
    bare = document("ctx-1", [a_call(state=S.DUE)], 1, HUB, NOW, {}, {})["runs"][0]
    absent = ("called", "ended", "seconds", "nbd_targets", "who")
    assert [bare[name] for name in absent] == [None] * 5
