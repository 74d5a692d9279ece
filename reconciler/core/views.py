"""Whether anything of a VM has moved since it was looked at last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from msgspec.structs import replace

from reconciler.core.actual import Actual, Server
from reconciler.core.call import Report
from reconciler.core.call_plan import silent
from reconciler.core.desired import Desired
from reconciler.core.ledger import Lease, Ledger
from reconciler.core.settings import Settings
from reconciler.core.units import Seconds
from reconciler.core.vm_plan import VmPlan


def asleep(one: VmPlan, ledger: Ledger) -> bool:
    """Whether nothing of a VM is there or wanted: then nothing outside of `remembered` matters to
    its plan, and there is nothing to look at, but that no server of it comes to be."""
    here = one.actions or one.vm.exports or one.ports or one.again_at or one.asks
    return not (here or ledger.of(one.name) or ledger.active(one.name))


def remembered(name: str, ledger: Ledger, now: Seconds) -> object:
    """All of what is remembered that the plan of such a VM depends on."""
    held = ledger.source.get("held") or {}
    return (
        ledger.version_of(name),
        ledger.of(name),
        ledger.paused(name, now) if ledger.pauses else None,
        ledger.declared.get(name),
        held.get(name) if isinstance(held, Mapping) else held,
        ledger.failures.get(name),
    )


def views(
    settings: Settings,
    desired: Desired,
    actual: Actual,
    ledger: Ledger,
    reports: Mapping[str, Report],
    now: Seconds,
) -> dict[str, object]:
    """VM → all that its plan depends on; room to the GiB, as it changes with every write.

    `reports`: job id → what an SNA's status was heard to say of it. The same view makes the same
    plan, so who has seen it need not plan again. Whether SNAs are well is no part of it: only a run
    that is to begin depends on that, and then there is always something to be done.
    """
    servers: dict[str, list[Server]] = defaultdict(list)
    for server in actual.servers:
        servers[server.mark.vm].append(server)
    leases: dict[str, list[Lease]] = defaultdict(list)
    for lease in ledger.leases:
        leases[lease.vm].append(lease)
    room = sorted(
        (device, one.read_only, one.free >> 30) for device, one in actual.file_systems.items()
    )
    # With less than a GiB, every plan reckons with every byte.
    tight = object() if any(is_full or not gib for _, is_full, gib in room) else None
    shared = (settings, desired.stale, actual.listeners, actual.unbindable, room, tight)
    told: dict[str, list[object]] = defaultdict(list)
    for key, owner in actual.claims.items():
        told[key[0]].append((key, owner))
    for kind, keys in enumerate((actual.rivals, actual.intents, actual.tainted)):
        for vm_name, *rest in keys:
            told[str(vm_name)].append((kind, *rest))
    held = ledger.source.get("held") or {}
    found: dict[str, object] = {}
    for name, vm in desired.vms.items():
        call = ledger.active(name) or ledger.latest(name, vm.run)
        exports = (*vm.exports, *(call.exports if call else ()))
        images = [path for one in exports for path in (one.image, one.backing or "")]
        found[name] = (
            vm,
            servers[name],
            leases[name],
            ledger.version_of(name),
            ledger.paused(name, now),
            ledger.declared.get(name),
            repr(held.get(name)) if isinstance(held, Mapping) else repr(held),
            ledger.failures.get(name),
            ledger.reports.get(call.job_id) if call else None,
            reports.get(call.job_id) if call else None,
            ledger.words.get(call.job_id) if call else None,
            [
                image and replace(image, allocated=0, written=0.0)
                for image in map(actual.images.get, images)
            ],
            call is not None and silent(call, ledger, settings, now),
            sorted(told[name], key=repr),
            actual.troubles.get(name),
            actual.hangs.get(name),
            shared,
        )
    return found
