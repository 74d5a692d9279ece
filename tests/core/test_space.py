"""Which runs may begin, by what is free and who is reckoned with."""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.core.actions import Hold, Refuse
from reconciler.core.actual import Actual, FileSystem
from reconciler.core.call import Call, CallState
from reconciler.core.desired import Vm
from reconciler.core.ledger import Ledger
from reconciler.core.plan import Plan, plan
from reconciler.core.space import FULL, Need, Room, at_least, at_most, needed
from reconciler.core.status import by_type, conditions
from reconciler.core.units import Bytes
from tests.core.builders import (
    GIB,
    NOW,
    a_call,
    a_lease,
    a_restore,
    a_server,
    a_settings,
    a_vm,
    an_export,
    an_image,
    brief,
    remembered,
    says,
    seen,
    wanting,
)

MIB: Final[Bytes] = 1 << 20
DISK: Final = 7
"""The st_dev of the one file system of most tests."""
S = CallState


def disk(free: Bytes, **changes: Any) -> dict[int, FileSystem]:
    return {DISK: FileSystem(mount="/backup", free=free, **changes)}


def images_of(*vms: Vm, taken: Bytes = 0, exists: bool = False) -> list[Any]:
    """The images of some VMs, on the one file system; those of a size take it."""
    return [
        an_image(export, exists=exists or bool(taken), allocated=taken, device=DISK)
        for vm in vms
        for export in vm.exports
    ]


def planned(
    *vms: Vm,
    free: Bytes,
    ledger: Ledger | None = None,
    images: list[Any] | None = None,
    least: Bytes = GIB,
    **changes: Any,
) -> tuple[Plan, Actual, Ledger]:
    actual = seen(
        changes.pop("servers", ()),
        images_of(*vms) if images is None else images,
        file_systems=disk(free, **changes.pop("disk", {})),
        **changes,
    )
    known = ledger or remembered()
    settings = a_settings(min_free={"local": least})
    return plan(wanting(*vms, settings=settings), actual, known, NOW), actual, known


@pytest.mark.parametrize(
    ("size", "backing", "least", "taken", "before", "need"),
    [
        (40, None, 1, 0, 0, Need(1, 40)),  # nothing is known: the least
        (40, None, 1, 0, 30, Need(30, 40)),  # what the last full image takes
        (40, None, 20, 0, 10, Need(20, 40)),  # but at least the least
        (40, None, 1, 0, 50, Need(40, 40)),  # and at most the disk
        (40, None, 50, 0, 0, Need(40, 40)),
        (40, None, 1, 12, 30, Need(18, 28)),  # what it takes is taken
        (40, None, 1, 35, 30, Need(0, 5)),
        (40, None, 1, 41, 30, Need(0, 0)),
        (40, "/b", 5, 0, 30, Need(5, 40)),  # an overlay holds only what changed
        (4, "/b", 5, 0, 30, Need(4, 4)),
        (40, None, 0, 0, 0, Need(0, 40)),
    ],
)
def test_what_a_disk_is_reckoned_to_need(
    size: int, backing: str | None, least: int, taken: int, before: int, need: Need
) -> None:
    export = an_export(size=size, backing=backing)
    assert needed(export, least=least, taken=taken, before=before) == need


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [
        (0, "nothing", "nothing"),
        (700, "700 bytes", "700 bytes"),
        (GIB, "1 GiB", "1 GiB"),
        (GIB - 196608, "1000 MiB", "1 GiB"),
        (412 * MIB + 1, "410 MiB", "420 MiB"),
        (13 * GIB + 1, "13 GiB", "14 GiB"),
        (1536 * MIB, "1.5 GiB", "1.5 GiB"),
        (2 << 40, "2 TiB", "2 TiB"),
    ],
)
def test_sizes_are_told_in_two_digits_and_on_the_safe_side(size: int, low: str, high: str) -> None:
    assert (at_least(size), at_most(size)) == (low, high)


def test_a_run_that_does_not_fit_is_refused_and_holds_nothing() -> None:
    found, actual, ledger = planned(a_vm(disks=2), free=GIB)
    assert brief(found) == [("refuse", None, "SpaceShort")]
    says(
        found.actions[0].why,
        *("needs about 2 GiB on /backup", "has 1 GiB free", "df -h /backup", "min_free"),
    )
    assert found.vms[0].ports == {}
    told = by_type(conditions(found.vms[0], actual, ledger))
    assert (told["Ready"].reason, told["Stalled"].reason) == ("SpaceShort", "SpaceShort")


def test_what_just_fits_begins() -> None:
    found, _, _ = planned(a_vm(disks=2), free=2 * GIB)
    assert [kind for kind, _, _ in brief(found)] == ["create", "start"] * 2 + ["call"]


def test_the_rest_is_given_in_the_order_of_the_plan_and_the_refusal_says_to_whom() -> None:
    vms = [a_vm(f"ctx-{n}") for n in (1, 2, 10)]
    found, _, _ = planned(*reversed(vms), free=2 * GIB + GIB // 2)
    assert [one.name for one in found.vms if brief(one.actions)[0][0] == "refuse"] == ["ctx-10"]
    says(found.vms[2].actions[0].why, "2.5 GiB free, 2 GiB of it reserved for ctx-1, ctx-2")


def test_a_smaller_run_behind_one_that_does_not_fit_begins() -> None:
    small = a_vm("ctx-2", exports=(an_export("ctx-2", size=MIB),))
    found, _, _ = planned(a_vm("ctx-1"), small, free=10 * MIB)
    assert [brief(one.actions)[0][0] for one in found.vms] == ["refuse", "create"]


def test_who_waits_for_ports_alone_reserves_no_space() -> None:
    vms = [a_vm("ctx-1", disks=21), a_vm("ctx-2")]  # the range has 20
    found, _, _ = planned(*vms, free=21 * GIB)
    assert [brief(one.actions)[0] for one in found.vms] == [
        ("refuse", None, "RangeTooSmall"),
        ("create", 2000, "ImageMissing"),
    ]


@pytest.mark.parametrize("state", [S.INTENDED, S.ACCEPTED, S.UNKNOWN])
def test_every_active_run_is_reckoned_with_before_the_others_also_out_of_scope(
    state: CallState,
) -> None:
    other = a_vm("ctx-9")
    ledger = remembered(calls=[a_call(other, state)])
    taken = images_of(other, taken=GIB // 2)
    changes: dict[str, Any] = {"others": {image.path: image for image in taken}}
    vm = a_vm("ctx-1")
    found, _, _ = planned(vm, free=GIB + GIB // 2, ledger=ledger, **changes)
    assert brief(found)[-1] == ("call", None, "RunDue")
    found, _, _ = planned(vm, free=GIB + GIB // 2 - 1, ledger=ledger, **changes)
    assert brief(found) == [("refuse", None, "SpaceShort")]
    says(found.actions[0].why, "520 MiB of it reserved for ctx-9")


def test_a_run_that_only_a_claim_tells_of_is_reckoned_with() -> None:
    lost, vm = a_vm("ctx-9"), a_vm("ctx-10")
    servers = [a_server(lost.exports[0])]
    images = [*images_of(lost, exists=True), *images_of(vm)]
    claims = {("ctx-9", "r1"): "state-0"}
    found, _, _ = planned(lost, vm, free=GIB, images=images, servers=servers, claims=claims)
    assert "CallUnknown" in {cause for _, _, cause in brief(found.vms[0].actions)}
    assert brief(found.vms[1].actions) == [("refuse", None, "SpaceShort")]


def test_the_last_full_image_tells_what_a_run_will_take() -> None:
    vm = a_vm(run="r3")
    full, later = a_vm(run="r1"), a_vm(run="r2", type="incremental")
    calls = [
        a_call(full, S.COMPLETED, type="full", changed=NOW - 9),
        a_call(later, S.COMPLETED, type="incremental", changed=NOW - 5),
        a_call(a_vm(run="r0"), S.FAILED, type="full", changed=NOW - 3),
    ]
    others = {full.exports[0].image: images_of(full, taken=GIB // 2)[0]}
    ledger = remembered(calls=calls)
    changes: dict[str, Any] = {"ledger": ledger, "least": MIB, "others": others}
    assert brief(planned(vm, free=GIB // 2, **changes)[0])[-1] == ("call", None, "RunDue")
    short = planned(vm, free=GIB // 2 - 1, **changes)[0]
    assert brief(short) == [("refuse", None, "SpaceShort")]
    overlay = a_vm(run="r3", exports=(an_export(run="r3", backing="/backup/b"),))
    images = [*images_of(overlay), an_image(path="/backup/b", backing=None, pristine=False)]
    found, _, _ = planned(overlay, free=MIB, images=images, **changes)
    assert brief(found)[-1] == ("call", None, "RunDue")


@pytest.mark.parametrize("state", [S.INTENDED, S.ACCEPTED, S.UNKNOWN])
def test_a_run_that_is_active_is_never_refused_for_space(state: CallState) -> None:
    vm = a_vm()
    ledger = remembered([a_lease()], [a_call(vm, state)])
    found, _, _ = planned(vm, free=FULL, ledger=ledger, servers=[a_server()])
    assert not any(isinstance(action, Refuse) for action in found.actions)
    assert "RepositoryFull" not in {action.cause for action in found.actions}


def test_a_run_that_is_due_and_up_keeps_its_servers_and_is_not_called_for() -> None:
    vm = a_vm(disks=2)
    call = a_call(vm, S.DUE, message="nothing was sent", failures=1)
    first, second = vm.exports
    leases = [a_lease(first), a_lease(second, 10101)]
    images = images_of(vm, exists=True)
    ledger = remembered(leases, [call])
    servers = [a_server(first)]
    found, _, _ = planned(vm, free=MIB, ledger=ledger, servers=servers, images=images)
    assert brief(found) == [("refuse", None, "SpaceShort"), ("release", 2001, "SpaceShort")]


def test_a_full_file_system_under_an_active_run_is_said_and_nothing_is_stopped() -> None:
    vm = a_vm()
    ledger = remembered([a_lease()], [a_call(vm)])
    images = images_of(vm, taken=MIB)
    found, actual, _ = planned(
        vm, free=FULL - 1, ledger=ledger, servers=[a_server()], images=images
    )
    assert brief(found) == [("hold", None, "RepositoryFull")]
    says(found.actions[0].why, "/backup has 15 MiB free", "run r1", "df -h /backup")
    told = by_type(conditions(found.vms[0], actual, ledger))
    assert (told["Stalled"].status, told["Stalled"].reason) == ("True", "RepositoryFull")
    assert told["Exported"].status == "True"


def test_a_run_whose_image_is_full_already_does_not_mind() -> None:
    vm = a_vm()
    ledger = remembered([a_lease()], [a_call(vm)])
    images = images_of(vm, taken=GIB)
    found, _, _ = planned(vm, free=0, ledger=ledger, servers=[a_server()], images=images)
    assert brief(found) == []


def test_a_run_that_ends_in_this_plan_does_not_mind_either() -> None:
    from reconciler.core.call import Report

    vm = a_vm()
    call = a_call(vm)
    settings = a_settings(reports_end=True)
    image = an_image(vm.exports[0], device=DISK, allocated=MIB, pristine=False)
    reports = {call.job_id: Report(True, "completed")}
    actual = seen([a_server()], [image], file_systems=disk(0), reports=reports)
    found = plan(wanting(vm, settings=settings), actual, remembered([a_lease()], [call]), NOW)
    assert not any(isinstance(action, Hold) for action in found.actions)


def test_a_file_system_that_is_read_only_lets_nothing_begin_and_is_said_to_who_writes() -> None:
    read_only = {"read_only": True}
    found, _, _ = planned(a_vm(), free=100 * GIB, disk=read_only)
    assert brief(found) == [("refuse", None, "RepositoryReadOnly")]
    says(found.actions[0].why, "/backup is mounted read-only", "mount -o remount,rw /backup")
    vm = a_vm()
    ledger = remembered([a_lease()], [a_call(vm)])
    changes: dict[str, Any] = {"servers": [a_server()], "disk": read_only, "ledger": ledger}
    found, _, _ = planned(vm, free=100 * GIB, **changes)
    assert brief(found) == [("hold", None, "RepositoryReadOnly")]


def test_who_only_reads_needs_no_space() -> None:
    vm = a_restore()
    images = [an_image(vm.exports[0], device=DISK, pristine=False)]
    for changes in ({}, {"read_only": True}):
        found, _, _ = planned(vm, free=0, images=images, disk=changes)
        assert brief(found) == [("start", 2000, "NotRunning")]


def test_a_file_system_of_which_nothing_is_known_refuses_nothing() -> None:
    vm = a_vm()
    found = plan(wanting(vm), seen(images=images_of(vm)), remembered(), NOW)
    assert brief(found)[-1] == ("call", None, "RunDue")


@pytest.mark.parametrize(("free", "unsure"), [(2 * GIB - 1, True), (2 * GIB, False)])
def test_disks_that_would_not_fit_if_they_became_full_are_said(free: int, unsure: bool) -> None:
    begun, vm = a_vm("ctx-1"), a_vm("ctx-2")
    ledger = remembered([a_lease(begun.exports[0])], [a_call(begun)])
    changes: dict[str, Any] = {"servers": [a_server(begun.exports[0])], "least": MIB}
    found, actual, _ = planned(begun, vm, free=free, ledger=ledger, **changes)
    assert not any(isinstance(action, Refuse) for action in found.actions)
    for one in found.vms:
        told = by_type(conditions(one, actual, ledger))
        assert ("SpaceUnsure" in told) == unsure
        if unsure:
            says(told["SpaceUnsure"].message, "/backup has 1.9 GiB free", "2 GiB if they become")


def test_space_is_counted_by_file_system() -> None:
    near, far = a_vm("ctx-1"), a_vm("ctx-2")
    images = [
        an_image(near.exports[0], exists=False, device=1),
        an_image(far.exports[0], exists=False, device=2),
    ]
    systems = {
        1: FileSystem(mount="/near", free=GIB),
        2: FileSystem(mount="/far", free=GIB - 1),
    }
    found = plan(wanting(near, far), seen(images=images, file_systems=systems), remembered(), NOW)
    assert [brief(one.actions)[0][2] for one in found.vms] == ["ImageMissing", "SpaceShort"]
    says(found.vms[1].actions[0].why, "/far")


# -- the rule, over any number of runs


sizes = st.integers(0, 64)


@given(
    free=st.lists(sizes, min_size=1, max_size=3),
    runs=st.lists(
        st.tuples(
            st.booleans(),
            st.lists(st.tuples(st.integers(0, 2), sizes, sizes, st.booleans()), max_size=4),
        ),
        max_size=6,
    ),
    least=sizes,
)
def test_no_more_is_given_away_than_is_free(
    free: list[int], runs: list[tuple[bool, list[tuple[int, int, int, bool]]]], least: int
) -> None:
    systems = {n: FileSystem(mount=f"/{n}", free=size) for n, size in enumerate(free)}
    vms: dict[str, Vm] = {}
    images = {}
    calls: list[Call] = []
    for n, (active, disks) in enumerate(runs):
        exports = []
        for position, (device, size, taken, overlay) in enumerate(disks):
            backing = "/backup/b" if overlay else None
            export = an_export(f"ctx-{n}", position, size=size, backing=backing)
            exports.append(export)
            images[export.image] = an_image(export, device=device, allocated=taken)
        vm = a_vm(f"ctx-{n}", exports=tuple(exports))
        vms[vm.name] = vm
        if active:
            calls.append(a_call(vm))
    actual = replace(seen(images=images.values()), file_systems=systems)
    settings = a_settings(min_free={"local": least})
    room = Room(settings, actual, remembered(calls=calls), vms)
    for call in calls:
        room.reserve(call.vm, call.exports)
    reserved = {device: free[device] - room.left(device) for device in systems}
    granted: dict[int, int] = dict.fromkeys(systems, 0)
    for n, (active, _) in enumerate(runs):
        if active:
            continue
        vm = vms[f"ctx-{n}"]
        before = {device: room.left(device) for device in systems}
        needs = room.needs(vm.exports)
        if room.take(vm.name, vm.exports) is None:
            for device, need in needs.items():
                granted[device] += need.least
                assert room.left(device) == before[device] - need.least
        else:
            assert {device: room.left(device) for device in systems} == before
            assert any(need.least > before[device] for device, need in needs.items())
    for device in systems:
        assert granted[device] + reserved[device] <= free[device]
        assert granted[device] <= max(0, free[device] - reserved[device])
