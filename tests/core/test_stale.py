"""A run of which nothing is heard is a condition, with what can be seen of it; never a verdict."""

from __future__ import annotations

from typing import Any, Final

import pytest
from msgspec.structs import replace

from reconciler.core.call import CallState
from reconciler.core.desired import Desired
from reconciler.core.notices import trouble
from reconciler.core.plan import Plan
from reconciler.core.settings import Loop, Settings
from reconciler.core.status import Condition, by_type, conditions
from tests.core.builders import a_settings, a_vm, says, wanting
from tests.fakes import START, FakeHost, planned, settle

S = CallState
LATER: Final = START + 301.0


def accepted(settings: Settings | None = None) -> tuple[FakeHost, Desired, str]:
    """A run that its appliance has accepted, and its job."""
    host = FakeHost(settings or a_settings())
    wanted = wanting(a_vm(disks=2), settings=host.settings)
    settle(host, wanted)
    call = host.records.ledger().latest("ctx-1", "r1")
    assert call is not None
    assert call.state is S.ACCEPTED
    return host, wanted, call.job_id


def stale(host: FakeHost, wanted: Desired) -> tuple[Plan, Condition | None]:
    found = planned(host, wanted)
    ledger = host.records.ledger()
    some = by_type(conditions(found.vms[0], host.look(wanted, ledger), ledger))
    return found, some.get("Stale")


def test_silence_from_the_start_is_a_condition_when_its_time_is_over() -> None:
    host, wanted, _ = accepted()
    host.clock = START + 299
    assert stale(host, wanted)[1] is None
    host.clock = LATER
    found, condition = stale(host, wanted)
    assert condition is not None
    assert (condition.status, condition.reason) == ("True", "NoTelemetry")
    says(condition.message, "not a word has come of it since 2027-01-15T08:00:00Z")
    says(condition.message, "2 of 2 servers answer", "connected to 0 of 2 disks")
    assert found.actions == (), "it is told, and nothing is done about it"
    assert trouble(condition) == "NoTelemetry"
    settle(host, wanted)
    call = host.records.ledger().latest("ctx-1", "r1")
    assert call is not None
    assert call.state is S.ACCEPTED


@pytest.mark.parametrize("kind", ["telemetry", "report"])
def test_every_word_begins_the_time_anew(kind: str) -> None:
    host, wanted, job = accepted()
    if kind == "telemetry":
        host.records.word(job, START + 200, status="running")
    else:
        host.records.report(job, 0, START + 200)
    host.clock = LATER
    assert stale(host, wanted)[1] is None
    host.clock = START + 501
    condition = stale(host, wanted)[1]
    assert condition is not None
    says(condition.message, "nothing was heard of it since 2027-01-15T08:03:20Z")


def test_what_can_be_seen_is_said() -> None:
    host, wanted, _ = accepted()
    host.server("ctx-1", 2000).clients = 2
    image = host.server("ctx-1", 2001).argv[-1]
    host.images[image] = replace(host.images[image], written=START + 60)
    host.server("ctx-1", 2001).silent = True
    host.clock = LATER
    condition = stale(host, wanted)[1]
    assert condition is not None
    says(condition.message, "1 of 2 servers answer", "connected to 1 of 2 disks")
    says(condition.message, "the images were written last at 2027-01-15T08:01:00Z")


@pytest.mark.parametrize("case", ["other time", "asked itself", "all reported", "over before"])
def test_what_is_not_silent_for_too_long(case: str) -> None:
    changes: dict[str, Any] = {}
    if case == "other time":
        changes = {"loop": Loop(stale_after=3600.0)}
    host, wanted, job = accepted(a_settings(reports_end=case == "asked itself", **changes))
    if case == "all reported":
        host.server("ctx-1", 2000).clients = 1
        for position in range(2):
            host.records.report(job, position, START)
    host.clock = LATER
    ledger = host.records.ledger()
    if case == "over before":
        host.records.word(job, START + 300)
        known = replace(ledger, transitions={("ctx-1", "Stale"): ("True", "NoTelemetry", START)})
        found = planned(host, wanted).vms[0]
        one = by_type(conditions(found, host.look(wanted, known), known))["Stale"]
        assert (one.status, one.reason) == ("False", "Heard")
        return
    assert stale(host, wanted)[1] is None
