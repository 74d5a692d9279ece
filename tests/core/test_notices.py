"""Somebody is told of a trouble once as it begins and once when it is over."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.core.notices import (
    BEGUN,
    RESOLVED,
    SETTLED,
    Notice,
    Seen,
    Turn,
    bodies,
    body,
    trouble,
    turn,
)
from reconciler.core.status import Condition

FINE = Condition("Stalled", "False", "NotStalled", "nothing stands in the way")
HELD = Condition("Stalled", "True", "InUse", "a client is connected")


def seen(*conditions: Condition, run: str = "r1", vm: str = "ctx-1") -> dict[str, Seen]:
    return {vm: Seen(run, conditions or (FINE,))}


class Told:
    """What is open, as the store would have it, and what was told."""

    def __init__(self) -> None:
        self.open: dict[tuple[str, str, str], Notice] = {}
        self.messages: list[str] = []

    def look(self, found: dict[str, Seen], now: float, gone: tuple[str, ...] = ()) -> Turn:
        changes = turn(found, list(self.open.values()), now, gone)
        for one in changes.resolved:
            del self.open[one.key]
        for one in (*changes.begun, *changes.ebbed):
            self.open[one.key] = one
        for one in changes.back:
            self.open[one.key] = replace(one, gone=0.0)
        self.messages += [
            f"{json.loads(text)['type'].rpartition('.')[2]} {json.loads(text)['data']['reason']}"
            for text in bodies(changes, hub="h", now=now)
        ]
        return changes


def test_a_trouble_is_told_once_and_its_end_once() -> None:
    told = Told()
    for now in (0, 30, 60):
        told.look(seen(HELD), now)
    assert told.messages == ["begun InUse"]
    for now in (90, 120, 150, 180, 300):
        told.look(seen(), now)
    assert told.messages == ["begun InUse", "resolved InUse"]
    assert not told.open


def test_a_trouble_that_comes_back_soon_was_never_over() -> None:
    told = Told()
    for number in range(20):
        told.look(seen(HELD) if number % 2 else seen(), 30.0 * number)
    assert told.messages == ["begun InUse"]
    told.look(seen(), 1000)
    told.look(seen(), 1000 + SETTLED - 1)
    assert told.messages == ["begun InUse"]
    told.look(seen(), 1000 + SETTLED)
    told.look(seen(HELD), 2000)
    assert told.messages == ["begun InUse", "resolved InUse", "begun InUse"]


def test_a_trouble_is_over_when_its_vm_is_not_looked_at_any_more() -> None:
    told = Told()
    told.look(seen(HELD), 0)
    told.look(seen(), 30)
    told.look({}, 30 + SETTLED)
    assert told.messages == ["begun InUse", "resolved InUse"]


def test_of_a_vm_that_was_not_looked_at_nothing_is_known() -> None:
    told = Told()
    told.look(seen(HELD), 0)
    assert not told.look(seen(vm="ctx-2"), 1000)
    assert told.messages == ["begun InUse"]


def test_the_trouble_of_a_vm_that_is_gone_is_over() -> None:
    told = Told()
    told.look(seen(HELD), 0)
    told.look({}, 30, gone=("ctx-1",))
    told.look({}, 30 + SETTLED, gone=("ctx-1",))
    assert told.messages == ["begun InUse", "resolved InUse"]


def test_another_run_is_another_trouble() -> None:
    told = Told()
    told.look(seen(HELD), 0)
    told.look(seen(HELD, run="r2"), 30)
    assert told.messages == ["begun InUse"] * 2


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        (HELD, "InUse"),
        (FINE, ""),
        (Condition("Ready", "False", "NotRunning", "it is healed"), ""),
        (Condition("Ready", "False", "RunFailed", "…"), "RunFailed"),
        (Condition("Ready", "False", "RunCancelled", "a person did that"), ""),
        (Condition("Ready", "False", "ServerDied", "…"), "ServerDied"),
        (Condition("Ready", "True", "Converged", "…"), ""),
        (Condition("Notified", "Unknown", "Unknown", "…"), "CallUnknown"),
        (Condition("Notified", "Unknown", "Intended", "the call is on its way"), ""),
        (Condition("SourceUnreadable", "True", "EmptySource", "…"), "EmptySource"),
        (Condition("PruneHeld", "True", "TooMany", "…"), "TooMany"),
        (Condition("Stalled", "True", "Paused", "a person did that"), ""),
    ],
)
def test_what_is_a_trouble(condition: Condition, reason: str) -> None:
    assert trouble(condition) == reason


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 100)), max_size=60))
def test_messages_take_turns_and_none_ends_within_the_time(found: list[tuple[bool, int]]) -> None:
    """Whatever happens: begun, resolved, begun …, and no resolved one while it is there."""
    told, now, there_last = Told(), 0.0, -SETTLED
    for there, passed in found:
        now += passed
        before = len(told.messages)
        told.look(seen(HELD) if there else seen(), now)
        if there:
            there_last = now
        for message in told.messages[before:]:
            if message.startswith("resolved"):
                assert not there
                assert now - there_last >= SETTLED
    words = [message.split()[0] for message in told.messages]
    assert words == [("begun", "resolved")[number % 2] for number in range(len(words))]


def test_a_message_is_a_cloud_event() -> None:
    notice = Notice(vm="ctx-1", run="r1", reason="InUse", since=0.0, message="é", gone=60.0)
    event = json.loads(body(notice, RESOLVED, hub="h", now=120.0))
    assert {name: event[name] for name in ("specversion", "type", "source", "subject", "time")} == {
        "specversion": "1.0",
        "type": RESOLVED,
        "source": "/hubs/h",
        "subject": "ctx-1/r1",
        "time": "1970-01-01T00:02:00Z",
    }
    assert event["datacontenttype"] == "application/json"
    assert event["data"] == {
        "hub": "h",
        "vm": "ctx-1",
        "run": "r1",
        "reason": "InUse",
        "message": "é",
        "state": "resolved",
        "since": "1970-01-01T00:00:00Z",
        "until": "1970-01-01T00:01:00Z",
        "command": "reconciler explain ctx-1",
    }


def test_an_id_is_one_messages_own() -> None:
    notice = Notice(vm="ctx-1", run="", reason="InUse", since=0.0, message="m")

    def id_of(one: Notice, kind: str, hub: str = "h", now: float = 5.0) -> str:
        return str(json.loads(body(one, kind, hub=hub, now=now))["id"])

    first = id_of(notice, BEGUN)
    assert id_of(notice, BEGUN, now=99.0) == first
    others = [
        id_of(notice, RESOLVED),
        id_of(notice, BEGUN, hub="i"),
        id_of(replace(notice, vm="ctx-2"), BEGUN),
        id_of(replace(notice, run="r"), BEGUN),
        id_of(replace(notice, reason="R"), BEGUN),
        id_of(replace(notice, since=1.0), BEGUN),
    ]
    assert len({first, *others}) == 7
