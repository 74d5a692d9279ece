"""How far a VM is from what a person waits for."""

from __future__ import annotations

import pytest

from reconciler.core.actual import Actual
from reconciler.core.call import CallState
from reconciler.core.desired import Vm
from reconciler.core.ledger import Ledger
from reconciler.core.plan import plan
from reconciler.core.waiting import Stand, Wish, stand
from tests.core.builders import (
    NOW,
    a_call,
    a_lease,
    a_restore,
    a_server,
    a_vm,
    absent,
    an_export,
    remembered,
    seen,
    wanting,
)

S = CallState
UP = seen([a_server()])
NONE = seen()
RUNNING = remembered([a_lease()], [a_call()])


def ended(state: CallState) -> Ledger:
    return remembered([], [a_call(state=state, message="no space")])


def of(vm: Vm, actual: Actual, ledger: Ledger, wish: Wish, run: str = "") -> Stand:
    (one,) = plan(wanting(vm), actual, ledger, NOW).vms
    return stand(one, actual, ledger, wish, run)


@pytest.mark.parametrize(
    ("vm", "actual", "ledger", "met"),
    [
        (a_vm(), UP, RUNNING, {"Ready"}),
        (a_vm(), NONE, remembered(), set()),
        (a_vm(), NONE, ended(S.COMPLETED), {"Ready", "Completed", "Absent"}),
        (a_vm(release="keep"), UP, remembered([a_lease()], [a_call(state=S.COMPLETED)]),
         {"Ready", "Completed"}),
        (a_vm(), NONE, remembered([a_lease()], [a_call(state=S.COMPLETED)]), {"Completed"}),
        (a_vm(run="r2"), NONE, ended(S.COMPLETED), set()),
        (absent(), NONE, remembered(), {"Absent"}),
        (absent(), UP, RUNNING, set()),
        (absent(), NONE, remembered([a_lease()]), set()),
        (a_restore(), seen([a_server(an_export("look"))]), remembered(), set()),
    ],
)  # fmt: skip
def test_what_is_met(vm: Vm, actual: Actual, ledger: Ledger, met: set[Wish]) -> None:
    wishes: tuple[Wish, ...] = ("Ready", "Completed", "Absent")
    found = {wish: of(vm, actual, ledger, wish) for wish in wishes}
    assert {wish for wish, one in found.items() if one.met} == met
    assert all(one.why for one in found.values())
    assert not any(one.met and one.never for one in found.values())


@pytest.mark.parametrize("state", [S.FAILED, S.CANCELLED])
@pytest.mark.parametrize("wish", ["Ready", "Completed"])
def test_what_cannot_come_any_more(state: CallState, wish: Wish) -> None:
    found = of(a_vm(), NONE, ended(state), wish)
    assert found.never
    assert state in found.why
    tainted = remembered([a_lease()], [a_call(tainted=True)])
    assert of(a_vm(), UP, tainted, wish).never


def test_a_restore_has_no_run() -> None:
    assert of(a_restore(), NONE, remembered(), "Completed").never
    assert not of(a_restore(), NONE, remembered(), "Ready").never


def test_a_run_that_is_named_is_meant_and_no_other() -> None:
    for wish in ("Ready", "Completed"):
        found = of(a_vm(), NONE, ended(S.COMPLETED), wish, "r2")
        assert (found.met, found.never) == (False, False), wish
        assert "run r2 is not applied yet" in found.why
    assert of(a_vm(run="r2"), NONE, ended(S.COMPLETED), "Completed", "r1").met
    assert of(a_vm(run="r2"), NONE, ended(S.FAILED), "Completed", "r1").never
    assert of(a_vm(), UP, RUNNING, "Ready", "r1").met
