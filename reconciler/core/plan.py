"""(Desired, Actual, Ledger, now) → Plan. The dry run, the apply and status all use this one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.actions import CHANGES, KINDS, Action, Notify, Wait
from reconciler.core.actual import Actual, Foreign, Listener, Server
from reconciler.core.desired import Desired
from reconciler.core.errors import Diagnostic
from reconciler.core.ledger import Ledger
from reconciler.core.ports import Pool
from reconciler.core.units import PortRange, Seconds, natural
from reconciler.core.vm_plan import OneVm, VmPlan

FORMAT_VERSION: Final = "1.0"


class Plan(Struct, frozen=True, kw_only=True):
    """Everything that would make the two states one."""

    hub: str
    ports: PortRange
    vms: tuple[VmPlan, ...]
    foreign: tuple[Foreign, ...] = ()
    strangers: tuple[Listener, ...] = ()
    """Foreign listeners in the port range."""
    untouched: tuple[str, ...] = ()
    """VMs of this hub that are not in scope: their servers run, or a run of them is asked for."""
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def actions(self) -> tuple[Action, ...]:
        return tuple(action for vm in self.vms for action in vm.actions)

    @property
    def changes(self) -> tuple[Action, ...]:
        return tuple(action for action in self.actions if action.kind in CHANGES)

    def summary(self) -> dict[str, int]:
        counts = Counter(action.kind for action in self.actions)
        return {kind: counts[kind] for kind in KINDS} | {"held": counts["hold"]}

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "hub": self.hub,
            "changes": [
                {
                    "vm": action.vm,
                    "disk": None if action.disk is None else str(action.disk),
                    "action": action.kind,
                    "cause": action.cause,
                    "why": action.why,
                    "what": action.what(),
                }
                for action in self.actions
            ],
            "summary": self.summary(),
            "untouched": list(self.untouched),
            "foreign": foreign_json(self),
            "busy_ports": [
                {"port": one.port, "address": one.address, "pid": one.pid, "name": one.name}
                for one in self.strangers
            ],
            "diagnostics": diagnostics_json(self.diagnostics),
        }


def foreign_json(plan: Plan) -> list[dict[str, Any]]:
    return [
        {"pid": one.pid, "what": one.what, "image": one.image, "ports": list(one.ports)}
        for one in plan.foreign
    ]


def diagnostics_json(diagnostics: Sequence[Diagnostic]) -> list[dict[str, Any]]:
    return [
        {
            "severity": one.severity,
            "summary": one.summary,
            "file": one.place.file if one.place else None,
            "line": one.place.line if one.place else None,
            "column": one.place.column if one.place else None,
        }
        for one in diagnostics
    ]


def plan(desired: Desired, actual: Actual, ledger: Ledger, now: Seconds) -> Plan:
    """Say what would make the two states one. Same inputs, same plan, same order."""
    servers: dict[str, list[Server]] = defaultdict(list)
    for server in actual.servers:
        servers[server.mark.vm].append(server)
    taken = {lease.port for lease in ledger.leases} | set(actual.listeners) | actual.unbindable
    taken |= {server.mark.port for server in actual.servers}
    pool = Pool(desired.settings.ports, taken)
    plans = []
    for name in sorted(desired.vms, key=natural):
        planner = OneVm(desired, actual, ledger, now, desired.vms[name], servers[name], pool)
        plans.append(planner.plan())
    outside = {name for name, found in servers.items() if found and name not in desired.vms}
    return Plan(
        hub=desired.settings.hub,
        ports=desired.settings.ports,
        vms=tuple(_with_places(plans, desired, ledger)),
        foreign=actual.foreign,
        strangers=tuple(actual.listeners[port] for port in sorted(actual.listeners)),
        untouched=tuple(sorted({*outside, *desired.untouched}, key=natural)),
        diagnostics=desired.diagnostics,
    )


def _with_places(plans: Sequence[VmPlan], desired: Desired, ledger: Ledger) -> list[VmPlan]:
    """An SNA runs `max_running` backups at once; who has waited longest goes first."""
    running = Counter(call.sna for call in ledger.calls if call.state.active)
    calling = [one for one in plans if any(isinstance(a, Notify) for a in one.actions)]
    calling.sort(key=lambda one: one.call.created if one.call else float("inf"))
    busy: dict[str, str] = {}
    for one in calling:
        sna = one.vm.sna
        limit = desired.settings.snas[sna].max_running
        if running[sna] >= limit:
            busy[one.name] = (
                f"SNA {sna} already runs {limit} backups, as many as max_running allows"
            )
        running[sna] += 1
    return [
        replace(
            one,
            actions=tuple(
                Wait(vm=one.name, cause="SnaBusy", why=busy[one.name])
                if isinstance(action, Notify)
                else action
                for action in one.actions
            ),
        )
        if one.name in busy
        else one
        for one in plans
    ]
