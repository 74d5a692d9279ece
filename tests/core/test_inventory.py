"""The inventory: who has which disks, and whether a spec names all of them."""

from __future__ import annotations

import pytest

from reconciler.core import inventory_file
from reconciler.core.declared import CheckedDisk
from reconciler.core.inventory import KnownDisk, KnownVm, contradiction
from tests.core.builders import GIB, document, known, lines, says

GOOD = """\
vms:
  ctx-123:
    vm: {name: pgtest1, path: /DC1/vm/pgtest1, vcenter: vc1}
    disks: [{key: 2000, size: 40GiB}, {key: 2001, size: 100GiB}]
  ctx-124:
    disks: []
"""


def wrong(text: str) -> str:
    found, diagnostics = inventory_file.read(document(text, "inventory.yaml"))
    assert found is None
    return "\n".join(lines(diagnostics))


def test_an_inventory_knows_addresses_keys_and_sizes() -> None:
    found = known(GOOD)
    assert found.origin == "inventory.yaml"
    vm = found.vms["ctx-123"]
    assert (vm.vm.name, vm.vm.path, vm.vm.vcenter) == ("pgtest1", "/DC1/vm/pgtest1", "vc1")
    assert [(disk.key, disk.size) for disk in vm.disks] == [(2000, 40 * GIB), (2001, 100 * GIB)]
    assert found.vms["ctx-124"].disks == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["1:1 error", "expected `vms:`, found nothing"]),
        ("[]", ["1:1 error", "expected `vms:`, found a list"]),
        ("machines: {}", ["the key 'vms' is missing", "1:1 error: in the inventory: unknown key"]),
        ("vms: []", ["1:6 error", "vms: expected keys and values, found a list"]),
        ("vms: {ctx-1: {}}", ["1:14 error", "the key 'disks' is missing"]),
        ("vms:\n  ctx-1:\n    disk: []\n    disks: []\n", ["3:5 error", "did you mean 'disks'"]),
        ("vms: {ctx-1: {disks: [{key: 1}]}}", ["1:23 error", "the key 'size' is missing"]),
        ("vms: {ctx-1: {disks: [{key: 1, size: 5}]}}", ["1:38 error", "multiple of 512"]),
        ("vms: {ctx-1: {disks: [{key: '1', size: 1G}]}}", ["1:29 error", "without quotes"]),
        ("vms: {ctx/1: {disks: []}}", ["error", "'ctx/1' holds '/'"]),
        (
            "vms:\n  ctx-1:\n    disks: [{key: 1, size: 1G}, {key: 1, size: 2G}]\n",
            ["3:39 error", "VM ctx-1 has two disks with the key 1"],
        ),
    ],
)
def test_an_inventory_that_cannot_be_right_is_refused_with_its_place(
    text: str, words: list[str]
) -> None:
    says(wrong(text), "in the inventory" if "expected `vms:`" not in words[1] else "", *words)


VM = KnownVm(disks=[KnownDisk(2000, 40 << 30), KnownDisk(2001, 100 << 30)])


def disks(*listed: tuple[int, int | None]) -> list[CheckedDisk]:
    return [CheckedDisk(key=key, size=size) for key, size in listed]


@pytest.mark.parametrize(
    "listed",
    [
        disks((2000, 40 * GIB), (2001, 100 * GIB)),
        disks((2001, 100 * GIB), (2000, 40 * GIB)),
        disks((2000, None), (2001, None)),
    ],
)
def test_a_spec_may_list_all_disks_in_any_order_without_sizes(listed: list[CheckedDisk]) -> None:
    assert contradiction(listed, VM) is None


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (disks((2000, 40 * GIB)), ["lists the disks 2000 (40 GiB);"]),
        (disks((2000, None), (2001, None), (2002, None)), ["lists the disks 2000, 2001, 2002;"]),
        (disks((2000, None), (2002, None)), ["2000, 2002;"]),
        (disks((2000, 41 * GIB), (2001, None)), ["2000 (41 GiB), 2001;"]),
    ],
)
def test_a_spec_that_names_other_disks_is_shown_both_lists(
    listed: list[CheckedDisk], words: list[str]
) -> None:
    found = contradiction(listed, VM)
    assert found
    says(found, *words, "the inventory knows 2000 (40 GiB), 2001 (100 GiB)", "disks: inventory")
