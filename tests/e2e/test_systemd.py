"""The daemon under systemd: what it says, whose socket it serves, and that its sandbox fits."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

from reconciler.host import nbd
from tests.e2e.site import Appliance, Site, until
from tests.e2e.test_watch import quick as quick  # the fixture
from tests.e2e.test_watch import settled
from tests.systemd import ENTER, Manager, managing


def render(site: Site, *arguments: str) -> Path:
    """The units of a site."""
    site.run("render", "systemd", "--output", str(site.folder / "units"), *arguments)
    return site.folder / "units" / "reconciler.service"


def health(site: Site) -> int:
    url = f"http://127.0.0.1:{site.api}/api/v1/health"
    with urllib.request.urlopen(url, timeout=60) as answer:
        return int(answer.status)


def test_it_says_how_it_is(quick: Site, appliance: Appliance) -> None:
    quick.spec(quick.vm("ctx-1"))
    with managing(quick, watchdog=0.4) as manager:
        manager.start()
        manager.hears("READY=1")
        settled(quick, "ctx-1")
        manager.listen()
        manager.heard.clear()
        manager.hears("WATCHDOG=1")
        manager.hears("STATUS=1 VMs, 1 exports")
        assert manager.process
        manager.process.send_signal(signal.SIGHUP)
        manager.hears("RELOADING=1")
        manager.hears("READY=1")
        (quick.folder / "reconciler.yaml").write_text("hub: [")
        manager.heard.clear()
        manager.process.send_signal(signal.SIGHUP)
        manager.hears("RELOADING=1")
        manager.hears("READY=1")
        assert manager.stop() == 143
        assert "STOPPING=1" in manager.listen()


def test_it_is_not_ready_before_every_vm_was_looked_at(quick: Site, appliance: Appliance) -> None:
    appliance.misbehave("hang-before", 1)
    quick.spec(quick.vm("ctx-1"))
    with managing(quick, watchdog=0.4) as manager:
        manager.start()
        until(lambda: bool(quick.servers()), "its server")
        manager.listen()
        manager.heard.clear()
        manager.hears("STATUS=looking at every VM once: 0 VMs, 0 exports")
        assert "WATCHDOG=1" in manager.heard
        assert "READY=1" not in manager.heard
        assert manager.process
        manager.process.kill()  # its end would wait for the appliance


def test_what_is_asked_while_it_is_down_waits(quick: Site, appliance: Appliance) -> None:
    quick.spec(quick.vm("ctx-1"))
    with managing(quick) as manager:
        manager.start()
        manager.hears("READY=1")
        assert health(quick) == 200
        assert manager.stop() == 143
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(health(quick)))
        asking.start()
        manager.start()
        asking.join(60)
        assert answers == [200]
        server = next(iter(quick.servers())).pid
        held = os.listdir(f"/proc/{server}/fd")
        links = {os.readlink(f"/proc/{server}/fd/{fd}") for fd in held}
        ours = f"socket:[{os.fstat(manager.api.fileno()).st_ino}]"
        assert ours not in links, "no server has the callbacks' socket"
        names = Path(f"/proc/{server}/environ").read_bytes().split(b"\0")
        assert {name.split(b"=")[0] for name in names if name.startswith(b"LISTEN")} == {
            b"LISTEN_PID",
            b"LISTEN_FDS",
        }
        assert not any(name.startswith((b"NOTIFY", b"WATCHDOG")) for name in names)


def test_serve_takes_the_socket_too(quick: Site) -> None:
    with managing(quick) as manager:
        start_serve(manager)
        manager.hears("READY=1")
        assert health(quick) == 200
        assert manager.stop() == 143
    assert manager.process


def start_serve(manager: Manager) -> None:
    site = manager.site
    environment = {**os.environ, "HOME": str(site.folder), "NOTIFY_SOCKET": manager.address}
    with (site.folder / "daemon.log").open("a") as log:
        manager.process = subprocess.Popen(
            [sys.executable, "-c", ENTER, str(manager.api.fileno()), "reconciler", "serve"],
            cwd=site.folder, env=environment, pass_fds=[manager.api.fileno()],
            stdout=log, stderr=log, text=True,
        )  # fmt: skip


def test_in_the_units_sandbox_it_starts_calls_heals_and_takes_over(
    quick: Site, appliance: Appliance
) -> None:
    unit = render(quick)
    quick.spec(quick.vm("ctx-1", (1 << 20, 1 << 20)))
    with managing(quick, unit) as manager:
        manager.start()
        manager.hears("READY=1")
        settled(quick, "ctx-1")
        assert confined(manager)
        first = next(iter(quick.servers()))
        os.kill(first.pid, signal.SIGKILL)
        healed(quick, first.pid)
        manager.stop(signal.SIGKILL)
        before = set(quick.pids().values())
        manager.start()
        manager.hears("READY=1")
        assert set(quick.pids().values()) == before
        port = next(iter(quick.servers().values())).port
        until(lambda: holders(manager, port) == 1, "a copy of the socket of a server it found")
        os.kill(next(iter(quick.servers())).pid, signal.SIGKILL)
        settled(quick, "ctx-1")
        assert len(appliance.starts()) == 1


def confined(manager: Manager) -> bool:
    """The daemon and its servers have no capability, no way to one, and filters."""
    assert manager.process
    pids = [manager.process.pid, *manager.site.pids().values()]
    for pid in pids:
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, pid
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2"), pid
    return len(pids) == 3


def healed(site: Site, gone: int) -> None:
    def there() -> bool:
        now = site.servers()
        return len(now) == 2 and all(
            one.pid != gone
            and nbd.handshake(
                [nbd.Target("127.0.0.1", mark.port, f"ctx-1-r1-disk{mark.disk - 2000}")], 5.0
            )[0].answered
            for one, mark in now.items()
        )

    until(there, "the server is there again")


def holders(manager: Manager, port: int) -> int:
    """How many descriptors of the daemon listen at a port."""
    assert manager.process
    pid = manager.process.pid
    inode = next(
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
    )
    links = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            links.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return links.count(f"socket:[{inode}]")
