"""Specs + inventory + ledger → Desired: defaults filled, clashes refused, all decided."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct, convert, field, to_builtins
from msgspec import json as as_json
from msgspec.structs import replace

from reconciler.core.errors import Diagnostic, nearest
from reconciler.core.settings import Appliance, Settings, VCenter
from reconciler.core.tunnel import Tunnel
from reconciler.core.units import Bytes, Seconds, format_size

if TYPE_CHECKING:
    from reconciler.core.declared import CheckedDisk, CheckedVm, Declared, Specs
    from reconciler.core.inventory import Inventory
    from reconciler.core.ledger import Ledger


class Export(Struct, frozen=True, kw_only=True):
    """One disk to be served; everything but its port."""

    vm: str
    key: int
    """VMware's disk key, from the inventory or the spec; never computed."""
    position: int
    run: str
    attempt: int
    name: str
    """The NBD export name; it carries the run, so that it is never used twice."""
    image: str
    """Absolute path."""
    size: Bytes | None
    """None: whatever the image holds (restores)."""
    read_only: bool = False
    backing: str | None = None
    """Absolute path of the parent image of an incremental."""

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = to_builtins(self)
        return value


class Keep(Struct, frozen=True, kw_only=True):
    """How much of a VM's backups is kept at least; a chain goes when neither keeps it."""

    full: int = 1
    """So many of the newest chains."""
    days: float = 0.0
    """Chains whose newest backup ended within so many days."""


class Vm(Struct, frozen=True, kw_only=True):
    """What should be true of one VM."""

    name: str
    exported: bool
    purpose: str = "backup"
    repository: str = ""
    root: str = ""
    """The repository's absolute root."""
    sna: str = ""
    display_name: str = ""
    path: str = ""
    vcenter: str = ""
    run: str = ""
    type: str = "full"
    fallback: str = ""
    """`full`: what the run is where no incremental can be made; empty: it is refused then."""
    fell_back: str = ""
    """Why the run is full although an incremental was asked for; empty: it is what was asked."""
    release: str = "on_completion"
    protect: bool = False
    keep: Keep | None = None
    """None: all backups are kept."""
    labels: Mapping[str, str] = field(default_factory=dict)
    exports: tuple[Export, ...] = ()
    verified: bool = True
    """An inventory confirms that these are all disks."""
    request: str = ""
    """Digest of what else its SNA is told; a refused call is made again when it changes."""
    order: str = ""
    """Why it is to be absent, where no spec says so."""
    asked: str = ""
    """Who asked for the run, where that is written; else it is who applies it."""
    policy: str = ""
    """The rule by which a scheduler asked for the run."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """What else the scheduler wants to find with the run."""
    place: str = ""
    """file:line of its declaration."""
    run_place: str = ""
    """file:line of what asks for its run, where that is not its declaration."""

    def to_json(self) -> dict[str, Any]:
        # As it comes back from the store, so that the two can be compared: lists, no tuples.
        value: dict[str, Any] = as_json.decode(as_json.encode(self))
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Vm:
        return convert(value, cls)


class Desired(Struct, frozen=True, kw_only=True):
    """What should be true, of the VMs in scope."""

    settings: Settings
    vms: Mapping[str, Vm]
    tunnels: Mapping[str, Tunnel] = field(default_factory=dict)
    """`tunnel/NAME` → the tunnel."""
    diagnostics: tuple[Diagnostic, ...] = ()
    kill_clients: bool = False
    """An operator's explicit order to stop servers in use."""
    ordered: bool = False
    """A person orders this now: it is done to paused VMs too."""
    drained: Seconds | None = None
    """How long clients were waited for already; None: they are not waited for."""
    untouched: tuple[str, ...] = ()
    """VMs of which a run is asked for, and that are not in scope."""
    idle: tuple[str, ...] = ()
    """VMs that are declared, and of which no run is asked for: they stay as they are."""
    stale: str = ""
    """Why no run may begin: the inventory that knows all disks cannot be read now."""
    outdated: Mapping[str, str] = field(default_factory=dict)
    """VM that stays as it was applied last → why no run of it may begin so."""

    @property
    def failed(self) -> bool:
        return any(one.severity == "error" for one in self.diagnostics)

    def only(self, names: Collection[str]) -> Desired:
        """The same, of some VMs and nothing else."""
        return replace(
            self,
            vms={name: vm for name, vm in self.vms.items() if name in names},
            tunnels={name: one for name, one in self.tunnels.items() if name in names},
            diagnostics=tuple(one for one in self.diagnostics if one.vm in names),
            untouched=tuple(name for name in self.untouched if name not in names),
        )

    def chosen(self, names: Collection[str]) -> Desired:
        """The same, about some VMs; the others that are declared are told to be untouched.

        What is wrong with a file as a whole counts: nobody knows whom it declares.
        """
        every = (*self.vms, *self.idle, *self.tunnels)
        others = (name for name in every if name not in names)
        return replace(
            self,
            vms={name: vm for name, vm in self.vms.items() if name in names},
            tunnels={name: one for name, one in self.tunnels.items() if name in names},
            diagnostics=tuple(one for one in self.diagnostics if not one.vm or one.vm in names),
            untouched=tuple(dict.fromkeys((*self.untouched, *others))),
        )


class _Refused(Exception):  # noqa: N818 never leaves this module
    def __init__(self, summary: str, *path: str | int) -> None:
        super().__init__(summary)
        self.path = path


def build(specs: Specs, inventory: Inventory | None, settings: Settings, ledger: Ledger) -> Desired:
    """Every VM that can be made definite; a diagnostic for each that cannot."""
    from reconciler.core.declared import run_contradictions
    from reconciler.core.runs import choose

    chosen = choose(specs, inventory, ledger)
    diagnostics = [*specs.diagnostics, *chosen.diagnostics]
    vms: dict[str, tuple[Vm, Declared]] = {}
    idle: list[str] = []
    for declared in chosen.vms:
        name = declared.spec.name
        if _idle(declared):
            text = (
                f"VM {name}: no run is asked for, so nothing of it is exported: write `backup: "
                f"{{run: NAME}}`, or type `reconciler backup {name} --run NAME`"
            )
            diagnostics.append(
                Diagnostic("warning", text, declared.place("name"), name, rule="no-run")
            )
            idle.append(name)
            continue
        wrong = list(run_contradictions(declared))
        if wrong:
            diagnostics += wrong
            continue
        try:
            vm = _definite(declared, inventory, settings, ledger)
        except _Refused as refusal:
            place = declared.place(*refusal.path)
            diagnostics.append(Diagnostic("error", f"VM {name}: {refusal}", place, name))
            continue
        vms[vm.name] = (vm, declared)
        diagnostics += _without_effect(declared)
        if vm.exported and not vm.verified:
            diagnostics.append(
                Diagnostic(
                    "warning",
                    f"VM {vm.name}: no inventory confirms that these are all its disks "
                    "(DisksUnverified); a disk that is missing here is missing in the backup",
                    declared.place("disks"),
                    name,
                    rule="disks-unverified",
                )
            )
    clashes = list(_clashes(vms, ledger))
    diagnostics.extend(diagnostic for _, diagnostic in clashes)
    refused = {name for name, _ in clashes}
    tunnels: Mapping[str, Tunnel] = {}
    if specs.tunnels:
        from reconciler.core.tunnel_spec import build as build_tunnels

        tunnels, wrong = build_tunnels(specs.tunnels, settings)
        diagnostics += wrong
    return Desired(
        settings=settings,
        vms={name: vm for name, (vm, _) in vms.items() if name not in refused},
        tunnels=tunnels,
        diagnostics=tuple(diagnostics),
        untouched=chosen.untouched,
        idle=tuple(idle),
        stale=inventory.told() if inventory else "",
    )


def _idle(declared: Declared) -> bool:
    """It is to be backed up, and nobody has said which run."""
    spec = declared.spec
    return spec.state == "exported" and spec.purpose == "backup" and spec.backup is None


def _definite(
    declared: Declared, inventory: Inventory | None, settings: Settings, ledger: Ledger
) -> Vm:
    spec = declared.spec
    place = f"{declared.place('name')}"
    if spec.state == "absent":
        return Vm(
            name=spec.name, exported=False, protect=spec.protect, keep=_keep(spec), place=place
        )
    repository = _chosen("repository", spec.repository, settings.repositories, "repositories")
    root = settings.repositories[repository]
    common: dict[str, Any] = {
        "name": spec.name,
        "exported": True,
        "purpose": spec.purpose,
        "repository": repository,
        "root": root,
        "release": spec.release,
        "protect": spec.protect,
        "keep": _keep(spec),
        "labels": dict(spec.labels),
        "place": place,
        "run_place": f"{declared.entry.place('run')}" if declared.entry else "",
        "asked": declared.entry.spec.by if declared.entry else "",
        "policy": declared.entry.spec.policy if declared.entry else "",
        "tags": dict(declared.entry.spec.tags) if declared.entry else {},
    }
    if spec.purpose == "restore":
        return Vm(**common, **_restore(declared, root, ledger))
    assert spec.backup is not None
    run, attempt = spec.backup.run, ledger.attempt(spec.name, spec.backup.run)
    known = inventory.vms.get(spec.name) if inventory else None
    disks = _disks(declared, inventory, settings)
    frozen = _frozen(ledger, spec.name, run)
    if spec.disks == "inventory" and frozen.keys() == {disk.key for disk in disks}:
        disks.sort(key=lambda disk: frozen[disk.key].position)
    address = {"name": spec.vm.name, "path": spec.vm.path, "vcenter": spec.vm.vcenter}
    if known:
        for what, value in (
            ("name", known.vm.name),
            ("path", known.vm.path),
            ("vcenter", known.vm.vcenter),
        ):
            address[what] = address[what] or value
    if not address["path"]:
        raise _Refused(
            "its path in vCenter is not known, and the appliance needs it: write "
            "`vm: {path: /DC1/vm/NAME}` here or in the inventory"
        )
    vcenter = _chosen("vm.vcenter", address["vcenter"], settings.vcenters, "vcenters")
    incremental = spec.backup.type == "incremental"
    call = ledger.latest(spec.name, run)
    fell_back = call.fallback if call and incremental else ""
    if incremental and not fell_back and spec.backup.fallback and not frozen:
        fell_back = _orphaned(spec.name, disks, root, ledger)
    exports = []
    for position, disk in enumerate(disks):
        image = disk.image or f"{spec.name}/{disk.key}/{run}.qcow2"
        exports.append(
            Export(
                vm=spec.name,
                key=disk.key,
                position=position,
                run=run,
                attempt=attempt,
                name=attempted(disk.export or f"{spec.name}-{run}-disk{position}", attempt),
                image=posixpath.join(root, attempted_image(image, attempt)),
                size=disk.size,
                backing=_parent(declared, disk, root, ledger, frozen)
                if incremental and not fell_back
                else None,
            )
        )
        if disk.backing and not incremental:
            raise _Refused(
                f"disk {disk.key} has a `backing`, but the run is full: write "
                "`type: incremental`, or remove it",
                "disks",
                position,
                "backing",
            )
    sna, display_name = _chosen("sna", spec.sna, settings.snas, "snas"), address["name"]
    told = [display_name, address["path"], vcenter]
    return Vm(
        **common,
        sna=sna,
        display_name=display_name or spec.name,
        path=address["path"],
        request=_digest(told, settings.snas[sna], settings.vcenters[vcenter]),
        vcenter=vcenter,
        run=run,
        type="full" if fell_back else spec.backup.type,
        fallback=spec.backup.fallback or "",
        fell_back=fell_back,
        exports=tuple(exports),
        verified=known is not None,
    )


def _keep(spec: CheckedVm) -> Keep | None:
    written = spec.keep
    if written is None:
        return None
    return Keep(full=written.full or 1, days=written.days or 0.0)


def _digest(told: list[str | None], sna: Appliance, vcenter: VCenter) -> str:
    """What an SNA is told besides the disks, without secrets: only where they are kept."""
    import hashlib
    import json

    words = [*told, sna.url, str(sna.token), vcenter.host, vcenter.user, str(vcenter.password)]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def attempted(export: str, attempt: int) -> str:
    """The export name of an attempt: `…-disk0`, `…-a2-disk0`."""
    if attempt == 1:
        return export
    head, tail = export.rsplit("disk", 1)
    return f"{head.rstrip('-._')}-a{attempt}-disk{tail}"


def attempted_image(image: str, attempt: int) -> str:
    """The file of an attempt: `x.qcow2`, `x-a2.qcow2`."""
    if attempt == 1:
        return image
    stem, suffix = posixpath.splitext(image)
    return f"{stem}-a{attempt}{suffix}"


def at_attempt(export: Export, attempt: int) -> Export:
    """An export of a first attempt as another attempt has it; one of that attempt as it is."""
    if export.attempt == attempt:
        return export
    return replace(
        export,
        attempt=attempt,
        name=attempted(export.name, attempt),
        image=attempted_image(export.image, attempt),
    )


def _chosen(what: str, written: str | None, known: Mapping[str, object], section: str) -> str:
    """The one that is named, or the only one there is."""
    names = ", ".join(sorted(known)) or "none"
    if written is not None:
        if written not in known:
            raise _Refused(
                f"{what} {written!r} is not in the config{nearest(written, known)} "
                f"({section} there: {names})",
                *what.split("."),
            )
        return written
    if len(known) == 1:
        return next(iter(known))
    raise _Refused(
        f"it names no {what}, and the config has {len(known)} of them ({names}): "
        + (f"write `{what.split('.')[-1]}: NAME`" if known else f"add one under `{section}:`")
    )


def _disks(
    declared: Declared, inventory: Inventory | None, settings: Settings
) -> list[CheckedDisk]:
    """All disks with their sizes, confirmed where an inventory can confirm them."""
    from reconciler.core.declared import CheckedDisk
    from reconciler.core.inventory import contradiction

    spec = declared.spec
    known = inventory.vms.get(spec.name) if inventory else None
    where = "name" if spec.disks == "inventory" else "disks"
    if inventory and spec.name in inventory.unusable:
        raise _Refused(
            f"the inventory {inventory.origin} knows this VM, and what it says cannot be used: "
            f"{inventory.unusable[spec.name]}; correct it there",
            where,
        )
    if known is None and (spec.disks == "inventory" or settings.inventory_required):
        if inventory is None:
            raise _Refused(
                "its disks come from the inventory, and there is none that can be read: write "
                "`inventory: {file: inventory.yaml}` into the config, or list the disks",
                "disks",
            )
        if not inventory.readable:
            raise _Refused(f"its disks come from {inventory.told()}", "disks")
        raise _Refused(
            f"the inventory {inventory.origin} does not know this VM"
            f"{nearest(spec.name, inventory.names)}"
            f"{f' ({inventory.stale})' if inventory.stale else ''}",
            where,
        )
    if spec.disks == "inventory":
        assert known is not None
        if not known.disks:
            raise _Refused("the inventory knows no disks of this VM", "disks")
        return [CheckedDisk(key=disk.key, size=disk.size) for disk in known.disks]
    assert isinstance(spec.disks, list)
    listed = spec.disks
    if known:
        wrong = contradiction(listed, known)
        if wrong:
            raise _Refused(wrong, "disks")
        sizes = {disk.key: disk.size for disk in known.disks}
        return [replace(disk, size=sizes[disk.key]) for disk in listed]
    for index, disk in enumerate(listed):
        if disk.size is None:
            raise _Refused(
                f"disk {disk.key} has no size, and no inventory knows it: write `size: 40GiB`",
                "disks",
                index,
            )
    return listed


def _frozen(ledger: Ledger, vm: str, run: str) -> Mapping[int, Export]:
    """What the intent fixed of a run that was asked for: disk key → export."""
    call = ledger.latest(vm, run)
    if call is None or call.state == "DUE":
        return {}
    return {export.key: export for export in call.exports}


def _without_effect(declared: Declared) -> Iterator[Diagnostic]:
    """What is written and changes nothing, though somebody meant something by it."""
    spec = declared.spec
    backup = spec.backup if spec.state == "exported" and spec.purpose == "backup" else None
    if backup and backup.fallback and backup.type == "full":
        yield Diagnostic(
            "warning",
            f"VM {spec.name}: `fallback: {backup.fallback}` has no effect, as the run is full "
            "anyway: write `type: incremental` beside it, or remove it",
            declared.place("backup", "fallback"),
            spec.name,
            rule="no-effect",
        )


def _parent(
    declared: Declared,
    disk: CheckedDisk,
    root: str,
    ledger: Ledger,
    frozen: Mapping[int, Export],
) -> str:
    """The image that an incremental builds on: as written, as it was, or the newest there is.

    Whether that can be built on is judged with each look, in core/parents.py.
    """
    if disk.backing:
        return _complete(posixpath.join(root, disk.backing), disk.key, ledger)
    was = frozen.get(disk.key)
    if was and was.backing:
        return was.backing
    spec = declared.spec
    newest = ledger.newest_completed(spec.name, disk.key, root)
    if newest is None:
        raise _Refused(
            f"disk {disk.key} has no completed run to build an incremental on: write "
            "`type: full`, or name its `backing`; with `fallback: full` it would be full by itself",
            "backup",
        )
    return newest.image


def _orphaned(vm: str, disks: Sequence[CheckedDisk], root: str, ledger: Ledger) -> str:
    """Why no incremental can be made of a VM: a disk of it was never backed up. Empty: each was."""
    for disk in disks:
        if not disk.backing and ledger.newest_completed(vm, disk.key, root) is None:
            return f"disk {disk.key} has no completed run to build an incremental on"
    return ""


def _complete(image: str, key: int, ledger: Ledger) -> str:
    """An image that may be built on or read as a backup, as far as the ledger knows it."""
    for call in ledger.calls:
        if call.state != "COMPLETED" and any(one.image == image for one in call.exports):
            raise _Refused(
                f"disk {key}: {image} is of the run {call.run} of {call.vm}, which is "
                f"{call.state} and so not a backup; name an image of a completed run",
                "disks",
            )
    return image


def _restore(declared: Declared, root: str, ledger: Ledger) -> dict[str, Any]:
    spec = declared.spec
    if spec.of is None:
        assert isinstance(spec.disks, list)
        run = "restore"
        sources = [
            (d.key, d.export, posixpath.join(root, d.image or ""), d.size) for d in spec.disks
        ]
    else:
        run = spec.of.run
        call = ledger.latest(spec.of.vm, run)
        if call is None or call.state != "COMPLETED":
            stands = f"is {call.state}" if call else "is not in the ledger"
            completed = ledger.completed_runs(spec.of.vm)
            raise _Refused(
                f"the run {run!r} of {spec.of.vm} {stands}, so it is not a backup; completed: "
                f"{', '.join(completed[-5:]) or 'none'} (or name `disks` with their images)",
                "of",
            )
        sources = [(e.key, None, e.image, e.size) for e in call.exports]
    return {
        "run": run,
        "exports": tuple(
            Export(
                vm=spec.name,
                key=key,
                position=position,
                run=run,
                attempt=1,
                name=name or f"{spec.name}-{run}-disk{position}",
                image=image,
                size=size,
                read_only=True,
            )
            for position, (key, name, image, size) in enumerate(sources)
        ),
    }


def _clashes(
    vms: Mapping[str, tuple[Vm, Declared]], ledger: Ledger
) -> list[tuple[str, Diagnostic]]:
    """Two VMs that cannot both be true; both are named, neither is used."""
    found: list[tuple[str, Diagnostic]] = []
    images: dict[str, tuple[str, bool]] = {}
    names: dict[str, str] = {}
    identities: dict[tuple[str, str], str] = {}

    def clash(one: str, other: str, summary: str, *path: str | int) -> None:
        for name, against in ((one, other), (other, one)):
            declared = vms[name][1]
            text = f"VM {name}: {summary} VM {against} ({vms[against][0].place})"
            place = declared.place(*path)
            found.append((name, Diagnostic("error", text, place, name, rule="clash")))

    for name, (vm, _) in vms.items():
        if vm.exported and vm.purpose == "backup":
            other = identities.setdefault((vm.vcenter, vm.path), name)
            if other != name:
                what = f"it has the vCenter path {vm.path!r}, as has"
                clash(name, other, f"{what}", "vm")
        # What a completed run wrote, nobody writes any more: it may be read beside its VM.
        call = ledger.latest(name, vm.run)
        written = call is None or call.state != "COMPLETED"
        for export in vm.exports:
            reads = export.read_only or not written
            owner, shared = images.setdefault(export.image, (name, reads))
            if owner != name and not (shared and reads):
                clash(
                    name,
                    owner,
                    f"its disk {export.key} has the image {export.image}, as has",
                    "disks",
                )
            owner = names.setdefault(export.name, name)
            if owner != name:
                clash(
                    name,
                    owner,
                    f"its disk {export.key} has the export name {export.name!r}, as has",
                    "disks",
                )
    for name, (vm, _) in vms.items():
        for export in vm.exports:
            writer = images.get(export.backing or "")
            if writer and not writer[1] and writer[0] != name:
                clash(
                    name,
                    writer[0],
                    f"its disk {export.key} builds on {export.backing}, written by",
                    "disks",
                )
    return list(dict.fromkeys(found))


def summary(vm: Vm) -> str:
    """`2 disks, 140 GiB` for people."""
    total = sum(export.size or 0 for export in vm.exports)
    count = len(vm.exports)
    size = f", {format_size(total)}" if total else ""
    return f"{count} disk{'s' if count != 1 else ''}{size}"


_PLACE = re.compile(r"(.*):(\d+):\d+$")


def line_of(place: str) -> str:
    """`file:line` of a place."""
    match = _PLACE.match(place)
    return f"{match.group(1)}:{match.group(2)}" if match else place
