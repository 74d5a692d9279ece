"""The life of the one call, and what every answer of an SNA means for it."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.call import (
    NEXT,
    Answer,
    CallEvent,
    CallState,
    ImpossibleStepError,
    difference,
    job_id,
    judge,
    step,
    targets,
)
from reconciler.core.desired import Export
from tests import diagrams
from tests.core.builders import a_call, a_vm, an_export, changed, says

S, E = CallState, CallEvent
PAIRS: Final = list(itertools.product(CallState, CallEvent))
OPEN: Final = [state for state in CallState if not state.terminal]

# -- the table


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=lambda one: str(one))
def test_every_event_in_every_state_is_in_the_table_or_refused(
    state: CallState, event: CallEvent
) -> None:
    if (state, event) in NEXT:
        assert step(state, event) is NEXT[state, event]
        return
    with pytest.raises(ImpossibleStepError) as refusal:
        step(state, event)
    says(str(refusal.value), "cannot", event, state)


def test_every_state_and_every_event_is_in_the_table() -> None:
    assert {event for _, event in NEXT} == set(CallEvent)
    assert {state for state, _ in NEXT} == set(OPEN)
    assert {*NEXT.values(), S.DUE} == set(CallState)


def test_the_docs_show_the_table_as_it_is() -> None:
    page = diagrams.CALLS.read_text()
    assert page == diagrams.refreshed(page), f"docs/calls.md is stale: {diagrams.REFRESH}"
    described = set(re.findall(r"`(\w+)`", page.split("| Event | What happened |")[1]))
    assert {str(event) for event in CallEvent} - described == set()


def test_the_diagram_has_every_step() -> None:
    drawn = diagrams.of_calls()
    arrows = re.findall(r"(\w+) --> (\w+): (.+)", drawn)
    found = {(one, event, two) for one, two, events in arrows for event in events.split(", ")}
    assert found == {(str(b), str(event), str(a)) for (b, event), a in NEXT.items()}
    assert drawn.count("--> [*]") == 3


@pytest.mark.parametrize("state", [S.COMPLETED, S.FAILED, S.CANCELLED])
def test_a_run_that_has_ended_stays_ended(state: CallState) -> None:
    assert state.terminal
    assert not state.active
    assert [event for event in CallEvent if (state, event) in NEXT] == []


@pytest.mark.parametrize("state", OPEN)
def test_every_open_state_has_a_way_to_an_end(state: CallState) -> None:
    reached, new = {state}, {state}
    while new:
        new = {after for (before, _), after in NEXT.items() if before in new} - reached
        reached |= new
    assert {S.COMPLETED, S.FAILED} & reached


def test_only_the_intent_leads_to_a_call() -> None:
    """Nothing becomes ACCEPTED but by way of INTENDED, so the intent is always on disk first."""
    into = {before for (before, _), after in NEXT.items() if after is S.INTENDED}
    assert into == {S.DUE}
    assert {b for (b, _), after in NEXT.items() if after is S.ACCEPTED} == {S.INTENDED, S.UNKNOWN}


def test_nothing_but_a_no_that_counts_makes_a_run_due_again() -> None:
    back = {(before, event) for (before, event), after in NEXT.items() if after is S.DUE}
    assert back == {
        (S.DUE, E.NOTHING_SENT),
        (S.DUE, E.REARM),
        (S.INTENDED, E.NOTHING_SENT),
        (S.UNKNOWN, E.DENY),
        (S.REJECTED, E.REARM),
    }


@pytest.mark.parametrize("state", CallState)
def test_an_appliance_may_be_writing_in_three_states(state: CallState) -> None:
    assert state.active == (state in (S.INTENDED, S.ACCEPTED, S.UNKNOWN))


# -- what answers mean

OURS: Final = '{"job_id": "job-1", "status": "started", "pid": 4711}'

ANSWERS: Final = [
    (Answer(False, error="connection refused"), E.NOTHING_SENT, ["nothing was sent", "refused"]),
    (Answer(False, error="name not resolved"), E.NOTHING_SENT, ["name not resolved"]),
    (Answer(False, error="certificate expired"), E.NOTHING_SENT, ["certificate expired"]),
    (Answer(False, error="GET …/health: it answers 502"), E.NOTHING_SENT, ["health", "502"]),
    (Answer(False, 200, OURS), E.NOTHING_SENT, ["nothing was sent"]),
    (Answer(True, 200, OURS), E.ACCEPT, ["started the job"]),
    *(
        (Answer(True, status, "vm_path is\nrequired"), E.REJECT, [str(status), "vm_path is req"])
        for status in (400, 401, 403, 404, 405, 413, 415, 422)
    ),
    (Answer(True, 400, ""), E.REJECT, ["400", "no reason given"]),
    *(
        (Answer(True, status, "said so"), E.UNCLEAR, [str(status), "said so"])
        for status in (100, 201, 202, 204, 301, 302, 303, 307, 308)
    ),
    *(
        (Answer(True, status, OURS), E.UNCLEAR, [str(status)])
        for status in (201, 202, 402, 406, 407, 408, 409, 410, 418, 421, 423, 425, 428, 429, 451)
    ),
    *(
        (Answer(True, status, OURS), E.UNCLEAR, [str(status)])
        for status in (500, 501, 502, 503, 504, 599)
    ),
    (Answer(True, 500, ""), E.UNCLEAR, ["500", "nothing more"]),
    (Answer(True, None, error="no answer in time"), E.UNCLEAR, ["no answer came", "in time"]),
    (Answer(True, None, error="the connection broke"), E.UNCLEAR, ["the connection broke"]),
    (Answer(True, None, OURS, "torn"), E.UNCLEAR, ["no answer came"]),
    (Answer(True, 200, ""), E.UNCLEAR, ["200", "not with a JSON object"]),
    (Answer(True, 200, "<html>a proxy"), E.UNCLEAR, ["200", "not with a JSON object", "<html>"]),
    (Answer(True, 200, f"[{OURS}]"), E.UNCLEAR, ["not with a JSON object"]),
    (Answer(True, 200, OURS[:-4]), E.UNCLEAR, ["not with a JSON object"]),
    (Answer(True, 200, OURS.replace("job-1", "job-2")), E.UNCLEAR, ["not that our job started"]),
    (Answer(True, 200, OURS.replace("started", "queued")), E.UNCLEAR, ["not that our job started"]),
    (Answer(True, 200, OURS.replace("started", "failed")), E.UNCLEAR, ["not that our job started"]),
    (Answer(True, 200, '{"status": "started"}'), E.UNCLEAR, ["not that our job started"]),
    (Answer(True, 200, '{"job_id": "job-1"}'), E.UNCLEAR, ["not that our job started"]),
    (Answer(True, 200, '{"job_id": ["job-1"], "status": true}'), E.UNCLEAR, ["not that our job"]),
]


@pytest.mark.parametrize(("answer", "event", "words"), ANSWERS, ids=lambda one: str(one)[:60])
def test_what_an_answer_means(answer: Answer, event: CallEvent, words: list[str]) -> None:
    found, message = judge(answer, "job-1")
    assert found is event
    says(message, *words)


def test_an_answer_is_a_yes_only_as_200_and_a_no_only_in_eight_ways() -> None:
    meant = {status: judge(Answer(True, status, OURS), "job-1")[0] for status in range(100, 600)}
    assert [status for status, event in meant.items() if event is E.ACCEPT] == [200]
    refusals = [status for status, event in meant.items() if event is E.REJECT]
    assert refusals == [400, 401, 403, 404, 405, 413, 415, 422]
    assert set(meant.values()) == {E.ACCEPT, E.REJECT, E.UNCLEAR}


@given(body=st.text(max_size=300), status=st.sampled_from([200, 400, 500]))
def test_no_body_makes_the_judge_fail_or_chatter(body: str, status: int) -> None:
    event, message = judge(Answer(True, status, body), "job-1")
    assert event is not E.ACCEPT
    assert "\n" not in message
    assert len(message) < 300


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    )
)
def test_no_json_but_our_own_is_a_yes(value: Any) -> None:
    assert judge(Answer(True, 200, json.dumps(value)), "job-1")[0] is E.UNCLEAR


# -- the job id

words = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)


@given(hub=words, vm=st.text(max_size=120) | words, run=words, attempt=st.integers(1, 99))
def test_a_job_id_is_one_that_every_url_can_hold(hub: str, vm: str, run: str, attempt: int) -> None:
    found = job_id(hub, vm, run, attempt)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", found)
    assert found == job_id(hub, vm, run, attempt)


@given(one=st.tuples(words, words, words, st.integers(1, 9)), data=st.data())
def test_a_job_id_is_of_this_hub_vm_run_and_attempt_alone(
    one: tuple[str, str, str, int], data: st.DataObject
) -> None:
    other = list(one)
    place = data.draw(st.integers(0, 3))
    other[place] = data.draw(words if place < 3 else st.integers(1, 9))
    assert (job_id(*one) == job_id(*other)) == (list(one) == other)  # type: ignore[arg-type]


def test_a_job_id_says_whose_it_is_and_never_changes() -> None:
    """Other versions of this program must find the job of a run that this one asked for."""
    assert job_id("hub-a", "ctx-1", "r1", 1) == "ctx-1-a681ca8487e98be9b48f7e2f5eb6cfe3"
    assert job_id("hub-a", "ctx-1-r", "1", 1) != job_id("hub-a", "ctx-1", "r-1", 1)


# -- the targets string


def test_the_targets_string_is_the_one_of_the_wire_format() -> None:
    exports = [
        an_export("ctx-123", 0, "r7"),
        an_export("ctx-123", 1, "r7"),
    ]
    assert targets(exports, {2000: 10104, 2001: 10105}, "127.0.0.1") == (
        "2000:nbd://127.0.0.1:10104/ctx-123-r7-disk0,2001:nbd://127.0.0.1:10105/ctx-123-r7-disk1"
    )


def test_targets_are_in_the_order_of_positions_not_of_keys() -> None:
    exports = [an_export(position=1, key=2000), an_export(position=0, key=3000)]
    found = targets(exports, {2000: 10100, 3000: 10101}, "hub.example")
    assert [pair.split(":", 1)[0] for pair in found.split(",")] == ["3000", "2000"]
    assert found.startswith("3000:nbd://hub.example:10101/")


def test_there_are_no_targets_without_all_ports() -> None:
    with pytest.raises(KeyError):
        targets([an_export(), an_export(position=1)], {2000: 10100}, "127.0.0.1")


# -- what a run was asked for

VM: Final = a_vm(disks=2)


def test_a_spec_that_says_the_same_makes_no_difference() -> None:
    assert difference(a_call(VM), "site-a", "full", VM.exports) is None
    assert difference(a_call(VM), "site-a", "full", VM.exports[::-1]) is None


@pytest.mark.parametrize(
    ("what", "before", "after"),
    [
        ("position", 0, 5),
        ("size", 1 << 30, 1 << 31),
        ("image", "/backup/ctx-1/2000/r1.qcow2", "/backup/x"),
        ("name", "ctx-1-r1-disk0", "y-r1-disk0"),
        ("backing", None, "/backup/base"),
    ],
)
def test_a_changed_disk_is_shown_with_both_sides(what: str, before: Any, after: Any) -> None:
    exports = changed(VM, **{what: after}).exports
    found = difference(a_call(VM), "site-a", "full", exports)
    assert found is not None
    says(found, "disk 2000", what, str(before), str(after), "the spec now says")


@pytest.mark.parametrize(
    ("sna", "kind", "exports", "words"),
    [
        ("site-b", "full", VM.exports, ["SNA site-a", "now says site-b"]),
        ("site-a", "incremental", VM.exports, ["as full", "now says incremental"]),
        ("site-a", "full", VM.exports[:1], ["disks 2000, 2001", "now names 2000"]),
        ("site-a", "full", (*VM.exports, an_export(position=2)), ["2000, 2001", "2001, 2002"]),
    ],
)
def test_a_changed_request_is_shown_with_both_sides(
    sna: str, kind: str, exports: tuple[Export, ...], words: list[str]
) -> None:
    found = difference(a_call(VM), sna, kind, exports)
    assert found is not None
    says(found, *words)
