"""No run begins before its SNA answers: nothing is made for it, and it goes on by itself."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from reconciler.host import proc
from reconciler.host.store import NAME, read
from tests.core.builders import says
from tests.e2e.site import Appliance, Site, until
from tests.e2e.watching import watching

MIB = 1 << 20
UNREACHABLE = "ApplianceUnreachable"


@contextmanager
def closing_tunnel() -> Iterator[tuple[str, list[float]]]:
    """A port that is accepted and closed, as by an sshd with nothing behind; when it was asked."""
    asked: list[float] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            asked.append(time.monotonic())
            client.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


def nothing_begun(site: Site) -> None:
    """No server, no port, no file, no directory, no claim, no row."""
    assert site.servers() == {}
    assert site.listening() == set()
    repository = site.folder / "repository"
    assert not repository.exists() or list(repository.iterdir()) == []
    ledger = read(site.folder / "state")
    if ledger:
        assert ledger.leases == ()
        assert list(ledger.calls) == []


def warnings(site: Site) -> list[tuple[str, int]]:
    """(VM, how often) of the events that tell of it."""
    if read(site.folder / "state") is None:
        return []  # nothing was written down yet
    with closing(sqlite3.connect(site.folder / "state" / NAME, timeout=20)) as db:
        rows = db.execute(
            "SELECT vm, count FROM events WHERE reason = ? ORDER BY vm", (UNREACHABLE,)
        )
        return list(rows)


def test_an_apply_begins_nothing_and_the_next_one_all(site: Site, appliance: Appliance) -> None:
    appliance.end()
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    assert site.changes() == [("ctx-1", None, "wait")]
    nothing_begun(site)
    for _ in range(2):
        text = site.apply(code=3)
        says(text, UNREACHABLE, f"SNA site-a at {appliance.url}: tunnel: nothing listens there",
             "next: on the SNA reconciler status")  # fmt: skip
        nothing_begun(site)
    assert warnings(site) == [("ctx-1", 1)]
    assert site.condition("ctx-1", "Ready")[:2] == ("False", UNREACHABLE)
    assert site.condition("ctx-1", "Reconciling")[:2] == ("True", UNREACHABLE)
    assert site.condition("ctx-1", "Stalled")[:2] == ("False", "NotStalled")
    says(site.run("status"), UNREACHABLE, "0/2")
    says(site.run("explain", "ctx-1"), f"not ready: {UNREACHABLE}",
         "next: on the SNA reconciler status and reconciler explain tunnel/NAME, here "
         "reconciler doctor --only tunnel; then reconciler apply")  # fmt: skip
    appliance.start()
    site.apply()
    assert len(appliance.starts()) == 1
    assert site.condition("ctx-1", "Ready")[:2] == ("True", "Converged")
    assert warnings(site) == [("ctx-1", 1)]


def test_status_and_validate_ask_nobody(site: Site) -> None:
    with closing_tunnel() as (url, asked):
        site.appliance_at(url)
        site.spec(site.vm("ctx-1"), site.vm("ctx-2"), site.vm("ctx-3"))
        site.run("validate")
        assert asked == []
        site.run("plan")
        assert len(asked) == 1  # one question for all its VMs
        site.apply(code=3)
        assert len(asked) == 2
        site.run("status")
        site.run("explain", "ctx-1")
        assert len(asked) == 2
        nothing_begun(site)


def test_one_sna_that_is_away_is_no_matter_to_the_vms_of_another(
    site: Site, appliance: Appliance
) -> None:
    with closing_tunnel() as (url, _):
        site.write_config(snas={**site.config["snas"], "site-b": {"url": url}})
        site.spec(site.vm("ctx-1", sna="site-a"), site.vm("ctx-2", sna="site-b"))
        text = site.apply(code=3)
        says(text, "ctx-2: wait: ApplianceUnreachable: SNA site-b")
        assert set(site.pids()) == {("ctx-1", 2000)}
        assert len(appliance.starts()) == 1
        assert warnings(site) == [("ctx-2", 1)]


def test_the_run_after_one_that_ended_waits_too_and_keeps_no_port(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    site.run("resolve", "ctx-1", "--failed", "--reason", "test", "-y")
    appliance.end()
    site.spec(site.vm("ctx-1", backup={"run": "r2"}))
    site.apply(code=3)
    assert site.servers() == {}
    assert site.listening() == set()
    assert not site.image("ctx-1", run="r2").exists()
    assert site.condition("ctx-1", "Ready")[:2] == ("False", UNREACHABLE)


def test_what_was_begun_stays_up_while_the_sna_is_away(site: Site, appliance: Appliance) -> None:
    appliance.misbehave("sickens")
    site.spec(site.vm("ctx-1"))
    site.apply(code=1)
    appliance.end()
    ((_, pid),) = site.pids().items()
    site.kill(pid)
    assert "nothing was sent" in site.apply(code=1)  # it is served again, and called for
    assert len(site.servers()) == 1


def figure(site: Site, name: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", site.api, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return next((line.split()[-1] for line in text.splitlines() if line.startswith(name)), "")


def asks(site: Site, method: str, path: str, body: object = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", site.api, timeout=60)
    connection.request(method, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    return answer.status, found


def test_the_daemon_asks_for_all_and_goes_on_by_itself(site: Site, appliance: Appliance) -> None:
    appliance.end()
    site.write_config(loop={"resync": "1s"})
    site.inventory({"ctx-9": {2000: MIB}})
    names = [f"ctx-{n}" for n in range(1, 6)]
    known = {name: {2000: MIB} for name in (*names, "ctx-9")}
    site.inventory(known)
    site.spec(*map(site.vm, names))
    with watching(site) as daemon:
        until(lambda: all(site.status().get(name) for name in names), "every VM is known")
        until(lambda: len(warnings(site)) == 5, "a warning each")
        status, found = asks(
            site, "POST", "/api/v1/backups",
            {"vm_name": "ctx-9", "backup_type": "full", "repository_id": "local"},
        )  # fmt: skip
        assert status == 202
        assert found["status"] == "pending"
        job = f"/api/v1/backups/{found['backup_id']}"
        until(lambda: UNREACHABLE in asks(site, "GET", job)[1]["error_message"], "the reason")
        says(asks(site, "GET", job)[1]["current_phase"], "waiting: ", "nothing listens there")
        time.sleep(2.5)  # two resyncs
        nothing_begun(site)
        assert figure(site, 'reconciler_appliance_up{sna="site-a"}') == "0.0"
        assert daemon.log.count("cannot reach an SNA") == 1
        appliance.start()
        until(lambda: len(appliance.starts()) == 6, "every call, by itself", 45)
        until(lambda: asks(site, "GET", job)[1]["status"] == "running", "the job at the API")
        assert figure(site, 'reconciler_appliance_up{sna="site-a"}') == "1.0"
        assert daemon.log.count("an SNA is well again") == 1
    assert warnings(site) == [(name, 1) for name in (*names, "ctx-9")]


def test_many_vms_of_a_daemon_are_few_questions(site: Site) -> None:
    with closing_tunnel() as (url, asked):
        site.appliance_at(url)
        site.write_config(loop={"resync": "1s"})
        site.spec(*(site.vm(f"ctx-{n}") for n in range(1, 13)))
        began = time.monotonic()
        with watching(site):
            until(lambda: len(warnings(site)) == 12, "a warning each")
            until(lambda: len(asked) >= 2, "asked again by the clock", 30)
            for name in ("ctx-1", "ctx-2"):  # what is saved is looked at at once, and asks nobody
                site.spec(site.vm(name, labels={"a": "b"}), file="vms.yaml")
                time.sleep(0.3)
            took = time.monotonic() - began
        gaps = [two - one for one, two in pairwise(asked)]
        assert len(asked) <= 2 + took / 5, gaps
        assert min(gaps) > 4.5
        nothing_begun(site)


def test_an_sna_that_hangs_holds_nobody_up_from_the_first_look_on(
    site: Site, appliance: Appliance
) -> None:
    """The resync, which looks at all VMs, asks nobody."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        sna = {"url": f"http://127.0.0.1:{mute.getsockname()[1]}", "connect_timeout": "8s"}
        site.write_config(snas={**site.config["snas"], "mute": sna})
        site.spec(site.vm("ctx-1", sna="mute"), site.vm("ctx-2", sna="site-a"))
        began = time.monotonic()
        with watching(site, ready=False) as daemon:
            until(lambda: len(appliance.starts()) == 1, "the call of the other VM")
            assert time.monotonic() - began < 7, "it waited for an appliance of others"
            daemon.process.kill()


def test_a_config_that_is_mended_is_asked_at_once(site: Site, appliance: Appliance) -> None:
    right = site.config["snas"]
    with closing_tunnel() as (url, _):
        site.appliance_at(url)
        site.spec(site.vm("ctx-1"))
        with watching(site):
            until(lambda: warnings(site) == [("ctx-1", 1)], "the wait")
            site.write_config(snas=right)
            site.run("reload")
            until(lambda: len(appliance.starts()) == 1, "the call", 4)


def test_an_apply_by_hand_asks_at_once_also_through_the_daemon(
    site: Site, appliance: Appliance
) -> None:
    appliance.end()
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    with watching(site):
        until(lambda: len(warnings(site)) == 2, "a warning each")
        assert UNREACHABLE in site.apply("--vm", "ctx-1", code=3)
        appliance.start()
        began = time.monotonic()
        site.apply("--vm", "ctx-1")
        assert time.monotonic() - began < 4.5, "it waited for the next question"
        until(lambda: len(appliance.starts()) == 2, "the other one, who was told of it", 4)


def test_who_waits_for_the_end_of_a_run_waits_for_its_beginning_too(
    site: Site, ending: Appliance
) -> None:
    ending.end()
    ending.source("ctx-1", 2000, b"x" * MIB)
    site.spec(site.vm("ctx-1"))
    process = site.start("apply", "-y", "--wait", "--timeout", "60s")
    until(lambda: warnings(site) == [("ctx-1", 1)], "the wait")
    nothing_begun(site)
    ending.start()
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, out + err
    assert len(ending.starts()) == 1
    assert site.condition("ctx-1", "Ready")[:2] == ("True", "Completed")


def test_a_saved_plan_is_not_used_up_while_the_sna_is_away(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))
    site.run("plan", "--out", "a.plan")
    appliance.end()
    assert UNREACHABLE in site.run("apply", "a.plan", "-y", code=5)
    nothing_begun(site)
    appliance.start()
    site.run("apply", "a.plan", "-y")
    assert len(appliance.starts()) == 1


def test_a_restore_needs_no_sna(site: Site, appliance: Appliance, tmp_path: Path) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    site.reported("ctx-1")
    shutil.copy(site.image("ctx-1"), tmp_path / "copy.qcow2")
    appliance.end()
    (site.folder / "repository" / "kept").mkdir()
    kept = shutil.move(tmp_path / "copy.qcow2", site.folder / "repository" / "kept" / "a.qcow2")
    disk = {"key": 2000, "image": str(Path(kept).relative_to(site.folder / "repository"))}
    site.spec({"name": "look", "state": "exported", "for": "restore", "disks": [disk]},
              file="look.yaml")  # fmt: skip
    site.apply("--vm", "look", code=None)
    assert ("look", 2000) in site.pids()
    assert proc.identify(site.pids()["look", 2000]) is not None
