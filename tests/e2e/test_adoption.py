"""What another process left half done, or what it alone remembered, and how the next goes on."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path
from typing import Final

import pytest

from reconciler.core.ledger import Lease
from tests.e2e import crashes
from tests.e2e.site import Appliance, Site
from tests.nbd_client import Client

MIB: Final = 1 << 20
APPLY: Final = ("apply", "-y")


def leases(site: Site) -> dict[tuple[str, int, str, int], Lease]:
    known = crashes.ledger(site)
    assert known is not None
    return {lease.key: lease for lease in known.leases}


def ports(site: Site) -> dict[int, int]:
    """Disk key → leased port."""
    return {lease.disk: lease.port for lease in leases(site).values()}


def forget_leases(site: Site) -> None:
    db = sqlite3.connect(site.folder / "state" / "state.db")
    with db:
        db.execute("DELETE FROM leases")
    db.close()


def state_of(site: Site) -> str:
    return str(crashes.calls(site)["ctx-1"].state)


def test_a_lease_without_a_server_is_served_on_its_port(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    crashes.crash(site, ("--at", "LEASE:after:1"), APPLY)
    leased = ports(site)
    assert (len(leased), site.listening(), site.servers()) == (2, set(), {})
    site.apply()
    assert {mark.disk: mark.port for mark in site.servers().values()} == leased
    assert ports(site) == leased
    assert len(appliance.starts()) == 1


def test_a_server_without_a_lease_is_taken_in_and_its_client_notices_nothing(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply()
    pids, leased = site.pids(), ports(site)
    with Client(leased[2000], "ctx-1-r1-disk0") as client:
        client.write(0, b"before" * 1000)
        forget_leases(site)
        planned = [(one["disk"], one["action"]) for one in crashes.plan(site)]
        assert planned == [("2000", "adopt"), ("2001", "adopt")]
        site.apply()
        client.write(6000, b"after!" * 1000)
        assert client.read(0, 12000) == b"before" * 1000 + b"after!" * 1000
        client.leave()
    assert (site.pids(), ports(site)) == (pids, leased)
    assert crashes.plan(site) == []
    assert len(appliance.starts()) == 1


def test_an_image_without_a_lease_is_served_and_not_made_anew(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    crashes.crash(site, ("--at", "IMAGE:after:1"), APPLY)
    forget_leases(site)
    made = site.image("ctx-1").stat().st_ino
    site.apply()
    assert site.image("ctx-1").stat().st_ino == made
    assert len(site.servers()) == len(leases(site)) == 1
    assert len(appliance.starts()) == 1


@pytest.mark.parametrize("point", ["INTENT:after:1", "MARKER:after:1", "POST:before:1"])
def test_a_call_that_was_only_intended_is_unknown_and_a_person_says_how_it_goes_on(
    site: Site, appliance: Appliance, point: str
) -> None:
    site.spec(site.vm("ctx-1"))
    crashes.crash(site, ("--at", point), APPLY)
    pids = site.pids()
    assert state_of(site) == "INTENDED"
    assert "reconciler resolve ctx-1" in crashes.look(site, "explain", "ctx-1")
    for _ in range(2):
        assert "CallUnknown" in site.apply(code=7)
        assert state_of(site) == "UNKNOWN"
        assert appliance.starts() == []
        assert site.pids() == pids
    explained = crashes.look(site, "explain", "ctx-1")
    assert (
        "reconciler resolve ctx-1 --accepted --reason WHY (or --completed, --failed, --resend)"
        in explained
    )


@pytest.mark.parametrize("point", ["POST:after:1", "ANSWER:after:1", "OUTCOME:before:1"])
def test_a_call_whose_answer_was_not_written_down_is_known_by_the_appliance(
    site: Site, appliance: Appliance, point: str
) -> None:
    site.spec(site.vm("ctx-1"))
    crashes.crash(site, ("--at", point), APPLY)
    assert state_of(site) == "INTENDED"
    site.apply()
    assert state_of(site) == "ACCEPTED"
    assert len(appliance.starts()) == 1


def test_a_state_directory_lost_under_a_running_copy(site: Site, appliance: Appliance) -> None:
    """UNKNOWN, no second POST; the client goes on, and a person can bring the run to its end."""
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply()
    pids, leased = site.pids(), ports(site)
    appliance.misbehave("forget")
    with Client(leased[2000], "ctx-1-r1-disk0") as client:
        client.write(0, b"x" * 4096)
        shutil.rmtree(site.folder / "state")
        for _ in range(2):
            assert "CallUnknown" in site.apply(code=7)
        client.write(4096, b"y" * 4096)
        client.leave()
    assert (site.pids(), ports(site)) == (pids, leased)
    assert crashes.status(site)["ctx-1"]["call"]["state"] == "UNKNOWN"
    explained = crashes.look(site, "explain", "ctx-1")
    assert "whether the appliance was called is not known" in explained
    assert "reconciler resolve ctx-1" in explained
    site.spec(site.vm("ctx-1", [MIB, MIB], backup={"run": "r2"}))
    assert "r2 has its turn when that has ended" in site.apply(code=7)
    assert site.pids() == pids
    site.run("resolve", "ctx-1", "--failed", "--reason", "ended by hand", "-y")
    appliance.misbehave("none")
    site.apply()
    assert [crashes.run_of(start) for start in appliance.starts()] == ["ctx-1-r1", "ctx-1-r2"]
    assert {mark.run for mark in site.servers().values()} == {"r2"}


def test_a_state_directory_lost_after_the_end_of_a_run(site: Site, ending: Appliance) -> None:
    """No server is left to tell of it; the claim in the repository does."""
    ending.source("ctx-1", 2000, os.urandom(MIB))
    site.spec(site.vm("ctx-1"))
    site.apply("--wait", "--timeout", "60s")
    assert (state_of(site), site.servers()) == ("COMPLETED", {})
    whole = site.image("ctx-1").read_bytes()
    ending.misbehave("forget")
    shutil.rmtree(site.folder / "state")
    for _ in range(2):
        assert "CallUnknown" in site.apply(code=7)
        assert state_of(site) == "UNKNOWN"
        assert len(ending.starts()) == 1
    assert "reconciler resolve ctx-1" in crashes.look(site, "explain", "ctx-1")
    assert site.image("ctx-1").read_bytes() == whole
    # Of an appliance that still knows the job, its word counts.
    site.run("resolve", "ctx-1", "--failed", "--reason", "not to be told any more", "-y")
    ending.misbehave("none")
    site.spec(site.vm("ctx-1", backup={"run": "r2"}))
    site.apply("--wait", "--timeout", "60s")
    assert [crashes.run_of(start) for start in ending.starts()] == ["ctx-1-r1", "ctx-1-r2"]


def test_a_second_state_directory_on_the_same_repository(site: Site, appliance: Appliance) -> None:
    """Of the first nothing is stopped or restarted, and nobody is called; the way out is told."""
    appliance.misbehave("forget")
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply()
    pids = site.pids()
    site.write_config(state="second")
    for arguments in (["apply", "-y"], ["apply", "-y", "--prune"]):
        text = site.run(*arguments, code=None)
        assert site.pids() == pids
        assert str(site.folder / "state") in text or "resolve ctx-1" in text
    site.kill(pids["ctx-1", 2001])
    site.spec({"name": "ctx-1", "state": "absent"})
    site.apply(code=None)
    assert site.pids() == {("ctx-1", 2000): pids["ctx-1", 2000]}
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply(code=None)
    assert len(appliance.starts()) == 1
    site.write_config(state="state")
    site.apply()
    assert site.pids()["ctx-1", 2000] == pids["ctx-1", 2000]
    assert (state_of(site), len(appliance.starts())) == ("ACCEPTED", 1)
    assert crashes.plan(site) == []


def test_a_killed_apply_leaves_the_lock_free(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    crashes.crash(site, ("--at", "HANDSHAKE:before:1"), APPLY)
    assert Path(site.folder / "state" / "lock").exists()
    site.apply("--lock-timeout", "0s")
    assert len(appliance.starts()) == 1
