"""Stories of a hub: something happens, and the plan says what is done about it and why."""

from __future__ import annotations

import threading
from typing import Any, Final

import pytest
from msgspec.structs import replace

from reconciler.cli.text import plan_text
from reconciler.core.actions import Adopt, Conclude, Hold, Notify, Restart, Start, Stop
from reconciler.core.actual import Handshake, Identity, Listener
from reconciler.core.call import CallEvent, CallState, Report
from reconciler.core.desired import Desired, Vm, attempted, attempted_image
from reconciler.core.errors import Diagnostic, HostError
from reconciler.core.ledger import Applied
from reconciler.core.plan import Plan, plan
from reconciler.core.settings import PORTS, Settings
from reconciler.core.status import by_type, conditions
from reconciler.core.units import stamp
from reconciler.execute import Step, execute
from tests.core.builders import (
    GIB,
    NOW,
    ROOT,
    a_call,
    a_lease,
    a_restore,
    a_server,
    a_settings,
    a_vm,
    absent,
    an_export,
    an_image,
    brief,
    changed,
    only,
    remembered,
    says,
    seen,
    wanting,
)
from tests.fakes import Crash, FakeHost, FakeSna, Reply, one_pass, planned, settle

S = CallState
SSHD: Final = Listener(10100, "127.0.0.1", 77, "sshd")


def a_hub(*vms: Vm, settings: Settings | None = None) -> tuple[FakeHost, Desired]:
    """A hub on which these VMs have been applied, and what is wanted of it."""
    host = FakeHost(settings or a_settings())
    desired = wanting(*vms, settings=host.settings)
    settle(host, desired)
    return host, desired


def an_unreached_hub(*vms: Vm, settings: Settings | None = None) -> tuple[FakeHost, Desired]:
    """The same, but the SNA could not be reached: every run is DUE."""
    host = FakeHost(settings or a_settings())
    sna_of(host).script.extend([Reply.DOWN] * 9)
    desired = wanting(*vms, settings=host.settings)
    settle(host, desired, most=1)
    sna_of(host).script.clear()
    host.clock += 1000
    return host, desired


def sna_of(host: FakeHost) -> FakeSna:
    return host.snas["site-a"]


def call_of(host: FakeHost, vm: str = "ctx-1", run: str = "r1") -> Any:
    return host.records.ledger().latest(vm, run)


def end(host: FakeHost, event: CallEvent = CallEvent.END, vm: str = "ctx-1") -> None:
    """The run of a VM ends."""
    call = host.records.ledger().active(vm)
    assert call
    host.records.advance(call, event, host.now())


# -- from nothing to a backup


def test_a_new_vm_gets_images_servers_and_one_call() -> None:
    host = FakeHost(a_settings())
    desired = wanting(a_vm(disks=2))
    assert brief(planned(host, desired)) == [
        ("create", 2000, "ImageMissing"),
        ("start", 2000, "NotRunning"),
        ("create", 2001, "ImageMissing"),
        ("start", 2001, "NotRunning"),
        ("call", None, "RunDue"),
    ]
    settle(host, desired)
    assert [process.port for process in host.mine()] == [10100, 10101]
    (post,) = sna_of(host).posts
    assert post.request["nbd_targets"] == (
        "2000:nbd://127.0.0.1:10100/ctx-1-r1-disk0,2001:nbd://127.0.0.1:10101/ctx-1-r1-disk1"
    )
    assert (call_of(host).state, planned(host, desired).actions) == (S.ACCEPTED, ())


def test_what_the_appliance_is_told_is_the_wire_format() -> None:
    host, _ = a_hub(a_vm(display_name="pgtest1", path="/DC1/vm/pgtest1"))
    (post,) = sna_of(host).posts
    assert post.request == {
        "job_id": call_of(host).job_id,
        "vm_name": "pgtest1",
        "vcenter_host": "vc",
        "vcenter_user": "u",
        "vm_path": "/DC1/vm/pgtest1",
        "nbd_targets": "2000:nbd://127.0.0.1:10100/ctx-1-r1-disk0",
        "backup_type": "full",
        "previous_change_id": "",
    }


def test_an_incremental_builds_on_its_parent_and_says_so() -> None:
    base = an_export().image
    vm = replace(changed(a_vm(run="r2"), backing=base), type="incremental")
    host = FakeHost(a_settings())
    host.put(base, GIB, pristine=False)
    before = a_call(state=CallState.COMPLETED)
    host.records.calls[before.key] = before
    host.records.report(before.job_id, 0)
    settle(host, wanting(vm))
    (post,) = sna_of(host).posts
    assert (post.request["backup_type"], post.request["previous_change_id"]) == (
        "incremental",
        "ask-hub",
    )
    assert host.images[vm.exports[0].image].backing == base


def test_the_intent_and_the_targets_are_on_disk_before_a_byte_leaves() -> None:
    host = FakeHost(a_settings())
    found: list[Any] = []
    answer = sna_of(host).answer

    def watched(post: Any) -> Any:
        found.append(
            (call_of(host).state, dict(host.records.targets), dict(host.claims), set(host.intents))
        )
        return answer(post)

    sna_of(host).answer = watched  # type: ignore[method-assign]
    settle(host, wanting(a_vm()))
    ((state, targets, claims, intents),) = found
    assert state is S.INTENDED
    assert list(targets.values()) == ["2000:nbd://127.0.0.1:10100/ctx-1-r1-disk0"]
    assert claims == {(ROOT, "ctx-1", "r1"): "state-1"}
    assert intents == {("ctx-1", "r1", 1)}


def test_a_run_that_was_made_is_not_made_again_after_absent() -> None:
    host, desired = a_hub(a_vm())
    end(host)
    settle(host, wanting(absent()))
    settle(host, desired)
    assert len(sna_of(host).started) == 1
    assert host.mine() == []


def test_a_new_run_is_a_new_backup_with_names_of_its_own() -> None:
    host, _ = a_hub(a_vm())
    end(host)
    desired = wanting(a_vm(run="r2"))
    assert brief(planned(host, desired)) == [
        ("stop", 2000, "RunOver"),
        ("create", 2000, "ImageMissing"),
        ("start", 2000, "NotRunning"),
        ("call", None, "RunDue"),
    ]
    settle(host, desired)
    assert [process.name for process in host.mine()] == ["ctx-1-r2-disk0"]
    assert len(set(sna_of(host).started)) == 2


# -- servers that die, hang or drift


def test_a_killed_server_comes_back_on_its_own_port_and_nothing_else_happens() -> None:
    host, desired = a_hub(a_vm(disks=3), a_vm("ctx-2", disks=2))
    victim = host.server("ctx-1", 2001)
    others = [process.identity for process in host.mine() if process is not victim]
    host.kill(victim)
    restart = only(planned(host, desired))
    assert isinstance(restart, Restart)
    assert (restart.disk, restart.cause, restart.lease.port) == (2001, "ProcessGone", victim.port)
    assert not restart.taints
    settle(host, desired)
    assert host.server("ctx-1", 2001).port == victim.port
    assert [p.identity for p in host.mine() if p.identity in others] == others
    assert len(sna_of(host).posts) == 2
    assert planned(host, desired).actions == ()


def test_a_server_that_a_client_had_written_to_taints_its_run() -> None:
    host, desired = a_hub(a_vm(disks=2))
    host.write(host.server("ctx-1", 2001))
    host.kill(host.server("ctx-1", 2001))
    restart = only(planned(host, desired))
    assert isinstance(restart, Restart)
    assert restart.taints
    says(restart.why, "a client had written", "ServerDied")
    settle(host, desired)
    assert call_of(host).tainted
    assert call_of(host).state is S.ACCEPTED
    assert len(host.mine()) == 2


def test_a_client_that_was_seen_is_enough_to_taint() -> None:
    host, desired = a_hub(a_vm())
    host.server("ctx-1", 2000).clients = 2
    settle(host, desired)
    host.kill(host.server("ctx-1", 2000))
    settle(host, desired)
    assert call_of(host).tainted


def test_with_writethrough_nothing_is_lost_and_nothing_tainted() -> None:
    host, desired = a_hub(a_vm(), settings=a_settings(cache="writethrough"))
    host.write(host.server("ctx-1", 2000))
    host.kill(host.server("ctx-1", 2000))
    settle(host, desired)
    assert not call_of(host).tainted


def test_writethrough_after_the_fact_does_not_undo_a_loss() -> None:
    """What counts is how the server ran that died, not how the next one will."""
    host, _ = a_hub(a_vm())
    host.write(host.server("ctx-1", 2000))
    host.settings = a_settings(cache="writethrough")
    desired = wanting(a_vm(), settings=host.settings)
    settle(host, desired)
    host.kill(host.server("ctx-1", 2000))
    settle(host, desired)
    assert call_of(host).tainted


def test_a_server_that_was_left_behind_in_the_act_of_starting_taints_as_any_other() -> None:
    """The process that started it ended before it could note that it had come up."""
    host = FakeHost(a_settings(reports_end=True))
    desired = wanting(a_vm(), settings=host.settings)
    for steps in range(40):
        host = FakeHost(host.settings)
        host.fuse.left = steps
        try:
            settle(host, desired)
        except Crash:
            host.crash()
        if host.mine() and not host.records.ledger().leases[0].started:
            break
    settle(host, desired)
    assert call_of(host).state is S.ACCEPTED
    host.write(host.server("ctx-1", 2000))
    host.kill(host.server("ctx-1", 2000))
    settle(host, desired)
    assert call_of(host).tainted
    sna_of(host).jobs[call_of(host).job_id] = "completed"
    settle(host, desired)
    assert (call_of(host).state, call_of(host).reason) == (S.FAILED, "ServerDied")


def test_a_server_whose_start_was_not_noted_is_noted_when_it_is_seen() -> None:
    ledger = remembered([a_lease(started=False)], [a_call()])
    adopt = only(plan(wanting(a_vm()), seen([a_server()], [an_image()]), ledger, NOW))
    assert (adopt.kind, adopt.disk, adopt.cause) == ("adopt", 2000, "NotInLedger")


def test_a_server_that_nobody_saw_start_and_that_is_gone_may_have_lost_writes_too() -> None:
    ledger = remembered([a_lease(started=False, clients_seen=True)], [a_call()])
    restart = only(plan(wanting(a_vm()), seen([], [an_image(pristine=False)]), ledger, NOW))
    assert isinstance(restart, Restart)
    assert restart.taints


def test_a_silent_server_is_restarted_at_zero_clients() -> None:
    host, desired = a_hub(a_vm(disks=2))
    host.server("ctx-1", 2000).silent = True
    assert brief(planned(host, desired)) == [("restart", 2000, "NoAnswer")]
    settle(host, desired)
    assert planned(host, desired).actions == ()


def test_a_silent_server_with_clients_is_held() -> None:
    host, desired = a_hub(a_vm(disks=2))
    before = host.server("ctx-1", 2000)
    before.silent, before.clients = True, 2
    hold = only(planned(host, desired))
    assert (hold.kind, hold.disk, hold.cause) == ("hold", 2000, "NoAnswerInUse")
    says(hold.why, "does not answer: no answer in time", "2 clients are connected to port 10100")
    settle(host, desired)
    assert host.server("ctx-1", 2000) is before


def test_a_server_with_all_slots_in_use_is_held() -> None:
    host, desired = a_hub(a_vm())
    host.server("ctx-1", 2000).clients = 10
    hold = only(planned(host, desired))
    assert hold.cause == "NoAnswerInUse"
    says(hold.why, "all 10 slots are in use")


@pytest.mark.parametrize("event", ["a client comes", "it answers again"])
def test_a_restart_looks_a_second_time(event: str) -> None:
    host, desired = a_hub(a_vm())
    before = host.server("ctx-1", 2000)
    before.silent = True
    again = host.look_again

    def later(server: Any, export: Any) -> Any:
        before.silent = event == "a client comes"
        before.clients = 2 if event == "a client comes" else 0
        return again(server, export)

    host.look_again = later  # type: ignore[method-assign]
    one_pass(host, desired)
    assert host.server("ctx-1", 2000) is before
    assert host.ended == []


def test_a_client_that_comes_before_a_restart_does_not_taint_the_run() -> None:
    host, desired = a_hub(a_vm())
    process = host.server("ctx-1", 2000)
    host.write(process)
    process.silent = True
    again = host.look_again

    def later(server: Any, export: Any) -> Any:
        process.clients = 2
        return again(server, export)

    host.look_again = later  # type: ignore[method-assign]
    one_pass(host, desired)
    assert host.server("ctx-1", 2000) is process
    assert not call_of(host).tainted


def test_a_client_that_comes_in_the_last_moment_keeps_its_server() -> None:
    host, desired = a_hub(a_vm())
    process = host.server("ctx-1", 2000)
    process.silent = True
    stop = host.stop

    def later(server: Any, *, kill_clients: bool) -> None:
        process.clients = 2
        stop(server, kill_clients=kill_clients)

    host.stop = later  # type: ignore[method-assign]
    one_pass(host, desired)
    assert host.server("ctx-1", 2000) is process


def drifted(vm: Vm | None = None) -> tuple[FakeHost, Desired]:
    """A hub whose qemu-nbd settings were changed after the servers had come up."""
    host, desired = a_hub(vm or a_vm(disks=2))
    host.settings = a_settings(cache="writethrough")
    return host, wanting(*desired.vms.values(), settings=host.settings)


def test_drift_under_a_run_that_was_accepted_is_held() -> None:
    host, desired = drifted()
    found = [(action.kind, action.disk) for action in planned(host, desired).actions]
    assert found == [("hold", 2000), ("hold", 2001)]
    says(planned(host, desired).actions[0].why, "--cache", "its run r1 is ACCEPTED")
    before = [process.identity for process in host.mine()]
    settle(host, desired)
    assert [process.identity for process in host.mine()] == before


def test_drift_before_the_call_is_mended_before_the_call() -> None:
    host, desired = an_unreached_hub(a_vm(disks=2))
    host.settings = a_settings(cache="writethrough")
    desired = wanting(*desired.vms.values(), settings=host.settings)
    assert brief(planned(host, desired)) == [
        ("restart", 2000, "SpecChanged"),
        ("restart", 2001, "SpecChanged"),
        ("call", None, "RunDue"),
    ]
    settle(host, desired)
    assert all("writethrough" in process.argv for process in host.mine())


def test_drift_under_a_client_is_held() -> None:
    host, _ = an_unreached_hub(a_vm())
    host.settings = a_settings(cache="writethrough")
    host.server("ctx-1", 2000).clients = 1
    hold = only(planned(host, wanting(a_vm(), settings=host.settings)))
    assert (hold.kind, hold.cause) == ("hold", "SpecChangedInUse")


def test_a_protected_server_is_not_restarted() -> None:
    host, desired = an_unreached_hub(a_vm(protect=True))
    host.server("ctx-1", 2000).silent = True
    hold = only(planned(host, desired))
    assert (hold.kind, hold.cause) == ("hold", "Protected")
    says(hold.why, "protect: true")


def test_a_server_that_serves_another_size_is_refused_and_not_called_for() -> None:
    host, _ = an_unreached_hub(a_vm())
    desired = wanting(changed(a_vm(), size=2 * GIB))
    refusal = only(planned(host, desired))
    assert (refusal.kind, refusal.cause) == ("refuse", "SizeMismatch")
    says(refusal.why, "1 GiB (1073741824 bytes)", "2 GiB")


def test_a_server_that_does_not_listen_is_restarted() -> None:
    host, desired = a_hub(a_vm())
    host.server("ctx-1", 2000).port = None
    assert brief(planned(host, desired)) == [("restart", 2000, "ListensElsewhere")]


def test_a_server_that_is_starting_is_waited_for() -> None:
    export = an_export()
    host = plan(
        wanting(a_vm()),
        seen([a_server(starting=True, handshake=None)], [an_image(export)]),
        remembered([a_lease(started=False)], [a_call(state=S.DUE)]),
        NOW,
    )
    assert brief(host) == [("wait", 2000, "Starting")]


def test_a_server_that_the_ledger_lost_is_taken_in_again() -> None:
    host, desired = a_hub(a_vm(disks=2))
    before = [process.identity for process in host.mine()]
    host.records.leases.clear()
    assert brief(planned(host, desired)) == [
        ("adopt", 2000, "NotInLedger"),
        ("adopt", 2001, "NotInLedger"),
    ]
    settle(host, desired)
    assert planned(host, desired).actions == ()
    assert [process.identity for process in host.mine()] == before


def test_a_server_that_runs_on_another_port_than_its_lease_says_is_believed() -> None:
    ledger = remembered([a_lease(port=10100)], [a_call(state=S.DUE)])
    found = plan(wanting(a_vm()), seen([a_server(port=10105)], [an_image()]), ledger, NOW)
    adopt, _ = found.actions
    assert isinstance(adopt, Adopt)
    assert (adopt.cause, adopt.lease.port) == ("NotInLedger", 10105)
    assert found.vms[0].ports == {2000: 10105}


def test_of_two_servers_of_one_disk_the_one_with_the_lease_stays() -> None:
    host, desired = a_hub(a_vm())
    twin = host.spawn(host.server("ctx-1", 2000).argv, 10105)
    twin.argv = tuple(word.replace("port=10100", "port=10105") for word in twin.argv)
    end(host)
    desired = wanting(a_vm(release="keep"))
    assert brief(planned(host, desired)) == [("stop", 2000, "RunEnded")]
    settle(host, desired)
    assert [process.port for process in host.mine()] == [10100]
    assert len(host.records.leases) == 1


# -- ports


def test_with_no_ports_left_a_vm_waits_and_holds_none() -> None:
    host, _ = a_hub(a_vm(), settings=a_settings("10100-10102"))
    desired = wanting(a_vm(), a_vm("ctx-2", disks=3), settings=host.settings)
    wait = only(planned(host, desired))
    assert (wait.vm, wait.kind, wait.cause) == ("ctx-2", "wait", "PortPoolExhausted")
    says(wait.why, "3 ports are needed", "2 of 10100-10102 (3 ports) are free")
    settle(host, desired)
    assert [lease.vm for lease in host.records.ledger().leases] == ["ctx-1"]
    assert {path for path in host.images if "ctx-2" in path} == set()


def test_a_vm_that_fits_goes_ahead_of_one_that_does_not() -> None:
    host = FakeHost(a_settings("10100-10102"))
    desired = wanting(a_vm("ctx-1", disks=4), a_vm("ctx-2", disks=3), settings=host.settings)
    settle(host, desired)
    assert {process.port for process in host.mine()} == {10100, 10101, 10102}
    assert brief(planned(host, desired)) == [("refuse", None, "RangeTooSmall")]


def test_a_waiting_vm_goes_on_when_ports_come_free() -> None:
    host, _ = a_hub(a_vm(disks=2), settings=a_settings("10100-10102"))
    desired = wanting(a_vm(disks=2), a_vm("ctx-2", disks=3), settings=host.settings)
    settle(host, desired)
    end(host)
    settle(host, desired)
    assert [(p.port, p.name) for p in host.mine()] == [
        (10100, "ctx-2-r1-disk0"),
        (10101, "ctx-2-r1-disk1"),
        (10102, "ctx-2-r1-disk2"),
    ]


def test_a_vm_that_waits_for_a_disk_more_gives_back_the_ports_it_has() -> None:
    """Two such VMs would wait for each other's ports for ever."""
    host = FakeHost(a_settings("10100-10103"))
    host.failing = {(vm, key) for vm in ("ctx-1", "ctx-2") for key in (2000, 2001)}
    settle(host, wanting(a_vm(disks=2), a_vm("ctx-2", disks=2), settings=host.settings))
    host.failing.clear()
    desired = wanting(a_vm(disks=3), a_vm("ctx-2", disks=3), settings=host.settings)
    settle(host, desired)
    settle(host, desired)
    assert len(host.mine()) == 3


def test_a_stranger_on_a_leased_port_sends_the_vm_to_new_ones_before_the_intent() -> None:
    host, desired = an_unreached_hub(a_vm(disks=2))
    for process in host.mine():
        host.kill(process)
    host.listeners[10100] = SSHD
    found = planned(host, desired)
    assert brief(found) == [
        ("start", 2000, "PortTaken"),
        ("start", 2001, "PortTaken"),
        ("call", None, "RunDue"),
    ]
    says(found.actions[0].why, "its port 10100 was taken by sshd (pid 77) on 127.0.0.1:10100")
    settle(host, desired)
    assert [process.port for process in host.mine()] == [10102, 10103]
    assert {lease.port for lease in host.records.leases.values()} == {10102, 10103}
    assert "10102" in sna_of(host).posts[0].request["nbd_targets"]


@pytest.mark.parametrize("state", [S.INTENDED, S.ACCEPTED, S.UNKNOWN])
def test_a_stranger_on_a_port_that_the_appliance_was_told_is_named_and_waited_for(
    state: CallState,
) -> None:
    host, desired = a_hub(a_vm(disks=2))
    host.records.calls = {k: replace(c, state=state) for k, c in host.records.calls.items()}
    sna_of(host).deaf = True
    host.kill(host.server("ctx-1", 2000))
    host.listeners[10100] = SSHD
    holds = [a for a in planned(host, desired).actions if a.disk]
    assert brief(holds) == [("hold", 2000, "PortTaken")]
    says(holds[0].why, "sshd (pid 77)", "the appliance was told that port")
    settle(host, desired)
    assert [process.port for process in host.mine()] == [10101]
    host.listeners.clear()
    settle(host, desired)
    assert [process.port for process in host.mine()] == [10100, 10101]


def test_a_port_that_cannot_be_bound_though_nobody_is_seen_is_passed_over() -> None:
    host = FakeHost(a_settings())
    host.unseen = {10100}
    settle(host, wanting(a_vm(disks=2)))
    assert [process.port for process in host.mine()] == [10101, 10102]
    assert len(sna_of(host).started) == 1


def test_strangers_are_listed_and_not_planned_around_by_force() -> None:
    host = FakeHost(a_settings())
    host.listeners[10100] = SSHD
    host.spawn(("qemu-nbd", "-p", "10101", "/x.raw"), 10101)
    found = planned(host, wanting(a_vm()))
    assert [str(one) for one in found.strangers] == [
        "sshd (pid 77) on 127.0.0.1:10100",
        "qemu-nbd (pid 4001) on 127.0.0.1:10101",
    ]
    assert [(one.image, one.ports) for one in found.foreign] == [("/x.raw", (10101,))]
    start = next(action for action in found.actions if isinstance(action, Start))
    assert start.lease.port == 10102


# -- images


def test_an_image_with_data_of_somebody_else_is_not_written_to() -> None:
    host = FakeHost(a_settings())
    host.put(an_export().image, GIB, pristine=False)
    desired = wanting(a_vm(disks=2))
    refusal = only(planned(host, desired))
    assert (refusal.kind, refusal.disk, refusal.cause) == ("refuse", 2000, "ImageNotEmpty")
    settle(host, desired)
    assert host.mine() == []


def test_an_empty_image_is_used_as_it_is() -> None:
    host = FakeHost(a_settings())
    host.put(an_export().image, GIB)
    assert brief(planned(host, wanting(a_vm()))) == [
        ("start", 2000, "NotRunning"),
        ("call", None, "RunDue"),
    ]


def test_an_image_that_somebody_put_in_our_way_is_never_taken_for_ours() -> None:
    """It came between the look and the creation, so the run is in the ledger already."""
    host = FakeHost(a_settings())
    create = host.create

    def too_late(export: Any, root: str) -> None:
        host.put(export.image, export.size, pristine=False)
        create(export, root)

    host.create = too_late  # type: ignore[method-assign]
    one_pass(host, wanting(a_vm()))
    assert host.mine() == []
    assert brief(planned(host, wanting(a_vm()))) == [("refuse", 2000, "ImageNotEmpty")]


def test_an_image_that_vanishes_under_a_run_is_not_made_anew() -> None:
    host, desired = a_hub(a_vm())
    host.kill(host.server("ctx-1", 2000))
    del host.images[an_export().image]
    refusal = only(planned(host, desired))
    assert (refusal.kind, refusal.cause) == ("refuse", "ImageMissing")
    says(refusal.why, "of the active run is gone")


def test_an_image_that_is_moved_away_from_under_a_run_is_told_and_held() -> None:
    host, desired = a_hub(a_vm(), settings=a_settings(reports_end=True))
    process = host.server("ctx-1", 2000)
    host.move_away(process)
    hold = only(planned(host, desired))
    assert (hold.kind, hold.disk, hold.cause) == ("hold", 2000, "ImageReplaced")
    says(hold.why, "has another file open", "moved, deleted or replaced", "put it back")
    settle(host, desired)
    assert host.mine() == [process]
    sna_of(host).jobs[call_of(host).job_id] = "completed"
    settle(host, desired)
    assert call_of(host).state is S.FAILED
    says(call_of(host).message, an_export().image, "moved, deleted or replaced")


def test_an_image_that_is_moved_away_before_the_call_is_made_anew() -> None:
    host, desired = an_unreached_hub(a_vm())
    host.move_away(host.server("ctx-1", 2000))
    assert brief(planned(host, desired)) == [
        ("create", 2000, "ImageMissing"),
        ("restart", 2000, "ImageReplaced"),
        ("call", None, "RunDue"),
    ]
    settle(host, desired)
    assert not host.server("ctx-1", 2000).detached
    assert call_of(host).state is S.ACCEPTED


def test_an_image_that_another_vm_serves_is_not_served_twice() -> None:
    host, _ = a_hub(a_vm("ctx-2"))
    image = an_export("ctx-2").image
    refusal = only(planned(host, wanting(changed(a_vm(), image=image))))
    assert (refusal.kind, refusal.cause) == ("refuse", "ImageInUse")
    says(refusal.why, "pid 4001", "VM ctx-2", "run r1")


def test_an_image_of_another_vms_active_run_is_not_served_though_its_server_is_down() -> None:
    host, _ = a_hub(a_vm("ctx-2"))
    host.kill(host.server("ctx-2", 2000))
    refusal = only(planned(host, wanting(changed(a_vm(), image=an_export("ctx-2").image))))
    assert (refusal.cause, refusal.why.endswith("active run of ctx-2")) == ("ImageInUse", True)


def test_an_image_that_a_stranger_serves_is_not_served() -> None:
    host = FakeHost(a_settings())
    host.put(an_export().image, GIB)
    host.spawn(("qemu-nbd", "-k", "/run/x", an_export().image), None)
    refusal = only(planned(host, wanting(a_vm())))
    assert refusal.cause == "ImageLocked"
    says(refusal.why, "a qemu-nbd without our mark (pid 4001)", "not ours")


def test_nothing_is_built_on_an_image_that_is_being_written() -> None:
    host, _ = a_hub(a_vm("ctx-2"))
    vm = changed(a_vm(run="r2", type="incremental"), backing=an_export("ctx-2").image)
    refusal = only(planned(host, wanting(vm)))
    assert (refusal.cause, "is being written" in refusal.why) == ("ParentWritten", True)


def test_storage_that_cannot_be_read_changes_nothing() -> None:
    host, desired = a_hub(a_vm(disks=2))
    host.kill(host.server("ctx-1", 2000))
    host.unreadable[ROOT] = "input/output error"
    refusal = only(planned(host, desired))
    assert (refusal.kind, refusal.cause) == ("refuse", "StorageUnreadable")
    says(refusal.why, "input/output error", "nothing of this VM is changed")


# -- the call, its outcome and its witnesses


def test_a_call_of_which_nothing_was_sent_is_tried_again_after_a_rest() -> None:
    host = FakeHost(a_settings())
    sna_of(host).script.extend([Reply.DOWN, Reply.UNSENT])
    desired = wanting(a_vm())
    one_pass(host, desired)
    assert (call_of(host).state, call_of(host).failures) == (S.DUE, 1)
    wait = only(planned(host, desired))
    assert (wait.kind, wait.cause) == ("wait", "BackOff")
    says(wait.why, "connection refused", "next try in 2 s")
    assert planned(host, desired).vms[0].again_at == call_of(host).retry_at
    host.clock = call_of(host).retry_at
    one_pass(host, desired)
    assert (call_of(host).state, call_of(host).failures) == (S.DUE, 2)
    assert 4 <= call_of(host).retry_at - host.now() <= 4.4
    host.clock = call_of(host).retry_at
    call = only(planned(host, desired))
    assert isinstance(call, Notify)
    says(call.why, "tried 2 times", "connection refused")
    one_pass(host, desired)
    assert (call_of(host).state, call_of(host).failures) == (S.ACCEPTED, 0)


def test_a_refused_call_is_not_repeated_by_itself() -> None:
    host = FakeHost(a_settings())
    sna_of(host).script.append(Reply.REJECT)
    desired = wanting(a_vm())
    settle(host, desired)
    assert call_of(host).state is S.REJECTED
    host.clock += 10_000
    refusal = only(planned(host, desired))
    assert (refusal.kind, refusal.cause) == ("refuse", "CallRejected")
    says(refusal.why, "400", "vm_path is required", "reconciler retry ctx-1")


@pytest.mark.parametrize(
    "mended",
    [
        wanting(a_vm(path="/DC1/vm/right")),
        wanting(changed(a_vm(), name="other-r1-disk0")),
        wanting(a_vm(type="incremental")),
        wanting(a_vm(request="as another user")),
    ],
)  # fmt: skip
def test_a_changed_spec_or_config_asks_again_for_a_run_that_was_refused(mended: Desired) -> None:
    host = FakeHost(a_settings())
    sna_of(host).script.append(Reply.REJECT)
    settle(host, wanting(a_vm()))
    host.settings = mended.settings
    found = planned(host, mended)
    assert brief(found)[-1] == ("call", None, "RunRearmed")
    settle(host, mended)
    assert call_of(host).state is S.ACCEPTED
    assert len(sna_of(host).started) == 1
    assert planned(host, mended).actions == ()


def test_a_crash_while_asking_again_leaves_the_run_asked_for_again() -> None:
    mended = wanting(a_vm(path="/DC1/vm/right"))
    for steps in range(12):
        host = FakeHost(a_settings())
        sna_of(host).script.append(Reply.REJECT)
        settle(host, wanting(a_vm()))
        host.fuse.left = steps
        try:
            settle(host, mended)
        except Crash:
            host.crash()
        host.fuse.left = None
        settle(host, mended)
        assert call_of(host).state in (S.ACCEPTED, S.UNKNOWN), steps


def test_an_unclear_answer_is_held_for_a_person() -> None:
    host = FakeHost(a_settings())
    sna_of(host).script.append(Reply.BROKEN)
    desired = wanting(a_vm())
    settle(host, desired)
    assert call_of(host).state is S.UNKNOWN
    host.clock += 10_000
    hold = only(planned(host, desired))
    assert (hold.kind, hold.cause) == ("hold", "CallUnknown")
    says(
        hold.why,
        "it answered 500: failed to start backup",
        "its status says: it does not know the job",
        "not called again by itself",
        "reconciler resolve ctx-1 --accepted --reason WHY (or --completed, --failed, --resend)",
    )
    assert len(host.mine()) == 1


def test_a_crash_after_the_intent_is_an_unknown_outcome() -> None:
    host, desired = a_hub(a_vm())
    sna_of(host).jobs.clear()
    host.records.calls = {
        k: replace(c, state=S.INTENDED, message="") for k, c in host.records.calls.items()
    }
    hold = only(planned(host, desired))
    assert isinstance(hold, Hold)
    assert (hold.cause, hold.event) == ("CallUnknown", CallEvent.CRASH)
    says(hold.why, "we ended between the intent and the answer")
    settle(host, desired)
    assert call_of(host).state is S.UNKNOWN
    assert len(sna_of(host).started) == 1


@pytest.mark.parametrize("state", [S.INTENDED, S.UNKNOWN])
def test_an_appliance_that_knows_the_job_is_a_witness(state: CallState) -> None:
    host, desired = a_hub(a_vm())
    host.records.calls = {k: replace(c, state=state) for k, c in host.records.calls.items()}
    found = planned(host, desired)
    assert brief(found) == [("adopt", None, "WitnessedByAppliance")]
    settle(host, desired)
    assert call_of(host).state is S.ACCEPTED
    assert len(sna_of(host).started) == 1


@pytest.mark.parametrize(("remembers", "started"), [(False, 0), (True, 1)])
def test_not_found_is_a_no_only_from_an_appliance_that_remembers(
    remembers: bool, started: int
) -> None:
    host = FakeHost(a_settings(remembers_jobs=remembers))
    sna_of(host).script.append(Reply.BROKEN)
    desired = wanting(a_vm(), settings=host.settings)
    settle(host, desired)
    assert len(sna_of(host).started) == started


def test_an_appliance_that_cannot_be_asked_is_no_witness() -> None:
    host = FakeHost(a_settings(remembers_jobs=True))
    sna_of(host).script.append(Reply.DROP_AFTER)
    sna_of(host).deaf = True
    desired = wanting(a_vm(), settings=host.settings)
    settle(host, desired)
    assert call_of(host).state is S.UNKNOWN
    assert len(sna_of(host).started) == 1


def test_a_run_that_its_appliance_reports_complete_is_ended_and_released() -> None:
    host, desired = a_hub(a_vm(disks=2), settings=a_settings(reports_end=True))
    host.write(host.server("ctx-1", 2001))
    sna_of(host).jobs[call_of(host).job_id] = "completed"
    assert brief(planned(host, desired)) == [
        ("release", None, "RunCompleted"),
        ("stop", 2000, "RunEnded"),
        ("stop", 2001, "RunEnded"),
    ]
    settle(host, desired)
    assert call_of(host).state is S.COMPLETED
    assert host.mine() == []
    assert host.records.leases == {}
    assert planned(host, desired).actions == ()


def test_a_run_that_its_appliance_reports_failed_is_failed() -> None:
    host, desired = a_hub(a_vm(), settings=a_settings(reports_end=True))
    sna_of(host).jobs[call_of(host).job_id] = "failed"
    conclude = planned(host, desired).actions[0]
    assert isinstance(conclude, Conclude)
    assert (conclude.event, conclude.cause) == (CallEvent.FAIL, "RunFailed")
    settle(host, desired)
    assert (call_of(host).state, host.mine()) == (S.FAILED, [])


def test_an_appliance_whose_word_does_not_end_a_run_does_not_end_it() -> None:
    call = a_call()
    ledger = remembered([a_lease()], [call])
    actual = seen([a_server()], [an_image()], reports={call.job_id: Report(True, "completed")})
    assert plan(wanting(a_vm()), actual, ledger, NOW).actions == ()


def test_a_tainted_run_can_only_fail_whatever_its_appliance_reports() -> None:
    host, desired = a_hub(a_vm(), settings=a_settings(reports_end=True))
    host.write(host.server("ctx-1", 2000))
    host.kill(host.server("ctx-1", 2000))
    settle(host, desired)
    sna_of(host).jobs[call_of(host).job_id] = "completed"
    settle(host, desired)
    assert (call_of(host).state, call_of(host).reason) == (S.FAILED, "ServerDied")
    says(call_of(host).message, "a server died under a client", "reports completed")


def test_a_server_found_dead_when_the_end_is_reported_fails_the_run_too() -> None:
    host, desired = a_hub(a_vm(), settings=a_settings(reports_end=True))
    host.write(host.server("ctx-1", 2000))
    host.kill(host.server("ctx-1", 2000))
    sna_of(host).jobs[call_of(host).job_id] = "completed"
    settle(host, desired)
    assert (call_of(host).state, call_of(host).reason) == (S.FAILED, "ServerDied")


def test_a_run_is_not_failed_because_its_image_cannot_be_looked_at_just_now() -> None:
    host, desired = a_hub(a_vm(), settings=a_settings(reports_end=True))
    host.write(host.server("ctx-1", 2000))
    path = an_export().image
    image = host.images[path]
    host.images[path] = replace(image, error="input/output error")
    sna_of(host).jobs[call_of(host).job_id] = "completed"
    settle(host, desired)
    assert call_of(host).state is S.ACCEPTED
    host.images[path] = image
    settle(host, desired)
    assert call_of(host).state is S.COMPLETED


def test_a_secret_that_cannot_be_read_is_found_before_the_call() -> None:
    host, desired = an_unreached_hub(a_vm())
    host.unreadable["vcenter vc1"] = "cannot read the secret file /x: permission denied"
    refusal = only(planned(host, desired))
    assert (refusal.kind, refusal.cause) == ("refuse", "SecretUnreadable")
    says(refusal.why, "vcenter vc1", "permission denied")


def test_a_disk_that_goes_away_just_before_the_call_stops_the_call() -> None:
    host = FakeHost(a_settings())
    desired = wanting(a_vm(disks=2))
    silent = host.silent

    def too_late(exports: Any, ports: Any) -> list[str]:
        if len(host.mine()) == 2:
            host.kill(host.server("ctx-1", 2001))
        return silent(exports, ports)

    host.silent = too_late  # type: ignore[method-assign]
    steps: list[Step] = []
    one_pass(host, desired, steps=steps)
    assert (steps[-1].reason, sna_of(host).posts) == ("NotReady", [])
    says(steps[-1].message, "no call", "disk 2001")


def test_a_call_that_another_process_makes_meanwhile_is_not_made_twice() -> None:
    host = FakeHost(a_settings())
    line = host.line

    def meanwhile(sna: str) -> Any:
        call = call_of(host)
        host.records.calls[call.key] = replace(call, state=S.INTENDED)
        return line(sna)

    host.line = meanwhile  # type: ignore[method-assign]
    one_pass(host, wanting(a_vm()))
    assert sna_of(host).posts == []
    assert call_of(host).state is S.INTENDED


def test_an_intent_that_cannot_be_written_down_stops_the_call() -> None:
    host = FakeHost(a_settings())
    advance = host.records.advance

    def full(call: Any, event: CallEvent, now: float, **changes: Any) -> Any:
        if event is CallEvent.INTEND:
            raise HostError("cannot write to the store: no space left on device", "Store")
        return advance(call, event, now, **changes)

    host.records.advance = full  # type: ignore[method-assign]
    one_pass(host, wanting(a_vm()))
    assert sna_of(host).posts == []


@pytest.mark.parametrize("method", ["hold", "started", "release", "advance", "taint"])
def test_a_store_that_cannot_be_written_to_is_told_and_not_raised(method: str) -> None:
    """Whatever it hits, the steps of the other VMs must not be lost with it."""
    host, _ = a_hub(a_vm("ctx-1"), a_vm("ctx-2"))
    end(host, vm="ctx-2")
    host.write(host.server("ctx-1", 2000))
    host.kill(host.server("ctx-1", 2000))
    desired = wanting(a_vm("ctx-1"), absent("ctx-2"), a_vm("ctx-3"))

    def full(*args: Any, **kwargs: Any) -> Any:
        raise HostError("cannot write to the store: no space left on device", "Store")

    setattr(host.records, method, full)
    steps: list[Step] = []
    one_pass(host, desired, steps=steps)
    assert {step.reason for step in steps if not step.ok} == {"Store"}


def test_one_disk_that_fails_does_not_keep_the_others_down() -> None:
    host = FakeHost(a_settings())
    host.failing.add(("ctx-1", 2001))
    steps: list[Step] = []
    one_pass(host, wanting(a_vm(disks=3)), steps=steps)
    assert [process.port for process in host.mine()] == [10100, 10102]
    assert [(s.action.disk, s.reason) for s in steps if not s.ok] == [(2001, "StartFailed")]
    assert sna_of(host).posts == []


def test_an_image_that_cannot_be_created_is_not_served() -> None:
    host = FakeHost(a_settings())
    create = host.create

    def full(export: Any, root: str) -> None:
        if export.key == 2000:
            raise HostError("cannot create it: no space left on device", "CannotCreate")
        create(export, root)

    host.create = full  # type: ignore[method-assign]
    steps: list[Step] = []
    one_pass(host, wanting(a_vm(disks=2)), steps=steps)
    assert [s.reason for s in steps if not s.ok] == ["CannotCreate", "Skipped"]
    assert [process.port for process in host.mine()] == [10101]


def test_a_vm_gets_no_port_when_one_of_them_is_lost_in_a_race() -> None:
    host = FakeHost(a_settings())
    reserve = host.reserve

    def race(port: int) -> Any:
        if port == 10101:
            host.listeners[10101] = SSHD
        return reserve(port)

    host.reserve = race  # type: ignore[method-assign]
    desired = wanting(a_vm(disks=2))
    steps: list[Step] = []
    one_pass(host, desired, steps=steps)
    assert [(step.ok, step.reason) for step in steps] == [(False, "PortTaken")]
    assert (host.mine(), host.records.leases, host.sockets, host.images) == ([], {}, set(), {})
    settle(host, desired)
    assert [process.port for process in host.mine()] == [10100, 10102]


def test_who_is_asked_to_end_begins_nothing_new() -> None:
    host = FakeHost(a_settings())
    desired = wanting(a_vm())
    stopping = threading.Event()
    stopping.set()
    execute(planned(host, desired), host, lambda step: None, stopping=stopping)
    assert (host.mine(), host.records.leases, sna_of(host).posts) == ([], {}, [])


def test_who_is_asked_to_end_before_the_call_does_not_make_it() -> None:
    host = FakeHost(a_settings())
    desired = wanting(a_vm())
    stopping = threading.Event()
    start = host.start

    def last(export: Any, lease: Any, listener: Any) -> None:
        start(export, lease, listener)
        stopping.set()

    host.start = last  # type: ignore[method-assign]
    execute(planned(host, desired), host, lambda step: None, stopping=stopping)
    assert len(host.mine()) == 1
    assert sna_of(host).posts == []


# -- one run at a time


def test_a_changed_run_is_refused_and_both_sides_are_shown() -> None:
    host, _ = a_hub(a_vm(disks=2))
    before = [process.identity for process in host.mine()]
    desired = wanting(a_vm(disks=3))
    refusal = only(planned(host, desired))
    assert (refusal.kind, refusal.cause) == ("refuse", "RunChanged")
    says(refusal.why, "r1 is ACCEPTED", "the disks 2000, 2001", "now names 2000, 2001, 2002")
    settle(host, desired)
    assert [process.identity for process in host.mine()] == before


@pytest.mark.parametrize("state", [S.INTENDED, S.ACCEPTED, S.UNKNOWN])
@pytest.mark.parametrize(
    "change", [{"image": f"{ROOT}/other"}, {"size": 2 * GIB}, {"name": "x-r1-disk0"}]
)
def test_no_change_to_a_run_that_was_asked_for_is_followed(
    state: CallState, change: dict[str, Any]
) -> None:
    ledger = remembered([a_lease()], [a_call(state=state)])
    actual = seen([a_server()], [an_image()])
    found = plan(wanting(changed(a_vm(), **change)), actual, ledger, NOW)
    assert ("refuse", None, "RunChanged") in brief(found)
    assert not any(isinstance(action, Start | Restart | Notify) for action in found.actions)


@pytest.mark.parametrize("state", [S.COMPLETED, S.FAILED, S.CANCELLED])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 2 * GIB}, f"its disk 2000 had the size {GIB}, the spec now says {2 * GIB}"),
        ({"image": f"{ROOT}/other"}, f"the spec now says {ROOT}/other"),
    ],
)
@pytest.mark.parametrize("release", ["on_completion", "keep"])
def test_a_run_that_has_ended_stays_as_it_was_whatever_its_spec_says_now(
    state: CallState, change: dict[str, Any], said: str, release: str
) -> None:
    ledger = remembered([a_lease()], [a_call(state=state)])
    actual = seen([a_server()], [an_image()])
    same, now = a_vm(release=release), changed(a_vm(release=release), **change)
    before, after = (plan(wanting(vm), actual, ledger, NOW) for vm in (same, now))
    assert brief(after) == brief(before), "the disk that grew matters to the next run alone"
    old, new = (by_type(conditions(one.vms[0], actual, ledger)) for one in (before, after))
    assert {name: one for name, one in new.items() if name != "SpecAhead"} == old
    says(new["SpecAhead"].message, said, f"the run r1 is {state} and stays", "--run NEW")
    following = plan(wanting(changed(a_vm(run="r2"), **change)), seen(), ledger, NOW)
    assert ("create", 2000, "ImageMissing") in brief(following)
    assert following.vms[0].ahead == ""


def test_a_disk_that_came_after_the_end_of_a_run_takes_nothing_from_it() -> None:
    ledger = remembered(calls=[a_call(state=S.COMPLETED)])
    found = plan(wanting(a_vm(disks=2)), seen((), [an_image()]), ledger, NOW)
    assert found.actions == ()
    ready = by_type(conditions(found.vms[0], seen(), ledger))["Ready"]
    assert (ready.status, ready.reason) == ("True", "Completed")


def test_before_the_intent_a_run_is_what_the_spec_says_last() -> None:
    host, _ = an_unreached_hub(a_vm(disks=2))
    desired = wanting(a_vm(disks=1))
    assert brief(planned(host, desired)) == [
        ("stop", 2001, "DiskNotDeclared"),
        ("call", None, "RunDue"),
    ]
    settle(host, desired)
    assert sna_of(host).posts[0].disks == (2000,)
    assert planned(host, desired).actions == ()


def test_a_new_run_waits_for_the_one_that_is_active() -> None:
    host, _ = a_hub(a_vm())
    desired = wanting(a_vm(run="r2"))
    wait = only(planned(host, desired))
    assert (wait.kind, wait.cause) == ("wait", "RunActive")
    says(wait.why, "the run r1 is ACCEPTED", "r2 has its turn when that has ended")
    host.kill(host.server("ctx-1", 2000))
    assert brief(planned(host, desired)) == [
        ("restart", 2000, "ProcessGone"),
        ("wait", None, "RunActive"),
    ]


def test_a_run_that_waits_says_since_when_and_says_the_same_on_every_pass() -> None:
    host, _ = a_hub(a_vm())
    desired = wanting(a_vm(run="r2"))

    def why(run: str, now: float) -> str:
        applied = {"ctx-1": Applied(vm=a_vm(run=run).to_json(), generation=1, at=NOW)}
        ledger = replace(host.records.ledger(), applied=applied)
        return only(plan(desired, host.look(desired, ledger), ledger, now)).why

    assert why("r2", NOW + 9).endswith(f"and has waited since {stamp(NOW)}")
    assert why("r2", NOW + 99) == why("r2", NOW + 9)
    assert "since" not in why("r1", NOW + 9)  # it was not applied: it waits for nothing yet


def test_no_call_while_a_client_of_the_last_run_is_connected() -> None:
    host, _ = a_hub(a_vm())
    end(host)
    host.server("ctx-1", 2000).clients = 1
    desired = wanting(a_vm(run="r2"))
    assert brief(planned(host, desired)) == [
        ("hold", 2000, "InUse"),
        ("create", 2000, "ImageMissing"),
        ("start", 2000, "NotRunning"),
    ]
    settle(host, desired)
    assert len(sna_of(host).started) == 1


def test_a_client_that_comes_back_to_the_last_run_stops_the_next() -> None:
    host, _ = a_hub(a_vm())
    end(host)
    desired = wanting(a_vm(run="r2"))
    found = planned(host, desired)
    host.server("ctx-1", 2000).clients = 1
    steps: list[Step] = []
    execute(found, host, steps.append)
    assert [step.reason for step in steps] == ["InUse"]
    assert len(sna_of(host).posts) == 1


def test_an_appliance_gets_no_more_than_it_can_run_oldest_first() -> None:
    settings = a_settings(max_running=2)
    host, _ = a_hub(a_vm("ctx-9"), settings=settings)
    sna_of(host).script.extend([Reply.DOWN] * 3)
    for name in ("ctx-3", "ctx-1"):  # ctx-3 has waited longer
        host.clock += 10
        settle(host, wanting(a_vm(name), settings=settings), most=1)
    sna_of(host).script.clear()
    host.clock += 1000
    desired = wanting(*(a_vm(f"ctx-{n}") for n in (1, 2, 3, 9)), settings=settings)
    found = planned(host, desired)
    assert [a.vm for a in found.actions if isinstance(a, Notify)] == ["ctx-3"]
    waits = [action for action in found.actions if action.kind == "wait"]
    assert [(action.vm, action.cause) for action in waits] == [
        ("ctx-1", "SnaBusy"),
        ("ctx-2", "SnaBusy"),
    ]
    says(waits[0].why, "SNA site-a already runs 2 backups", "max_running")
    settle(host, desired)
    assert len(sna_of(host).started) == 2
    end(host, vm="ctx-9")
    settle(host, desired)
    assert [call.vm for call in host.records.calls.values() if call.state.active] == [
        "ctx-3",
        "ctx-1",
    ]


def test_an_unknown_call_keeps_its_place_at_the_appliance() -> None:
    settings = a_settings(max_running=1)
    host = FakeHost(settings)
    sna_of(host).script.append(Reply.BROKEN)
    settle(host, wanting(a_vm(), settings=settings))
    found = planned(host, wanting(a_vm(), a_vm("ctx-2"), settings=settings))
    assert ("wait", None, "SnaBusy") in brief(found)


# -- what was lost


def test_a_claim_without_a_record_is_an_unknown_outcome_and_never_a_call() -> None:
    host, desired = a_hub(a_vm(disks=2))
    before = [process.identity for process in host.mine()]
    host.lose_state()
    sna_of(host).deaf = True
    found = planned(host, desired)
    assert brief(found) == [
        ("hold", None, "CallUnknown"),
        ("adopt", 2000, "NotInLedger"),
        ("adopt", 2001, "NotInLedger"),
    ]
    says(found.actions[0].why, "claimed by another state directory", "is not known")
    settle(host, desired)
    assert call_of(host).state is S.UNKNOWN
    assert len(sna_of(host).started) == 1
    assert [process.identity for process in host.mine()] == before
    sna_of(host).deaf = False
    settle(host, desired)
    assert call_of(host).state is S.ACCEPTED


def test_a_claim_of_our_own_without_a_record_is_no_better() -> None:
    host = FakeHost(a_settings())
    host.claims[ROOT, "ctx-1", "r1"] = "state-1"
    settle(host, wanting(a_vm()))
    assert (call_of(host).state, sna_of(host).posts, host.mine()) == (S.UNKNOWN, [], [])
    says(call_of(host).message, "whose record of it is gone")


def test_a_claim_that_another_took_between_look_and_call_stops_the_call() -> None:
    host = FakeHost(a_settings())
    look = host.look

    def too_early(desired: Any, ledger: Any) -> Any:
        found = look(desired, ledger)
        host.claims[ROOT, "ctx-1", "r1"] = "another"
        return found

    host.look = too_early  # type: ignore[method-assign]
    for _ in range(3):
        settle(host, wanting(a_vm()))
    assert sna_of(host).posts == []
    assert host.mine() == []
    refusal = planned(host, wanting(a_vm())).actions[-1]
    assert (refusal.kind, refusal.cause) == ("refuse", "ClaimedElsewhere")
    says(refusal.why, "claimed by the state directory another", "apply it there", "a new run")


def test_servers_of_a_run_that_only_its_claim_tells_of_are_not_stopped() -> None:
    host, _ = a_hub(a_vm())
    host.lose_state()
    sna_of(host).deaf = True
    for desired in (wanting(absent()), wanting(a_vm(run="r2"))):
        found = planned(host, desired)
        assert not any(isinstance(action, Stop | Notify) for action in found.actions)


def test_after_a_lost_state_an_operators_order_to_ask_again_is_followed() -> None:
    host, desired = a_hub(a_vm())
    host.lose_state()
    sna_of(host).deaf = True
    settle(host, desired)
    host.records.another_attempt(call_of(host), host.now(), "the appliance never began")
    host.take_over(call_of(host))
    vm = a_vm()
    (export,) = vm.exports
    again = replace(
        export,
        attempt=2,
        name=attempted(export.name, 2),
        image=attempted_image(export.image, 2),
    )
    desired = wanting(replace(vm, exports=(again,)))
    settle(host, desired)
    assert call_of(host).state is S.ACCEPTED
    assert call_of(host).attempt == 2


def test_a_lost_run_that_the_spec_now_names_fewer_disks_of_is_never_completed() -> None:
    """The disk that the spec no longer names is written all the same."""
    settings = a_settings(reports_end=True)
    host, _ = a_hub(a_vm(disks=2), settings=settings)
    job = call_of(host).job_id
    host.lose_state()
    desired = wanting(a_vm(disks=1), settings=settings)
    settle(host, desired)
    host.write(host.server("ctx-1", 2001))
    host.kill(host.server("ctx-1", 2001))
    settle(host, desired)
    sna_of(host).jobs[job] = "completed"
    settle(host, desired)
    assert call_of(host).state is not S.COMPLETED


def test_a_server_that_is_taken_in_again_is_as_safe_as_it_was_started() -> None:
    """Not as safe as the one that the config would start now."""
    host, _ = a_hub(a_vm())
    host.lose_state()
    host.settings = a_settings(cache="writethrough")
    desired = wanting(a_vm(), settings=host.settings)
    settle(host, desired)
    host.write(host.server("ctx-1", 2000))
    host.kill(host.server("ctx-1", 2000))
    settle(host, desired)
    assert call_of(host).tainted


def test_an_older_record_of_a_run_that_was_called_is_not_believed() -> None:
    host, desired = an_unreached_hub(a_vm())
    older = dict(host.records.calls)
    settle(host, desired)
    assert call_of(host).state is S.ACCEPTED
    host.records.calls = older
    sna_of(host).forget()
    hold = planned(host, desired).actions[0]
    assert (hold.kind, hold.cause) == ("hold", "CallUnknown")
    says(hold.why, "the record is older")
    settle(host, desired)
    assert call_of(host).state is S.UNKNOWN
    assert len(sna_of(host).started) == 1


def test_an_older_record_of_a_run_that_was_refused_and_asked_for_again_is_not_believed() -> None:
    host = FakeHost(a_settings())
    sna_of(host).script.append(Reply.REJECT)
    settle(host, wanting(a_vm()))
    older = dict(host.records.calls)
    mended = wanting(a_vm(path="/DC1/vm/right"))
    settle(host, mended)
    assert call_of(host).state is S.ACCEPTED
    host.records.calls = older
    sna_of(host).forget()
    settle(host, mended)
    assert len(sna_of(host).started) == 1


def test_a_lost_run_whose_servers_died_is_never_completed() -> None:
    """State lost, and the spec asks for another run already: what was lost is not known."""
    settings = a_settings(reports_end=True)
    host, _ = a_hub(a_vm(), settings=settings)
    job = call_of(host).job_id
    host.lose_state()
    desired = wanting(a_vm(run="r2"), settings=settings)
    settle(host, desired)
    assert call_of(host).state is S.ACCEPTED
    host.write(host.server("ctx-1", 2000))
    host.kill(host.server("ctx-1", 2000))
    settle(host, desired)
    sna_of(host).jobs[job] = "completed"
    settle(host, desired)
    assert call_of(host).state is not S.COMPLETED


def test_a_lost_run_of_which_a_server_had_died_unseen_is_never_completed() -> None:
    settings = a_settings(reports_end=True)
    host, desired = a_hub(a_vm(disks=2), settings=settings)
    job = call_of(host).job_id
    host.write(host.server("ctx-1", 2001))
    host.lose_state()
    host.kill(host.server("ctx-1", 2001))
    settle(host, desired)
    settle(host, desired)
    assert call_of(host).state is S.ACCEPTED
    sna_of(host).jobs[job] = "completed"
    settle(host, desired)
    assert call_of(host).state is not S.COMPLETED


def test_a_call_that_is_being_made_right_now_is_no_crash() -> None:
    ledger = remembered([a_lease()], [a_call(state=S.INTENDED)], busy="reconciler apply (pid 7)")
    wait = only(plan(wanting(a_vm()), seen([a_server()], [an_image()]), ledger, NOW))
    assert (wait.kind, wait.cause) == ("wait", "Calling")
    says(wait.why, "pid 7")


# -- what is to be gone


def test_an_absent_vm_is_stopped_and_released() -> None:
    host, _ = a_hub(a_vm(disks=2))
    end(host)
    desired = wanting(absent())
    assert brief(planned(host, desired)) == [("stop", 2000, "Absent"), ("stop", 2001, "Absent")]
    settle(host, desired)
    assert host.mine() == []
    assert host.records.leases == {}
    assert len(host.images) == 2


@pytest.mark.parametrize("kill_clients", [False, True])
def test_an_absent_vm_whose_run_is_accepted_is_held(kill_clients: bool) -> None:
    host, _ = a_hub(a_vm(disks=2))
    desired = wanting(absent(), kill_clients=kill_clients)
    assert brief(planned(host, desired)) == [
        ("hold", 2000, "RunActive"),
        ("hold", 2001, "RunActive"),
    ]
    settle(host, desired)
    assert len(host.mine()) == 2


def test_an_absent_vm_whose_run_is_accepted_keeps_its_ports_without_a_server() -> None:
    host, _ = a_hub(a_vm())
    host.kill(host.server("ctx-1", 2000))
    hold = only(planned(host, wanting(absent())))
    assert isinstance(hold, Hold)
    assert (hold.cause, hold.subject) == ("RunActive", "its ports stay leased")
    says(hold.why, "reconciler resolve ctx-1")


def test_an_absent_vm_with_clients_is_held_until_an_order() -> None:
    host, _ = a_hub(a_vm())
    end(host)
    host.server("ctx-1", 2000).clients = 2
    hold = only(planned(host, wanting(absent())))
    assert (hold.kind, hold.cause) == ("hold", "InUse")
    says(hold.why, "2 clients are connected", "reconciler stop ctx-1 --kill-clients")
    settle(host, wanting(absent(), kill_clients=True))
    assert host.mine() == []


def test_an_absent_vm_that_is_protected_is_held() -> None:
    host, _ = a_hub(a_vm())
    end(host)
    hold = only(planned(host, wanting(absent(protect=True))))
    assert (hold.kind, hold.cause) == ("hold", "Protected")


def test_a_client_that_comes_between_plan_and_stop_keeps_its_server() -> None:
    host, _ = a_hub(a_vm())
    end(host)
    look = host.look

    def too_early(desired: Any, ledger: Any) -> Any:
        found = look(desired, ledger)
        host.server("ctx-1", 2000).clients = 1
        return found

    host.look = too_early  # type: ignore[method-assign]
    one_pass(host, wanting(absent()))
    assert len(host.mine()) == 1
    assert len(host.records.leases) == 1


def test_a_completed_run_is_released_and_then_at_rest() -> None:
    host, desired = a_hub(a_vm())
    end(host)
    assert brief(planned(host, desired)) == [("stop", 2000, "RunEnded")]
    settle(host, desired)
    assert planned(host, desired).actions == ()


def test_with_release_keep_the_exports_outlive_the_run() -> None:
    host, desired = a_hub(a_vm(release="keep"))
    end(host)
    assert planned(host, desired).actions == ()
    host.kill(host.server("ctx-1", 2000))
    assert brief(planned(host, desired)) == [("restart", 2000, "ProcessGone")]
    settle(host, desired)
    assert len(host.mine()) == 1
    assert not call_of(host).tainted


def test_a_vm_out_of_scope_is_untouched_and_listed() -> None:
    host, _ = a_hub(a_vm("ctx-10"), a_vm("ctx-9"))
    found = planned(host, wanting(a_vm("ctx-1")))
    assert {action.vm for action in found.actions} == {"ctx-1"}
    assert found.untouched == ("ctx-9", "ctx-10")


def test_a_vm_with_an_error_is_untouched_for_that() -> None:
    wrong = Diagnostic("error", "unknown key 'stat'", vm="ctx-9")
    found = Plan(hub="h", ports=PORTS, vms=(), untouched=("ctx-9", "ctx-10"), diagnostics=(wrong,))
    said = plan_text(found)
    assert "untouched, as what is written of it has an error: ctx-9\n" in said
    assert "untouched, as this is about others: ctx-10\n" in said


def test_a_vm_without_a_server_is_not_listed_as_untouched() -> None:
    ledger = remembered(applied={"ctx-2": Applied(vm={}, generation=1, at=NOW)})
    assert plan(wanting(absent()), seen(), ledger, NOW).untouched == ()


# -- restore


def restorable() -> tuple[FakeHost, Desired]:
    host, _ = a_hub(a_vm())
    host.write(host.server("ctx-1", 2000))
    end(host)
    settle(host, wanting(a_vm()))
    return host, wanting(a_restore())


def test_a_restore_is_served_read_only_and_never_called_for() -> None:
    host, desired = restorable()
    assert brief(planned(host, desired)) == [("start", 2000, "NotRunning")]
    settle(host, desired)
    (process,) = host.mine()
    assert not process.writes
    assert len(sna_of(host).posts) == 1
    assert (ROOT, "look", "r1") not in host.claims
    assert planned(host, desired).actions == ()


def test_a_restore_goes_on_beside_the_next_backup_of_its_vm() -> None:
    host, desired = restorable()
    desired = wanting(a_restore(), a_vm(run="r2"))
    settle(host, desired)
    assert sorted(process.name for process in host.mine()) == ["ctx-1-r2-disk0", "look-r1-disk0"]
    assert planned(host, desired).actions == ()


def test_a_restore_without_its_image_is_refused_and_none_is_created() -> None:
    host = FakeHost(a_settings())
    refusal = only(planned(host, wanting(a_restore())))
    assert (refusal.kind, refusal.cause) == ("refuse", "ImageMissing")


def test_a_restore_that_dies_comes_back_and_taints_nothing() -> None:
    host, desired = restorable()
    settle(host, desired)
    host.server("look", 2000).clients = 1
    settle(host, desired)
    host.kill(host.server("look", 2000))
    restart = only(planned(host, desired))
    assert isinstance(restart, Restart)
    assert not restart.taints


def test_a_vm_that_becomes_a_restore_waits_for_its_active_run_and_says_so() -> None:
    host, _ = a_hub(a_vm())
    host.put(f"{ROOT}/old", GIB, pristine=False)
    wait = only(planned(host, wanting(changed(a_restore("ctx-1"), image=f"{ROOT}/old"))))
    assert (wait.kind, wait.cause) == ("wait", "RunActive")


# -- as a document


def test_a_plan_counts_every_word_and_names_disks_as_text() -> None:
    host = FakeHost(a_settings())
    found = planned(host, wanting(a_vm(disks=2))).to_json()
    assert found["format_version"] == "1.0"
    assert found["summary"] == {
        "create": 2,
        "start": 2,
        "adopt": 0,
        "restart": 0,
        "stop": 0,
        "release": 0,
        "call": 1,
        "wait": 0,
        "hold": 0,
        "refuse": 0,
        "held": 0,
    }
    first, last = found["changes"][0], found["changes"][-1]
    assert (first["vm"], first["disk"], first["action"]) == ("ctx-1", "2000", "create")
    assert (last["disk"], last["action"], last["cause"]) == (None, "call", "RunDue")
    assert all(change["why"] and change["what"] for change in found["changes"])


def test_a_held_plan_says_so() -> None:
    host, _ = a_hub(a_vm())
    found = planned(host, wanting(absent()))
    assert found.to_json()["summary"]["held"] == 1
    assert found.changes == ()


def test_vms_are_planned_in_the_order_that_people_count_in() -> None:
    found = plan(wanting(a_vm("ctx-10"), a_vm("ctx-2"), a_vm("ctx-1")), seen(), remembered(), NOW)
    assert [one.name for one in found.vms] == ["ctx-1", "ctx-2", "ctx-10"]
    ports = [action.lease.port for action in found.actions if isinstance(action, Start)]
    assert ports == [10100, 10101, 10102]


def test_a_server_is_one_process_for_good() -> None:
    """The kernel reuses a pid: only with the start time it is the same process."""
    host, _ = a_hub(a_vm())
    end(host)
    (process,) = host.mine()
    found = planned(host, wanting(absent()))
    again = Identity(process.identity.pid, process.identity.started + 1)
    host.processes = {again: altered_process(process, again)}
    stop = only(found)
    assert isinstance(stop, Stop)
    host.stop(stop.server, kill_clients=True)
    assert list(host.processes) == [again]


def altered_process(process: Any, identity: Identity) -> Any:
    process.identity = identity
    return process


def test_a_handshake_of_the_wrong_name_is_no_answer() -> None:
    server = a_server(handshake=Handshake(error="it knows no export ctx-1-r1-disk0"))
    actual = seen([server], [an_image()])
    found = plan(wanting(a_vm()), actual, remembered([a_lease()], [a_call(state=S.DUE)]), NOW)
    restart = found.actions[0]
    assert (restart.kind, restart.cause) == ("restart", "NoAnswer")
    says(restart.why, "it knows no export")
