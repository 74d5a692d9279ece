"""Inventory: VM → all its disks, from a YAML file; and the all-or-none check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from msgspec import Struct, field
from pydantic import Field, ValidationError

from reconciler.core.document import Document
from reconciler.core.errors import Diagnostic
from reconciler.core.explain import described, explained
from reconciler.core.spec import AddressSpec, DiskSpec, Name, Size, Strict
from reconciler.core.units import format_size


class KnownDisk(Strict):
    """A disk as the inventory has it: both facts are always there."""

    key: int
    size: Size


class KnownVm(Strict):
    """A VM as the inventory has it."""

    vm: AddressSpec = AddressSpec()
    disks: list[KnownDisk]


class _File(Strict):
    vms: Mapping[Name, KnownVm]
    groups: Mapping[Name, list[str]] = Field(default_factory=dict)


class Inventory(Struct, frozen=True, dict=True):
    """What is known about VMs by somebody who can count their disks."""

    file: str
    vms: Mapping[str, KnownVm]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Group → names of VMs, or globs of names."""

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


def read(document: Document) -> tuple[Inventory | None, list[Diagnostic]]:
    """An inventory, or everything that is wrong with it."""
    value = document.value
    if not isinstance(value, dict):
        summary = f"the inventory: expected `vms:`, found {described(value)}"
        return None, [Diagnostic("error", summary, document.place(()))]
    try:
        model = _File.model_validate(value)
    except ValidationError as error:
        return None, [
            Diagnostic(
                "error",
                f"in the inventory: {summary}",
                document.place(path, key=summary.startswith("unknown key")),
            )
            for path, summary in explained(error, value, _File)
        ]
    diagnostics = []
    for name, vm in model.vms.items():
        seen: set[int] = set()
        for index, disk in enumerate(vm.disks):
            if disk.key in seen:
                summary = f"in the inventory: VM {name} has two disks with the key {disk.key}"
                place = document.place(("vms", name, "disks", index, "key"))
                diagnostics.append(Diagnostic("error", summary, place))
            seen.add(disk.key)
    return (None if diagnostics else Inventory(document.file, model.vms, model.groups)), diagnostics


def contradiction(listed: Sequence[DiskSpec], known: KnownVm) -> str | None:
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
