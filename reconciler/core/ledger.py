"""What cannot be looked at and is therefore remembered: port leases, calls, what was applied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field

from reconciler.core.call import Call, CallState
from reconciler.core.desired import Export
from reconciler.core.units import Bytes, Port, Seconds


class Lease(Struct, frozen=True, kw_only=True):
    """A port that belongs to one disk of one run, from before its server until after it."""

    hub: str
    vm: str
    disk: int
    run: str
    attempt: int
    port: Port
    since: Seconds
    started: bool = False
    """A server of it once answered; if none is there, it died."""
    clients_seen: bool = False
    restarts: int = 0
    safe: bool = False
    """Its server was started so that nothing it acknowledges can be lost (write-through)."""

    @property
    def key(self) -> tuple[str, int, str, int]:
        return (self.vm, self.disk, self.run, self.attempt)


class Applied(Struct, frozen=True, kw_only=True):
    """The last applied desired state of one VM."""

    vm: Mapping[str, Any]
    generation: int
    at: Seconds


class DiskReport(Struct, frozen=True, kw_only=True):
    """An SNA's client said that one disk has arrived. Its first word counts."""

    job_id: str
    position: int
    change_id: str
    bytes: Bytes
    """What the client says that it transferred; not what is allocated."""
    at: Seconds


class Telemetry(Struct, frozen=True, kw_only=True):
    """The last word of an SNA's client about a job. It never ends a run."""

    job_id: str
    first: Seconds
    """When the first word came."""
    at: Seconds
    status: str
    phase: str
    bytes: Bytes
    total: Bytes
    speed: Bytes
    """Bytes per second."""
    percent: float
    error: str


class Sighting(Struct, frozen=True):
    """Every disk of a run had a client: since when, and what its images took then."""

    at: Seconds
    allocated: Bytes


class Ledger(Struct, frozen=True, kw_only=True):
    """One consistent reading of the store."""

    hub: str
    state_id: str
    leases: tuple[Lease, ...] = ()
    calls: tuple[Call, ...] = ()
    applied: Mapping[str, Applied] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    transitions: Mapping[tuple[str, str], tuple[str, str, Seconds]] = field(default_factory=dict)
    """(VM, condition type) → status, reason, since when."""
    failures: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """VM → (reason, message) of what its last apply could not do; gone when one could."""
    reports: Mapping[str, Mapping[int, DiskReport]] = field(default_factory=dict)
    """Job id of an open call, or of a VM's newest → position → what was reported."""
    telemetry: Mapping[str, Telemetry] = field(default_factory=dict)
    """Job id of an open call → the last word about it."""
    sightings: Mapping[str, Sighting] = field(default_factory=dict)
    """Job id of a call whose outcome is unknown → when clients were first seen on all disks."""
    busy: str = ""
    """Who is changing the hub while this is read; nobody, if the reader holds the lock."""

    def of(self, vm: str) -> tuple[Lease, ...]:
        return tuple(lease for lease in self.leases if lease.vm == vm)

    def latest(self, vm: str, run: str) -> Call | None:
        """The newest attempt of a run."""
        found = [call for call in self.calls if call.vm == vm and call.run == run]
        return max(found, key=lambda call: call.attempt, default=None)

    def attempt(self, vm: str, run: str) -> int:
        call = self.latest(vm, run)
        return call.attempt if call else 1

    def active(self, vm: str) -> Call | None:
        """The call of this VM that an SNA may be acting on."""
        return next((call for call in self.calls if call.vm == vm and call.state.active), None)

    def completed_runs(self, vm: str) -> list[str]:
        done = [c for c in self.calls if c.vm == vm and c.state is CallState.COMPLETED]
        return [call.run for call in sorted(done, key=lambda call: call.changed)]

    def newest_completed(self, vm: str, key: int, root: str) -> Export | None:
        """The disk of the newest completed run below a repository's root."""
        for run in reversed(self.completed_runs(vm)):
            call = self.latest(vm, run)
            for export in call.exports if call else ():
                if export.key == key and export.image.startswith(f"{root}/"):
                    return export
        return None
