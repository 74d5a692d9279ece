"""A paused VM: looked at, shown, and left as it is."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from reconciler.core.actions import CHANGES, Hold, Witness
from reconciler.core.actual import Actual
from reconciler.core.call import CallState, Report
from reconciler.core.desired import Desired, Vm
from reconciler.core.ledger import EVERY, Ledger, Pause
from reconciler.core.plan import plan
from reconciler.core.source import NO_SPEC
from reconciler.core.status import by_type, conditions
from reconciler.core.vm_plan import VmPlan
from tests.core.builders import (
    NOW,
    a_call,
    a_lease,
    a_server,
    a_settings,
    a_vm,
    absent,
    an_image,
    brief,
    remembered,
    says,
    seen,
    wanting,
)

S = CallState


def paused(ledger: Ledger, vm: str = "ctx-1", **changes: Any) -> Ledger:
    values = {"vm": vm, "reason": "disk swap", "since": NOW - 60, "who": "reconciler pause (jo)"}
    pause = Pause(**{**values, **changes})
    return replace(ledger, pauses={**ledger.pauses, vm: pause})


def of(desired: Desired, actual: Actual, ledger: Ledger) -> VmPlan:
    (one,) = plan(desired, actual, ledger, NOW).vms
    return one


def held(one: VmPlan) -> Hold:
    (found,) = [action for action in one.actions if action.cause == "Paused"]
    assert isinstance(found, Hold)
    return found


NEW = (wanting(a_vm()), seen(), remembered())
DUE = a_call(state=S.DUE)
DEAD = (wanting(a_vm()), seen([], [an_image()]), remembered([a_lease()], [a_call()]))
GONE = (wanting(absent()), seen([a_server()]), remembered([a_lease()], [DUE]))
PRUNED = (wanting(absent(order=NO_SPEC)), seen([a_server()]), remembered([a_lease()], [DUE]))
UNCALLED = (wanting(a_vm()), seen([a_server()]), remembered([a_lease()], [DUE]))
ADOPTABLE = (wanting(a_vm()), seen([a_server()]), remembered([], [a_call()]))
OTHER_RUN = (wanting(a_vm(run="r2")), seen([a_server()]), remembered([a_lease()], [DUE]))


@pytest.mark.parametrize("case", [NEW, DEAD, GONE, PRUNED, UNCALLED, ADOPTABLE, OTHER_RUN])
@pytest.mark.parametrize("name", ["ctx-1", EVERY])
def test_nothing_of_it_is_changed(case: tuple[Desired, Actual, Ledger], name: str) -> None:
    desired, actual, ledger = case
    assert any(a.kind in CHANGES for a in of(desired, actual, ledger).actions)  # it would be
    found = of(desired, actual, paused(ledger, name))
    assert brief(found.actions) == [("hold", None, "Paused")]
    command = "reconciler resume " + ("--all" if name == EVERY else "ctx-1")
    says(held(found).why, "disk swap", "(jo)", command, "2027-01-15T07:59:00Z")


def test_others_are_not_paused() -> None:
    ledger = paused(remembered())
    found = plan(wanting(a_vm(), a_vm("ctx-2")), seen(), ledger, NOW)
    assert brief(found.vms[0].actions) == [("hold", None, "Paused")]
    assert [kind for kind, *_ in brief(found.vms[1].actions)] == ["create", "start", "call"]


def test_it_takes_no_port_that_another_needs() -> None:
    settings = a_settings("10100-10100")
    ledger = paused(remembered())
    found = plan(wanting(a_vm(), a_vm("ctx-2"), settings=settings), seen(), ledger, NOW)
    assert "start" in [kind for kind, *_ in brief(found.vms[1].actions)]


def test_a_pause_ends_by_itself() -> None:
    desired, actual, ledger = DEAD
    found = of(desired, actual, paused(ledger, until=NOW + 5))
    assert found.again_at == NOW + 5
    says(held(found).why, "until 2027-01-15T08:00:05Z")
    after = plan(desired, actual, paused(ledger, until=NOW + 5), NOW + 5)
    assert [kind for kind, *_ in brief(after)] == ["restart"]


def test_its_own_pause_is_named_before_that_of_every_vm() -> None:
    desired, actual, ledger = DEAD
    both = paused(paused(ledger, EVERY, reason="kernel"), reason="disk swap")
    says(held(of(desired, actual, both)).why, "disk swap", "resume ctx-1")


def test_what_an_appliance_says_of_the_call_is_noted() -> None:
    call = a_call(state=S.UNKNOWN)
    desired, ledger = wanting(a_vm()), remembered([a_lease()], [call])
    actual = seen([a_server()], reports={call.job_id: Report(True, "running", "")})
    found = of(desired, actual, paused(ledger))
    assert [type(action) for action in found.actions] == [Witness, Hold]


def test_that_a_call_is_unknown_is_noted_and_shown() -> None:
    ledger = remembered([a_lease()], [a_call(state=S.INTENDED)])
    found = of(wanting(a_vm()), seen([a_server()]), paused(ledger))
    assert brief(found.actions) == [("hold", None, "CallUnknown"), ("hold", None, "Paused")]


def test_a_denied_call_is_not_made_due_and_an_ended_run_is_not_ended() -> None:
    call = a_call(state=S.UNKNOWN)
    no = seen([a_server()], reports={call.job_id: Report(False, "", "")})
    desired = wanting(a_vm(), settings=a_settings(remembers_jobs=True))
    assert brief(of(desired, no, paused(remembered([a_lease()], [call]))).actions) == [
        ("hold", None, "Paused")
    ]
    call = a_call()
    done = seen([a_server()], reports={call.job_id: Report(True, "completed", "")})
    desired = wanting(a_vm(), settings=a_settings(reports_end=True))
    found = of(desired, done, paused(remembered([a_lease()], [call])))
    assert brief(found.actions) == [("hold", None, "Paused")]
    says(held(found).why, "its run is to end: that waits too")


def test_an_order_to_stop_goes_before_a_pause() -> None:
    _, actual, ledger = GONE
    desired = wanting(absent(order="by order of `reconciler stop`"), ordered=True)
    assert brief(of(desired, actual, paused(ledger)).actions) == [("stop", 2000, "Absent")]


@pytest.mark.parametrize(
    ("vm", "actual", "ledger", "ready"),
    [
        (a_vm(), seen([a_server()]), remembered([a_lease()], [a_call()]), ("True", "Converged")),
        (a_vm(), seen(), remembered([a_lease()], [a_call()]), ("False", "Paused")),
        (a_vm(), seen([a_server()]), remembered([a_lease()], [DUE]), ("False", "Paused")),
        (
            a_vm(run="r2"),
            seen([a_server()]),
            remembered([a_lease()], [a_call()]),
            ("False", "Paused"),
        ),
        (a_vm(), seen(), remembered([], [a_call(state=S.COMPLETED)]), ("True", "Completed")),
        (a_vm(), seen(), remembered([], [a_call(state=S.FAILED)]), ("False", "RunFailed")),
        (absent(), seen(), remembered(), ("True", "Absent")),
        (absent(), seen([a_server()]), remembered([a_lease()], [DUE]), ("False", "Paused")),
    ],
)
def test_it_is_ready_only_if_nothing_is_amiss(
    vm: Vm, actual: Actual, ledger: Ledger, ready: tuple[str, str]
) -> None:
    ledger = paused(ledger)
    found = by_type(conditions(of(wanting(vm), actual, ledger), actual, ledger))
    assert (found["Ready"].status, found["Ready"].reason) == ready
    assert (found["Paused"].status, found["Paused"].reason) == ("True", "Paused")
    says(found["Paused"].message, "disk swap")
    assert found["Stalled"].status == "False"


def test_a_pause_takes_no_note_of_what_another_state_directory_claimed() -> None:
    """Else its run would be written down here, as one whose claimant is gone."""
    run = ("ctx-1", a_vm().run)
    actual = replace(seen(), claims={run: "other"}, rivals={run: "/elsewhere"})
    for ledger in (remembered(), paused(remembered())):
        found = of(wanting(a_vm()), actual, ledger)
        assert [(one.kind, one.cause) for one in found.actions] == [("refuse", "ClaimedElsewhere")]
