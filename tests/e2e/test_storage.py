"""Repositories that hang, are full or read-only; and the logs of the servers."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from reconciler import hub
from reconciler.core.plan import Plan
from reconciler.execute import Step
from reconciler.host import images, patience, qemu_nbd
from reconciler.host.sna import Line
from reconciler.loop import Applier, Outcome, desire, load_settings, load_source
from tests.e2e.site import Appliance, Site, until
from tests.mounts import Hung, Mounts

MIB = 1 << 20


def two(site: Site, **changes: Any) -> Path:
    """ctx-1 in a repository of its own, ctx-2 in another: its directory, a mount or none."""
    far = site.folder / "far"
    far.mkdir()
    roots = {"local": {"root": "repository", "min_free": "1MiB"},
             "far": {"root": "far", "min_free": "1MiB"}}  # fmt: skip
    site.write_config(repositories=roots)
    site.spec(
        site.vm("ctx-1", repository="local"),
        site.vm("ctx-2", [64 * MIB], repository="far", **changes),
    )
    return far


def called(appliance: Appliance) -> list[str]:
    """The VMs whose backup was started, once for each time."""
    return sorted(start["vm_name"] for start in appliance.starts())


def stands(vm: Mapping[str, Any], kind: str) -> tuple[str, str]:
    """Status and reason of a condition."""
    found = next(one for one in vm["conditions"] if one["type"] == kind)
    return found["status"], found["reason"]


# -- a repository that hangs


def test_a_repository_that_hangs_holds_up_its_own_vm_and_no_other(
    site: Site, appliance: Appliance, hangable: Mounts
) -> None:
    far = two(site)
    hung = hangable.hung(far)
    text = site.apply(code=3)
    assert "StorageHangs" in text
    assert f"no answer from the storage of {far} (fuse, hung at {far}) within 5 s" in " ".join(
        text.split()
    )
    assert called(appliance) == ["ctx-1"]
    assert set(site.pids()) == {("ctx-1", 2000)}
    status = site.status()
    assert stands(status["ctx-1"], "Ready") == ("True", "Converged")
    assert stands(status["ctx-2"], "Stalled") == ("True", "StorageHangs")
    assert site.changes() == [("ctx-2", None, "refuse")]
    assert "see to that storage" in site.run("explain", "ctx-2")
    hung.end()
    site.apply()
    assert called(appliance) == ["ctx-1", "ctx-2"]
    assert site.condition("ctx-2", "Ready")[:2] == ("True", "Converged")


def test_a_hang_under_an_accepted_run_stops_and_restarts_nothing(
    site: Site, appliance: Appliance, hangable: Mounts
) -> None:
    far = two(site)
    site.apply()
    before = site.servers()
    hung = hangable.hung(far)
    text = site.apply(code=3)
    assert "nothing of this VM is changed" in " ".join(text.split())
    assert site.servers() == before
    status = site.status()["ctx-2"]
    assert status["call"]["state"] == "ACCEPTED"
    assert status["disks"][0]["ready"]
    site.spec({"name": "ctx-2", "state": "absent"})
    site.apply(code=1)
    assert site.servers() == before
    hung.end()
    two_again = [site.vm("ctx-1", repository="local"),
                 site.vm("ctx-2", [64 * MIB], repository="far")]  # fmt: skip
    site.spec(*two_again)
    assert site.changes() == []
    site.apply()
    assert site.servers() == before
    assert called(appliance) == ["ctx-1", "ctx-2"]


def test_an_order_about_one_vm_does_not_wait_for_the_repository_of_another(
    site: Site, appliance: Appliance, hangable: Mounts
) -> None:
    far = two(site)
    site.apply()
    appliance.misbehave("forget")
    hangable.hung(far)
    site.run("resolve", "ctx-1", "--resend", "--reason", "x", "-y")
    text = site.run("resolve", "ctx-2", "--resend", "--reason", "x", "-y", code=1)
    assert (
        f"cannot take over the claim of run r1 of ctx-2: no answer from the storage of {far}"
        in (text)
    )
    assert site.status()["ctx-1"]["call"]["attempt"] == 2


class Here:
    """An apply in this process, so that the storage can begin to hang at any moment of it."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(site.folder)
        monkeypatch.setattr(hub, "EFFECT", 4.0)
        monkeypatch.setattr(hub, "SPARE", 1.0)
        monkeypatch.setattr(images, "CREATE_TIMEOUT", 4.0)
        monkeypatch.setattr(patience, "QUIET", 3.0)
        self.settings = load_settings(None, os.environ)
        self.source = load_source(["specs"], self.settings)
        self.steps: list[Step] = []

    def apply(self, looked: Callable[[], object] = lambda: None) -> Outcome:
        """`looked`: what happens between the first look and what is done about it."""
        todo = [looked]

        def once(_plan: Plan, _actual: object) -> None:
            if todo:
                todo.pop()()

        applier = Applier(self.settings, os.environ, self.steps.append, looked=once)
        outcome = applier.apply(desire(self.source, self.settings))
        assert outcome is not None
        return outcome

    def failed(self) -> set[tuple[str, str]]:
        return {(step.action.vm, step.reason) for step in self.steps if not step.ok}


def test_a_repository_that_hangs_after_the_look_is_given_up(
    site: Site, appliance: Appliance, hangable: Mounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = two(site)
    here = Here(site, monkeypatch)
    here.apply(lambda: hangable.hung(far))
    assert here.failed() == {("ctx-2", "StorageHangs")}
    (said,) = [step.message for step in here.steps if step.reason == "StorageHangs"]
    assert said == (
        f"cannot claim run r1 of ctx-2: no answer from the storage of {far} "
        f"(fuse, hung at {far}) within 4 s"
    )
    assert called(appliance) == ["ctx-1"]
    assert set(site.pids()) == {("ctx-1", 2000)}


def test_an_image_whose_creation_hangs_is_given_up(
    site: Site, appliance: Appliance, hangable: Mounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = two(site)
    here = Here(site, monkeypatch)
    claim = hub.Hub.claim

    def then_hang(self: hub.Hub, vm: Any) -> None:
        claim(self, vm)
        if vm.name == "ctx-2":
            hangable.hung(far)

    monkeypatch.setattr(hub.Hub, "claim", then_hang)
    here.apply()
    assert ("ctx-2", "StorageHangs") in here.failed()
    assert called(appliance) == ["ctx-1"]


def test_a_call_is_not_made_when_its_intent_hangs(
    site: Site, appliance: Appliance, hangable: Mounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = two(site)
    here = Here(site, monkeypatch)
    mounted: list[Hung] = []
    preflight = Line.preflight

    def then_hang(self: Line) -> None:
        preflight(self)
        if not mounted:
            mounted.append(hangable.hung(far))

    site.spec(site.vm("ctx-2", [64 * MIB], repository="far"))
    here.source = load_source(["specs"], here.settings)
    monkeypatch.setattr(Line, "preflight", then_hang)
    here.apply()
    assert here.failed() == {("ctx-2", "CallNothingSent")}
    assert called(appliance) == []
    assert site.status()["ctx-2"]["call"]["state"] == "DUE"
    mounted[0].end()
    assert not (far / "ctx-2" / ".intent-r1-a1").exists()
    until(lambda: not patience.hangs(str(far)), "the end of what was left behind")
    here.apply()
    assert called(appliance) == ["ctx-2"]


def test_an_image_that_is_a_fifo_is_refused_at_once(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    path = site.image("ctx-1")
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    text = site.apply(code=3)
    assert f"ImageUnreadable: cannot look at {path}: it is a FIFO, not a file" in text
    assert called(appliance) == ["ctx-2"]


# -- a repository that is full


def test_a_run_begins_only_where_there_is_room_for_it(
    site: Site, appliance: Appliance, mounts: Mounts
) -> None:
    far = two(site)
    small = mounts.small(far, 32)
    roots = {"local": {"root": "repository", "min_free": "1MiB"},
             "far": {"root": "far", "min_free": "40MiB"}}  # fmt: skip
    site.write_config(repositories=roots)
    text = " ".join(site.apply(code=3).split())
    assert f"SpaceShort: the run needs about 40 MiB on {far}, which has 32 MiB free" in text
    assert f"df -h {far}" in text
    assert called(appliance) == ["ctx-1"]
    assert list(far.iterdir()) == []
    assert len(site.listening()) == 1
    assert site.condition("ctx-2", "Stalled")[:2] == ("True", "SpaceShort")
    assert "see to that storage" in site.run("explain", "ctx-2")
    small.resize(48)
    text = site.apply()
    assert "SpaceUnsure" in text  # 64 MiB of disk on 48
    assert called(appliance) == ["ctx-1", "ctx-2"]
    assert site.condition("ctx-2", "SpaceUnsure")[:2] == ("True", "FullDisksDoNotFit")


def test_a_repository_that_fills_up_under_a_run_is_said_and_nothing_is_stopped(
    site: Site, appliance: Appliance, mounts: Mounts
) -> None:
    far = two(site)
    small = mounts.small(far, 48)
    site.apply()
    before = site.servers()
    port = site.status()["ctx-2"]["disks"][0]["port"]
    filler = small.fill(leave=8 * MIB)
    source = site.folder / "source.raw"
    source.write_bytes(os.urandom(16 * MIB) + bytes(48 * MIB))
    line = ["nbdcopy", str(source), f"nbd://127.0.0.1:{port}/ctx-2-r1-disk0"]
    copied = subprocess.run(line, capture_output=True, text=True, check=False)
    assert "No space left on device" in copied.stderr
    text = " ".join(site.apply(code=4).split())
    assert "RepositoryFull" in text
    assert "writes of run r1 fail" in text
    assert site.servers() == before
    assert site.condition("ctx-2", "Stalled")[:2] == ("True", "RepositoryFull")
    assert site.status()["ctx-2"]["disks"][0]["ready"]
    assert site.condition("ctx-1", "Ready")[:2] == ("True", "Converged")
    filler.unlink()
    assert subprocess.run(line, check=False).returncode == 0  # the same server goes on
    site.apply()
    assert site.servers() == before


def test_nothing_begins_in_a_repository_that_is_read_only(
    site: Site, appliance: Appliance, mounts: Mounts
) -> None:
    far = two(site)
    small = mounts.small(far, 64)
    small.read_only()
    text = " ".join(site.apply(code=3).split())
    assert f"RepositoryReadOnly: {far} is mounted read-only" in text
    assert f"mount -o remount,rw {far}" in text
    assert called(appliance) == ["ctx-1"]
    assert len(site.listening()) == 1
    small.read_only(False)
    site.apply()
    assert called(appliance) == ["ctx-1", "ctx-2"]


# -- logs


def test_a_log_is_cut_while_its_server_runs(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    (pid,) = site.pids().values()
    port = site.status()["ctx-1"]["disks"][0]["port"]
    log = site.folder / "state" / "logs" / "ctx-1-2000-r1.log"
    with log.open("a") as file:  # what it would have said in a month
        file.write("an old line\n" * (qemu_nbd.LOG_LIMIT // 12))

    def said() -> int:
        return log.read_text().count("option negotiation failed")

    def flood(count: int) -> None:
        before = said()
        for _ in range(count):
            socket.create_connection(("127.0.0.1", port)).close()
        until(lambda: said() == before + count, "a line for each of them")

    flood(200)
    assert log.stat().st_size > qemu_nbd.LOG_LIMIT
    site.apply()
    assert log.stat().st_size <= qemu_nbd.LOG_KEPT
    assert "an old line" in log.read_text()
    assert said() == 200
    flood(50)
    assert said() == 250
    assert "\0" not in log.read_text()
    assert set(site.pids().values()) == {pid}


def test_logs_of_runs_that_ended_are_kept_for_ninety_days(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    logs = site.folder / "state" / "logs"
    gone, young, mine = (logs / f"ctx-{n}-2000-r1.log" for n in (8, 9, 1))
    for path, days in ((gone, 91), (young, 89), (mine, 91)):
        path.touch()
        moment = time.time() - days * 86400
        os.utime(path, (moment, moment))
    site.run("status")
    site.run("plan")
    assert gone.exists()  # who only looks removes nothing
    site.apply()
    assert set(logs.iterdir()) == {young, mine}
