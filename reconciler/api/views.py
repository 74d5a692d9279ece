"""A run as it is shown at the API: from the ledger, its ports, and what was heard of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from reconciler.api.models import Backup, DiskResult, Status
from reconciler.asking import tags_of
from reconciler.core.call import Call, CallState, targets
from reconciler.core.call_plan import heard_at, silent_since
from reconciler.core.desired import Export
from reconciler.core.history import ended
from reconciler.core.settings import Settings
from reconciler.core.units import Port, Seconds, stamp
from reconciler.host.store.listing import Shown

STATUS: Final[Mapping[CallState, Status]] = {
    CallState.DUE: "pending",
    CallState.INTENDED: "running",
    CallState.ACCEPTED: "running",
    CallState.UNKNOWN: "running",
    CallState.REJECTED: "failed",
    CallState.COMPLETED: "completed",
    CallState.FAILED: "failed",
    CallState.CANCELLED: "cancelled",
}
"""What the states of a call are called here. Source: DESIGN.md, section 8."""
STATES: Final[Mapping[Status, tuple[CallState, ...]]] = {
    status: tuple(state for state in CallState if STATUS[state] == status)
    for status in dict.fromkeys(STATUS.values())
}
_PHASE: Final = {
    CallState.DUE: "asked for",
    CallState.INTENDED: "calling the appliance",
    CallState.ACCEPTED: "accepted by the appliance",
    CallState.UNKNOWN: "the outcome of the call is not known",
    CallState.REJECTED: "refused by the appliance",
    CallState.COMPLETED: "completed",
    CallState.FAILED: "failed",
    CallState.CANCELLED: "cancelled",
}
"""What is said while the appliance's client has not said anything."""


def view(
    shown: Shown,
    settings: Settings,
    pids: Mapping[int, int],
    standing: str = "",
    now: Seconds = 0.0,
) -> Backup:
    """One run. `pids`: disk key → its server; `standing`: what keeps it from going on; `now`: for
    how long it may be silent is reckoned from then."""
    call, heard, reports = shown.call, shown.telemetry, shown.reports
    active, done = call.state.active, call.state is CallState.COMPLETED
    disks = list(_disks(shown, pids))
    ports = {export.key: one.nbd_port for export, one in zip(_in_order(call), disks, strict=False)}
    size = sum(export.size or 0 for export in call.exports)
    arrived = sum(one.bytes for one in reports.values())
    whole = bool(reports) and len(reports) == len(call.exports)
    waits = call.state is CallState.DUE and standing
    phase = heard.phase if heard and active and heard.phase else _PHASE[call.state]
    over = ended(call) or (call.changed if call.state is CallState.REJECTED else None)
    return Backup(
        backup_id=call.job_id,
        vm_context_id=call.vm,
        vm_name=call.display_name or call.vm,
        disk_results=disks,
        nbd_targets_string=call.targets or _targets(call, ports, settings.advertise),
        backup_type="incremental" if call.type == "incremental" else "full",
        repository_id=repository_of(call, settings),
        policy_id=call.policy,
        status=STATUS[call.state],
        bytes_transferred=max(arrived, heard.bytes if heard else 0),
        total_bytes=(heard.total if heard else 0) or size,
        disks_count=len(call.exports),
        change_id=reports[0].change_id if whole and 0 in reports else "",
        error_message=standing if waits else _error(shown, settings, now),
        fell_back=call.fallback,
        current_phase=f"waiting: {standing}" if waits else phase,
        transfer_speed_bps=heard.speed if heard and active else 0,
        progress_percent=100.0 if done else heard.percent if heard else 0.0,
        last_telemetry_at=stamp(heard.at) if heard else "",
        created_at=stamp(call.created),
        started_at=stamp(call.called) if call.called else "",
        completed_at=stamp(over) if over else "",
        tags=tags_of(call),
    )


def repository_of(call: Call, settings: Settings) -> str:
    """Where a run's images are; empty: not known."""
    return (settings.repository_of(call.exports[0].image) if call.exports else None) or ""


def answers(backup: Backup) -> bool:
    """Whether every disk of a run is served, or the run is beyond that."""
    served = [one.status == "qemu_started" for one in backup.disk_results]
    if backup.status in ("pending", "running"):
        return bool(served) and all(served) and len(served) == backup.disks_count
    return True


def _in_order(call: Call) -> list[Export]:
    return sorted(call.exports, key=lambda export: export.position)


def _disks(shown: Shown, pids: Mapping[int, int]) -> Iterator[DiskResult]:
    call = shown.call
    leases = {lease.disk: lease for lease in shown.leases}
    told = dict(_told(call.targets))
    ports: dict[int, Port] = {**told, **{key: lease.port for key, lease in leases.items()}}
    if any(export.key not in ports for export in call.exports):
        return
    lost = call.state in (CallState.REJECTED, CallState.FAILED, CallState.CANCELLED)
    for export in _in_order(call):
        lease, pid = leases.get(export.key), pids.get(export.key)
        up = pid is not None and lease is not None and lease.started
        failed = lost and not up
        yield DiskResult(
            disk_id=export.position,
            nbd_port=ports[export.key],
            nbd_export_name=export.name,
            qcow2_path=export.image,
            qemu_nbd_pid=pid,
            status="failed"
            if failed
            else "qemu_started"
            if up or call.state is CallState.COMPLETED
            else "port_allocated",
            error_message=(call.message or call.reason) if failed else "",
        )


def _told(targets: str) -> Iterator[tuple[int, Port]]:
    """Disk key → the port that the appliance was told. See WIRE.md for the form."""
    for pair in filter(None, targets.split(",")):
        key, _, url = pair.partition(":")
        yield int(key), int(url.rsplit("/", 1)[0].rpartition(":")[2])


def _targets(call: Call, ports: Mapping[int, Port], host: str) -> str:
    if not ports or len(ports) != len(call.exports):
        return ""
    return targets(call.exports, ports, host)


def _error(shown: Shown, settings: Settings, now: Seconds) -> str:
    """What went wrong, in the words of who knows it best."""
    call, heard = shown.call, shown.telemetry
    if call.state in (CallState.FAILED, CallState.CANCELLED, CallState.REJECTED):
        return call.message or call.reason
    if call.tainted and call.state.active:
        return (
            "a server died under a client: acknowledged writes may be gone, and the run can only "
            "fail"
        )
    if heard and heard.error and call.state.active:
        return heard.error
    whole = len(shown.reports) == len(call.exports) > 0
    since = silent_since(call, heard_at(heard, shown.reports), settings, now)
    if since is not None and not whole:
        return f"nothing was heard of it since {stamp(since)}; whether it goes on is not known"
    return call.message if call.state in (CallState.UNKNOWN, CallState.DUE) else ""
