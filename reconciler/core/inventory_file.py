"""An inventory as it is written: the models that check it."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import convert
from pydantic import Field, ValidationError

from reconciler.core.document import Document
from reconciler.core.errors import Diagnostic, described
from reconciler.core.explain import explained
from reconciler.core.inventory import Inventory, KnownDisk, KnownVm
from reconciler.core.spec import AddressSpec, Name, Size, Strict


class KnownDiskSpec(Strict):
    """A disk as an inventory has it: both facts are always there."""

    key: int
    size: Size

    def checked(self) -> KnownDisk:
        """The same as a plain value."""
        return convert(self, KnownDisk, from_attributes=True)


class KnownVmSpec(Strict):
    """A VM as an inventory has it."""

    vm: AddressSpec = AddressSpec()
    disks: list[KnownDiskSpec]

    def checked(self) -> KnownVm:
        """The same as a plain value."""
        return convert(self, KnownVm, from_attributes=True)


class _File(Strict):
    vms: Mapping[Name, KnownVmSpec]
    groups: Mapping[Name, list[str]] = Field(default_factory=dict)


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
    if diagnostics:
        return None, diagnostics
    vms = {name: vm.checked() for name, vm in model.vms.items()}
    return Inventory(document.file, vms, model.groups), []
