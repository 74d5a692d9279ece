"""Servers that die again and again: restarted at once, then with back-off, for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.core.actions import Wait
from reconciler.core.mark import Mark
from reconciler.core.plan import plan
from reconciler.core.status import by_type, conditions
from reconciler.core.units import Seconds
from reconciler.loop import without_backoff
from tests.core.builders import a_settings, a_vm, brief, only, remembered, wanting
from tests.fakes import FakeHost, Process, one_pass, planned

LATEST: Seconds = 330.0
"""From a death to the next start, at most."""


def up(disks: int = 1) -> FakeHost:
    """A VM that is exported and was called for."""
    host = FakeHost(a_settings())
    one_pass(host, wanting(a_vm(disks=disks)))
    return host


def die(host: FakeHost, after: Seconds = 0.5) -> None:
    """Every server ends."""
    host.clock += after
    for process in list(host.processes.values()):
        host.kill(process)


def rise(host: FakeHost) -> Seconds:
    """Wait as long as the plan says, and go on; how long that was."""
    began = host.now()
    while again := planned(host, wanting(a_vm())).vms[0].again_at:
        host.clock = again
    one_pass(host, wanting(a_vm()))
    assert len(host.processes) == 1
    return host.now() - began


def die_often(host: FakeHost, times: int) -> None:
    for _ in range(times):
        die(host)
        rise(host)


def test_the_first_death_is_healed_at_once_and_the_next_after_1_2_4_to_300_seconds() -> None:
    host = up()
    spans = []
    for _ in range(12):
        die(host, after=0.0)
        spans.append(rise(host))
    for span, least in zip(spans, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300], strict=True):
        assert least <= span <= least * 1.1


def test_a_server_that_lived_is_healed_at_once_again() -> None:
    host = up()
    die_often(host, 4)
    (lease,) = host.records.ledger().leases
    assert lease.deaths == 4
    die(host, after=lease.rest - host.now() + 60)
    assert rise(host) == 0
    assert host.records.ledger().leases[0].deaths == 1


def test_who_is_started_when_its_rest_is_over_has_not_lived_that_long() -> None:
    """A rest that is longer than `healthy_after` does not make a dead server a healthy one."""
    host = up()
    die_often(host, 10)
    die(host)
    assert rise(host) > 60
    assert host.records.ledger().leases[0].deaths == 11


def test_healthy_after_is_in_the_config() -> None:
    settings = a_settings()
    short = a_settings(loop=type(settings.loop)(healthy_after=5.0))
    host = FakeHost(short)
    one_pass(host, wanting(a_vm(), settings=short))
    for _ in range(3):
        die(host, after=8.0)
        assert brief(planned(host, wanting(a_vm(), settings=short))) == [
            ("restart", 2000, "ProcessGone")
        ]
        one_pass(host, wanting(a_vm(), settings=short))
    assert type(short).from_json(short.to_json()).loop.healthy_after == 5.0


def test_it_is_a_crash_loop_from_the_fifth_death_on_and_the_words_stay() -> None:
    host = up()
    said = []
    for number in range(1, 9):
        die(host)
        found = planned(host, wanting(a_vm()))
        if number > 1:
            wait = only(found)
            assert isinstance(wait, Wait)
            assert wait.cause == ("CrashLoop" if number >= 5 else "BackOff"), number
            assert wait.until == found.vms[0].again_at > host.now()
            said.append(wait.why)
            ledger = host.records.ledger()
            told = by_type(conditions(found.vms[0], host.look(wanting(a_vm()), ledger), ledger))
            stalled = told["Stalled"]
            want = ("True", "CrashLoop") if number >= 5 else ("False", "NotStalled")
            assert (stalled.status, stalled.reason) == want
            assert told["Ready"].reason == wait.cause
        rise(host)
    assert len(set(said[3:])) == 1


def test_a_person_who_applies_does_not_wait() -> None:
    host = up()
    die_often(host, 6)
    die(host)
    ledger = host.records.ledger()
    assert only(planned(host, wanting(a_vm()))).kind == "wait"
    desired = wanting(a_vm())
    found = plan(desired, host.look(desired, ledger), without_backoff(ledger), host.now())
    assert brief(found) == [("restart", 2000, "ProcessGone")]


def test_a_clock_that_was_set_back_keeps_nothing_down() -> None:
    host = up()
    die_often(host, 10)
    die(host)
    host.clock -= 86400
    assert only(planned(host, wanting(a_vm()))).kind == "restart"


def mark_of(process: Process) -> Mark:
    assert process.served.mark
    return process.served.mark


def test_one_disk_that_dies_holds_up_no_other() -> None:
    host = up(disks=2)
    desired = wanting(a_vm(disks=2))
    for _ in range(2):
        one_pass(host, desired)
        (first,) = [p for p in host.processes.values() if mark_of(p).disk == 2000]
        host.kill(first)
    assert brief(planned(host, desired)) == [("wait", 2000, "BackOff")]
    host.kill(next(iter(host.processes.values())))
    assert brief(planned(host, desired)) == [
        ("wait", 2000, "BackOff"),
        ("restart", 2001, "ProcessGone"),
    ]


def test_without_a_lease_that_knows_of_a_start_there_is_no_back_off() -> None:
    """As of a store of before this was written down."""
    host = up()
    die_often(host, 6)
    die(host)
    ledger = host.records.ledger()
    old = remembered(
        [replace(one, up=0.0, deaths=0, rest=0.0) for one in ledger.leases], ledger.calls
    )
    desired = wanting(a_vm())
    assert only(plan(desired, host.look(desired, old), old, host.now())).kind == "restart"


@given(
    lives=st.lists(
        st.one_of(
            st.floats(0, 70), st.floats(50, 70), st.floats(0, 1000), st.just(60.0), st.just(0.0)
        ),
        max_size=25,
    ),
    late=st.floats(0, 40),
)
def test_never_two_starts_too_close_and_never_down_for_too_long(
    lives: list[Seconds], late: Seconds
) -> None:
    """Whatever a server does, and however late (at most a resync) we look at it."""
    host = up()
    young = 0
    for life in lives:
        started = host.now()
        (lease,) = host.records.ledger().leases
        assert lease.deaths <= young
        die(host, after=life)
        host.clock += late if life > 1 else 0.0
        died = host.now()
        rise(host)
        assert host.now() - died <= LATEST
        young = young + 1 if life < 60 + LATEST else 1
        deaths = host.records.ledger().leases[0].deaths
        if deaths > 1:
            least = min(300, 2 ** (deaths - 2))
            assert host.now() - started >= least
        if life >= 60 + LATEST:
            assert deaths == 1
            assert host.now() == died
        if life + late < 60:
            assert deaths == lease.deaths + 1
