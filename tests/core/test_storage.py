"""Storage that hangs: what is planned, and what is done when it hangs in the middle."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from reconciler.core.call import Call, CallState
from reconciler.core.desired import Vm
from reconciler.core.errors import HostError
from reconciler.core.plan import plan
from reconciler.core.status import by_type, conditions
from reconciler.execute import Step
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
from tests.fakes import FakeHost, Reply, one_pass, settle

S = CallState
HANGS = "cannot look at the repository /far: no answer from the storage of /far within 5 s"


@pytest.mark.parametrize("state", [None, *S])
@pytest.mark.parametrize("gone", [False, True])
def test_nothing_of_a_vm_whose_repository_hangs_is_changed(
    state: CallState | None, gone: bool
) -> None:
    vm = a_vm()
    calls = [a_call(vm, state)] if state else []
    server = a_server(handshake=None)
    actual = seen([server], hangs={"ctx-1": HANGS})
    ledger = remembered([a_lease()], calls)
    found = plan(wanting(absent() if gone else vm), actual, ledger, NOW)
    assert brief(found) == [("refuse", None, "StorageHangs")]
    says(found.actions[0].why, HANGS, "nothing of this VM is changed", "dmesg")
    told = by_type(conditions(found.vms[0], actual, ledger))
    assert told["Stalled"].reason == "StorageHangs"


def test_the_others_do_not_notice() -> None:
    near, far = a_vm("ctx-1"), a_vm("ctx-2")
    images = [an_image(near.exports[0], exists=False)]
    actual = seen(images=images, hangs={"ctx-2": HANGS})
    found = plan(wanting(near, far), actual, remembered(), NOW)
    assert [brief(one.actions)[-1] for one in found.vms] == [
        ("call", None, "RunDue"),
        ("refuse", None, "StorageHangs"),
    ]


@dataclass
class Stuck(FakeHost):
    """A hub where some effects find that the storage of one VM hangs."""

    stuck: set[str] = field(default_factory=set)
    """`EFFECT VM`."""
    taken_back: list[str] = field(default_factory=list)
    """VMs whose intents were taken back."""

    def _try(self, effect: str, vm: str) -> None:
        if f"{effect} {vm}" in self.stuck:
            raise HostError(f"cannot {effect}: no answer", "StorageHangs")

    def claim(self, vm: Vm) -> None:
        self._try("claim", vm.name)
        super().claim(vm)

    def intend(self, vm: Vm, call: Call) -> None:
        self._try("intend", vm.name)
        super().intend(vm, call)

    def unintend(self, vm: Vm, call: Call) -> None:
        self._try("unintend", vm.name)
        self.taken_back.append(vm.name)
        super().unintend(vm, call)


def world(*stuck: str) -> Stuck:
    return Stuck(a_settings(), stuck=set(stuck))


def state_of(host: FakeHost, vm: str) -> CallState:
    return host.records.calls[vm, "r1", 1].state


def test_a_claim_that_hangs_makes_no_call_and_the_other_vm_has_its_own() -> None:
    host = world("claim ctx-1")
    desired = wanting(a_vm("ctx-1"), a_vm("ctx-2"))
    steps: list[Step] = []
    one_pass(host, desired, steps=steps)
    assert ("StorageHangs", "ctx-1") in {(s.reason, s.action.vm) for s in steps if not s.ok}
    assert [state_of(host, vm) for vm in ("ctx-1", "ctx-2")] == [S.DUE, S.ACCEPTED]
    host.stuck.clear()
    settle(host, desired)
    assert state_of(host, "ctx-1") is S.ACCEPTED
    assert max(host.started().values()) == 1


def test_an_intent_that_hangs_is_no_call_and_is_not_taken_back() -> None:
    host = world("intend ctx-1")
    desired = wanting(a_vm("ctx-1"), a_vm("ctx-2"))
    one_pass(host, desired)
    assert [state_of(host, vm) for vm in ("ctx-1", "ctx-2")] == [S.DUE, S.ACCEPTED]
    assert len(host.snas["site-a"].posts) == 1  # that of ctx-2
    assert host.taken_back == []
    host.stuck.clear()
    host.clock += 1000
    settle(host, desired)
    assert state_of(host, "ctx-1") is S.ACCEPTED
    assert max(host.started().values()) == 1


def test_an_intent_that_appears_late_is_never_called_over() -> None:
    host = world("intend ctx-1")
    desired = wanting(a_vm())
    one_pass(host, desired)
    host.intents.add(("ctx-1", "r1", 1))
    host.stuck.clear()
    host.clock += 1000
    settle(host, desired)
    assert state_of(host, "ctx-1") is S.UNKNOWN
    assert host.snas["site-a"].posts == []


@pytest.mark.parametrize("reply", [Reply.UNSENT, Reply.REJECT])
def test_a_call_whose_intent_cannot_be_taken_back_is_not_made_again(reply: Reply) -> None:
    host = world("unintend ctx-1")
    host.snas["site-a"].script.append(reply)
    desired = wanting(a_vm())
    for _ in range(3):
        settle(host, desired)
        host.clock += 1000
    assert state_of(host, "ctx-1") is S.UNKNOWN
    assert len(host.snas["site-a"].posts) <= 1
    assert host.started() == {}


def test_where_nothing_was_intended_nothing_is_taken_back() -> None:
    host = world("unintend ctx-1")
    host.snas["site-a"].script.append(Reply.DOWN)
    desired = wanting(a_vm())
    one_pass(host, desired)
    assert state_of(host, "ctx-1") is S.DUE
    host.clock += 1000
    settle(host, desired)
    assert state_of(host, "ctx-1") is S.ACCEPTED
