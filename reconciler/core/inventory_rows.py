"""Rows of a database → Inventory: one faulty VM is not usable, and hurts no other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from pydantic import ValidationError

from reconciler.core.errors import described
from reconciler.core.explain import explained
from reconciler.core.inventory import Inventory, KnownDisk, KnownVm
from reconciler.core.inventory_file import KnownDiskSpec, KnownVmSpec
from reconciler.core.settings import VCenter
from reconciler.core.spec import checked_name

QUERY: Final = """\
SELECT c.context_id AS vm, d.disk_id AS disk_id, d.capacity_bytes AS size,
       c.vm_name AS name, c.vm_path AS path, c.vcenter_host AS vcenter
FROM vm_replication_contexts c LEFT JOIN vm_disks d ON d.vm_context_id = c.context_id"""
"""What is asked where the config says nothing else. The tables are the field's: `disk_id` has
the disk key (`unit_number` is always 0 there), `capacity_bytes` is exact (`size_gb` is rounded up).
Source: Sendense, October 2025."""
COLUMNS: Final = ("vm", "key", "size", "name", "path", "vcenter")
"""What a query has to give, in any order; `disk_id` may stand for `key`. A row with no key says
that the VM has no disk."""

_KEY: Final = re.compile(r"(?:disk-)?([0-9]{1,10})")


class ColumnsError(ValueError):
    """An answer has not the columns that it must have."""


def read(
    origin: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    vcenters: Mapping[str, VCenter],
) -> Inventory:
    """The inventory that some rows are. Raises ColumnsError.

    `vcenters`: those of the config. A row names one by its host, or as the config does.
    """
    lower = [column.lower() for column in columns]
    at = {name: lower.index(name) for name in COLUMNS if name in lower}
    if "key" not in at and "disk_id" in lower:
        at["key"] = lower.index("disk_id")
    missing = [name for name in COLUMNS if name not in at]
    if missing:
        raise ColumnsError(
            f"the answer has no column {', '.join(missing)}: expected are "
            f"{', '.join(COLUMNS)} (or disk_id for key), it has {', '.join(columns) or 'none'}"
        )
    order = [at[name] for name in COLUMNS]
    by_vm: dict[str, list[tuple[Any, ...]]] = {}
    for row in rows:
        vm, *rest = (_plain(row[index]) for index in order)
        by_vm.setdefault("" if vm is None else str(vm), []).append(tuple(rest))
    vms: dict[str, KnownVm] = {}
    unusable: dict[str, str] = {}
    for name in sorted(by_vm):
        try:
            checked_name(name)
            vms[name] = _vm(by_vm[name], vcenters)
        except ValueError as error:
            unusable[name] = str(error)
    return Inventory(origin, vms, unusable=unusable)


def _plain(value: Any) -> Any:
    """A value as a whole number or a text, where it is one; some columns come as bytes."""
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode(errors="replace")
    if isinstance(value, Decimal) and value == value.to_integral_value():
        return int(value)
    return value


def _vm(rows: Sequence[tuple[Any, ...]], vcenters: Mapping[str, VCenter]) -> KnownVm:
    """One VM of its rows (key, size, name, path, vcenter). Raises ValueError."""
    address = {}
    for index, what in enumerate(("name", "path", "vcenter"), start=2):
        said = sorted({_text(what, row[index]) for row in rows})
        if len(said) > 1:
            raise ValueError(f"its rows have different values of {what}: {said[0]!r}, {said[1]!r}")
        address[what] = said[0] or None
    if address["vcenter"]:
        address["vcenter"] = _vcenter(address["vcenter"], vcenters)
    disks: dict[int, KnownDisk] = {}
    for row in rows:
        if row[0] is None:
            if len(rows) > 1:
                raise ValueError("one of its disks has no key (disk_id is NULL)")
            continue
        disk = _disk(row[0], row[1])
        if disk.key in disks:
            raise ValueError(
                f"two rows have the disk key {disk.key}, of {disks[disk.key].size} and "
                f"{disk.size} bytes"
            )
        disks[disk.key] = disk
    # In the order of the keys: rows come in any.
    found = [{"key": key, "size": disks[key].size} for key in sorted(disks)]
    value = {"vm": address, "disks": found}
    try:
        return KnownVmSpec.model_validate(value).checked()
    except ValidationError as error:
        raise ValueError("; ".join(_sentences(error, value))) from None


def _sentences(error: ValidationError, value: object) -> Iterator[str]:
    return (sentence for _, sentence in explained(error, value, KnownVmSpec))


def _text(what: str, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"its {what} is no text, but {described(value)}")
    return value.strip()


def _vcenter(host: str, vcenters: Mapping[str, VCenter]) -> str:
    """The name that the config has for a vCenter. Raises ValueError."""

    def same(one: str) -> bool:
        return one.rstrip(".").lower() == host.rstrip(".").lower()

    found = [name for name, one in vcenters.items() if same(one.host)]
    if not found and host in vcenters:
        found = [host]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"its vCenter {host!r} is under {len(found)} names in the config: {', '.join(found)}; "
            "leave one"
        )
    hosts = ", ".join(sorted(one.host for one in vcenters.values())) or "none"
    raise ValueError(
        f"its vCenter {host!r} is not in the config (hosts under `vcenters:` there: {hosts})"
    )


def _disk(key: object, size: object) -> KnownDisk:
    """Raises ValueError with the disk and the value."""
    found = _KEY.fullmatch(str(key)) if isinstance(key, str | int) else None
    if found is None or int(found[1]) >= 2**31:
        raise ValueError(f"disk {key!r}: this is no disk key like 2000 or 'disk-2000'")
    key = int(found[1])
    if size is None:
        raise ValueError(
            f"disk {key}: its size is not known: `capacity_bytes` is NULL, and `size_gb` is "
            "rounded up, so it cannot stand in"
        )
    if isinstance(size, str) and re.fullmatch(r"-?[0-9]{1,20}", size):
        size = int(size)
    if not isinstance(size, int) or isinstance(size, bool):
        raise ValueError(f"disk {key}: its size is no whole number of bytes, but {described(size)}")
    if size < 0:
        raise ValueError(f"disk {key}: its size is {size} bytes")
    value = {"key": key, "size": size}
    try:
        return KnownDiskSpec.model_validate(value).checked()
    except ValidationError as error:
        said = "; ".join(sentence for _, sentence in explained(error, value, KnownDiskSpec))
        raise ValueError(f"disk {key}: {said}") from None
