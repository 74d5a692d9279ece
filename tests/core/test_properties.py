"""What never happens, and what always comes true, over generated worlds.

The worlds are of tests/fakes.py. `Life` goes through applies, crashes, deaths, strangers and an
SNA that misbehaves, in any order, and looks at the world after each.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, TypeAlias, TypeVar

from hypothesis import given, note, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.core.actions import Adopt, Restart, Start, Stop
from reconciler.core.actual import Actual, Listener
from reconciler.core.call import CallEvent, CallState, job_id, targets
from reconciler.core.desired import Desired, Export, Vm, attempted, attempted_image
from reconciler.core.disk_plan import export_key
from reconciler.core.ledger import Ledger
from reconciler.core.mark import Mark
from reconciler.core.plan import plan
from reconciler.core.settings import QemuNbd, Settings
from reconciler.core.units import PortRange
from tests.core.builders import (
    HUB,
    a_settings,
    a_vm,
    absent,
    brief,
    wanting,
)
from tests.fakes import (
    Crash,
    FakeHost,
    FakeRecords,
    FakeSna,
    Process,
    Reply,
    one_pass,
    planned,
    settle,
)

NAMES: Final = ("ctx-1", "ctx-2", "ctx-10")
DISKS: Final = {("ctx-1", "r1"): 1, ("ctx-1", "r2"): 2, ("ctx-2", "r1"): 2, ("ctx-2", "r2"): 3}
"""(VM, run) → how many disks it has; 2 if it is not here."""
ENOUGH: Final = "10100-10149"

T = TypeVar("T")

runs = st.sampled_from(["r1", "r2"])
names = st.sampled_from(NAMES)


def vm_of(name: str, run: str, **changes: Any) -> Vm:
    return a_vm(name, run, DISKS.get((name, run), 2), **changes)


@st.composite
def desireds(draw: st.DrawFn, settings: Settings) -> Desired:
    """Some of the VMs, each exported for one of two runs, or absent."""
    found = {}
    for name in NAMES:
        state = draw(st.sampled_from(["r1", "r2", "absent", "untouched"]))
        if state != "untouched":
            found[name] = absent(name) if state == "absent" else vm_of(name, state)
    return Desired(settings=settings, vms=found)


def strangers(host: FakeHost) -> dict[str, Any]:
    """All that is not ours, to be compared later."""
    return {
        "processes": {
            p.identity: (p.argv, p.port) for p in host.processes.values() if not host.is_ours(p)
        },
        "listeners": dict(host.listeners),
    }


def move_in(host: FakeHost, kind: str, port: int) -> None:
    """A stranger takes a port, if it is free."""
    if port in host.busy():
        return
    if kind == "sshd":
        host.listeners[port] = Listener(port, "127.0.0.1", 77, "sshd")
        return
    mark = Mark("hub-b", "ctx-1", 2000, "r1", 1, port)
    description = str(mark) if kind == "another hub's" else "somebody's"
    line = ("qemu-nbd", "--export-name", "x", "--description", description, f"/other/{port}")
    host.spawn(line, port)


KINDS: Final = st.sampled_from(["sshd", "another hub's", "a qemu-nbd"])


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
            replace(ledger, leases=tuple(rows), calls=tuple(calls)),
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


def rank(host: FakeHost, desired: Desired) -> dict[str, set[int]]:
    """VM → the disks that have a lease, of the run that is wanted."""
    return {
        vm.name: {export.key for export in vm.exports if export_key(export) in host.records.leases}
        for vm in desired.vms.values()
    }


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


# -- everything at once


EVENTS: Final = {
    "apply": 5,
    "apply_and_crash": 4,
    "declare": 3,
    "make_absent": 1,
    "forget_a_vm": 1,
    "edit": 2,
    "change_the_options": 1,
    "resolve": 2,
    "a_server_dies": 4,
    "clients_come_and_go": 4,
    "a_server_falls_silent": 1,
    "a_server_will_not_start": 1,
    "a_stranger_comes": 2,
    "the_strangers_leave": 1,
    "the_next_answer_will_be": 4,
    "the_appliance_restarts": 1,
    "the_appliance_ends_its_jobs": 2,
    "time_passes": 2,
    "the_state_is_lost": 1,
    "the_ledger_is_saved": 1,
    "an_older_ledger_comes_back": 1,
}
"""What happens in a life → how often, against the others."""
Event: TypeAlias = tuple[str, int, int]
"""What happens, and two numbers that say to whom and how."""

events: Final = st.tuples(
    st.sampled_from([name for name, weight in EVENTS.items() for _ in range(weight)]),
    st.integers(0, 59),
    st.integers(0, 59),
)


class Life:
    """A hub with its operators and its bad days; `check` says what must be so after each event."""

    def __init__(self, size: int, *, reports_end: bool, max_running: int) -> None:
        self.settings = a_settings(
            f"10100-{10099 + size}", reports_end=reports_end, max_running=max_running
        )
        self.host = FakeHost(self.settings)
        self.vms: dict[str, Vm] = {}
        self.resent: Counter[tuple[str, str]] = Counter()
        self.checked = 0
        self.amnesia = False
        """The ledger is not what it was."""
        self.mixed = False
        """The ledger is older than what runs: two VMs may own one port."""
        self.saved: tuple[FakeRecords, Any, Any] | None = None
        move_in(self.host, "another hub's", 10101)
        self.foreign = strangers(self.host)

    @property
    def sna(self) -> FakeSna:
        return self.host.snas["site-a"]

    def desired(self) -> Desired:
        """What is declared, with the attempt that the ledger knows of."""
        ledger = self.host.records.ledger()
        found = {}
        for name, vm in self.vms.items():
            attempt = ledger.attempt(name, vm.run)
            exports = tuple(
                replace(
                    export,
                    attempt=attempt,
                    name=attempted(export.name, attempt),
                    image=attempted_image(export.image, attempt),
                )
                for export in vm.exports
            )
            found[name] = replace(vm, exports=exports)
        return Desired(settings=self.settings, vms=found)

    def one(self, i: int) -> Process | None:
        """One of our servers."""
        ours = self.host.mine()
        return ours[i % len(ours)] if ours else None

    # -- what people do

    def declare(self, i: int, j: int) -> None:
        name = NAMES[i % 3]
        self.vms[name] = vm_of(name, "r1" if j % 2 else "r2")

    def make_absent(self, i: int, j: int) -> None:
        self.vms[NAMES[i % 3]] = absent(NAMES[i % 3])

    def forget_a_vm(self, i: int, j: int) -> None:
        self.vms.pop(NAMES[i % 3], None)

    def edit(self, i: int, j: int) -> None:
        """The same run, but with other disks or another path."""
        vm = self.vms.get(NAMES[i % 3])
        if vm and vm.exported:
            self.vms[vm.name] = a_vm(vm.name, vm.run, 1 + j % 3, path="/a" if i % 2 else "/b")

    def change_the_options(self, i: int, j: int) -> None:
        self.settings = replace(
            self.settings, qemu_nbd=QemuNbd(cache="writethrough" if i % 2 else None)
        )
        self.host.settings = self.settings

    def apply(self, i: int, j: int) -> None:
        desired = self.desired()
        settle(self.host, desired)
        self.look_at_the_posts(desired)
        self.look_for_hoarders()

    def apply_and_crash(self, i: int, j: int) -> None:
        desired = self.desired()
        apply_until(self.host, desired, i)
        self.look_at_the_posts(desired)

    def resolve(self, i: int, j: int) -> None:
        """An operator, who has seen to it that what they say is so."""
        calls = [call for call in self.host.records.calls.values() if call.state.active]
        if not calls:
            return
        call = calls[i % len(calls)]
        records, now = self.host.records, self.host.now()
        if call.state is CallState.INTENDED:
            call = records.advance(call, CallEvent.CRASH, now)
        if j % 4 == 0:
            if call.state is CallState.UNKNOWN and call.job_id in self.sna.started:
                records.advance(call, CallEvent.SAY_ACCEPTED, now)
            return
        connected = [p for p in self.host.mine() if self.serves(p, call.vm) and p.clients]
        if connected:
            return
        self.sna.late = [job for job in self.sna.late if job != call.job_id]
        if call.job_id in self.sna.jobs:
            self.sna.jobs[call.job_id] = "failed"
        if j % 4 == 1:
            self.host.take_over(call)
            records.another_attempt(call, now, "by order")
            self.resent[call.vm, call.run] += 1
        elif j % 4 == 2 and not call.tainted and call.key not in self.host.losses:
            records.advance(call, CallEvent.SAY_COMPLETED, now)
        else:
            records.advance(call, CallEvent.SAY_FAILED, now)

    def serves(self, process: Process, vm: str) -> bool:
        mark = process.served.mark
        return mark is not None and mark.vm == vm

    # -- what the world does

    def a_server_dies(self, i: int, j: int) -> None:
        process = self.one(i)
        if process:
            self.host.kill(process)

    def clients_come_and_go(self, i: int, j: int) -> None:
        """They write only where an appliance was told to."""
        process = self.one(i)
        mark = process.served.mark if process else None
        if process and mark:
            process.clients = (0, 2, 2, 10)[j % 4]
            job = job_id(HUB, mark.vm, mark.run, mark.attempt)
            if process.clients and job in self.sna.started:
                self.host.write(process)

    def a_server_falls_silent(self, i: int, j: int) -> None:
        process = self.one(i)
        if process:
            process.silent = not process.silent

    def a_server_will_not_start(self, i: int, j: int) -> None:
        self.host.failing ^= {(NAMES[i % 3], 2000 + j % 2)}

    def a_stranger_comes(self, i: int, j: int) -> None:
        move_in(self.host, ("sshd", "another hub's", "a qemu-nbd")[j % 3], 10100 + i % 5)
        self.foreign = strangers(self.host)

    def the_strangers_leave(self, i: int, j: int) -> None:
        self.host.listeners.clear()
        for process in list(self.host.processes.values()):
            if not self.host.is_ours(process):
                del self.host.processes[process.identity]
        self.foreign = strangers(self.host)

    def the_next_answer_will_be(self, i: int, j: int) -> None:
        self.sna.script.append(list(Reply)[i % len(Reply)])

    def the_appliance_restarts(self, i: int, j: int) -> None:
        self.sna.wake()
        self.sna.forget()

    def the_appliance_ends_its_jobs(self, i: int, j: int) -> None:
        self.sna.wake()
        self.sna.jobs = dict.fromkeys(self.sna.jobs, "completed" if i % 3 else "failed")

    def time_passes(self, i: int, j: int) -> None:
        self.sna.wake()
        self.host.clock += 1000

    def the_state_is_lost(self, i: int, j: int) -> None:
        if i % 3 == 0:
            self.host.lose_state()
            self.amnesia = True

    def the_ledger_is_saved(self, i: int, j: int) -> None:
        records = self.host.records
        self.saved = (records, dict(records.calls), dict(records.leases))

    def an_older_ledger_comes_back(self, i: int, j: int) -> None:
        """Somebody restores the state directory from a backup of it."""
        if self.saved:
            self.host.records, calls, leases = self.saved
            self.host.records.calls, self.host.records.leases = dict(calls), dict(leases)
            self.amnesia = self.mixed = True
            self.host.losses.clear()  # who had died is in the newer ledger alone

    # -- what must be so at any time

    def check(self) -> None:
        self.a_run_is_started_once()
        assert strangers(self.host) == self.foreign
        self.ports_are_ours_and_each_ones_own()
        self.nobody_was_cut_off()
        self.what_lost_writes_is_no_backup()
        if not self.amnesia:
            self.what_the_appliance_was_told_stays_so()
            active = sum(call.state.active for call in self.host.records.calls.values())
            assert active <= self.settings.snas["site-a"].max_running

    def a_run_is_started_once(self) -> None:
        attempts = Counter(self.sna.started)
        assert all(count == 1 for count in attempts.values()), attempts
        for name in NAMES:
            for run in ("r1", "r2"):
                jobs = {job_id(HUB, name, run, n) for n in range(1, 30)}
                assert sum(job in jobs for job in attempts) <= 1 + self.resent[name, run]

    def ports_are_ours_and_each_ones_own(self) -> None:
        leased = Counter(lease.port for lease in self.host.records.leases.values())
        assert all(count == 1 for count in leased.values())
        assert all(port in self.settings.ports for port in leased)
        for process in self.host.mine():
            mark = process.served.mark
            assert mark is not None
            assert process.port == mark.port in self.settings.ports
            lease = self.host.records.leases.get(mark.key)
            assert lease is None or lease.port == mark.port or self.amnesia

    def what_the_appliance_was_told_stays_so(self) -> None:
        """The port of a disk of an active run never moves, whoever sits on it meanwhile."""
        leases = self.host.records.leases
        for key, call in self.host.records.calls.items():
            if call.state.active:
                ports = {e.key: leases[export_key(e)].port for e in call.exports}
                assert targets(call.exports, ports, "127.0.0.1") == self.host.records.targets[key]

    def nobody_was_cut_off(self) -> None:
        for one in self.host.ended:
            assert one.clients == 0
            assert not (one.active and one.answered)

    def what_lost_writes_is_no_backup(self) -> None:
        for key in self.host.losses:
            call = self.host.records.calls.get(key)
            assert call is None or call.state is not CallState.COMPLETED

    def look_at_the_posts(self, desired: Desired) -> None:
        """Every call was made with all disks of its VM, and all of them answering."""
        for post in self.sna.posts[self.checked :]:
            vm = desired.vms[post.request["vm_name"]]
            assert post.silent == ()
            assert post.disks == tuple(export.key for export in vm.exports)
        self.checked = len(self.sna.posts)

    def look_for_hoarders(self) -> None:
        """A run that nothing serves yet must not keep a port from others."""
        for vm in self.desired().vms.values():
            serving = any(self.serves(process, vm.name) for process in self.host.mine())
            if not serving and not self.host.records.ledger().active(vm.name):
                have = rank(self.host, self.desired())[vm.name]
                assert len(have) in (0, len(vm.exports)), (vm.name, have)

    # -- and in the end

    def end(self) -> None:
        """All that stood in the way goes; then there is exactly what is wanted."""
        host = self.host
        self.the_strangers_leave(0, 0)
        for process in host.mine():
            process.clients, process.silent = 0, False
        host.failing.clear()
        self.sna.script.clear()
        self.sna.deaf = True
        host.clock += 1000
        self.settings = replace(self.settings, ports=PortRange.parse(ENOUGH))
        host.settings = self.settings
        desired = self.desired()
        settle(host, desired, most=8)
        self.check()
        if self.mixed:
            return
        assert brief(planned(host, desired).changes) == []
        for vm in desired.vms.values():
            wanted = Counter(export_key(export) for export in self.wanted(vm))
            there = Counter(
                mark.key for p in host.mine() if (mark := p.served.mark) and mark.vm == vm.name
            )
            call = host.records.ledger().active(vm.name)
            if call and (not vm.exported or self.amnesia):
                # What is there is kept; what is not there may not be known of.
                assert all(count == 1 for count in there.values())
            else:
                assert there == wanted, vm.name
                leases = {k for k in host.records.leases if k[0] == vm.name}
                assert leases == set(wanted), vm.name

    def wanted(self, vm: Vm) -> tuple[Export, ...]:
        """What should be served of a VM when all is well."""
        ledger = self.host.records.ledger()
        call = ledger.active(vm.name)
        if call:
            return call.exports
        if not vm.exported:
            return ()
        latest = ledger.latest(vm.name, vm.run)
        return () if latest and latest.state.terminal else vm.exports


def live(life: Life, declared: list[str], happens: list[Event]) -> None:
    """What is declared is applied, and then things happen."""
    for name, run in zip(NAMES, declared, strict=True):
        if run:
            life.vms[name] = vm_of(name, run)
    life.apply(0, 0)
    for what, i, j in happens:
        getattr(life, what)(i, j)
        life.check()
    life.end()


@settings(max_examples=3 * settings().max_examples // 2)
@given(
    size=st.sampled_from([3, 5, 12]),
    reports_end=st.booleans(),
    max_running=st.integers(1, 3),
    declared=st.lists(st.sampled_from(["r1", "r2", ""]), min_size=3, max_size=3),
    happens=st.lists(events, min_size=10, max_size=30),
)
def test_a_hub_keeps_its_promises_through_whatever_happens(
    size: int, reports_end: bool, max_running: int, declared: list[str], happens: list[Event]
) -> None:
    live(Life(size, reports_end=reports_end, max_running=max_running), declared, happens)
