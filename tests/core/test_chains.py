"""Runs as the chains that they form, and what of them can be restored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

from reconciler.cli.chains import _text
from reconciler.core.call import Call, CallState
from reconciler.core.chains import (
    chains_of,
    document,
    in_order,
    newest_completed,
    of_run,
    path_to,
    taken,
)
from reconciler.core.ledger import Archived, DiskReport, Kept, Ledger, Proof, Shelf
from tests.core.builders import GIB, NOW, a_call, a_vm, an_export, remembered

S = CallState


def a_run(
    run: str, on: str | None = None, *, at: float = 0.0, disks: int = 2, **changes: Any
) -> Call:
    """A completed run, an overlay on another one if that is named."""
    exports = tuple(
        an_export(
            position=position,
            run=run,
            backing=an_export(position=position, run=on).image if on else None,
        )
        for position in range(disks)
    )
    values: dict[str, Any] = {
        "run": run,
        "exports": exports,
        "type": "incremental" if on else "full",
        "ended": NOW + at,
        "changed": NOW + at,
        **changes,
    }
    return a_call(a_vm(), values.pop("state", S.COMPLETED), **values)


def shelf(
    calls: Iterable[Call],
    *,
    removed: Mapping[str, float] | None = None,
    damaged: Sequence[str] = (),
) -> Shelf:
    """Each disk takes 1 MiB and was reported with a change id."""
    found = {}
    for call in calls:
        gone = (removed or {}).get(call.run, 0.0)
        proofs = {}
        if call.run in damaged:
            proofs["verify"] = Proof(
                job_id=call.job_id, kind="verify", at=NOW, ok=False, result="{}", who=""
            )
        found[call.job_id] = Kept(
            archived={
                e.position: Archived(
                    job_id=call.job_id,
                    position=e.position,
                    size=GIB,
                    allocated=1 << 20,
                    digest="",
                    at=call.ended,
                    removed=gone,
                )
                for e in call.exports
            },
            reports={
                e.position: DiskReport(
                    job_id=call.job_id,
                    position=e.position,
                    change_id=f"{call.run}/{e.position}",
                    bytes=1 << 20,
                    at=call.ended,
                )
                for e in call.exports
            },
            proofs=proofs,
        )
    return Shelf(lambda jobs: {job: found[job] for job in jobs if job in found})


def a_ledger(*calls: Call, **changes: Any) -> Ledger:
    return remembered(calls=calls, shelf=shelf(calls, **changes))


TREE = (
    a_run("f1", at=1),
    a_run("i1", "f1", at=2),
    a_run("i2", "i1", at=3),
    a_run("f2", at=4),
    a_run("side", "f1", at=5),
)


def test_a_chain_is_a_full_run_and_all_that_was_built_on_it() -> None:
    found = chains_of(a_ledger(*TREE), "ctx-1")
    assert [[one.run for one in chain.backups] for chain in found] == [
        ["f2"],
        ["f1", "i1", "i2", "side"],
    ], "the one with the newest backup comes last"
    assert [(depth, one.run) for depth, one in in_order(found[-1])] == [
        (0, "f1"),
        (1, "i1"),
        (2, "i2"),
        (1, "side"),
    ]
    newest = newest_completed(found)
    assert newest is not None
    assert newest.run == "side"
    chain = of_run(found, "i2")
    assert chain is not None
    assert [one.run for one in path_to(chain, "i2")] == ["f1", "i1", "i2"]


def test_a_chain_says_what_its_images_take() -> None:
    ledger = a_ledger(*TREE, removed={"side": NOW + 9})
    chain = chains_of(ledger, "ctx-1")[-1]
    assert (chain.allocated, len(chain.kept), len(chain.completed)) == (6 << 20, 3, 4)
    one = chains_of(ledger, "ctx-1", key=2001)[-1]
    assert (one.allocated, one.full.size) == (3 << 20, GIB)
    assert [disk.change_id for disk in one.full.disks] == ["f1/1"]


def test_what_nobody_has_measured_is_not_nothing() -> None:
    known, unknown = a_run("f1", at=1), a_run("f2", at=2)
    gone = a_run("f3", at=3)
    old = Archived(job_id="", position=0, size=0, allocated=0, digest="", at=0, removed=NOW)
    kept = {
        known.job_id: shelf([known]).get(known.job_id),
        gone.job_id: Kept(archived={0: old, 1: old}),
    }
    found = remembered(
        calls=(known, unknown, gone),
        shelf=Shelf(lambda jobs: {job: kept[job] for job in jobs if job in kept}),
    )
    one, two, three = chains_of(found, "ctx-1")
    assert (taken([one]), one.unmeasured) == ("2 MiB", 0)
    assert (taken([two]), two.unmeasured, two.full.allocated) == ("size unknown", 1, None)
    assert taken([one, two]) == "at least 2 MiB (of 1 of 2 backups it is not known)"
    assert (three.full.allocated, three.unmeasured) == (None, 0), "it was removed"
    assert taken([]) == "0 bytes"
    assert "1 more of which nothing is kept" in _text("ctx-1", (one, two, three), colour=False)
    assert _text("ctx-1", (one, two, three), colour=False).startswith("ctx-1   2 chains, 2 back")


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({}, {}),
        (
            {"removed": {"i1": NOW}},
            {
                "i1": "its images were removed at 2027-01-15T08:00:00Z",
                "i2": "run i1: its images were removed at 2027-01-15T08:00:00Z",
            },
        ),
        (
            {"damaged": ["f1"]},
            {
                "f1": "its images were found damaged at 2027-01-15T08:00:00Z",
                "i1": "run f1: its images were found damaged at 2027-01-15T08:00:00Z",
                "i2": "run f1: its images were found damaged at 2027-01-15T08:00:00Z",
                "side": "run f1: its images were found damaged at 2027-01-15T08:00:00Z",
            },
        ),
    ],
)
def test_what_is_missing_below_a_run_is_missing_in_it(
    changes: dict[str, Any], lacking: dict[str, str]
) -> None:
    found = chains_of(a_ledger(*TREE, **changes), "ctx-1")
    assert {b.run: b.lacks for chain in found for b in chain.backups if b.lacks} == lacking


def test_a_run_under_way_hangs_below_its_parent_and_is_no_backup() -> None:
    active = a_run("i3", "i2", state=S.ACCEPTED, ended=0.0)
    ledger = a_ledger(*TREE, active, a_run("lost", "f1", state=S.FAILED))
    chain = of_run(chains_of(ledger, "ctx-1"), "i3")
    assert chain is not None
    assert [one.run for one in chain.backups] == ["f1", "i1", "i2", "side", "i3"]
    assert (chain.backups[2].children, chain.backups[-1].lacks) == (("i3",), "it is ACCEPTED")
    assert "i3" not in [one.run for one in chain.completed]


def test_an_image_below_that_is_of_no_run_is_named() -> None:
    call = a_run("r1", exports=(an_export(run="r1", backing="/elsewhere/base.qcow2"),))
    (chain,) = chains_of(a_ledger(call), "ctx-1")
    assert (chain.full.base, chain.full.parents) == ("/elsewhere/base.qcow2", ())


def test_the_document_has_the_tree_and_its_sizes() -> None:
    value = document("ctx-1", chains_of(a_ledger(*TREE), "ctx-1"), "hub-a")
    assert (value["format_version"], value["hub"], value["vm"]) == ("1.0", "hub-a", "ctx-1")
    first = value["chains"][-1]
    assert (first["full"], first["count"], first["allocated"]) == ("f1", 4, 8 << 20)
    run = first["backups"][1]
    assert (run["parents"], run["children"], run["restorable"]) == (["f1"], ["i2"], True)
    assert run["disks"][1] == {
        "key": "2001",
        "position": 1,
        "image": "/backup/ctx-1/2001/i1.qcow2",
        "backing": "/backup/ctx-1/2001/f1.qcow2",
        "size": GIB,
        "allocated": 1 << 20,
        "digest": None,
        "change_id": "i1/1",
        "bytes": 1 << 20,
    }
