"""What others are about to do counts as done, for the plan of one VM beside theirs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from reconciler.core.actions import Adopt, Notify, Restart, Start
from reconciler.core.appliances import UNREACHABLE
from reconciler.core.call import Call, CallState, due_call
from reconciler.core.ledger import Lease, Ledger
from reconciler.core.units import Seconds
from reconciler.core.vm_plan import VmPlan

FOR_A_PLACE: Final = frozenset(
    {"NameActive", "PortPoolExhausted", "Renamed", "SnaBusy", "SpaceShort"}
)
"""Causes that end when another VM gives something back, and with no word to who waits for it."""


def ahead(
    ledger: Ledger, others: Iterable[VmPlan], older: Iterable[VmPlan], now: Seconds
) -> Ledger:
    """The ledger as it will be when the plans of some other VMs have been carried out.

    `others` are being carried out: their ports are taken, and who calls has a place at its SNA.
    `older` wait for a place there, and have waited longer than who asks: theirs is the next.
    """
    leases = {lease.key: lease for lease in ledger.leases}
    calls = []
    for one in others:
        leases |= {lease.key: lease for lease in _leases(one) if lease.key not in leases}
        if any(isinstance(action, Notify) for action in one.actions):
            calls.append(_called(ledger, one, now))
    calls += [_called(ledger, one, now) for one in older]
    ledger = replace(ledger, leases=tuple(leases.values()))
    return ledger.put(calls) if calls else ledger


def _leases(one: VmPlan) -> Iterable[Lease]:
    for action in one.actions:
        if isinstance(action, Start | Restart | Adopt):
            yield action.lease


def _called(ledger: Ledger, one: VmPlan, now: Seconds) -> Call:
    active = ledger.active(one.name)
    if active:
        return active
    call = one.call or due_call(ledger.hub, one.vm, now, "")
    return replace(call, state=CallState.INTENDED)


def waits_for_a_place(one: VmPlan) -> bool:
    """Whether it can go on when another VM gives something back."""
    return any(action.cause in FOR_A_PLACE for action in one.actions)


def waits_for_sna(one: VmPlan) -> bool:
    """Whether it is ready to be called for, but for a place at its SNA."""
    return any(action.cause == "SnaBusy" for action in one.actions)


def waits_to_reach(one: VmPlan) -> bool:
    """Whether its run begins when its SNA answers again."""
    return any(action.cause == UNREACHABLE for action in one.actions)


def asked_since(one: VmPlan) -> tuple[Seconds, str]:
    """Who has waited longest goes first."""
    return (one.call.created if one.call else float("inf"), one.name)
