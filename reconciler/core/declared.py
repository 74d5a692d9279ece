"""VMs and runs as they were written, checked, with the way back to the text: plain values.

What checks them is in `spec.py`, and is loaded where there is something to check.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from operator import is_
from typing import TYPE_CHECKING, Final

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.core.document import Document, Path
from reconciler.core.errors import Diagnostic, Place
from reconciler.core.units import Bytes

if TYPE_CHECKING:
    from reconciler.core.tunnel_spec import DeclaredTunnel
    from reconciler.core.variables import Variable

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""VM contexts, runs, repositories, SNAs: safe in paths, URLs, argv and the targets string."""
MAX_NAME: Final = 100
"""Characters of a name. Two of them and a disk number fit a file name (255) and an export name."""
MAX_WHO: Final = 200
"""Characters of who asked for a run; it is kept for ever, and shown on one line."""
MAX_TAGS: Final = 32
"""Tags of a run. They are kept for ever, and given back with each answer about it."""
MAX_TAG: Final = 256
"""Characters of a tag's name, and of its value."""
MAX_PATH: Final = 4_095
"""Characters of a path. Source: PATH_MAX in linux/limits.h, which counts a zero byte at the end."""
EXPORT: Final = re.compile(r"[A-Za-z0-9._-]*disk(\d+)")
"""The field's client takes the position from the end of the export name. Source: its parser."""


class CheckedDisk(Struct, frozen=True):
    """One disk, as far as it was written."""

    key: int
    size: Bytes | None = None
    image: str | None = None
    export: str | None = None
    backing: str | None = None


class CheckedBackup(Struct, frozen=True):
    """Which run is asked for."""

    run: str
    type: str = "full"
    fallback: str | None = None


class CheckedAddress(Struct, frozen=True):
    """Where the VM is found at its vCenter."""

    name: str | None = None
    path: str | None = None
    vcenter: str | None = None


class CheckedRestore(Struct, frozen=True):
    """The completed run that a restore reads."""

    vm: str
    run: str


class CheckedKeep(Struct, frozen=True):
    """How many of a VM's backups are kept at least."""

    full: int | None = None
    days: int | None = None


class CheckedVm(Struct, frozen=True):
    """One VM; the keys are those of `VmSpec`."""

    name: str
    state: str = "exported"
    purpose: str = "backup"
    repository: str | None = None
    sna: str | None = None
    vm: CheckedAddress = CheckedAddress()
    backup: CheckedBackup | None = None
    release: str = "on_completion"
    protect: bool = False
    keep: CheckedKeep | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    disks: str | list[CheckedDisk] | None = None
    """`inventory`, or a list of them."""
    of: CheckedRestore | None = None


class CheckedRun(Struct, frozen=True):
    """A run that is asked for beside the VM's own declaration."""

    vm: str
    run: str
    type: str = "full"
    fallback: str | None = None
    by: str = ""
    policy: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


class Asked(Struct, frozen=True):
    """A checked entry of `runs:` with the way back to the text that has it."""

    spec: CheckedRun
    document: Document
    path: Path
    aside: bool = False
    """It stands among the requests while `-f` says what this is about: then it brings no VM in."""

    def place(self, *path: str | int, key: bool = False) -> Place:
        return self.document.place((*self.path, *path), key=key)


class Declared(Struct, frozen=True):
    """A checked VM with the way back to the text that declares it."""

    spec: CheckedVm
    document: Document
    path: Path
    entry: Asked | None = None
    """What asks for its run, where that is not its own `backup`."""

    def place(self, *path: str | int, key: bool = False) -> Place:
        if self.entry and path[:1] == ("backup",):
            return self.entry.place(*path[1:], key=key)
        return self.document.place((*self.path, *path), key=key)


class Written:
    """What was made of a text; equal to what was made of it in the same reading of its file, which
    says the same at the same places."""

    __slots__ = ("_parts",)

    def __init__(self, *parts: object) -> None:
        self._parts = parts

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Written)
            and len(self._parts) == len(other._parts)
            and all(map(is_, self._parts, other._parts))
        )

    __hash__ = None  # type: ignore[assignment]


class Specs(Struct, frozen=True, dict=True):
    """All that could be read of all files, and all that is wrong with the rest."""

    vms: tuple[Declared, ...]
    diagnostics: tuple[Diagnostic, ...]
    runs: tuple[Asked, ...] = ()
    """In reading order."""
    tunnels: tuple[DeclaredTunnel, ...] = ()
    refused: frozenset[str] = frozenset()
    """VMs that are declared, and in such a way that they cannot be used."""
    unread: frozenset[str] = frozenset()
    """Files that declare or ask for something that could not be read."""

    @property
    def failed(self) -> bool:
        return any(one.severity == "error" for one in self.diagnostics)

    def only(self, names: Collection[str]) -> Specs:
        """The same of some VMs: cheap, however many others there are."""
        vms, runs = self.by_name, self._runs_of
        return Specs(
            vms=tuple(vms[name] for name in names if name in vms),
            diagnostics=tuple(one for one in self.diagnostics if one.vm in names),
            runs=tuple(one for name in names for one in runs.get(name, ())),
            tunnels=tuple(one for one in self.tunnels if one.subject in names),
            refused=self.refused.intersection(names),
            unread=self.unread,
        )

    def with_vms(self, vms: tuple[Declared, ...], by_name: Mapping[str, Declared]) -> Specs:
        """The same with other VMs, of which the names are known already."""
        found = replace(self, vms=vms)
        found.__dict__.update(by_name=by_name, _runs_of=self._runs_of)
        return found

    @cached_property
    def by_name(self) -> Mapping[str, Declared]:
        """VM → its declaration."""
        return {one.spec.name: one for one in self.vms}

    @cached_property
    def _runs_of(self) -> Mapping[str, Sequence[Asked]]:
        runs: dict[str, list[Asked]] = {}
        for one in self.runs:
            runs.setdefault(one.spec.vm, []).append(one)
        return runs

    def asked(self, name: str) -> Sequence[Asked]:
        """The runs that are asked for of a VM, apart from its declaration."""
        return self._runs_of.get(name, ())

    def written(self, name: str) -> Written:
        """What is written of a VM, and where."""
        return Written(self.by_name.get(name), *self._runs_of.get(name, ()))


class Found(Struct, frozen=True):
    """What one file says, and what is wrong with it; whoever reads it again need not, if neither
    it nor an answer from around it did change."""

    file: str
    vms: tuple[Declared, ...] = ()
    runs: tuple[Asked, ...] = ()
    """In reading order."""
    tunnels: tuple[DeclaredTunnel, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()
    refused: frozenset[str] = frozenset()
    """VMs with an error."""
    lost: bool = False
    """There may be a VM or a run here of which not even the name could be read."""
    explained: tuple[Variable, ...] | None = None
    """The variables of the VM that was asked about, if it is declared here."""


def join(files: Sequence[Found]) -> Specs:
    """All that some files say, in their order."""
    diagnostics = [one for file in files for one in file.diagnostics]
    refused = {name for file in files for name in file.refused}
    first: dict[str, Declared] = {}
    doubled: set[str] = set()
    for declared in (one for file in files for one in file.vms):
        name = declared.spec.name
        if name not in first:
            first[name] = declared
            continue
        doubled.add(name)
        diagnostics.append(
            Diagnostic(
                "error",
                f"the VM {name!r} is declared twice (first at {first[name].place('name')}); "
                "neither is used: keep one",
                declared.place("name"),
                name,
            )
        )
    used = {name: one for name, one in first.items() if name not in doubled}
    tunnels = [one for file in files for one in file.tunnels]
    twice: list[Diagnostic] = []
    if len(tunnels) > 1:
        from reconciler.core.tunnel_spec import clashes

        twice += clashes(tunnels)
    diagnostics += twice
    doubled |= {one.vm for one in twice}
    return Specs(
        vms=tuple(used.values()),
        diagnostics=tuple(dict.fromkeys(diagnostics)),
        runs=tuple(one for file in files for one in file.runs),
        tunnels=tuple(one for one in tunnels if one.subject not in doubled),
        refused=frozenset((refused | doubled) - used.keys()),
        unread=frozenset(file.file for file in files if file.lost),
    )


def contradictions(declared: Declared) -> Iterator[Diagnostic]:
    """What no single key can tell."""
    spec = declared.spec

    def error(summary: str, *path: str | int) -> Diagnostic:
        return _about(declared, summary, *path)

    if spec.state == "absent":
        return
    if spec.purpose == "backup":
        if spec.disks is None:
            yield error("the key 'disks' is missing: write `disks: inventory` or a list of disks")
        if spec.of is not None:
            yield error("`of` names what a restore reads: write `for: restore` with it", "of")
    else:
        if spec.backup is not None:
            yield error("a restore makes no backup: remove `backup`, or `for: restore`", "backup")
        if (spec.of is None) == (spec.disks is None):
            yield error("a restore takes either `of: {vm, run}` or `disks` with images, not both")
        if spec.disks == "inventory":
            yield error("the inventory knows no images: write `of: {vm, run}`", "disks")
    if not isinstance(spec.disks, list):
        return
    if not spec.disks:
        yield error("`disks` is an empty list: name at least one disk", "disks")
    seen: dict[tuple[str, object], int] = {}
    for index, disk in enumerate(spec.disks):
        for what, value in (("key", disk.key), ("export", disk.export), ("image", disk.image)):
            if value is None:
                continue
            other = seen.setdefault((what, value), index)
            if other != index:
                line = declared.place("disks", other, what).line
                yield error(
                    f"two disks have the {what} {value!r} (the other on line {line})",
                    "disks",
                    index,
                    what,
                )
        if spec.purpose == "restore" and disk.image is None:
            yield error(f"disk {disk.key} of a restore needs its `image`", "disks", index)
        if disk.export is None:
            continue
        position = int(EXPORT.fullmatch(disk.export).group(1))  # type: ignore[union-attr]
        if position != index:
            yield error(
                f"the export name {disk.export!r} ends in disk{position}, but this disk is at "
                f"position {index}: the appliance would write another disk into it",
                "disks",
                index,
                "export",
            )


def run_contradictions(declared: Declared) -> Iterator[Diagnostic]:
    """What is wrong with a VM and the run that is asked for, once it is known which one that is."""
    spec = declared.spec
    if spec.state == "absent":
        return
    run = spec.backup.run if spec.backup else ""
    for index, disk in enumerate(spec.disks if isinstance(spec.disks, list) else ()):
        if disk.export is not None and run not in disk.export:
            yield _about(
                declared,
                f"the export name {disk.export!r} does not contain the run {run!r}, so a late "
                "writer of an older run would find it; leave `export` out to get a right one",
                "disks",
                index,
                "export",
            )


def _about(declared: Declared, summary: str, *path: str | int) -> Diagnostic:
    name = declared.spec.name
    return Diagnostic("error", f"VM {name}: {summary}", declared.place(*path), name)
