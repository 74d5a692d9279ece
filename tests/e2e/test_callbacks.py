"""What the appliance's client tells the hub: heard by `apply --wait` and by `serve`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reconciler.core.ledger import DiskReport, Ledger
from reconciler.host.store import events, read
from tests.e2e.site import Appliance, Site, until

MIB = 1 << 20


@pytest.fixture
def telling(tmp_path: Path, site: Site) -> Iterator[Appliance]:
    """The reference appliance, known as site-a, whose client tells the hub how it goes."""
    found = Appliance(tmp_path / "appliance", "--hub", f"http://127.0.0.1:{site.api}")
    site.appliance_at(found.url)
    yield found
    found.end()


@pytest.fixture
def lasting(tmp_path: Path, site: Site) -> Iterator[Appliance]:
    """The same, with copies that last. Its client waits 2 s for the hub and then goes on, and a hub
    that has only begun may take longer on a busy machine."""
    hub = f"http://127.0.0.1:{site.api}"
    found = Appliance(tmp_path / "appliance", "--hub", hub, "--slow", "4")
    site.appliance_at(found.url)
    yield found
    found.end()


@pytest.fixture
def running(site: Site) -> Iterator[list[subprocess.Popen[str]]]:
    """Commands that stay; those that are left at the end are ended."""
    found: list[subprocess.Popen[str]] = []
    yield found
    for process in found:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=20)


def serve(
    site: Site, running: list[subprocess.Popen[str]], *arguments: str
) -> subprocess.Popen[str]:
    """`reconciler serve`, from when it answers."""
    process = site.start("serve", *arguments)
    running.append(process)
    until(lambda: process.poll() is not None or health(site) == process.pid, "serve")
    assert process.poll() is None, process.communicate()
    return process


def health(site: Site) -> int | None:
    """The pid of who takes callbacks."""
    found = ask(site, "/api/v1/health")
    return found["pid"] if found else None


def ask(site: Site, path: str, body: object = None) -> Any:
    """The answer, or None if nobody listens."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{site.api}{path}", data)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        raise
    except OSError:
        return None


def ledger(site: Site) -> Ledger:
    found = read(site.folder / "state")
    assert found is not None
    return found


def reports(site: Site, vm: str = "ctx-1", run: str = "r1") -> dict[int, DiskReport]:
    """Position → what was reported of that disk of a run."""
    found = read(site.folder / "state")
    call = found.latest(vm, run) if found else None
    return dict(found.reports.get(call.job_id, {})) if found and call else {}


def arrived(site: Site, count: int, vm: str = "ctx-1", run: str = "r1") -> None:
    until(lambda: len(reports(site, vm, run)) == count, f"the report of {count} disks")


def told(site: Site, vm: str = "ctx-1") -> list[str]:
    return [event.reason for event in events(site.folder / "state", vm)]


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> str:
    """End a command in order; its stderr."""
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], err
    assert "Traceback" not in err, err
    return err


def reads(process: subprocess.Popen[str], words: str) -> str:
    """What a command says on stderr, up to a line with those words."""
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if words in line:
            return seen
    raise AssertionError(f"it never said {words!r}: {seen}")


def refusals(appliance: Appliance) -> list[str]:
    """What its client was refused by the hub."""
    lines = (appliance.folder / "stderr").read_text().splitlines()
    return [line for line in lines if "it answers" in line]


# -- apply --wait


def test_apply_that_waits_hears_every_disk(
    site: Site, lasting: Appliance, running: list[subprocess.Popen[str]]
) -> None:
    for key in (2000, 2001):
        lasting.source("ctx-1", key, os.urandom(MIB))
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    process = site.start("apply", "-y", "--wait")
    running.append(process)
    arrived(site, 2)
    (done,) = until(lambda: lasting.log_lines("end") or None, "the end of the copies")
    invented = {int(disk["key"]): disk["change_id"] for disk in done["disks"]}
    assert {2000 + p: one.change_id for p, one in reports(site).items()} == invented
    assert [one.bytes for one in reports(site).values()] == [MIB, MIB]
    if process.poll() is None:
        process.terminate()
    _, err = process.communicate(timeout=60)
    assert "warning" not in err
    assert refusals(lasting) == []
    assert len(lasting.starts()) == 1


def test_a_run_ends_when_its_last_disk_is_reported(site: Site, telling: Appliance) -> None:
    """The whole way, with nothing but callbacks."""
    for key in (2000, 2001):
        telling.source("ctx-1", key, os.urandom(MIB))
    # It would look again only after an hour: a kick ends the rest.
    site.appliance_at(telling.url, poll="1h")
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply("--wait", "--timeout", "60s")
    assert site.status()["ctx-1"]["call"]["state"] == "COMPLETED"
    assert site.servers() == {}


def test_the_client_may_speak_before_the_call_is_answered(
    site: Site, lasting: Appliance, running: list[subprocess.Popen[str]]
) -> None:
    lasting.source("ctx-1", 2000, os.urandom(MIB))
    site.appliance_at(lasting.url, timeout="60s")
    lasting.misbehave("hang-after", 1)
    site.spec(site.vm("ctx-1"))
    running.append(site.start("apply", "-y", "--wait"))
    arrived(site, 1)
    assert ledger(site).calls[0].state == "INTENDED"
    assert refusals(lasting) == []
    assert "1 of 1 disks (2000)" in site.run("explain", "ctx-1")
    assert site.status()["ctx-1"]["disks"][0]["reported"] is True


def test_an_address_that_a_stranger_has_is_named_and_the_work_goes_on(
    site: Site, appliance: Appliance
) -> None:
    stranger = site.other(
        sys.executable, "-c",
        "import socket, sys, time; s = socket.socket(); s.bind(('127.0.0.1', int(sys.argv[1]))); "
        "s.listen(); time.sleep(600)", str(site.api),
    )  # fmt: skip
    until(lambda: taken(site.api), "the stranger")
    site.spec(site.vm("ctx-1"))
    text = site.apply("--wait", "--timeout", "2s", code=124)
    assert f"warning: cannot listen on 127.0.0.1:{site.api}" in text
    assert f"(pid {stranger.pid}) does; callbacks are not heard" in text
    assert "callbacks are not heard, so this goes on until" in text
    assert len(appliance.starts()) == 1


def taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_beside_serve_apply_leaves_the_callbacks_to_it_and_takes_them_over_when_it_ends(
    site: Site, appliance: Appliance, running: list[subprocess.Popen[str]]
) -> None:
    site.spec(site.vm("ctx-1"))
    served = serve(site, running)
    process = site.start("apply", "-y", "--wait")
    running.append(process)
    seen = reads(process, "waiting; SNA")
    assert f"callbacks are taken by pid {served.pid} (reconciler serve" in seen
    assert "one ends when the client has reported every disk" in seen
    end(served)
    until(lambda: health(site) == process.pid, "apply to take over")
    end(process)


def test_apply_that_does_not_wait_listens_to_nobody(site: Site, appliance: Appliance) -> None:
    with socket.socket() as other:  # whoever has the address
        other.bind(("127.0.0.1", site.api))
        other.listen()
        site.spec(site.vm("ctx-1"))
        assert "callbacks" not in site.apply()


# -- serve


def test_telemetry_after_the_first_disk_completes_nothing_and_repeats_change_nothing(
    site: Site, appliance: Appliance, running: list[subprocess.Popen[str]]
) -> None:
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    site.apply()
    serve(site, running)
    job = ledger(site).calls[0].job_id
    done = {"change_id": "52 d0/1", "disk_id": 0, "bytes_transferred": MIB}
    word = {"status": "completed", "current_phase": "completed", "progress_percent": 100.0,
            "bytes_transferred": MIB, "total_bytes": 2 * MIB}  # fmt: skip
    for _ in range(2):
        assert ask(site, f"/api/v1/backups/{job}/complete", done)["change_id"] == "52 d0/1"
        assert ask(site, f"/api/v1/telemetry/backup/{job}", word)["status"] == "success"
    assert "100 %, 1 MiB of 2 MiB, completed," in site.run("status")
    vm = site.status()["ctx-1"]
    assert vm["call"]["state"] == "ACCEPTED"
    assert [disk["reported"] for disk in vm["disks"]] == [True, False]
    assert (vm["call"]["progress"]["percent"], vm["call"]["progress"]["status"]) == (
        100.0, "completed"
    )  # fmt: skip
    assert len(reports(site)) == 1
    assert len(site.servers()) == 2


def test_a_report_after_the_end_is_an_event(
    site: Site, appliance: Appliance, running: list[subprocess.Popen[str]]
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    serve(site, running)
    job = ledger(site).calls[0].job_id
    site.run("resolve", "ctx-1", "--failed", "--reason", "x", "-y")
    before = ledger(site).calls
    for _ in range(2):
        answer = ask(site, f"/api/v1/backups/{job}/complete", {"change_id": "x", "disk_id": 0})
        assert answer["status"] == "failed"
        assert "had ended as FAILED" in answer["message"]
    assert ledger(site).calls == before
    assert reports(site) == {}
    assert told(site).count("LateReport") == 1
    assert "LateReport" in site.run("explain", "ctx-1")


def test_an_incremental_is_told_what_was_reported_of_its_parent(
    site: Site, telling: Appliance, running: list[subprocess.Popen[str]]
) -> None:
    for key in (2000, 2001):
        telling.source("pgtest1", key, os.urandom(MIB))
    serve(site, running)
    address = {"name": "pgtest1", "path": "/DC/vm/pgtest1", "vcenter": "vc1"}
    for run, kind in (("r1", "full"), ("r2", "incremental")):
        backup = {"run": run, "type": kind}
        site.spec(site.vm("ctx-1", [MIB, MIB], vm=address, backup=backup))
        site.apply()
        arrived(site, 2, run=run)
        until(lambda: not ledger(site).active("ctx-1"), f"the end of {run}")
    until(lambda: len(telling.log_lines("end")) == 2, "the end of both runs")
    first, second = telling.log_lines("end")
    assert [disk["previous"] for disk in first["disks"]] == ["", ""]
    assert {disk["key"]: disk["previous"] for disk in second["disks"]} == {
        disk["key"]: disk["change_id"] for disk in first["disks"]
    }
    assert "" not in {disk["change_id"] for disk in first["disks"]}


def test_serve_calls_for_who_waited_and_releases_what_has_ended(
    site: Site, appliance: Appliance, running: list[subprocess.Popen[str]]
) -> None:
    site.appliance_at(appliance.url, max_running=1)
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    assert "SnaBusy" in site.apply(code=3)
    process = serve(site, running)
    first = appliance.starts()[0]["vm_name"]
    second = {"ctx-1": "ctx-2", "ctx-2": "ctx-1"}[first]
    site.run("resolve", first, "--completed", "--reason", "its log says so", "-y")
    until(lambda: len(appliance.starts()) == 2, "the second call")
    assert appliance.starts()[1]["vm_name"] == second
    until(lambda: {vm for vm, _ in site.pids()} == {second}, "the release of the first")
    # The appliance logs the call before it answers, so the answer may still be on its way.
    until(lambda: site.status()[second]["call"]["state"] == "ACCEPTED", "the answer")
    err = end(process)
    assert f"{second}: wait: SnaBusy:" in err
    assert f"ok  {second}: SNA site-a: it started the job" in err
    assert set(site.pids()) == {(second, 2000)}  # the servers stay


def test_serve_ends_a_run_by_the_appliances_own_word(
    site: Site, ending: Appliance, running: list[subprocess.Popen[str]]
) -> None:
    ending.source("ctx-1", 2000, os.urandom(MIB))
    site.spec(site.vm("ctx-1"))
    site.apply()
    serve(site, running)
    until(lambda: not site.servers(), "the release")
    assert ledger(site).calls[0].state == "COMPLETED"


def test_serve_goes_by_what_was_applied_and_not_by_what_is_written(
    site: Site, appliance: Appliance, running: list[subprocess.Popen[str]]
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    before = ledger(site)
    site.spec({"name": "ctx-1", "state": "absent"}, site.vm("ctx-2"))
    site.write_config(qemu_nbd={"shared": 20, "stop_grace": "3s"})
    site.appliance_at(appliance.url, poll="50ms")
    process = serve(site, running)
    job = before.calls[0].job_id
    ask(site, f"/api/v1/telemetry/backup/{job}", {"status": "running"})
    site.kill(site.pids()["ctx-1", 2000])
    until(lambda: ("ctx-1", 2000) in site.pids(), "the server to be back")
    end(process)
    assert not taken(site.api)  # the server that serve started has not inherited the address
    after = ledger(site)
    assert (after.applied, after.settings) == (before.applied, before.settings)
    assert set(site.pids()) == {("ctx-1", 2000)}
    assert len(appliance.starts()) == 1


def test_a_password_that_cannot_be_read_is_read_anew(
    site: Site, appliance: Appliance, running: list[subprocess.Popen[str]]
) -> None:
    password = site.folder / "password"
    text = password.read_text()
    password.unlink()
    site.spec(site.vm("ctx-1"))
    assert "SecretUnreadable" in site.apply(code=1)
    process = serve(site, running)
    reads(process, "SecretUnreadable")
    assert appliance.starts() == []
    password.write_text(text)
    until(lambda: len(appliance.starts()) == 1, "the call")
    end(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_in_order_and_the_servers_stay(
    site: Site, appliance: Appliance, running: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    before = site.pids()
    end(serve(site, running), number)
    assert site.pids() == before
    assert health(site) is None
    end(serve(site, running), number)  # and the next has the address at once


def test_a_second_serve_names_the_first_whatever_address_it_would_take(
    site: Site, appliance: Appliance, running: list[subprocess.Popen[str]]
) -> None:
    first = serve(site, running)
    for listen in (site.api, site.ports[-1]):
        site.write_config(api={"listen": f"127.0.0.1:{listen}"})
        text = site.run("serve", code=6)
        assert f"cannot serve hub {site.hub}: pid {first.pid} (reconciler serve" in text
        assert "already" in text
    assert first.poll() is None


def test_serve_beside_an_apply_that_waits_names_it(
    site: Site, appliance: Appliance, running: list[subprocess.Popen[str]]
) -> None:
    site.spec(site.vm("ctx-1"))
    process = site.start("apply", "-y", "--wait")
    running.append(process)
    until(lambda: health(site) == process.pid, "apply to listen")
    text = site.run("serve", code=6)
    assert f"its callbacks are taken by pid {process.pid} (reconciler apply" in text
    assert "try again when that has ended" in text


def test_serve_on_a_strangers_address_names_it(site: Site) -> None:
    with socket.create_server(("127.0.0.1", site.api)):
        text = site.run("serve", code=1)
    assert f"cannot listen on 127.0.0.1:{site.api}" in text
    assert f"(pid {os.getpid()}) does; end that, or set `api: {{listen: …}}`" in text


def test_serve_before_anything_was_applied_waits_for_it(
    site: Site, telling: Appliance, running: list[subprocess.Popen[str]]
) -> None:
    process = serve(site, running)
    assert not (site.folder / "state" / "state.db").exists()
    telling.source("ctx-1", 2000, os.urandom(MIB))
    site.spec(site.vm("ctx-1"))
    site.apply()
    arrived(site, 1)
    assert process.poll() is None
    assert refusals(telling) == []


HOLD = """
import sys, time
from pathlib import Path
from reconciler.host import lock
with lock.held(Path(sys.argv[1]), "a long apply", 10.0):
    time.sleep(600)
"""


def test_callbacks_wait_for_no_lock_and_serve_goes_on_when_it_is_free(
    site: Site, appliance: Appliance, running: list[subprocess.Popen[str]]
) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    job = ledger(site).calls[0].job_id
    path = site.folder / "state" / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)])
    site.others.append(holder)
    until(lambda: "a long apply" in path.read_text(), "the lock")
    process = serve(site, running, "--lock-timeout", "100ms")
    reads(process, "it is being changed by")
    assert ask(site, f"/api/v1/backups/{job}/complete", {"change_id": "x", "disk_id": 0})
    assert set(reports(site)) == {0}
    site.kill(site.pids()["ctx-1", 2000])
    holder.kill()
    holder.wait(20)
    until(lambda: ("ctx-1", 2000) in site.pids() or ledger(site).calls[0].ended, "a pass")
    end(process)


def test_another_hubs_state_directory_is_refused(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    site.apply()
    mine = site.hub
    site.write_config(hub="renamed")
    assert f"it belongs to hub {mine!r}" in site.run("serve", code=78)


def test_an_address_beyond_this_machine_is_refused(site: Site) -> None:
    site.write_config(api={"listen": "0.0.0.0:8082"})
    for command in ("serve", "plan"):
        assert "which other machines can reach" in site.run(command, code=78)
