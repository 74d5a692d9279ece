"""What may be written about VMs and runs, checked, each value with its place."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from operator import is_
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Final, Literal

from msgspec import Struct
from msgspec.structs import replace
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from reconciler.core.document import Document, Path
from reconciler.core.errors import Diagnostic, Place
from reconciler.core.units import format_size, parse_size, whole_sectors

if TYPE_CHECKING:
    from reconciler.core.tunnel_spec import DeclaredTunnel

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


def _text(value: object) -> object:
    """A whole number where a name is meant is that name: `run: 20261123`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def checked_name(value: str) -> str:
    """A name that is safe wherever it goes. Raises ValueError."""
    if len(value) > MAX_NAME:
        raise ValueError(f"{value[:20]!r}… has {len(value)} characters; at most {MAX_NAME}")
    if not NAME.fullmatch(value):
        wrong = next((char for char in value if not re.match(r"[A-Za-z0-9._-]", char)), value[:1])
        raise ValueError(
            f"{value!r} holds {wrong!r} where only letters, digits, dot, dash and underscore can "
            "be (a letter or digit first)"
            if value
            else "a name cannot be empty"
        )
    return value


def _size(value: object) -> int:
    if not isinstance(value, str | int):
        raise ValueError("write a size like 40GiB")
    size = parse_size(value)
    if size == 0:
        raise ValueError("a disk of 0 bytes cannot be exported")
    if size > 1 << 60:
        raise ValueError(f"{format_size(size)} is more than any disk can hold")
    if size != whole_sectors(size):
        raise ValueError(
            f"{value} is {size} bytes, not a multiple of 512; the next one up is "
            f"{whole_sectors(size)} bytes"
        )
    return size


def _inside(value: str) -> str:
    """A path below the repository, as far as its text can tell; symlinks are looked at later."""
    if len(value) > MAX_PATH:
        raise ValueError(f"a path has at most {MAX_PATH:,} characters, this one {len(value):,}")
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{value!r} leads out of the repository: write a path relative to its root, "
            "without '..'"
        )
    if not path.parts or "\0" in value or "\n" in value:
        raise ValueError(f"{value!r} is not a file name")
    if path.name.startswith("."):
        raise ValueError(f"{value!r} begins with a dot, as only files of our own do")
    return str(path)


def _export(value: str) -> str:
    if not EXPORT.fullmatch(value):
        wrong = next((char for char in value if not re.match(r"[A-Za-z0-9._-]", char)), None)
        problem = f"it holds {wrong!r}" if wrong else "it does not end in disk<N>"
        raise ValueError(
            f"{value!r} cannot be an export name: {problem}; the appliance splits targets at "
            "commas and colons and takes the disk's position from the end, so write letters, "
            "digits, dot, dash, underscore, and disk<N> last"
        )
    if len(value) > 255:
        raise ValueError(f"an export name has at most 255 characters, this one {len(value)}")
    return value


def _who(value: str) -> str:
    if len(value) > MAX_WHO or not value.isprintable():
        raise ValueError(f"write one line of at most {MAX_WHO} characters")
    return value


def checked_tags(value: Mapping[str, str]) -> Mapping[str, str]:
    """Tags that can be kept and shown. Raises ValueError."""
    if len(value) > MAX_TAGS:
        raise ValueError(f"write at most {MAX_TAGS} tags; these are {len(value)}")
    for name, text in value.items():
        if not name:
            raise ValueError("a tag needs a name")
        if max(len(name), len(text)) > MAX_TAG or not f"{name}{text}".isprintable():
            raise ValueError(
                f"the tag {name[:40]!a}: write a name and a value of one line, of at most "
                f"{MAX_TAG} characters each"
            )
    return value


Name = Annotated[str, BeforeValidator(_text), AfterValidator(checked_name)]
Size = Annotated[int, BeforeValidator(_size)]
Inside = Annotated[str, AfterValidator(_inside)]
ExportName = Annotated[str, AfterValidator(_export)]
Label = Annotated[str, BeforeValidator(_text)]
Tags = Annotated[Mapping[str, str], AfterValidator(checked_tags)]


class Strict(BaseModel):
    """A misspelt key is an error, and no value is bent into another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class DiskSpec(Strict):
    """One disk as a person writes it."""

    key: Annotated[int, Field(ge=0, lt=2**31)]
    size: Size | None = None
    image: Inside | None = None
    export: ExportName | None = None
    backing: Inside | None = None


class BackupSpec(Strict):
    """Which run is asked for. The run is the identity of the one call."""

    run: Name
    type: Literal["full", "incremental"] = "full"
    fallback: Literal["full"] | None = None


class AddressSpec(Strict):
    """Where the VM is found at its vCenter."""

    name: str | None = None
    path: str | None = None
    vcenter: Name | None = None


class RestoreSpec(Strict):
    """The completed run that a restore reads."""

    vm: Name
    run: Name


class KeepSpec(Strict):
    """How many of a VM's backups are kept at least."""

    full: Annotated[int, Field(ge=1, le=100_000)] | None = None
    days: Annotated[int, Field(ge=0, le=100_000)] | None = None

    @model_validator(mode="after")
    def _something(self) -> KeepSpec:
        if self.full is None and self.days is None:
            raise ValueError("write how many full chains are kept, or for how many days, or both")
        return self


class VmSpec(Strict):
    """One VM as a person writes it."""

    name: Name
    state: Literal["exported", "absent"] = "exported"
    purpose: Literal["backup", "restore"] = Field("backup", alias="for")
    repository: Name | None = None
    sna: Name | None = None
    vm: AddressSpec = AddressSpec()
    backup: BackupSpec | None = None
    release: Literal["on_completion", "keep"] = "on_completion"
    protect: bool = False
    keep: KeepSpec | None = None
    labels: Mapping[str, Label] = Field(default_factory=dict)
    disks: Literal["inventory"] | list[DiskSpec] | None = None
    of: RestoreSpec | None = None


class RunSpec(Strict):
    """A run that is asked for beside the VM's own declaration."""

    vm: Name
    run: Name
    type: Literal["full", "incremental"] = "full"
    fallback: Literal["full"] | None = None
    by: Annotated[str, AfterValidator(_who)] = ""
    """Who asked; written by tools."""
    policy: Annotated[str, AfterValidator(_who)] = ""
    """The rule by which a scheduler asked."""
    tags: Tags = Field(default_factory=dict)


class Asked(Struct, frozen=True):
    """A checked entry of `runs:` with the way back to the text that has it."""

    spec: RunSpec
    document: Document
    path: Path
    aside: bool = False
    """It stands among the requests while `-f` says what this is about: then it brings no VM in."""

    def place(self, *path: str | int, key: bool = False) -> Place:
        return self.document.place((*self.path, *path), key=key)


class Declared(Struct, frozen=True):
    """A checked VM with the way back to the text that declares it."""

    spec: VmSpec
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
