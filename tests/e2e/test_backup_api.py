"""The Backup API in the daemon: schedulers ask, real servers come up, an appliance writes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from reconciler.host import nbd
from reconciler.host.store import read
from tests.conversations import Conversation, cases
from tests.e2e.site import Appliance, Site, until
from tests.e2e.test_callbacks import end, serve
from tests.e2e.watching import watching
from tests.nbd_client import Client

BACKUPS = "/api/v1/backups"
MIB = 1 << 20
SIZES = {"1MiB": MIB, "2MiB": 2 * MIB}


class Asker:
    """Somebody at the API of a site."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def __call__(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.site.api, timeout=60)
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, dict(headers or {}))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def start(self, vm: str, key: str = "", **changes: Any) -> tuple[int, Any]:
        body = {"vm_name": vm, "backup_type": "full", "repository_id": "local", **changes}
        return self("POST", BACKUPS, body, {"Idempotency-Key": key} if key else None)

    def one(self, job: str) -> Any:
        status, found = self("GET", f"{BACKUPS}/{job}")
        assert status == 200, found
        return found

    def reaches(self, job: str, status: str) -> Any:
        def there() -> Any:
            found = self.one(job)
            assert found["status"] in ("pending", "running", status), found
            return found if found["status"] == status else None

        return until(there, f"{job} {status}", 60)


@pytest.fixture
def ask(site: Site) -> Asker:
    return Asker(site)


def follow(site: Site, job: str, found: list[tuple[str, Any]], after: int = 0) -> None:
    """Everything that a stream says, until it ends."""
    connection = http.client.HTTPConnection("127.0.0.1", site.api, timeout=60)
    connection.request("GET", f"{BACKUPS}/{job}/events", headers={"Last-Event-ID": str(after)})
    answer = connection.getresponse()
    kind = ""
    for line in answer:
        word, _, rest = line.decode().rstrip("\n").partition(": ")
        if word == "event":
            kind = rest
        elif word == "data":
            found.append((kind, json.loads(rest)))
    connection.close()


def test_the_recorded_conversations_with_a_real_daemon(
    site: Site, appliance: Appliance, ask: Asker
) -> None:
    """Every one of them, on real servers that a real appliance writes to."""
    there = cases()
    disks = {}
    for number, case in enumerate(there.values(), 1):
        vm = f"ctx-{number}"
        disks[vm] = {key: SIZES[size] for key, size in case["vm"]["disks"].items()}
        for key, size in disks[vm].items():
            appliance.source(case["vm"]["name"], key, os.urandom(size))
    site.inventory(disks)
    known = json.loads((site.folder / "inventory.yaml").read_text())
    for number, case in enumerate(there.values(), 1):
        known["vms"][f"ctx-{number}"]["vm"]["name"] = case["vm"]["name"]
    site.dump(site.folder / "inventory.yaml", known)

    def looked(vm: str) -> None:
        """The daemon looks, plans and does what is to be done, as for any command."""
        site.run("apply", "-y", "--vm", vm, code=None)

    with watching(site):
        for number, case in enumerate(there.values(), 1):
            Conversation(
                case,
                f"ctx-{number}",
                ask,
                until=ask.reaches,
                looked=looked,
            ).play()
        status, whole = ask("GET", f"{BACKUPS}?limit=1000")
        assert (status, whole["total"]) == (200, 5)


def test_two_at_once_are_one_run_and_a_crash_of_the_hub_changes_no_answer(
    site: Site, appliance: Appliance, ask: Asker
) -> None:
    site.inventory({"ctx-1": {2000: MIB, 2001: MIB}})
    appliance.source("ctx-1", 2000, b"a" * MIB)
    appliance.source("ctx-1", 2001, b"b" * MIB)
    with watching(site) as daemon:
        answers: list[tuple[int, Any]] = []
        asking = [
            threading.Thread(target=lambda: answers.append(ask.start("ctx-1"))) for _ in range(4)
        ]
        for one in asking:
            one.start()
        for one in asking:
            one.join(60)
        assert sorted(status for status, _ in answers) == [201, 409, 409, 409]
        first = next(found for status, found in answers if status == 201)
        for disk in first["disk_results"]:
            target = nbd.Target("127.0.0.1", disk["nbd_port"], disk["nbd_export_name"])
            assert nbd.handshake([target], 20.0)[0].answered
        assert {one["qemu_nbd_pid"] for one in first["disk_results"]} == set(site.pids().values())
        job = first["backup_id"]
        ask.reaches(job, "running")
        assert ask("DELETE", f"{BACKUPS}/{job}")[1]["status"] == "cancelled"
        status, second = ask.start("ctx-1", key="night-1")
        assert status == 201
        ask.reaches(second["backup_id"], "running")
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.process.wait(20)
    with watching(site):
        status, again = ask.start("ctx-1", key="night-1")
        assert (status, again["backup_id"]) == (201, second["backup_id"])
        assert again["disk_results"] == second["disk_results"]  # the servers outlived it
    assert len(appliance.starts()) == 2


def test_a_backup_is_ended_under_its_writer_and_who_follows_is_told(
    site: Site, appliance: Appliance, ask: Asker
) -> None:
    site.inventory({"ctx-1": {2000: MIB}})
    with watching(site):
        status, found = ask.start("ctx-1")
        assert status == 201
        job, (disk,) = found["backup_id"], found["disk_results"]
        told: list[tuple[str, Any]] = []
        follower = threading.Thread(target=follow, args=(site, job, told))
        follower.start()
        ask.reaches(job, "running")
        with Client(disk["nbd_port"], disk["nbd_export_name"]) as writer:
            writer.write(0, b"x" * 4096)
            until(lambda: site.status()["ctx-1"]["disks"][0]["clients"] > 0, "a client is seen")
            status, ended = ask("DELETE", f"{BACKUPS}/{job}")
            assert (status, ended["status"]) == (200, "cancelled")
            assert "appliance cannot be told" in ended["error_message"]
            with pytest.raises(OSError):
                while True:
                    writer.write(0, b"x" * 4096)
        until(lambda: not site.pids(), "no server")
        assert not site.listening()
        follower.join(60)
        assert not follower.is_alive()
        assert told[-1][0] == "end"
        assert told[-1][1]["status"] == "cancelled"
        reasons = [data["reason"] for kind, data in told if kind == "log"]
        assert reasons[:2] == ["Created", "Started"]
        assert "Cancelled" in reasons
        assert {data["status"] for kind, data in told if kind == "status"} <= {"pending", "running"}
        assert ask.start("ctx-1")[0] == 201


def test_what_cannot_begin_yet_says_so_and_is_ended_before_it_began(
    site: Site, appliance: Appliance, ask: Asker
) -> None:
    """Eleven disks do not fit into ten ports: no port is leased, and nothing is in the ledger."""
    site.inventory({"ctx-1": {2000 + n: MIB for n in range(11)}})
    with watching(site):
        status, found = ask.start("ctx-1")
        assert status == 202
        job = found["backup_id"]
        seen = until(lambda: (one := ask.one(job)) and one.get("error_message") and one, "why")
        assert (seen["status"], seen["disk_results"], seen["disks_count"]) == ("pending", [], 11)
        assert "11" in seen["error_message"]
        assert ask.start("ctx-1")[0] == 409
        assert ask("DELETE", f"{BACKUPS}/{job}")[1]["status"] == "cancelled"
        assert ask.one(job)["status"] == "cancelled"
    ledger = read(site.folder / "state")
    assert ledger is not None
    assert [(call.job_id, call.state) for call in ledger.calls] == [(job, "CANCELLED")]
    assert appliance.starts() == []


@pytest.fixture
def running() -> Iterator[list[Any]]:
    found: list[Any] = []
    yield found
    for process in found:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=20)


def test_where_nothing_starts_servers_apply_makes_it_true(
    site: Site, appliance: Appliance, ask: Asker, running: list[Any]
) -> None:
    site.inventory({"ctx-1": {2000: MIB}})
    process = serve(site, running)
    status, found = ask.start("ctx-1", key="k")
    assert status == 202
    assert "reconciler apply" in found["current_phase"]
    assert "ctx-1" in site.run("backup", "--list")
    assert not site.pids()
    (entry,) = site.json("backup", "--list")["requests"]
    asked = f"ctx-1: run {entry['run']} (full) is asked for by the API since "
    following = "and not begun\nnext: reconciler apply, or reconciler watch"
    for command in (["status"], ["explain", "ctx-1"]):
        said = site.run(*command)
        assert asked in said, command
        assert following in said, command
        (told,) = site.json(*command)["asked"]
        assert told == {
            "vm": "ctx-1", "run": entry["run"], "type": "full", "who": "the API",
            "at": told["at"], "file": entry["file"],
        }, command  # fmt: skip
    site.apply()
    assert asked not in site.run("status") + site.run("explain", "ctx-1")
    assert site.json("status")["asked"] == site.json("explain", "ctx-1")["asked"] == []
    status, found = ask.start("ctx-1", key="k")
    assert (status, found["status"]) == (201, "running")
    assert found["disk_results"][0]["qemu_nbd_pid"] in site.pids().values()
    status, found = ask("DELETE", f"{BACKUPS}/{found['backup_id']}")
    assert (status, found["status"]) == (200, "cancelled")
    assert not site.pids()
    job = ask.start("ctx-1")[1]["backup_id"]  # of a VM that was applied before
    said = site.run("explain", "ctx-1")
    assert "(full) is asked for by the API since " in said
    assert said.endswith("next: reconciler apply, or reconciler watch, which begins it by itself\n")
    assert "not begun" in site.run("status", "ctx-1")
    status, refusal = ask.start("ctx-1")
    assert (status, f"`DELETE {BACKUPS}/{job}` gives it up" in refusal["details"]) == (409, True)
    assert ask("DELETE", f"{BACKUPS}/{job}")[1]["status"] == "cancelled"
    assert "not begun" not in site.run("status")
    end(process)


def test_who_waits_hears_of_the_end_from_whoever_takes_the_callbacks(
    site: Site, tmp_path: Path
) -> None:
    """Long before it is time to ask the SNA again."""
    with contextlib.ExitStack() as stack:
        appliance = Appliance(tmp_path / "appliance", "--hub", f"http://127.0.0.1:{site.api}")
        stack.callback(appliance.end)
        site.appliance_at(appliance.url, poll="1h")
        appliance.source("ctx-1", 2000, b"x" * MIB)
        site.spec(site.vm("ctx-1", [MIB]))
        stack.enter_context(watching(site))
        until(lambda: site.condition("ctx-1", "Ready")[1] == "Completed", "the run of the spec", 60)
        backup = ("backup", "ctx-1", "--run", "r2", "--apply", "-y", "--wait", "--timeout", "90s")
        said = site.run(*backup)
        assert "SNA site-a: its client reported every disk complete" in said  # whoever ended it
