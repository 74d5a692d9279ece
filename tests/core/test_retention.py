"""What goes is old by every rule, whole, and needed by nobody; why each other chain stays."""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.core.call import Call, CallState
from reconciler.core.chains import chains_of
from reconciler.core.desired import Keep
from reconciler.core.ledger import Applied, Ledger, Pause
from reconciler.core.retention import Retention, built_on, document, retention, to_be_read
from tests.core.builders import NOW, a_call, a_restore, a_vm, an_export, desired, remembered
from tests.core.test_chains import a_run, shelf

S = CallState
DAY: Final = 86400.0


def three(*more: Call) -> tuple[Call, ...]:
    """Three chains, 30, 20 and 10 days old, each a full run and one on it; and other runs."""
    return (
        a_run("f1", at=-30 * DAY),
        a_run("i1", "f1", at=-29 * DAY),
        a_run("f2", at=-20 * DAY),
        a_run("i2", "f2", at=-19 * DAY),
        a_run("f3", at=-10 * DAY),
        a_run("i3", "f3", at=-9 * DAY),
        *more,
    )


def a_ledger(
    calls: tuple[Call, ...], keep: Keep | None, *, wanted: Any = None, **changes: Any
) -> Ledger:
    kept = {name: changes.pop(name) for name in ("removed", "damaged") if name in changes}
    vm = replace(wanted or a_vm(run="f3", disks=2), keep=keep)
    applied = {"ctx-1": Applied(vm=vm.to_json(), generation=1, at=NOW)} | changes.pop("others", {})
    return remembered(calls=calls, shelf=shelf(calls, **kept), applied=applied, **changes)


def judged(ledger: Ledger, held: dict[str, str] | None = None) -> Retention:
    return retention(ledger, "ctx-1", NOW, held or {}, built_on(ledger, "ctx-1"))


def causes(found: Retention) -> dict[str, str]:
    return {fate.chain.full.run: fate.cause for fate in found.fates}


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (None, {"f1": "NoRule", "f2": "NoRule", "f3": "NoRule"}),
        (Keep(full=1), {"f1": "Outdated", "f2": "Outdated", "f3": "Newest"}),
        (Keep(full=2), {"f1": "Outdated", "f2": "AmongNewest", "f3": "Newest"}),
        (Keep(full=1, days=25), {"f1": "Outdated", "f2": "Recent", "f3": "Newest"}),
        (Keep(full=1, days=30), {"f1": "Recent", "f2": "Recent", "f3": "Newest"}),
        (Keep(full=9), {"f1": "AmongNewest", "f2": "AmongNewest", "f3": "Newest"}),
    ],
)
def test_a_chain_goes_when_neither_rule_keeps_it(
    keep: Keep | None, expected: dict[str, str]
) -> None:
    assert causes(judged(a_ledger(three(), keep))) == expected


def test_what_is_built_on_another_goes_before_it() -> None:
    found = judged(a_ledger(three(), Keep(full=1)))
    assert [one.run for one in found.going] == ["i1", "f1", "i2", "f2"]
    value = document("hub-a", [found], done=False)
    assert value["bytes"] == 8 << 20
    assert [one["action"] for one in value["vms"][0]["chains"]] == ["remove", "remove", "keep"]
    assert value["vms"][0]["keep"] == {"full": 1, "days": 0.0}


def a_restore_of(run: str) -> dict[str, Applied]:
    vm = a_restore()
    exports = tuple(replace(one, image=an_export(run=run).image) for one in vm.exports)
    return {"look": Applied(vm=replace(vm, exports=exports).to_json(), generation=1, at=NOW)}


def other(backing: str, **changes: Any) -> Call:
    """A run of another VM, built on an image of this one."""
    vm = a_vm("ctx-2", run="x1")
    vm = replace(vm, exports=(replace(vm.exports[0], backing=backing),))
    return a_call(vm, changes.pop("state", S.COMPLETED), run="x1", **changes)


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("protect", "Protected"),
        ("paused", "Paused"),
        ("every vm is paused", "Paused"),
        ("an active run builds on it", "RunActive"),
        ("a due run builds on it", "RunActive"),
        ("a server has it open", "InUse"),
        ("a restore is to read it", "InUse"),
        ("another vm builds on it", "BuiltOn"),
        ("a wanted run builds on it", "BuiltOn"),
        ("a kept chain builds on it", "BuiltOn"),
    ],
)
def test_what_is_needed_stays_however_old_it_is(what: str, cause: str) -> None:
    keep = Keep(full=1)
    held: dict[str, str] = {}
    changes: dict[str, Any] = {}
    calls = three()
    image = an_export(run="i1").image
    match what:
        case "protect":
            changes = {"wanted": a_vm(run="f3", disks=2, protect=True)}
        case "paused" | "every vm is paused":
            name = "ctx-1" if what == "paused" else "*"
            changes = {"pauses": {name: Pause(vm=name, reason="work", since=NOW)}}
        case "an active run builds on it":
            calls = three(a_run("i9", "i1", state=S.ACCEPTED, ended=0.0))
        case "a due run builds on it":
            calls = three(a_run("i9", "i1", state=S.DUE, ended=0.0))
        case "a server has it open":
            held = {image: "pid 7"}
        case "a restore is to read it":
            changes = {"others": a_restore_of("i1")}
        case "another vm builds on it":
            calls = three(other(image))
        case "a wanted run builds on it":
            vm = a_vm(run="i9", disks=2, type="incremental")
            first = replace(vm.exports[0], backing=image)
            changes = {"wanted": replace(vm, exports=(first, *vm.exports[1:]))}
        case "a kept chain builds on it":
            one = a_run("i4", "f3", at=-8 * DAY)
            mixed = replace(one.exports[1], backing=an_export(position=1, run="i1").image)
            calls = three(replace(one, exports=(one.exports[0], mixed)))
        case _:
            raise AssertionError(what)
    assert causes(judged(a_ledger(three(), keep)))["f1"] == "Outdated"
    ledger = a_ledger(calls, keep, **changes)
    found = judged(ledger, {**held, **to_be_read(ledger)})
    assert causes(found)["f1"] == cause
    assert not {"f1", "i1"} & {one.run for one in found.going}


def test_a_chain_that_cannot_be_restored_displaces_none() -> None:
    found = judged(a_ledger(three(), Keep(full=2), damaged=["f2"]))
    assert causes(found) == {"f1": "AmongNewest", "f2": "Outdated", "f3": "Newest"}


def test_what_a_crash_left_is_gone_on_with() -> None:
    found = judged(a_ledger(three(), Keep(full=2), removed={"i1": NOW - 5}))
    assert [one.run for one in found.unfinished] == ["i1"]
    assert [one.run for one in found.going] == ["f1"]


def test_keep_is_read_of_the_spec_and_of_defaults() -> None:
    text = "defaults: {keep: {full: 3, days: 14}}\nvms:\n  - {name: ctx-1, state: absent}\n"
    assert desired(text).vms["ctx-1"].keep == Keep(full=3, days=14.0)
    text = "vms:\n  - {name: ctx-1, state: absent, keep: {days: 7}}\n"
    assert desired(text).vms["ctx-1"].keep == Keep(full=1, days=7.0)
    assert desired("vms:\n  - {name: ctx-1, state: absent, keep: {}}\n").failed
    assert desired("vms:\n  - {name: ctx-1, state: absent, keep: {full: 0}}\n").failed


SHAPES = st.lists(
    st.tuples(st.integers(0, 12), st.booleans(), st.sampled_from(["done", "gone", "hurt", "now"])),
    min_size=1,
    max_size=12,
)


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(1, 4), st.integers(0, 12))
def test_nothing_that_is_kept_ever_needs_what_goes(
    shapes: list[tuple[int, bool, str]], full: int, days: int
) -> None:
    """Any forest of runs, any rule: what stays can be restored as well as before."""
    calls, removed, damaged = [], {}, []
    names: list[str] = []
    for at, (parent, is_full, state) in enumerate(shapes):
        run = f"r{at}"
        on = None if is_full or not names else names[parent % len(names)]
        under_way = state == "now" and at == len(shapes) - 1
        calls.append(
            a_run(run, on, at=(at - 12) * DAY, state=S.ACCEPTED if under_way else S.COMPLETED)
        )
        if not under_way:
            names.append(run)
        if state == "gone":
            removed[run] = NOW
        if state == "hurt":
            damaged.append(run)
    ledger = a_ledger(tuple(calls), Keep(full=full, days=days), removed=removed, damaged=damaged)
    before = {b.run: b.lacks for c in chains_of(ledger, "ctx-1") for b in c.backups}
    found = judged(ledger)
    gone = [one.run for one in found.going]
    after = a_ledger(
        tuple(calls),
        Keep(full=full, days=days),
        removed={**removed, **dict.fromkeys(gone, NOW)},
        damaged=damaged,
    )
    for chain in chains_of(after, "ctx-1"):
        for one in chain.backups:
            assert one.run in gone or one.lacks == before[one.run]
    young = [c.run for c in calls if NOW - c.ended < days * DAY and c.run not in removed]
    assert not set(gone) & set(young)
    position = {run: at for at, run in enumerate(gone)}
    for call in calls:
        for export in call.exports:
            below = next((c.run for c in calls if c.exports[0].image == export.backing), "")
            if call.run in position and below in position:
                assert position[call.run] < position[below], "what is built on it goes first"
    assert judged(after).going == (), "once it is done, there is nothing more to do"
