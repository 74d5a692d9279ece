"""Saved plans: what is compared, what is told, what a later pass may do, and the file."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.actions import Action, Create, Notify, Restart, Start, Wait
from reconciler.core.actual import Actual, Listener
from reconciler.core.call import CallState
from reconciler.core.desired import Desired
from reconciler.core.ledger import Applied, Ledger, Pause
from reconciler.core.plan import Plan, plan
from reconciler.core.saved import (
    Basis,
    Promise,
    Reading,
    Saved,
    UnreadablePlanError,
    done,
    dump,
    edited,
    elsewhere,
    is_saved,
    keys,
    known,
    load,
    observed,
    out_of_time,
    restocked,
)
from tests.core.builders import (
    GIB,
    HUB,
    NOW,
    a_call,
    a_lease,
    a_server,
    a_settings,
    a_vm,
    absent,
    an_export,
    an_image,
    changed,
    remembered,
    says,
    seen,
    wanting,
)
from tests.core.builders import (
    known as an_inventory,
)

SSHD = Listener(10100, "127.0.0.1", 77, "sshd")


class Words(Struct):
    text: str = ""
    error: str = ""


def basis(
    desired: Desired, actual: Actual | None = None, ledger: Ledger | None = None, now: float = NOW
) -> Basis:
    actual, ledger = actual or seen(), ledger or remembered()
    return Basis.of(plan(desired, actual, ledger, now), actual, ledger, now)


def a_saved(rests_on: Basis | None = None, **changes: Any) -> Saved:
    values: dict[str, Any] = {
        "id": "1" * 32,
        "made": NOW,
        "expires": NOW + 3600,
        "who": "reconciler plan (root)",
        "hub": HUB,
        "state_id": "state-1",
        "settings": a_settings().to_json(),
        "folder": "/srv",
        "files": ("specs",),
        "readings": {},
        "inventory": None,
        "basis": rests_on or basis(wanting(a_vm(disks=2))),
        **changes,
    }
    return Saved(**values)


def promise(rests_on: Basis, **changes: Any) -> Promise:
    return Promise(saved=a_saved(rests_on), file="night.plan", **changes)


# -- the file


def test_a_file_gives_back_what_was_saved() -> None:
    vm = a_vm(disks=2)
    server = a_server(vm.exports[0], argv=("qemu-nbd", "--shared", "2"))
    actual = seen([server], [an_image(vm.exports[0])])
    before = a_saved(
        basis(wanting(vm, absent("ctx-2")), actual, remembered(calls=[a_call(vm)])),
        readings={"a.yaml": Reading.of(Words("one\ntwo"), "1" * 32)},
        inventory=known({"ctx-1": {"disks": [{"key": 2000, "size": GIB}], "name": "n"}}),
    )
    data = dump(before)
    after = load(data, "night.plan")
    assert after == before
    assert observed(before.basis, after.basis) == []
    assert is_saved(data)


def test_a_file_has_no_words_of_what_was_read() -> None:
    reading = Reading.of(Words("password: hunter2\n"), "1" * 32)
    assert b"hunter2" not in dump(a_saved(readings={"a.yaml": reading}))


@pytest.mark.parametrize(
    ("data", "says_"),
    [
        (b"", "it is no saved plan, or only a part of one"),
        (b"vms: []", "it is no saved plan"),
        (b"[]", "it is no saved plan"),
        (b'{"format_version": "1.0", "changes": []}', "it is no saved plan"),
        (b'{"kind": "reconciler saved plan", "format": 2}', "by another version (format 2"),
        (b"[" * 100_000, "it is no saved plan"),
        (b"\xff\xfe", "it is no saved plan"),
    ],
)
def test_what_is_no_saved_plan_is_refused(data: bytes, says_: str) -> None:
    with pytest.raises(UnreadablePlanError, match="nothing was changed") as found:
        load(data, "night.plan")
    says(str(found.value), "cannot use night.plan", says_)
    assert found.value.exit == 65


def test_a_file_that_was_edited_is_refused_and_one_that_was_only_laid_out_anew_is_not() -> None:
    data = dump(a_saved())
    value = json.loads(data)
    assert load(json.dumps(value, sort_keys=True).encode(), "x") == a_saved()
    value["saved"]["expires"] += 86400
    with pytest.raises(UnreadablePlanError, match="not as it was written"):
        load(json.dumps(value).encode(), "x")


@given(at=st.integers(min_value=0), bit=st.integers(0, 7))
def test_no_damaged_bit_is_missed(at: int, bit: int) -> None:
    data = bytearray(dump(a_saved()))
    at %= len(data)
    data[at] ^= 1 << bit
    with contextlib.suppress(UnreadablePlanError):
        assert load(bytes(data), "x") == a_saved()  # a blank became another


def test_a_file_of_another_make_is_refused_by_its_shape() -> None:
    value = json.loads(dump(a_saved()))
    del value["saved"]["basis"]
    from reconciler.core import saved

    value["digest"] = saved._digest(value["saved"])
    with pytest.raises(UnreadablePlanError, match="made by another version"):
        load(json.dumps(value).encode(), "x")


# -- time, hub, config


def test_a_plan_has_its_time() -> None:
    saved = a_saved()
    assert out_of_time(saved, NOW) == out_of_time(saved, NOW + 3599) == []
    (line,) = out_of_time(saved, NOW + 3600)
    says(line, "it has expired: it was good until")
    (line,) = out_of_time(saved, NOW - 3600)
    says(line, "the clock was set back")


def test_another_hub_config_or_state_directory_is_named() -> None:
    saved, settings = a_saved(), a_settings().to_json()
    assert elsewhere(saved, HUB, "state-1", settings) == []
    (line,) = elsewhere(saved, "hub-b", "state-1", settings)
    says(line, "another hub: it was made for hub hub-a, and this is hub hub-b")
    other = a_settings("10100-10109", cache="writethrough").to_json()
    lines = elsewhere(saved, HUB, "state-1", other)
    assert lines == [
        "another config: ports was 10100-10119, and is 10100-10109",
        "another config: qemu_nbd.cache was not set, and is writethrough",
    ]
    (line,) = elsewhere(saved, HUB, "state-2", settings)
    says(line, "another state directory: its id was state-1, and is state-2")
    assert elsewhere(a_saved(state_id=""), HUB, "state-2", settings) == []


# -- what was written


def test_an_edit_is_named_with_its_lines() -> None:
    text = "vms:\n  - name: ctx-1\n    disks: 1\n    state: exported\n"
    saved = a_saved(readings={"a.yaml": Reading.of(Words(text), "1" * 32)})

    def after(new: str, *quotable: str) -> list[str]:
        return edited(saved, {"a.yaml": Words(new)}, quotable)

    assert after(text) == []
    assert after(text.replace("1\n    s", "2\n    s")) == ["a.yaml was edited since (line 3)"]
    assert after(text.replace("disks: 1", "disks: 2"), "a.yaml") == [
        "a.yaml was edited since (line 3)",
        "  3:     disks: 2",
    ]
    (_, line) = after("# \x1b[31mred\n" + text, "a.yaml")
    assert line == r"  1: # \x1b[31mred"
    assert after("# new\n" + text) == ["a.yaml was edited since (line 1)"]
    assert after(text.replace("    disks: 1\n", "")) == ["a.yaml was edited since (1 line removed)"]
    assert after(text.rstrip()) == ["a.yaml was edited since (blanks at its end)"]


def test_files_that_come_go_or_cannot_be_read_are_named() -> None:
    old = Reading.of(Words("x"), "1" * 32)
    saved = a_saved(readings={"a.yaml": old, "b.yaml": old, "$SITE": old})
    now = {
        "b.yaml": Words(error="cannot read b.yaml: Permission denied"),
        "c.yaml": Words("x"),
        "$SITE": Words("y"),
    }
    assert edited(saved, now) == [
        "a.yaml is not read any more",
        "b.yaml: cannot read b.yaml: Permission denied",
        "the variable $SITE of the environment was edited since (line 1)",
        "c.yaml is read too, which was not there",
    ]


def test_what_the_inventory_has_otherwise_is_named_and_of_the_plan_first() -> None:
    def size(gib: int) -> str:
        return f"{gib} GiB ({gib << 30} bytes)"

    def facts(text: str) -> Any:
        return known(an_inventory(text).facts())

    before = facts(
        "vms: {ctx-1: {disks: [{key: 2000, size: 1GiB}, {key: 2001, size: 1GiB}]}, "
        "a-2: {disks: []}, ctx-3: {disks: []}}"
    )
    saved = a_saved(inventory=before)
    after = facts(
        "vms: {ctx-1: {disks: [{key: 2000, size: 2GiB}, {key: 2002, size: 10GiB}]}, "
        "a-2: {disks: [], vm: {path: /DC1/vm/x}}, ctx-9: {disks: []}}"
    )
    assert restocked(saved, before) == []
    assert restocked(saved, after) == [
        f"the inventory has another size for disk 2000 of ctx-1: {size(2)}, was {size(1)}",
        "the inventory has no disk 2001 for ctx-1 any more",
        "the inventory has another disk for ctx-1: 2002 (10 GiB)",
        "the inventory says something else of a-2: its name, path, vCenter or groups",
        "the inventory has no VM ctx-3 any more",
        "the inventory has another VM: ctx-9",
    ]
    assert restocked(saved, None) == ["there is no inventory that can be read"]
    order = facts("vms: {ctx-1: {disks: [{key: 2001, size: 1GiB}, {key: 2000, size: 1GiB}]}, "
                  "a-2: {disks: []}, ctx-3: {disks: []}}")  # fmt: skip
    assert len(restocked(saved, order)) == 1


# -- what was seen


def test_the_clock_alone_moves_nothing() -> None:
    vms = wanting(a_vm(disks=2), absent("ctx-2"))
    assert observed(basis(vms), basis(vms, now=NOW + 1800)) == []


def test_strangers_elsewhere_move_nothing() -> None:
    other = Listener(10119, "127.0.0.1", 77, "sshd")
    desired = wanting(a_vm())
    assert observed(basis(desired), basis(desired, seen(listeners={10119: other}))) == []


def test_a_port_that_was_taken_is_named_with_its_holder() -> None:
    desired = wanting(a_vm())
    lines = observed(basis(desired), basis(desired, seen(listeners={10100: SSHD})))
    assert lines == [
        "port 10100 was taken by pid 77 (sshd)",
        "- ctx-1 disk 2000: start: serve as ctx-1-r1-disk0 on 10100 (NotRunning)",
        "+ ctx-1 disk 2000: start: serve as ctx-1-r1-disk0 on 10101 (NotRunning)",
    ]


def test_a_port_that_another_vm_got_is_named() -> None:
    desired = wanting(a_vm())
    lease = a_lease(an_export("ctx-9"), 10100)
    says("\n".join(observed(basis(desired), basis(desired, ledger=remembered([lease])))),
         "port 10100 belongs to ctx-9 disk 2000 now")  # fmt: skip


def test_a_server_that_has_ended_is_named_though_nothing_was_to_be_done_about_it() -> None:
    vm = a_vm()
    server, call = a_server(vm.exports[0]), a_call(vm)
    ledger = remembered([a_lease(vm.exports[0])], [call])
    before = basis(wanting(vm), seen([server], [an_image()]), ledger)
    assert before.plan.actions == ()
    lines = observed(before, basis(wanting(vm), seen([], [an_image()]), ledger))
    assert lines[0] == f"server pid {server.pid} of ctx-1 disk 2000 has ended"
    says("\n".join(lines), "- ctx-1 as declared", "+ ctx-1 disk 2000: restart: restart on 10100")


def test_another_process_with_the_same_number_is_another() -> None:
    gone = absent("ctx-1")
    server = a_server()
    twin = replace(server, identity=replace(server.identity, started=2))
    ledger = remembered([a_lease()], [a_call(state=CallState.COMPLETED)])
    lines = observed(
        basis(wanting(gone), seen([server]), ledger), basis(wanting(gone), seen([twin]), ledger)
    )
    says("\n".join(lines), f"server pid {server.pid} of ctx-1 disk 2000 has ended",
         f"server pid {server.pid} of ctx-1 disk 2000 runs on port 10100")  # fmt: skip


def test_a_client_in_the_way_is_named() -> None:
    gone = absent("ctx-1")
    ledger = remembered([a_lease()], [a_call(state=CallState.COMPLETED)])
    before = basis(wanting(gone), seen([a_server()]), ledger)
    lines = observed(before, basis(wanting(gone), seen([a_server(clients=2)]), ledger))
    says("\n".join(lines), "has 2 clients, it had 0", "- ctx-1 disk 2000: stop", "hold: InUse")


def test_a_client_that_changes_nothing_moves_nothing() -> None:
    vm = a_vm()
    ledger = remembered([a_lease()], [a_call(vm)])
    one = basis(wanting(vm), seen([a_server()], [an_image()]), ledger)
    two = basis(wanting(vm), seen([a_server(clients=3)], [an_image()]), ledger)
    assert observed(one, two) == []


def test_an_image_that_is_another_is_named() -> None:
    desired = wanting(a_vm())
    lines = observed(basis(desired), basis(desired, seen([], [an_image()])))
    path = an_export().image
    assert lines[0] == (f"the image {path} is 1 GiB (1073741824 bytes) qcow2; it was not there")
    small = basis(desired, seen([], [an_image(size=4096)]))
    says("\n".join(observed(basis(desired), small)), "4 KiB (4096 bytes)", "refuse")


def test_a_pause_and_a_step_of_the_call_are_named() -> None:
    vm = a_vm()
    pause = Pause(vm="ctx-1", reason="moving", since=NOW - 1)
    lines = observed(
        basis(wanting(vm)), basis(wanting(vm), ledger=remembered(pauses={"ctx-1": pause}))
    )
    assert lines[0] == "ctx-1 is paused"
    up, image = a_server(), an_image()
    due = remembered([a_lease()], [a_call(vm, CallState.DUE)])
    accepted = remembered([a_lease()], [a_call(vm)])
    lines = observed(
        basis(wanting(vm), seen([up], [image]), due),
        basis(wanting(vm), seen([up], [image]), accepted),
    )
    assert lines[0] == "ctx-1: its run r1 is ACCEPTED; it was: its run r1 is DUE"
    says(lines[1], "- ctx-1 VM: call: POST")


def test_another_attempt_is_another_plan() -> None:
    one, two = a_vm(), changed(a_vm(), attempt=2, name="ctx-1-r1-a2-disk0")
    says(
        "\n".join(observed(basis(wanting(one)), basis(wanting(two)))),
        "is wanted otherwise: exports",
    )


def test_another_vm_in_scope_is_named() -> None:
    lines = observed(basis(wanting(a_vm())), basis(wanting(a_vm(), a_vm("ctx-2"))))
    says("\n".join(lines), "- ctx-2 is not in the plan", "+ ctx-2 disk 2000: start")


def test_other_options_of_a_server_are_another_plan() -> None:
    """Two plans that read the same, and would start another command line."""
    one = basis(wanting(a_vm()))
    two = basis(wanting(a_vm(), settings=a_settings(cache="writethrough")))
    assert observed(one, two) == ["ctx-1 disk 2000: start: other after"]


# -- what a later pass may do


def later(before: Basis, now: Basis, *, did: tuple[type[Action], ...] = (), **changes: Any) -> Plan:
    """The plan of a later pass, after some of the actions were carried out."""
    actions = [action for action in before.plan.actions if isinstance(action, did)]
    return promise(before, **changes).kept(now.plan, done(before.plan, actions))


def test_a_later_pass_does_what_is_left_of_the_promise() -> None:
    vm = a_vm()
    before = basis(wanting(vm))
    ledger = remembered([a_lease(started=False)], [a_call(vm, CallState.DUE)])
    now = basis(wanting(vm), seen([], [an_image()]), ledger)
    found = later(before, now, did=(Create,))
    assert [type(action) for action in found.actions] == [Start, Notify]
    assert found == now.plan


def test_a_later_pass_starts_nothing_on_another_port_and_then_makes_no_call() -> None:
    vm = a_vm()
    before = basis(wanting(vm))
    now = basis(wanting(vm), seen([], [an_image()], listeners={10100: SSHD}))
    found = later(before, now, did=(Create,))
    assert [(type(a), a.cause) for a in found.actions] == [(Wait, "NotPromised")] * 2
    says(found.actions[0].why, "serve as ctx-1-r1-disk0 on 10101", "reconciler plan -f specs --out "
         "night.plan")  # fmt: skip


def test_what_was_done_once_is_not_done_again() -> None:
    vm = a_vm()
    ledger = remembered([a_lease()], [a_call(vm)])
    before = basis(wanting(vm), seen([], [an_image()]), ledger)
    assert [type(action) for action in before.plan.actions] == [Restart]
    assert later(before, before).actions == before.plan.actions
    assert [type(a) for a in later(before, before, did=(Restart,)).actions] == [Wait]


def test_who_stays_ends_runs_and_begins_nothing() -> None:
    vm = a_vm()
    before = basis(wanting(vm))
    ended = remembered([a_lease()], [a_call(vm, CallState.COMPLETED)])
    over = basis(wanting(vm), seen([a_server()], [an_image()]), ended)
    assert [action.kind for action in over.plan.actions] == ["stop"]
    assert later(before, over, begun=True) == over.plan
    assert [type(a) for a in later(before, over).actions] == [Wait]
    died = basis(wanting(vm), seen([], [an_image()]), remembered([a_lease()], [a_call(vm)]))
    assert [type(a) for a in later(before, died, begun=True).actions] == [Wait]


def test_waits_and_holds_stay_in_a_later_pass() -> None:
    vm = absent()
    now = basis(wanting(vm), seen([a_server(clients=1)]), remembered([a_lease()]))
    assert later(basis(wanting(vm)), now) == now.plan


def test_keys_are_of_changes_alone() -> None:
    vm = absent()
    held = basis(wanting(vm), seen([a_server(clients=1)]), remembered([a_lease()]))
    assert keys(held.plan) == set()
    assert len(keys(basis(wanting(a_vm(disks=2))).plan)) == 5


def test_the_command_that_makes_it_anew_says_all_that_was_typed() -> None:
    saved = a_saved(
        files=("a b.yaml",),
        extra=("site=a",),
        patterns=("ctx-*",),
        selector="tier=gold",
        prune=True,
    )
    assert saved.again == (
        "reconciler plan -f 'a b.yaml' -e site=a --vm 'ctx-*' -l tier=gold --prune --out"
    )


def test_applied_places_do_not_count() -> None:
    """Where a VM is written is no part of what is wanted: the files are compared by themselves."""
    one, two = a_vm(place="a.yaml:1:1"), a_vm(place="a.yaml:9:1")
    assert observed(basis(wanting(one)), basis(wanting(two))) == []
    assert Applied(vm=one.to_json(), generation=1, at=NOW) is not None
