"""From what was written to what should be true: defaults filled, all decided, clashes refused."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.core.call import CallState
from reconciler.core.desired import Desired, Vm, attempted, attempted_image, summary
from reconciler.core.ledger import Ledger
from reconciler.core.settings import Appliance, SecretRef, Settings, VCenter
from tests.core.builders import (
    GIB,
    HUB,
    NOW,
    ROOT,
    a_call,
    a_settings,
    a_vm,
    an_export,
    desired,
    lines,
    remembered,
    says,
)

INVENTORY: Final = """\
vms:
  ctx-1:
    vm: {name: pgtest1, path: /DC1/vm/pgtest1, vcenter: vc1}
    disks: [{key: 2000, size: 40GiB}, {key: 2016, size: 1GiB}]
"""
FROM_INVENTORY: Final = "vms: [{name: ctx-1, disks: inventory, backup: {run: r1}}]"
LISTED: Final = """\
vms:
  - name: ctx-1
    vm: {path: /DC1/vm/a}
    backup: {run: r1}
    disks:
      - {key: 2001, size: 1GiB}
      - {key: 2000, size: 2GiB}
"""


def only_vm(found: Desired) -> Vm:
    assert [one for one in found.diagnostics if one.severity == "error"] == []
    (vm,) = found.vms.values()
    return vm


def wrong(found: Desired) -> str:
    """What is wrong where no VM can be used."""
    assert dict(found.vms) == {}
    assert found.failed
    return "\n".join(lines(found.diagnostics))


# -- what the smallest spec comes to


def test_the_inventory_gives_disks_sizes_and_the_address() -> None:
    vm = only_vm(desired(FROM_INVENTORY, INVENTORY))
    assert [(e.key, e.position, e.size) for e in vm.exports] == [
        (2000, 0, 40 * GIB),
        (2016, 1, GIB),
    ]
    assert (vm.display_name, vm.path, vm.vcenter) == ("pgtest1", "/DC1/vm/pgtest1", "vc1")
    assert (vm.repository, vm.sna, vm.type) == ("local", "site-a", "full")
    assert vm.verified
    assert vm.place == "a.yaml:1:14"


def test_names_and_images_carry_the_vm_the_run_and_the_position() -> None:
    vm = only_vm(desired(FROM_INVENTORY, INVENTORY))
    assert [export.name for export in vm.exports] == ["ctx-1-r1-disk0", "ctx-1-r1-disk1"]
    assert [export.image for export in vm.exports] == [
        "/backup/ctx-1/2000/r1.qcow2",
        "/backup/ctx-1/2016/r1.qcow2",
    ]


def test_the_position_is_the_place_in_the_list_and_not_in_the_order_of_keys() -> None:
    vm = only_vm(desired(LISTED))
    assert [(e.key, e.position, e.name) for e in vm.exports] == [
        (2001, 0, "ctx-1-r1-disk0"),
        (2000, 1, "ctx-1-r1-disk1"),
    ]
    assert vm.display_name == "ctx-1"


def test_disks_that_no_inventory_confirms_are_warned_of() -> None:
    found = desired(LISTED)
    assert not only_vm(found).verified
    (said,) = lines(found.diagnostics)
    says(said, "6:7 warning: VM ctx-1", "DisksUnverified", "missing in the backup")
    assert not found.failed


def test_disks_that_no_inventory_confirms_are_refused_where_it_is_required() -> None:
    settings = a_settings(inventory="/inventory.yaml", inventory_required=True)
    says(wrong(desired(LISTED, settings=settings)), "6:7 error", "there is none that can be read")
    says(
        wrong(desired(LISTED, "vms: {ctx-2: {disks: []}}", settings=settings)),
        "6:7 error: VM ctx-1: the inventory inventory.yaml does not know this VM",
        "did you mean 'ctx-2'",
    )


def test_a_size_that_the_spec_leaves_out_is_the_inventorys() -> None:
    spec = LISTED.replace(", size: 1GiB", "").replace(", size: 2GiB", "")
    have = "vms: {ctx-1: {disks: [{key: 2000, size: 2G}, {key: 2001, size: 1G}]}}"
    assert [e.size for e in only_vm(desired(spec, have)).exports] == [GIB, 2 * GIB]
    says(wrong(desired(spec)), "6:9 error: VM ctx-1: disk 2001 has no size", "size: 40GiB")


def test_what_is_written_goes_before_the_default() -> None:
    spec = """\
vms:
  - name: ctx-1
    repository: far
    vm: {name: shown, path: /p, vcenter: vc1}
    backup: {run: r1}
    release: keep
    protect: true
    labels: {tier: gold}
    disks: [{key: 9, size: 1GiB, image: a/b.qcow2, export: mine-r1-disk0}]
"""
    settings = a_settings(repositories={"local": "/backup", "far": "/mnt/far"})
    vm = only_vm(desired(spec, settings=settings))
    (export,) = vm.exports
    assert (export.name, export.image) == ("mine-r1-disk0", "/mnt/far/a/b.qcow2")
    assert (vm.root, vm.display_name, vm.release, vm.protect) == ("/mnt/far", "shown", "keep", True)
    assert vm.labels == {"tier": "gold"}


def test_a_vm_of_which_no_run_is_asked_for_is_left_out_and_said() -> None:
    """Its spec is fine, and its runs come from elsewhere: from a timer, one by one."""
    found = desired(FROM_INVENTORY.replace(", backup: {run: r1}", ""), INVENTORY)
    assert (dict(found.vms), found.failed, found.idle) == ({}, False, ("ctx-1",))
    (said,) = lines(found.diagnostics)
    says(said, "1:14 warning: VM ctx-1: no run is asked for", "reconciler backup ctx-1 --run NAME")


def test_an_absent_vm_needs_neither_config_nor_inventory() -> None:
    settings = a_settings(snas={}, vcenters={})
    found = desired("vms: [{name: ctx-1, state: absent, protect: true}]", settings=settings)
    vm = only_vm(found)
    assert (vm.exported, vm.protect, vm.exports) == (False, True, ())


# -- what cannot be decided


@pytest.mark.parametrize(
    ("spec", "settings", "words"),
    [
        (FROM_INVENTORY, {}, ["1:28 error: VM ctx-1: its disks come from the inventory"]),
        (
            LISTED.replace("    vm: {path: /DC1/vm/a}\n", ""),
            {},
            ["2:5 error: VM ctx-1: its path in vCenter is not known", "vm: {path: /DC1/vm/NAME}"],
        ),
        (LISTED, {"snas": {}}, ["2:5 error", "names no sna", "has 0 of them", "under `snas:`"]),
        (
            LISTED,
            {"snas": {"a": Appliance(url="x"), "b": Appliance(url="x")}},
            ["names no sna", "has 2 of them (a, b)", "write `sna: NAME`"],
        ),
        (LISTED, {"vcenters": {}}, ["names no vm.vcenter", "under `vcenters:`"]),
        (
            LISTED.replace("path: /DC1/vm/a", "path: /a, vcenter: vc2"),
            {},
            ["3:29 error", "vm.vcenter 'vc2' is not in the config", "did you mean 'vc1'"],
        ),
        (
            LISTED + "    sna: sitea\n",
            {},
            [
                "8:10 error",
                "sna 'sitea' is not in the config; did you mean 'site-a'",
                "there: site",
            ],
        ),
        (
            LISTED + "    repository: x\n",
            {},
            ["8:17 error", "repository 'x' is not in the config", "repositories there: local"],
        ),
        (
            LISTED.replace("size: 1GiB", "size: 1GiB, backing: x"),
            {},
            ["6:42 error", "disk 2001 has a `backing`, but the run is full", "type: incremental"],
        ),
        (
            LISTED.replace("size: 1GiB", "size: 1GiB, export: other-disk0"),
            {},
            ["6:41 error: VM ctx-1: the export name", "does not contain the run 'r1'"],
        ),
        (
            LISTED.replace("run: r1", "run: r1, type: incremental"),
            {},
            ["4:13 error", "disk 2001 has no completed run", "type: full"],
        ),
    ],
)
def test_what_cannot_be_decided_is_refused_at_its_place(
    spec: str, settings: dict[str, Any], words: list[str]
) -> None:
    says(wrong(desired(spec, settings=a_settings(**settings))), *words)


def test_other_disks_than_the_inventory_knows_are_refused_with_both_lists() -> None:
    spec = LISTED.replace("      - {key: 2000, size: 2GiB}\n", "")
    have = "vms: {ctx-1: {disks: [{key: 2000, size: 2G}, {key: 2001, size: 1G}]}}"
    says(
        wrong(desired(spec, have)),
        "6:7 error: VM ctx-1: the spec lists the disks 2001 (1 GiB)",
        "the inventory knows 2000 (2 GiB), 2001 (1 GiB)",
    )


def test_a_vm_without_disks_in_the_inventory_is_no_backup() -> None:
    have = "vms: {ctx-1: {vm: {path: /p}, disks: []}}"
    says(wrong(desired(FROM_INVENTORY, have)), "1:28 error", "knows no disks of this VM")


def test_one_vm_that_cannot_be_decided_leaves_the_others_standing() -> None:
    found = desired(LISTED + "  - {name: ctx-2, disks: inventory, backup: {run: r1}}\n")
    assert list(found.vms) == ["ctx-1"]
    assert found.failed


# -- two VMs that cannot both be true


def two(one: str, other: str) -> str:
    body = "backup: {run: r1}"
    return (
        f"vms:\n  - {{name: ctx-1, vm: {{path: /a}}, {body}, {one}}}\n"
        f"  - {{name: ctx-2, vm: {{path: /b}}, {body}, {other}}}\n"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            two("disks: [{key: 1, size: 1G, image: x}]", "disks: [{key: 1, size: 1G, image: x}]"),
            ["its disk 1 has the image /backup/x, as has VM ctx-1 (a.yaml:2:12)"],
        ),
        (
            two(
                "disks: [{key: 1, size: 1G, export: r1-disk0}]",
                "disks: [{key: 2, size: 1G, export: r1-disk0}]",
            ),
            ["its disk 2 has the export name 'r1-disk0', as has VM ctx-1"],
        ),
        (
            two("disks: [{key: 1, size: 1G}]", "disks: [{key: 1, size: 1G}]").replace("/b", "/a"),
            ["3:23 error: VM ctx-2: it has the vCenter path '/a', as has VM ctx-1"],
        ),
        (
            two("disks: [{key: 1, size: 1G, image: x}]", "disks: [{key: 1, size: 1G, backing: x}]")
            .replace("ctx-2, vm: {path: /b}, backup: {run: r1}",
                     "ctx-2, vm: {path: /b}, backup: {run: r1, type: incremental}"),
            ["its disk 1 builds on /backup/x, written by VM ctx-1"],
        ),
    ],
)  # fmt: skip
def test_two_vms_that_clash_are_both_refused_and_both_named(text: str, words: list[str]) -> None:
    found = wrong(desired(text))
    says(found, "VM ctx-1:", "VM ctx-2:", *words)


def test_two_restores_may_read_one_image() -> None:
    text = "vms:\n" + "".join(
        f"  - {{name: look-{n}, for: restore, disks: [{{key: 1, image: x}}]}}\n" for n in "ab"
    )
    assert sorted(desired(text).vms) == ["look-a", "look-b"]


def test_nobody_writes_an_image_that_a_restore_reads() -> None:
    text = LISTED.replace("size: 1GiB", "size: 1GiB, image: x") + (
        "  - {name: look, for: restore, disks: [{key: 1, image: x}]}\n"
    )
    says(wrong(desired(text)), "VM ctx-1:", "VM look:", "the image /backup/x")


@pytest.mark.parametrize("state", [CallState.COMPLETED, CallState.FAILED, CallState.ACCEPTED])
def test_a_completed_run_may_be_read_while_its_vm_still_declares_it(state: CallState) -> None:
    text = LISTED + (
        "  - {name: look, for: restore, disks: [{key: 1, image: ctx-1/2001/r1.qcow2}]}\n"
    )
    found = desired(text, ledger=remembered(calls=[a_call(a_vm(disks=2), state)]))
    if state is CallState.COMPLETED:
        assert sorted(found.vms) == ["ctx-1", "look"]
    else:
        says(wrong(found), "VM ctx-1:", "VM look:", "the image /backup/ctx-1/2001/r1.qcow2")


# -- attempts, incrementals, restores: what the ledger adds


@pytest.mark.parametrize(
    ("attempt", "export", "image"),
    [
        (1, "ctx-1-r1-disk0", "a/r1.qcow2"),
        (2, "ctx-1-r1-a2-disk0", "a/r1-a2.qcow2"),
        (13, "ctx-1-r1-a13-disk0", "a/r1-a13.qcow2"),
    ],
)
def test_another_attempt_has_names_and_files_of_its_own(
    attempt: int, export: str, image: str
) -> None:
    assert attempted("ctx-1-r1-disk0", attempt) == export
    assert attempted_image("a/r1.qcow2", attempt) == image


def test_the_attempt_that_the_ledger_has_opened_is_the_one_that_is_wanted() -> None:
    ledger = remembered(
        calls=[
            a_call(state=CallState.CANCELLED),
            a_call(state=CallState.DUE, attempt=2, exports=()),
        ]
    )
    exports = only_vm(desired(LISTED, ledger=ledger)).exports
    assert [e.attempt for e in exports] == [2, 2]
    assert [e.name for e in exports] == ["ctx-1-r1-a2-disk0", "ctx-1-r1-a2-disk1"]
    assert exports[0].image == "/backup/ctx-1/2001/r1-a2.qcow2"


INCREMENTAL: Final = LISTED.replace("run: r1", "run: r9, type: incremental")


def completed(run: str, moment: float) -> Any:
    vm = a_vm(run=run, disks=2)
    return a_call(vm, CallState.COMPLETED, changed=moment)


def test_an_incremental_builds_on_the_newest_completed_run() -> None:
    calls = [completed("r2", NOW), completed("r1", NOW - 5), a_call(a_vm(run="r3", disks=2))]
    exports = only_vm(desired(INCREMENTAL, ledger=remembered(calls=calls))).exports
    assert [e.backing for e in exports] == [
        "/backup/ctx-1/2001/r2.qcow2",
        "/backup/ctx-1/2000/r2.qcow2",
    ]


@pytest.mark.parametrize(
    ("backup", "warned"),
    [
        ("{run: r1, fallback: full}", True),
        ("{run: r1, type: full, fallback: full}", True),
        ("{run: r1, type: incremental, fallback: full}", False),
        ("{run: r1}", False),
    ],
)
def test_a_fallback_of_what_is_full_already_is_warned_of(backup: str, warned: bool) -> None:
    found = desired(LISTED.replace("{run: r1}", backup))
    said = [one for one in found.diagnostics if "fallback" in one.summary]
    assert [(one.severity, one.rule) for one in said] == [("warning", "no-effect")] * warned
    for one in said:
        assert one.place is not None
        line = LISTED.replace("{run: r1}", backup).splitlines()[one.place.line - 1]
        assert line[one.place.column - 1 :].startswith("full}")


def test_an_incremental_does_not_build_on_another_repository() -> None:
    settings = a_settings(repositories={"local": "/backup", "far": "/far"})
    ledger = remembered(calls=[completed("r1", NOW)])
    text = INCREMENTAL + "    repository: far\n"
    says(wrong(desired(text, settings=settings, ledger=ledger)), "no completed run")


def test_a_written_parent_goes_before_the_newest_run() -> None:
    ledger = remembered(calls=[completed("r1", NOW)])
    text = INCREMENTAL.replace("key: 2001,", "key: 2001, backing: base,")
    assert only_vm(desired(text, ledger=ledger)).exports[0].backing == "/backup/base"


@pytest.mark.parametrize("state", [CallState.ACCEPTED, CallState.COMPLETED, CallState.FAILED])
def test_an_incremental_that_was_asked_for_keeps_its_parent(state: CallState) -> None:
    """Or it would be its own parent as soon as it is complete, and refused as changed."""
    base = completed("r1", NOW - 100)
    was = only_vm(desired(INCREMENTAL, ledger=remembered(calls=[base])))
    ledger = remembered(calls=[base, a_call(was, state, changed=NOW)])
    assert only_vm(desired(INCREMENTAL, ledger=ledger)).exports == was.exports


@pytest.mark.parametrize("state", [CallState.ACCEPTED, CallState.COMPLETED])
def test_an_inventory_in_another_order_does_not_move_the_disks_of_a_run(state: CallState) -> None:
    was = only_vm(desired(FROM_INVENTORY, INVENTORY))
    turned = INVENTORY.replace(
        "{key: 2000, size: 40GiB}, {key: 2016, size: 1GiB}",
        "{key: 2016, size: 1GiB}, {key: 2000, size: 40GiB}",
    )
    ledger = remembered(calls=[a_call(was, state)])
    assert only_vm(desired(FROM_INVENTORY, turned, ledger=ledger)).exports == was.exports


RESTORE: Final = "vms: [{name: look, for: restore, of: {vm: ctx-1, run: r1}}]"


def test_a_restore_reads_what_the_run_has_written() -> None:
    vm = only_vm(desired(RESTORE, ledger=remembered(calls=[completed("r1", NOW)])))
    assert (vm.purpose, vm.run, vm.sna) == ("restore", "r1", "")
    assert [(e.vm, e.name, e.image, e.size, e.read_only) for e in vm.exports] == [
        ("look", "look-r1-disk0", "/backup/ctx-1/2000/r1.qcow2", GIB, True),
        ("look", "look-r1-disk1", "/backup/ctx-1/2001/r1.qcow2", GIB, True),
    ]


@pytest.mark.parametrize("state", [s for s in CallState if s is not CallState.COMPLETED])
def test_what_is_not_completed_is_not_a_backup(state: CallState) -> None:
    ledger = remembered(calls=[a_call(state=state), completed("r0", NOW)])
    says(
        wrong(desired(RESTORE, ledger=ledger)),
        f"1:38 error: VM look: the run 'r1' of ctx-1 is {state}, so it is not a backup",
        "completed: r0",
    )


def test_a_run_that_nobody_knows_cannot_be_restored() -> None:
    says(wrong(desired(RESTORE)), "'r1' of ctx-1 is not in the ledger", "completed: none")


def test_a_restore_of_images_takes_their_size_as_it_is() -> None:
    text = "vms: [{name: look, for: restore, disks: [{key: 7, image: a/b}]}]"
    (export,) = only_vm(desired(text)).exports
    assert (export.name, export.image, export.size, export.read_only) == (
        "look-restore-disk0",
        "/backup/a/b",
        None,
        True,
    )


# -- as it is remembered

texts = st.text(max_size=10)
exports = st.builds(
    an_export,
    vm=texts,
    position=st.integers(0, 9),
    run=texts,
    attempt=st.integers(1, 9),
    size=st.none() | st.integers(0, 1 << 60),
    read_only=st.booleans(),
    backing=st.none() | texts,
)
vms = st.builds(
    Vm,
    name=texts,
    exported=st.booleans(),
    purpose=st.sampled_from(["backup", "restore"]),
    run=texts,
    protect=st.booleans(),
    labels=st.dictionaries(texts, texts, max_size=3),
    exports=st.lists(exports, max_size=3).map(tuple),
    verified=st.booleans(),
    place=texts,
)


@given(vms)
def test_a_desired_vm_comes_back_from_the_store_as_it_went_in(vm: Vm) -> None:
    assert Vm.from_json(json.loads(json.dumps(vm.to_json()))) == vm


@pytest.mark.parametrize(
    ("vm", "text"),
    [
        (a_vm(disks=2), "2 disks, 2 GiB"),
        (a_vm(disks=1), "1 disk, 1 GiB"),
        (replace(a_vm(), exports=(an_export(size=None),)), "1 disk"),
        (a_vm(disks=0), "0 disks"),
    ],
)
def test_a_vm_is_summed_up_in_few_words(vm: Vm, text: str) -> None:
    assert summary(vm) == text


ONE: Final = (
    "vms: [{name: ctx-1, vm: {path: /p, vcenter: vc1}, disks: [{key: 1, size: 1GiB}], "
    "backup: {run: r1}}]"
)


def with_sna(**changes: Any) -> Settings:
    appliance = Appliance(url="http://127.0.0.1:9081")
    return a_settings(snas={"site-a": replace(appliance, **changes)})


def with_vcenter(**changes: Any) -> Settings:
    vcenter = VCenter(host="vc", user="u", password=SecretRef("env", "P"))
    return a_settings(vcenters={"vc1": replace(vcenter, **changes)})


@pytest.mark.parametrize(
    "settings",
    [
        with_sna(url="http://127.0.0.1:9082"),
        with_sna(token=SecretRef("file", "/t")),
        with_vcenter(host="vc2"),
        with_vcenter(user="v"),
        with_vcenter(password=SecretRef("env", "Q")),
    ],
)
def test_a_changed_config_makes_another_request(settings: Settings) -> None:
    before, after = only_vm(desired(ONE)), only_vm(desired(ONE, settings=settings))
    assert before.request != after.request


def test_a_changed_address_makes_another_request_and_protection_does_not() -> None:
    before = only_vm(desired(ONE)).request
    assert only_vm(desired(ONE.replace("/p", "/q"))).request != before
    assert only_vm(desired(ONE.replace("vcenter: vc1", "vcenter: vc1, name: x"))).request != before
    assert only_vm(desired(ONE.replace("backup:", "protect: true, backup:"))).request == before


@pytest.mark.parametrize("state", [state for state in CallState if state != "COMPLETED"])
def test_a_written_parent_that_is_no_backup_is_refused(state: CallState) -> None:
    parent = an_export("ctx-1", 0, key=1, image=f"{ROOT}/ctx-1/1/r0.qcow2")
    vm = a_vm("ctx-1", run="r0", exports=(parent,))
    text = ONE.replace("1GiB}", "1GiB, backing: ctx-1/1/r0.qcow2}").replace(
        "run: r1", "run: r1, type: incremental"
    )
    found = desired(text, ledger=Ledger(hub=HUB, state_id="s", calls=(a_call(vm, state),)))
    says(wrong(found), "ctx-1/1/r0.qcow2", f"which is {state} and so not a backup")
