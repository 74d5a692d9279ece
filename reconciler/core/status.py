"""Conditions, reasons and the status document, as values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct

from reconciler.core.actions import CHANGES
from reconciler.core.actual import Actual, Server
from reconciler.core.call import Call, CallState, targets
from reconciler.core.condition import Condition as Condition
from reconciler.core.condition import since as since
from reconciler.core.desired import Export
from reconciler.core.disk_plan import export_key
from reconciler.core.ledger import Ledger, Telemetry
from reconciler.core.plan import FORMAT_VERSION, Plan, foreign_json
from reconciler.core.source import NO_SPEC, condition_of
from reconciler.core.tunnel_status import tunnel_json
from reconciler.core.units import Port, Seconds, format_duration, format_size, stamp
from reconciler.core.vm_plan import VmPlan


class DiskView(Struct, frozen=True):
    """One disk as it is now."""

    export: Export
    port: Port | None
    server: Server | None
    restarts: int
    reported: bool = False
    """The SNA's client said that it has arrived."""

    @property
    def ready(self) -> bool:
        server = self.server
        return bool(
            server
            and server.listening
            and server.handshake
            and server.handshake.answered
            and self.export.size in (None, server.handshake.size)
        )


def disks(one: VmPlan, actual: Actual, ledger: Ledger) -> list[DiskView]:
    """The disks of a VM: those of its active run, else those that it should export."""
    call = one.call
    exports = call.exports if call and call.state.active and call.exports else one.vm.exports
    leases = {lease.key: lease for lease in ledger.of(one.name)}
    servers = {server.mark.key: server for server in actual.servers}
    mine = call is not None and (call.exports == exports or call.run == one.vm.run)
    reports = ledger.reports.get(call.job_id, {}) if call and mine else {}
    views = []
    for export in sorted(exports, key=lambda export: export.position):
        lease, server = leases.get(export_key(export)), servers.get(export_key(export))
        port = server.mark.port if server else None
        restarts = lease.restarts if lease else 0
        views.append(DiskView(export, port, server, restarts, export.position in reports))
    return views


_TROUBLE: Final = ("hold", "refuse")
_FAULTS: Final = frozenset({"CrashLoop"})
"""Waits that are a fault all the same: they end by the clock, and begin again."""
_NO_TROUBLE: Final = frozenset({"Paused", "RunActive", "SpecChangedHeld"})
"""Holds that are the ordinary way of things and not a fault."""


def conditions(one: VmPlan, actual: Actual, ledger: Ledger) -> list[Condition]:
    """What is true of a VM, from what would have to be done about it."""
    call, vm = one.call, one.vm
    views = disks(one, actual, ledger)
    ready = sum(view.ready for view in views)
    over = call is not None and call.state.terminal and call.run == vm.run
    released = over and vm.release == "on_completion"
    pending = [action for action in one.actions if action.kind in CHANGES]
    waits = [action for action in one.actions if action.kind == "wait"]
    faults = [a for a in one.actions if a.kind in _TROUBLE or a.cause in _FAULTS]

    def said(kind: str, true: bool, reason: str, message: str) -> Condition:
        return Condition(kind, "True" if true else "False", reason, message)

    found = []
    blocked = [*faults, *one.waits, *pending]
    pause = next((action for action in faults if action.cause == "Paused"), None)
    if pause and blocked == [pause] and as_wanted(one, views):
        blocked = faults = []
    failure = ledger.failures.get(one.name)
    if failure and any(action.cause == failure[0] for action in waits):
        failure = None  # remembered of what it waits for, for who cannot ask: no person is needed
    tainted = call is not None and call.tainted and call.state.active
    failed = over and call is not None and call.state is not CallState.COMPLETED
    if failed:
        assert call is not None
        message = one.lost_run
        found.append(said("Ready", False, f"Run{call.state.capitalize()}", message))
    elif tainted and not faults:
        assert call is not None
        waits_too = f"; run {vm.run} has its turn then" if vm.exported and vm.run else ""
        message = one.lost_run or f"{one.tainted_run}{waits_too}"
        found.append(said("Ready", False, "ServerDied", message))
    elif failure and blocked and not faults:
        found.append(said("Ready", False, *failure))
    elif blocked:
        found.append(said("Ready", False, blocked[0].cause, blocked[0].why))
    elif over:
        assert call is not None
        found.append(said("Ready", True, "Completed", f"run {call.run} is completed"))
    elif vm.exported:
        message = f"{ready} of {len(views)} disks answer" + (
            f", the call is {call.state}" if call else ""
        )
        found.append(said("Ready", True, "Converged", message))
    else:
        found.append(said("Ready", True, "Absent", "nothing of it is exported"))
    busy = [*pending, *waits]
    found.append(
        said("Reconciling", True, busy[0].cause, busy[0].why)
        if busy
        else said("Reconciling", False, "NothingToDo", "nothing is to be changed")
    )
    stalled = [action for action in faults if action.cause not in _NO_TROUBLE]
    found.append(
        said("Stalled", True, stalled[0].cause, stalled[0].why)
        if stalled
        else said("Stalled", True, *failure)
        if failure and blocked
        else said("Stalled", False, "NotStalled", "nothing stands in the way")
    )
    found.append(
        said("Paused", True, "Paused", pause.why)
        if pause
        else said("Paused", False, "NotPaused", "nobody has paused it")
    )
    found += kept_by_source(one, ledger)
    if not vm.exported:
        return found
    if not released:
        exhausted = next((a for a in waits if a.cause == "PortPoolExhausted"), None)
        leased = {lease.key for lease in ledger.of(vm.name)}
        have = sum(export_key(view.export) in leased or bool(view.server) for view in views)
        all_ports = have == len(views) and exhausted is None
        found.append(
            said(
                "PortsAllocated",
                all_ports,
                "Allocated" if all_ports else exhausted.cause if exhausted else "NotYet",
                exhausted.why if exhausted else f"{have} of {len(views)} disks have a port",
            )
        )
        up = ready == len(views) and bool(views)
        message = f"{ready} of {len(views)} disks answer under their export name"
        found.append(said("Exported", up, "Answering" if up else "NotAnswering", message))
        drift = [action for action in one.actions if "SpecChanged" in action.cause]
        found.append(
            said("Drifted", True, drift[0].cause, drift[0].why)
            if drift
            else said("Drifted", False, "AsDeclared", "what runs is what is declared")
        )
    else:
        found.append(said("Exported", False, "Released", "the run has ended"))
    if vm.purpose == "backup":
        found.append(notified(call))
    if call and one.stale:
        found.append(said("Stale", True, one.stale_cause, f"run {call.run}: {one.stale}"))
    elif (one.name, "Stale") in ledger.transitions:  # it was so once
        found.append(said("Stale", False, "Heard", "no run of it is silent for too long"))
    if one.unheard:
        found.append(said("Unheard", True, "NobodyListens", one.unheard))
    elif (one.name, "Unheard") in ledger.transitions:
        found.append(said("Unheard", False, "Heard", "what is reported of its runs is taken"))
    if call and call.run == vm.run and (why := call.fallback or vm.fell_back):
        message = f"run {call.run} is full instead of incremental: {why}"
        found.append(said("FellBack", True, "NoParent", message))
    if one.ahead:
        found.append(said("SpecAhead", True, "RunEnded", one.ahead))
    if call and call.doubt:
        found.append(said("Implausible", True, "NothingWritten", call.doubt))
    if not vm.verified:
        message = "no inventory confirms that these are all disks of the VM"
        found.append(said("DisksUnverified", True, "NoInventory", message))
    if one.unsure:
        found.append(said("SpaceUnsure", True, "FullDisksDoNotFit", one.unsure))
    return found


def as_wanted(one: VmPlan, views: Sequence[DiskView]) -> bool:
    """Of a VM that is left alone: whether it is as it should be, as far as can be seen."""
    call, vm = one.call, one.vm
    if not vm.exported:
        return not any(view.server for view in views) and not one.ports
    if vm.purpose == "backup" and (call is None or call.run != vm.run):
        return False
    if call and call.state.terminal:
        return call.state is CallState.COMPLETED
    called = vm.purpose != "backup" or (call is not None and call.state is CallState.ACCEPTED)
    return called and all(view.ready for view in views)


def kept_by_source(one: VmPlan, ledger: Ledger) -> list[Condition]:
    """Why a VM is not as the watched directory says, or is still there although that is silent."""
    held = (ledger.source.get("held") or {}).get(one.name)
    if held:
        reason, message = held
        return [Condition(condition_of(reason), "True", reason, message)]
    if one.vm.order != NO_SPEC:
        return []
    holds = [action for action in one.actions if action.kind == "hold"]
    return [Condition("PruneHeld", "True", action.cause, action.why) for action in holds[:1]]


def source_json(ledger: Ledger) -> dict[str, Any] | None:
    """What the hub knows of the watched directory; None: none was ever watched."""
    source = ledger.source
    if not source:
        return None
    revision, unread = source["revision"], source["unread"]
    fetch, waiting = source.get("fetch") or {}, source["waiting"]
    inventory = source.get("inventory") or {}
    read = inventory.get("since")
    return {
        "directory": source["directory"],
        "revision": revision.get("name") or None,
        "digest": revision.get("digest") or None,
        "commit": revision.get("commit") or None,
        "author": revision.get("author") or None,
        "subject": revision.get("subject") or None,
        "dirty": bool(revision.get("dirty")),
        "at": stamp(source["at"]),
        "unread": [{"file": file or None, "message": why} for file, why in sorted(unread.items())],
        "unreadSince": stamp(source["unread_since"]) if unread else None,
        "waiting": {"revision": waiting["name"], "vms": waiting["vms"]} if waiting else None,
        "git": {
            "url": fetch["url"],
            "branch": fetch["branch"],
            "error": fetch["fetch_error"] or None,
            "failingSince": stamp(fetch["fetch_since"]) if fetch["fetch_error"] else None,
        }
        if fetch
        else None,
        "inventory": {
            "origin": inventory["origin"],
            "error": inventory["error"] or None,
            "readAt": stamp(read) if read else None,
        }
        if inventory
        else None,
    }


def notified(call: Call | None) -> Condition:
    """Whether the SNA was called."""
    if call is None:
        return Condition("Notified", "False", "NotYet", "the appliance was not called yet")
    said = f"{call.state}" + (f": {call.message}" if call.message else "")
    if call.state in (CallState.ACCEPTED, CallState.COMPLETED):
        return Condition("Notified", "True", call.state.capitalize(), said)
    if call.state in (CallState.UNKNOWN, CallState.INTENDED):
        return Condition("Notified", "Unknown", call.state.capitalize(), said)
    return Condition("Notified", "False", call.state.capitalize(), said)


def document(plan: Plan, actual: Actual, ledger: Ledger, now: Seconds) -> dict[str, Any]:
    """The status of every VM of a plan, as `status -o json` prints it."""
    return {
        "format_version": FORMAT_VERSION,
        "hub": plan.hub,
        "source": source_json(ledger),
        "vms": [_vm(one, actual, ledger, now) for one in plan.vms],
        "tunnels": [tunnel_json(one, actual, ledger, now) for one in plan.tunnels],
        "foreign": foreign_json(plan),
    }


def _vm(one: VmPlan, actual: Actual, ledger: Ledger, now: Seconds) -> dict[str, Any]:
    views = disks(one, actual, ledger)
    applied = ledger.applied.get(one.name)
    return {
        "name": one.name,
        "state": "exported" if one.vm.exported else "absent",
        "run": one.vm.run or None,
        "observedGeneration": applied.generation if applied else 0,
        "conditions": [
            {
                "type": condition.type,
                "status": condition.status,
                "reason": condition.reason,
                "message": condition.message,
                "lastTransitionTime": stamp(since(one.name, condition, ledger, now)),
            }
            for condition in conditions(one, actual, ledger)
        ],
        "disks": [
            {
                "key": str(view.export.key),
                "export": view.export.name,
                "port": view.port,
                "pid": view.server.pid if view.server else None,
                "image": view.export.image,
                "ready": view.ready,
                "clients": view.server.clients if view.server else 0,
                "restarts": view.restarts,
                "reported": view.reported,
            }
            for view in views
        ],
        "nbd_targets": targets_of(views, ledger),
        "call": call_json(one.call, ledger),
    }


def targets_of(views: Sequence[DiskView], ledger: Ledger) -> str | None:
    """The targets string, once every disk has a port."""
    ports = {view.export.key: view.port for view in views if view.port}
    if not views or len(ports) != len(views):
        return None
    host = str(ledger.settings.get("advertise", "127.0.0.1"))
    return targets([view.export for view in views], ports, host)


def call_json(call: Call | None, ledger: Ledger) -> dict[str, Any] | None:
    if call is None:
        return None
    return {
        "state": str(call.state),
        "job_id": call.job_id,
        "sna": call.sna,
        "run": call.run,
        "attempt": call.attempt,
        "at": stamp(call.changed),
        "reason": call.reason,
        "message": call.message,
        "tainted": call.tainted,
        "progress": progress_json(ledger.telemetry.get(call.job_id)),
    }


def progress_json(said: Telemetry | None) -> dict[str, Any] | None:
    """The last word of an SNA's client about an open call; None: none yet, or it has ended."""
    if said is None:
        return None
    return {
        "percent": said.percent,
        "bytes": said.bytes,
        "total": said.total,
        "speed": said.speed,
        "phase": said.phase,
        "status": said.status,
        "error": said.error or None,
        "at": stamp(said.at),
    }


def progress_text(said: Telemetry, now: Seconds) -> str:
    """The same in one line: `51 %, 49 MiB of 96 MiB, 12 MiB/s, copying, 3 s ago`."""
    parts = [f"{said.percent:.0f} %"]
    if said.total:
        parts.append(f"{format_size(said.bytes)} of {format_size(said.total)}")
    elif said.bytes:
        parts.append(format_size(said.bytes))
    if said.speed:
        parts.append(f"{format_size(said.speed)}/s")
    parts += [word for word in (said.phase or said.status,) if word]
    line = f"{', '.join(parts)}, {format_duration(max(0.0, now - said.at))} ago"
    return f"{line}; error: {said.error}" if said.error else line


def by_type(found: Iterable[Condition]) -> Mapping[str, Condition]:
    return {condition.type: condition for condition in found}
