"""What is read of the machine: limits of groups, units, logs of denials, ports."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from reconciler.host import machine


def told(monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str]) -> None:
    monkeypatch.setattr(machine, "read", lambda path: files.get(path, ""))


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({"/proc/7/cgroup": "0::/a/b.service", "/sys/fs/cgroup/a/b.service/pids.max": "512"}, 512),
        (
            {
                "/proc/7/cgroup": "0::/a/b.service",
                "/sys/fs/cgroup/a/b.service/pids.max": "max",
                "/sys/fs/cgroup/a/pids.max": "300",
            },
            300,
        ),
        ({"/proc/7/cgroup": "0::/", "/sys/fs/cgroup/pids.max": "99"}, 99),  # in a container
        (
            {
                "/proc/7/cgroup": "3:cpu:/x\n2:pids:/y",
                "/sys/fs/cgroup/pids/y/pids.max": "40",
                "/sys/fs/cgroup/pids/x/pids.max": "1",
            },
            40,
        ),
        ({"/proc/7/cgroup": "0::/a"}, None),
        ({}, None),
    ],
)
def test_the_least_limit_of_the_groups_above_counts(
    monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str], most: int | None
) -> None:
    told(monkeypatch, files)
    assert machine._tasks(7) == most


@pytest.mark.parametrize(
    ("groups", "unit"),
    [
        ("0::/system.slice/reconciler.service", "reconciler.service"),
        ("0::/user.slice/user-0.slice/session-1.scope", ""),
        ("0::/user.slice/user@0.service/app.slice/x.service", "x.service"),
        ("4:pids:/\n1:name=systemd:/system.slice/r.service", "r.service"),
        ("", ""),
    ],
)
def test_the_service_of_a_process(monkeypatch: pytest.MonkeyPatch, groups: str, unit: str) -> None:
    told(monkeypatch, {"/proc/7/cgroup": groups})
    assert machine.unit(7) == unit


def test_denials_are_those_of_qemu_and_an_unreadable_log_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "audit.log"
    log.write_text(
        'type=AVC apparmor="DENIED" profile="x" comm="nginx"\n'
        'type=AVC apparmor="ALLOWED" comm="qemu-nbd"\n'
        'type=AVC apparmor="DENIED" profile="y" comm="qemu-nbd" name="/backup/a"\n'
        'type=AVC msg=audit(1): avc:  denied  { open } for comm="qemu-img"\n'
    )
    monkeypatch.setattr(machine, "AUDIT_LOG", str(log))
    monkeypatch.setattr(machine, "_kernel", lambda path: ["6,1,1,-;booted"])
    lines, unread = machine.denials()
    assert [line.split("comm=")[1].split('"')[1] for line in lines] == ["qemu-nbd", "qemu-img"]
    assert unread == []

    def refused(path: str) -> list[str]:
        raise PermissionError(1, "Operation not permitted", path)

    monkeypatch.setattr(machine, "_kernel", refused)
    assert machine.denials()[1] == ["/dev/kmsg: Operation not permitted"]


def test_our_own_limits_and_clock() -> None:
    found = machine.limits(os.getpid())
    assert found.files == machine._finite(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    assert found.pid_max and found.pid_max > 300
    clock = machine.clock()
    assert clock.synchronised in (True, False, None)
    assert clock.now > 1.7e9


def test_a_port_is_tried_without_taking_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert machine.bindable("127.0.0.1", port) == "Address already in use"
    assert machine.bindable("127.0.0.1", port) == ""
    assert machine.bindable("192.0.2.1", port) == "Cannot assign requested address"


def test_a_program_that_fails_or_hangs_is_told() -> None:
    assert machine.program(["sh", "-c", "echo out; echo err >&2; exit 3"], 5.0) == (3, "out\nerr")
    assert machine.program(["sleep", "60"], 0.1) == (-1, "no end after 0.1 s")
    assert machine.program(["/nowhere"], 5.0)[0] == -1
