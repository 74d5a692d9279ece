#!/usr/bin/env python3
"""What the reconciler costs, against what the same work costs without it.

python bench/bench.py [--disks 1,10,100] [--runs 5] [--json FILE] [--profile]

A figure is a ratio within one run: each round does the floor and ours one after the other, so
that what else loads the machine loads both. README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "results" / "latest.json"
FORMAT_VERSION: Final = "1.0"
HUB: Final = f"bench-{os.getpid()}"
RUN: Final = "r1"
DISK_SIZE: Final = 64 << 20
DISKS_PER_VM: Final = 4
"""Of a bench with more than ten disks; up to ten, each is a VM of its own."""
PARALLEL: Final = min(32, 4 * (os.cpu_count() or 1))
"""Servers that the tool starts at once, unless its config says otherwise."""
PORTS: Final = (20000, 32000)
"""Where a free range is looked for: below the ports that the kernel gives to clients."""
DEADLINE: Final = 60.0
"""Seconds after which what is waited for is taken as hanging."""
STARTS: Final = 3
"""A command that only starts up is quick, so each round repeats it this often."""
IMPORT_CLICK: Final = (sys.executable, "-c", "import click")


class BenchError(Exception):
    """Something was not as it must be for the figures to mean anything."""


# -- processes: all are our children, so all can be ended by pid


def become_subreaper() -> None:
    """Servers whose starter has ended become our children. Source: prctl(2)."""
    set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0):
        raise BenchError(f"prctl: {os.strerror(ctypes.get_errno())}")


def _stat(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the third, the state, on. Source: proc(5)."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2 :].split()


def children() -> dict[int, tuple[str, ...]]:
    """pid → argv of every child of ours that lives; those that have ended are reaped."""
    found = {}
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        with contextlib.suppress(OSError):
            state, parent = _stat(pid)[:2]
            if int(parent) != os.getpid():
                continue
            if state == "Z":
                os.waitpid(pid, os.WNOHANG)
                continue
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            found[pid] = tuple(words[:-1])
    return found


def servers() -> dict[int, tuple[str, ...]]:
    """The qemu-nbd among our children."""
    return {pid: argv for pid, argv in children().items() if argv[:1] == ("qemu-nbd",)}


def end(pids: Sequence[int], number: signal.Signals) -> None:
    """Signal children and wait until all of them are gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def end_all() -> None:
    """Leave no child behind, nor the children of those that end here."""
    while left := list(children()):
        end(left, signal.SIGKILL)


def cpu_of(pids: Sequence[int]) -> float:
    """CPU seconds that processes have used so far. Source: the kernel's sched-stats.rst."""
    spent = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            spent += int((thread / "schedstat").read_text().split()[0])
    return spent / 1e9


def cpu_of_ours() -> float:
    """CPU seconds of this process, and of those of its children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


@dataclass(frozen=True)
class Took:
    """What a command took: by the clock, and CPU of its own, without that of its servers."""

    wall: float
    cpu: float
    began: float
    out: str


def timed(argv: Sequence[str], cwd: Path) -> Took:
    """Run a command from its exec to its end. Raises BenchError unless it succeeds."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode()
        if process.returncode:
            err.seek(0)
            last = "\n".join((text + err.read().decode()).splitlines()[-20:])
            raise BenchError(f"exit {process.returncode} from {shlex.join(argv)}\n{last}")
    return Took(wall, usage.ru_utime + usage.ru_stime, began, text)


# -- the clients of the floor, and the appliance of both


def handshake(port: int, name: str) -> None:
    """One NBD handshake, tried until it answers. Raises BenchError."""
    deadline = time.monotonic() + DEADLINE
    while True:
        with socket.socket() as sock:
            sock.settimeout(DEADLINE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                sock.connect(("127.0.0.1", port))
                return _negotiate(sock, name)
            except OSError as error:
                if time.monotonic() > deadline:
                    raise BenchError(f"no export {name} on port {port}: {error}") from error
        time.sleep(0.0005)


def _negotiate(sock: socket.socket, name: str) -> None:
    """Ask for the export's information and leave in order. Source: the NBD protocol, proto.md."""

    def read(count: int) -> bytes:
        data = b""
        while len(data) < count:
            # qemu-nbd answers in small writes: without this, our delayed ACK costs 44 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            piece = sock.recv(count - len(data))
            if not piece:
                raise ConnectionError("it closed the connection")
            data += piece
        return data

    option, info, abort, ack, information = 0x49484156454F5054, 6, 2, 1, 3
    read(18)
    encoded = name.encode()
    body = struct.pack("!I", len(encoded)) + encoded + struct.pack("!H", 0)
    sock.sendall(struct.pack("!IQII", 3, option, info, len(body)) + body)
    while True:
        _, _, kind, length = struct.unpack("!QIII", read(20))
        read(length)
        if kind == ack:
            break
        if kind != information:
            raise BenchError(f"export {name} answers {kind:#x}")
    sock.sendall(struct.pack("!QII", option, abort, 0))
    read(20)


def call(url: str, request: Mapping[str, str]) -> None:
    """GET health and POST, over one connection. Raises BenchError."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(request).encode()
    health = f"GET /api/v1/health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    start = f"POST /api/v1/backup/start HTTP/1.1\r\nHost: {host}\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as sock:
        for message in (health, start + f"Content-Length: {len(body)}\r\n\r\n".encode() + body):
            sock.sendall(message)
            answer = sock.recv(65536)  # one write of under 1 KiB over loopback comes whole
            if not answer.startswith(b"HTTP/1.1 200"):
                raise BenchError(f"the appliance answers {answer!r}")


class Appliance:
    """The stand-in for a node appliance; a process of its own that ends when we do."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "appliance.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the bench alone
        )
        assert self.process.stdout
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def counted(self, *, clear: bool = False) -> Mapping[str, Any]:
        """How often each job was started, and when the last start came."""
        method = "DELETE" if clear else "GET"
        request = urllib.request.Request(f"{self.url}/count", method=method)
        with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
            value: Mapping[str, Any] = json.load(answer)
        return value


def free_ports(count: int) -> range:
    """So many ports in a row on which nobody listens now. Raises BenchError."""
    for first in range(PORTS[0] + os.getpid() % 97, PORTS[1] - count, count):
        ports = range(first, first + count)
        if all(map(_is_free, ports)):
            return ports
    raise BenchError(f"cannot find {count} free ports in a row in {PORTS[0]}-{PORTS[1]}")


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


# -- the two sides


@dataclass(frozen=True)
class Disk:
    """One disk and what its server is started with."""

    vm: str
    key: int
    port: int
    export: str
    image: Path


class Site:
    """A hub in a directory: config, inventory, spec, images; and the command that uses them."""

    def __init__(self, root: Path, count: int, command: str, appliance: Appliance) -> None:
        self.root, self.count, self.command, self.appliance = root, count, command, appliance
        per_vm = 1 if count <= 10 else DISKS_PER_VM
        ports = free_ports(count)
        self.disks = []
        for number, port in enumerate(ports):
            vm, position = f"vm-{number // per_vm:03}", number % per_vm
            key = 2000 + position
            image = root / "repository" / vm / str(key) / f"{RUN}.qcow2"
            self.disks.append(Disk(vm, key, port, f"{vm}-{RUN}-disk{position}", image))
        self.vms: dict[str, list[Disk]] = {}
        for disk in self.disks:
            self.vms.setdefault(disk.vm, []).append(disk)
        root.mkdir(parents=True)
        self.empty = root / "empty.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", str(self.empty), str(DISK_SIZE)]
        subprocess.run(create, check=True)
        self._write(ports)

    def _write(self, ports: range) -> None:
        vcenter = {"host": "vc", "user": "u", "password": {"file": "password"}}
        written = {
            "reconciler.yaml": {
                "hub": HUB,
                "state": "state",
                "repositories": {"local": {"root": "repository"}},
                "ports": {"range": f"{ports.start}-{ports.stop - 1}"},
                "snas": {"sna": {"url": self.appliance.url, "max_running": self.count}},
                "vcenters": {"vc1": vcenter},
                "inventory": {"file": "inventory.yaml"},
            },
            "inventory.yaml": {
                "vms": {
                    vm: {
                        "vm": {"name": vm, "path": f"/DC1/vm/{vm}", "vcenter": "vc1"},
                        "disks": [{"key": disk.key, "size": DISK_SIZE} for disk in disks],
                    }
                    for vm, disks in self.vms.items()
                }
            },
            "spec.yaml": {
                "vms": [
                    {"name": vm, "state": "exported", "disks": "inventory", "backup": {"run": RUN}}
                    for vm in self.vms
                ]
            },
        }
        for name, value in written.items():
            (self.root / name).write_text(json.dumps(value, indent=1))  # JSON is YAML
        (self.root / "password").write_text("secret\n")

    def fresh(self) -> None:
        """Nothing runs or was ever applied, and every image is there, empty and on the disk."""
        if left := servers():
            raise BenchError(f"{len(left)} servers still run")
        for name in ("state", "repository"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for disk in self.disks:
            disk.image.parent.mkdir(parents=True)
            shutil.copyfile(self.empty, disk.image)
        self.appliance.counted(clear=True)
        os.sync()

    def line(self, *arguments: str) -> list[str]:
        return ["--config", "reconciler.yaml", *arguments]

    def ours(self, *arguments: str) -> Took:
        return timed([self.command, *self.line(*arguments)], self.root)

    def apply(self) -> Took:
        return self.ours(*APPLY)

    def stop(self) -> Took:
        took = self.ours("stop", *self.vms, "--cancel-run", "-y")
        if left := servers():
            raise BenchError(f"{len(left)} servers survive `reconciler stop`")
        return took

    def verify(self) -> dict[str, int]:
        """Export name → pid, if all is as it should be: every export ready, every VM called once.

        Raises BenchError.
        """
        status = json.loads(self.ours("status", "-o", "json").out)
        ready = {
            disk["export"]: disk["pid"]
            for vm in status["vms"]
            for disk in vm["disks"]
            if disk["ready"]
        }
        calls = [vm["call"] for vm in status["vms"] if vm["call"]]
        accepted = {one["job_id"]: 1 for one in calls if one["state"] == "ACCEPTED"}
        jobs = self.appliance.counted()["jobs"]
        found = (len(ready), len(accepted), sum(jobs.values()), set(ready.values()))
        if found != (self.count, len(self.vms), len(self.vms), set(servers())) or jobs != accepted:
            raise BenchError(
                f"not as declared: {len(ready)} of {self.count} exports ready, {len(accepted)} of "
                f"{len(self.vms)} calls accepted, {sum(jobs.values())} calls at the appliance, "
                f"{len(servers())} servers run"
            )
        return ready


APPLY: Final = ("apply", "-f", "spec.yaml", "-y")


class Floor:
    """The same servers without the tool, as a person with a shell would have them."""

    def __init__(self, site: Site, lines: Mapping[str, Sequence[str]]) -> None:
        """`lines`: export name → the argv that the tool's server had."""
        self.site = site
        self.lines = [
            [*lines[disk.export][1:], "--bind", "127.0.0.1", "--port", str(disk.port)]
            for disk in site.disks
        ]

    def start(self, lines: Sequence[Sequence[str]], *, fork: bool) -> None:
        """Start servers by xargs, side by side."""
        if fork:
            lines, command = [["--fork", *line] for line in lines], ["qemu-nbd"]
        else:
            command = ["sh", "-c", '"$0" "$@" 2>/dev/null &', "qemu-nbd"]
        with tempfile.TemporaryFile() as feed:
            feed.write("".join(f"{word}\0" for line in lines for word in line).encode())
            feed.seek(0)
            many = ["xargs", "-0", "-P", str(PARALLEL), "-n", str(len(lines[0])), *command]
            subprocess.run(many, stdin=feed, check=True)

    def cold(self, *, fork: bool) -> float:
        """Servers, a handshake with each, and a call per VM."""
        began = time.monotonic()
        self.start(self.lines, fork=fork)
        for vm, disks in self.site.vms.items():
            for disk in disks:
                handshake(disk.port, disk.export)
            pairs = [f"{disk.key}:nbd://127.0.0.1:{disk.port}/{disk.export}" for disk in disks]
            request = {
                "job_id": f"floor-{vm}",
                "vm_name": vm,
                "vcenter_host": "vc",
                "vcenter_user": "u",
                "vcenter_password": "secret",
                "vm_path": f"/DC1/vm/{vm}",
                "nbd_targets": ",".join(pairs),
                "backup_type": "full",
                "previous_change_id": "",
            }
            call(self.site.appliance.url, request)
        return time.monotonic() - began

    def heal(self) -> float:
        """The first server is dead and is started again."""
        first = self.site.disks[0]
        dead = next(pid for pid, argv in servers().items() if first.export in argv)
        end([dead], signal.SIGKILL)
        began = time.monotonic()
        self.start(self.lines[:1], fork=False)
        handshake(first.port, first.export)
        return time.monotonic() - began

    def stop(self) -> float:
        pids = list(servers())
        began = time.monotonic()
        end(pids, signal.SIGTERM)
        return time.monotonic() - began

    def look(self) -> float:
        """What a look cannot do without: an interpreter, and a handshake with every export."""
        started = timed(IMPORT_CLICK, self.site.root).wall
        began = time.monotonic()
        for disk in self.site.disks:
            handshake(disk.port, disk.export)
        return started + time.monotonic() - began


# -- figures


@dataclass
class Figure:
    """One line of the table: its single values, round by round, in seconds."""

    name: str
    against: str
    """What the floor is."""
    floor: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """CPU seconds of our own process, without its servers."""
    max_ratio: float | None = None
    """The target, if there is one."""
    max_cpu: float | None = None

    @property
    def ratios(self) -> list[float]:
        return [ours / floor for floor, ours in zip(self.floor, self.ours, strict=True)]

    def add(self, floor: float, ours: Took | float) -> None:
        self.floor.append(floor)
        self.ours.append(ours.wall if isinstance(ours, Took) else ours)
        if isinstance(ours, Took):
            self.cpu.append(ours.cpu)

    def medians(self) -> dict[str, float]:
        values = {"floor": self.floor, "ours": self.ours, "cpu": self.cpu, "ratio": self.ratios}
        return {name: statistics.median(found) for name, found in values.items() if found}

    def missed(self) -> bool:
        found, never = self.medians(), float("inf")
        slow = found["ratio"] > (self.max_ratio or never)
        return slow or found.get("cpu", 0.0) > (self.max_cpu or never)

    def target(self) -> str:
        if self.max_ratio is None and self.max_cpu is None:
            return ""
        said = f"≤ {self.max_ratio:g}" if self.max_ratio else f"≤ {self.max_cpu:g} s CPU"
        return f"{said} {'missed' if self.missed() else 'met'}"


Group = dict[str, Figure]


def bench_disks(site: Site, runs: int) -> Group:
    """Rounds of the floor and ours with one number of disks."""
    many = site.count == 100
    cold, look = "xargs, a handshake each, a call per VM", "import click, a handshake each"
    figures = [
        Figure("cold apply", cold, max_ratio=1.6 if many else None),
        Figure("cold, to the last call", cold),
        Figure(
            "cold, floor with --fork",
            f"{cold}, qemu-nbd --fork",
            max_ratio=1.6 if many else None,
        ),
        Figure("cold, CPU of all", f"{cold}: CPU of servers, xargs, shells and client"),
        Figure("cold, CPU of the servers", f"{cold}: CPU of the servers"),
        Figure("plan, nothing to do", look),
        Figure("apply, nothing to do", look, max_cpu=0.8 if many else None),
        Figure("status", look),
        Figure("heal one of them", "xargs with one command, a handshake"),
        Figure("stop all", "SIGTERM to all, wait for all"),
    ]
    group = {figure.name: figure for figure in figures}
    floor = Floor(site, learned(site))
    for number in range(runs):
        told(f"{site.count} disks: round {number + 1} of {runs}")
        before = floor_round(floor)
        ours, looks = our_round(site, floor)
        after = floor_round(floor)
        for figure in figures:
            name = figure.name
            below = looks[name] if name in looks else (before[name] + after[name]) / 2
            figure.add(below, ours[name])
    return group


def learned(site: Site) -> dict[str, tuple[str, ...]]:
    """Export name → the argv of its server, from a first round that nobody times."""
    site.fresh()
    site.apply()
    pids = site.verify()
    running = servers()
    site.stop()
    return {export: running[pid] for export, pid in pids.items()}


def floor_round(floor: Floor) -> dict[str, float]:
    """What the floor took, by the name of the figure."""
    seen: dict[str, float] = {}
    floor.site.fresh()
    seen["cold, floor with --fork"] = floor.cold(fork=True)
    floor.stop()
    floor.site.fresh()
    spent = cpu_of_ours()
    seen["cold apply"] = seen["cold, to the last call"] = floor.cold(fork=False)
    seen["cold, CPU of the servers"] = cpu_of(list(servers()))
    seen["cold, CPU of all"] = seen["cold, CPU of the servers"] + cpu_of_ours() - spent
    seen["heal one of them"] = floor.heal()
    seen["stop all"] = floor.stop()
    return seen


def our_round(site: Site, floor: Floor) -> tuple[dict[str, Took | float], dict[str, float]]:
    """What the tool took, by the name of the figure; and the floor of those that only look."""
    seen: dict[str, Took | float] = {}
    looks: dict[str, float] = {}
    site.fresh()
    cold = site.apply()
    seen["cold apply"] = seen["cold, floor with --fork"] = cold
    seen["cold, CPU of the servers"] = spent = cpu_of(list(servers()))
    seen["cold, CPU of all"] = spent + cold.cpu
    seen["cold, to the last call"] = float(site.appliance.counted()["last"]) - cold.began
    pids = site.verify()
    for name, command in (
        ("plan, nothing to do", ("plan", "-f", "spec.yaml")),
        ("apply, nothing to do", APPLY),
        ("status", ("status",)),
    ):
        looks[name] = floor.look()
        seen[name] = site.ours(*command)
    if site.verify() != pids:
        raise BenchError("an apply with nothing to do replaced a server")
    end([pids[site.disks[0].export]], signal.SIGKILL)
    seen["heal one of them"] = site.apply()
    if len(pids.items() - site.verify().items()) != 1:
        raise BenchError("healing one server replaced others")
    seen["stop all"] = site.stop()
    return seen, looks


def bench_start(site: Site, runs: int) -> Group:
    """Commands that only start up, and `status` with nothing and with everything applied."""
    lines = {
        "--help": ("--help",),
        "--version": ("--version",),
        "status, nothing applied": ("status",),
        f"status, {site.count} exports": ("status",),
    }
    group = {name: Figure(name, "import click", max_ratio=2.5) for name in lines}
    group[f"status, {site.count} exports"].max_ratio = None
    site.fresh()
    timed(IMPORT_CLICK, site.root)
    for name, line in lines.items():
        told(f"start-up: {name}")
        site.ours(*line)  # fills the caches; nobody times it
        if name.endswith("exports"):
            site.apply()
            site.verify()
        for _ in range(runs * STARTS):
            group[name].add(timed(IMPORT_CLICK, site.root).wall, site.ours(*line))
    site.stop()
    return group


def profile(site: Site) -> None:
    """Where our own CPU time goes: cold, and with nothing to do."""
    learned(site)  # fills the caches
    site.fresh()
    out = site.root / "profile"
    for title in ("cold apply", "apply, nothing to do"):
        argv = [sys.executable, str(HERE / "profiled.py"), str(out), *site.line(*APPLY)]
        took = timed(argv, site.root)
        site.verify()
        print(f"== {site.count} disks: {title}: {took.wall:.2f} s, {took.cpu:.2f} s CPU, profiled")
        print(out.read_text())
    site.stop()


# -- what comes out


def table(groups: Mapping[str, Group]) -> str:
    """The figures for people: medians, and the least and greatest in brackets."""
    head = ("", "floor", "ours", "ratio", "own CPU s", "target")
    rows: list[tuple[str, ...]] = [head]
    for title, group in groups.items():
        rows.append((f"{title}:", "", "", "", "", ""))
        for one in group.values():
            cpu = f"{one.medians()['cpu']:.2f}" if one.cpu else ""
            spans = [_span(one.floor, 3), _span(one.ours, 3), _span(one.ratios, 2)]
            rows.append((f"  {one.name}", *spans, cpu, one.target()))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _span(values: Sequence[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def machine(where: Path) -> dict[str, object]:
    """What the seconds depend on."""
    version = subprocess.run(["qemu-nbd", "--version"], capture_output=True, text=True, check=True)
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    under = [mount for mount in mounts if where.is_relative_to(mount[1])]
    return {
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "qemu_nbd": version.stdout.splitlines()[0].split()[1],
        "filesystem": max(under, key=lambda mount: len(mount[1]))[2] if under else "unknown",
        "parallel": PARALLEL,
        "load_before": os.getloadavg()[0],
    }


def write(path: Path, facts: Mapping[str, object], runs: int, groups: Mapping[str, Group]) -> None:
    """Everything as JSON, every single value included."""
    figures = {
        title: [
            asdict(one) | {"ratios": one.ratios, "medians": one.medians()} for one in group.values()
        ]
        for title, group in groups.items()
    }
    value = {"format_version": FORMAT_VERSION, "machine": facts, "runs": runs, "figures": figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def told(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def settle_environment(root: Path) -> None:
    """What the shell has set must not count: our settings, and how Python starts.

    Bytecode is cached, as it is where the command is installed, but not in this checkout.
    """
    for name in [name for name in os.environ if name.startswith(("RECONCILER_", "PYTHON"))]:
        del os.environ[name]
    os.environ["PYTHONPYCACHEPREFIX"] = str(root / "bytecode")


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A temporary directory; afterwards it is gone, and so is every process of ours."""

    def stop(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    become_subreaper()
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="reconciler-bench-") as name:
        try:
            settle_environment(Path(name))
            yield Path(name)
        finally:
            for one in (signal.SIGINT, signal.SIGTERM):
                signal.signal(one, signal.SIG_IGN)
            end_all()


def reconciler() -> str:
    """The command that is installed beside this interpreter, or found on the PATH."""
    beside = Path(sys.executable).parent / "reconciler"
    found = str(beside) if beside.exists() else shutil.which("reconciler")
    if not found:
        raise BenchError("cannot find the command `reconciler`: `make bench` installs it")
    return found


def numbers(text: str) -> list[int]:
    found = [int(word) for word in text.split(",")]
    if not all(1 <= one <= 2000 for one in found):
        raise ValueError
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--disks", type=numbers, default=[1, 10, 100], help="how many, default 1,10,100"
    )
    parser.add_argument("--runs", type=int, default=5, help="rounds, default 5")
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"default {RESULTS}")
    parser.add_argument(
        "--profile", action="store_true", help="no figures: where our CPU time goes"
    )
    options = parser.parse_args()
    groups: dict[str, Group] = {}
    try:
        command = reconciler()
        with workplace() as root:
            facts = machine(root)
            appliance = Appliance()

            def site(count: int, name: str = "site") -> Site:
                return Site(root / f"{name}-{count}", count, command, appliance)

            if options.profile:
                profile(site(max(options.disks)))
                return 0
            most = max(options.disks)
            groups["start-up"] = bench_start(site(most, "start"), options.runs)
            for count in options.disks:
                groups[f"{count} disks" if count > 1 else "1 disk"] = bench_disks(
                    site(count), options.runs
                )
    except BenchError as error:
        told(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        told("interrupted: every process is ended")
        return 130
    facts["load_after"] = os.getloadavg()[0]
    write(options.json, facts, options.runs, groups)
    print(" · ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"seconds by the clock, median (least–greatest) of {options.runs} rounds\n")
    print(table(groups))
    print(f"\nevery value: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
