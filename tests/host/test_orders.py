"""What an operator orders about what is remembered, on a real store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from reconciler.core.call import Call, CallEvent, CallState
from reconciler.core.chains import broken, chains_of
from reconciler.core.chains import document as chain_document
from reconciler.core.errors import HostError, UsageError
from reconciler.core.history import document
from reconciler.core.ledger import RESTORE, Proof
from reconciler.core.proofs import Finding, proof_of
from reconciler.core.units import stamp
from reconciler.handover import AnyOrder
from reconciler.host.store import Store, events, proofs
from reconciler.look import Observer
from reconciler.orders import Pause, Prove, Resume, Retry
from tests.core.builders import a_call, a_vm
from tests.core.test_chains import a_run

NOW = 1_800_000_000.0
E = CallEvent


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(tmp_path, "h")
    found.apply({}, {name: {} for name in ("ctx-1", "ctx-2")}, NOW)
    yield found
    found.close()


def do(store: Store, order: AnyOrder) -> list[str]:
    return order.carry_out(store, "reconciler pause (jo)", NOW, cast(Observer, None))


def paused(store: Store) -> dict[str, Any]:
    return {name: (one.reason, one.until) for name, one in store.ledger().pauses.items()}


def test_a_pause_is_written_down_and_another_takes_its_place(store: Store, tmp_path: Path) -> None:
    said = do(store, Pause(vms=("ctx-1", "ctx-2"), reason="swap", until=NOW + 60))
    assert said[:2] == [
        "ctx-1 is paused until 2027-01-15T08:01:00Z: swap",
        "ctx-2 is paused until 2027-01-15T08:01:00Z: swap",
    ]
    assert said[2].endswith("reconciler resume ctx-1 ctx-2")
    do(store, Pause(vms=("ctx-1",), reason="longer"))
    assert paused(store) == {"ctx-1": ("longer", 0.0), "ctx-2": ("swap", NOW + 60)}
    (last, _) = events(tmp_path, "ctx-1")
    assert (last.reason, last.message, last.who) == (
        "Paused", "paused: longer", "reconciler pause (jo)",
    )  # fmt: skip


def test_what_is_resumed_is_said(store: Store) -> None:
    do(store, Pause(vms=("ctx-1",), reason="swap"))
    assert do(store, Resume(vms=("ctx-1", "ctx-2"))) == [
        "ctx-1 is resumed",
        "ctx-2 was not paused",
    ]
    assert paused(store) == {}
    assert do(store, Resume(every=True)) == ["no VM was paused"]


def test_while_every_vm_is_paused_none_can_be_resumed_by_its_name(store: Store) -> None:
    do(store, Pause(every=True, reason="kernel", vms=("ctx-1", "ctx-2")))
    with pytest.raises(HostError, match="kernel; for all: reconciler resume --all"):
        do(store, Resume(vms=("ctx-1",)))
    assert paused(store) == {"*": ("kernel", 0.0)}
    do(store, Pause(vms=("ctx-1",), reason="mine"))
    one, still = do(store, Resume(vms=("ctx-1",)))
    assert one == "ctx-1 is resumed"
    assert "nothing is changed before reconciler resume --all" in still
    do(store, Pause(vms=("ctx-1",), reason="mine"))
    assert do(store, Resume(every=True)) == ["every VM is resumed", "ctx-1 is resumed"]
    assert paused(store) == {}


def test_a_pause_of_every_vm_that_is_over_holds_none(store: Store) -> None:
    do(store, Pause(every=True, reason="kernel", until=NOW - 1))
    assert do(store, Resume(vms=("ctx-1",))) == ["ctx-1 was not paused"]


@pytest.mark.parametrize(
    "order", [Pause(vms=("ctx-1", "ctx-3"), reason="x"), Resume(vms=("ctx-3",))]
)
def test_a_vm_that_nobody_knows_is_refused_and_nothing_is_done(
    store: Store, order: AnyOrder
) -> None:
    with pytest.raises(UsageError, match=r"no VM 'ctx-3'; did you mean 'ctx-[12]'\?"):
        do(store, order)
    assert paused(store) == {}


def test_what_was_found_of_a_run_is_kept_and_told(store: Store, tmp_path: Path) -> None:
    call = a_call(hub="h")
    store.hold([], call)
    for ok, reason in ((False, "RestoreFailed"), (True, "RestorePassed")):
        found = Proof(
            job_id=call.job_id, kind=RESTORE, at=NOW, ok=ok, result='{"summary": "2 disks"}', who=""
        )
        do(store, Prove(vms=("ctx-1",), proofs=(found,)))
        kept = proofs(tmp_path, call.job_id)["restore"]
        assert kept == replace(found, who="reconciler pause (jo)")
        last = events(tmp_path, "ctx-1")[0]
        assert (last.reason, last.run, last.message) == (
            reason,
            call.run,
            f"run {call.run}, restore: 2 disks",
        )


def looked(run: Call, *, wrong: str = "", deep: bool = False) -> Proof:
    """A look at both disks of a run; `wrong`: of the second one."""
    found = [
        Finding(
            key=str(one.key),
            image=one.image,
            wrong=(wrong,) if wrong and one.position else (),
            digest="" if not deep else "differs" if wrong and one.position else "same",
            deep=deep,
        )
        for one in run.exports
    ]
    return proof_of(run.job_id, found, NOW, "")


def test_what_verify_found_is_said_alike_by_history_chain_and_events(
    store: Store, tmp_path: Path
) -> None:
    full, above = a_run("f1", at=1), a_run("i1", "f1", at=2)
    for call in (full, above):
        store.remember(replace(call, hub="h"))

    def told() -> list[tuple[str, str, bool, bool, str]]:
        """By the event, the history and the chain, of each run."""
        ledger = store.ledger()
        chains = chains_of(ledger, "ctx-1")
        kept = {
            job: one.proofs for job, one in ledger.shelf.of([full.job_id, above.job_id]).items()
        }
        value = document("ctx-1", [full, above], 2, "h", NOW, kept, broken(chains))
        (chain,) = chain_document("ctx-1", chains, "h")["chains"]
        said = {one.run: one for one in reversed(events(tmp_path, "ctx-1"))}
        return [
            (
                one["run"],
                said[one["run"]].reason,
                one["proofs"]["verify"]["ok"],
                two["proofs"]["verify"]["ok"],
                one["proofs"]["verify"]["summary"],
            )
            for one, two in zip(value["runs"], chain["backups"], strict=True)
        ]

    bad, well = looked(full, wrong="its digest differs", deep=True), looked(above, deep=True)
    do(store, Prove(vms=("ctx-1",), proofs=(bad, well)))
    damage = f"disk 2001 was found damaged at {stamp(NOW)}: its digest differs"
    failed = [
        ("f1", "VerifyFailed", False, False, "disk 2001: its digest differs"),
        ("i1", "VerifyFailed", False, False, f"run f1: {damage}"),
    ]
    assert told() == failed
    do(store, Prove(vms=("ctx-1",), proofs=(looked(full), looked(above))))
    assert told() == failed, "a look at tables alone takes nothing back"
    do(store, Prove(vms=("ctx-1",), proofs=(looked(full, deep=True), looked(above, deep=True))))
    passed = "the digests of 2 images are those that were published"
    assert told() == [
        ("f1", "VerifyPassed", True, True, passed),
        ("i1", "VerifyPassed", True, True, passed),
    ]


@pytest.mark.parametrize(
    ("events", "hint"),
    [
        ([E.INTEND, E.ACCEPT], "reconciler resolve ctx-1 --failed --reason WHY (or --completed)"),
        ([E.INTEND, E.UNCLEAR], "reconciler resolve ctx-1 --accepted --reason WHY (or "),
        ([E.INTEND, E.ACCEPT, E.END], "for another: reconciler backup ctx-1 --run NEW"),
    ],
)
def test_what_cannot_be_asked_for_again_says_what_can_be_done(
    store: Store, events: list[CallEvent], hint: str
) -> None:
    run = replace(a_call(a_vm(), CallState.DUE), hub="h")
    store.hold([], run)
    for event in events:
        run = store.advance(run, event, 2.0)
    with pytest.raises(HostError) as refused:
        do(store, Retry(vms=("ctx-1",)))
    assert hint in str(refused.value)
