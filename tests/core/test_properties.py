"""What never happens, and what always comes true, over generated worlds.

The worlds are of tests/fakes.py; the lives that are lived in them, with crashes, deaths, strangers
and an SNA that misbehaves, are of tests/sim.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from hypothesis import given, note, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.core.actions import Adopt, Restart, Start, Stop
from reconciler.core.actual import Actual
from reconciler.core.call import CallEvent, CallState
from reconciler.core.desired import Desired
from reconciler.core.ledger import Calls, Ledger
from reconciler.core.plan import plan
from reconciler.core.settings import Settings
from tests.core.builders import (
    a_settings,
    absent,
    brief,
    wanting,
)
from tests.fakes import (
    Crash,
    FakeHost,
    Reply,
    one_pass,
    planned,
    settle,
)
from tests.sim.engine import Script, run
from tests.sim.events import EVENTS, MOST, Event
from tests.sim.life import ENOUGH, NAMES, STRANGERS, World, move_in, rank, strangers, vm_of

T = TypeVar("T")

runs = st.sampled_from(["r1", "r2"])
names = st.sampled_from(NAMES)


@st.composite
def desireds(draw: st.DrawFn, settings: Settings) -> Desired:
    """Some of the VMs, each exported for one of two runs, or absent."""
    found = {}
    for name in NAMES:
        state = draw(st.sampled_from(["r1", "r2", "absent", "untouched"]))
        if state != "untouched":
            found[name] = absent(name) if state == "absent" else vm_of(name, state)
    return Desired(settings=settings, vms=found)


KINDS: Final = st.sampled_from(STRANGERS)


@st.composite
def lived_in(draw: st.DrawFn, ports: str = ENOUGH) -> FakeHost:
    """A host where something was applied, and to which things have happened since."""
    settings = a_settings(ports)
    host = FakeHost(settings)
    first, last = settings.ports.first, settings.ports.last
    for port in draw(st.sets(st.integers(first, last), max_size=3)):
        move_in(host, draw(KINDS), port)
    settle(host, draw(desireds(settings)))
    for process in host.mine():
        event = draw(st.sampled_from(["lives", "lives", "dies", "falls silent", "loses its lease"]))
        if event == "dies":
            host.kill(process)
        elif event == "falls silent":
            process.silent = True
        elif event == "loses its lease":
            mark = process.served.mark
            assert mark is not None
            host.records.leases.pop(mark.key, None)
    for call in list(host.records.calls.values()):
        if call.state is CallState.ACCEPTED and draw(st.booleans()):
            host.records.advance(call, CallEvent.END, host.now())
    for port in draw(st.sets(st.integers(first, last), max_size=3)):
        move_in(host, draw(KINDS), port)
    return host


def shuffled(value: Mapping[Any, T], order: random.Random) -> dict[Any, T]:
    items = list(value.items())
    order.shuffle(items)
    return dict(items)


# -- the planner


@given(data=st.data(), order=st.randoms(use_true_random=False))
def test_the_same_state_gives_the_same_plan_in_whatever_order_it_was_found(
    data: st.DataObject, order: random.Random
) -> None:
    host = data.draw(lived_in("10100-10107"))
    desired = data.draw(desireds(host.settings))
    ledger = host.records.ledger()
    actual = host.look(desired, ledger)

    def in_another_order() -> tuple[Desired, Actual, Ledger]:
        rows = list(ledger.leases)
        calls = list(ledger.calls)
        order.shuffle(rows)
        order.shuffle(calls)
        return (
            replace(desired, vms=shuffled(desired.vms, order)),
            replace(
                actual,
                images=shuffled(actual.images, order),
                listeners=shuffled(actual.listeners, order),
                claims=shuffled(actual.claims, order),
                reports=shuffled(actual.reports, order),
            ),
            replace(ledger, leases=tuple(rows), calls=Calls.of(calls)),
        )

    first = plan(desired, actual, ledger, host.now())
    assert plan(desired, actual, ledger, host.now()) == first
    assert plan(*in_another_order(), host.now()) == first


@given(data=st.data())
def test_planning_changes_nothing(data: st.DataObject) -> None:
    host = data.draw(lived_in())
    desired = data.draw(desireds(host.settings))
    before = (strangers(host), list(host.mine()), host.records.ledger(), dict(host.images))
    planned(host, desired)
    assert (strangers(host), list(host.mine()), host.records.ledger(), dict(host.images)) == before


@given(data=st.data())
def test_what_has_converged_is_left_alone(data: st.DataObject) -> None:
    host = FakeHost(a_settings(ENOUGH))
    desired = data.draw(desireds(host.settings))
    settle(host, desired)
    assert planned(host, desired).actions == ()


@given(data=st.data())
def test_one_pass_is_enough_when_nothing_fails(data: st.DataObject) -> None:
    host = data.draw(lived_in())
    desired = data.draw(desireds(host.settings))
    done = one_pass(host, desired)
    note(brief(done).__str__())
    assert brief(planned(host, desired).changes) == []


@given(data=st.data())
def test_a_port_is_planned_once_within_the_range_and_never_a_strangers(
    data: st.DataObject,
) -> None:
    host = data.draw(lived_in("10100-10107"))
    taken = set(host.busy()) - {p.port for p in host.mine()}
    found = planned(host, data.draw(desireds(host.settings)))
    ports = Counter(
        action.lease.port for action in found.actions if isinstance(action, Start | Restart | Adopt)
    )
    assert all(count == 1 for count in ports.values())
    assert all(port in host.settings.ports for port in ports)
    assert not taken & set(ports)


@given(data=st.data())
def test_no_plan_speaks_of_a_process_that_is_not_ours(data: st.DataObject) -> None:
    host = data.draw(lived_in())
    before = strangers(host)
    desired = data.draw(desireds(host.settings))
    ours = {p.identity for p in host.mine()}
    for action in planned(host, desired).actions:
        if isinstance(action, Stop | Adopt | Restart) and action.server:
            assert action.server.identity in ours
    settle(host, desired)
    assert strangers(host) == before


@given(data=st.data(), size=st.integers(1, 8))
def test_a_vm_gets_all_of_its_ports_or_none(data: st.DataObject, size: int) -> None:
    host = FakeHost(a_settings(f"10100-{10099 + size}"))
    for port in data.draw(st.sets(st.sampled_from(list(host.settings.ports)), max_size=3)):
        move_in(host, "sshd", port)
    desired = data.draw(desireds(host.settings))
    settle(host, desired)
    for name, disks in rank(host, desired).items():
        assert disks in (set(), {export.key for export in desired.vms[name].exports})


# -- one appliance, in all its moods


def apply_until(host: FakeHost, desired: Desired, steps: int) -> None:
    """Apply, and crash after so many steps."""
    host.fuse.left = steps
    try:
        settle(host, desired)
    except Crash:
        host.crash()
    host.fuse.left = None


@given(replies=st.lists(st.sampled_from(list(Reply)), max_size=6), applies=st.integers(1, 8))
def test_an_appliance_starts_a_run_once_whatever_it_answers(
    replies: list[Reply], applies: int
) -> None:
    host = FakeHost(a_settings())
    desired = wanting(vm_of("ctx-1", "r2"))
    sna = host.snas["site-a"]
    sna.script.extend(replies)
    for _ in range(applies):
        settle(host, desired)
        sna.wake()
        sna.forget()
        host.clock += 1000
    assert len(sna.started) <= 1
    assert all(post.silent == () and post.disks == (2000, 2001) for post in sna.posts)


@given(steps=st.integers(0, 80), reply=st.sampled_from(list(Reply)), forget=st.booleans())
def test_a_crash_at_any_step_costs_neither_a_second_call_nor_a_port(
    steps: int, reply: Reply, forget: bool
) -> None:
    host = FakeHost(a_settings())
    desired = wanting(vm_of("ctx-1", "r2"))
    sna = host.snas["site-a"]
    sna.script.append(reply)
    apply_until(host, desired, steps)
    sna.wake()
    if forget:
        sna.forget()
    for _ in range(3):
        host.clock += 1000
        settle(host, desired)
    assert len(sna.started) <= 1
    assert sorted(p.port or 0 for p in host.mine()) == [10100, 10101]
    assert {lease.port for lease in host.records.leases.values()} == {10100, 10101}
    assert planned(host, desired).changes == ()


@given(steps=st.integers(0, 60))
def test_a_crash_while_stopping_leaves_no_server_and_no_lease(steps: int) -> None:
    host = FakeHost(a_settings())
    settle(host, wanting(vm_of("ctx-2", "r2")))
    (call,) = host.records.calls.values()
    host.records.advance(call, CallEvent.END, host.now())
    desired = wanting(absent("ctx-2"))
    apply_until(host, desired, steps)
    settle(host, desired)
    assert host.mine() == []
    assert host.records.leases == {}


@given(before=st.integers(0, 60), after=st.integers(0, 20), dies=st.sampled_from([2000, 2001]))
def test_a_run_that_lost_writes_is_never_completed(before: int, after: int, dies: int) -> None:
    host = FakeHost(a_settings(reports_end=True))
    desired = wanting(vm_of("ctx-1", "r2"), settings=host.settings)
    apply_until(host, desired, before)
    settle(host, desired)
    if not host.snas["site-a"].started:
        return  # the crash hid whether it was called: nobody writes
    host.write(host.server("ctx-1", dies))
    host.kill(host.server("ctx-1", dies))
    apply_until(host, desired, after)
    settle(host, desired)
    assert len(host.mine()) == 2
    sna = host.snas["site-a"]
    sna.jobs = dict.fromkeys(sna.jobs, "completed")
    settle(host, desired)
    (call,) = host.records.calls.values()
    assert call.state is CallState.FAILED
    assert call.reason == "ServerDied"


@given(failing=st.sets(st.sampled_from([2000, 2001, 2002]), min_size=1))
def test_no_call_while_a_disk_does_not_answer(failing: set[int]) -> None:
    host = FakeHost(a_settings())
    desired = wanting(vm_of("ctx-2", "r2"))
    host.failing |= {("ctx-2", key) for key in failing}
    settle(host, desired)
    assert host.snas["site-a"].posts == []
    host.failing.clear()
    settle(host, desired)
    assert [post.disks for post in host.snas["site-a"].posts] == [(2000, 2001, 2002)]


@given(st.lists(st.tuples(names, st.sampled_from([2000, 2001])), min_size=1, max_size=3))
def test_vms_side_by_side_do_not_get_into_each_others_way(failing: list[tuple[str, int]]) -> None:
    host = FakeHost(a_settings())
    desired = wanting(*(vm_of(name, "r1") for name in NAMES))
    host.failing |= set(failing)
    for _ in range(3):
        one_pass(host, desired, parallel=8)
    host.failing.clear()
    for _ in range(2):
        one_pass(host, desired, parallel=8)
    assert planned(host, desired).actions == ()
    assert sorted(host.started().values()) == [1, 1, 1]


# -- everything at once: see tests/sim, which draws such lives from seeds


worlds: Final = st.builds(
    World,
    ports=st.sampled_from([3, 5, 12]),
    max_running=st.integers(1, 3),
    reports_end=st.booleans(),
    declared=st.tuples(*[st.sampled_from(["r1", "r2", ""])] * 3),
)
happenings: Final = st.tuples(
    st.sampled_from([name for name, kind in EVENTS.items() for _ in range(kind.weight)]),
    st.integers(0, MOST - 1),
    st.integers(0, MOST - 1),
)


@settings(max_examples=settings().max_examples // 2)
@given(world=worlds, happens=st.lists(happenings, min_size=10, max_size=30))
def test_a_hub_keeps_its_promises_through_whatever_happens(
    world: World, happens: list[Event]
) -> None:
    run(Script(seed=0, world=world, events=(("apply", 0, 0), *happens)))
