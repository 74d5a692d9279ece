"""Inventory: VM → all its disks, from whoever can count them; and the all-or-none check."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

from msgspec import Struct, ValidationError, convert, field, to_builtins

from reconciler.core.declared import CheckedAddress, CheckedDisk
from reconciler.core.errors import Diagnostic
from reconciler.core.source import Stale
from reconciler.core.units import Bytes, format_size

if TYPE_CHECKING:
    from reconciler.core.desired import Vm


class KnownDisk(Struct, frozen=True):
    """A disk as the inventory has it: both facts are always there."""

    key: int
    size: Bytes


class KnownVm(Struct, frozen=True):
    """A VM as the inventory has it."""

    vm: CheckedAddress = CheckedAddress()
    disks: list[KnownDisk] = field(default_factory=list)


class Inventory(Struct, frozen=True, dict=True):
    """What is known about VMs by somebody who can count their disks."""

    origin: str
    """The file, or the database, as people know it. Without secrets."""
    vms: Mapping[str, KnownVm]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Group → names of VMs, or globs of names."""
    unusable: Mapping[str, str] = field(default_factory=dict)
    """VM → why what is said of it cannot be right. It is known, and none of `vms`."""
    stale: Stale | None = None
    """It says what was true once: good for keeping what has begun, and for nothing new."""

    @property
    def readable(self) -> bool:
        """Whether it says anything at all."""
        return self.stale is None or bool(self.stale.since)

    @property
    def names(self) -> Collection[str]:
        """Every VM that is there, also those of which nothing can be used."""
        return {**self.vms, **self.unusable}

    @property
    def findings(self) -> list[Diagnostic]:
        """What is wrong with single VMs, for who checks the inventory itself."""
        return [
            Diagnostic("warning", f"in the inventory {self.origin}: VM {name}: {why}")
            for name, why in self.unusable.items()
        ]

    def told(self) -> str:
        """Why no run may begin by what this says; empty: it is of now."""
        return f"the inventory {self.origin}: {self.stale}" if self.stale else ""

    def to_source(self) -> dict[str, Any]:
        """What is remembered of it beside what was read of the specs; see `stale_told`."""
        stale = self.stale
        return {
            "origin": self.origin,
            "error": stale.error if stale else "",
            "since": stale.since if stale else 0.0,
        }

    def groups_of(self, vm: str) -> list[str]:
        """The groups of a VM, in the order in which they are written."""
        named, globs = self._index
        found = {*named.get(vm, ()), *(group for group, glob in globs if fnmatchcase(vm, glob))}
        return [group for group in self.groups if group in found] if found else []

    @cached_property
    def _index(self) -> tuple[Mapping[str, Sequence[str]], Sequence[tuple[str, str]]]:
        """VM → its groups, where it is named; and the globs of every group."""
        named: dict[str, list[str]] = {}
        globs = []
        for group, names in self.groups.items():
            for name in names:
                named.setdefault(name, []).append(group)
                if set("*?[") & {*name}:
                    globs.append((group, name))
        return named, globs

    def unlike(self, vm: Vm) -> str:
        """Why a VM that is to be backed up has other disks than are known; empty: it has not."""
        known = self.vms.get(vm.name)
        if known is None or not vm.exported or vm.purpose != "backup":
            return ""
        if {one.key: one.size for one in vm.exports} == {one.key: one.size for one in known.disks}:
            return ""
        return (
            f"it stays as it was applied last, with the disks "
            f"{_listing((one.key, one.size) for one in vm.exports)}; the inventory knows "
            f"{_listing((one.key, one.size) for one in known.disks)}; mend its spec, which cannot "
            "be used now"
        )

    def facts(self) -> dict[str, Any]:
        """VM → what is known of it, as templates see it."""
        return {
            name: {
                "name": vm.vm.name or name,
                "path": vm.vm.path,
                "vcenter": vm.vm.vcenter,
                "disks": [{"key": disk.key, "size": disk.size} for disk in vm.disks],
                "groups": self.groups_of(name),
            }
            for name, vm in self.vms.items()
        }


def contradiction(listed: Sequence[CheckedDisk], known: KnownVm) -> str | None:
    """Why a spec's list of disks is not the inventory's, both lists shown; None: it is.

    A size that the spec leaves out is the inventory's.
    """
    sizes = {disk.key: disk.size for disk in known.disks}
    same_keys = {disk.key for disk in listed} == sizes.keys()
    if same_keys and all(disk.size in (None, sizes[disk.key]) for disk in listed):
        return None
    here = _listing((disk.key, disk.size) for disk in listed)
    there = _listing((disk.key, disk.size) for disk in known.disks)
    return (
        f"the spec lists the disks {here}; the inventory knows {there}. One snapshot holds all "
        "disks of a VM: name exactly those, or write `disks: inventory`"
    )


def _listing(disks: object) -> str:
    return (
        ", ".join(
            f"{key} ({format_size(size)})" if size is not None else str(key)
            for key, size in disks  # type: ignore[attr-defined]
        )
        or "none"
    )


def to_json(inventory: Inventory) -> dict[str, Any]:
    """All that it says, for a later reading."""
    return {
        "origin": inventory.origin,
        "vms": to_builtins(inventory.vms),
        "groups": {name: list(names) for name, names in inventory.groups.items()},
        "unusable": dict(inventory.unusable),
    }


def from_json(value: Mapping[str, Any], stale: Stale | None) -> Inventory:
    """The same again. Raises ValueError, KeyError, TypeError if it is no such text."""
    return Inventory(
        str(value["origin"]),
        _vms(value["vms"]),
        {name: tuple(names) for name, names in value["groups"].items()},
        {name: str(why) for name, why in value["unusable"].items()},
        stale,
    )


def _vms(value: object) -> Mapping[str, KnownVm]:
    try:
        return convert(value, dict[str, KnownVm])
    except ValidationError as error:
        raise ValueError(str(error)) from error
