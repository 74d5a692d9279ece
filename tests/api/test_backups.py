"""The Backup API: what is asked for, shown and ended, over a real store and real requests."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from msgspec.structs import replace

from reconciler import desk
from reconciler.api import backups as backup_api
from reconciler.api.models import Backup
from reconciler.api.views import view
from reconciler.asking import Desk, RefusedError, Why, Wish
from reconciler.core.call import Call, CallEvent, CallState, job_id
from reconciler.core.errors import HostError
from reconciler.core.ledger import DiskReport
from reconciler.core.requests import keyed
from reconciler.desk import DaemonDesk
from reconciler.host import lock
from reconciler.host.store import StoreError, events
from reconciler.host.store.listing import Shown
from reconciler.host.store.rows import call_of
from reconciler.orders import Cancel
from tests.api.played import BACKUPS, PID, PORT, Answer, Played
from tests.core.builders import HUB, a_settings, wanting
from tests.core.test_parents import a_chain, damage, overlay
from tests.fakes import planned
from tests.host.test_inbox import ACCEPTED, ENDED, OPEN, UNASKED

REQUIRED = {name for name, field in Backup.model_fields.items() if field.is_required()}
MIB = 1 << 20


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    """A hub of two VMs, whose desk brings up what is asked for."""
    monkeypatch.chdir(tmp_path)
    found = Played(tmp_path)
    found.knows(
        ctx_1={"name": "pgtest1", "disks": {2000: "1MiB", 2001: "2MiB"}},
        ctx_2={"name": "pgtest2", "disks": {2000: "1MiB"}},
        ctx_0={"name": "empty", "disks": {}},
    )
    found.declares({"name": "ctx-1", "disks": "inventory"}, {"name": "ctx-2", "disks": "inventory"})
    yield found
    found.close()


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    """The same where nothing is started: `serve`."""
    monkeypatch.chdir(tmp_path)
    found = Played(tmp_path, plain=True)
    found.knows(ctx_1={"name": "pgtest1", "disks": {2000: "1MiB", 2001: "2MiB"}})
    found.declares({"name": "ctx-1", "disks": "inventory"})
    yield found
    found.close()


def refused(answer: Answer, status: int, *words: str) -> None:
    """An error as every path answers it."""
    assert answer.status == status, answer
    assert set(answer.body) == {"error", "details", "timestamp"}
    for word in words:
        assert word in answer.body["details"], answer.body["details"]


def request_of(hub: Played, vm: str = "ctx-1") -> dict[str, Any]:
    """The entry that was written."""
    text = (Path(hub.settings.requests) / f"{vm}.yaml").read_text()
    (entry,) = yaml.safe_load(text)["runs"]
    return dict(entry)


# -- asking


def test_a_backup_is_asked_for_and_answered_when_its_servers_are_up(hub: Played) -> None:
    status, found, heads = hub.start("pgtest1", policy_id="nightly", tags={"tier": "gold"})
    assert status == 201
    job = found["backup_id"]
    assert heads["location"] == f"{BACKUPS}/{job}"
    assert set(found) >= REQUIRED
    run = request_of(hub)["run"]
    assert job == job_id(HUB, "ctx-1", run, 1)
    assert re.fullmatch(r"api-[0-9a-f]{12}", run)
    assert [set(one) for one in found["disk_results"]] == [
        {"disk_id", "nbd_port", "nbd_export_name", "qcow2_path", "qemu_nbd_pid", "status"}
    ] * 2
    assert found["disk_results"][1] == {
        "disk_id": 1,
        "nbd_port": PORT + 1,
        "nbd_export_name": f"ctx-1-{run}-disk1",
        "qcow2_path": f"{hub.folder}/repository/ctx-1/2001/{run}.qcow2",
        "qemu_nbd_pid": PID + 1,
        "status": "qemu_started",
    }
    assert found["nbd_targets_string"] == (
        f"2000:nbd://127.0.0.1:{PORT}/ctx-1-{run}-disk0,"
        f"2001:nbd://127.0.0.1:{PORT + 1}/ctx-1-{run}-disk1"
    )
    meant = {
        "vm_context_id": "ctx-1", "vm_name": "pgtest1", "backup_type": "full",
        "repository_id": "local", "policy_id": "nightly", "status": "pending", "disks_count": 2,
        "total_bytes": 3 * MIB, "tags": {"tier": "gold"},
    }  # fmt: skip
    assert {name: found[name] for name in meant} == meant
    assert hub.get(f"/{job}").body == found
    call = hub.call(job)
    assert (call.policy, json.loads(call.tags), call.who) == (
        "nightly", {"tier": "gold"}, "the API"
    )  # fmt: skip


def test_what_is_written_is_what_backup_writes(hub: Played) -> None:
    hub.who = "scheduler\nruns: []"
    hub.start(policy_id="{{ x }}", tags={"a": '{"b": {"c": 1}}', "{{d}}": "{% e %}"})
    entry = request_of(hub)
    assert (entry["vm"], entry["type"], entry["by"]) == (
        "ctx-1",
        "full",
        "scheduler?runs: []",
    )
    found = hub.get().body["backups"][0]
    assert found["policy_id"] == "{{ x }}"
    assert found["tags"] == {"a": '{"b": {"c": 1}}', "{{d}}": "{% e %}"}


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"disk_id": 0}, 422, "one snapshot of all its disks"),
        ({"vm_name": ...}, 422, "vm_name"),
        ({"vm_name": ""}, 422, "vm_name"),
        ({"vm_name": 7}, 422, "vm_name"),
        ({"backup_type": ...}, 422, "backup_type"),
        ({"backup_type": "differential"}, 422, "backup_type"),
        ({"repository_id": ...}, 422, "repository_id"),
        ({"repository_id": "loca"}, 400, "(the config has: far, local); did you mean 'local'?"),
        ({"repository_id": "far"}, 400, "the images of ctx-1 are kept in the repository 'local'"),
        ({"tags": {"a": 1}}, 422, "tags.a"),
        ({"tags": {"a": "b\n"}}, 422, "of one line"),
        ({"tags": {"": "b"}}, 422, "a tag needs a name"),
        ({"tags": {str(n): "" for n in range(33)}}, 422, "at most 32 tags"),
        ({"tags": {"a": "b" * 257}}, 422, "at most 256"),
        ({"policy_id": "a\nb"}, 422, "policy_id"),
        ({"policy_id": "x" * 201}, 422, "policy_id"),
        ({"vm_name": "ctx-9"}, 404, "there is no VM 'ctx-9'"),
        ({"vm_name": "ctx-0"}, 404, "the inventory knows no disks of the VM ctx-0"),
        ({"backup_type": "incremental"}, 400, "no completed run to build an incremental on"),
        ({"backup_type": "incremental", "fallback": "half"}, 422, "fallback"),
        ({"fallback": "full"}, 422, "fallback goes with backup_type incremental"),
    ],
)
def test_what_cannot_be_asked_for_leaves_nothing(
    hub: Played, changes: dict[str, Any], status: int, words: str
) -> None:
    refused(hub.start(**{"vm": "ctx-1", **changes}), status, words)
    assert not list(Path(hub.settings.requests).glob("*.yaml"))
    assert hub.store.ledger().calls == []
    assert hub.get().body == {"backups": [], "total": 0}


def test_null_is_as_good_as_left_out(hub: Played) -> None:
    assert hub.start(policy_id=None, tags=None, disk_id=None, fallback=None).status == 201


def test_a_field_that_is_not_known_is_left_alone(hub: Played) -> None:
    assert hub.start(fallbak="full", priority=7).status == 201


def test_an_incremental_falls_back_if_the_request_says_so(hub: Played) -> None:
    """What is advised is a field of the request, and works."""
    answer = hub.start(backup_type="incremental")
    refused(answer, 400, "disk 2000 has no completed run", "`backup_type` full", "`fallback` full")
    said = answer.body["details"]
    assert "error:" not in said
    assert not {"--type", "`type: full`", "backing"} & set(said.split())
    falls = {"backup_type": "incremental", "fallback": "full"}
    status, found, _ = hub.start(key="k", **falls)
    assert (status, found["backup_type"]) == (201, "full")
    assert "disk 2000 has no completed run" in found["fell_back"]
    assert request_of(hub)["fallback"] == "full"
    again = hub.start(key="k", **falls)
    assert (again.status, again.body["backup_id"]) == (201, found["backup_id"])
    for other in ({"backup_type": "incremental"}, {"backup_type": "full"}):
        refused(hub.start(key="k", **other), 422, "another", "fallback")
    job = found["backup_id"]
    hub.accepted(job)
    for disk in (0, 1):
        hub.ask("POST", f"{BACKUPS}/{job}/complete", {"change_id": "c", "disk_id": disk})
    hub.completed(job)
    assert hub.start(key="k", **falls).body["backup_id"] == job  # also when it has ended
    status, found, _ = hub.start(key="k2", **falls)
    assert (status, found["backup_type"], "fell_back" in found) == (201, "incremental", False)
    assert hub.start(key="k2", **falls).body["backup_id"] == found["backup_id"]
    refused(hub.start(key="k2", backup_type="incremental"), 422, "another fallback")


def test_a_name_that_several_vms_have_is_not_guessed(hub: Played) -> None:
    hub.knows(
        ctx_1={"name": "db", "disks": {2000: "1MiB"}}, ctx_2={"name": "db", "disks": {2000: "1MiB"}}
    )
    refused(hub.start("db"), 400, "'db' may be any of ctx-1, ctx-2")
    assert hub.start("ctx-2").status == 201


def test_a_vm_that_nobody_declares_is_known_by_the_inventory(hub: Played) -> None:
    (hub.folder / "specs" / "vms.yaml").unlink()
    hub.settings = hub.settings.__class__(
        **{
            **{name: getattr(hub.settings, name) for name in hub.settings.__struct_fields__},
            "repositories": {"local": str(hub.folder / "repository")},
        }
    )
    assert hub.start("pgtest2").status == 201


def test_a_spec_that_cannot_be_used_is_refused_with_its_place(hub: Played) -> None:
    hub.declares({"name": "ctx-1", "disks": [{"key": 2000, "size": "1MiB"}]})
    answer = hub.start()
    refused(answer, 400, "specs/vms.yaml:1:", "the inventory knows 2000 (1 MiB), 2001 (2 MiB)")
    assert "error:" not in answer.body["details"]
    hub.declares({"name": "ctx-1", "state": "absent"})
    refused(hub.start(), 400, "its spec says `state: absent`")
    hub.declares({"name": "ctx-1", "disk": "inventory"})
    refused(hub.start(), 400, "unknown key 'disk'")


def test_a_vm_that_may_be_in_a_file_that_cannot_be_read_is_not_unknown(hub: Played) -> None:
    (hub.folder / "specs" / "more.yaml").write_text("vms: [")
    refused(hub.start("ctx-9"), 503, "cannot tell whether there is a VM 'ctx-9'", "more.yaml")
    assert hub.start("ctx-1").status == 201


@pytest.mark.parametrize("state", [*OPEN, "DUE"])
def test_one_run_at_a_time(hub: Played, state: str) -> None:
    job = hub.start().body["backup_id"]
    hub.step(job, *OPEN.get(state, ()))
    answer = hub.start()
    refused(answer, 409, f"its backup_id is {job}; it is {state.replace('DUE', 'pending')}")
    way = "DELETE" if state == "DUE" else "GET"
    assert f"`{way} {BACKUPS}/{job}`" in answer.body["details"]
    assert answer.headers["location"] == f"{BACKUPS}/{job}"
    assert len(hub.store.ledger().calls) == 1


def test_what_waits_says_why_and_is_given_up_to_make_room(hub: Played) -> None:
    hub.played.up, hub.played.waits = False, "ParentMissing: its parent is missing"
    job = hub.start().body["backup_id"]
    way = f"; `DELETE {BACKUPS}/{job}` gives it up"
    said = f"its backup_id is {job}; it is pending, and waits: ParentMissing: its parent is missing"
    refused(hub.start(), 409, said + way)
    assert hub.ask("DELETE", f"{BACKUPS}/{job}").status == 200
    hub.played.up, hub.played.waits = True, ""
    assert hub.start().status == 201


def test_why_a_daemon_waits_is_told_without_what_only_a_command_can_do() -> None:
    host = a_chain()
    damage(host, "missing")
    planned_ = planned(host, wanting(overlay("r3", "r2")))
    (why, *_) = desk._standing(planned_.vms[0])
    assert why.startswith("ParentMissing: its parent ")
    assert why.endswith("is missing; bring it back; only a `backup_type` full gets past it")
    assert "reconciler" not in why


@pytest.mark.parametrize("state", [*ENDED, "REJECTED"])
def test_after_its_end_another_may_be_asked_for(hub: Played, state: str) -> None:
    job = hub.start().body["backup_id"]
    hub.step(job, *{**ENDED, **UNASKED}[state])
    answer = hub.start()
    assert answer.status == 201
    assert answer.body["backup_id"] != job


def test_a_run_that_the_vms_own_spec_asks_for_is_one_too(hub: Played) -> None:
    hub.declares({"name": "ctx-1", "disks": "inventory", "backup": {"run": "own"}})
    answer = hub.start()
    refused(answer, 409, "its run own has not ended", job_id(HUB, "ctx-1", "own", 1))
    assert "the VM's spec asks for it" in answer.body["details"]
    assert "DELETE" not in answer.body["details"]  # it is no request


def test_many_at_once_are_one_run(hub: Played) -> None:
    wish = Wish(vm="ctx-1", type="full", repository="local", who="test")
    found: list[object] = []

    def ask() -> None:
        try:
            found.append(hub.desk.book(wish).call.job_id)
        except RefusedError as error:
            found.append(error.why)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert len(found) == 6
    assert found.count(Why.ACTIVE) == 5
    assert len(hub.get().body["backups"]) == 1


def test_a_request_counts_before_the_daemon_has_read_it(
    hub: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = hub.desk.source()
    monkeypatch.setattr(hub.desk, "source", lambda: stale)
    hub.played.up, hub.played.waits = False, "not read yet"
    job = hub.start(key="k").body["backup_id"]
    assert hub.start(key="k").body["backup_id"] == job
    refused(hub.start(), 409, job)


# -- the same again


def test_the_same_key_is_the_same_backup(hub: Played) -> None:
    first = hub.start(key="k-1", tags={"a": "b"})
    assert first.status == 201
    assert request_of(hub)["run"] == keyed("ctx-1", "k-1")
    again = hub.start("pgtest1", key="k-1", tags={"a": "b"})
    assert (again.status, again.body) == (201, first.body)
    job = first.body["backup_id"]
    hub.accepted(job)
    assert hub.start(key="k-1", tags={"a": "b"}).body["status"] == "running"
    hub.completed(job)
    again = hub.start(key="k-1", tags={"a": "b"})
    assert (again.status, again.body["status"], again.body["backup_id"]) == (201, "completed", job)
    assert len(hub.store.ledger().calls) == 1
    assert hub.start("ctx-2", key="k-1").status == 201  # a key is a VM's own


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"backup_type": "incremental"}, "backup_type"), ({"policy_id": "q"}, "policy_id"),
     ({"tags": {"a": "c"}}, "tags"), ({"repository_id": "far"}, "repository_id")],
)  # fmt: skip
@pytest.mark.parametrize("held", [True, False])
def test_the_same_key_for_another_request_is_refused(
    hub: Played, changes: dict[str, Any], word: str, held: bool
) -> None:
    hub.played.up, hub.played.waits = held, "" if held else "PortPoolExhausted: none is free"
    hub.start(key="k-1", policy_id="p", tags={"a": "b"})
    changed = {"policy_id": "p", "tags": {"a": "b"}, **changes}
    refused(hub.start(key="k-1", **changed), 422, "another", word, "use a new key")


def test_a_crash_between_the_request_and_the_answer_is_made_good_by_the_same_key(
    hub: Played,
) -> None:
    """The request is written, and whoever wrote it is gone; the next to come knows nothing."""
    wish = Wish(vm="ctx-1", type="full", repository="local", who="a", key="k-1")
    booked = Desk(lambda: hub.settings, {}, lambda _: None).book(wish)
    other = Desk(lambda: hub.settings, {}, lambda _: None)
    again = other.book(wish)
    assert again.again
    assert again.call.job_id == booked.call.job_id
    assert len(list(Path(hub.settings.requests).glob("*.yaml"))) == 1
    other.close()


def test_a_key_that_is_known_is_answered_also_when_the_vm_has_gone(hub: Played) -> None:
    job = hub.start(key="k-1").body["backup_id"]
    hub.accepted(job)
    hub.completed(job)
    hub.knows(ctx_2={"disks": {2000: "1MiB"}})
    hub.declares({"name": "ctx-2", "disks": "inventory"})
    assert hub.start(key="k-1").body["backup_id"] == job
    refused(hub.start(key="k-2"), 404)


@pytest.mark.parametrize("key", ["x" * 256])
def test_a_key_beyond_all_sense_is_refused(hub: Played, key: str) -> None:
    refused(hub.start(key=key), 422, "dempotency")


# -- what is not up at once


def test_what_waits_is_answered_at_once_with_what_it_waits_for(hub: Played) -> None:
    hub.played.up, hub.played.waits = False, "PortPoolExhausted: no port is free"
    status, found, heads = hub.start(tags={"a": "b"})
    assert status == 202
    assert heads["location"] == f"{BACKUPS}/{found['backup_id']}"
    assert (found["status"], found["disk_results"], found["nbd_targets_string"]) == (
        "pending", [], ""
    )  # fmt: skip
    assert found["error_message"] == "PortPoolExhausted: no port is free"
    assert found["current_phase"] == "waiting: PortPoolExhausted: no port is free"
    assert (found["disks_count"], found["total_bytes"], found["tags"]) == (2, 3 * MIB, {"a": "b"})
    seen = hub.get(f"/{found['backup_id']}").body
    assert {**seen, "created_at": ""} == {**found, "created_at": ""}
    refused(hub.start(), 409, found["backup_id"])


def test_servers_that_do_not_answer_in_time_are_202(
    hub: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_api, "ANSWER", 0.1)
    hub.played.up = False
    assert hub.start().status == 202
    hub.played.bring_up("ctx-1")
    assert hub.get().body["backups"][0]["disk_results"][0]["status"] == "qemu_started"


def test_a_process_that_ends_does_not_wait(hub: Played) -> None:
    hub.played.up, hub.closing = False, True
    assert hub.start().status == 202


def test_where_nothing_is_started_it_is_said_who_does(plain: Played) -> None:
    status, found, _ = plain.start()
    assert status == 202
    assert "reconciler apply or reconciler watch makes it true" in found["current_phase"]
    assert plain.kicked == ["ctx-1"]
    assert plain.get("?status=pending").body["total"] == 1
    job = found["backup_id"]
    refused(plain.start(), 409, "reconciler apply or reconciler watch makes it true", job, "DELETE")


def test_who_changes_the_requests_is_not_waited_for_for_ever(
    hub: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reconciler.asking.LOCK", 0.1)
    folder = Path(hub.settings.requests)
    folder.mkdir()
    with lock.held(folder / ".lock", "reconciler backup", 5):
        refused(hub.start(), 503, "reconciler backup")
    assert hub.start().status == 201


# -- seeing


def test_a_run_from_the_start_to_the_end(hub: Played) -> None:
    job = hub.start().body["backup_id"]
    hub.accepted(job)
    found = hub.get(f"/{job}").body
    assert (found["status"], found["current_phase"]) == ("running", "accepted by the appliance")
    assert found["started_at"]
    word = {"status": "completed", "current_phase": "transferring", "bytes_transferred": 7,
            "total_bytes": 9, "transfer_speed_bps": 3, "progress_percent": 77.5}  # fmt: skip
    assert hub.ask("POST", f"/api/v1/telemetry/backup/{job}", word).status == 200
    found = hub.get(f"/{job}").body
    told = ("status", "current_phase", "bytes_transferred", "total_bytes", "transfer_speed_bps",
            "progress_percent")  # fmt: skip
    assert [found[name] for name in told] == ["running", "transferring", 7, 9, 3, 77.5]
    assert found["last_telemetry_at"]
    for disk in (1, 0):
        assert "change_id" not in hub.get(f"/{job}").body
        said = {"change_id": f"id-{disk}", "disk_id": disk, "bytes_transferred": 100}
        assert hub.ask("POST", f"{BACKUPS}/{job}/complete", said).status == 200
    hub.completed(job)
    found = hub.get(f"/{job}").body
    assert [found[name] for name in told] == ["completed", "completed", 200, 9, 0, 100.0]
    assert found["change_id"] == "id-0"
    assert found["completed_at"]
    assert [one["status"] for one in found["disk_results"]] == ["qemu_started"] * 2
    assert [one["qemu_nbd_pid"] for one in found["disk_results"]] == [None, None]
    assert found["disk_results"][0]["nbd_port"] == PORT


def test_a_run_that_failed_says_why_for_every_disk(hub: Played) -> None:
    job = hub.start().body["backup_id"]
    hub.accepted(job)
    hub.step(job, CallEvent.FAIL, message="no space left")
    found = hub.get(f"/{job}").body
    assert (found["status"], found["error_message"]) == ("failed", "no space left")
    assert [(one["status"], one["error_message"]) for one in found["disk_results"]] == [
        ("failed", "no space left")
    ] * 2


STATUSES = {
    "DUE": "pending", "INTENDED": "running", "ACCEPTED": "running", "UNKNOWN": "running",
    "REJECTED": "failed", "COMPLETED": "completed", "FAILED": "failed", "CANCELLED": "cancelled",
}  # fmt: skip


def test_every_state_has_its_status_and_can_be_asked_for(hub: Played) -> None:
    ways = {**UNASKED, **OPEN, **ENDED}
    assert ways.keys() == {str(state) for state in CallState} == STATUSES.keys()
    for number, (state, way) in enumerate(ways.items()):
        hub.past(f"ctx-{number}", "r1", *way, job_id=state)
    everything = hub.get().body
    assert everything["total"] == len(ways)
    assert [one["backup_id"] for one in everything["backups"]] == [*ways][::-1]
    assert {one["backup_id"]: one["status"] for one in everything["backups"]} == STATUSES
    for status in set(STATUSES.values()):
        found = hub.get(f"?status={status}").body
        meant = {state for state, told in STATUSES.items() if told == status}
        assert {one["backup_id"] for one in found["backups"]} == meant
        assert found["total"] == len(meant)


def test_filters_and_pages(hub: Played) -> None:
    for number in range(7):
        hub.past("ctx-1" if number % 2 else "ctx-2", f"r{number}", *ENDED["COMPLETED"],
                 job_id=f"j{number}", type="full" if number < 4 else "incremental")  # fmt: skip

    def jobs(query: str) -> tuple[str, int]:
        found = hub.get(f"?{query}").body
        return "".join(one["backup_id"][1:] for one in found["backups"]), found["total"]

    assert jobs("") == ("6543210", 7)
    assert jobs("vm_context_id=ctx-1") == ("531", 3)
    assert jobs("vm_name=name%20of%20ctx-2") == ("6420", 4)
    assert jobs("vm_name=ctx-2") == ("6420", 4)
    assert jobs("vm_context_id=name%20of%20ctx-2") == ("", 0)
    assert jobs("backup_type=incremental") == ("654", 3)
    assert jobs("backup_type=full&vm_name=ctx-1") == ("31", 2)
    assert jobs("limit=2") == ("65", 7)
    assert jobs("limit=2&offset=5") == ("10", 7)
    assert jobs("offset=7") == ("", 7)
    assert jobs("status=completed&limit=1&offset=1") == ("5", 7)
    assert jobs("repository_id=local") == ("", 0)  # these images are in none


@pytest.mark.parametrize(
    "query",
    ["status=done", "backup_type=all", "limit=0", "limit=1001", "limit=x", "offset=-1",
     f"offset={1 << 70}", "repository_id=nowhere"],
)  # fmt: skip
def test_what_no_run_can_match_is_refused(hub: Played, query: str) -> None:
    refused(hub.get(f"?{query}"), 422, query.split("=")[0])


def test_repositories_may_lie_in_one_another(hub: Played) -> None:
    inner = f"{hub.folder}/repository/inner"
    hub.settings = hub.settings.__class__(
        **{
            **{name: getattr(hub.settings, name) for name in hub.settings.__struct_fields__},
            "repositories": {**hub.settings.repositories, "inner": inner},
        }
    )
    job = hub.start().body["backup_id"]
    hub.declares({"name": "ctx-2", "disks": "inventory", "repository": "inner"})
    other = hub.start("ctx-2", repository_id="inner").body["backup_id"]
    for name, meant in (("local", job), ("inner", other)):
        found = hub.get(f"?repository_id={name}").body
        assert [one["backup_id"] for one in found["backups"]] == [meant]
        assert found["backups"][0]["repository_id"] == name


def test_what_is_only_asked_for_stands_first_and_counts(hub: Played) -> None:
    for number in range(3):
        hub.past("ctx-2", f"r{number}", *ENDED["COMPLETED"], job_id=f"j{number}")
    hub.played.up, hub.played.waits = False, "SnaBusy: it has 8 already"
    job = hub.start().body["backup_id"]
    pages = [hub.get(f"?limit=1&offset={n}").body for n in range(4)]
    assert [one["backups"][0]["backup_id"] for one in pages] == [job, "j2", "j1", "j0"]
    assert {one["total"] for one in pages} == {4}
    for query, total in (("status=pending", 1), ("status=completed", 3), ("vm_name=pgtest1", 1),
                         ("vm_name=pgtest2", 0), ("repository_id=local", 1),
                         ("repository_id=far", 0), ("backup_type=incremental", 0)):  # fmt: skip
        assert hub.get(f"?{query}").body["total"] == total, query
    hub.played.bring_up("ctx-1")
    assert hub.get().body["total"] == 4


def test_a_request_that_has_not_moved_is_not_made_out_again(
    hub: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every list asks for all requests, and most are of runs that have ended long ago."""
    monkeypatch.setattr("reconciler.asking.YOUNG", -(10**12))  # also what was written just now
    hub.played.up, hub.played.waits = False, "not now"
    jobs = {hub.start(vm).body["backup_id"] for vm in ("ctx-1", "ctx-2")}
    first, again = hub.desk.pending(), hub.desk.pending()
    assert {call.job_id for call in first} == jobs
    assert all(one is other for one, other in zip(first, again, strict=True))
    path = Path(hub.settings.requests) / "ctx-1.yaml"
    path.write_text(path.read_text().replace("run: ", "run: r-").replace('r-"', '"r-'))
    moved = {call.vm: call for call in hub.desk.pending()}
    assert moved["ctx-1"].run.startswith("r-api-")
    assert moved["ctx-2"] in first
    path.unlink()
    assert [call.vm for call in hub.desk.pending()] == ["ctx-2"]
    assert hub.desk.listing.known([]) == set()


def test_a_page_of_many_runs_reads_no_more_than_it_shows(
    hub: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        hub.past("ctx-2", f"r{number}", *ENDED["COMPLETED"], job_id=f"j{number}")
    read: list[str] = []

    def noted(path: Path, row: Sequence[Any]) -> Call:
        found = call_of(path, row)
        read.append(found.job_id)
        return found

    monkeypatch.setattr("reconciler.host.store.listing.call_of", noted)
    assert len(hub.get("?limit=5&offset=10").body["backups"]) == 5
    assert read == [f"j{number}" for number in (29, 28, 27, 26, 25)]


def test_a_list_is_read_by_an_index(hub: Played) -> None:
    with hub.played.listing.read() as db:
        assert db
        plan = db.execute(
            "EXPLAIN QUERY PLAN SELECT job_id FROM calls ORDER BY created DESC, rowid DESC LIMIT 9"
        ).fetchall()
    assert "calls_by_age" in str(plan)


@pytest.mark.parametrize("job", ["nobody", "%00%ff", "x" * 255])
def test_an_unknown_backup_is_not_found(hub: Played, job: str) -> None:
    refused(hub.get(f"/{job}"), 404, "knows no backup")
    refused(hub.get(f"/{job}/events"), 404)
    refused(hub.ask("DELETE", f"{BACKUPS}/{job}"), 404)
    refused(hub.get(f"/{job}/chain"), 404)
    refused(hub.get(f"/{'x' * 256}"), 422)


def test_before_there_is_a_store_there_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = Played(tmp_path, plain=True)
    found.store.close()
    for one in (tmp_path / "state").iterdir():
        one.unlink()
    assert found.get().body == {"backups": [], "total": 0}
    assert found.get("/stats").body["backup_count"] == 0
    refused(found.get("/j"), 404)
    found.loop.close()


# -- chains and figures


def test_a_chain_is_the_newest_of_one_disk(hub: Played) -> None:
    refused(hub.get("/ctx-1/chain"), 404, "no backup of a VM 'ctx-1'")
    jobs = []
    for number, kind in enumerate(["full", "full", "incremental", "incremental"]):
        job = hub.start(backup_type=kind).body["backup_id"]
        hub.accepted(job)
        for disk in (0, 1):
            said = {"change_id": f"id-{number}", "disk_id": disk}
            hub.ask("POST", f"{BACKUPS}/{job}/complete", said)
        hub.completed(job, allocated=1000 * (number + 1))
        jobs.append(job)
    for name in ("ctx-1", "pgtest1"):
        found = hub.get(f"/{name}/chain?disk_id=1").body
        assert {k: v for k, v in found.items() if k != "backups"} == {
            "chain_id": f"{jobs[1]}.disk1",
            "vm_context_id": "ctx-1",
            "vm_name": "pgtest1",
            "disk_id": 1,
            "repository_id": "local",
            "full_backup_id": jobs[1],
            "total_size_bytes": 9000,
            "backup_count": 3,
        }
        assert [one["backup_id"] for one in found["backups"]] == jobs[1:]
    refused(hub.get("/ctx-1/chain?disk_id=7"), 404, "position 7")
    refused(hub.get("/ctx-1/chain?disk_id=x"), 422, "disk_id")
    stats = hub.get("/stats").body
    assert (stats["backup_count"], stats["total_size_bytes"]) == (4, 20000)
    assert stats["last_backup_at"] == hub.get(f"/{jobs[3]}").body["completed_at"]
    assert hub.get("/stats?vm_name=pgtest1&repository_id=local").body == stats
    nothing = {"backup_count": 0, "total_size_bytes": 0, "last_backup_at": None}
    assert hub.get("/stats?repository_id=far").body == nothing
    assert hub.get("/stats?vm_name=pgtest2").body == nothing
    refused(hub.get("/stats?repository_id=x"), 422)
    hub.store.removed(jobs[0], hub.now())
    assert hub.get("/stats").body["backup_count"] == 3
    assert hub.get("/stats").body["total_size_bytes"] == 18000


def test_a_name_of_two_vms_has_no_chain(hub: Played) -> None:
    for vm in ("ctx-1", "ctx-2"):
        hub.past(vm, "r1", *ENDED["COMPLETED"], job_id=vm, display_name="db")
    refused(hub.get("/db/chain"), 400, "ctx-1, ctx-2")


# -- ending


@pytest.mark.parametrize("state", [*OPEN, *UNASKED])
def test_a_run_is_ended_by_order(hub: Played, state: str) -> None:
    hub.who = "operator"
    job = hub.start().body["backup_id"]
    hub.step(job, *{**OPEN, **UNASKED}[state])
    status, found, _ = hub.ask("DELETE", f"{BACKUPS}/{job}")
    assert (status, found["status"]) == (200, "cancelled")
    assert "by order of operator" in found["error_message"]
    assert ("the appliance cannot be told" in found["error_message"].replace("its", "the")) is (
        state in OPEN
    )
    assert hub.store.ledger().leases == ()
    refused(hub.ask("DELETE", f"{BACKUPS}/{job}"), 409, "it is CANCELLED already")
    (event,) = (e for e in events(Path(hub.settings.state), "ctx-1") if e.reason == "Cancelled")
    assert event.who == "operator"
    assert hub.start().status == 201


def test_a_run_that_is_only_asked_for_never_begins(hub: Played) -> None:
    hub.played.up, hub.played.waits = False, "SnaBusy: it has 8 already"
    job = hub.start(key="k").body["backup_id"]
    assert hub.ask("DELETE", f"{BACKUPS}/{job}").body["status"] == "cancelled"
    assert hub.call(job).state is CallState.CANCELLED
    hub.played.up, hub.played.waits = True, ""
    assert hub.start(key="k").body["status"] == "cancelled"
    assert hub.start().status == 201


def test_the_servers_of_another_run_are_left_alone(hub: Played) -> None:
    job = hub.start().body["backup_id"]
    hub.accepted(job)
    waiting = hub.past("ctx-1", "later", job_id="later")
    assert hub.ask("DELETE", f"{BACKUPS}/later").body["status"] == "cancelled"
    assert hub.call(waiting.job_id).state is CallState.CANCELLED
    assert (hub.call(job).state, len(hub.store.ledger().leases)) == (CallState.ACCEPTED, 2)
    ledger = hub.store.ledger()
    for call, leaves in ((waiting, False), (hub.call(job), True)):
        assert Cancel(vms=("ctx-1",), call=call).leaves(ledger) is leaves
    assert not Cancel(vms=("ctx-2",), call=waiting).leaves(ledger)  # nothing of it was ever there


@pytest.mark.parametrize("state", ENDED)
def test_what_has_ended_cannot_be_ended(hub: Played, state: str) -> None:
    hub.past("ctx-1", "r1", *ENDED[state], job_id="j")
    refused(hub.ask("DELETE", f"{BACKUPS}/j"), 409, f"it is {state} already")


def test_a_hub_that_is_being_changed_is_said(hub: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reconciler.asking.LOCK", 0.1)
    job = hub.start().body["backup_id"]
    with lock.held(Path(hub.settings.state) / "lock", "reconciler apply", 5):
        refused(hub.ask("DELETE", f"{BACKUPS}/{job}"), 503, "reconciler apply")
    assert hub.call(job).state is CallState.DUE


@pytest.mark.parametrize(
    ("trouble", "status"),
    [
        (HostError("cannot stop ctx-1: it is protected", "Protected"), 409),
        (StoreError("cannot write to the store", "Store"), 503),
    ],
)
def test_what_keeps_a_run_from_being_ended_is_said(
    hub: Played, monkeypatch: pytest.MonkeyPatch, trouble: HostError, status: int
) -> None:
    job = hub.start().body["backup_id"]

    def kept(*_: object) -> None:
        raise trouble

    monkeypatch.setattr(hub.desk, "carry_out", kept)
    refused(hub.ask("DELETE", f"{BACKUPS}/{job}"), status, str(trouble))
    assert hub.call(job).state is CallState.DUE


def test_a_daemon_that_has_not_read_its_specs_or_is_ending_is_not_ready(
    hub: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = threading.Event()
    daemon = SimpleNamespace(
        settings=hub.settings, environment={}, kick=print, reading=None, stopping=ending
    )
    desk = DaemonDesk(daemon)  # type: ignore[arg-type]
    monkeypatch.setattr(hub.desk, "source", desk.source)
    refused(hub.start(), 503, "the specs were not read yet")
    daemon.reading = SimpleNamespace(specs=None, inventory=None)
    ending.set()
    refused(hub.start(), 503, "the daemon is ending")
    desk.close()


# -- following


def told(text: str) -> list[tuple[str, str, Any]]:
    """(event, id, data) of a stream."""
    found = []
    for block in filter(None, text.split("\n\n")):
        if block.startswith(":"):
            continue
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((lines["event"], lines.get("id", ""), json.loads(lines["data"])))
    return found


def test_the_events_of_a_run_that_has_ended(hub: Played) -> None:
    from reconciler.host.store import Event

    call = hub.past("ctx-1", "r1", *ACCEPTED, job_id="j")
    for word in ("Created", "Started", "CallAccepted"):
        hub.store.record([Event(vm="ctx-1", run="r1", reason=word, message=word)], "t", hub.now())
        hub.store.record([Event(vm="ctx-1", run="r2", reason=word, message="x")], "t", hub.now())
    hub.store.advance(call, CallEvent.END, hub.now())
    answer = hub.get("/j/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = told(answer.body)
    assert [(kind, data.get("reason")) for kind, _, data in found] == [
        ("log", "Created"), ("log", "Started"), ("log", "CallAccepted"), ("end", None)
    ]  # fmt: skip
    assert found[-1][2] == hub.get("/j").body
    again = told(hub.get("/j/events", Last_Event_ID=found[1][1]).body)
    assert [data.get("reason") for _, _, data in again] == ["CallAccepted", None]
    for odd in ("x", "-1", str(1 << 90)):
        assert told(hub.get("/j/events", Last_Event_ID=odd).body)[-1][0] == "end"


# -- the description


def test_the_description_names_every_route_with_its_errors(hub: Played) -> None:
    status, found, _ = hub.ask("GET", "/openapi.json")
    assert status == 200
    ways = {f"{method.upper()} {path}" for path, one in found["paths"].items() for method in one}
    assert ways == {
        "POST /api/v1/backups", "GET /api/v1/backups", "GET /api/v1/backups/stats",
        "GET /api/v1/backups/changeid", "GET /api/v1/backups/{backup_id}",
        "DELETE /api/v1/backups/{backup_id}", "GET /api/v1/backups/{backup_id}/events",
        "GET /api/v1/backups/{vm_name}/chain", "POST /api/v1/backups/{backup_id}/complete",
        "POST /api/v1/telemetry/{job_type}/{job_id}", "GET /api/v1/health",
    }  # fmt: skip
    for path, operations in found["paths"].items():
        for method, one in operations.items():
            assert one["x-scope"], path
            assert one.get("description") or one.get("summary"), path
            if one["x-scope"] != "watch":
                assert {"400", "401", "403", "404", "409", "413", "422", "429", "503"} <= set(
                    one["responses"]
                )
            for number, answer in one["responses"].items():
                if int(number) >= 400 and path != "/api/v1/health":
                    shape = answer["content"]["application/json"]["schema"]
                    assert shape == {"$ref": "#/components/schemas/Error"}, (path, method, number)
    schemas = found["components"]["schemas"]
    assert all(one.get("examples") for name, one in schemas.items() if name not in ("DiskResult",))
    assert "HTTPValidationError" not in schemas


def test_a_run_that_can_only_fail_or_is_silent_says_why_it_is_still_running(hub: Played) -> None:
    job = hub.start().body["backup_id"]
    hub.accepted(job)
    assert hub.get(f"/{job}").body.get("error_message", "") == ""
    call, settings = hub.call(job), a_settings()
    for one, now, words in (
        (call, call.changed + 299, ""),
        (call, call.changed + 300, "nothing was heard of it since "),
        (replace(call, tainted=True), call.changed, "a server died under a client: "),
    ):
        shown = Shown(call=one, telemetry=None, reports={}, leases=())
        found = view(shown, settings, {}, now=now)
        assert (found.status, bool(found.error_message)) == ("running", bool(words))
        assert found.error_message.startswith(words)
    reports = {
        export.position: DiskReport(
            job_id=job, position=export.position, change_id="c", bytes=1, at=call.changed
        )
        for export in call.exports
    }
    whole = Shown(call=call, telemetry=None, reports=reports, leases=())
    assert view(whole, settings, {}, now=call.changed + 999).error_message == ""
