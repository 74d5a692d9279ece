"""A run whose SNA does not answer begins nothing; which layer failed, and what to type next."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from reconciler.core.actual import Actual
from reconciler.core.appliances import (
    UNREACHABLE,
    Health,
    Holder,
    layer,
    near_end,
    needed,
    next_of,
    rest,
    trouble,
    unbegun,
)
from reconciler.core.call import CallState
from reconciler.core.desired import Vm
from reconciler.core.ledger import Ledger, Pause
from reconciler.core.plan import plan
from reconciler.core.status import by_type, conditions
from reconciler.loop import Outcome
from tests.core.builders import (
    NOW,
    a_call,
    a_lease,
    a_restore,
    a_server,
    a_settings,
    a_vm,
    absent,
    an_export,
    an_image,
    brief,
    only,
    remembered,
    says,
    seen,
    wanting,
)

DOWN = Health(kind="refused", said="connection refused", here=True)
WELL = Health(status=200, took=0.01)
SSHD = Holder(pid=71, name="sshd", user="tunnel", peer="192.0.2.7:51000", since=1_700_000_000.0)
SESSION = replace(SSHD, name="sshd-session")
STRANGER = Holder(pid=72, name="python3", user="app", since=1_700_000_000.0)
HIDDEN = Holder(user="tunnel")
URL = "http://127.0.0.1:9081"


def unwell(**changes: Any) -> Actual:
    return seen(appliances={"site-a": DOWN}, **changes)


def test_a_run_that_is_to_begin_waits_and_nothing_else_is_done() -> None:
    vm = a_vm(disks=2)
    found = plan(wanting(vm), unwell(), remembered(), NOW)
    wait = only(found)
    assert brief(found) == [("wait", None, UNREACHABLE)]
    says(wait.why, f"SNA site-a at {URL}: tunnel: nothing listens there", "; next: ")
    says(next_of(wait.why), "reconciler explain tunnel/", "reconciler doctor --only tunnel")
    assert found.vms[0].ports == {}
    well = plan(wanting(vm), seen(appliances={"site-a": WELL}), remembered(), NOW)
    assert {kind for kind, *_ in brief(well)} == {"create", "start", "call"}


def test_each_vm_waits_for_its_own_sna_and_takes_nothing_from_the_others() -> None:
    base = a_settings("10100-10101")
    settings = replace(base, snas={**base.snas, "site-b": base.snas["site-a"]})
    desired = wanting(a_vm("ctx-1", disks=2), a_vm("ctx-2", disks=2, sna="site-b"),
                      settings=settings)  # fmt: skip
    found = plan(desired, seen(appliances={"site-a": DOWN, "site-b": WELL}), remembered(), NOW)
    assert brief(found.vms[0].actions) == [("wait", None, UNREACHABLE)]
    assert {"start", "call"} < {kind for kind, *_ in brief(found.vms[1].actions)}


def test_what_is_not_needed_does_not_wait() -> None:
    restore = replace(a_restore(), sna="site-a")  # as by the `defaults` of its file
    images = [an_image(export, pristine=False) for export in restore.exports]
    kinds = {kind for kind, *_ in brief(plan(wanting(restore), unwell(images=images),
                                             remembered(), NOW))}  # fmt: skip
    assert kinds == {"start"}
    assert plan(wanting(absent()), unwell(), remembered(), NOW).actions == ()
    assert needed([restore, absent()], remembered(), (), (), NOW) == set()


def test_an_sna_that_was_not_asked_keeps_nobody() -> None:
    found = plan(wanting(a_vm()), seen(), remembered(), NOW)
    assert UNREACHABLE not in {action.cause for action in found.actions}


BEGUN: dict[str, tuple[Ledger, Actual]] = {
    "a lease": (remembered([a_lease(started=False)]), unwell()),
    "a claim": (remembered(), unwell(claims={("ctx-1", "r1"): "state-1"})),
    "a server": (remembered(calls=[a_call(state=CallState.DUE)]), unwell(servers=[a_server()])),
    **{
        f"a call that is {state}": (remembered(calls=[a_call(state=state)]), unwell())
        for state in CallState
        if state not in (CallState.DUE, CallState.REJECTED)
    },
}


@pytest.mark.parametrize("what", BEGUN)
def test_what_was_begun_goes_on(what: str) -> None:
    ledger, actual = BEGUN[what]
    found = plan(wanting(a_vm()), actual, ledger, NOW)
    assert UNREACHABLE not in {action.cause for action in found.actions}
    served = {(server.mark.vm, server.mark.run) for server in actual.servers}
    assert not unbegun(a_vm(), ledger, actual.claims, served)


@pytest.mark.parametrize("state", [CallState.DUE, CallState.REJECTED])
def test_a_call_without_anything_that_was_made_is_still_to_begin(state: CallState) -> None:
    ledger = remembered(calls=[a_call(state=state)])
    assert unbegun(a_vm(), ledger, (), ())
    assert brief(plan(wanting(a_vm()), unwell(), ledger, NOW)) == [("wait", None, UNREACHABLE)]


def test_what_an_earlier_run_left_is_cleared_meanwhile() -> None:
    """Its ports are for others; only of the new run nothing is begun."""
    old = a_vm(run="r0")
    ledger = remembered([a_lease(old.exports[0])], [a_call(old, CallState.COMPLETED)])
    actual = unwell(servers=[a_server(old.exports[0])])
    found = brief(plan(wanting(a_vm()), actual, ledger, NOW))
    assert found == [("stop", 2000, "RunOver"), ("wait", None, UNREACHABLE)]


def test_a_run_after_an_active_one_waits_for_that_one_first() -> None:
    old = a_vm(run="r0")
    ledger = remembered([a_lease(old.exports[0])], [a_call(old)])
    actual = unwell(servers=[a_server(old.exports[0])], images=[an_image(old.exports[0])])
    assert only(plan(wanting(a_vm()), actual, ledger, NOW)).cause == "RunActive"


def test_what_a_person_has_to_mend_is_told_though_the_sna_is_away() -> None:
    wrong = an_image(size=512)
    found = only(plan(wanting(a_vm()), unwell(images=[wrong]), remembered(), NOW))
    assert (found.kind, found.cause) == ("refuse", "SizeMismatch")


def test_nobody_is_asked_for_a_vm_that_is_paused() -> None:
    pause = Pause(vm="ctx-1", reason="why", since=NOW)
    assert needed([a_vm()], remembered(), (), (), NOW) == {"site-a"}
    assert needed([a_vm()], remembered(pauses={"ctx-1": pause}), (), (), NOW) == set()


# -- status, and the exit code


def told(vm: Vm, actual: Actual, ledger: Ledger) -> dict[str, tuple[str, str]]:
    (one,) = plan(wanting(vm), actual, ledger, NOW).vms
    found = by_type(conditions(one, actual, ledger))
    return {kind: (one.status, one.reason) for kind, one in found.items()}


def test_it_is_pending_and_not_stalled() -> None:
    """Also for who may not ask, and knows what was found last."""
    why = trouble("site-a", URL, DOWN)
    remembered_so = remembered(failures={"ctx-1": (UNREACHABLE, why)})
    asked = told(a_vm(), unwell(), remembered_so)
    assert asked["Ready"] == ("False", UNREACHABLE)
    assert asked["Reconciling"] == ("True", UNREACHABLE)
    assert asked["Stalled"] == ("False", "NotStalled")
    assert asked["Notified"] == ("False", "NotYet")
    assert told(a_vm(), seen(appliances=None), remembered_so) == asked
    one = only(plan(wanting(a_vm()), seen(appliances=None), remembered_so, NOW))
    assert one.why == why
    # An answer that is known counts, whatever was found before.
    fresh = plan(wanting(a_vm()), seen(appliances={"site-a": WELL}), remembered_so, NOW)
    assert {kind for kind, *_ in brief(fresh)} == {"create", "start", "call"}


def test_another_failure_of_the_last_apply_is_no_gate() -> None:
    ledger = remembered(failures={"ctx-1": ("StartFailed", "no")})
    found = plan(wanting(a_vm()), seen(appliances=None), ledger, NOW)
    assert UNREACHABLE not in {action.cause for action in found.actions}


def test_to_wait_is_partial_also_where_nothing_converged() -> None:
    assert Outcome(plan(wanting(a_vm()), unwell(), remembered(), NOW)).exit_code() == 3


# -- which layer


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (DOWN, ["tunnel: nothing listens there", "no tunnel of this SNA is up"]),
        (Health(kind="closed", said="the connection broke", here=True), ["any more"]),
        (Health(kind="refused", said="connection refused"), ["network: connection refused"]),
        (Health(kind="connect", said="no connection in time"), ["network: no connection in time"]),
        (Health(kind="timeout", said="no answer in time"), ["appliance: it accepts", "no answer"]),
        (Health(kind="timeout", said="no answer in time", here=True, holder=STRANGER),
         ["port: python3 (pid 72, user app, since 2023-11-14T", "no sshd"]),
        (Health(status=502, here=True, holder=STRANGER), ["answers 502", "pid 72", "no sshd"]),
        (Health(status=503, here=True, holder=SSHD), ["HTTP: it answers 503", "not well"]),
        (Health(kind="timeout", said="no answer in time", here=True, holder=SSHD),
         ["sshd (pid 71, user tunnel, from 192.0.2.7:51000, since 2023-11-14T22:13:20Z)",
          "no answer in time", "a stale session"]),
        (Health(kind="closed", said="…", here=True, holder=SESSION),
         ["sshd-session (pid 71", "closes each connection at once", "a stale session"]),
        (Health(kind="closed", said="…", here=True, holder=HIDDEN),
         ["a process of user tunnel that is not ours to see", "a stale session"]),
        (Health(kind="dns", said="name or service not known"), ["name: it cannot be resolved"]),
        (Health(kind="tls", said="certificate verify failed"), ["TLS: certificate verify failed"]),
        (Health(status=401), ["token: it answers 401", "does not let us in"]),
        (Health(status=403, here=True, holder=SSHD), ["token: it answers 403"]),
        (Health(status=302), ["HTTP: it answers 302"]),
    ],
)  # fmt: skip
def test_the_layer_that_failed(found: Health, words: list[str]) -> None:
    assert not found.well
    says(layer(found), *words)
    says(trouble("site-a", URL, found), f"SNA site-a at {URL}: {layer(found)}; next: ")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (DOWN, ["on the SNA reconciler status", "here reconciler doctor --only tunnel"]),
        (Health(kind="timeout", here=True, holder=SSHD), ["reconciler doctor --only tunnel"]),
        (Health(kind="timeout", here=True, holder=STRANGER), ["ps -fp 72"]),
        (Health(status=401), ["snas: {site-a: {token: …}}", "reconciler doctor --only sna"]),
        (Health(kind="dns"), ["reconciler doctor --only sna"]),
        (Health(kind="tls"), ["reconciler doctor --only sna"]),
    ],
)
def test_what_to_type_next(found: Health, words: list[str]) -> None:
    says(next_of(trouble("site-a", URL, found)), *words)


@pytest.mark.parametrize(
    ("url", "end"),
    [
        ("http://127.0.0.1:9081", ("127.0.0.1", 9081)),
        ("http://localhost", ("127.0.0.1", 80)),
        ("https://[::1]/", ("::1", 443)),
        ("http://127.8.0.1:1", ("127.8.0.1", 1)),
        ("http://192.0.2.7:9081", None),
        ("https://sna.example", None),
    ],
)
def test_a_url_that_names_this_machine(url: str, end: tuple[str, int] | None) -> None:
    assert near_end(url) == end


def test_an_sna_that_is_away_is_asked_more_and_more_rarely() -> None:
    assert [rest(failures) for failures in range(1, 8)] == [5, 5, 8, 16, 30, 30, 30]


def test_an_export_of_another_run_is_not_this_one() -> None:
    lease = a_lease(an_export(run="r0"))
    assert unbegun(a_vm(), remembered([lease]), {("ctx-1", "r0")}, {("ctx-1", "r0")})
