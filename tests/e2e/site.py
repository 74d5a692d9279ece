"""One hub for one test: its own directory, ports, hub name and processes, ended by pid."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sqlite3
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from reconciler.core.actual import Identity
from reconciler.core.mark import Mark, parse
from reconciler.host import proc
from reconciler.host.store import NAME, read
from tests.e2e import zygote

ROOT = Path(__file__).resolve().parents[2]
APPLIANCE = ROOT / "examples" / "node-appliance" / "appliance.py"
PASSWORD = "s3cret-of-the-vcenter"

T = TypeVar("T")


def until(look: Callable[[], T | None], what: str, seconds: float = 20.0) -> T:
    """The first answer of `look` that is not None or False. A generous deadline, no timing."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found is not None and found is not False:
            return found
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


class Appliance:
    """The reference node appliance, as a process of its own."""

    def __init__(self, folder: Path, *options: str, port: int = 0, netns: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "appliance.jsonl"
        self.sources = folder / "sources"
        self.sources.mkdir(exist_ok=True)
        self.folder = folder
        self.port = port
        self.netns = netns
        self.start(*options)

    def start(self, *options: str) -> None:
        port_file = self.folder / "port"
        port_file.unlink(missing_ok=True)
        with (self.folder / "stderr").open("ab") as stderr:
            self.process = zygote.python(
                [
                    *(str(APPLIANCE), "--listen", f"127.0.0.1:{self.port}"),
                    *("--port-file", str(port_file), "--sources", str(self.sources)),
                    *("--log", str(self.log), *options),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, zygote.NETNS: self.netns} if self.netns else None,
            )
        self.port = until(
            lambda: int(port_file.read_text()) if port_file.exists() else None, "the appliance"
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def misbehave(self, mode: str, times: int | None = None) -> None:
        body = json.dumps({"misbehave": mode, "times": times}).encode()
        request = urllib.request.Request(f"{self.url}/_control", body, method="PUT")
        with urllib.request.urlopen(request, timeout=5) as answer:
            assert answer.status == 200

    def behave(self) -> None:
        self.process.send_signal(signal.SIGUSR1)

    def log_lines(self, event: str) -> list[dict[str, Any]]:
        if not self.log.exists():
            return []
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if line["event"] == event]

    def starts(self) -> list[dict[str, Any]]:
        """Every start that it accepted."""
        return self.log_lines("start")

    def source(self, vm: str, key: int, data: bytes) -> None:
        path = self.sources / vm / f"{key}.raw"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(10)


class Site:
    """A hub with its config, inventory and specs."""

    netns = ""
    """Path of the network namespace that it lives in; empty: that of the tests."""
    real_starts = False
    """Whether each command has an interpreter of its own, in place of a fork of a warm one."""

    def __init__(self, folder: Path, ports: range, api: int = 0) -> None:
        self.folder = folder
        self.ports = ports
        self.api = api
        self.hub = f"hub-{folder.name[-40:]}-{os.getpid()}".replace("_", "-")
        self.config: dict[str, Any] = {
            "hub": self.hub,
            "state": "state",
            "repositories": {"local": {"root": "repository"}},
            "ports": {"range": f"{ports[0]}-{ports[-1]}"},
            "qemu_nbd": {"start_timeout": "10s", "stop_grace": "3s"},
            "snas": {},
            "vcenters": {
                "vc1": {"host": "vc.example", "user": "backup", "password": {"file": "password"}}
            },
        }
        if api:
            self.config["api"] = {"listen": f"127.0.0.1:{api}"}
        (folder / "password").write_text(PASSWORD + "\n")
        self.specs = folder / "specs"
        self.specs.mkdir()
        self.write_config()
        self.others: list[subprocess.Popen[bytes]] = []

    # -- writing

    def write_config(self, **changes: Any) -> None:
        self.config.update(changes)
        lines = [f"{key}: {json.dumps(value)}\n" for key, value in self.config.items()]
        (self.folder / "reconciler.yaml").write_text("".join(lines))

    def dump(self, path: Path, value: object) -> None:
        path.write_text(json.dumps(value, indent=1))  # JSON is YAML

    def appliance_at(self, url: str, **changes: Any) -> None:
        sna = {"url": url, "timeout": "2s", "connect_timeout": "1s", "poll": "100ms",
               "max_running": 500, **changes}  # fmt: skip
        self.write_config(snas={"site-a": sna})

    def inventory(self, vms: Mapping[str, Mapping[int, int]]) -> None:
        """VM → disk key → size in bytes."""
        value = {
            name: {
                "vm": {"name": name, "path": f"/DC/vm/{name}", "vcenter": "vc1"},
                "disks": [{"key": key, "size": size} for key, size in disks.items()],
            }
            for name, disks in vms.items()
        }
        self.dump(self.folder / "inventory.yaml", {"vms": value})
        self.write_config(inventory={"file": "inventory.yaml"})

    def vm(self, name: str, sizes: Sequence[int] = (1 << 20,), **changes: Any) -> dict[str, Any]:
        """A backup of a VM with disks 2000, 2001 …"""
        value: dict[str, Any] = {
            "name": name,
            "state": "exported",
            "vm": {"path": f"/DC/vm/{name}", "vcenter": "vc1"},
            "disks": [{"key": 2000 + i, "size": size} for i, size in enumerate(sizes)],
            "backup": {"run": "r1"},
        }
        value.update(changes)
        return value

    def spec(self, *vms: Mapping[str, Any], file: str = "vms.yaml") -> Path:
        path = self.specs / file
        self.dump(path, {"vms": list(vms)})
        return path

    def image(self, vm: str, key: int = 2000, run: str = "r1") -> Path:
        return self.folder / "repository" / vm / str(key) / f"{run}.qcow2"

    # -- running

    def start(
        self, *arguments: str, module: Sequence[str] = ("reconciler",), **extra: str
    ) -> subprocess.Popen[str]:
        """One command in a process of its own; `module`: what runs it, and that one's options."""
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RECONCILER_")},
            "HOME": str(self.folder),
            **({zygote.NETNS: self.netns} if self.netns else {}),
            **extra,
        }
        return zygote.python(
            ["-m", *module, *arguments],
            real=self.real_starts,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments: str, code: int | None = 0, **extra: str) -> str:
        """stdout and stderr of one command that must end with `code` (None: with any)."""
        process = self.start(*arguments, **extra)
        out, err = process.communicate(timeout=120)
        text = out + err
        assert PASSWORD not in text
        assert "Traceback" not in text, text
        if code is not None:
            assert process.returncode == code, f"{process.returncode}, not {code}:\n{text}"
        return text

    def json(self, *arguments: str, code: int | None = 0) -> Any:
        process = self.start(*arguments, "-o", "json")
        out, err = process.communicate(timeout=120)
        if code is not None:
            assert process.returncode == code, f"{process.returncode}, not {code}:\n{out}{err}"
        return json.loads(out)

    def apply(self, *arguments: str, code: int | None = 0) -> str:
        return self.run("apply", "-y", *arguments, code=code)

    def changes(self, *arguments: str, code: int | None = 0) -> list[tuple[str, str | None, str]]:
        """(VM, disk, action) of the plan."""
        found = self.json("plan", *arguments, code=code)["changes"]
        return [(one["vm"], one["disk"], one["action"]) for one in found]

    def status(self) -> dict[str, dict[str, Any]]:
        """VM → its status."""
        return {vm["name"]: vm for vm in self.json("status")["vms"]}

    def condition(self, vm: str, kind: str) -> tuple[str, str, str]:
        found = next(c for c in self.status()[vm]["conditions"] if c["type"] == kind)
        return found["status"], found["reason"], found["message"]

    def reported(self, vm: str, run: str = "r1") -> None:
        """As if the client of an appliance that tells the hub nothing had told it change ids."""
        ledger = read(self.folder / "state")
        call = ledger.latest(vm, run) if ledger else None
        assert call is not None
        with closing(sqlite3.connect(self.folder / "state" / NAME, timeout=20)) as db, db:
            db.executemany(
                "INSERT INTO reports (job_id, position, change_id, bytes, at) "
                "VALUES (?, ?, ?, ?, ?)",
                [(call.job_id, e.position, f"{run}/{e.key}", 0, 1.0) for e in call.exports],
            )

    # -- what is really there

    def servers(self) -> dict[Identity, Mark]:
        """The servers of this hub, by their marks."""
        found = {}
        for process in proc.processes():
            served = parse(process.argv)
            if served and served.mark and served.mark.hub == self.hub:
                found[process.identity] = served.mark
        return found

    def pids(self) -> dict[tuple[str, int], int]:
        """(VM, disk key) → pid."""
        return {(mark.vm, mark.disk): one.pid for one, mark in self.servers().items()}

    def listening(self) -> set[int]:
        """Ports of the range that anybody listens on."""
        return {s.port for s in proc.tcp_sockets() if s.listening and s.port in self.ports}

    def kill(self, pid: int) -> None:
        """SIGKILL, and wait until it and its sockets are gone."""
        fd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            assert select.select([fd], [], [], 20)[0], f"pid {pid} does not end"
        finally:
            os.close(fd)

    def other(self, *argv: str) -> subprocess.Popen[bytes]:
        """A process that is not the reconciler's."""
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.others.append(process)
        return process

    def clean_up(self) -> None:
        for process in self.others:
            process.kill()
            process.wait(10)
        for identity in self.servers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(identity.pid, signal.SIGKILL)
        until(lambda: not self.servers(), "the end of every server of the test")
