"""Every way in which a copy goes wrong at the appliance: what the hub says, and the next run.

One hub, one VM, one fault after the other: the run after each fault shows that nothing of the
faulty one is built on, and is what the next fault finds.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import records

from reconciler.core.call import Call, CallState
from reconciler.host.store import events
from tests.e2e.crashes import calls, ledger, look, status
from tests.e2e.site import Appliance, Site, until
from tests.e2e.test_server_death import backing_of
from tests.e2e.vms import Vm, ask, content, ended, living
from tests.e2e.watching import watching

SIZES = dict.fromkeys((2000, 2001), 2 << 20)
SILENT, TELLING = "site-a", "site-b"
"""The same appliance; what its status says ends runs of the second."""


class Nights:
    """A VM that is backed up again and again."""

    def __init__(self, site: Site, appliance: Appliance, vm: Vm) -> None:
        self.site, self.appliance, self.vm = site, appliance, vm
        self.number = 0
        self.completed = ""
        """The newest run that is a backup."""
        self.change_ids: dict[str, str] = {}
        """Disk key → what the appliance reported of it in that run."""

    @property
    def run(self) -> str:
        return f"n{self.number}"

    def ask(self, kind: str = "incremental", sna: str = SILENT) -> None:
        self.number += 1
        ask(self.site, "ctx-1", SIZES, self.run, kind, sna=sna)

    def works(self, kind: str = "incremental") -> None:
        """A new run completes, and builds on the newest backup."""
        self.ask(kind)
        call = ended(self.site, "ctx-1", self.run)
        assert call.state is CallState.COMPLETED, call.message
        assert self.api()["status"] == "completed"
        parent = f"{self.completed}.qcow2" if kind == "incremental" else None
        for disk in until(self.end, "the end in the log")["disks"]:
            key = disk["key"]
            assert backing_of(self.site.image("ctx-1", int(key), self.run)) == parent
            assert disk["previous"] == (self.change_ids[key] if parent else "")
            self.change_ids[key] = disk["change_id"]
        disks = [content(self.site, "ctx-1", key, self.run) for key in SIZES]
        assert records.faults(disks) == []
        self.completed = self.run

    def fails(self) -> str:
        """The run has failed by the appliance's own word; why."""
        call = ended(self.site, "ctx-1", self.run)
        assert (call.state, call.reason) == (CallState.FAILED, "ReportedFailed")
        vm = self.status()
        (ready,) = (one for one in vm["conditions"] if one["type"] == "Ready")
        assert (ready["status"], ready["reason"]) == ("False", "RunFailed")
        assert call.message in ready["message"]
        assert [disk["reported"] for disk in vm["disks"]] == [False, False]
        told = self.api()
        assert (told["status"], told["error_message"]) == ("failed", call.message)
        assert [disk["status"] for disk in told["disk_results"]] == ["failed", "failed"]
        said = self.site.apply("--wait", "--timeout", "60s", code=1)
        assert f"run {self.run} is FAILED" in said
        assert "reconciler backup ctx-1 --run NEW" in said
        return call.message

    def hangs(self, reported: list[bool]) -> None:
        """The run goes on until an operator has looked, and says that it has failed."""
        vm = self.status()
        assert (vm["run"], vm["call"]["state"]) == (self.run, "ACCEPTED")
        assert [disk["reported"] for disk in vm["disks"]] == reported
        assert [disk["ready"] for disk in vm["disks"]] == [True, True]  # it may still come back
        told = self.api()
        assert (told["status"], told.get("completed_at")) == ("running", None)
        self.site.apply("--wait", "--timeout", "1s", code=124)
        look(self.site, "resolve", "ctx-1", "--failed", "--reason", "seen in its log", "-y")
        assert self.call().state is CallState.FAILED
        assert self.api()["status"] == "failed"

    def call(self) -> Call:
        return calls(self.site)["ctx-1"]

    def api(self) -> dict[str, Any]:
        """The run as the hub's API has it."""
        url = f"http://127.0.0.1:{self.site.api}/api/v1/backups/{self.job}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def status(self) -> dict[str, Any]:
        return status(self.site)["ctx-1"]

    @property
    def job(self) -> str:
        """The job of the run; "" until it is called."""
        call = calls(self.site).get("ctx-1")
        return call.job_id if call and call.run == self.run else ""

    def end(self) -> dict[str, Any] | None:
        """What the appliance logged of the end of the run's job."""
        job = self.job
        ends = [one for one in self.appliance.log_lines("end") if one["job_id"] == job]
        return ends[0] if ends else None

    def reports(self) -> int:
        """How many of the run's disks the hub knows to be complete."""
        known = ledger(self.site)
        return len(known.reports.get(self.job, ())) if known else 0

    def copied(self) -> bool:
        """Whether the appliance has copied everything, reported or not."""
        if not any(one["job_id"] == self.job for one in self.appliance.log_lines("snapshot")):
            return False
        url = f"{self.appliance.url}/api/v1/progress/{self.job}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            progress = json.load(answer)
        return bool(progress["bytes_transferred"] == progress["total_bytes"] > 0)

    def told(self) -> list[str]:
        return [event.reason for event in events(self.site.folder / "state", "ctx-1")]


@pytest.fixture
def nights(site: Site, tmp_path: Path) -> Iterator[Nights]:
    appliance = Appliance(tmp_path / "sna", "--hub", f"http://127.0.0.1:{site.api}")
    site.appliance_at(appliance.url)
    told = {**site.config["snas"][SILENT], "reports_end": True}
    site.write_config(snas={**site.config["snas"], TELLING: told})
    try:
        with living(appliance.sources / "ctx-1", SIZES, pause=0.02) as vm, watching(site):
            yield Nights(site, appliance, vm)
    finally:
        appliance.end()


def copies_die_half_way(nights: Nights) -> None:
    """Nobody calls the hub; what the appliance's status says may end the run."""
    nights.appliance.misbehave("die", 1)
    nights.ask(sna=TELLING)
    said = nights.fails()
    assert "0 of 2 disks arrived; cannot copy disk 2000: told to die" in said
    assert "LateReport" not in nights.told()
    nights.works()


def it_crashes_half_way(nights: Nights) -> None:
    """It leaves its snapshot behind; the next one sweeps that away."""
    nights.appliance.misbehave("crash", 1)
    nights.ask()
    nights.appliance.process.wait(60)
    until(
        lambda: nights.job and nights.call().state is CallState.ACCEPTED, "the answer to the call"
    )
    assert nights.end() is None
    assert list(nights.vm.folder.glob("snap-*"))
    nights.hangs([False, False])
    nights.appliance.start("--hub", f"http://127.0.0.1:{nights.site.api}")
    nights.works()


def it_reports_one_disk_alone(nights: Nights) -> None:
    nights.appliance.misbehave("one-disk", 1)
    nights.ask()
    until(lambda: nights.end() and nights.reports() == 1, "the report")
    nights.hangs([True, False])
    nights.works()


def it_repeats_its_reports(nights: Nights) -> None:
    nights.appliance.misbehave("repeat", 1)
    nights.works()
    assert "LateReport" not in nights.told()


def it_reports_after_the_run_has_failed(nights: Nights) -> None:
    nights.appliance.misbehave("late")
    nights.ask()
    until(nights.copied, "the copies")
    nights.hangs([False, False])
    failed = nights.call()
    nights.appliance.behave()
    until(nights.end, "the late reports")
    until(lambda: "LateReport" in nights.told(), "what is said of them")
    assert nights.call() == failed
    assert nights.reports() == 0
    nights.works()


def it_does_not_know_what_has_changed(nights: Nights) -> None:
    """The VM was killed, and its bitmaps with it."""
    nights.vm.kill()
    nights.vm.start()
    nights.ask(sna=TELLING)
    assert "disk 2000: the VM does not know what has changed since '52 " in nights.fails()
    nights.works("full")


def test_a_fault_of_the_appliance_makes_no_backup_and_the_next_run_works(
    nights: Nights, count: Callable[[str, int], None]
) -> None:
    nights.works("full")
    for fault in (
        copies_die_half_way,
        it_crashes_half_way,
        it_reports_one_disk_alone,
        it_repeats_its_reports,
        it_reports_after_the_run_has_failed,
        it_does_not_know_what_has_changed,
    ):
        fault(nights)
        count("faults of the appliance after which the next run works", 1)
