"""While who knows all disks cannot be asked, what has begun goes on and nothing begins."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from reconciler.core.call import CallState
from reconciler.core.desired import Desired, Vm
from reconciler.core.inventory import Inventory
from reconciler.core.ledger import Ledger
from reconciler.core.plan import plan
from reconciler.core.source import Stale, stale_told
from tests.core.builders import (
    NOW,
    a_call,
    a_lease,
    a_restore,
    a_server,
    a_settings,
    a_vm,
    brief,
    desired,
    known,
    only,
    remembered,
    says,
    seen,
    wanting,
)

STALE = "the inventory mysql://db/oma: it was read last at 2026-11-20T10:00:00Z, and …"


def causes(vm: Vm, ledger: Ledger, *servers: Any, stale: str = STALE) -> set[tuple[str, str]]:
    wanted: Desired = replace(wanting(vm), stale=stale)
    found = plan(wanted, seen(list(servers)), ledger, NOW)
    return {(kind, cause) for kind, _, cause in brief(found)}


@pytest.mark.parametrize("state", [None, CallState.DUE, CallState.REJECTED])
def test_a_run_that_has_not_begun_does_not(state: CallState | None) -> None:
    vm = a_vm()
    ledger = remembered(calls=[a_call(vm, state)]) if state else remembered()
    found = plan(replace(wanting(vm), stale=STALE), seen(), ledger, NOW)
    action = only(found)
    assert (action.kind, action.cause) == ("refuse", "InventoryStale")
    says(action.why, STALE, "nothing of this VM is changed")


@pytest.mark.parametrize("state", [CallState.DUE, CallState.REJECTED])
def test_its_servers_are_left_as_they_are(state: CallState) -> None:
    vm = a_vm()
    (export,) = vm.exports
    ledger = remembered(calls=[a_call(vm, state)], leases=[a_lease(export)])
    refused = {("refuse", "InventoryStale")}
    assert causes(vm, ledger, a_server(export)) == refused
    assert causes(vm, ledger, a_server(export), stale="") != refused


@pytest.mark.parametrize("state", [CallState.INTENDED, CallState.ACCEPTED, CallState.UNKNOWN])
def test_a_run_that_has_begun_is_kept_up(state: CallState) -> None:
    vm = a_vm()
    (export,) = vm.exports
    ledger = remembered(calls=[a_call(vm, state)], leases=[a_lease(export)])
    assert causes(vm, ledger) == causes(vm, ledger, stale="")


def test_the_next_run_waits_for_the_active_one_as_ever() -> None:
    vm = a_vm()
    (export,) = vm.exports
    ledger = remembered(calls=[a_call(vm, CallState.ACCEPTED)], leases=[a_lease(export)])
    found = plan(
        replace(wanting(a_vm(run="r2")), stale=STALE), seen([a_server(export)]), ledger, NOW
    )
    assert [cause for *_, cause in brief(found)] == ["RunActive"]


def test_a_restore_needs_no_inventory() -> None:
    assert causes(a_restore(), remembered()) == causes(a_restore(), remembered(), stale="")


def test_what_a_stale_inventory_says_is_desired_and_why_it_does_not_begin() -> None:
    text = "vms:\n  ctx-1: {vm: {path: /DC/x}, disks: [{key: 2000, size: 1GiB}]}\n"
    stale = replace(known(text), stale=Stale("it is down", NOW))
    spec = "vms: [{name: NAME, disks: inventory, backup: {run: r1}}]"
    found = desired(spec.replace("NAME", "ctx-1"), stale)
    assert [export.key for export in found.vms["ctx-1"].exports] == [2000]
    says(found.stale, "the inventory inventory.yaml: it was read last at", "now: it is down")
    found = desired(spec.replace("NAME", "ctx-2"), stale)
    says(found.diagnostics[0].summary, "does not know this VM", "it was read last", "it is down")


def test_of_one_that_was_never_read_nothing_is_known() -> None:
    never = Inventory("mysql://db/oma", {}, stale=Stale("it is down"))
    assert not never.readable
    found = desired("vms: [{name: ctx-1, disks: inventory, backup: {run: r1}}]", never)
    says(found.diagnostics[0].summary, "its disks come from", "was never read", "it is down")
    found = desired("runs: [{vm: ctx-1, run: r1}]", never, settings=a_settings())
    says(found.diagnostics[0].summary, "there is no VM 'ctx-1'", "was never read")


def test_what_is_remembered_of_it_says_the_same() -> None:
    stale = Inventory("mysql://db/oma", {}, stale=Stale("it is down", NOW))
    assert stale_told({"inventory": stale.to_source()}) == stale.told()
    assert stale_told({"inventory": replace(stale, stale=None).to_source()}) == ""
    assert stale_told({}) == ""
