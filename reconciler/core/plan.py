"""(Desired, Actual, Ledger, now) → Plan. The dry run, the apply and status all use this one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.core.actions import (
    CHANGES,
    KINDS,
    Action,
    Adopt,
    Create,
    Notify,
    Refuse,
    Restart,
    Start,
    Stop,
    Wait,
)
from reconciler.core.actual import Actual, Foreign, Image, Listener, Server
from reconciler.core.call import Call
from reconciler.core.desired import Desired, Export
from reconciler.core.errors import Diagnostic
from reconciler.core.ledger import Ledger
from reconciler.core.ports import Pool
from reconciler.core.settings import QemuNbd
from reconciler.core.space import Room
from reconciler.core.tunnel import PREFIX
from reconciler.core.tunnel_plan import TunnelPlan, plan_tunnel
from reconciler.core.tunnel_seen import TunnelSeen
from reconciler.core.units import PortRange, Seconds, natural
from reconciler.core.vm_plan import OneVm, VmPlan

FORMAT_VERSION: Final = "1.0"


class Plan(Struct, frozen=True, kw_only=True):
    """Everything that would make the two states one."""

    hub: str
    ports: PortRange
    vms: tuple[VmPlan, ...]
    tunnels: tuple[TunnelPlan, ...] = ()
    foreign: tuple[Foreign, ...] = ()
    strangers: tuple[Listener, ...] = ()
    """Foreign listeners in the port range."""
    untouched: tuple[str, ...] = ()
    """VMs of this hub that are not in scope: their servers run, or a run of them is asked for."""
    diagnostics: tuple[Diagnostic, ...] = ()
    images: Mapping[str, Image] = field(default_factory=dict)
    """Those that its actions are about, as they were seen. Path → image."""
    qemu_nbd: QemuNbd = QemuNbd()
    """What servers are started with."""

    @property
    def actions(self) -> tuple[Action, ...]:
        return tuple(action for one in self.all for action in one.actions)

    @property
    def all(self) -> tuple[VmPlan | TunnelPlan, ...]:
        """What it is about: VMs, then tunnels."""
        return (*self.vms, *self.tunnels)

    @property
    def changes(self) -> tuple[Action, ...]:
        return tuple(action for action in self.actions if action.kind in CHANGES)

    @property
    def failed(self) -> bool:
        """Something that was written is wrong."""
        return any(one.severity == "error" for one in self.diagnostics)

    def summary(self) -> dict[str, int]:
        counts = Counter(action.kind for action in self.actions)
        return {kind: counts[kind] for kind in KINDS} | {"held": counts["hold"]}

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "hub": self.hub,
            "changes": [
                {
                    **subject_json(action.vm),
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


def subject_json(name: str) -> dict[str, str | None]:
    """What an action or a finding is about, for programs: a VM, or else a tunnel."""
    if name.startswith(PREFIX):
        return {"vm": None, "tunnel": name.removeprefix(PREFIX)}
    return {"vm": name or None}


def foreign_json(plan: Plan) -> list[dict[str, Any]]:
    return [
        {"pid": one.pid, "what": one.what, "image": one.image, "ports": list(one.ports)}
        for one in plan.foreign
    ]


def diagnostics_json(
    diagnostics: Sequence[Diagnostic], sources: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Findings for programs. `sources`: file → its text, by which is known where each ends."""
    from reconciler.core.findings import finding, lines, span  # `status` has none to tell

    split = {one.place.file for one in diagnostics if one.place}
    texts = {file: lines(text) for file, text in (sources or {}).items() if file in split}
    rows = []
    for one in diagnostics:
        found, place = finding(one), one.place
        rows.append(
            {
                "severity": one.severity,
                "rule": found.rule,
                "summary": one.sentence,
                "help": found.help or None,
                **subject_json(one.vm),
                "file": place.file if place else None,
                "line": place.line if place else None,
                "column": place.column if place else None,
                "end_column": span(found, texts),
            }
        )
    return rows


def plan(desired: Desired, actual: Actual, ledger: Ledger, now: Seconds) -> Plan:
    """Say what would make the two states one. Same inputs, same plan, same order."""
    servers: dict[str, list[Server]] = defaultdict(list)
    for server in actual.servers:
        servers[server.mark.vm].append(server)
    taken = {lease.port for lease in ledger.leases} | set(actual.listeners) | actual.unbindable
    taken |= {server.mark.port for server in actual.servers}
    pool = Pool(desired.settings.ports, taken)
    room = Room(desired.settings, actual, ledger, desired.vms)
    twins = renamed(desired, ledger, servers)
    planners = [
        OneVm(
            desired,
            actual,
            ledger,
            now,
            desired.vms[name],
            servers[name],
            pool,
            room,
            twins.get(name, ""),
        )
        for name in sorted(desired.vms, key=natural)
    ]
    active = {call.vm: call for call in ledger.open if call.state.active}
    for planner in planners:
        planner.call = call = planner.remembered()
        if call and call.state.active:
            active[call.vm] = call
    for call in active.values():
        room.reserve(call.vm, call.exports)
    plans = [planner.plan() for planner in planners]
    plans = [replace(one, unsure=room.unsure(one.name)) for one in plans]
    plans = _with_places(plans, desired, ledger)
    outside = {name for name, found in servers.items() if found and name not in desired.vms}
    outside |= {line.mark.subject for line in actual.lines} - desired.tunnels.keys()
    return Plan(
        hub=desired.settings.hub,
        ports=desired.settings.ports,
        vms=tuple(plans),
        tunnels=_tunnels(desired, actual, ledger, now),
        foreign=actual.foreign,
        strangers=tuple(actual.listeners[port] for port in sorted(actual.listeners)),
        untouched=tuple(sorted({*outside, *desired.untouched}, key=natural)),
        diagnostics=desired.diagnostics,
        images={
            path: image
            for one in plans
            for path in image_paths(one)
            if (image := actual.images.get(path))
        },
        qemu_nbd=desired.settings.qemu_nbd,
    )


def _tunnels(
    desired: Desired, actual: Actual, ledger: Ledger, now: Seconds
) -> tuple[TunnelPlan, ...]:
    settings = desired.settings
    return tuple(
        plan_tunnel(
            desired.tunnels[name],
            actual.tunnels.get(name, TunnelSeen()),
            {part: one for (tunnel, part), one in ledger.dialled.items() if tunnel == name},
            now,
            hub=settings.hub,
            pause=None if desired.ordered else ledger.paused(name, now),
            ordered=desired.ordered,
            kill_clients=desired.kill_clients,
            healthy_after=settings.loop.healthy_after,
        )
        for name in sorted(desired.tunnels, key=natural)
    )


def image_paths(one: VmPlan) -> Iterator[str]:
    """The images that the actions of a VM are about."""
    for action in one.actions:
        match action:
            case Create() | Start() | Restart():
                yield action.export.image
            case Adopt() | Stop():
                yield action.server.argv[-1]
            case Refuse() if action.disk is not None:
                yield from (e.image for e in exports_of(one) if e.key == action.disk)
            case _:
                pass


def exports_of(one: VmPlan) -> Sequence[Export]:
    """What is or was to be served of a VM."""
    return one.vm.exports or (one.call.exports if one.call else ())


def renamed(
    desired: Desired, ledger: Ledger, servers: Mapping[str, Sequence[Server]]
) -> dict[str, str]:
    """The VMs that are another VM of this hub under a new name, and why they must wait for it.

    A VM is (vCenter, path). Under a second name it would get a second set of servers and a second
    snapshot while the first is being written.
    """
    living: dict[tuple[str, str], tuple[str, Call | None]] = {}
    active = {call.vm: call for call in ledger.open if call.state.active}
    leased = {lease.vm for lease in ledger.leases}
    alive = leased | {name for name, some in servers.items() if some}  # few, where most are at rest
    for name in sorted({*active, *(name for name in alive if name in ledger.applied)}):
        call = active.get(name)
        applied = ledger.applied[name].vm if name in ledger.applied else {}
        vcenter = (call and call.vcenter) or str(applied.get("vcenter", ""))
        path = (call and call.path) or str(applied.get("path", ""))
        if path:
            living.setdefault((vcenter, path), (name, call))
    found = {}
    for name, vm in desired.vms.items():
        other, call = living.get((vm.vcenter, vm.path), (name, None))
        if other == name or not vm.exported or vm.purpose != "backup" or name in leased:
            continue
        before = {export.key: export.size for export in call.exports} if call else {}
        after = {export.key: export.size for export in vm.exports}
        disks = ", with the same disks" if before == after else ""
        run = f"; its run {call.run} is {call.state}" if call else ""
        found[name] = (
            f"this is VM {other} under another name: both are {vm.path} at {vm.vcenter}{disks}"
            f"{run}, and its servers carry that name. Write `name: {other}` again, or end that "
            f"one first: reconciler stop {other}"
        )
    return found


def _with_places(plans: Sequence[VmPlan], desired: Desired, ledger: Ledger) -> list[VmPlan]:
    """An SNA runs `max_running` backups at once, and its client knows a VM by its name alone; who
    has waited longest goes first."""
    active = [call for call in ledger.open if call.state.active]
    running = Counter(call.sna for call in active)
    names = {name: call.vm for call in active for name in (call.vm, call.display_name) if name}
    calling = [one for one in plans if any(isinstance(a, Notify) for a in one.actions)]
    calling.sort(key=lambda one: one.call.created if one.call else float("inf"))
    busy: dict[str, tuple[str, str]] = {}
    for one in calling:
        sna, own = one.vm.sna, (one.name, one.vm.display_name)
        limit = desired.settings.snas[sna].max_running
        namesake = next((names[name] for name in own if names.get(name, one.name) != one.name), "")
        if namesake:
            why = (
                f"VM {namesake} has an active run, and an appliance's client that asks for "
                f"{one.vm.display_name!r} could mean either; it has its turn when that has ended"
            )
            busy[one.name] = "NameActive", why
            continue
        if running[sna] >= limit:
            busy[one.name] = (
                "SnaBusy",
                f"SNA {sna} already runs {limit} backups, as many as max_running allows",
            )
            continue
        running[sna] += 1
        names |= dict.fromkeys(own, one.name)
    return [_waiting(one, *busy[one.name]) if one.name in busy else one for one in plans]


def news(planned: Plan, before: Mapping[str, VmPlan | TunnelPlan]) -> list[Action]:
    """What stands in the way and did not in the plans before. Of another run, it is news."""
    found = []
    for one in planned.all:
        known = before.get(one.name)
        same = known is not None and _run_of(known) == _run_of(one)
        told = {(a.cause, a.disk) for a in known.actions} if known and same else set()
        found += [
            action
            for action in one.actions
            if action.kind in ("hold", "refuse", "wait") and (action.cause, action.disk) not in told
        ]
    return found


def _run_of(one: VmPlan | TunnelPlan) -> str:
    return one.vm.run if isinstance(one, VmPlan) else ""


def _waiting(one: VmPlan, cause: str, why: str) -> VmPlan:
    """The same plan, with a wait where its call was."""
    actions = tuple(
        Wait(vm=one.name, cause=cause, why=why) if isinstance(action, Notify) else action
        for action in one.actions
    )
    return replace(one, actions=actions)
