"""How a run ends: by its client's word for every disk, flushed, checked, and left alone."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from reconciler.core.actions import Conclude, Witness
from reconciler.core.actual import Handshake
from reconciler.core.call import CallEvent, CallState, Seal, doubt, verdict
from reconciler.core.desired import Desired
from reconciler.core.errors import Exit
from reconciler.core.ledger import Sighting
from reconciler.core.plan import plan
from reconciler.core.settings import Settings
from reconciler.core.status import by_type, conditions
from reconciler.loop import Outcome, doubts
from tests.core.builders import (
    GIB,
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
    only,
    remembered,
    says,
    seen,
    wanting,
)
from tests.fakes import FakeHost, Reply, one_pass, planned, settle

S = CallState


def an_accepted(disks: int = 2, settings: Settings | None = None) -> tuple[FakeHost, Desired]:
    """A run that its appliance has accepted and written into."""
    host = FakeHost(settings or a_settings())
    desired = wanting(a_vm(disks=disks), settings=host.settings)
    settle(host, desired)
    for process in host.mine():
        host.write(process)
    return host, desired


def call_of(host: FakeHost) -> Any:
    return host.records.ledger().latest("ctx-1", "r1")


def report_all(host: FakeHost, disks: int = 2) -> None:
    for position in range(disks):
        host.records.report(call_of(host).job_id, position)


def test_a_run_ends_when_its_client_has_reported_every_disk() -> None:
    host, desired = an_accepted()
    host.records.report(call_of(host).job_id, 0)
    assert planned(host, desired).actions == ()
    host.records.report(call_of(host).job_id, 1)
    assert brief(planned(host, desired)) == [
        ("release", None, "RunCompleted"),
        ("stop", 2000, "RunEnded"),
        ("stop", 2001, "RunEnded"),
    ]
    settle(host, desired)
    assert call_of(host).state is S.COMPLETED
    says(call_of(host).message, "reported every disk complete", "2 disks flushed and checked")
    assert (host.mine(), host.records.leases) == ([], {})
    assert planned(host, desired).actions == ()


def test_telemetry_never_ends_a_run_whatever_it_says() -> None:
    host, desired = an_accepted()
    host.records.word(call_of(host).job_id, status="completed", percent=100.0)
    settle(host, desired)
    assert call_of(host).state is S.ACCEPTED


def test_a_run_is_not_published_while_a_client_is_connected() -> None:
    host, desired = an_accepted()
    report_all(host)
    host.server("ctx-1", 2001).clients = 2
    wait = only(planned(host, desired))
    assert (wait.kind, wait.cause) == ("wait", "ClientsConnected")
    says(wait.why, "2 clients are connected to port 10101")
    found = planned(host, desired)  # it is as declared meanwhile
    assert Outcome(found).exit_code() is Exit.OK
    ledger = host.records.ledger()
    stands = by_type(conditions(found.vms[0], host.look(desired, ledger), ledger))
    assert (stands["Ready"].status, stands["Ready"].reason) == ("True", "Converged")
    assert stands["Reconciling"].reason == "ClientsConnected"
    settle(host, desired)
    assert (call_of(host).state, len(host.mine())) == (S.ACCEPTED, 2)
    host.server("ctx-1", 2001).clients = 0
    settle(host, desired)
    assert call_of(host).state is S.COMPLETED


def test_a_client_that_comes_back_while_the_images_are_checked_keeps_the_run_open() -> None:
    host, desired = an_accepted()
    report_all(host)
    sealed = host.sealed

    def busy(exports: Any, servers: Any) -> Any:
        host.server("ctx-1", 2000).clients = 1
        return sealed(exports, servers)

    host.sealed = busy  # type: ignore[method-assign]
    one_pass(host, desired)
    assert (call_of(host).state, len(host.mine())) == (S.ACCEPTED, 2)
    assert host.ended == []


def test_a_disk_that_does_not_answer_is_mended_before_its_run_is_published() -> None:
    host, desired = an_accepted(settings=a_settings(cache="writethrough"))
    report_all(host)
    host.kill(host.server("ctx-1", 2000))
    assert ("wait", None, "ServersNotReady") in brief(planned(host, desired))
    assert Outcome(planned(host, desired)).exit_code() is Exit.PARTIAL
    settle(host, desired)
    assert call_of(host).state is S.COMPLETED


def test_a_server_that_dies_between_the_last_report_and_the_flush_fails_the_run() -> None:
    host, desired = an_accepted()
    report_all(host)
    host.kill(host.server("ctx-1", 2000))
    settle(host, desired)
    assert (call_of(host).state, call_of(host).reason) == (S.FAILED, "ServerDied")


def test_damage_that_a_check_finds_fails_the_run_and_releases_it() -> None:
    host, desired = an_accepted()
    host.damaged.add(an_export(position=1).image)
    report_all(host)
    settle(host, desired)
    assert (call_of(host).state, call_of(host).reason) == (S.FAILED, "ImagesDamaged")
    says(call_of(host).message, "disk 2001", "2 errors were found on the image")
    assert host.mine() == []


def test_a_full_backup_into_which_nothing_was_written_is_none() -> None:
    host = FakeHost(a_settings())
    desired = wanting(a_vm(disks=2))
    settle(host, desired)
    report_all(host)
    settle(host, desired)
    assert (call_of(host).state, call_of(host).reason) == (S.FAILED, "NothingArrived")


@pytest.mark.parametrize(
    ("kind", "empty", "event"),
    [
        ("full", (True, False), CallEvent.END),
        ("full", (True, True), CallEvent.EMPTY),
        ("incremental", (True, True), CallEvent.END),
        ("incremental", (False, True), CallEvent.END),
    ],
)
def test_what_an_empty_image_says_depends_on_what_was_asked_for(
    kind: str, empty: tuple[bool, ...], event: CallEvent
) -> None:
    seals = [Seal(2000 + i, f"/x/{i}", nothing) for i, nothing in enumerate(empty)]
    assert verdict(kind, seals)[0] is event


def test_what_is_published_is_written_down_with_it() -> None:
    host, desired = an_accepted()
    report_all(host)
    settle(host, desired)
    found = host.records.ledger().shelf.get(call_of(host).job_id)
    assert {position: one.digest for position, one in found.archived.items()} == {
        0: "sha256:of-nothing",
        1: "sha256:of-nothing",
    }
    assert [one.size for one in found.archived.values()] == [GIB, GIB]
    assert {one.allocated for one in found.archived.values()} == {65536}
    assert found.archived[0].at == call_of(host).ended
    assert call_of(host).doubt == ""


@pytest.mark.parametrize("kind", ["full", "incremental"])
def test_a_disk_of_which_bytes_are_reported_and_nothing_came_is_told_and_counts(kind: str) -> None:
    host = FakeHost(a_settings())
    vm = a_vm(disks=2)
    desired = wanting(vm)
    settle(host, desired)
    host.records.calls[call_of(host).key] = replace(call_of(host), type=kind)
    desired = wanting(replace(vm, type=kind))
    host.write(host.server("ctx-1", 2000))
    report_all(host)
    found = one_pass(host, desired)
    call = call_of(host)
    assert (call.state, "disk 2001" in call.doubt) == (S.COMPLETED, True)
    says(call.doubt, "its client reports 1 MiB", "nothing was ever written into its image")
    assert "disk 2000" not in call.doubt
    action = next(one for one in found.actions if isinstance(one, Conclude))
    assert list(doubts(action, call)) == [("Implausible", f"run r1: {call.doubt}")]
    found = planned(host, desired)
    ledger = host.records.ledger()
    stands = by_type(conditions(found.vms[0], host.look(desired, ledger), ledger))
    assert (stands["Implausible"].status, stands["Ready"].status) == ("True", "True")


def test_a_disk_of_which_nothing_is_reported_may_be_empty() -> None:
    exports = a_vm(disks=2).exports
    seals = [Seal(2000, "/a", False), Seal(2001, "/b", True)]
    assert doubt(exports, seals, {0: 5, 1: 0}) == ""
    assert doubt(exports, seals, {0: 5}) == ""
    assert doubt(exports, seals, {0: 5, 1: 1}).startswith("disk 2001")


def test_an_absent_vm_whose_run_is_reported_is_ended_too() -> None:
    host, _ = an_accepted()
    report_all(host)
    settle(host, wanting(absent()))
    assert (call_of(host).state, host.mine()) == (S.COMPLETED, [])


def test_reports_of_every_disk_end_a_run_whose_call_went_unanswered() -> None:
    host = FakeHost(a_settings())
    host.snas["site-a"].script.append(Reply.DROP_AFTER)
    host.snas["site-a"].deaf = True
    desired = wanting(a_vm(disks=2))
    settle(host, desired)
    assert call_of(host).state is S.UNKNOWN
    host.write(host.server("ctx-1", 2000))
    report_all(host)
    settle(host, desired)
    assert call_of(host).state is S.COMPLETED


# -- witnesses


def uncertain(**changes: Any) -> tuple[Any, dict[str, Any]]:
    """A call whose outcome is unknown, and what a ledger holds besides."""
    call = a_call(a_vm(disks=2), S.UNKNOWN)
    leases = [a_lease(an_export(position=i), 10100 + i) for i in range(2)]
    return call, {"leases": leases, "calls": [call], **changes}


def looked(clients: tuple[int, int], allocated: int) -> Any:
    servers = [
        a_server(an_export(position=i), 10100 + i, clients=count) for i, count in enumerate(clients)
    ]
    images = [
        an_image(an_export(position=i), pristine=False, allocated=allocated // 2) for i in range(2)
    ]
    return seen(servers, images)


def test_a_client_that_named_the_job_is_a_witness() -> None:
    host = FakeHost(a_settings())
    host.snas["site-a"].script.append(Reply.DROP_AFTER)
    host.snas["site-a"].deaf = True
    desired = wanting(a_vm(disks=2))
    settle(host, desired)
    host.records.word(call_of(host).job_id)
    witness = planned(host, desired).actions[0]
    assert isinstance(witness, Witness)
    assert witness.cause == "WitnessedByClient"
    settle(host, desired)
    assert call_of(host).state is S.ACCEPTED


@pytest.mark.parametrize(
    ("clients", "seconds", "grown", "believed"),
    [
        ((2, 2), 2.0, 4096, True),
        ((2, 2), 1.9, 4096, False),
        ((2, 0), 60.0, 4096, False),
        ((2, 2), 60.0, 0, False),
    ],
)
def test_clients_count_when_all_disks_have_them_for_a_while_and_data_comes(
    clients: tuple[int, int], seconds: float, grown: int, believed: bool
) -> None:
    call, held = uncertain()
    ledger = remembered(**held, sightings={call.job_id: Sighting(NOW - seconds, 1 << 20)})
    found = plan(wanting(a_vm(disks=2)), looked(clients, (1 << 20) + grown), ledger, NOW)
    causes = [action.cause for action in found.actions]
    assert ("WitnessedByWriters" in causes) is believed
    assert ("CallUnknown" in causes) is not believed


def test_two_looks_at_writing_clients_make_an_unanswered_call_an_accepted_one() -> None:
    host = FakeHost(a_settings())
    host.snas["site-a"].script.append(Reply.DROP_AFTER)
    host.snas["site-a"].deaf = True
    desired = wanting(a_vm(disks=2))
    settle(host, desired)
    for process in host.mine():
        process.clients = 2
        host.write(process)
    settle(host, desired)
    assert call_of(host).state is S.UNKNOWN
    host.clock += 2
    host.write(host.server("ctx-1", 2001))
    settle(host, desired)
    assert call_of(host).state is S.ACCEPTED


# -- a start that never comes to its end


def test_a_server_that_never_leaves_its_first_step_is_begun_anew() -> None:
    server = a_server(starting=True, age=11.0, handshake=None)
    ledger = remembered([a_lease()], [a_call(state=S.DUE)])
    found = plan(wanting(a_vm()), seen([server], [an_image()]), ledger, NOW)
    restart = next(action for action in found.actions if action.kind == "restart")
    assert restart.cause == "StartStuck"
    says(restart.why, "11 s", "start_timeout (10 s)")
    young = replace(server, age=9.0)
    found = plan(wanting(a_vm()), seen([young], [an_image()]), ledger, NOW)
    assert [action.cause for action in found.actions] == ["Starting"]


# -- one VM under two names


def twins(**changes: Any) -> tuple[FakeHost, Any]:
    """ctx-1 has a run, and then stands in the spec as ctx-9."""
    host = FakeHost(a_settings())
    settle(host, wanting(a_vm("ctx-1", disks=2)))
    new = a_vm("ctx-9", disks=2, path="/DC1/vm/ctx-1", **changes)
    return host, new


def test_a_renamed_vm_is_told_to_be_one_and_nothing_is_begun() -> None:
    host, new = twins()
    before = {process.identity for process in host.mine()}
    refusal = only(planned(host, wanting(new)))
    assert (refusal.kind, refusal.cause) == ("refuse", "Renamed")
    says(refusal.why, "VM ctx-1 under another name", "/DC1/vm/ctx-1", "the same disks", "ACCEPTED")
    says(refusal.why, "reconciler stop ctx-1")
    settle(host, wanting(new))
    assert {process.identity for process in host.mine()} == before
    assert len(host.snas["site-a"].started) == 1


def test_the_new_name_has_its_turn_when_the_old_one_is_gone() -> None:
    host, new = twins()
    host.records.advance(call_of(host), CallEvent.END, host.now())
    settle(host, wanting(absent("ctx-1")))
    settle(host, wanting(new))
    assert len(host.snas["site-a"].started) == 2


def test_the_same_path_at_another_vcenter_is_another_vm() -> None:
    host, new = twins(vcenter="vc2")
    assert "Renamed" not in [action.cause for action in planned(host, wanting(new)).actions]


def test_two_vms_of_one_name_are_backed_up_one_after_the_other() -> None:
    vcenter = a_settings().vcenters["vc1"]
    host = FakeHost(a_settings(vcenters={"vc1": vcenter, "vc2": vcenter}))
    one = a_vm("ctx-1", display_name="pgtest1")
    two = a_vm("ctx-2", display_name="pgtest1", vcenter="vc2")
    settle(host, wanting(one, two, settings=host.settings))
    assert [post.request["vm_name"] for post in host.snas["site-a"].posts] == ["pgtest1"]
    wait = only(planned(host, wanting(one, two, settings=host.settings)))
    assert (wait.vm, wait.kind, wait.cause) == ("ctx-2", "wait", "NameActive")
    host.records.advance(call_of(host), CallEvent.END, host.now())
    settle(host, wanting(one, two, settings=host.settings))
    assert len(host.snas["site-a"].posts) == 2


# -- what is seen and not remembered


def test_servers_of_which_neither_ledger_nor_repository_tells_make_the_call_unknown() -> None:
    host, desired = an_accepted()
    host.lose_state()
    host.claims.clear()
    host.snas["site-a"].forget()
    settle(host, desired)
    assert (call_of(host).state, call_of(host).reason) == (S.UNKNOWN, "ClaimWithoutRecord")
    assert len(host.snas["site-a"].posts) == 1
    assert len(host.mine()) == 2


def test_servers_of_an_older_run_without_a_record_are_kept_while_its_call_is_unknown() -> None:
    host, _ = an_accepted()
    host.lose_state()
    host.claims.clear()
    host.snas["site-a"].forget()
    before = {process.identity for process in host.mine()}
    desired = wanting(a_vm("ctx-1", "r2", disks=2))
    settle(host, desired)
    lost = call_of(host)
    assert (lost.state, lost.tainted) == (S.UNKNOWN, True)
    assert [export.image for export in lost.exports] == [
        "/backup/ctx-1/2000/r1.qcow2",
        "/backup/ctx-1/2001/r1.qcow2",
    ]
    assert {process.identity for process in host.mine()} == before
    assert "RunActive" in [action.cause for action in planned(host, desired).actions]


def test_a_vm_that_another_state_directory_holds_is_not_touched() -> None:
    server = a_server(handshake=Handshake(error="it does not answer"))
    actual = seen(
        [server],
        [an_image(pristine=False)],
        claims={("ctx-1", "r1"): "state-9"},
        rivals={("ctx-1", "r1"): "/var/lib/other"},
    )
    for vm in (a_vm(), absent()):
        refusal = only(plan(wanting(vm), actual, remembered(), NOW))
        assert (refusal.kind, refusal.cause) == ("refuse", "ClaimedElsewhere")
        says(refusal.why, "/var/lib/other", "RECONCILER_STATE=/var/lib/other")


def test_the_end_of_a_run_is_one_step_that_says_how_it_went() -> None:
    host, desired = an_accepted()
    report_all(host)
    conclude = planned(host, desired).actions[0]
    assert isinstance(conclude, Conclude)
    steps = settle(host, desired)
    assert [(step.action.kind, step.ok, step.reason) for step in steps] == [
        ("release", True, "RunCompleted"),
        ("stop", True, "Stopped"),
        ("stop", True, "Stopped"),
    ]
