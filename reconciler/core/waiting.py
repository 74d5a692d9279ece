"""What a person waits for, and whether it is there, may come, or cannot come any more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from msgspec import Struct

from reconciler.core.actual import Actual
from reconciler.core.call import CallState
from reconciler.core.ledger import Ledger
from reconciler.core.status import by_type, conditions
from reconciler.core.tunnel_plan import TunnelPlan
from reconciler.core.tunnel_status import conditions as tunnel_conditions
from reconciler.core.vm_plan import VmPlan

Wish = Literal["Ready", "Completed", "Absent"]
WISHES: Final[Mapping[Wish, str]] = {
    "Ready": "every disk answers and the appliance was called",
    "Completed": "its run is a backup",
    "Absent": "nothing of it is served, and no port is kept for it",
}


class Stand(Struct, frozen=True):
    """How far a wish is."""

    met: bool
    why: str
    never: bool = False
    """It cannot come any more without another order."""


def tunnel_stand(one: TunnelPlan, actual: Actual, ledger: Ledger, wish: Wish) -> Stand:
    """The same for a tunnel, which has no run."""
    if wish == "Completed":
        return Stand(False, "it is a tunnel, which has no run that could be complete", never=True)
    if wish == "Absent":
        lines = actual.tunnels[one.name].lines if one.name in actual.tunnels else ()
        left = f"{len(lines)} connection{'s are' if len(lines) != 1 else ' is'} up"
        return Stand(not lines, left if lines else "nothing of it runs")
    ready = by_type(tunnel_conditions(one, actual, ledger))["Ready"]
    return Stand(ready.status == "True", f"{ready.reason}: {ready.message}")


def stand(one: VmPlan, actual: Actual, ledger: Ledger, wish: Wish, run: str = "") -> Stand:
    """How far a wish is for a VM. `run`: for this run and no other; empty: for the wanted one."""
    vm, call = one.vm, one.call
    ready = by_type(conditions(one, actual, ledger))["Ready"]
    said = f"{ready.reason}: {ready.message}"
    if wish == "Absent":
        return absent(one, actual, ledger)
    if wish == "Completed" and vm.exported and vm.purpose != "backup":
        return Stand(False, "it is a restore, which has no run that could be complete", never=True)
    if run and wish == "Completed":
        named = ledger.latest(one.name, run)
        if named and named.state is CallState.COMPLETED:
            return Stand(True, f"run {run} is completed")
        if named and named.state.terminal:
            return Stand(False, f"run {run} is {named.state}: {named.message}", never=True)
    if run and vm.run != run:
        return Stand(False, f"run {run} is not applied yet; wanted is {vm.run or 'none'}")
    if one.lost_run:
        return Stand(False, one.lost_run, never=True)
    if not vm.exported:
        return Stand(False, "it is to be absent, by what was applied last")
    if wish == "Ready":
        return Stand(ready.status == "True", said)
    if call and call.run == vm.run and call.state is CallState.COMPLETED:
        return Stand(True, f"run {call.run} is completed")
    if ready.status == "True" and call:
        return Stand(False, f"run {call.run} is {call.state}")
    return Stand(False, said)


def absent(one: VmPlan, actual: Actual, ledger: Ledger) -> Stand:
    """Whether nothing of a VM is there, and nothing is to come."""
    served = sum(server.mark.vm == one.name for server in actual.servers)
    leased = len(ledger.of(one.name))
    if served:
        words = "servers of it run" if served > 1 else "server of it runs"
        return Stand(False, f"{served} {words}")
    if leased:
        return Stand(False, f"{leased} port{'s are' if leased > 1 else ' is'} kept for it")
    call = one.call
    over = call is not None and call.run == one.vm.run and call.state.terminal
    if one.vm.exported and not (over and one.vm.release == "on_completion"):
        return Stand(False, "it is to be exported, by what was applied last")
    return Stand(True, "nothing of it is exported")
