"""What stays and what goes, decided over values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.core.call import CallState
from reconciler.core.desired import Vm, at_attempt
from reconciler.core.ledger import Applied, Declaration, Ledger
from reconciler.core.settings import Limit, Loop
from reconciler.core.source import (
    APART,
    Decision,
    Found,
    Held,
    Revision,
    condition_of,
    decide,
    last_applied,
    read_well,
    settled,
)
from reconciler.core.units import Seconds
from tests.core.builders import NOW, a_call, a_lease, a_settings, a_vm, absent, remembered, wanting

PRUNE: Final = Loop(prune=True)


def found(named: Mapping[str, str], digest: str = "d1", **changes: Any) -> Found:
    return Found(
        directory="/srv/specs", revision=Revision(digest=digest), named=dict(named), **changes
    )


def applied(vm: Vm) -> Applied:
    return Applied(vm=vm.to_json(), generation=1, at=NOW)


def declared(*names: str, **applied_as: Vm) -> Ledger:
    """A ledger in which VMs are declared by a file each, and applied."""
    vms = {name: applied_as.get(name.replace("-", "_"), a_vm(name)) for name in names}
    return remembered(
        declared={
            name: Declaration(vm=name, file=f"{name}.yaml", revision="d0", at=NOW) for name in names
        },
        applied={name: applied(vm) for name, vm in vms.items()},
    )


def noted(ledger: Ledger, decision: Decision) -> Ledger:
    """The ledger once a decision is written down."""
    rows = {**ledger.declared, **{one.vm: one for one in decision.declared}}
    for name in decision.forget:
        rows.pop(name, None)
    source = dict(decision.source)
    digest = source["revision"].get("digest", "")
    if ledger.source.get("approved", "") == digest:
        source["approved"] = digest
    return replace(ledger, declared=rows, source=source)


def twice(what: Found, ledger: Ledger, loop: Loop = PRUNE) -> tuple[Decision, Ledger]:
    """Two equal clean readings."""
    ledger = noted(ledger, decide(what, ledger, loop, NOW))
    decision = decide(what, ledger, loop, NOW + APART)
    return decision, noted(ledger, decision)


def test_the_cap_is_for_all_removals_of_a_revision() -> None:
    """Those that are done count, also when nothing of them is remembered but that."""
    names = [f"ctx-{n}" for n in range(8)]
    ledger = declared(*names)
    decision, ledger = twice(found(dict.fromkeys(names[2:], "a.yaml")), ledger)
    assert decision.removed == {"ctx-0", "ctx-1"}
    gone = {name: applied(absent(name)) for name in decision.removed}
    ledger = replace(ledger, applied={**ledger.applied, **gone})
    decision = decide(found(dict.fromkeys(names[2:], "a.yaml")), ledger, PRUNE, NOW + 60)
    ledger = noted(ledger, decision)
    assert decision.forget == ("ctx-0", "ctx-1")
    assert not ledger.declared.keys() & set(decision.forget)
    late = Declaration(vm="late", file="x.yaml", revision="d0", at=NOW)
    ledger = replace(
        ledger,
        declared={**ledger.declared, "late": late},
        applied={**ledger.applied, "late": applied(a_vm("late"))},
    )
    decision, _ = twice(found(dict.fromkeys(names[2:], "a.yaml")), ledger)
    assert decision.removed == frozenset()
    assert decision.holds["late"].reason == "TooMany"


@pytest.mark.parametrize(
    ("total", "gone", "limit", "held"),
    [
        (3, 2, Limit(percent=25.0), False),
        (3, 3, Limit(percent=25.0), True),
        (100, 25, Limit(percent=25.0), False),
        (100, 26, Limit(percent=25.0), True),
        (100, 3, Limit(count=3), False),
        (100, 4, Limit(count=3), True),
    ],
)
def test_how_many_is_too_many(total: int, gone: int, limit: Limit, held: bool) -> None:
    names = [f"ctx-{n:03}" for n in range(total)]
    rest = dict.fromkeys(names[gone:], "a.yaml")
    decision, _ = twice(found(rest), declared(*names), Loop(prune=True, max_delete=limit))
    assert decision.removed == (frozenset() if held else frozenset(names[:gone]))


def test_an_approval_is_for_one_digest() -> None:
    for digest, removed in (("d1", set()), ("d2", {"a", "b", "c"})):
        clean = {"digest": digest, "since": NOW - 10}
        source = {"approved": "d2", "clean": clean}
        ledger = replace(declared("a", "b", "c"), source=source)
        decision = decide(found({}, digest), ledger, PRUNE, NOW)
        assert decision.removed == removed
        assert bool(decision.source["waiting"]) == (not removed)


@pytest.mark.parametrize(
    "first",
    [
        found({}, settled=False),
        found({}, unread={"x.yaml": "it is half a file"}),
        found({}, trouble="it is empty"),
    ],
)
def test_only_a_clean_reading_is_the_first_of_two(first: Found) -> None:
    ledger = declared("a", "b", "c")
    ledger = noted(ledger, decide(first, ledger, PRUNE, NOW))
    ledger = noted(ledger, decide(found({}), ledger, PRUNE, NOW + 60))
    assert {why[0] for why in ledger.source["held"].values()} == {"Unconfirmed"}
    ledger = noted(ledger, decide(first, ledger, PRUNE, NOW + 120))
    assert not decide(first, ledger, PRUNE, NOW + 180).removed
    ledger = noted(ledger, decide(found({}), ledger, PRUNE, NOW + 240))
    assert {why[0] for why in ledger.source["held"].values()} == {"Unconfirmed"}


def test_a_vm_that_is_leaving_stays_to_be_absent_whatever_becomes_of_the_files() -> None:
    """A hold must not export again what was on its way out."""
    gone = absent("ctx-1", order="no spec declares it any more")
    ledger = replace(declared("ctx-1", "ctx-2", ctx_1=gone), leases=(a_lease(),))
    for what in (
        found({"ctx-2": "a.yaml"}),
        found({"ctx-2": "a.yaml"}, unread={"x.yaml": "it is half a file"}),
        found({}, trouble="it is empty"),
    ):
        for loop in (PRUNE, Loop()):
            decision = decide(what, ledger, loop, NOW)
            desired = settled(wanting(), decision, ledger)
            assert not desired.vms["ctx-1"].exported
            assert decision.forget == ()


def test_what_was_never_applied_is_forgotten_when_it_is_gone() -> None:
    ledger = replace(declared("ctx-1"), applied={})
    assert decide(found({}), ledger, Loop(), NOW).forget == ("ctx-1",)
    unread = found({}, unread={"x.yaml": "it is half a file"})
    assert decide(unread, ledger, Loop(), NOW).forget == ()


def test_a_vm_of_an_unread_folder_stays() -> None:
    ledger = declared("ctx-1")
    row = replace(ledger.declared["ctx-1"], file="sub/more/a.yaml")
    ledger = replace(ledger, declared={"ctx-1": row})
    decision = decide(found({}, unread={"sub/": "no rights"}), ledger, PRUNE, NOW)
    assert decision.holds == {"ctx-1": Held("SourceUnreadable", "no rights")}


def test_a_clock_that_goes_back_confirms_nothing() -> None:
    what, ledger = found({}), declared("ctx-1")
    ledger = noted(ledger, decide(what, ledger, PRUNE, NOW + 1_000))
    decision = decide(what, ledger, PRUNE, NOW)
    assert decision.holds["ctx-1"].reason == "Unconfirmed"
    assert decision.again == NOW + APART


def test_the_last_applied_state_has_the_present_attempt() -> None:
    vm = a_vm(disks=2)
    first = a_call(vm, CallState.CANCELLED)
    second = a_call(vm, CallState.DUE, attempt=2, exports=())
    third = a_call(vm, CallState.DUE, attempt=3, exports=())
    wanted = tuple(at_attempt(export, 3) for export in vm.exports)
    later = replace(vm, exports=tuple(at_attempt(export, 2) for export in vm.exports))
    for one in (vm, later):
        ledger = remembered(calls=[first, second, third], applied={"ctx-1": applied(one)})
        kept = last_applied("ctx-1", ledger, a_settings())
        assert kept is not None
        assert kept.exports == wanted


def test_what_cannot_be_called_for_any_more_is_not_kept() -> None:
    ledger = remembered(applied={"ctx-1": applied(a_vm())})
    assert last_applied("ctx-1", ledger, a_settings(snas={})) is None
    assert last_applied("ctx-1", ledger, a_settings(vcenters={})) is None
    running = replace(ledger.put([a_call()]))
    assert last_applied("ctx-1", running, a_settings(snas={})) == a_vm()


def test_each_reason_has_its_condition() -> None:
    assert condition_of("EmptySource") == condition_of("SourceUnreadable") == "SourceUnreadable"
    assert condition_of("TooMany") == "PruneHeld"


# -- whatever is read in whatever order

NAMES: Final = ("a", "b", "c", "d", "e")


@dataclass(frozen=True)
class Step:
    """One reading: what each VM's file says, and what else is so."""

    files: tuple[str, ...]
    """For each of NAMES: `exported`, `absent`, `gone`, `broken` (its file) or `error` (itself)."""
    trouble: bool
    settled: bool
    prune: bool
    later: Seconds
    approves: bool


steps = st.builds(
    Step,
    st.tuples(
        *[st.sampled_from(["exported", "exported", "gone", "absent", "broken", "error"])] * 5
    ),
    st.sampled_from([False, False, False, True]),
    st.sampled_from([True, True, True, False]),
    st.sampled_from([True, True, False]),
    st.sampled_from([0.5, 2.0, 30.0]),
    st.booleans(),
)


@dataclass
class World:
    """A ledger that is written by the decisions alone, and an account of what was read."""

    ledger: Ledger = field(default_factory=remembered)
    now: Seconds = NOW
    equal: list[tuple[str, Seconds]] = field(default_factory=list)
    """(digest, when) of the clean readings since the last that was not, all equal."""
    approved: str = ""
    done: dict[str, set[str]] = field(default_factory=dict)
    """Digest → what was removed of it, since it is what is there."""

    def read(self, step: Step) -> None:
        self.now += step.later
        what = self.found(step)
        if step.approves and (waiting := self.ledger.source.get("waiting")):
            self.approved = waiting["digest"]
            self.ledger = replace(
                self.ledger, source={**self.ledger.source, "approved": self.approved}
            )
        digest = what.revision.digest
        if not what.clean:
            self.equal = []
        elif self.equal and self.equal[-1][0] != digest:
            self.equal, self.done = [], {}
        if what.clean:
            self.equal.append((digest, self.now))
        before, loop = self.ledger, Loop(prune=step.prune)
        decision = decide(what, before, loop, self.now)
        desired = settled(self.built(step), decision, before)
        self.judge(step, what, decision, desired.vms)
        self.ledger = noted(before, decision)
        fresh = {name: applied(vm) for name, vm in desired.vms.items()}
        self.ledger = replace(self.ledger, applied={**before.applied, **fresh})

    def found(self, step: Step) -> Found:
        said = dict(zip(NAMES, step.files, strict=True))
        if step.trouble:
            said = {}
        return found(
            {n: f"{n}.yaml" for n, how in said.items() if how in ("exported", "absent", "error")},
            " ".join(step.files),
            unread={f"{n}.yaml": "half" for n, how in said.items() if how == "broken"},
            errors={n: "wrong" for n, how in said.items() if how == "error"},
            trouble="it is empty" if step.trouble else "",
            settled=step.settled,
        )

    def built(self, step: Step) -> Any:
        said = {} if step.trouble else dict(zip(NAMES, step.files, strict=True))
        vms = [a_vm(n) for n, how in said.items() if how == "exported"]
        return wanting(*vms, *(absent(n) for n, how in said.items() if how == "absent"))

    def judge(self, step: Step, what: Found, decision: Decision, vms: Mapping[str, Vm]) -> None:
        """Nothing is lost; nothing is absent unless somebody said so, or every condition holds."""
        said = dict(zip(NAMES, step.files, strict=True))
        fresh: set[str] = set()
        for name in NAMES:
            was = self.ledger.applied.get(name)
            exported = was is not None and was.vm["exported"]
            if exported and name in self.ledger.declared:
                assert name in vms, f"{name} is not looked after any more"
            if not exported or vms[name].exported:
                continue
            if not step.trouble and said[name] == "absent":
                continue  # a spec says so
            assert not step.trouble
            assert said[name] == "gone"
            assert step.prune
            assert what.clean
            assert self.now - self.equal[0][1] >= APART
            assert len(self.equal) > 1
            fresh.add(name)
        digest = what.revision.digest
        done = self.done.setdefault(digest, set())
        total = len(self.ledger.declared.keys() | done)
        if fresh and self.approved != digest:
            assert len(fresh | done) <= max(2, total // 4)
        done |= fresh
        assert fresh <= decision.removed


@given(st.lists(steps, max_size=12))
def test_nothing_goes_unless_it_is_said_or_every_condition_holds(lives: list[Step]) -> None:
    world = World()
    for step in lives:
        world.read(step)


calm = st.builds(
    Step,
    st.tuples(*[st.sampled_from(["exported", "gone"])] * 5),
    st.just(False),
    st.just(True),
    st.just(True),
    st.just(30.0),
    st.just(True),
)


@given(st.lists(steps, max_size=6), calm)
def test_what_is_gone_goes_at_last(lives: list[Step], end: Step) -> None:
    """Four calm readings, with a person who approves what waits: then the files are what is."""
    world = World()
    for step in (*lives, end, end, end, end):
        world.read(step)
    there = {name for name, how in zip(NAMES, end.files, strict=True) if how == "exported"}
    left = {name for name, one in world.ledger.applied.items() if one.vm["exported"]}
    assert left & world.ledger.declared.keys() <= there
    assert world.ledger.declared.keys() == there


@pytest.mark.parametrize(
    ("source", "well"),
    [
        ({}, True),
        ({"unread": {}}, True),
        ({"unread": {"a.yaml": "not YAML"}}, False),
        ({"unread": {"": "there is no such directory"}}, False),
        ({"fetch": {"fetch_error": ""}}, True),
        ({"fetch": {"fetch_error": "cannot fetch"}}, False),
    ],
)
def test_what_is_read_well_is_all_of_it_and_of_today(source: dict[str, Any], well: bool) -> None:
    assert read_well(source) is well
