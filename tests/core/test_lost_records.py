"""What is done about runs of which the ledger knows less than the world does."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from reconciler.core.actions import Conclude, Stop
from reconciler.core.call import CallEvent, CallState
from reconciler.core.call_plan import LOST
from reconciler.core.desired import Desired, Vm, at_attempt, attempted
from reconciler.core.plan import plan
from reconciler.core.vm_plan import incomplete
from reconciler.execute import Step, execute, resting
from tests.core.builders import (
    NOW,
    a_call,
    a_lease,
    a_server,
    a_settings,
    a_vm,
    absent,
    an_export,
    an_image,
    brief,
    remembered,
    seen,
    wanting,
)
from tests.fakes import FakeHost, Reply, one_pass, planned, settle

S = CallState


def applied(*vms: Vm, **settings: Any) -> tuple[FakeHost, Desired]:
    """A hub on which these VMs have been applied, and what is wanted of it."""
    host = FakeHost(a_settings(**settings))
    desired = wanting(*vms, settings=host.settings)
    settle(host, desired)
    return host, desired


def of_attempt(vm: Vm, attempt: int) -> Vm:
    return replace(vm, exports=tuple(at_attempt(export, attempt) for export in vm.exports))


def test_of_a_lost_record_no_appliance_can_deny_the_call() -> None:
    """The spec may name another appliance by now than the one that was called."""
    host, desired = applied(a_vm(), remembers_jobs=True)
    host.lose_state()
    host.snas["site-a"].jobs.clear()
    for _ in range(3):
        settle(host, desired)
    (call,) = host.records.calls.values()
    assert (call.state, call.reason) == (S.UNKNOWN, LOST)
    assert len(host.snas["site-a"].posts) == 1


def test_a_server_of_an_attempt_that_the_ledger_does_not_know_is_kept() -> None:
    """The ledger was restored from before the second attempt."""
    second = an_export(attempt=2, name="ctx-1-r1-a2-disk0", image="/backup/ctx-1/2000/r1-a2.qcow2")
    first = a_server(an_export(), 10100)
    found = plan(
        wanting(a_vm()),
        seen([first, a_server(second, 10101)], [an_image()], claims={("ctx-1", "r1"): "state-1"}),
        remembered([a_lease()], [a_call(a_vm())]),
        NOW,
    )
    assert brief(found) == [("hold", None, "CallUnknown"), ("hold", 2000, "RunActive")]
    assert not any(isinstance(action, Stop) for action in found.actions)


def test_the_lost_record_of_a_second_attempt_has_its_own_names_and_images() -> None:
    host, _ = applied(a_vm(disks=2))
    (call,) = host.records.calls.values()
    host.records.another_attempt(call, host.now(), "by order")
    settle(host, wanting(of_attempt(a_vm(disks=2), 2), settings=host.settings))
    host.lose_state()
    settle(host, wanting(a_vm(disks=2), settings=host.settings))
    (call,) = host.records.calls.values()
    assert (call.attempt, call.state) == (2, S.ACCEPTED), "its appliance knows the job"
    assert [export.name for export in call.exports] == [
        attempted("ctx-1-r1-disk0", 2),
        attempted("ctx-1-r1-disk1", 2),
    ]
    assert {export.image for export in call.exports} == {p.argv[-1] for p in host.mine()}


def test_what_is_served_without_a_record_comes_before_what_is_only_claimed() -> None:
    """The spec was put back to a run that had been claimed and never called."""
    served = a_server(an_export(run="r2"), 10101)
    found = plan(
        wanting(a_vm(run="r1")),
        seen([served], claims={("ctx-1", "r1"): "old", ("ctx-1", "r2"): "old"}),
        remembered(),
        NOW,
    )
    assert found.vms[0].call is not None
    assert found.vms[0].call.run == "r2"
    assert not any(isinstance(action, Stop) for action in found.actions)


def test_a_stop_minds_the_call_that_only_the_repository_tells_of() -> None:
    """The ledger was restored from before the call."""
    stale = a_call(a_vm(), S.DUE)
    found = plan(
        wanting(absent()),
        seen([a_server()], [an_image()], intents=frozenset({stale.key})),
        remembered([a_lease()], [stale]),
        NOW,
    )
    assert brief(found) == [("hold", None, "CallUnknown"), ("hold", 2000, "RunActive")]


def test_an_image_of_an_ended_run_is_not_made_anew() -> None:
    """An empty one in its place would pass for the backup."""
    vm = a_vm(release="keep")
    over = a_call(vm, S.COMPLETED)
    gone = plan(wanting(vm), seen(), remembered([a_lease()], [over]), NOW)
    assert brief(gone) == [("refuse", 2000, "ImageMissing")]
    drifted = a_server(argv=("qemu-nbd", "--shared", "1", an_export().image))
    moved = plan(wanting(vm), seen([drifted]), remembered([a_lease()], [over]), NOW)
    assert ("refuse", 2000, "ImageMissing") in brief(moved)
    assert not moved.changes


def test_what_died_since_the_last_apply_speaks_against_a_run_that_is_said_to_be_complete() -> None:
    host, _ = applied(a_vm())
    ledger = host.records.ledger()
    (call,) = ledger.calls
    gone = wanting(absent(), settings=host.settings)

    def verdict() -> str:
        return incomplete(gone, host.look(gone, ledger), ledger, host.now(), call)

    assert verdict() == ""
    host.server("ctx-1", 2000).clients = 2
    assert verdict() == "", "a person may know better than an appliance whether they matter"
    host.server("ctx-1", 2000).clients = 0
    host.write(host.server("ctx-1", 2000))
    host.kill(host.server("ctx-1", 2000))
    assert "a server died under a client" in verdict()


def test_a_run_that_failed_is_noted_and_what_follows_is_done_in_the_same_apply() -> None:
    vm = a_vm(release="keep")
    host, desired = applied(vm, reports_end=True)
    host.kill(host.server("ctx-1", 2000))
    sna = host.snas["site-a"]
    sna.jobs = dict.fromkeys(sna.jobs, "failed")
    steps: list[Step] = []
    one_pass(host, desired, steps=steps)
    assert [(type(s.action) is Conclude, s.ok) for s in steps] == [(True, False), (False, True)]
    assert len(host.mine()) == 1
    assert resting(steps) == set()
    assert planned(host, desired).changes == ()


def test_a_vm_rests_when_the_end_of_its_run_could_not_be_noted() -> None:
    host, desired = applied(a_vm(), reports_end=True)
    sna = host.snas["site-a"]
    sna.jobs = dict.fromkeys(sna.jobs, "failed")
    (call,) = host.records.calls.values()
    found = planned(host, desired)
    host.records.advance(call, CallEvent.SAY_FAILED, host.now())
    steps = execute(found, host, lambda _: None, parallel=1)
    assert [step.ok for step in steps] == [False]
    assert resting(steps) == {"ctx-1"}
    assert len(host.mine()) == 1


def test_a_lost_race_for_a_port_is_no_reason_to_rest() -> None:
    host = FakeHost(a_settings())
    host.unseen.add(10100)
    steps: list[Step] = []
    one_pass(host, wanting(a_vm(), settings=host.settings), steps=steps)
    assert [step.reason for step in steps] == ["PortTaken"]
    assert resting(steps) == set()


def test_a_call_that_could_not_be_sent_makes_its_vm_rest() -> None:
    host = FakeHost(a_settings())
    host.snas["site-a"].script.append(Reply.DOWN)
    steps: list[Step] = []
    one_pass(host, wanting(a_vm(), settings=host.settings), steps=steps)
    assert resting(steps) == {"ctx-1"}


def test_that_a_server_died_outlives_the_ledger() -> None:
    """It died and is served again; then the state directory is lost, and nothing looks amiss."""
    host, desired = applied(a_vm(), reports_end=True)
    host.write(host.server("ctx-1", 2000))
    host.kill(host.server("ctx-1", 2000))
    settle(host, desired)
    host.lose_state()
    settle(host, desired)
    (call,) = host.records.calls.values()
    host.snas["site-a"].jobs[call.job_id] = "completed"
    settle(host, desired)
    (call,) = host.records.calls.values()
    assert (call.state, call.reason) == (S.FAILED, "ServerDied")
