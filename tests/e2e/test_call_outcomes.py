"""What each answer of the appliance leads to; never a second call by itself, exports stay up."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.site import Appliance, Site

MIB = 1 << 20


@contextmanager
def tunnel_with_a_dead_appliance(well: int = 0) -> Iterator[tuple[str, list[bytes]]]:
    """What ssh does: accept, find nobody at the far end, close; `well`: so many health checks are
    answered before."""
    server = socket.create_server(("127.0.0.1", 0))
    seen: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            seen.append(b"connection")
            if len(seen) <= well:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}", seen
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


def call_of(site: Site, vm: str = "ctx-1") -> dict[str, object]:
    call = site.status()[vm]["call"]
    assert isinstance(call, dict)
    return call


def test_an_appliance_that_is_down_is_tried_again_and_gets_one_call(
    site: Site, appliance: Appliance
) -> None:
    appliance.misbehave("sickens")  # well when the run began, and not when it is called
    site.spec(site.vm("ctx-1"))
    text = site.apply(code=1)
    assert "nothing was sent" in text
    appliance.end()
    assert "nothing was sent" in site.apply(code=1)  # what was begun stays up
    assert call_of(site)["state"] == "DUE"
    pids = site.pids()
    assert "nothing was sent" in site.run("explain", "ctx-1")
    appliance.start()
    site.apply()
    assert call_of(site)["state"] == "ACCEPTED"
    assert site.pids() == pids
    assert len(appliance.starts()) == 1


def test_a_tunnel_with_a_dead_appliance_is_nothing_sent_and_never_unknown(site: Site) -> None:
    with tunnel_with_a_dead_appliance(well=1) as (url, seen):
        site.appliance_at(url)
        site.spec(site.vm("ctx-1"))
        for _ in range(2):
            assert "nothing was sent" in site.apply(code=1)
            assert call_of(site)["state"] == "DUE"
        assert len(seen) >= 4  # each apply asked more than once
        assert len(site.servers()) == 1


@pytest.mark.parametrize(
    ("mode", "starts", "state", "code"),
    [
        ("refuse", 0, "REJECTED", 1),
        ("forbidden", 0, "REJECTED", 1),
        ("sickens", 0, "DUE", 1),
        ("error-before", 0, "UNKNOWN", 7),
        ("error-after", 1, "UNKNOWN", 7),
        ("hang-before", 0, "UNKNOWN", 7),
        ("hang-after", 1, "UNKNOWN", 7),
        ("drop-before", 0, "UNKNOWN", 7),
        ("drop-after", 1, "UNKNOWN", 7),
        ("conflict", 0, "UNKNOWN", 7),
        ("redirect", 0, "UNKNOWN", 7),
        ("stranger", 0, "UNKNOWN", 7),
        ("answer-twice", 1, "ACCEPTED", 0),
    ],
)
def test_what_an_answer_means(
    site: Site, appliance: Appliance, mode: str, starts: int, state: str, code: int
) -> None:
    appliance.source("ctx-1", 2000, os.urandom(MIB))
    appliance.source("ctx-1", 2001, os.urandom(MIB))
    appliance.misbehave(mode, None if mode == "sickens" else 1)
    site.appliance_at(appliance.url, timeout="1s")
    site.spec(site.vm("ctx-1", [MIB, MIB]))
    text = site.apply(code=code)
    assert call_of(site)["state"] == state, text
    assert state in site.run("explain", "ctx-1")
    assert len(appliance.starts()) == starts
    pids = site.pids()
    assert len(pids) == 2
    # A second apply asks the appliance about the job, and does not call again by itself.
    site.apply(code=code if starts == 0 else 0)
    assert len(appliance.starts()) == starts
    assert site.pids() == pids
    assert call_of(site)["state"] == (state if starts == 0 else "ACCEPTED")


def test_unknown_says_so_everywhere_until_a_person_resolves_it(
    site: Site, appliance: Appliance
) -> None:
    appliance.misbehave("drop-before", 1)
    site.spec(site.vm("ctx-1"))
    text = site.apply(code=7)
    assert "ctx-1: hold: CallUnknown" in text
    assert site.condition("ctx-1", "Notified")[:2] == ("Unknown", "Unknown")
    explained = site.run("explain", "ctx-1")
    assert "reconciler resolve ctx-1" in explained
    assert "call: UNKNOWN" in explained
    for _ in range(3):
        site.apply(code=7)
    assert appliance.starts() == []
    site.run("retry", "ctx-1", code=1)  # not what retry is for
    site.run("resolve", "ctx-1", "--accepted", "--reason", "it runs there", "-y")
    assert call_of(site)["state"] == "ACCEPTED"
    site.apply()
    assert appliance.starts() == []


def test_not_found_is_a_no_only_from_an_appliance_that_remembers(
    site: Site, appliance: Appliance
) -> None:
    appliance.misbehave("drop-before", 1)
    site.spec(site.vm("ctx-1"))
    site.apply(code=7)
    site.apply(code=7)
    assert appliance.starts() == []
    site.appliance_at(appliance.url, remembers_jobs=True)
    site.apply()
    assert call_of(site)["state"] == "ACCEPTED"
    assert len(appliance.starts()) == 1


def test_resend_is_another_attempt_with_other_names_and_files(
    site: Site, appliance: Appliance
) -> None:
    appliance.misbehave("drop-before", 1)
    site.spec(site.vm("ctx-1"))
    site.apply(code=7)
    first = call_of(site)["job_id"]
    site.run("resolve", "ctx-1", "--resend", "--reason", "its log shows nothing", "-y")
    site.apply()
    (start,) = appliance.starts()
    assert start["job_id"] != first
    assert start["nbd_targets"].endswith("/ctx-1-r1-a2-disk0")
    assert {mark.attempt for mark in site.servers().values()} == {2}
    assert (site.folder / "repository/ctx-1/2000/r1-a2.qcow2").exists()
    assert call_of(site)["attempt"] == 2


def test_a_refused_run_is_asked_again_by_retry_or_by_a_changed_config(
    site: Site, appliance: Appliance
) -> None:
    appliance.misbehave("refuse", 2)
    site.spec(site.vm("ctx-1"))
    text = site.apply(code=1)
    assert "it refused with 400" in text
    assert "reconciler retry ctx-1" in text
    assert "reconciler retry ctx-1" in site.apply(code=1)  # not by itself
    site.run("retry", "ctx-1")
    assert call_of(site)["state"] == "DUE"
    site.apply(code=1)
    assert call_of(site)["state"] == "REJECTED"
    site.spec(site.vm("ctx-1", vm={"path": "/DC/vm/corrected", "vcenter": "vc1"}))
    site.apply()
    assert call_of(site)["state"] == "ACCEPTED"
    assert len(appliance.starts()) == 1


def test_one_vm_refused_beside_one_that_converged_is_partial(
    site: Site, appliance: Appliance
) -> None:
    appliance.misbehave("refuse", 1)
    site.spec(site.vm("ctx-1"), site.vm("ctx-2"))
    site.apply(code=3)


def test_a_run_that_failed_at_the_appliance_is_failed_and_released(
    site: Site, ending: Appliance
) -> None:
    site.spec(site.vm("ctx-1"))  # there is no source disk: the copy fails
    text = site.apply("--wait", "--timeout", "60s", code=1)
    assert "is FAILED" in text
    assert site.servers() == {}
    assert site.condition("ctx-1", "Ready")[:2] == ("False", "RunFailed")
    assert "write another `run:`" in site.run("explain", "ctx-1")
    site.apply(code=1)
    assert len(ending.starts()) == 1


def test_waiting_ends_in_time(site: Site, appliance: Appliance) -> None:
    site.spec(site.vm("ctx-1"))
    text = site.apply("--wait", "--timeout", "1s", code=124)
    assert "does not report the end of runs" in text
    assert len(site.servers()) == 1


def test_an_order_about_a_vm_that_is_not_there_names_the_nearest(
    site: Site, appliance: Appliance
) -> None:
    site.spec(site.vm("ctx-123"))
    site.apply()
    for command in (["explain", "ctx-132"], ["stop", "-y", "ctx-132"], ["retry", "ctx-132"],
                    ["resolve", "ctx-132", "--failed", "--reason", "x", "-y"]):  # fmt: skip
        assert "ctx-123" in site.run(*command, code=64)


def test_max_running_makes_the_others_wait_with_their_exports_up(
    site: Site, appliance: Appliance
) -> None:
    site.appliance_at(appliance.url, max_running=2)
    site.spec(*[site.vm(f"ctx-{number}") for number in range(1, 5)])
    text = site.apply(code=3)
    assert "SnaBusy" in text
    assert len(appliance.starts()) == 2
    assert len(site.servers()) == 4
    site.run("resolve", "ctx-1", "--completed", "--reason", "test", "-y")
    site.apply(code=3)
    assert len(appliance.starts()) == 3


def test_a_server_that_died_under_a_writer_fails_the_run(site: Site, ending: Appliance) -> None:
    ending.source("ctx-1", 2000, b"x" * 4096)
    site.spec(site.vm("ctx-1", [4 * MIB], release="keep"))
    ending.misbehave("drop-before", 1)
    site.apply(code=7)
    site.run("resolve", "ctx-1", "--accepted", "--reason", "test", "-y")
    disk = site.status()["ctx-1"]["disks"][0]
    source = site.folder / "w.raw"
    source.write_bytes(b"y" * (1 << 20) + bytes(3 << 20))
    uri = f"nbd://127.0.0.1:{disk['port']}/{disk['export']}"
    subprocess.run(["nbdcopy", str(source), uri], check=True)
    site.kill(disk["pid"])
    assert "ServerDied" in site.run("plan")
    site.apply(code=1)
    assert call_of(site)["tainted"] is True
    site.spec({"name": "ctx-1", "state": "absent"})
    site.apply(code=4)
