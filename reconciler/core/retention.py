"""Which chains of backups may go, and why each other one is kept. Whole chains, or nothing.

A chain goes only if everything is known of it that speaks for keeping it: what cannot be judged is
kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from reconciler.core.chains import Backup, Chain, chains_of, newest_completed
from reconciler.core.desired import Keep, Vm
from reconciler.core.ledger import Ledger
from reconciler.core.plan import FORMAT_VERSION
from reconciler.core.units import Bytes, Seconds, format_duration, stamp

DAY: Seconds = 86400.0


class Fate(Struct, frozen=True, kw_only=True):
    """What becomes of a chain."""

    chain: Chain
    cause: str
    """A CamelCase word that programs can rely on."""
    why: str
    goes: bool = False

    @property
    def size(self) -> Bytes:
        """What its images take, as far as it is known."""
        return self.chain.allocated

    @property
    def order(self) -> tuple[Backup, ...]:
        """Its backups in the order in which they go: each before what it is built on."""
        return tuple(reversed(self.chain.kept))


class Retention(Struct, frozen=True, kw_only=True):
    """What becomes of the backups of one VM."""

    vm: str
    keep: Keep | None
    """None: nobody wrote `keep`, so everything is kept."""
    fates: tuple[Fate, ...] = ()
    """Of the chains that are kept so far, the newest last."""
    unfinished: tuple[Backup, ...] = ()
    """Those whose removal was decided; their images may still be there."""

    @property
    def going(self) -> tuple[Backup, ...]:
        """The backups that go, in order."""
        return tuple(one for fate in self.fates if fate.goes for one in fate.order)


def retention(
    ledger: Ledger, vm: str, now: Seconds, held: Mapping[str, str], below: Collection[str]
) -> Retention:
    """What becomes of the backups of a VM.

    `held`: image → who has it open or is to read it. `below`: the images that backups of other VMs,
    or runs that are wanted, are built on.
    """
    applied = ledger.applied.get(vm)
    wanted = Vm.from_json(applied.vm) if applied else None
    keep = wanted.keep if wanted else None
    chains = [chain for chain in chains_of(ledger, vm) if chain.completed]
    unfinished = tuple(one for chain in chains for one in reversed(chain.completed) if one.removed)
    there = [chain for chain in chains if chain.kept]
    if keep is None:
        why = f"no `keep` was applied for {vm}, so everything is kept"
        unruled = tuple(Fate(chain=one, cause="NoRule", why=why) for one in there)
        return Retention(vm=vm, keep=None, fates=unruled, unfinished=unfinished)
    # One of which nothing can be restored is no backup to fall back on: it displaces none.
    good = [chain for chain in there if any(not one.lacks for one in chain.kept)]
    good.sort(key=lambda chain: chain.full.ended)
    among = {chain.full.run for chain in good[-keep.full :]}
    newest = newest_completed(there)
    judged: dict[str, Fate] = {}
    for chain in there:
        reason = (
            _rule(chain, keep, among, newest, now)
            or _guard(ledger, vm, chain, wanted, now)
            or _needed(chain, held, below)
        )
        if reason:
            judged[chain.full.run] = Fate(chain=chain, cause=reason[0], why=reason[1])
            continue
        why = (
            f"its newest backup ended at {stamp(chain.newest)}, and {keep.full} newer "
            f"chain{'s are' if keep.full != 1 else ' is'} kept"
        )
        judged[chain.full.run] = Fate(chain=chain, cause="Outdated", why=why, goes=True)
    fates = _with_neighbours([judged[chain.full.run] for chain in there])
    return Retention(vm=vm, keep=keep, fates=tuple(fates), unfinished=unfinished)


def _rule(
    chain: Chain, keep: Keep, among: Collection[str], newest: Backup | None, now: Seconds
) -> tuple[str, str] | None:
    """What the rule itself says for keeping a chain."""
    if newest and any(one.run == newest.run for one in chain.backups):
        return "Newest", "it has the newest backup"
    if chain.full.run in among:
        return "AmongNewest", f"it is among the newest {keep.full}"
    if now - chain.newest < keep.days * DAY:
        ago = format_duration(max(0.0, now - chain.newest))
        return "Recent", f"its newest backup ended {ago} ago, less than {keep.days:g} days"
    return None


def _guard(
    ledger: Ledger, vm: str, chain: Chain, wanted: Vm | None, now: Seconds
) -> tuple[str, str] | None:
    """What keeps a chain whatever the rule says."""
    if wanted and wanted.protect:
        return "Protected", "the spec says `protect: true`"
    pause = ledger.paused(vm, now)
    if pause:
        return "Paused", f"it was paused by {pause.who or 'somebody'}: {pause.reason}"
    under_way = next((one for one in chain.backups if not one.completed), None)
    if under_way:
        return "RunActive", f"run {under_way.run} is built on it, and is {under_way.call.state}"
    images = _images(chain)
    for call in ledger.open:
        if any(export.backing in images for export in call.exports):
            return "RunActive", f"run {call.run} of {call.vm} is built on it, and is {call.state}"
    return None


def _needed(
    chain: Chain, held: Mapping[str, str], below: Collection[str]
) -> tuple[str, str] | None:
    """Who reads it or builds on it."""
    for image in _images(chain):
        if image in held:
            return "InUse", f"{image} is in use by {held[image]}"
        if image in below:
            return "BuiltOn", f"something else is built on {image}"
    return None


def _images(chain: Chain) -> list[str]:
    return [disk.export.image for one in chain.backups for disk in one.disks]


def _with_neighbours(fates: Sequence[Fate]) -> list[Fate]:
    """The same, and a chain stays as long as one stays that is built on it too."""
    found = {fate.chain.full.run: fate for fate in fates}
    home = {one.run: fate.chain.full.run for fate in fates for one in fate.chain.backups}
    moved = True
    while moved:
        moved = False
        for fate in list(found.values()):
            if fate.goes:
                continue
            for parent in {p for one in fate.chain.backups for p in one.parents}:
                other = found.get(home.get(parent, ""))
                if other and other.goes:
                    why = f"the chain of {fate.chain.full.run} is built on it too"
                    found[other.chain.full.run] = Fate(chain=other.chain, cause="BuiltOn", why=why)
                    moved = True
    return [found[fate.chain.full.run] for fate in fates]


def built_on(ledger: Ledger, vm: str) -> set[str]:
    """The images that backups of other VMs are built on, or runs that are wanted of any VM."""
    found = {
        export.backing
        for other in ledger.known - {vm}
        for call in ledger.runs(other)
        for export in call.exports
        if export.backing
    }
    for applied in ledger.applied.values():
        exports: Iterable[Mapping[str, Any]] = applied.vm.get("exports") or ()
        run = applied.vm.get("run")
        call = ledger.latest(str(applied.vm.get("name")), str(run)) if run else None
        if call is None or not call.state.terminal:  # what has ended needs nothing to begin
            found |= {str(one["backing"]) for one in exports if one.get("backing")}
    return found


def to_be_read(ledger: Ledger) -> dict[str, str]:
    """Image → the restore that is to read it, by what was applied last."""
    return {
        str(export["image"]): f"the restore {name}"
        for name, applied in ledger.applied.items()
        if applied.vm.get("exported") and applied.vm.get("purpose") == "restore"
        for export in applied.vm.get("exports") or ()
    }


def document(hub: str, found: Sequence[Retention], *, done: bool) -> dict[str, Any]:
    """What becomes of the backups of some VMs, as `retain -o json` prints it."""
    return {
        "format_version": FORMAT_VERSION,
        "hub": hub,
        "done": done,
        "bytes": sum(fate.size for one in found for fate in one.fates if fate.goes),
        "vms": [
            {
                "vm": one.vm,
                "keep": {"full": one.keep.full, "days": one.keep.days} if one.keep else None,
                "chains": [
                    {
                        "full": fate.chain.full.run,
                        "backups": [backup.run for backup in fate.chain.kept],
                        "images": [
                            disk.export.image for backup in fate.chain.kept for disk in backup.disks
                        ],
                        "bytes": fate.size,
                        "unmeasured": fate.chain.unmeasured,
                        "action": "remove" if fate.goes else "keep",
                        "cause": fate.cause,
                        "why": fate.why,
                    }
                    for fate in one.fates
                ],
            }
            for one in found
        ],
    }
