"""Published runs as the chains that they form: each overlay needs everything below it.

A chain is a full run and all that was built on it, directly or not. What is built on what is read
from the exports that were frozen with each run; nothing of it is stored anywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.call import Call, CallState
from reconciler.core.desired import Export
from reconciler.core.ledger import VERIFY, Archived, DiskReport, Kept, Ledger, Proof
from reconciler.core.plan import FORMAT_VERSION
from reconciler.core.proofs import damage, digested
from reconciler.core.units import Bytes, Seconds, format_size, stamp


class Disk(Struct, frozen=True, kw_only=True):
    """One disk of a published run, or of one that is under way."""

    export: Export
    archived: Archived | None = None
    """None: the run is under way, or was published before that was written down."""
    report: DiskReport | None = None
    """What the SNA's client said of it; None: nothing, a person said that it is complete."""

    @property
    def allocated(self) -> Bytes | None:
        """What its file takes; None: not known."""
        # Of one that was published before this was kept, only the removal is written down.
        return self.archived.allocated if self.archived and self.archived.at else None

    @property
    def change_id(self) -> str:
        """What an incremental on top of it goes on from; empty: none was reported."""
        return self.report.change_id if self.report else ""


class Backup(Struct, frozen=True, kw_only=True):
    """One run in a chain."""

    call: Call
    disks: tuple[Disk, ...]
    """Those that were asked for, by position."""
    parents: tuple[str, ...]
    """The runs that its disks are overlays on; empty: it stands by itself. As a rule, one."""
    base: str
    """An image below it that is of no completed run of this VM; empty: there is none."""
    proofs: Mapping[str, Proof]
    removed: Seconds = 0.0
    """When the removal of its images was decided; 0: they are kept."""
    children: tuple[str, ...] = ()
    """The runs that are built on it, oldest first; a run that is under way is one too."""
    lacks: str = ""
    """Why it cannot be restored, as far as the ledger knows; empty: it can."""

    @property
    def run(self) -> str:
        return self.call.run

    @property
    def completed(self) -> bool:
        """It is a backup; False: it is under way."""
        return self.call.state is CallState.COMPLETED

    @property
    def ended(self) -> Seconds:
        """When it ended, or when it changed last."""
        return self.call.ended or self.call.changed

    @property
    def size(self) -> Bytes:
        """What a guest sees of its disks."""
        return sum(disk.export.size or 0 for disk in self.disks)

    @property
    def allocated(self) -> Bytes | None:
        """What its own images take; None: not known."""
        known = [one.allocated for one in self.disks if one.allocated is not None]
        return sum(known) if len(known) == len(self.disks) else None

    @property
    def kept(self) -> bool:
        """Its images are there, as far as the ledger knows."""
        return self.completed and not self.removed


class Chain(Struct, frozen=True, kw_only=True):
    """A run that stands by itself, and everything that was built on it, oldest first."""

    vm: str
    backups: tuple[Backup, ...]

    @property
    def full(self) -> Backup:
        """What all others need."""
        return self.backups[0]

    @property
    def completed(self) -> tuple[Backup, ...]:
        """Those that are backups, removed or not."""
        return tuple(one for one in self.backups if one.completed)

    @property
    def kept(self) -> tuple[Backup, ...]:
        """Those that are backups and whose images are kept."""
        return tuple(one for one in self.backups if one.kept)

    @property
    def newest(self) -> Seconds:
        """When the last of its backups ended; 0: none has."""
        return max((one.ended for one in self.completed), default=0.0)

    @property
    def allocated(self) -> Bytes:
        """What the images take that are kept, as far as it is known; see `taken`."""
        return sum(one.allocated or 0 for one in self.kept)

    @property
    def unmeasured(self) -> int:
        """Kept backups of which it is not known what they take."""
        return sum(one.allocated is None for one in self.kept)


def chains_of(ledger: Ledger, vm: str, key: int | None = None) -> tuple[Chain, ...]:
    """The chains of a VM, or of one disk of it, the one with the newest backup last.

    Also those of runs whose images were removed: `Backup.removed` tells.
    """
    calls = [call for call in ledger.runs(vm) if call.state is CallState.COMPLETED]
    calls.sort(key=lambda call: call.ended or call.changed)
    calls += [call for call in ledger.open if call.vm == vm and call.state.active]
    if key is not None:
        calls = [call for call in calls if any(export.key == key for export in call.exports)]
    shelf = ledger.shelf.of(call.job_id for call in calls)
    runs = {
        export.image: call.run
        for call in calls
        if call.state is CallState.COMPLETED
        for export in call.exports
    }
    found: dict[str, Backup] = {}
    for call in calls:
        found[call.run] = _backup(call, shelf[call.job_id], runs, key, found)
    built: dict[str, list[str]] = {}
    for one in found.values():
        for parent in one.parents:
            built.setdefault(parent, []).append(one.run)
    trees: dict[str, list[Backup]] = {}
    roots: dict[str, str] = {}
    for run, one in found.items():
        root = roots[run] = roots.get(one.parents[0], run) if one.parents else run
        whole = replace(one, children=tuple(built.get(run, ())))
        trees.setdefault(root, []).append(whole)
    chains = (Chain(vm=vm, backups=tuple(backups)) for backups in trees.values())
    return tuple(sorted(chains, key=lambda chain: chain.newest or float("inf")))


def _backup(
    call: Call, kept: Kept, runs: Mapping[str, str], key: int | None, below: Mapping[str, Backup]
) -> Backup:
    exports = sorted(call.exports, key=lambda export: export.position)
    exports = [one for one in exports if key is None or one.key == key]
    backings = [one.backing for one in exports if one.backing]
    parents = tuple(dict.fromkeys(runs[one] for one in backings if one in runs))
    base = next((one for one in backings if one not in runs), "")
    backup = Backup(
        call=call,
        disks=tuple(
            Disk(
                export=one,
                archived=kept.archived.get(one.position),
                report=kept.reports.get(one.position),
            )
            for one in exports
        ),
        parents=parents,
        base=base,
        proofs=kept.proofs,
        removed=kept.removed,
    )
    return replace(backup, lacks=_lacks(backup, below))


def _lacks(backup: Backup, below: Mapping[str, Backup]) -> str:
    """Why a backup cannot be restored; empty: it can."""
    if not backup.completed:
        return f"it is {backup.call.state}"
    if backup.removed:
        return f"its images were removed at {stamp(backup.removed)}"
    if damage := damage_of(backup):
        return damage
    for parent in backup.parents:
        under = below.get(parent)
        if under is None:
            return f"the run {parent} that it is built on ended after it"
        if under.lacks:
            return under.lacks if under.lacks.startswith("run ") else f"run {parent}: {under.lacks}"
    return ""


def damage_of(backup: Backup) -> str:
    """What the looks at its images found wrong; empty: nothing, or nobody looked."""
    return damage(backup.proofs.get(VERIFY), [disk.export.image for disk in backup.disks])


def broken(chains: Sequence[Chain]) -> Mapping[str, str]:
    """Job id → why a backup cannot be restored whose own images are kept."""
    return {one.call.job_id: one.lacks for chain in chains for one in chain.kept if one.lacks}


def taken(chains: Sequence[Chain]) -> str:
    """What some chains take, for people. What nobody has measured is not nothing."""
    kept, unknown = sum(len(one.kept) for one in chains), sum(one.unmeasured for one in chains)
    if not unknown:
        return format_size(sum(one.allocated for one in chains))
    if unknown == kept:
        return "size unknown"
    known = format_size(sum(one.allocated for one in chains))
    return f"at least {known} (of {unknown} of {kept} backups it is not known)"


def path_to(chain: Chain, run: str) -> tuple[Backup, ...]:
    """What is needed to restore a run: the run itself, and everything below it, the full first.

    Raises KeyError if the run is not in the chain.
    """
    known = {one.run: one for one in chain.backups}
    found: dict[str, Backup] = {}

    def walk(name: str) -> None:
        one = known[name]
        for parent in one.parents:
            if parent not in found and parent in known:
                walk(parent)
        found[name] = one

    walk(run)
    return tuple(found.values())


def of_run(chains: Sequence[Chain], run: str) -> Chain | None:
    """The chain that a run is in."""
    return next((one for one in chains if any(b.run == run for b in one.backups)), None)


def newest_completed(chains: Sequence[Chain]) -> Backup | None:
    """The newest backup of a VM, removed or not."""
    found = [one for chain in chains for one in chain.completed]
    return max(found, key=lambda one: one.ended, default=None)


def in_order(chain: Chain) -> Iterator[tuple[int, Backup]]:
    """A chain as a tree: how deep each backup is, each before what is built on it."""
    known = {one.run: one for one in chain.backups}
    shown: set[str] = set()
    todo = [(0, chain.full.run)]
    while todo:
        depth, run = todo.pop()
        if run in shown:
            continue
        shown.add(run)
        yield depth, known[run]
        todo += [(depth + 1, child) for child in reversed(known[run].children) if child in known]


def document(vm: str, chains: Sequence[Chain], hub: str) -> dict[str, Any]:
    """The chains of a VM, as `chain -o json` prints them."""
    return {
        "format_version": FORMAT_VERSION,
        "hub": hub,
        "vm": vm,
        "chains": [
            {
                "full": chain.full.run,
                "count": len(chain.kept),
                "allocated": chain.allocated,
                "unmeasured": chain.unmeasured,
                "backups": [_json(one) for one in chain.backups],
            }
            for chain in chains
        ],
    }


def _json(one: Backup) -> dict[str, Any]:
    return {
        "run": one.run,
        "attempt": one.call.attempt,
        "type": one.call.type,
        "state": str(one.call.state),
        "job_id": one.call.job_id,
        "ended": stamp(one.ended) if one.completed else None,
        "parents": list(one.parents),
        "base": one.base or None,
        "children": list(one.children),
        "size": one.size,
        "allocated": one.allocated,
        "removed": stamp(one.removed) if one.removed else None,
        "restorable": not one.lacks,
        "lacks": one.lacks or None,
        "proofs": {kind: _proof_json(one, proof) for kind, proof in one.proofs.items()},
        "disks": [_disk_json(disk) for disk in one.disks],
    }


def _proof_json(one: Backup, proof: Proof) -> dict[str, Any]:
    if proof.kind != VERIFY:
        return {"at": stamp(proof.at), "ok": proof.ok}
    since = digested(proof)
    # It is a proof of a backup, which needs what is below it too.
    ok = proof.ok and not (one.kept and one.lacks)
    return {"at": stamp(proof.at), "ok": ok, "digests": stamp(since) if since else None}


def _disk_json(disk: Disk) -> dict[str, Any]:
    return {
        "key": str(disk.export.key),
        "position": disk.export.position,
        "image": disk.export.image,
        "backing": disk.export.backing,
        "size": disk.export.size,
        "allocated": disk.allocated,
        "digest": (disk.archived.digest or None) if disk.archived else None,
        "change_id": disk.change_id or None,
        "bytes": disk.report.bytes if disk.report else None,
    }
