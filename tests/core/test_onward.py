"""What a person is told to type next, of runs that do not go on by themselves."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from jobs import Disk, Job, Phase
from msgspec.structs import replace
from wire import Start, Target

from reconciler.cli.applying import Session
from reconciler.cli.text import plan_text
from reconciler.core.actions import Notify
from reconciler.core.actual import Actual
from reconciler.core.call import CallState, Report, ending, resolving
from reconciler.core.desired import Vm
from reconciler.core.guards import keeps
from reconciler.core.ledger import Declaration, DiskReport, Ledger, Word
from reconciler.core.notices import trouble
from reconciler.core.onward import next_command
from reconciler.core.plan import Plan, plan
from reconciler.core.status import Condition, by_type, conditions
from reconciler.execute import Step
from reconciler.loop import Outcome
from tests.core.builders import (
    NOW,
    a_call,
    a_lease,
    a_server,
    a_settings,
    a_vm,
    absent,
    an_image,
    remembered,
    says,
    seen,
    wanting,
)

S = CallState
VM = a_vm(disks=2)
NOBODY = "nothing listens on 127.0.0.1:8082"


def up(vm: Vm = VM, clients: int = 0, **changes: Any) -> Actual:
    """Every disk served."""
    servers = [a_server(e, 10100 + n, clients=clients) for n, e in enumerate(vm.exports)]
    return seen(servers, [an_image(export) for export in vm.exports], **changes)


def ledger(vm: Vm = VM, state: CallState = S.ACCEPTED, **changes: Any) -> Ledger:
    leases = [a_lease(export, 10100 + n) for n, export in enumerate(vm.exports)]
    return remembered(leases, [a_call(vm, state, **changes)])


def knowing(report: Report, **changes: Any) -> Ledger:
    """The same, after the SNA was asked."""
    known = ledger(**changes)
    return replace(known, words={known.calls[0].job_id: Word(report=report, since=NOW - 60)})


def shown(
    actual: Actual, known: Ledger, vm: Vm = VM, now: float = NOW
) -> tuple[Plan, dict[str, Condition], str]:
    """The plan, the conditions, and what to type next."""
    found = plan(wanting(vm), actual, known, now)
    some = dict(by_type(conditions(found.vms[0], actual, known)))
    return found, some, next_command(found.vms[0], found, some["Ready"].reason, "/runs", known)


# -- nobody takes what is reported


def test_a_run_whose_reports_nobody_takes_says_so_and_who_would() -> None:
    found, some, onward = shown(up(unheard=NOBODY), ledger())
    assert (some["Unheard"].status, some["Unheard"].reason) == ("True", "NobodyListens")
    says(some["Unheard"].message, NOBODY, "does not end by itself", "is lost")
    assert some["Ready"].status == "True", "its servers are as they should be"
    assert onward == "reconciler watch (or reconciler serve)"
    says(plan_text(found), NOBODY, "next: reconciler watch")
    assert found.actions == ()


def test_who_watched_a_directory_is_told_to_watch_it_again() -> None:
    known = replace(ledger(), source={"directory": "/srv/specs"})
    assert shown(up(unheard=NOBODY), known)[2].startswith("reconciler watch /srv/specs (or")
    fetched = replace(ledger(), source={"directory": "/state/source", "fetch": {"url": "x"}})
    assert shown(up(unheard=NOBODY), fetched)[2].startswith("reconciler watch (or")


@pytest.mark.parametrize("state", [S.DUE, S.COMPLETED, S.FAILED])
def test_nothing_is_lost_where_nothing_is_to_be_reported(state: CallState) -> None:
    assert "Unheard" not in shown(up(unheard=NOBODY), ledger(state=state))[1]


def test_a_run_of_which_all_has_arrived_needs_no_more_ears() -> None:
    known = ledger()
    job = known.calls[0].job_id
    reports = {
        n: DiskReport(job_id=job, position=n, change_id="c", bytes=1, at=NOW) for n in range(2)
    }
    known = replace(known, reports={job: reports})
    assert "Unheard" not in shown(up(unheard=NOBODY, clients=1), known)[1]


def test_a_run_that_is_heard_again_says_so_once_it_was_not() -> None:
    known = replace(
        ledger(), transitions={("ctx-1", "Unheard"): ("True", "NobodyListens", NOW - 9)}
    )
    assert shown(up(), known)[1]["Unheard"].status == "False"


# -- the appliance's word


@pytest.mark.parametrize(
    ("report", "cause", "words", "onward"),
    [
        (
            Report(True, "failed", "datastore full"),
            "ApplianceFailed",
            ["says that it has failed: datastore full", "clients are connected to 0 of 2 disks"],
            ["reconciler resolve ctx-1 --failed --reason WHY, then reconciler backup ctx-1"],
        ),
        (
            Report(True, "completed"),
            "ApplianceCompleted",
            ["says that it has completed", "0 of 2 disks"],
            ["reconciler resolve ctx-1 --completed --reason WHY"],
        ),
        (
            Report(None, message="connection refused"),
            "ApplianceGone",
            ["cannot be asked about it (connection refused)"],
            ["reconciler doctor --only sna", "reconciler resolve ctx-1 --failed --reason WHY"],
        ),
        (
            Report(False, message="it does not know the job"),
            "ApplianceForgot",
            ["does not know it any more"],
            ["look at the appliance", "reconciler stop ctx-1 --cancel-run"],
        ),
    ],
)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_run_that_its_appliance_has_given_up_is_told_at_once(
    report: Report, cause: str, words: list[str], onward: list[str], fresh: bool
) -> None:
    """Long before it has been silent for `stale_after`; by what it says now, or said last."""
    known = ledger() if fresh else knowing(report)
    reports = {known.calls[0].job_id: report} if fresh else {}
    found, some, said = shown(up(reports=reports), known)
    assert (some["Stale"].status, some["Stale"].reason) == ("True", cause)
    says(some["Stale"].message, "run r1: SNA site-a", *words)
    says(said, *onward)
    says(plan_text(found), *words[:1], "next: reconciler explain ctx-1")
    assert trouble(some["Stale"]) == cause
    assert found.actions == (), "its word alone ends nothing"


@pytest.mark.parametrize(
    ("report", "clients"),
    [
        (Report(True, "failed", "x"), 1),
        (Report(None, message="x"), 2),
        (Report(True, "running"), 0),
    ],
)
def test_who_is_connected_or_said_to_run_is_given_time(report: Report, clients: int) -> None:
    _, some, onward = shown(up(clients=clients), knowing(report))
    assert "Stale" not in some
    assert onward == "nothing"


def test_an_accepted_run_is_asked_about_only_where_its_client_does_not_speak() -> None:
    assert shown(up(), ledger())[0].vms[0].asks
    assert not shown(up(clients=1), ledger())[0].vms[0].asks
    assert shown(up(clients=1), ledger(), now=NOW + 400)[0].vms[0].asks
    assert not shown(up(), ledger(state=S.COMPLETED))[0].vms[0].asks


# -- a server has died under a client


def test_a_tainted_run_says_how_it_is_ended_although_its_client_is_silent() -> None:
    _, some, onward = shown(up(), ledger(tainted=True))
    assert some["Ready"].reason == "ServerDied"
    says(some["Ready"].message, "can only fail", "reconciler resolve ctx-1 --failed --reason WHY")
    says(onward, "reconciler resolve ctx-1 --failed --reason WHY, then reconciler backup ctx-1")
    says(onward, "reconciler stop ctx-1 --cancel-run")
    assert "--completed" not in onward


def test_a_run_that_waits_for_a_tainted_one_says_what_it_waits_for() -> None:
    wanted = a_vm(run="r2", disks=2, place="vms.yaml:2:5")
    _, some, onward = shown(up(), ledger(tainted=True), wanted)
    assert some["Ready"].reason == "ServerDied"
    says(some["Ready"].message, "a server of run r1 died", "run r2 has its turn then")
    says(onward, "--failed --reason WHY, then reconciler apply -f vms.yaml")


def test_a_tainted_run_of_a_vm_that_is_to_go_has_its_message_too() -> None:
    _, some, _ = shown(up(), ledger(tainted=True), absent())
    assert some["Ready"].message


# -- hints


@pytest.mark.parametrize("state", [S.ACCEPTED, S.UNKNOWN])
@pytest.mark.parametrize("tainted", [True, False])
def test_a_hint_is_one_command_and_offers_nothing_that_is_refused(
    state: CallState, tainted: bool
) -> None:
    call = a_call(state=state, tainted=tainted)
    for hint in (ending(call), resolving(call)):
        command, _, others = hint.partition(" (or ")
        assert command.endswith("--reason WHY")
        assert "|" not in hint
        assert ("--completed" in others) is not tainted


def test_a_held_server_of_a_tainted_run_is_not_offered_as_completed() -> None:
    held = keeps(a_server(), a_call(tainted=True), protect=False, kill_clients=False)
    assert held
    assert "--completed" not in held[1]
    says(held[1], "reconciler resolve ctx-1 --failed --reason WHY; to end")


def test_what_pauses_a_watched_vm_says_so_before() -> None:
    said = Declaration(vm="ctx-1", file="a.yaml", revision="r", at=NOW)
    for gone, told in ((0.0, True), (NOW, False)):
        known = replace(ledger(), declared={"ctx-1": replace(said, gone=gone)})
        found, _, onward = shown(up(clients=1), known, now=NOW + 400)
        assert found.vms[0].stale_cause == "NoTelemetry"
        assert ("reconciler resume ctx-1" in onward) is told
        stopped, _, _ = shown(up(), known, absent())
        assert ("reconciler resume ctx-1" in stopped.actions[0].why) is told


def test_many_runs_that_suffer_from_one_thing_are_one_line() -> None:
    vms = [a_vm(f"ctx-{n}") for n in range(12)]
    servers = [a_server(vm.exports[0], 10100 + n) for n, vm in enumerate(vms)]
    known = remembered(
        [a_lease(vm.exports[0], 10100 + n) for n, vm in enumerate(vms)], [a_call(vm) for vm in vms]
    )
    reports = {call.job_id: Report(None, message="refused") for call in known.calls}
    images = [an_image(vm.exports[0]) for vm in vms]
    actual = seen(servers, images, unheard=NOBODY, reports=reports)
    said = plan_text(plan(wanting(*vms), actual, known, NOW), width=1000).splitlines()
    assert sum(NOBODY in line for line in said) == 1
    assert sum("cannot be asked about it" in line for line in said) == 5
    assert "and 7 more VMs of which the like is to be said: reconciler status" in said


# -- who was quicker


def test_a_run_that_who_watches_has_begun_is_told_to_who_asked(tmp_path: Path) -> None:
    session = Session(a_settings(state=str(tmp_path)), "reconciler backup", 1.0)
    for called, told in ((session.began + 1, True), (session.began - 1, False)):
        found = plan(wanting(VM), up(), ledger(called=called), NOW)
        said = list(session.begun_meanwhile(Outcome(found)))
        assert said == (["ctx-1: run r1 was begun meanwhile: it is ACCEPTED"] if told else [])
    (call,) = ledger(called=session.began + 1).calls
    notify = Notify(vm="ctx-1", cause="RunDue", why="", target=VM)
    ours = Step(notify, True, "CallAccepted", "", call=call)
    session.steps.append(ours)
    assert list(session.begun_meanwhile(Outcome(found, [ours]))) == []


# -- the reference appliance


def test_a_copy_that_has_only_begun_has_no_absurd_speed() -> None:
    start = Start("job-1", "vm", "/p", "", "full", "", None)
    target = Target("2000", "127.0.0.1", 10100, "ctx-1-r1-disk0", 0)
    disk = Disk(target, Path("/none"), 96 << 20, phase=Phase.RUNNING)
    job = Job(start, (disk,))
    disk.add(48 << 20)
    speed = job.progress()["throughput_bps"]
    assert isinstance(speed, int)
    assert speed <= 48 << 20
    job.began -= timedelta(seconds=60)  # it is held half-way
    speed = job.progress()["throughput_bps"]
    assert isinstance(speed, int)
    assert 0.7 * (1 << 20) < speed < 0.9 * (1 << 20)


def test_who_waits_for_ports_is_told_where_they_are() -> None:
    other = a_vm("ctx-2")
    few = a_settings("10100-10101")
    known = ledger()
    found = plan(wanting(VM, other, settings=few), up(), known, NOW)
    (waiting,) = (one for one in found.vms if one.name == "ctx-2")
    told = next_command(waiting, replace(found, vms=(waiting,)), "", "/state/runs", known)
    says(told, "reconciler status, for who has the ports", "--wait, or widen `ports:`")
