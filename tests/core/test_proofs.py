"""What looks at images have found is kept disk by disk, and no weaker look takes it back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from reconciler.core.ledger import Proof
from reconciler.core.proofs import (
    Finding,
    damage,
    digested,
    findings,
    merged,
    needs_digests,
    proof_of,
    stands,
    summary,
)
from reconciler.core.units import stamp
from tests.core.builders import NOW, says

SAME = {"digest": "same", "deep": True}
DIFFERS = {"digest": "differs", "deep": True, "wrong": ("its digest differs",)}
TABLES: dict[str, Any] = {}
TORN = {"wrong": ("2 errors were found",)}
GONE = {"wrong": ("it is missing",)}
GONE_DEEP = {"wrong": ("it is missing",), "deep": True}
UNTAKEN = {"digest": "none was taken"}


def a_look(*disks: dict[str, Any], at: float = NOW) -> Proof:
    found = [
        Finding(key=str(2000 + number), image=f"/r/{2000 + number}.qcow2", **one)
        for number, one in enumerate(disks)
    ]
    return proof_of("j", found, at, "me")


def after(*looks: tuple[dict[str, Any], ...]) -> Proof:
    """What is known after some looks, one second apart."""
    known: Proof | None = None
    for number, disks in enumerate(looks):
        known = merged(known, a_look(*disks, at=NOW + number))
    assert known is not None
    return known


@pytest.mark.parametrize(
    ("looks", "wrong"),
    [
        ([DIFFERS, TABLES], ["its digest differs"]),
        ([DIFFERS, TABLES, TABLES], ["its digest differs"]),
        ([DIFFERS, UNTAKEN], ["its digest differs"]),
        ([DIFFERS, GONE], ["its digest differs", "it is missing"]),
        ([DIFFERS, GONE, TABLES], ["its digest differs", "it is missing"]),
        ([GONE_DEEP, TABLES], ["it is missing"]),
        ([GONE_DEEP, GONE], ["it is missing"]),
        ([DIFFERS, SAME], []),
        ([DIFFERS, TABLES, SAME], []),
        ([DIFFERS, GONE, SAME], []),
        ([TORN, TABLES], []),
        ([TORN, SAME], []),
        ([GONE, UNTAKEN], []),
        ([SAME, TORN], ["2 errors were found"]),
    ],
)
def test_only_a_look_that_is_as_deep_takes_back_what_was_found(
    looks: list[dict[str, Any]], wrong: list[str]
) -> None:
    known = after(*((one,) for one in looks))
    assert list(findings(known)[0].wrong) == wrong
    assert known.ok is not bool(wrong)
    assert bool(damage(known, ["/r/2000.qcow2"])) is bool(wrong)


def test_what_is_kept_has_the_moment_in_which_it_was_found() -> None:
    known = after((DIFFERS,), (TABLES,))
    assert known.at == NOW + 1
    assert damage(known, ["/r/2000.qcow2"]) == (
        f"disk 2000 was found damaged at {stamp(NOW)}: its digest differs"
    )
    assert needs_digests(known)
    assert not needs_digests(after((TORN,)))


def test_the_disk_is_named_that_is_damaged_and_no_other() -> None:
    known = after((TABLES, GONE))
    assert damage(known, ["/r/2000.qcow2"]) == ""
    says(damage(known, ["/r/2000.qcow2", "/r/2001.qcow2"]), "disk 2001 was found", "is missing")
    assert "2000" not in damage(known, ["/r/2000.qcow2", "/r/2001.qcow2"])
    assert summary(known) == "disk 2001: it is missing"


@pytest.mark.parametrize(
    ("looks", "since", "word", "sentence"),
    [
        ([(SAME, SAME)], 0, "digests verified", "the digests of 2 images are those"),
        ([(SAME, SAME), (TABLES, TABLES)], 0, "digests verified", "compared last at"),
        ([(SAME, SAME), (SAME, SAME)], 1, "digests verified", "the digests of 2 images are those"),
        ([(TABLES, TABLES)], None, "tables checked", "digests were not compared"),
        ([(SAME, UNTAKEN)], None, "tables checked", "no digest was taken of disk 2001"),
        # What was damaged since is as good as the last look, which did not compare it.
        ([(SAME, SAME), (SAME, TORN), (TABLES, TABLES)], None, "tables checked", "not compared"),
    ],
)
def test_digests_that_were_compared_are_told_from_tables_that_were_checked(
    looks: list[tuple[dict[str, Any], ...]], since: int | None, word: str, sentence: str
) -> None:
    known = after(*looks)
    assert digested(known) == (0.0 if since is None else NOW + since)
    says(stands(known), word)
    says(summary(known), sentence)


def test_a_finding_of_an_older_version_counts_by_what_it_tells() -> None:
    def old(**disk: Any) -> Proof:
        disks = [{"key": "2000", "image": "/r/2000.qcow2", "wrong": [], "digest": "", **disk}]
        whole = a_look(TABLES)
        return replace(
            whole, ok=not disks[0]["wrong"], result=json.dumps({"disks": disks}), at=NOW - 9
        )

    differs = merged(old(wrong=["its digest differs"], digest="differs"), a_look(TABLES))
    assert not differs.ok
    says(damage(differs, ["/r/2000.qcow2"]), stamp(NOW - 9))
    assert merged(old(wrong=["it is missing"]), a_look(TABLES)).ok
    assert digested(merged(old(digest="same"), a_look(TABLES))) == NOW - 9
    bare = replace(a_look(), ok=False, result="{}")
    says(damage(bare, ["/r/2000.qcow2"]), "its images were found damaged at")
    assert summary(bare) == "its images are damaged"
