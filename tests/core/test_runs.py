"""Which run of a VM counts: its own, or what `runs:` ask for beside it."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core import spec_files
from reconciler.core.call import Call, CallState
from reconciler.core.declared import Specs
from reconciler.core.desired import Desired, Vm, build
from reconciler.core.ledger import Applied, Ledger
from reconciler.core.plan import plan
from reconciler.core.runs import choose
from tests.core.builders import (
    NOW,
    a_call,
    a_settings,
    a_vm,
    document,
    known,
    lines,
    remembered,
    says,
    seen,
)

INVENTORY: Final = """\
vms:
  ctx-1: {vm: {path: /a, vcenter: vc1}, disks: [{key: 2000, size: 1GiB}]}
  ctx-2: {vm: {path: /b, vcenter: vc1}, disks: [{key: 2000, size: 1GiB}]}
  ctx-3: {vm: {path: /c, vcenter: vc1}, disks: [{key: 2000, size: 1GiB}]}
"""
OWN: Final = "vms: [{name: ctx-1, disks: inventory, labels: {tier: gold}, backup: {run: own}}]\n"


def asks(vm: str, run: str, more: str = "") -> str:
    return f"runs: [{{vm: {vm}, run: {run}{more}}}]\n"


def specs(*texts: str, requests: tuple[str, ...] = (), scoped: bool = False) -> Specs:
    """Specs from a.yaml, b.yaml …, requests from r0.yaml, r1.yaml …"""
    return spec_files.read(
        [document(text, f"{chr(97 + n)}.yaml") for n, text in enumerate(texts)],
        [document(text, f"r{n}.yaml") for n, text in enumerate(requests)],
        scoped=scoped,
    )


def built(found: Specs, ledger: Ledger | None = None, have: str | None = INVENTORY) -> Desired:
    knows = known(have) if have else None
    return build(found, knows, a_settings(), ledger or remembered())


def runs(desired: Desired) -> dict[str, tuple[str, str]]:
    """VM → run and type."""
    return {name: (vm.run, vm.type) for name, vm in desired.vms.items()}


def fine(desired: Desired) -> dict[str, tuple[str, str]]:
    assert lines(desired.diagnostics) == []
    return runs(desired)


def a_run(run: str, state: CallState, created: float = NOW, vm: str = "ctx-1") -> Call:
    return a_call(a_vm(vm, run=run), state, created=created)


# -- whose run counts

ENDED: Final = (CallState.COMPLETED, CallState.FAILED, CallState.CANCELLED)
OPEN: Final = (None, *(state for state in CallState if state not in ENDED))


@pytest.mark.parametrize("own", OPEN + ENDED)
@pytest.mark.parametrize("entry", OPEN + ENDED)
def test_an_entry_counts_until_its_run_has_ended(
    own: CallState | None, entry: CallState | None
) -> None:
    calls = [a_run("own", own)] if own else []
    calls += [a_run("new", entry)] if entry else []
    found = fine(built(specs(OWN, asks("ctx-1", "new")), remembered(calls=calls)))
    entrys = entry not in ENDED or own in ENDED
    assert found["ctx-1"] == ("new" if entrys else "own", "full")


@pytest.mark.parametrize(
    ("own", "entry", "counts"), [(1.0, 2.0, "new"), (2.0, 1.0, "own"), (1.0, 1.0, "new")]
)
def test_where_both_have_ended_the_later_call_counts(own: float, entry: float, counts: str) -> None:
    calls = [
        a_run("own", CallState.COMPLETED, NOW + own),
        a_run("new", CallState.FAILED, NOW + entry),
    ]
    found = fine(built(specs(OWN, asks("ctx-1", "new")), remembered(calls=calls)))
    assert found["ctx-1"][0] == counts


def test_an_attempt_that_was_opened_again_has_not_ended() -> None:
    calls = [
        a_run("new", CallState.CANCELLED),
        a_call(a_vm(run="new"), CallState.DUE, attempt=2, exports=()),
    ]
    found = fine(built(specs(OWN, asks("ctx-1", "new")), remembered(calls=calls)))
    assert found["ctx-1"][0] == "new"


def test_an_entry_says_the_type_and_who_asked_and_the_spec_the_rest() -> None:
    text = OWN.replace("run: own", "run: own, type: incremental")
    desired = built(specs(text, asks("ctx-1", "new", ", by: 'timer (root)'")))
    assert fine(desired) == {"ctx-1": ("new", "full")}
    vm = desired.vms["ctx-1"]
    assert (vm.asked, vm.place, vm.run_place) == ("timer (root)", "a.yaml:1:14", "b.yaml:1:25")
    assert vm.labels == {"tier": "gold"}
    assert [export.name for export in vm.exports] == ["ctx-1-new-disk0"]


def test_a_vm_needs_no_backup_of_its_own_where_a_run_is_asked_for() -> None:
    text = "vms: [{name: ctx-1, disks: inventory}]"
    assert fine(built(specs(text, asks("ctx-1", "new")))) == {"ctx-1": ("new", "full")}
    assert fine(built(specs(asks("ctx-1", "new"), text))) == {"ctx-1": ("new", "full")}


def test_an_entry_may_stand_before_the_vm_that_it_is_about() -> None:
    assert fine(built(specs(asks("ctx-1", "new"), OWN))) == {"ctx-1": ("new", "full")}


def test_the_last_entry_in_reading_order_counts() -> None:
    texts = ("runs: [{vm: ctx-1, run: a}, {vm: ctx-1, run: b}]", asks("ctx-1", "c"))
    assert fine(built(specs(OWN, *texts)))["ctx-1"][0] == "c"
    assert fine(built(specs(OWN, *reversed(texts))))["ctx-1"][0] == "b"
    request = (asks("ctx-1", "d"),)
    assert fine(built(specs(OWN, *texts, requests=request)))["ctx-1"][0] == "d"


def test_a_superseded_entry_does_not_come_back_and_says_so() -> None:
    found = specs(OWN, asks("ctx-1", "a"), requests=(asks("ctx-1", "b"),))
    assert fine(built(found))["ctx-1"][0] == "b"
    ended = remembered(
        calls=[a_run("b", CallState.COMPLETED), a_run("own", CallState.COMPLETED, NOW - 9)]
    )
    desired = built(found, ended)
    assert runs(desired)["ctx-1"][0] == "b"
    (said,) = lines(desired.diagnostics)
    says(said, "1:25 warning: the run a of ctx-1 is not asked for", "b (r0.yaml:1:25)", "has ended")
    assert not desired.failed
    done = remembered(calls=[*ended.calls, a_run("a", CallState.FAILED, NOW - 5)])
    assert fine(built(found, done))["ctx-1"][0] == "b"


names = st.sampled_from(["r1", "r2", "r3"])


@given(
    own=names,
    entries=st.lists(names, max_size=4),
    states=st.dictionaries(names, st.tuples(st.sampled_from(list(CallState)), st.floats(0, 9))),
)
def test_no_entry_shadows_a_spec_that_was_edited_after_its_run_had_ended(
    own: str, entries: list[str], states: dict[str, tuple[CallState, float]]
) -> None:
    text = OWN.replace("run: own", f"run: {own}")
    calls = [a_run(run, state, NOW + at) for run, (state, at) in states.items()]
    ledger = remembered(calls=calls)
    desired = built(specs(text, *(asks("ctx-1", run) for run in entries)), ledger)
    chosen = desired.vms["ctx-1"].run
    assert not desired.failed
    assert chosen in {own, *entries[-1:]}
    still_open = {
        run for run in {own, *entries[-1:]} if run not in states or not states[run][0].terminal
    }
    assert chosen in (still_open or {own, *entries[-1:]})


# -- who is meant


def test_an_inventory_vm_that_nobody_declares_is_as_if_it_were_written() -> None:
    desired = built(specs(OWN, asks("ctx-2", "new", ", type: full")))
    assert fine(desired) == {"ctx-1": ("own", "full"), "ctx-2": ("new", "full")}
    vm = desired.vms["ctx-2"]
    assert (vm.place, vm.run_place, vm.verified) == ("b.yaml:1:8", "b.yaml:1:25", True)
    written = "vms: [{name: ctx-2, disks: inventory, backup: {run: new}}]"
    as_written = built(specs(written)).vms["ctx-2"]
    assert vm.exports == as_written.exports
    assert vm.request == as_written.request


def test_an_unknown_vm_is_an_error_with_the_nearest_name() -> None:
    desired = built(specs(OWN, asks("ctx-11", "new")))
    (said,) = lines(desired.diagnostics)
    says(said, "1:13 error: there is no VM 'ctx-11'", "did you mean 'ctx-1'", "inventory does not")
    assert runs(desired) == {"ctx-1": ("own", "full")}
    says(lines(built(specs(asks("a", "r")), have=None).diagnostics)[0], "no inventory can be read")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "vms: [{name: ctx-1, state: absent}]",
            ["its spec says `state: absent` (a.yaml:1:28)", "nothing of this VM is changed"],
        ),
        (
            "vms: [{name: ctx-1, for: restore, disks: [{key: 1, image: x}]}]",
            ["its spec says `for: restore` (a.yaml:1:26)"],
        ),
    ],
)
def test_a_run_of_a_vm_that_is_not_to_be_backed_up_is_refused(text: str, words: list[str]) -> None:
    desired = built(specs(text, asks("ctx-1", "new")))
    (said,) = lines(desired.diagnostics)
    says(said, "1:13 error: a run of ctx-1 is asked for, but", *words)
    assert dict(desired.vms) == {}
    assert desired.diagnostics[0].vm == "ctx-1"


@pytest.mark.parametrize("state", ENDED)
def test_an_entry_whose_run_has_ended_is_refused_for_nothing(state: CallState) -> None:
    """Old requests stay where they are: the VM goes on without them."""
    gone = "vms: [{name: ctx-1, state: absent}]"
    ended = remembered(calls=[a_run("new", state), a_run("new", state, vm="ctx-9")])
    desired = built(specs(gone, asks("ctx-1", "new"), asks("ctx-9", "new")), ended)
    assert lines(desired.diagnostics) == []
    assert [vm.exported for vm in desired.vms.values()] == [False]


@pytest.mark.parametrize(
    "broken",
    [
        "vms: [{name: ctx-1, disks: nonsense, backup: {run: own}}]",
        "vms: [{name: ctx-1, state: absent}, {name: ctx-1, state: absent}]",
    ],
)
def test_a_vm_whose_declaration_is_wrong_is_not_taken_from_the_inventory(broken: str) -> None:
    desired = built(specs(broken, asks("ctx-1", "new")))
    assert dict(desired.vms) == {}
    assert desired.failed
    assert all("vms: " not in one.summary for one in desired.diagnostics)


def test_where_a_file_cannot_be_read_nobody_is_taken_from_the_inventory() -> None:
    desired = built(specs("vms: [{name: '{{ x }}'}]", asks("ctx-1", "new")))
    assert dict(desired.vms) == {}
    says(lines(desired.diagnostics)[1], "1:13 error: the run new is asked for a VM ctx-1",
         "a.yaml cannot be read and may declare it")  # fmt: skip


def test_a_fault_of_the_run_is_shown_where_the_run_is_asked_for() -> None:
    desired = built(specs(OWN, asks("ctx-1", "new", ", type: incremental")))
    (found,) = desired.diagnostics
    says(str(found), "b.yaml:1:8: error: VM ctx-1: disk 2000 has no completed run")


def test_an_export_name_that_carries_another_run_is_refused() -> None:
    text = OWN.replace("disks: inventory", "disks: [{key: 2000, export: x-own-disk0}]")
    assert fine(built(specs(text)))["ctx-1"][0] == "own"
    (said,) = lines(built(specs(text, asks("ctx-1", "new"))).diagnostics)
    says(said, "1:49 error: VM ctx-1: the export name 'x-own-disk0' does not contain the run 'new'")


# -- what a command is about


def test_requests_count_for_the_vms_in_scope_and_the_others_are_untouched() -> None:
    request = (asks("ctx-1", "new"), asks("ctx-2", "new"), asks("ctx-3", "new"))
    texts = (OWN, asks("ctx-3", "older"))
    everything = built(specs(*texts, requests=request))
    assert sorted(fine(everything)) == ["ctx-1", "ctx-2", "ctx-3"]
    assert everything.untouched == ()
    desired = built(specs(*texts, requests=request, scoped=True))
    assert fine(desired) == {"ctx-1": ("new", "full"), "ctx-3": ("new", "full")}
    assert desired.untouched == ("ctx-2",)
    planned = plan(desired, seen(), remembered(), NOW)
    assert planned.untouched == ("ctx-2",)


def test_a_request_that_has_ended_is_not_said_to_be_untouched() -> None:
    ended = remembered(calls=[a_run("new", CallState.COMPLETED, vm="ctx-2")])
    found = specs(OWN, requests=(asks("ctx-2", "new"), asks("ctx-9", "new")), scoped=True)
    assert built(found, ended).untouched == ("ctx-9",)


def test_only_some_vms_with_what_is_said_about_them() -> None:
    text = OWN + asks("ctx-9", "new")
    desired = built(specs(text, "vms: [{name: ctx-2, state: gone}]"))
    assert desired.failed
    alone = desired.only({"ctx-1"})
    assert (list(alone.vms), alone.failed) == (["ctx-1"], False)
    assert [one.vm for one in desired.only({"ctx-2", "ctx-9"}).diagnostics] == ["ctx-2", "ctx-9"]


# -- unreadable is not empty


def was_applied(vm: Vm) -> dict[str, Applied]:
    return {vm.name: Applied(vm=vm.to_json(), generation=1, at=NOW)}


def test_a_run_whose_entry_cannot_be_read_any_more_is_not_given_up_for_another() -> None:
    vm = built(specs(OWN, asks("ctx-1", "new"))).vms["ctx-1"]
    ledger = remembered(applied=was_applied(vm))
    broken = specs(OWN, asks("ctx-1", "n ew"))
    desired = built(broken, ledger)
    assert dict(desired.vms) == {}
    (_, said) = lines(desired.diagnostics)
    says(said, "1:69 error: VM ctx-1: the run new was asked for at b.yaml:1:25, and b.yaml cannot")
    # The same file, read: the entry is gone because somebody took it out.
    assert fine(built(specs(OWN, "runs: []"), ledger))["ctx-1"][0] == "own"
    # Another file is broken: it never held the entry.
    other = built(specs(OWN, "runs: []", "runs: [3]"), ledger)
    assert runs(other)["ctx-1"][0] == "own"
    ended = remembered(applied=was_applied(vm), calls=[a_run("new", CallState.COMPLETED)])
    assert runs(built(broken, ended))["ctx-1"][0] == "own"


# -- what the planner makes of it


def test_the_same_run_as_another_type_is_refused_with_both_sides() -> None:
    done = a_call(a_vm(run="base"), CallState.COMPLETED, created=NOW - 9)
    was = built(specs(OWN, asks("ctx-1", "new"))).vms["ctx-1"]
    active = a_call(was, CallState.ACCEPTED, created=NOW)
    entry = asks("ctx-1", "new", ", type: incremental")
    ledger = remembered(calls=[done, active])
    desired = built(specs(OWN, entry), ledger)
    refuse = next(a for a in plan(desired, seen(), ledger, NOW).actions if a.kind == "refuse")
    assert refuse.cause == "RunChanged"
    says(refuse.why, "asked for as full", "now says incremental", "reconciler backup ctx-1 --run")


def test_choose_keeps_the_order_of_the_specs() -> None:
    found = specs(
        "vms: [{name: ctx-2, state: absent}, {name: ctx-1, state: absent}]", asks("ctx-3", "new")
    )
    chosen = choose(found, known(INVENTORY), remembered())
    assert [one.spec.name for one in chosen.vms] == ["ctx-2", "ctx-1", "ctx-3"]
