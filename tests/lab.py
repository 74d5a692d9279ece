"""A hub and an appliance with a network of their own between them, for tests of tunnels.

Two network namespaces, each with a loopback of its own, and one between them that routes; a real
sshd in the hub, keys made for the test. So the real numbers can be used everywhere, and the way can
be cut in its middle, where nobody is told. It takes root and iproute2; where it is not permitted,
`missing` says why.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reconciler.core.tunnel import HostKey, Reach
from reconciler.core.units import PortRange
from tests.e2e.site import Appliance, Site, until

HUB = "198.51.100.2"
SNA = "192.0.2.2"
REBORN = "192.0.2.3"
"""Of networks that nobody has. Source: RFC 5737."""
_WAYS = {HUB: "198.51.100.1", SNA: "192.0.2.1"}
"""Host → its router, in the namespace between them."""
SSHD = "/usr/sbin/sshd"
PORT = 443
_number = itertools.count()


@functools.cache
def missing() -> str:
    """Why there can be no laboratory here; empty: there can."""
    for tool in (SSHD, "ssh", "ssh-keygen", "ip", "nsenter"):
        if not shutil.which(tool):
            return f"{tool} is not installed"
    name = f"nbd-test-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


def policy(reach: Reach, *, user: str = "", alive: int = 3, **changes: str) -> str:
    """What the hub's sshd permits. `changes`: lines of it that are to be others; empty: none."""
    lines = {
        "AllowTcpForwarding": "yes",
        "PermitOpen": " ".join(map(str, reach.opens)),
        "PermitListen": str(reach.listens),
        "GatewayPorts": "no",
        "MaxSessions": "0",
        "ClientAliveInterval": str(alive),
        "ClientAliveCountMax": "6" if alive == 3 else "3",
    } | changes
    written = "".join(f"  {name} {value}\n" for name, value in lines.items() if value)
    return f"Match User {user or getpass.getuser()}\n{written}"


class Sshd:
    """The hub's sshd. Its sessions are processes of their own, and outlive it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.folder = lab.folder / "sshd"
        self.folder.mkdir()
        self.keygen("host")
        self.keygen("other-host")
        self.keygen("id")
        self.keygen("other-id")
        self.policy = policy(lab.reach)
        self.host = "host"
        self.process: subprocess.Popen[bytes] | None = None
        self.options = ""
        """Before `permitopen` and the like of the key's line; empty: none."""

    def keygen(self, name: str) -> None:
        path = self.folder / name
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)],
            check=True,
        )

    def key(self, name: str = "host") -> HostKey:
        return HostKey.parse((self.folder / f"{name}.pub").read_text())

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def start(self) -> None:
        (self.folder / "authorized_keys").write_text(
            self.options + (self.folder / "id.pub").read_text()
        )
        (self.folder / "config").write_text(
            f"Port {PORT}\nListenAddress {HUB}\nHostKey {self.folder / self.host}\n"
            f"PidFile none\nUsePAM no\nStrictModes no\nLogLevel VERBOSE\nPermitRootLogin yes\n"
            f"AuthorizedKeysFile {self.folder / 'authorized_keys'}\n{self.policy}"
        )
        Path("/run/sshd").mkdir(exist_ok=True)  # its own: it separates privileges there
        with (self.folder / "log").open("ab") as log:
            self.process = self.lab.run_in(
                self.lab.hub_ns, [SSHD, "-D", "-e", "-f", str(self.folder / "config")], stderr=log
            )
        until(lambda: f"listening on {HUB} port {PORT}" in self.log, "sshd")

    def stop(self) -> None:
        """End the one that listens. Sessions go on."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def sessions(self) -> list[int]:
        """The processes that serve who is logged in."""
        own = self.process.pid if self.process else 0
        return [
            pid
            for pid in self.lab.pids(self.lab.hub_ns)
            if pid != own and _name(pid).startswith("sshd")
        ]

    def kill_sessions(self) -> None:
        for pid in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def restart(self) -> None:
        """With the policy and the host key as they are now; nobody stays logged in."""
        self.stop()
        self.kill_sessions()
        (self.folder / "log").unlink()
        self.start()


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


class Lab:
    """Both sides, made when it begins and gone when it is closed."""

    def __init__(self, folder: Path, ports: PortRange | None = None) -> None:
        self.folder = folder
        tag = f"{os.getpid() % 100000}x{next(_number)}"
        self.hub_ns, self.sna_ns = f"nbd-hub-{tag}", f"nbd-sna-{tag}"
        self.wan_ns = f"nbd-wan-{tag}"
        self.namespaces = (self.hub_ns, self.sna_ns, self.wan_ns)
        self.link = f"s{tag}"
        """The appliance's."""
        self.reach = Reach(ports=ports or PortRange(10100, 10200))
        self.popens: list[subprocess.Popen[bytes]] = []
        for name in self.namespaces:
            self._ip("netns", "add", name)
            self._ip("-n", name, "link", "set", "lo", "up")
        for name, link, address in ((self.hub_ns, f"h{tag}", HUB), (self.sna_ns, self.link, SNA)):
            other = f"w{link}"
            self._ip("link", "add", link, "netns", name, "type", "veth",
                     "peer", "name", other, "netns", self.wan_ns)  # fmt: skip
            ends = ((name, link, address), (self.wan_ns, other, _WAYS[address]))
            for where, end, own in ends:
                self._ip("-n", where, "addr", "add", f"{own}/24", "dev", end)
                self._ip("-n", where, "link", "set", end, "up")
            self._ip("-n", name, "route", "add", "default", "via", _WAYS[address])
        self.mend()
        self.sshd = Sshd(self)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    @staticmethod
    def path(namespace: str) -> str:
        return f"/run/netns/{namespace}"

    def run_in(
        self, namespace: str, argv: Sequence[str], **options: Any
    ) -> subprocess.Popen[bytes]:
        """A process of this side, ended with the laboratory."""
        given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **options}
        line = ["nsenter", f"--net={self.path(namespace)}", *argv]
        process = subprocess.Popen(line, **given)
        self.popens.append(process)
        return process

    def output(self, namespace: str, *argv: str) -> str:
        """What a command of this side says."""
        line = ["nsenter", f"--net={self.path(namespace)}", *argv]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def pids(self, namespace: str) -> list[int]:
        """The processes of one side."""
        said = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
        return [int(word) for word in said.stdout.split()]

    def cut(self) -> None:
        """Nothing passes any more, and nobody is told: the two ends see their links as before."""
        self._forward("0")

    def mend(self) -> None:
        """It passes again."""
        self._forward("1")

    def _forward(self, value: str) -> None:
        line = f"open('/proc/sys/net/ipv4/ip_forward', 'w').write('{value}')"
        said = self.output(self.wan_ns, sys.executable, "-S", "-c", line)
        assert not said, said

    def reborn(self) -> None:
        """The appliance's host comes back as after a loss of power: it knows nothing of what was,
        and says no good-bye of it. So it has another address, by which nothing old can be sent."""
        self._ip("-n", self.sna_ns, "addr", "flush", "dev", self.link)
        self._ip("-n", self.sna_ns, "addr", "add", f"{REBORN}/24", "dev", self.link)
        self._ip("-n", self.sna_ns, "route", "add", "default", "via", _WAYS[SNA])

    def hub(self, folder: Path) -> Site:
        """The reconciler of the hub."""
        site = self._site(folder, self.hub_ns)
        site.write_config(api={"listen": "127.0.0.1:8082"})
        site.appliance_at("http://127.0.0.1:9081", reports_end=False)
        return site

    def sna(self, folder: Path, **changes: Any) -> Site:
        """The reconciler of the appliance, with a tunnel to the hub."""
        site = self._site(folder, self.sna_ns)
        site.write_config(
            api={"listen": "127.0.0.1:8083"},
            ports={"range": str(self.reach.ports)},
            loop={"resync": "2s", "healthy_after": "3s"},
        )
        self.tunnel(site, **changes)
        return site

    def tunnel(self, site: Site, **changes: Any) -> None:
        """Declare the tunnel."""
        value = {
            "name": "hub-a",
            "hub": {"host": HUB, "port": PORT},
            "user": getpass.getuser(),
            "identity": {"file": str(self.sshd.folder / "id")},
            "host_key": str(self.sshd.key()),
            "keepalive": {"interval": "2s", "count": 2},
            "connect_timeout": "3s",
            **changes,
        }
        site.dump(site.specs / "tunnel.yaml", {"tunnels": [value]})

    def _site(self, folder: Path, namespace: str) -> Site:
        folder.mkdir()
        site = Site(folder, range(self.reach.ports.first, self.reach.ports.last + 1))
        site.netns = self.path(namespace)
        return site

    def answering(self) -> None:
        """Both APIs answer, and no more than that: for tests of the way between them."""
        folder = self.folder / "answers"
        for path, text in (
            ("healthz", "ok"),
            ("api/v1/backups", '{"backups": []}'),
            ("api/v1/health", "ok"),
        ):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        for name, port in ((self.hub_ns, 8082), (self.sna_ns, 8081)):
            server = [*(sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"),
                      *("--directory", str(folder))]  # fmt: skip
            self.run_in(name, server, stderr=subprocess.DEVNULL)
            until(lambda: self.connects(name, port), f"the API at {port}")  # noqa: B023

    def connects(self, namespace: str, port: int, address: str = "127.0.0.1") -> bool:
        """What `nc -z` says."""
        line = f"import socket; socket.create_connection(({address!r}, {port}), 2)"
        done = subprocess.run(
            ["nsenter", f"--net={self.path(namespace)}", sys.executable, "-S", "-c", line],
            capture_output=True,
        )
        return not done.returncode

    @contextlib.contextmanager
    def appliance(self, folder: Path, *options: str) -> Iterator[Appliance]:
        """The reference appliance, where field appliances listen, reporting through the tunnel."""
        options = ("--hub", "http://localhost:8082", *options)
        found = Appliance(folder, *options, port=8081, netns=self.path(self.sna_ns))
        try:
            yield found
        finally:
            found.end()

    def close(self) -> None:
        for name in self.namespaces:
            for pid in self.pids(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self.popens:
            process.wait(10)
            for stream in (process.stdout, process.stderr):
                if stream:
                    stream.close()
        for name in self.namespaces:
            self._ip("netns", "del", name)


@contextlib.contextmanager
def laboratory(folder: Path, ports: PortRange | None = None) -> Iterator[Lab]:
    """A laboratory with its sshd running."""
    folder.mkdir(exist_ok=True)
    found = Lab(folder, ports)
    try:
        found.sshd.start()
        yield found
    finally:
        found.close()
