"""Asking for a run: who is meant, what comes of it, and the file that says so."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.core.asked import read as in_file
from reconciler.core.asked import unbegun
from reconciler.core.call import CallState
from reconciler.core.declared import MAX_NAME, MAX_WHO, NAME, CheckedRun
from reconciler.core.desired import build
from reconciler.core.ledger import Applied, Ledger
from reconciler.core.requests import (
    Verdict,
    keyed,
    labels,
    named,
    named_vm,
    one_line,
    problems,
    rendered,
    select,
    under_way,
    unlike,
    weigh,
    with_requests,
)
from reconciler.core.selector import parse as selector
from reconciler.core.spec import checked_run
from reconciler.core.spec_files import read
from tests.core.builders import (
    a_call,
    a_settings,
    a_vm,
    changed,
    document,
    known,
    lines,
    remembered,
    says,
)
from tests.core.builders import read as read_specs

S = CallState
INVENTORY: Final = "vms: {ctx-1: {vm: {path: /a}, disks: [{key: 2000, size: 1GiB}]}}"
OWN: Final = "vms: [{name: ctx-1, disks: inventory, backup: {run: own}}]\n"


def a_request(run: str = "new", kind: str = "full", vm: str = "ctx-1", by: str = "") -> CheckedRun:
    return checked_run(vm=vm, run=run, type=kind, by=by)


def weighed(
    asked: CheckedRun, state: CallState | None, *, ledger: Ledger | None = None, text: str = OWN
) -> Verdict:
    """What comes of asking, where the ledger has the run `new` as full in that state."""
    calls = [a_call(a_vm(run="new"), state, message="seen")] if state else []
    (verdict,) = weigh(
        [asked], read_specs(text), known(INVENTORY), ledger or remembered(calls=calls)
    )
    return verdict


# -- what comes of it


@pytest.mark.parametrize(
    ("state", "write", "refused", "words"),
    [
        (None, True, False, ["run new of ctx-1 is asked for"]),
        (S.DUE, True, False, ["run new of ctx-1 is asked for"]),
        (S.INTENDED, False, False, ["asked for already: it is INTENDED"]),
        (S.ACCEPTED, False, False, ["asked for already: it is ACCEPTED"]),
        (S.UNKNOWN, False, False, ["already: it is UNKNOWN", "reconciler explain ctx-1"]),
        (S.REJECTED, False, True, ["SNA site-a: seen", "reconciler retry ctx-1"]),
        (S.COMPLETED, False, False, ["COMPLETED already", "reconciler backup ctx-1 --run NEW"]),
        (S.FAILED, False, True, ["is FAILED: seen", "reconciler backup ctx-1 --run NEW"]),
        (S.CANCELLED, False, True, ["is CANCELLED: seen", "reconciler backup ctx-1 --run NEW"]),
    ],
)
def test_what_comes_of_asking_depends_on_how_the_run_stands(
    state: CallState | None, write: bool, refused: bool, words: list[str]
) -> None:
    verdict = weighed(a_request(), state)
    assert (verdict.write, verdict.refused) == (write, refused)
    says(verdict.said, *words)


@pytest.mark.parametrize("state", list(CallState))
def test_after_the_intent_a_run_is_of_one_type(state: CallState) -> None:
    verdict = weighed(a_request(kind="incremental"), state)
    open_to_change = state in (S.DUE, S.REJECTED)
    assert (verdict.write, verdict.refused) == (open_to_change, not open_to_change)
    if not open_to_change:
        says(verdict.said, "as incremental", "asked for as full", f"is {state}", "--run NEW")


@pytest.mark.parametrize("state", [None, S.DUE])
def test_what_counts_already_is_not_asked_for_twice(state: CallState | None) -> None:
    asks = "runs: [{vm: ctx-1, run: new}]"
    verdict = weighed(a_request(), state, text=OWN + asks)
    assert verdict == Verdict("run new of ctx-1 is asked for already")
    assert weighed(a_request("own"), None) == Verdict("run own of ctx-1 is asked for already")
    assert weighed(a_request(kind="incremental"), state, text=OWN + asks).write


def test_what_was_superseded_can_be_asked_for_again() -> None:
    text = OWN + "runs: [{vm: ctx-1, run: new}, {vm: ctx-1, run: newer}]"
    verdict = weighed(a_request(), S.DUE, text=text)
    assert verdict.write
    says(verdict.said, "in place of newer, which was not called")


def test_it_is_said_what_a_run_comes_before_and_waits_for() -> None:
    says(weighed(a_request(), None).said, "before own, which its spec asks for and which comes")
    ledger = remembered(calls=[a_call(a_vm(run="own"))])
    verdict = weighed(a_request(), None, ledger=ledger)
    assert verdict == Verdict(
        "run new of ctx-1 is asked for; it has its turn when run own, which is ACCEPTED, has ended",
        write=True,
    )


# -- what keeps it from being true


def found(*asked: CheckedRun, have: str = INVENTORY) -> tuple[list[str], list[str]]:
    """(VMs, problems) of what is asked for beside OWN."""
    files = {f"/runs/{one.vm}.yaml": rendered(one, "now") for one in asked}
    specs = with_requests(read_specs(OWN), files)
    desired = build(specs, known(have), a_settings(), remembered())
    desired = desired.only({one.vm for one in asked})
    return list(desired.vms), lines(problems(desired, files.keys()))


def test_a_request_that_can_be_made_true_has_no_problem() -> None:
    assert found(a_request()) == (["ctx-1"], [])


def test_a_request_that_cannot_has_no_line_that_is_not_written_yet() -> None:
    (names, wrong) = found(a_request(kind="incremental"), a_request(vm="ctx-2"))
    assert names == []
    assert all(one.startswith("error: ") for one in wrong)
    says(wrong[0], "there is no VM 'ctx-2'")
    says(wrong[1], "VM ctx-1: disk 2000 has no completed run")
    (names, wrong) = found(a_request(), have="vms: {}")
    says(wrong[0], "1:14 error: VM ctx-1: the inventory inventory.yaml does not know this VM")


# -- who is meant


def test_a_selector_means_the_vms_that_can_be_backed_up() -> None:
    specs = read_specs(
        "defaults: {disks: inventory, labels: {tier: gold}}\n"
        "vms:\n"
        "  - {name: a, backup: {run: r}}\n"
        "  - {name: b}\n"
        "  - {name: c, labels: {tier: silver}}\n"
        "  - {name: d, state: absent}\n"
        "  - {name: e, for: restore, of: {vm: a, run: r}}\n"
        "  - {name: f, backup: 3}\n"
    )
    selection = select(specs, selector("tier=gold"))
    assert selection.names == ("a", "b")
    assert selection.left_out.keys() == {"d", "e"}
    says(selection.left_out["d"], "`state: absent` (a.yaml:6:22)")
    assert labels(specs) == ["tier=gold", "tier=silver"]
    assert select(specs, selector("zone")).names == ()


# -- its words

texts = st.text(max_size=30) | st.sampled_from(
    ["{{ 7 }}", "true", "1e5", "0x1f", "a: b", "# c", "'"]
)


@given(
    vm=st.from_regex(NAME, fullmatch=True).filter(lambda name: len(name) <= MAX_NAME),
    run=st.sampled_from(["r1", "20261123", "1e5", "0x1f", "true", "null", "007"]),
    who=texts | st.text(min_size=MAX_WHO, max_size=MAX_WHO + 9),
)
def test_a_request_is_read_back_as_it_was_asked_for(vm: str, run: str, who: str) -> None:
    asked = a_request(run, "incremental", vm, one_line(who))
    text = rendered(asked, "now")
    back = read([], [document(text, "x.yaml")])
    assert back.diagnostics == ()
    assert [one.spec for one in back.runs] == [asked]
    (light,) = in_file(text, "x.yaml", 1.0) or []
    assert (light.vm, light.run, light.type, light.who) == (vm, run, "incremental", asked.by)
    assert text.startswith("# Written by `reconciler backup`, now.")


EDITED: Final = """\
runs:
  - {vm: ctx-1, run: r1}
  - {vm: ctx-2, run: 7, type: incremental, by: ann}
"""


def test_a_request_is_read_by_its_lines_and_one_that_was_edited_as_yaml(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = in_file(EDITED, "x.yaml", 5.0)
    assert [(one.vm, one.run, one.type, one.who) for one in found or ()] == [
        ("ctx-1", "r1", "full", ""), ("ctx-2", "7", "incremental", "ann"),
    ]  # fmt: skip
    assert in_file("runs: [", "x.yaml", 5.0) is None
    assert in_file("vms: []", "x.yaml", 5.0) is None
    monkeypatch.setattr("reconciler.core.document.parse", None)
    tags = {"a": "{{ b }}", "d": "e"}
    whole = checked_run(vm="ctx-1", run="r", by="ann", policy="p", tags=tags)
    (one,) = in_file(rendered(whole, "now"), "x.yaml", 5.0) or []
    since = "since 1970-01-01T00:00:05Z, and not begun"
    assert one.sentence == f"ctx-1: run r (full) is asked for by ann {since}"


def test_a_run_is_begun_when_it_was_applied_or_called() -> None:
    asked = in_file(EDITED, "x.yaml", 5.0) or []
    assert unbegun(asked, None) == asked
    assert unbegun(asked, remembered()) == asked
    assert unbegun(asked, remembered(calls=[a_call(run="r1")])) == asked[1:]
    assert unbegun(asked, remembered(calls=[a_call(run="r2")])) == asked
    applied = {"ctx-2": Applied(vm={"run": "7"}, generation=1, at=1.0)}
    assert unbegun(asked, remembered(applied=applied)) == asked[:1]


def test_a_run_is_named_by_the_moment() -> None:
    values = {"date": "2026-11-24", "time": "013000"}
    assert named("nightly-{date}", values) == "nightly-2026-11-24"
    assert named("{date}.{time}-{date}", values) == "2026-11-24.013000-2026-11-24"
    assert named("plain", values) == "plain"
    with pytest.raises(ValueError, match=r"cannot use \{day\} in the name of a run") as caught:
        named("x-{day}", values)
    says(str(caught.value), "{date} and {time}")


# -- what a scheduler asks for

_LINE: Final = st.text(max_size=40).filter(str.isprintable)


@given(policy=_LINE, tags=st.dictionaries(_LINE.filter(bool), _LINE, max_size=5))
def test_what_a_scheduler_says_comes_back_whatever_it_is(policy: str, tags: dict[str, str]) -> None:
    """Also what looks like an expression, a number, or nothing at all."""
    asked = checked_run(vm="ctx-1", run="r", policy=policy, tags=tags)
    (found,) = with_requests(read_specs(OWN), {"runs/ctx-1.yaml": rendered(asked, "now")}).runs
    assert found.spec == asked


def test_a_key_is_a_run_of_one_vm() -> None:
    assert keyed("ctx-1", "k") == keyed("ctx-1", "k")
    assert len({keyed("ctx-1", "k"), keyed("ctx-1", "l"), keyed("ctx-2", "k")}) == 3
    assert NAME.fullmatch(keyed("ctx-1", "\n"))


@pytest.mark.parametrize(
    ("name", "found"),
    [("ctx-1", ["ctx-1"]), ("db", ["ctx-2", "ctx-3"]), ("own", ["ctx-1"]), ("a", ["a"]), ("", []),
     ("other", []), ("ctx-9", [])],
)  # fmt: skip
def test_a_name_is_a_context_before_it_is_a_name_in_vcenter(name: str, found: list[str]) -> None:
    """The spec's name goes before the inventory's."""
    inventory = known(
        "vms: {ctx-1: {vm: {name: other, path: /a}, disks: []}, "
        "ctx-2: {vm: {name: db, path: /b}, disks: []}, "
        "ctx-3: {vm: {name: db, path: /c}, disks: []}, "
        "a: {vm: {name: ctx-1, path: /d}, disks: []}}"
    )
    specs = read_specs("vms: [{name: ctx-1, disks: inventory, vm: {name: own}}]")
    assert named_vm(name, specs, inventory) == found


@pytest.mark.parametrize(
    ("state", "found"),
    [(None, "own"), (S.DUE, "own"), (S.ACCEPTED, "own"), (S.UNKNOWN, "own"), (S.REJECTED, ""),
     (S.COMPLETED, ""), (S.FAILED, ""), (S.CANCELLED, "")],
)  # fmt: skip
def test_a_run_is_under_way_until_it_has_ended(state: CallState | None, found: str) -> None:
    calls = [a_call(a_vm(run="own"), state)] if state else []
    ledger = remembered(calls=calls)
    assert under_way("ctx-1", read_specs(OWN), known(INVENTORY), ledger) == found
    active = remembered(calls=[*calls, a_call(a_vm(run="other"), S.ACCEPTED)])
    assert under_way("ctx-1", read_specs(OWN), known(INVENTORY), active) in (found, "other")
    assert under_way("ctx-2", read_specs(OWN), known(INVENTORY), ledger) == ""


def test_what_a_request_asks_for_is_not_unlike_what_is_declared() -> None:
    declared = a_vm(place="/srv/specs/a.yaml:2:5")
    asked = a_vm(run="new", type="incremental", place="specs/a.yaml:2:5", asked="ada",
                 run_place="/state/runs/ctx-1.yaml:3:5")  # fmt: skip
    assert not unlike(declared, replace(declared, place="specs/a.yaml:2:5"), "/state/runs")
    assert not unlike(declared, asked, "/state/runs")
    by_hand = replace(asked, run_place="/elsewhere/runs.yaml:3:5")
    assert unlike(declared, by_hand, "/state/runs"), "no request that who watches would read"
    for other in (replace(asked, labels={"tier": "gold"}), changed(asked, size=512)):
        assert unlike(declared, other, "/state/runs")
