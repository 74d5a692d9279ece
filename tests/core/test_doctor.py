"""The verdicts of `doctor`: figures in, checks out."""

from __future__ import annotations

from typing import Any

import pytest

from reconciler.core import doctor
from reconciler.core.actual import Listener, Mount
from reconciler.core.appliances import Health
from reconciler.core.doctor import (
    Check,
    Clock,
    Confinement,
    Limits,
    Ports,
    Remembered,
    Room,
    Served,
    Status,
    Storage,
    Trial,
)
from reconciler.core.errors import Exit
from reconciler.core.settings import QemuNbd
from reconciler.core.units import PortRange

GIB = 1 << 30
DISK = Mount("/backup", "ext4", "/dev/sdb1")
NOW = 1_800_000_000.0


def by_id(checks: Any) -> dict[str, Check]:
    found = list(checks)
    assert len({one.id for one in found}) == len(found), "two checks of one id"
    return {one.id: one for one in found}


def storage(**changes: Any) -> Storage:
    room: dict[str, Any] = {
        "exists": True,
        "real": "/backup/r",
        "directory": True,
        "mode": 0o750,
        "free": 9 * GIB,
    }
    room |= {"inodes": 100_000} | changes.pop("room", {})
    values: dict[str, Any] = {"room": Room(**room), "mount": DISK, "trial": Trial(fsync=0.01)}
    return Storage(path="/backup/r", **{**values, **changes})


def repository(found: Storage, *, direct: bool = False) -> dict[str, Check]:
    checks = doctor.repository("local", found, min_free=GIB, direct=direct, user="backup")
    return {one.id.removeprefix("repository.local."): one for one in checks}


@pytest.mark.parametrize(
    ("found", "which", "status", "words"),
    [
        (storage(), "directory", Status.OK, "/backup/r, mode 750"),
        (storage(room={"real": "/mnt/r"}), "directory", Status.OK, "really /mnt/r"),
        (
            storage(room={"exists": False, "nearest": "/backup", "makeable": True}),
            "directory", Status.WARNING, "does not exist",
        ),
        (
            storage(room={"exists": False, "nearest": "/backup"}),
            "directory", Status.FAILED, "cannot be made in /backup",
        ),
        (storage(room={"directory": False}), "directory", Status.FAILED, "is no directory"),
        (storage(room={"error": "Input/output error"}), "directory", Status.FAILED, "Input/output"),
        (storage(hangs="no answer from it"), "directory", Status.FAILED, "no answer from it"),
        (storage(room={"read_only": True}), "writes", Status.FAILED, "mounted read-only"),
        (storage(trial=Trial(failed="cannot create a file: no")), "writes", Status.FAILED, "no in"),
        (storage(trial=Trial(fsync=3.0)), "writes", Status.WARNING, "3 s"),
        (storage(trial=None), "writes", Status.UNKNOWN, "nothing was tried"),
        (storage(), "space", Status.OK, "9 GiB free, 100000 inodes"),
        (storage(room={"free": GIB - 1}), "space", Status.WARNING, "min_free is 1 GiB"),
        (storage(room={"inodes": 3}), "space", Status.WARNING, "3 inodes"),
        (storage(room={"inodes": None}), "space", Status.OK, "9 GiB free"),
        (storage(), "filesystem", Status.OK, "ext4, /dev/sdb1 at /backup"),
        (storage(mount=Mount("/b", "nfs4", "s:/e")), "filesystem", Status.WARNING, "nfs4, s:/e"),
        (storage(mount=Mount("/b", "tmpfs", "t")), "filesystem", Status.WARNING, "restart"),
        (storage(mount=None), "filesystem", Status.UNKNOWN, "does not tell"),
    ],
)  # fmt: skip
def test_a_repository(found: Storage, which: str, status: Status, words: str) -> None:
    check = repository(found)[which]
    assert check.status is status
    assert words in check.observed
    assert bool(check.fix) == (status in (Status.WARNING, Status.FAILED))


def test_nothing_more_is_said_of_a_repository_that_is_not_there() -> None:
    assert list(repository(storage(hangs="it hangs"))) == ["directory"]


def test_o_direct_counts_only_where_it_is_used() -> None:
    tried = storage(trial=Trial(direct="Invalid argument"))
    assert "direct" not in repository(tried)
    assert repository(tried, direct=True)["direct"].status is Status.FAILED
    assert repository(storage(), direct=True)["direct"].status is Status.OK


def test_a_file_system_without_hard_links_is_named_as_that() -> None:
    tried = storage(trial=Trial(failed="cannot link(2), which …: Operation not permitted"))
    assert "hard links" in repository(tried)["writes"].fix


def ports(**changes: Any) -> dict[str, Check]:
    values: dict[str, Any] = {
        "range": PortRange(10100, 10109), "bind": "127.0.0.1", "ephemeral": (32768, 60999)
    }  # fmt: skip
    return by_id(doctor.ports(Ports(**{**values, **changes})))


def test_free_ports_and_who_has_the_others() -> None:
    assert ports(ours=2)["ports.free"].observed.endswith("8 free, 2 in use by this hub")
    held = ports(ours=2, strangers=[Listener(10103, "127.0.0.1", 7, "sshd")])["ports.free"]
    assert held.status is Status.WARNING
    assert "7 free" in held.observed
    assert "sshd (pid 7) on 127.0.0.1:10103" in held.observed
    all_held = dict.fromkeys(range(10100, 10110), "Address already in use")
    assert ports(unbindable=all_held)["ports.free"].status is Status.FAILED
    assert "and 5 more" in ports(unbindable=all_held)["ports.free"].observed
    low = ports(unbindable={10100: "Permission denied"})["ports.free"]
    assert "ip_unprivileged_port_start" in low.fix


@pytest.mark.parametrize(
    ("ephemeral", "reserved", "status", "given"),
    [
        ((32768, 60999), "", Status.OK, ""),
        ((10000, 60999), "", Status.WARNING, "10 of them"),
        ((10105, 60999), "", Status.WARNING, "5 of them"),
        ((10000, 60999), "10100-10109", Status.OK, ""),
        ((10000, 60999), "8080,10100-10104,10106", Status.WARNING, "4 of them"),
        (None, "", Status.UNKNOWN, ""),
    ],
)
def test_ports_that_the_kernel_gives_away(
    ephemeral: tuple[int, int] | None, reserved: str, status: Status, given: str
) -> None:
    check = ports(ephemeral=ephemeral, reserved=reserved)["ports.ephemeral"]
    assert check.status is status
    assert given in check.observed
    if status is Status.WARNING:  # what was reserved stays so
        wanted = f"ip_local_reserved_ports={reserved + ',' if reserved else ''}10100-10109;"
        assert wanted in check.fix


def test_ports_and_disks() -> None:
    assert "ports.enough" not in ports()
    assert ports(disks=9, largest=("a", 9))["ports.enough"].status is Status.OK
    assert "wait" in ports(disks=50, largest=("a", 5))["ports.enough"].observed
    short = ports(
        disks=10, largest=("a", 10), strangers=[Listener(10103, "127.0.0.1", 7, "sshd")]
    )  # fmt: skip
    assert short["ports.enough"].status is Status.FAILED


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        (Served(took=0.02, options="--shared=10"), Status.OK, "--shared=10"),
        (Served(failed="it ended"), Status.FAILED, "it ended"),
        (Served(elsewhere="0.0.0.0:10809"), Status.FAILED, "also listens on 0.0.0.0:10809"),
    ],
)
def test_a_trial_server(found: Served, status: Status, words: str) -> None:
    (check,) = doctor.serving(found, QemuNbd())
    assert check.status is status
    assert words in check.observed


def state(found: Storage, remembered: Remembered, **changes: Any) -> dict[str, Check]:
    values: dict[str, Any] = {"hub": "a", "uid": 0, "user": "root", "holder": ""}
    return by_id(doctor.state(found, remembered, **{**values, **changes}))


def test_the_state_directory() -> None:
    fresh = Remembered()
    assert state(storage(), fresh)["state.store"].status is Status.OK
    gone = state(storage(room={"exists": False, "makeable": True}), fresh)
    assert [one.status for one in gone.values()] == [Status.OK]
    assert "state.owner" not in state(storage(room={"mode": 0o755}), fresh)
    assert state(storage(room={"mode": 0o775}), fresh)["state.owner"].status is Status.WARNING
    other = state(storage(room={"owner": 7}), fresh, uid=8)
    assert other["state.owner"].status is Status.WARNING
    far = state(storage(mount=Mount("/b", "nfs", "s:/e")), fresh)["state.filesystem"]
    assert far.status is Status.WARNING
    assert "SQLite" in far.observed
    assert "pid 7" in state(storage(), fresh, holder="pid 7 (x)")["state.lock"].observed
    assert state(storage(), fresh, holder=None)["state.lock"].status is Status.UNKNOWN


@pytest.mark.parametrize(
    ("remembered", "status"),
    [
        (Remembered(exists=True, hub="a"), Status.OK),
        (Remembered(exists=True, hub="b"), Status.FAILED),
        (Remembered(exists=True, hub="a", wrong="row 3 missing"), Status.FAILED),
        (Remembered(error="cannot read the store"), Status.FAILED),
    ],
)
def test_the_store(remembered: Remembered, status: Status) -> None:
    assert state(storage(), remembered)["state.store"].status is status


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        (Health(status=200), Status.OK, "200"),
        (Health(status=204), Status.OK, "204"),
        (Health(status=404), Status.FAILED, "something else"),
        (Health(status=403), Status.FAILED, "does not let us"),
        (Health(kind="refused", said="connection refused"), Status.FAILED, "the tunnel is down"),
        (Health(kind="closed", said="…"), Status.FAILED, "nothing behind it"),
        (Health(kind="timeout", said="no answer in time"), Status.FAILED, "hangs"),
        (Health(kind="other", said="no such host"), Status.FAILED, "no such host"),
    ],
)
def test_an_appliance(found: Health, status: Status, words: str) -> None:
    check = doctor.appliance("site-a", "http://127.0.0.1:9081", found)
    assert check.status is status
    assert words in check.observed


def test_a_credential_of_systemd_cannot_be_told_from_a_shell() -> None:
    check = doctor.secret("vcenter vc1", "credential vc1", "not started by systemd")
    assert check.status is Status.UNKNOWN
    assert doctor.secret("vcenter vc1", "file /x", "no").fix == "ls -la /x"
    assert doctor.secret("vcenter vc1", "file /x", "").status is Status.OK


@pytest.mark.parametrize(
    ("why_not", "ours", "holder", "status"),
    [
        ("", "", "", Status.OK),
        ("in use", "reconciler (pid 3) on x", "reconciler (pid 3) on x", Status.OK),
        ("in use", "", "nginx (pid 3) on x", Status.FAILED),
        ("in use", "", "", Status.FAILED),
        ("in use", "", "systemd (pid 1) on x", Status.UNKNOWN),
        ("in use", "", "an unknown process on x", Status.UNKNOWN),
    ],
)
def test_the_address_for_callbacks(why_not: str, ours: str, holder: str, status: Status) -> None:
    check = doctor.listening("127.0.0.1:8082", why_not, ours, holder)
    assert check.status is status


@pytest.mark.parametrize(("accepted", "words"), [(1, "an accepted run is"), (2, "2 accepted runs")])
def test_a_free_address_is_no_good_sign_while_runs_report_to_it(accepted: int, words: str) -> None:
    check = doctor.listening("127.0.0.1:8082", "", "", "", accepted)
    assert (check.status, check.fix) == (
        Status.WARNING, "reconciler watch (or reconciler serve)"
    )  # fmt: skip
    assert words in check.observed
    ours = doctor.listening("127.0.0.1:8082", "in use", "pid 3", "pid 3", accepted)
    assert ours.status is Status.OK


def test_the_inventory() -> None:
    assert doctor.inventory("", False, (), None, 0).status is Status.WARNING
    assert doctor.inventory("", True, (), None, 0).status is Status.FAILED
    assert doctor.inventory("i", False, ("cannot read",), None, 0).status is Status.FAILED
    assert doctor.inventory("i", False, (), 0, 0).status is Status.WARNING
    assert "2 VMs, 5 disks" in doctor.inventory("i", False, (), 2, 5).observed


@pytest.mark.parametrize(
    ("found", "newest", "status"),
    [
        (Clock(now=NOW, synchronised=True), 0.0, Status.OK),
        (Clock(now=NOW, synchronised=True), NOW + 1, Status.OK),
        (Clock(now=NOW, synchronised=True), NOW + 60, Status.FAILED),
        (Clock(now=1000.0, synchronised=True), 0.0, Status.FAILED),
        (Clock(now=NOW, synchronised=None), 0.0, Status.UNKNOWN),
        (Clock(now=NOW, synchronised=False), 0.0, Status.WARNING),
        (Clock(now=NOW, synchronised=False, container="lxc"), 0.0, Status.UNKNOWN),
    ],
)
def test_the_clock(found: Clock, newest: float, status: Status) -> None:
    assert doctor.clock(found, newest).status is status


PLENTY = Limits(files=65_536, tasks=9_999, pid_max=32_768, watches=65_536)


def limits(found: Limits, watch: str = "") -> dict[str, Check]:
    return by_id(doctor.limits(found, 101, "this", watch))


def test_limits_against_what_the_range_needs() -> None:
    assert {one.status for one in limits(PLENTY).values()} == {Status.OK}
    few = limits(Limits(files=400, tasks=9_999))
    assert few["limits.files"].status is Status.FAILED
    assert "468" in few["limits.files"].observed
    assert limits(Limits(files=468, tasks=9_999))["limits.files"].status is Status.OK
    assert limits(Limits(tasks=500))["limits.tasks"].status is Status.WARNING
    assert limits(Limits(processes=500))["limits.processes"].status is Status.WARNING
    assert limits(Limits())["limits.tasks"].status is Status.UNKNOWN
    assert limits(Limits(tasks=9_999, watches=9))["limits.inotify"].status is Status.WARNING
    assert limits(PLENTY, "all instances")["limits.inotify"].status is Status.FAILED


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        (Confinement(), Status.OK, "neither"),
        (Confinement(apparmor=True, label="unconfined"), Status.OK, "ran unconfined"),
        (Confinement(apparmor=True, label="qemu-nbd (enforce)"), Status.OK, "qemu-nbd (enforce)"),
        (Confinement(selinux="enforcing", denied=["avc:  denied x"]), Status.WARNING, "denied x"),
        (Confinement(apparmor=True, unread=["/dev/kmsg: no"]), Status.UNKNOWN, "/dev/kmsg: no"),
    ],
)
def test_confinement(found: Confinement, status: Status, words: str) -> None:
    check = doctor.confinement(found)
    assert check.status is status
    assert words in check.observed


def test_what_runs_it() -> None:
    good = {"click": ("8.1.7", "8.1.7"), "pydantic": ("2.10.1", "2.7")}
    assert doctor.runtime((3, 12, 1), (3, 11), good).status is Status.OK
    assert doctor.runtime((3, 10, 1), (3, 11), good).status is Status.FAILED
    old = doctor.runtime((3, 12, 1), (3, 11), {"click": ("8.1.6", "8.1.7"), "re": ("", "1")})
    assert old.status is Status.FAILED
    assert "click 8.1.6, re is missing" in old.observed


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("click>=8.1.7", ("click", "8.1.7")),
        ("psycopg[binary]>=3.1", ("psycopg", "3.1")),
        ("google-re2 >= 1.1, < 2", ("google-re2", "1.1")),
        ("PyYAML (>=6.0.1)", ("PyYAML", "6.0.1")),
        ("x<2,>=1.5", ("x", "1.5")),
        ("x", None),
        ("pytest>=8.2; extra == 'dev'", None),
    ],
)
def test_requirements_are_read(line: str, expected: tuple[str, str] | None) -> None:
    assert doctor.requirement(line) == expected


def test_the_daemon() -> None:
    assert (
        "unit reconciler.service" in doctor.daemon("pid 3", True, "reconciler.service", "").observed
    )
    assert "another command" in doctor.daemon("pid 3", False, "", "").observed
    assert doctor.daemon("", False, "", "not ours").status is Status.WARNING


def test_exit_codes() -> None:
    fine, soft = doctor.ok("api", "x", "y"), doctor.warning("sna", "x", "y", "z")
    bad, config = doctor.failed("sna", "x", "y", "z"), doctor.failed("config", "x", "y", "z")
    blind = doctor.unknown("clock", "x", "y")
    assert doctor.exit_code([fine, soft, blind]) == Exit.OK
    assert doctor.exit_code([fine, soft, bad]) == Exit.ERROR
    assert doctor.exit_code([bad, config]) == Exit.CONFIG
    assert doctor.ordered([fine, soft, config]) == [config, soft, fine]
