"""A hub in a directory, for the tool and for whoever does the same without it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.clients import Appliance, call, free_ports, handshake
from bench.workplace import PARALLEL, BenchError, Took, end, servers, timed

HUB: Final = f"bench-{os.getpid()}"
RUN: Final = "r1"
DISK_SIZE: Final = 64 << 20
DISKS_PER_VM: Final = 4
"""Of a bench with more than ten disks; up to ten, each is a VM of its own."""
IMPORT_CLICK: Final = (sys.executable, "-c", "import click")


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
        for name in ("state", "repository", "called"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for disk in self.disks:
            disk.image.parent.mkdir(parents=True)
            shutil.copyfile(self.empty, disk.image)
        self.appliance.counted(clear=True)
        os.sync()

    def forget(self) -> None:
        """Nothing was read here by any command."""
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)

    def line(self, *arguments: str) -> list[str]:
        return ["--config", "reconciler.yaml", *arguments]

    def ours(self, *arguments: str) -> Took:
        return timed([self.command, *self.line(*arguments)], self.root)

    def run(self, *arguments: str) -> Took:
        """A command line as it is: `--help` takes no config before it."""
        bare = arguments[0].startswith("-") or "--help" in arguments
        return timed([self.command, *(arguments if bare else self.line(*arguments))], self.root)

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

    def request(self, vm: str) -> dict[str, str]:
        """What is posted about a VM."""
        disks = self.vms[vm]
        pairs = [f"{disk.key}:nbd://127.0.0.1:{disk.port}/{disk.export}" for disk in disks]
        return {
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

    def call(self, vm: str) -> None:
        """Wait until every disk of a VM answers, then call."""
        for disk in self.vms[vm]:
            handshake(disk.port, disk.export)
        call(self.appliance.url, self.request(vm))

    def called_once(self) -> None:
        """Raises BenchError unless the appliance was called once for each VM, by who is no tool."""
        counted = dict(self.appliance.counted()["jobs"])
        if counted != {f"floor-{vm}": 1 for vm in self.vms}:
            raise BenchError(f"called {counted}, not once for each of {len(self.vms)} VMs")


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
        for vm in self.site.vms:
            self.site.call(vm)
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
        """What a look cannot do without: a handshake with every export."""
        began = time.monotonic()
        for disk in self.site.disks:
            handshake(disk.port, disk.export)
        return time.monotonic() - began
