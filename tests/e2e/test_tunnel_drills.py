"""What status says when a tunnel breaks, that it comes back, and what becomes of a backup.

`pytest -rP` shows how long each took until it was healthy again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.site import Appliance, Site, until
from tests.e2e.test_tunnel import ready, tunnel
from tests.e2e.test_tunnel_traps import hold
from tests.e2e.watching import watching
from tests.lab import Lab, laboratory, missing, policy

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

SIZE = 1 << 20
HEALTHY = ("True", "Healthy")


class Drill:
    """Both sides at work, a tunnel between them, and perhaps a backup through it."""

    def __init__(self, lab: Lab, tmp_path: Path, stack: ExitStack, slow: float = 0.0) -> None:
        self.lab = lab
        sources = tmp_path / "appliance" / "sources" / "ctx-1"
        sources.mkdir(parents=True)
        for key in (2000, 2001):
            (sources / f"{key}.raw").write_bytes(os.urandom(SIZE))
        self.sources = sources
        self.hub, self.sna = lab.hub(tmp_path / "hub"), lab.sna(tmp_path / "sna")
        self.hub.appliance_at("http://127.0.0.1:9081", reports_end=True, poll="500ms")
        slowly = ("--slow", str(slow)) if slow else ()
        self.appliance: Appliance = stack.enter_context(
            lab.appliance(tmp_path / "appliance", *slowly)
        )
        stack.callback(self.clean_up)
        stack.enter_context(watching(self.sna))
        stack.enter_context(watching(self.hub))
        self.healthy()

    def clean_up(self) -> None:
        for site in (self.hub, self.sna):
            site.clean_up()

    def state(self) -> tuple[str, str]:
        return ready(self.sna)

    def healthy(self, seconds: float = 60) -> float:
        """How long it took."""
        began = time.monotonic()
        until(lambda: self.state() == HEALTHY, "a healthy tunnel", seconds)
        return time.monotonic() - began

    def broken(self, *reasons: str) -> str:
        """The reason that status gives, once it is one of these."""
        return until(
            lambda: next((r for s, r in [self.state()] if s == "False" and r in reasons), None),
            f"one of {reasons}",
            60,
        )

    def begin(self, run: str) -> None:
        """A backup, of which data is on its way."""
        self.hub.spec(self.hub.vm("ctx-1", sizes=[SIZE, SIZE], backup={"run": run}))
        until(
            lambda: all(d["clients"] for d in self.vm()["disks"]) if self.vm()["disks"] else None,
            "clients on every disk",
            60,
        )

    def vm(self) -> dict[str, Any]:
        return self.hub.status().get("ctx-1", {"disks": [], "call": None})

    def ended(self, run: str) -> str:
        """COMPLETED or FAILED, when it is one of them."""

        def look() -> str | None:
            call = self.vm()["call"]
            if call and call["run"] == run and call["state"] in ("COMPLETED", "FAILED"):
                return str(call["state"])
            return None

        return until(look, f"the end of run {run}", 90)

    def same(self, run: str) -> bool:
        """The images hold what the appliance has."""
        for key in (2000, 2001):
            raw = self.hub.folder / f"{key}.raw"
            image = str(self.hub.image("ctx-1", key, run))
            self.lab.output(self.lab.hub_ns, "qemu-img", "convert", "-O", "raw", image, str(raw))
            if raw.read_bytes() != (self.sources / f"{key}.raw").read_bytes():
                return False
        return True

    def starts(self, run: str) -> int:
        return sum(f"ctx-1-{run}-" in one["nbd_targets"] for one in self.appliance.starts())


@contextmanager
def drill(tmp_path: Path, slow: float = 0.0) -> Iterator[Drill]:
    with laboratory(tmp_path / "lab") as lab, ExitStack() as stack:
        yield Drill(lab, tmp_path, stack, slow)


def test_a_killed_sshd_fails_the_backup_and_the_next_one_works(tmp_path: Path) -> None:
    with drill(tmp_path, slow=3) as one:
        one.begin("r1")
        one.lab.sshd.stop()
        one.lab.sshd.kill_sessions()
        said = one.broken("HubUnreachable", "ConnectionLost")
        one.lab.sshd.start()
        print(f"sshd killed: {said}; healthy again after {one.healthy():.1f} s")
        assert one.ended("r1") == "FAILED"
        assert one.starts("r1") == 1
        one.begin("r2")
        assert one.ended("r2") == "COMPLETED"
        assert one.starts("r2") == 1
        assert one.same("r2")


def test_a_short_cut_is_survived_by_the_backup_and_by_the_connection(tmp_path: Path) -> None:
    with drill(tmp_path, slow=4) as one:
        one.lab.tunnel(one.sna, keepalive={"interval": "15s", "count": 3})
        until(lambda: "ServerAliveInterval=15" in _argv(one.sna), "the other keep-alive")
        one.healthy()
        before = tunnel(one.sna)["connections"][0]["pid"]
        one.begin("r1")
        one.lab.cut()
        time.sleep(2)
        one.lab.mend()
        assert one.ended("r1") == "COMPLETED"
        assert one.starts("r1") == 1
        assert one.same("r1")
        assert tunnel(one.sna)["connections"][0]["pid"] == before


def _argv(site: Site) -> str:
    pid = tunnel(site)["connections"][0]["pid"]
    try:
        return Path(f"/proc/{pid}/cmdline").read_text() if pid else ""
    except FileNotFoundError:
        return ""


def test_a_long_cut_is_said_and_fails_the_backup_and_nothing_is_sent_twice(
    tmp_path: Path,
) -> None:
    with drill(tmp_path, slow=3) as one:
        one.lab.sshd.policy = policy(one.lab.reach, alive=1)
        one.lab.sshd.restart()
        one.broken("ConnectionLost", "HubUnreachable", "Starting", "SshEnded")
        one.healthy()
        one.begin("r1")
        one.lab.cut()
        said = one.broken("ConnectionLost", "HubUnreachable")
        reason = one.sna.run("explain", "tunnel/hub-a")
        assert "timed out" in reason or "not responding" in reason, reason
        one.lab.mend()
        print(f"link cut: {said}; healthy again after {one.healthy():.1f} s")
        assert one.ended("r1") == "FAILED"
        assert one.starts("r1") == 1
        one.begin("r2")
        assert (one.ended("r2"), one.starts("r2")) == ("COMPLETED", 1)


def test_a_hub_that_was_rebooted_is_found_again(tmp_path: Path) -> None:
    """Its side of the session is gone without a word, and ours still holds its ports."""
    with drill(tmp_path) as one:
        before = tunnel(one.sna)["connections"][0]["pid"]
        one.lab.cut()
        one.lab.sshd.stop()
        one.lab.sshd.kill_sessions()
        one.lab.sshd.start()
        one.lab.mend()
        began = time.monotonic()
        until(lambda: tunnel(one.sna)["connections"][0]["pid"] not in (before, None), "a new ssh")
        one.healthy()
        print(f"hub rebooted: healthy again after {time.monotonic() - began:.1f} s")


def test_a_port_that_is_taken_while_the_tunnel_is_down_is_named_and_waited_for(
    tmp_path: Path,
) -> None:
    with drill(tmp_path) as one:
        one.lab.sshd.stop()
        one.lab.sshd.kill_sessions()
        one.broken("HubUnreachable", "ConnectionLost")
        holder = hold(one.lab, 10150)
        one.lab.sshd.start()
        assert one.broken("LocalPortBusy") == "LocalPortBusy"
        assert f"(pid {holder.pid})" in one.sna.run("status")
        holder.kill()
        holder.wait(10)
        print(f"port 10150 busy: healthy again after {one.healthy():.1f} s")


@pytest.mark.parametrize("what", ["host key", "key"])
def test_a_hub_that_says_no_is_asked_seldom_and_taken_back_at_once_by_hand(
    tmp_path: Path, what: str
) -> None:
    with drill(tmp_path) as one:
        sshd = one.lab.sshd
        good = (sshd.folder / "id.pub").read_text()
        if what == "key":
            (sshd.folder / "id.pub").write_text((sshd.folder / "other-id.pub").read_text())
        else:
            sshd.host = "other-host"
        sshd.restart()
        wanted = "AuthenticationFailed" if what == "key" else "HostKeyMismatch"
        assert one.broken(wanted) == wanted
        assert tunnel(one.sna)["connections"][0]["pid"] is None, "it talks to a stranger"
        (sshd.folder / "id.pub").write_text(good)
        sshd.host = "host"
        sshd.restart()
        one.sna.apply(code=None)
        print(f"wrong {what}: healthy {one.healthy():.1f} s after apply")


def test_a_policy_without_a_port_is_named_and_mended_without_us(tmp_path: Path) -> None:
    with drill(tmp_path) as one:
        lab = one.lab
        some = " ".join(str(end) for end in lab.reach.opens if end.port != 10107)
        lab.sshd.policy = policy(lab.reach, PermitOpen=some)
        lab.sshd.restart()
        assert one.broken("ForwardRefused") == "ForwardRefused"
        assert "port 10107" in one.sna.run("status")
        lab.sshd.policy = policy(lab.reach)
        one.lab.sshd.stop()
        (lab.sshd.folder / "log").unlink()
        lab.sshd.start()  # the session goes on, under the policy that it began with
        print(f"policy without a port: healthy again after {one.healthy(90):.1f} s")


def test_a_log_that_cannot_be_written_holds_nothing_up(tmp_path: Path) -> None:
    with drill(tmp_path) as one:
        log = one.sna.folder / "state" / "logs" / "tunnel-hub-a-whole.log"
        log.unlink()
        log.symlink_to("/dev/full")
        pid = tunnel(one.sna)["connections"][0]["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: tunnel(one.sna)["connections"][0]["pid"] not in (pid, None), "a new ssh")
        print(f"full log: healthy again after {one.healthy():.1f} s")
        one.hub.spec(one.hub.vm("ctx-1", sizes=[SIZE, SIZE]))
        assert one.ended("r1") == "COMPLETED"
        assert one.same("r1")


@pytest.mark.soak
@pytest.mark.parametrize("seconds", [5, 120])
def test_a_cut_with_the_keep_alives_that_are_the_default(tmp_path: Path, seconds: int) -> None:
    """45 s on both sides lie between these two."""
    with drill(tmp_path, slow=10) as one:
        one.lab.tunnel(one.sna, keepalive={"interval": "15s", "count": 3}, connect_timeout="10s")
        until(lambda: "ServerAliveInterval=15" in _argv(one.sna), "the other keep-alive")
        one.healthy()
        before = tunnel(one.sna)["connections"][0]["pid"]
        one.begin("r1")
        one.lab.cut()
        began, said = time.monotonic(), dict[str, float]()
        while time.monotonic() < began + seconds:
            status, reason = one.state()
            said.setdefault(f"{status} {reason}", round(time.monotonic() - began, 1))
            time.sleep(0.5)
        one.lab.mend()
        took = one.healthy(120)
        print(f"cut for {seconds} s: status said {said}; healthy again after {took:.1f} s")
        end = one.ended("r1")
        print(f"the backup: {end}; calls: {one.starts('r1')}")
        assert one.starts("r1") == 1
        after = tunnel(one.sna)["connections"][0]["pid"]
        if seconds < 45:
            assert (end, after) == ("COMPLETED", before)
            assert one.same("r1")
        else:
            assert end == "FAILED"
            one.begin("r2")
            assert (one.ended("r2"), one.starts("r2")) == ("COMPLETED", 1)
