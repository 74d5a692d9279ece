"""An incremental builds on what is whole, and on nothing else; all disks of a VM, or none."""

from __future__ import annotations

from typing import Any, Final

import pytest
from msgspec.structs import replace

from reconciler.core.actions import Create
from reconciler.core.call import CallState
from reconciler.core.desired import Desired, Vm
from reconciler.core.onward import next_command
from reconciler.core.parents import PARENTS, layers
from reconciler.core.plan import Plan, news
from reconciler.core.proofs import Finding, proof_of
from reconciler.core.status import by_type, conditions
from tests.core.builders import (
    GIB,
    NOW,
    a_call,
    a_settings,
    a_vm,
    an_export,
    brief,
    desired,
    remembered,
    says,
    wanting,
)
from tests.fakes import FakeHost, planned, settle

S = CallState
DISKS: Final = 2


def overlay(run: str, on: str, **changes: Any) -> Vm:
    """An incremental run of the VM, on another run of it."""
    vm = a_vm(run=run, disks=DISKS, type="incremental", **changes)
    exports = tuple(
        replace(one, backing=an_export(position=one.position, run=on).image) for one in vm.exports
    )
    return replace(vm, exports=exports)


def job(host: FakeHost, run: str) -> str:
    call = host.records.ledger().latest("ctx-1", run)
    assert call is not None
    return call.job_id


def carry_out(host: FakeHost, vm: Vm) -> None:
    """A run from its call to its publication."""
    settle(host, wanting(vm))
    for process in host.mine():
        host.write(process)
    for position in range(DISKS):
        host.records.report(job(host, vm.run), position)
    settle(host, wanting(vm))
    call = host.records.ledger().latest("ctx-1", vm.run)
    assert call is not None
    assert call.state is S.COMPLETED, call.message


def a_chain() -> FakeHost:
    """A full run r1, and r2 on it."""
    host = FakeHost(a_settings())
    carry_out(host, a_vm(run="r1", disks=DISKS))
    carry_out(host, overlay("r2", "r1"))
    return host


def image(run: str, position: int = 0) -> str:
    return an_export(position=position, run=run).image


def verified(host: FakeHost, run: str) -> None:
    """The second disk of a run was found damaged, by its digest."""
    found = [
        Finding(key=str(2000 + n), image=image(run, n), deep=True, wrong=("it differs",) * n)
        for n in range(DISKS)
    ]
    proof = proof_of(job(host, run), found, NOW, "")
    host.records.proofs[proof.job_id, "verify"] = proof


def damage(host: FakeHost, what: str) -> None:
    """One way in which r3 cannot be built on r2."""
    match what:
        case "missing":
            del host.images[image("r2", 1)]
        case "unreadable":
            broken = replace(host.images[image("r2")], error="its qcow2 header is damaged")
            host.images[image("r2")] = broken
        case "corrupt":
            host.images[image("r2")] = replace(host.images[image("r2")], corrupt=True)
        case "found damaged":
            verified(host, "r2")
        case "no change id":
            del host.records.reports[job(host, "r2")]
        case "removed":
            for key, one in list(host.records.archived.items()):
                if key[0] == job(host, "r2"):
                    host.records.archived[key] = replace(one, removed=NOW)
        case "outside":
            host.images[image("r2")] = replace(host.images[image("r2")], outside="/elsewhere")
        case "raw":
            host.images[image("r2")] = replace(host.images[image("r2")], format="raw")
        case "grandparent missing":
            del host.images[image("r1")]
        case "grandparent damaged":
            verified(host, "r1")
        case "another grandparent":
            host.images[image("r2")] = replace(host.images[image("r2")], backing="/other")
        case _:
            raise AssertionError(what)


CASES: Final = {
    "missing": ("ParentMissing", ["/backup/ctx-1/2001/r2.qcow2", "run r2", "is missing"]),
    "unreadable": ("ParentUnreadable", ["its qcow2 header is damaged"]),
    "corrupt": ("ParentDamaged", ["marked as corrupt"]),
    "found damaged": (
        "ParentDamaged",
        ["/2001/r2.qcow2", "disk 2001", "it differs", "verify ctx-1 --run r2 --digests"],
    ),
    "no change id": ("NoChangeId", ["run r2", "copy the whole disk"]),
    "removed": ("ParentRemoved", ["(run r2) was removed at 2027-01-15T08:00:00Z"]),
    "outside": ("ParentOutside", ["/elsewhere"]),
    "raw": ("ParentUnfit", ["not qcow2"]),
    "grandparent missing": ("ChainBroken", ["/backup/ctx-1/2000/r1.qcow2 (run r1)", "missing"]),
    "grandparent damaged": ("ChainBroken", ["run r1", "disk 2001 was found damaged at"]),
    "another grandparent": ("ChainBroken", ["built on /other by its header"]),
}


def refusals(found: Plan) -> list[str]:
    return [action.cause for action in found.actions if action.kind == "refuse"]


@pytest.mark.parametrize("what", CASES)
def test_nothing_is_built_on_what_is_not_whole(what: str) -> None:
    host = a_chain()
    wanted = wanting(overlay("r3", "r2"))
    assert refusals(planned(host, wanted)) == []
    damage(host, what)
    cause, words = CASES[what]
    found = planned(host, wanted)
    assert set(refusals(found)) == {cause}
    assert {action.kind for action in found.actions} == {"refuse"}, "one disk cannot: none does"
    assert cause in PARENTS
    assert "--type full" in next_command(
        found.vms[0], found, cause, "/state/runs", host.records.ledger()
    )
    why = next(action.why for action in found.actions if action.kind == "refuse")
    says(why, *words)
    says(why, "reconciler backup ctx-1 --run NEW --type full")
    settle(host, wanted)
    assert host.records.ledger().latest("ctx-1", "r3") is None, "not even claimed"


def test_the_same_refusal_of_another_run_is_news_and_of_the_same_it_is_none() -> None:
    host = a_chain()
    damage(host, "grandparent missing")
    third, fourth = (planned(host, wanting(overlay(run, "r2"))) for run in ("r3", "r4"))
    assert [one.cause for one in news(third, {})] == ["ChainBroken"]
    assert news(third, {"ctx-1": third.vms[0]}) == []
    assert [one.cause for one in news(fourth, {"ctx-1": third.vms[0]})] == ["ChainBroken"]


@pytest.mark.parametrize("what", CASES)
def test_where_the_spec_says_so_all_disks_are_full_instead_and_that_is_told(what: str) -> None:
    host = a_chain()
    damage(host, what)
    wanted = wanting(overlay("r3", "r2", fallback="full"))
    found = planned(host, wanted)
    made = [action.export.backing for action in found.actions if isinstance(action, Create)]
    assert made == [None, None]
    assert brief(found)[-1] == ("call", None, "FellBack")
    settle(host, wanted)
    call = host.records.ledger().latest("ctx-1", "r3")
    assert call is not None
    assert (call.state, call.type) == (S.ACCEPTED, "full")
    says(call.fallback, CASES[what][1][0])
    assert "reconciler" not in call.fallback, "it is full already: there is nothing to get past"
    again = planned(host, wanted)  # it is what was asked for: nothing has changed
    assert again.actions == ()
    ledger = host.records.ledger()
    stands = by_type(conditions(again.vms[0], host.look(wanted, ledger), ledger))
    assert (stands["FellBack"].status, stands["Ready"].status) == ("True", "True")
    says(stands["FellBack"].message, "run r3 is full instead of incremental", call.fallback)


@pytest.mark.parametrize(("size", "word"), [(2 * GIB, "grew"), (GIB // 2, "shrank")])
def test_a_disk_that_has_another_size_now_is_not_built_on_the_old_one(size: int, word: str) -> None:
    host = a_chain()
    vm = overlay("r3", "r2")
    vm = replace(vm, exports=(vm.exports[0], replace(vm.exports[1], size=size)))
    found = planned(host, wanting(vm))
    assert brief(found) == [("refuse", 2001, "DiskResized")]
    says(found.actions[0].why, word, "since run r2", f"{size} bytes")


def test_a_parent_that_a_server_writes_is_not_built_on() -> None:
    host = a_chain()
    first = a_vm(run="r1", disks=DISKS)
    vm = overlay("r3", "r2")
    writer = replace(first.exports[0], image=image("r2"), vm="ctx-9", name="ctx-9-r9-disk0")
    other = replace(first, name="ctx-9", run="r9", exports=(replace(writer, run="r9"),))
    host.records.calls["ctx-9", "r9", 1] = a_call(other)
    found = planned(host, wanting(vm))
    assert set(refusals(found)) == {"ParentWritten"}
    says(found.actions[0].why, "run r9 of ctx-9, which is ACCEPTED")


def test_an_overlay_that_is_made_already_stays_one() -> None:
    host = a_chain()
    wanted = wanting(overlay("r3", "r2", fallback="full"))
    vm = wanted.vms["ctx-1"]
    for export in vm.exports:
        assert export.size
        host.put(export.image, export.size, backing=export.backing)
    damage(host, "no change id")
    assert set(refusals(planned(host, wanted))) == {"NoChangeId"}


def test_a_parent_that_was_flattened_needs_nothing_below_it() -> None:
    host = a_chain()
    for position in range(DISKS):
        host.images[image("r2", position)] = replace(
            host.images[image("r2", position)], backing=None
        )
    damage(host, "grandparent missing")
    assert refusals(planned(host, wanting(overlay("r3", "r2")))) == []


def test_once_called_for_a_run_is_not_judged_by_its_parent_again() -> None:
    host = a_chain()
    wanted = wanting(overlay("r3", "r2"))
    settle(host, wanted)
    damage(host, "no change id")
    damage(host, "grandparent missing")
    assert planned(host, wanted).actions == ()


def test_layers_are_the_chain_below_an_image() -> None:
    host = a_chain()
    ledger = host.records.ledger()
    found = layers(ledger, "ctx-1", image("r2"))
    assert [(one.path, one.run) for one in found] == [
        (image("r2"), "run r2"),
        (image("r1"), "run r1"),
    ]
    assert [one.run for one in layers(ledger, "ctx-1", "/backup/base")] == ["no run of this hub"]


# -- as it is written

SPEC: Final = """\
vms:
  - name: ctx-1
    vm: {path: /DC1/vm/x, vcenter: vc1}
    backup: {run: r9, type: incremental, fallback: full}
    disks:
      - {key: 2000, size: 1GiB}
      - {key: 2001, size: 1GiB}
"""


def only_vm(found: Desired) -> Vm:
    (vm,) = found.vms.values()
    return vm


def test_a_vm_that_was_never_backed_up_begins_with_a_full_run() -> None:
    vm = only_vm(desired(SPEC))
    assert (vm.type, {one.backing for one in vm.exports}) == ("full", {None})
    says(vm.fell_back, "disk 2000 has no completed run")
    host = FakeHost(a_settings())
    wanted = desired(SPEC, settings=host.settings)
    settle(host, wanted)
    call = host.records.ledger().latest("ctx-1", "r9")
    assert call is not None
    assert (call.type, call.state) == ("full", S.ACCEPTED)
    host.records.calls[call.key] = replace(call, state=S.COMPLETED)
    again = only_vm(desired(SPEC, ledger=host.records.ledger()))
    assert again.exports == call.exports, "or the run would be its own parent"


def test_what_runs_entries_say_of_a_fallback_counts() -> None:
    entry = "runs:\n  - {vm: ctx-1, run: r9, type: incremental, fallback: full}\n"
    plain = SPEC.replace("    backup: {run: r9, type: incremental, fallback: full}\n", "")
    assert only_vm(desired(plain + entry)).type == "full"
    assert desired(plain + entry.replace(", fallback: full", "")).failed


def test_a_disk_that_was_added_since_makes_the_whole_vm_full() -> None:
    before = a_call(a_vm(run="r1", disks=1), S.COMPLETED)
    vm = only_vm(desired(SPEC, ledger=remembered(calls=[before])))
    assert (vm.type, [one.backing for one in vm.exports]) == ("full", [None, None])
    says(vm.fell_back, "disk 2001")
