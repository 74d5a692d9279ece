"""Backups on top of each other, from the call to their removal, with real images."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import msgpack

from reconciler.core.ledger import Proof
from reconciler.handover import Carry, ToDaemon
from reconciler.orders import Order, Prove, Retain
from tests.e2e.site import Appliance, Site

MIB = 1 << 20


@pytest.fixture
def telling(tmp_path: Path, site: Site) -> Iterator[Appliance]:
    """The reference appliance, whose client tells the hub how it goes."""
    found = Appliance(tmp_path / "appliance", "--hub", f"http://127.0.0.1:{site.api}")
    site.appliance_at(found.url)
    yield found
    found.end()


def back_up(site: Site, run: str, code: int = 0, **backup: Any) -> str:
    vm = site.vm("ctx-1", [MIB, MIB], backup={"run": run, **backup}, keep={"full": 1})
    site.spec(vm)
    return site.apply("--wait", "--timeout", "60s", code=code)


def test_a_chain_is_shown_verified_not_built_on_when_damaged_and_removed(
    site: Site, telling: Appliance
) -> None:
    for key in (2000, 2001):
        telling.source("ctx-1", key, os.urandom(MIB))
    back_up(site, "r1", type="incremental", fallback="full")  # there is nothing to build on yet
    first = site.json("chain", "ctx-1")["chains"][0]["backups"][0]
    assert (first["run"], first["type"], first["state"]) == ("r1", "full", "COMPLETED")
    assert first["allocated"] >= 2 * MIB
    image = site.image("ctx-1")
    digest = subprocess.run(["sha256sum", image], check=True, capture_output=True, text=True)
    assert first["disks"][0]["digest"] == f"sha256:{digest.stdout.split()[0]}"
    assert first["disks"][0]["change_id"]
    assert "FellBack" in site.run("events", "ctx-1")

    back_up(site, "r2", type="incremental")
    said = site.run("chain", "ctx-1")
    assert "1 chain, 2 backups" in said
    assert "\n  r2 " in said  # below r1
    said = site.run("verify", "ctx-1", "--digests")
    assert said.count("digest: same") == 4
    assert "run r2 of ctx-1: digests verified: 4 images as published" in said
    assert site.run("chain", "ctx-1").count("digests verified ") == 2
    assert "what they hold was not compared" in site.run("verify", "ctx-1")
    assert "no run 'r9' (its newest backups: r2, r1)" in site.run(
        "verify", "ctx-1", "--run", "r9", code=64
    )

    with image.open("r+b") as file:
        file.seek(os.path.getsize(image) - 1)
        last = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last[0] ^ 1]))
    found = site.json("verify", "ctx-1", "--digests", code=1)
    assert [(one["run"], one["ok"]) for one in found["backups"]] == [("r1", False), ("r2", True)]
    assert found["next"] == "reconciler backup ctx-1 --run NEW --type full"
    said = site.run("verify", "ctx-1", code=1)  # by its tables, all is well
    assert "(found with --digests at " in said
    assert "where it was mended: reconciler verify ctx-1 --run r2 --digests" in said
    assert site.run("history", "ctx-1").count("verify FAILED") == 2
    assert "cannot be restored: disk 2000 was found damaged at" in site.run("chain", "ctx-1")
    assert "ChainBroken" in back_up(site, "r3", code=1, type="incremental")
    back_up(site, "r3", type="incremental", fallback="full")

    chains = site.json("chain", "ctx-1")["chains"]
    assert [[one["run"] for one in chain["backups"]] for chain in chains] == [["r1", "r2"], ["r3"]]
    assert [one["restorable"] for one in chains[0]["backups"]] == [False, False]
    said = site.run("retain", "ctx-1", "--dry-run")
    assert "- r1, r2: " in said
    assert "2 backups to remove: 4 images" in said
    assert "add -y" in site.run("retain", code=64)
    site.run("retain", "-y")
    left = sorted(path.name for path in (site.folder / "repository").rglob("*.qcow2"))
    assert left == ["r3.qcow2", "r3.qcow2"]
    assert "No backup is to be removed" in site.run("retain")
    stands = {
        one["run"]: one["removed"] for one in site.json("chain", "ctx-1")["chains"][0]["backups"]
    }
    assert None not in stands.values()
    assert "its images were removed" in site.run("verify", "ctx-1", "--run", "r1", code=1)


@pytest.mark.parametrize(
    "order",
    [
        Retain(vms=("ctx-1",), jobs=("a", "b")),
        Prove(
            vms=("ctx-1",),
            proofs=(Proof(job_id="a", kind="verify", at=1.0, ok=True, result="{}", who=""),),
        ),
    ],
)
def test_an_order_comes_to_a_daemon_as_it_was_given(order: Order) -> None:
    line = Carry(order=order, settings={}, command="c", lock_timeout=1.0)  # type: ignore[arg-type]
    assert msgpack.Decoder(ToDaemon).decode(msgpack.encode(line)) == line
