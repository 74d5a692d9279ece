"""Rows of a database as an inventory: the field's tables, and what is wrong with a VM alone."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from reconciler.core.inventory import Inventory, from_json, to_json
from reconciler.core.inventory_rows import ColumnsError, read
from reconciler.core.settings import SecretRef, VCenter
from tests.core.builders import desired, says

COLUMNS = ("vm", "disk_id", "size", "name", "path", "vcenter")
MIB = 1 << 20
VCENTERS = {
    name: VCenter(host=host, user="u", password=SecretRef("env", "P"))
    for name, host in (("vc1", "vc1.example"), ("vc2", "VC2.example."))
}


def row(vm: Any = "ctx-1", key: Any = "disk-2000", size: Any = MIB, **more: Any) -> tuple[Any, ...]:
    return (
        *(vm, key, size, more.get("name", "pg1"), more.get("path", "/DC/vm/pg1")),
        more.get("vcenter", "vc1.example"),
    )


def inventory(*rows: tuple[Any, ...], columns: tuple[str, ...] = COLUMNS) -> Inventory:
    return read("mysql://db/oma", columns, rows, VCENTERS)


def test_the_key_is_the_number_in_disk_id_and_the_order_is_that_of_the_keys() -> None:
    """As texts, disk-16000 comes before disk-2000."""
    found = inventory(
        row(key="disk-16000", size=3 * MIB), row(key="disk-2001", size=2 * MIB), row(), row("ctx-2")
    )
    assert [(d.key, d.size) for d in found.vms["ctx-1"].disks] == [
        (2000, MIB),
        (2001, 2 * MIB),
        (16000, 3 * MIB),
    ]
    vm = found.vms["ctx-1"].vm
    assert (vm.name, vm.path, vm.vcenter) == ("pg1", "/DC/vm/pg1", "vc1")
    assert found.unusable == {}


@pytest.mark.parametrize(
    ("key", "size"),
    [
        (2000, MIB),
        ("2000", str(MIB)),
        (b"disk-2000", Decimal(MIB)),
        (Decimal(2000), bytearray(str(MIB).encode())),
    ],
)
def test_numbers_come_in_many_types(key: object, size: object) -> None:
    found = inventory(row(key=key, size=size))
    assert [(d.key, d.size) for d in found.vms["ctx-1"].disks] == [(2000, MIB)]


def test_columns_have_any_order_and_any_case_and_there_may_be_more() -> None:
    columns = ("ID", "VCENTER", "Path", "NAME", "SIZE", "KEY", "VM")
    found = inventory((7, "vc1", "/p", "n", MIB, 2000, "ctx-1"), columns=columns)
    assert [d.key for d in found.vms["ctx-1"].disks] == [2000]
    assert found.vms["ctx-1"].vm.vcenter == "vc1"  # as the config calls it, too


def test_columns_that_are_missing_are_named_and_so_are_those_that_came() -> None:
    with pytest.raises(ColumnsError) as error:
        inventory((1, 2), columns=("vm", "unit_number"))
    says(
        str(error.value),
        "no column key, size, name, path, vcenter",
        "expected are vm, key, size, name, path, vcenter (or disk_id for key)",
        "it has vm, unit_number",
    )


def test_a_vm_without_disks_is_known() -> None:
    found = inventory(row(key=None, size=None))
    assert found.vms["ctx-1"].disks == []


def test_two_vms_of_one_name_in_two_vcenters_are_two() -> None:
    found = inventory(row("ctx-1"), row("ctx-2", vcenter="vc2.EXAMPLE"))
    assert {n: (v.vm.name, v.vm.vcenter) for n, v in found.vms.items()} == {
        "ctx-1": ("pg1", "vc1"),
        "ctx-2": ("pg1", "vc2"),
    }


BAD: dict[str, tuple[list[tuple[Any, ...]], list[str]]] = {
    "a key twice": (
        [row(), row(size=2 * MIB)],
        ["two rows have the disk key 2000", f"{MIB} and {2 * MIB} bytes"],
    ),
    "a key twice, written in two ways": ([row(), row(key=2000)], ["two rows have the disk key"]),
    "no exact size": ([row(size=None)], ["disk 2000", "capacity_bytes", "NULL", "size_gb"]),
    "a negative size": ([row(size=-512)], ["disk 2000", "-512 bytes"]),
    "no size at all": ([row(size=0)], ["disk 2000", "0 bytes"]),
    "half a sector": ([row(size=MIB + 1)], ["disk 2000", str(MIB + 1), "not a multiple of 512"]),
    "a size that is no number": ([row(size="40GiB")], ["disk 2000", "'40GiB'"]),
    "a rounded size": ([row(size=1.5)], ["disk 2000", "1.5"]),
    "a key that is none": ([row(key="scsi0:1")], ["disk 'scsi0:1'", "disk-2000"]),
    "a negative key": ([row(key=-1)], ["disk -1"]),
    "a key that is too long": ([row(key=2**31)], [f"disk {2**31}"]),
    "a disk without a key": ([row(), row(key=None)], ["has no key"]),
    "a vCenter that nobody knows": (
        [row(vcenter="vc9.example")],
        ["'vc9.example' is not in the config", "VC2.example., vc1.example"],
    ),
    "two paths": (
        [row(), row(key=2001, path="/DC/vm/x")],
        ["different values of path", "/DC/vm/x"],
    ),
    "a name that is no text": ([row(name=7)], ["name is no text", "7"]),
}


@pytest.mark.parametrize(("rows", "words"), BAD.values(), ids=BAD.keys())
def test_one_vm_that_cannot_be_right_hurts_no_other(
    rows: list[tuple[Any, ...]], words: list[str]
) -> None:
    found = inventory(*rows, row("ctx-2"))
    assert list(found.vms) == ["ctx-2"]
    says(found.unusable["ctx-1"], *words)
    says("\n".join(map(str, found.findings)), "warning: ", "mysql://db/oma", "VM ctx-1: ", *words)


@pytest.mark.parametrize("name", ["ctx/1", "", None])
def test_a_context_that_can_be_no_name_is_not_usable(name: object) -> None:
    found = inventory(row(name), row("ctx-2"))
    assert list(found.vms) == ["ctx-2"]
    assert len(found.unusable) == 1


def test_a_host_under_two_names_is_nobodys() -> None:
    vcenters = {**VCENTERS, "other": VCENTERS["vc1"]}
    found = read("x", COLUMNS, [row()], vcenters)
    says(found.unusable["ctx-1"], "under 2 names in the config: vc1, other")


def test_not_usable_is_another_thing_than_not_known() -> None:
    known = inventory(row(size=None), row("ctx-2"))
    text = "vms:\n" + "".join(
        f"  - {{name: {name}, disks: inventory, backup: {{run: r1}}}}\n"
        for name in ("ctx-1", "ctx-2", "ctx-3")
    )
    found = desired(text, known)
    assert list(found.vms) == ["ctx-2"]
    first, second = (one.summary for one in found.diagnostics)
    says(first, "VM ctx-1: the inventory mysql://db/oma knows this VM", "cannot be used", "NULL")
    says(second, "VM ctx-3: the inventory mysql://db/oma does not know this VM")


def test_a_list_of_disks_does_not_get_past_what_cannot_be_used() -> None:
    text = (
        "vms:\n  - {name: ctx-1, vm: {path: /p}, backup: {run: r1}, "
        "disks: [{key: 2000, size: 1MiB}]}\n"
    )
    found = desired(text, inventory(row(size=None), row("ctx-2")))
    assert not found.vms
    says(found.diagnostics[0].summary, "knows this VM", "cannot be used")


def test_an_inventory_is_the_same_after_it_was_written_down() -> None:
    found = inventory(row(), row("ctx-2", size=None), row("ctx-3", key=None))
    assert from_json(to_json(found), None) == found
