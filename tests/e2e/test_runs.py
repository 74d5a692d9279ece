"""Runs are things one asks for: `backup`, `runs:`, and `history`, on real servers."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.site import Appliance, Site, until

MIB = 1 << 20


@pytest.fixture
def fleet(site: Site, appliance: Appliance) -> Site:
    """Three VMs in the inventory, of which two are declared, without a run."""
    site.inventory({f"ctx-{n}": {2000: MIB} for n in (1, 2, 3)})
    declare(site, "ctx-1", "ctx-2")
    return site


def declare(site: Site, *names: str, **more: Any) -> None:
    labels = {"ctx-1": {"tier": "gold"}, "ctx-2": {"tier": "gold", "zone": "b"}}
    site.spec(
        *({"name": name, "disks": "inventory", "labels": labels[name], **more} for name in names)
    )


def request_of(site: Site, vm: str) -> Path:
    return site.folder / "state" / "runs" / f"{vm}.yaml"


def calls(appliance: Appliance) -> list[tuple[str, str]]:
    """(VM, type) of every call that was accepted, sorted."""
    return sorted((one["vm_name"], one["backup_type"]) for one in appliance.starts())


def resolve(site: Site, vm: str, answer: str = "--completed") -> None:
    site.run("resolve", vm, answer, "--reason", "seen in its log", "-y")


def resting(site: Site, vm: str) -> bool:
    """No client of the appliance is connected to the VM."""
    return all(disk["clients"] == 0 for disk in site.status()[vm]["disks"])


def settle(site: Site, *vms: str, answer: str = "--completed") -> None:
    """The appliance has let go of these VMs, and somebody says how their runs ended."""
    for vm in vms:
        until(lambda vm=vm: resting(site, vm), f"{vm} at rest")  # type: ignore[misc]
        resolve(site, vm, answer)


def test_two_vms_by_label_are_called_once_each_and_again_changes_nothing(
    fleet: Site, appliance: Appliance
) -> None:
    text = fleet.run("backup", "-l", "tier=gold", "--run", "n1")
    assert "run n1 of ctx-1 is asked for" in text
    assert "run n1 of ctx-2 is asked for" in text
    assert text.endswith("next: reconciler apply\n")
    assert calls(appliance) == []
    before = {vm: request_of(fleet, vm).read_text() for vm in ("ctx-1", "ctx-2")}
    assert "# Written by `reconciler backup`" in before["ctx-1"]
    assert "asked for already" in fleet.run("backup", "-l", "tier=gold", "--run", "n1")
    fleet.apply()
    assert calls(appliance) == [("ctx-1", "full"), ("ctx-2", "full")]
    again = fleet.run("backup", "ctx-1", "ctx-2", "--run", "n1")
    assert again.count("asked for already: it is ACCEPTED") == 2
    assert "next:" not in again
    fleet.apply()
    settle(fleet, "ctx-1", answer="--completed")
    assert "is COMPLETED already" in fleet.run("backup", "ctx-1", "--run", "n1")
    assert {vm: request_of(fleet, vm).read_text() for vm in before} == before
    fleet.apply()
    assert len(calls(appliance)) == 2


def test_apply_at_once_is_about_these_vms_alone(fleet: Site, appliance: Appliance) -> None:
    declare(fleet, "ctx-1", "ctx-2", backup={"run": "own"})
    (fleet.specs / "broken.yaml").write_text("vms: [{name: ctx-9, stat: absent}]")
    line = ("backup", "ctx-2", "--run", "n-{date}", "--apply", "-y")
    text = fleet.run(*line)
    assert "1 of 1 VM as declared" in text
    assert calls(appliance) == [("ctx-2", "full")]
    (run,) = (vm["run"] for vm in fleet.json("status")["vms"])
    assert re.fullmatch(r"n-\d{4}-\d{2}-\d{2}", run)
    text = fleet.run(*line)
    assert "asked for already" in text
    assert "No changes" in text
    assert len(calls(appliance)) == 1
    assert "untouched, as this is about others: ctx-2" in fleet.run(
        "plan", "-f", "specs/broken.yaml", code=65
    )


def test_a_new_run_waits_for_its_turn_and_history_shows_both(
    fleet: Site, appliance: Appliance
) -> None:
    declare(fleet, "ctx-1")
    fleet.run("backup", "ctx-1", "--run", "n1", "--apply", "-y", SUDO_USER="ada")
    text = fleet.run("backup", "ctx-1", "--run", "n2", SUDO_USER="grace")
    assert "it has its turn when run n1, which is ACCEPTED, has ended" in text
    assert "the run n1 is ACCEPTED; n2 has its turn" in fleet.run("plan")
    fleet.apply("-f", "specs", code=3)
    for command in (("plan",), ("status", "ctx-1"), ("explain", "ctx-1")):
        said = fleet.run(*command, code=None)
        assert re.search(r"n2 has its turn when that has ended, and has waited since 20", said)
    explained = fleet.run("explain", "ctx-1")
    assert re.search(r"waits: run n2, for \d+ \w+, until run n1 ends", explained)
    given_up = "reconciler resolve ctx-1 --failed --reason WHY"  # the appliance had no disk to copy
    assert f"next: {given_up}, then reconciler apply -f specs/vms.yaml" in explained
    settle(fleet, "ctx-1")
    fleet.apply("-f", "specs/vms.yaml")
    assert calls(appliance) == [("ctx-1", "full")] * 2
    found = fleet.json("history", "ctx-1")
    assert (found["vm"], found["total"]) == ("ctx-1", 2)
    new, old = found["runs"]
    assert (new["run"], new["state"], new["who"]) == ("n2", "ACCEPTED", "reconciler backup (grace)")
    assert (old["run"], old["state"], old["who"]) == ("n1", "COMPLETED", "reconciler backup (ada)")
    assert old["message"] == "seen in its log"
    assert old["asked"] <= old["called"] <= old["ended"] <= new["called"]
    starts = [(one["job_id"], one["nbd_targets"]) for one in appliance.starts()]
    assert starts == [(one["job_id"], one["nbd_targets"]) for one in (old, new)]
    assert (new["ended"], old["seconds"] >= 0) == (None, True)
    text = fleet.run("history", "ctx-1", "--limit", "1")
    assert "n2" in text
    assert "COMPLETED" not in text
    assert "1 older: --limit 2 shows all" in text
    assert "did you mean 'ctx-1'" in fleet.run("history", "ctx-11", code=64)


def test_a_vm_that_only_the_inventory_knows_needs_no_specs(
    fleet: Site, appliance: Appliance
) -> None:
    (fleet.specs / "vms.yaml").unlink()
    fleet.specs.rmdir()
    assert "cannot read specs" in fleet.run("apply", "-y", code=65)
    assert "there are: none" in fleet.run("backup", "-l", "tier", "--run", "n1", code=64)
    fleet.run("backup", "ctx-3", "--run", "n1")
    fleet.apply()
    assert calls(appliance) == [("ctx-3", "full")]


def test_a_vm_that_only_the_inventory_knows_beside_specs(fleet: Site, appliance: Appliance) -> None:
    declare(fleet, "ctx-1", backup={"run": "own"})
    fleet.run("backup", "ctx-3", "--run", "n1")
    assert "untouched, as this is about others: ctx-3" in fleet.run("plan", "-f", "specs")
    text = fleet.run("backup", "ctx-3", "--run", "n1b", "-f", "specs/vms.yaml")
    own = request_of(fleet, "ctx-3")
    assert f"next: reconciler apply -f specs/vms.yaml -f {own}" in text
    fleet.run("backup", "ctx-3", "--run", "n2")
    (fleet.specs / "vms.yaml").unlink()
    assert "2 to create" not in fleet.run("plan")
    fleet.apply()  # specs/ is empty: what was asked for is enough
    assert calls(appliance) == [("ctx-3", "full")]
    settle(fleet, "ctx-3", answer="--failed")
    fleet.apply(code=1)
    said = fleet.run("explain", "ctx-3")
    assert "next: reconciler backup ctx-3 --run NEW --apply\n" in said


def test_a_newer_request_takes_the_place_of_an_older_one(fleet: Site, appliance: Appliance) -> None:
    fleet.run("backup", "ctx-1", "--run", "n1")
    text = fleet.run("backup", "ctx-1", "--run", "n2")
    assert "in place of n1, which was not called" in text
    listed = fleet.run("backup", "--list")
    assert "n2" in listed
    assert "not applied yet" in listed
    assert "n1" not in listed
    fleet.run("backup", "ctx-1", "--run", "n2", "--apply", "-y")
    assert [one["nbd_targets"].split("/")[-1] for one in appliance.starts()] == ["ctx-1-n2-disk0"]
    assert "ACCEPTED" in fleet.run("backup", "--list")


def test_what_has_no_run_now_is_not_what_no_spec_declares(
    fleet: Site, appliance: Appliance
) -> None:
    declare(fleet, "ctx-1", release="keep")
    for vm in ("ctx-1", "ctx-3"):
        fleet.run("backup", vm, "--run", "n1", "--apply", "-y")
    settle(fleet, "ctx-1", "ctx-3")
    fleet.apply()
    kept = fleet.pids()
    assert kept.keys() == {("ctx-1", 2000)}
    for vm in ("ctx-1", "ctx-3"):
        request_of(fleet, vm).unlink()
    said = fleet.apply("--prune")
    assert "warning: VM ctx-1: no run is asked for" in said
    assert fleet.pids() == kept
    assert fleet.status().keys() == {"ctx-1"}


def test_a_spec_that_is_edited_after_a_run_has_ended_has_its_turn(
    fleet: Site, appliance: Appliance
) -> None:
    fleet.run("backup", "ctx-1", "--run", "n1", "--apply", "-y")
    declare(fleet, "ctx-1", backup={"run": "edited"})
    assert "run edited" not in fleet.run("plan")  # the request is what is going on
    settle(fleet, "ctx-1")
    fleet.apply()
    assert len(calls(appliance)) == 2
    assert fleet.status()["ctx-1"]["run"] == "edited"
    settle(fleet, "ctx-1")
    fleet.apply()
    assert len(calls(appliance)) == 2
    assert fleet.status()["ctx-1"]["run"] == "edited"


def test_the_same_run_as_another_type_is_refused_with_both_sides(
    fleet: Site, appliance: Appliance
) -> None:
    fleet.run("backup", "ctx-1", "--run", "base", "--apply", "-y")
    settle(fleet, "ctx-1")
    fleet.run("backup", "ctx-1", "--run", "n1", "--apply", "-y")
    refused = fleet.run("backup", "ctx-1", "--run", "n1", "--type", "incremental", code=1)
    assert "as incremental: it was asked for as full, and is ACCEPTED" in refused
    path = request_of(fleet, "ctx-1")
    path.write_text(path.read_text().replace('"full"', '"incremental"'))
    said = fleet.run("plan", "-f", "specs", code=None)
    assert "it was asked for as full, the spec now says incremental" in " ".join(said.split())
    explained = fleet.run("explain", "ctx-1")
    assert "reconciler backup ctx-1 --run NEW" not in explained  # it was not applied


def test_all_or_nothing_over_several_vms(fleet: Site, appliance: Appliance) -> None:
    fleet.run("backup", "ctx-1", "--run", "n1", "--apply", "-y")
    settle(fleet, "ctx-1", answer="--failed")
    said = fleet.run("backup", "ctx-2", "ctx-1", "--run", "n1", code=1)
    assert "cannot ask for run n1 of ctx-1 again: it is FAILED: seen in its log" in said
    assert "for another run: reconciler backup ctx-1 --run NEW" in said
    assert not request_of(fleet, "ctx-2").exists()
    said = fleet.run("backup", "ctx-1", "ctx-2", "--run", "n2", "--type", "incremental", code=65)
    assert "VM ctx-2: disk 2000 has no completed run" in said
    assert "n1" in request_of(fleet, "ctx-1").read_text()
    assert not request_of(fleet, "ctx-2").exists()


def test_a_refused_run_is_retried_and_not_asked_for_again(
    fleet: Site, appliance: Appliance
) -> None:
    appliance.misbehave("refuse")
    fleet.run("backup", "ctx-1", "--run", "n1", "--apply", "-y", code=1)
    said = fleet.run("backup", "ctx-1", "--run", "n1", code=1)
    assert "reconciler retry ctx-1" in said
    appliance.behave()
    fleet.run("retry", "ctx-1")
    fleet.run("backup", "ctx-1", "--run", "n1", "--apply", "-y")
    assert len(calls(appliance)) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ctx-1"], 64, ["name the run: --run NAME"]),
        (["--run", "n1"], 64, ["name the VMs, or choose them by label"]),
        (["ctx-1", "-l", "tier", "--run", "n1"], 64, ["one of the two"]),
        (["ctx-1", "--run", "n 1"], 64, ["'n 1' holds ' '"]),
        (["ctx-1", "--run", "n-{day}"], 64, ["cannot use {day}", "{date} and {time}"]),
        (["ctx-11", "--run", "n1"], 64, ["'ctx-11'", "did you mean 'ctx-1'"]),
        (["-l", "tier==x", "--run", "n1"], 64, ["cannot read the selector 'tier==x'"]),
        (["-l", "tier=bronze", "--run", "n1"], 64, ["there are: tier=gold, zone=b"]),
        (["ctx-1", "--run", "n1", "--apply"], 64, ["cannot ask without a terminal: add -y"]),
        (["ctx-1", "--run", "n1", "--wait"], 64, ["--wait goes with --apply"]),
        (["ctx-1", "--run", "n1", "-y", "--apply", "--timeout", "1s"], 64, ["goes with --wait"]),
        (["gone", "--run", "n1"], 1, ["cannot ask for a run of gone", "`state: absent`"]),
        (["look", "--run", "n1"], 1, ["cannot ask for a run of look", "`for: restore`"]),
        (["wrong", "--run", "n1"], 65, ["more.yaml:4:", "unknown key 'disk'"]),
    ],
)
def test_what_cannot_be_asked_for_writes_nothing(
    fleet: Site, arguments: list[str], code: int, words: list[str]
) -> None:
    (fleet.specs / "more.yaml").write_text(
        "vms:\n"
        "  - {name: gone, state: absent}\n"
        "  - {name: look, for: restore, disks: [{key: 1, image: x.qcow2}]}\n"
        "  - {name: wrong, disk: inventory}\n"
    )
    said = fleet.run("backup", *arguments, code=code)
    for word in words:
        assert word in said
    assert not (fleet.folder / "state").exists()


def test_by_label_what_cannot_be_read_is_said_and_the_others_are_asked_for(
    fleet: Site, appliance: Appliance
) -> None:
    (fleet.specs / "more.yaml").write_text(
        "vms:\n"
        "  - {name: gone, state: absent, labels: {tier: gold}}\n"
        "  - {name: ctx-3, disk: inventory, labels: {tier: gold}}\n"
    )
    said = fleet.run("backup", "-l", "tier=gold", "--run", "n1", "--apply", "-y", code=65)
    assert "more.yaml:3:19: error: unknown key 'disk'" in said
    assert "left out: gone: its spec says `state: absent`" in said
    assert calls(appliance) == [("ctx-1", "full"), ("ctx-2", "full")]


def test_a_request_of_a_vm_whose_spec_is_broken_is_not_taken_from_the_inventory(
    fleet: Site, appliance: Appliance
) -> None:
    fleet.run("backup", "ctx-1", "--run", "n1")
    fleet.spec({"name": "ctx-1", "disk": "inventory"})
    assert "0 to" not in fleet.apply(code=65)
    (fleet.specs / "vms.yaml").write_text("vms: [{name: ctx-1")
    said = fleet.apply(code=65)
    assert "specs/vms.yaml cannot be read and may declare it" in said
    assert calls(appliance) == []
    assert fleet.servers() == {}


def test_two_at_once_leave_one_whole_request(fleet: Site) -> None:
    runs = [f"run-{n}" for n in range(6)]
    processes = [fleet.start("backup", "ctx-1", "ctx-2", "--run", run) for run in runs]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    listed = fleet.run("backup", "--list").splitlines()
    (one, other) = (re.search(r"run-\d", line) for line in listed[1:])
    assert one
    assert other
    assert one.group() == other.group()  # the last wrote both
    files = sorted(path.name for path in request_of(fleet, "ctx-1").parent.iterdir())
    assert files == [".lock", "ctx-1.yaml", "ctx-2.yaml"]


def test_a_request_that_somebody_broke_is_said_and_keeps_what_was_applied(
    fleet: Site, appliance: Appliance
) -> None:
    declare(fleet, "ctx-1", backup={"run": "own"})
    appliance.misbehave("sickens")
    fleet.run("backup", "ctx-1", "--run", "n1", "--apply", "-y", code=1)
    path = request_of(fleet, "ctx-1")
    path.write_text(path.read_text().replace("full", "ful"))
    appliance.misbehave("none")
    said = fleet.apply(code=65)
    assert "type: expected one of full, incremental" in said
    assert "the run n1 was asked for at" in said
    assert calls(appliance) == []
    fleet.run("backup", "ctx-1", "--run", "n1", code=65)
    path.unlink()
    fleet.run("backup", "ctx-1", "--run", "n1", "--apply", "-y")
    assert calls(appliance) == [("ctx-1", "full")]


def test_a_backup_that_is_told_to_end_has_written_a_whole_request(
    fleet: Site, appliance: Appliance
) -> None:
    fleet.run("backup", "ctx-1", "--run", "n1", "--apply", "-y")
    line = ("backup", "ctx-1", "--run", "n1", "--apply", "-y", "--wait")
    process = fleet.start(*line)
    assert process.stdout
    until(lambda: "asked for already" in process.stdout.readline(), "it asked")  # type: ignore[union-attr]
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert json.dumps("n1") in request_of(fleet, "ctx-1").read_text()
    assert len(calls(appliance)) == 1
