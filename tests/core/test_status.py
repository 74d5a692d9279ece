"""What `status` says of a VM: conditions, reasons, and the document that programs read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from reconciler.cli.tables import source_line
from reconciler.core.actual import Actual, Handshake
from reconciler.core.call import CallState
from reconciler.core.desired import Vm
from reconciler.core.ledger import Applied, DiskReport, Ledger, Telemetry
from reconciler.core.plan import plan
from reconciler.core.settings import Settings
from reconciler.core.status import (
    by_type,
    conditions,
    disks,
    document,
    notified,
    progress_text,
)
from reconciler.core.units import stamp
from tests.core.builders import (
    NOW,
    a_call,
    a_lease,
    a_restore,
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


def running(vm: Vm, **changes: Any) -> Actual:
    """Every disk of a VM served, from port 10100 up."""
    servers = [a_server(export, 10100 + n, **changes) for n, export in enumerate(vm.exports)]
    return seen(servers, [an_image(export) for export in vm.exports])


def leased(vm: Vm, state: CallState | None = S.ACCEPTED, **changes: Any) -> Ledger:
    leases = [a_lease(export, 10100 + n) for n, export in enumerate(vm.exports)]
    return remembered(leases, [a_call(vm, state, **changes)] if state else [])


def shown(
    vm: Vm, actual: Actual, ledger: Ledger, settings: Settings | None = None
) -> dict[str, tuple[str, str]]:
    """Condition type → (status, reason)."""
    found = plan(wanting(vm, settings=settings), actual, ledger, NOW)
    return {c.type: (c.status, c.reason) for c in conditions(found.vms[0], actual, ledger)}


def message(vm: Vm, actual: Actual, ledger: Ledger, kind: str) -> str:
    found = plan(wanting(vm), actual, ledger, NOW)
    return by_type(conditions(found.vms[0], actual, ledger))[kind].message


def test_a_vm_under_backup_is_ready() -> None:
    vm = a_vm(disks=2)
    assert shown(vm, running(vm), leased(vm)) == {
        "Ready": ("True", "Converged"),
        "Reconciling": ("False", "NothingToDo"),
        "Stalled": ("False", "NotStalled"),
        "Paused": ("False", "NotPaused"),
        "PortsAllocated": ("True", "Allocated"),
        "Exported": ("True", "Answering"),
        "Drifted": ("False", "AsDeclared"),
        "Notified": ("True", "Accepted"),
    }
    says(message(vm, running(vm), leased(vm), "Ready"), "2 of 2 disks answer", "ACCEPTED")


def test_a_vm_of_which_nothing_is_there_is_being_reconciled() -> None:
    found = shown(a_vm(disks=2), seen(), remembered())
    assert found["Ready"] == ("False", "ImageMissing")
    assert found["Reconciling"] == ("True", "ImageMissing")
    assert found["PortsAllocated"] == ("False", "NotYet")
    assert found["Exported"] == ("False", "NotAnswering")
    assert found["Notified"] == ("False", "NotYet")


def test_a_vm_that_waits_for_ports_says_so() -> None:
    vm, other = a_vm(disks=2), a_vm("ctx-2")
    found = shown(vm, seen(), leased(other, None), a_settings("10100-10101"))
    assert found["Ready"] == ("False", "PortPoolExhausted")
    assert found["PortsAllocated"] == ("False", "PortPoolExhausted")
    assert found["Stalled"] == ("False", "NotStalled")


def test_a_silent_server_with_clients_stalls_its_vm() -> None:
    vm = a_vm()
    actual = running(vm, clients=2, handshake=Handshake(error="no answer in time"))
    found = shown(vm, actual, leased(vm))
    assert found["Stalled"] == ("True", "NoAnswerInUse")
    assert found["Ready"] == ("False", "NoAnswerInUse")
    assert found["Exported"] == ("False", "NotAnswering")
    says(message(vm, actual, leased(vm), "Exported"), "0 of 1 disks")


def test_drift_is_said_while_it_is_held() -> None:
    vm = a_vm()
    found = shown(vm, running(vm), leased(vm), a_settings(cache="writethrough"))
    assert found["Drifted"][0] == "True"
    assert found["Stalled"] == ("False", "NotStalled")


@pytest.mark.parametrize(
    ("state", "ready", "status", "reason"),
    [
        (S.DUE, ("False", "RunDue"), "False", "Due"),
        (S.INTENDED, ("False", "CallUnknown"), "Unknown", "Intended"),
        (S.ACCEPTED, ("True", "Converged"), "True", "Accepted"),
        (S.UNKNOWN, ("False", "CallUnknown"), "Unknown", "Unknown"),
        (S.REJECTED, ("False", "CallRejected"), "False", "Rejected"),
    ],
)
def test_what_became_of_the_call_is_a_condition(
    state: CallState, ready: tuple[str, str], status: str, reason: str
) -> None:
    vm = a_vm()
    found = shown(vm, running(vm), leased(vm, state, message="said so"))
    assert found["Ready"] == ready
    assert found["Notified"] == (status, reason)
    says(message(vm, running(vm), leased(vm, state, message="said so"), "Notified"), "said so")


@pytest.mark.parametrize(
    ("state", "ready"),
    [
        (S.COMPLETED, ("True", "Completed")),
        (S.FAILED, ("False", "RunFailed")),
        (S.CANCELLED, ("False", "RunCancelled")),
    ],
)
def test_a_run_that_has_ended_is_released_and_says_how_it_ended(
    state: CallState, ready: tuple[str, str]
) -> None:
    vm = a_vm()
    ledger = remembered((), [a_call(vm, state, message="a server died")])
    found = shown(vm, seen(), ledger)
    assert found["Ready"] == ready
    assert found["Exported"] == ("False", "Released")
    assert "PortsAllocated" not in found
    assert found["Reconciling"] == ("False", "NothingToDo")
    if state is not S.COMPLETED:
        says(message(vm, seen(), ledger, "Ready"), "a server died", "ask for a new run")


def test_a_kept_export_is_shown_after_its_run() -> None:
    vm = a_vm(release="keep")
    found = shown(vm, running(vm), leased(vm, S.COMPLETED))
    assert found["Ready"] == ("True", "Completed")
    assert found["Exported"] == ("True", "Answering")


def test_an_absent_vm_is_ready_when_nothing_of_it_is_there() -> None:
    assert shown(absent(), seen(), remembered()) == {
        "Ready": ("True", "Absent"),
        "Reconciling": ("False", "NothingToDo"),
        "Stalled": ("False", "NotStalled"),
        "Paused": ("False", "NotPaused"),
    }
    vm = a_vm()
    found = shown(absent(), running(vm), leased(vm, S.COMPLETED))
    assert found["Ready"] == ("False", "Absent")
    assert found["Reconciling"] == ("True", "Absent")


def test_an_absent_vm_under_an_active_run_is_not_ready_and_not_at_fault() -> None:
    vm = a_vm()
    found = shown(absent(), running(vm), leased(vm))
    assert found["Ready"] == ("False", "RunActive")
    assert found["Stalled"] == ("False", "NotStalled")


def test_a_refused_change_stalls() -> None:
    vm = a_vm()
    found = shown(a_vm(disks=2), running(vm), leased(vm))
    assert found["Stalled"] == ("True", "RunChanged")


def test_a_restore_is_never_notified_of() -> None:
    vm = a_restore()
    assert "Notified" not in shown(vm, running(vm), leased(vm, None))


def test_disks_that_nobody_confirms_are_a_condition() -> None:
    vm = a_vm(verified=False)
    assert shown(vm, running(vm), leased(vm))["DisksUnverified"] == ("True", "NoInventory")


def test_a_vm_that_was_never_called_for_says_so() -> None:
    found = notified(None)
    assert (found.status, found.reason) == ("False", "NotYet")


# -- the document


def written(vm: Vm, actual: Actual, ledger: Ledger) -> Any:
    found = document(plan(wanting(vm), actual, ledger, NOW), actual, ledger, NOW)
    return json.loads(json.dumps(found))


def test_the_document_is_the_one_that_others_rely_on() -> None:
    vm = a_vm("ctx-123", "nightly", disks=2)
    ledger = leased(vm)
    ledger = replace(
        ledger,
        leases=(replace(ledger.leases[0], restarts=3), ledger.leases[1]),
        applied={"ctx-123": Applied(vm={}, generation=7, at=NOW)},
        transitions={("ctx-123", "Ready"): ("True", "Converged", 0.0)},
    )
    actual = running(vm, clients=2)
    found = written(vm, actual, ledger)
    assert (found["format_version"], found["hub"]) == ("1.0", "hub-a")
    (one,) = found["vms"]
    assert (one["name"], one["state"], one["run"]) == ("ctx-123", "exported", "nightly")
    assert one["observedGeneration"] == 7
    assert one["conditions"][0] == {
        "type": "Ready",
        "status": "True",
        "reason": "Converged",
        "message": "2 of 2 disks answer, the call is ACCEPTED",
        "lastTransitionTime": "1970-01-01T00:00:00Z",
    }
    assert one["disks"][0] == {
        "key": "2000",
        "export": "ctx-123-nightly-disk0",
        "port": 10100,
        "pid": 4000,
        "image": "/backup/ctx-123/2000/nightly.qcow2",
        "ready": True,
        "clients": 2,
        "restarts": 3,
        "reported": False,
    }
    assert one["nbd_targets"] == (
        "2000:nbd://127.0.0.1:10100/ctx-123-nightly-disk0,"
        "2001:nbd://127.0.0.1:10101/ctx-123-nightly-disk1"
    )
    call = one["call"]
    assert (call["state"], call["sna"], call["attempt"]) == ("ACCEPTED", "site-a", 1)
    assert call["job_id"] == ledger.calls[0].job_id
    assert call["at"] == stamp(ledger.calls[0].changed)
    assert call["progress"] is None


def told(ledger: Ledger, *positions: int, **changes: Any) -> Ledger:
    """The same ledger, after reports of those disks and a word of telemetry."""
    job = ledger.calls[0].job_id
    words: dict[str, Any] = {
        "job_id": job, "first": NOW - 60, "at": NOW - 3, "status": "running", "phase": "copying",
        "bytes": 49 << 20, "total": 96 << 20, "speed": 12 << 20, "percent": 51.04, "error": "",
    }  # fmt: skip
    reports = {
        one: DiskReport(job_id=job, position=one, change_id=f"id-{one}", bytes=1, at=NOW)
        for one in positions
    }
    telemetry = {job: Telemetry(**{**words, **changes})}
    return replace(ledger, reports={job: reports}, telemetry=telemetry)


def test_the_document_has_what_the_client_said_of_an_open_call() -> None:
    vm = a_vm(disks=2)
    (one,) = written(vm, running(vm), told(leased(vm), 1))["vms"]
    assert [disk["reported"] for disk in one["disks"]] == [False, True]
    assert one["call"]["progress"] == {
        "percent": 51.04,
        "bytes": 49 << 20,
        "total": 96 << 20,
        "speed": 12 << 20,
        "phase": "copying",
        "status": "running",
        "error": None,
        "at": stamp(NOW - 3),
    }
    (one,) = written(vm, running(vm), told(leased(vm), error="no space"))["vms"]
    assert one["call"]["progress"]["error"] == "no space"


def test_reports_of_one_run_say_nothing_of_the_disks_of_another() -> None:
    vm = a_vm(run="r2", disks=2)
    before = a_vm(run="r1", disks=2)
    for state, shown in ((S.ACCEPTED, True), (S.COMPLETED, False)):
        ledger = told(remembered(calls=[a_call(before, state)]), 0, 1)
        views = disks(plan(wanting(vm), seen(), ledger, NOW).vms[0], seen(), ledger)
        assert [view.reported for view in views] == [shown, shown]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "51 %, 49 MiB of 96 MiB, 12 MiB/s, copying, 3 s ago"),
        ({"phase": ""}, "51 %, 49 MiB of 96 MiB, 12 MiB/s, running, 3 s ago"),
        ({"total": 0, "speed": 0, "phase": "", "status": ""}, "51 %, 49 MiB, 3 s ago"),
        ({"total": 0, "bytes": 0, "speed": 0}, "51 %, copying, 3 s ago"),
        (
            {"error": "no space"},
            "51 %, 49 MiB of 96 MiB, 12 MiB/s, copying, 3 s ago; error: no space",
        ),
        ({"at": NOW + 5}, "51 %, 49 MiB of 96 MiB, 12 MiB/s, copying, 0 ms ago"),
    ],
)
def test_progress_is_one_line(changes: dict[str, Any], line: str) -> None:
    ledger = told(remembered(calls=[a_call(a_vm())]), **changes)
    (said,) = ledger.telemetry.values()
    assert progress_text(said, NOW) == line


def test_a_disk_without_a_server_has_no_pid_and_no_port() -> None:
    vm = a_vm(disks=2)
    actual = running(vm)
    actual = replace(actual, servers=actual.servers[:1])
    (one,) = written(vm, actual, leased(vm))["vms"]
    first, second = one["disks"]
    assert (first["pid"], first["ready"]) == (4000, True)
    assert (second["pid"], second["port"], second["ready"]) == (None, None, False)
    assert one["nbd_targets"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"handshake": None},
        {"handshake": Handshake(error="silent")},
        {"handshake": Handshake(5)},
        {"listening": False},
    ],
)
def test_a_disk_is_ready_only_after_a_handshake_of_its_size(change: dict[str, Any]) -> None:
    vm = a_vm()
    (one,) = written(vm, running(vm, **change), leased(vm))["vms"]
    assert one["disks"][0]["ready"] is False


def test_the_disks_shown_are_those_of_the_active_run() -> None:
    was = a_vm(disks=2)
    (one,) = written(a_vm(run="r2"), running(was), leased(was))["vms"]
    assert [disk["export"] for disk in one["disks"]] == ["ctx-1-r1-disk0", "ctx-1-r1-disk1"]
    assert one["run"] == "r2"
    assert one["call"]["run"] == "r1"


def test_an_absent_vm_has_no_run_and_no_disks() -> None:
    (one,) = written(absent(), seen(), remembered())["vms"]
    assert (one["state"], one["run"], one["disks"]) == ("absent", None, [])
    assert (one["nbd_targets"], one["call"], one["observedGeneration"]) == (None, None, 0)


def test_targets_name_the_host_that_was_applied() -> None:
    vm = a_vm()
    ledger = replace(leased(vm), settings={"advertise": "hub.example"})
    (one,) = written(vm, running(vm), ledger)["vms"]
    assert one["nbd_targets"].startswith("2000:nbd://hub.example:10100/")


def test_a_condition_keeps_its_time_until_its_status_changes() -> None:
    vm = a_vm()
    for status, expected in (("True", 0.0), ("False", NOW)):
        transitions = {("ctx-1", "Ready"): (status, "Whatever", 0.0)}
        ledger = replace(leased(vm), transitions=transitions)
        (one,) = written(vm, running(vm), ledger)["vms"]
        assert one["conditions"][0]["lastTransitionTime"] == stamp(expected)


def test_times_are_in_utc_to_the_second() -> None:
    assert stamp(0.9) == "1970-01-01T00:00:00Z"
    assert stamp(1_800_000_000.0) == "2027-01-15T08:00:00Z"


SOURCE: dict[str, Any] = {
    "directory": "/srv/specs",
    "revision": {"digest": "d" * 64, "commit": "c" * 40, "author": "Jane", "subject": "more",
                 "dirty": False, "name": "c" * 12},
    "at": NOW,
    "unread": {},
    "unread_since": 0.0,
    "waiting": {},
    "held": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (["SourceUnreadable", "a.yaml:1:2: half"], ("SourceUnreadable", "SourceUnreadable")),
        (["EmptySource", "it is gone"], ("SourceUnreadable", "EmptySource")),
        (["TooMany", "approve"], ("PruneHeld", "TooMany")),
        (["PruneDisabled", "stop"], ("PruneHeld", "PruneDisabled")),
    ],
)
def test_what_the_directory_keeps_is_a_condition(
    held: list[str], expected: tuple[str, str]
) -> None:
    vm = a_vm()
    ledger = replace(leased(vm), source={**SOURCE, "held": {vm.name: held}})
    found = plan(wanting(vm), running(vm), ledger, NOW)
    kept = [one for one in conditions(found.vms[0], running(vm), ledger) if one.reason == held[0]]
    assert [(one.type, one.reason, one.message) for one in kept] == [(*expected, held[1])]
    assert shown(vm, running(vm), ledger)["Ready"] == ("True", "Converged")  # as it was is well


def test_the_source_is_in_the_document() -> None:
    vm = a_vm()
    ledger = leased(vm)
    found = plan(wanting(vm), running(vm), ledger, NOW)
    assert document(found, running(vm), ledger, NOW)["source"] is None
    trouble = {
        **SOURCE,
        "unread": {"a.yaml": "half"},
        "unread_since": NOW - 60,
        "waiting": {"name": "c" * 12, "vms": ["x"]},
        "fetch": {"url": "/x", "branch": "main", "fetch_error": "no", "fetch_since": NOW - 90},
    }
    told = document(found, running(vm), replace(ledger, source=trouble), NOW)["source"]
    assert json.loads(json.dumps(told)) == told
    assert (told["revision"], told["commit"], told["author"]) == ("c" * 12, "c" * 40, "Jane")
    assert told["unread"] == [{"file": "a.yaml", "message": "half"}]
    assert told["unreadSince"] == stamp(NOW - 60)
    assert told["git"]["failingSince"] == stamp(NOW - 90)
    line = source_line(told)
    says(line, "source: /srv/specs at cccccccccccc (Jane: more)", "not readable since", "half")
    says(line, f"not fetched since {stamp(NOW - 90)}: no", "1 removal waits: reconciler approve")
    assert "\n" not in line
