#!/usr/bin/env python3
"""What the daemon costs: a heal against a bare start, an idle minute, a saved file.

python bench/daemon.py [--disks 100] [--kills 100] [--idle 60] [--cycles 0] [--json FILE]

Every heal is measured right after a bare start of the same command with its handshake, so that what
else loads the machine loads both. README.md says how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.clients import free_ports  # noqa: E402
from bench.figures import FLOOR, TOOL, Measured, Rounds, Tell  # noqa: E402
from bench.workplace import BenchError, memory_of, until  # noqa: E402
from reconciler.core.mark import ENTER, parse  # noqa: E402
from reconciler.host import nbd, proc  # noqa: E402

HUB: Final = f"bench-daemon-{os.getpid()}"
SIZE: Final = 64 << 20
DEADLINE: Final = 60.0
MINUTES: Final = 3
"""Idle ones of a whole bench, at most."""
BETWEEN: Final = 0.2
"""Seconds between two kills, so that each is healed alone."""


class Hub:
    """A hub of one-disk VMs in its own directory, an appliance that accepts all, and a daemon."""

    def __init__(self, folder: Path, disks: int) -> None:
        self.folder, self.disks = folder, disks
        self.ports = free_ports(disks + 12).start
        command = [sys.executable, str(HERE / "appliance.py")]
        self.appliance = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.appliance.stdout
        url = f"http://127.0.0.1:{int(self.appliance.stdout.readline())}"
        (folder / "password").write_text("x\n")
        self.specs = folder / "specs"
        self.specs.mkdir()
        config = {
            "hub": HUB,
            "state": "state",
            "repositories": {"local": {"root": "repository", "min_free": "1MiB"}},
            "ports": {"range": f"{self.ports + 1}-{self.ports + disks + 11}"},
            "api": {"listen": f"127.0.0.1:{self.ports}"},
            "snas": {"site-a": {"url": url, "max_running": 10_000}},
            "vcenters": {"vc1": {"host": "h", "user": "u", "password": {"file": "password"}}},
            "loop": {"healthy_after": "100ms"},
        }
        (folder / "reconciler.yaml").write_text(json.dumps(config))
        for number in range(disks):
            self.save(f"ctx-{number}")
        self.daemon: subprocess.Popen[str] | None = None

    def save(self, vm: str) -> None:
        """A spec of one VM, renamed into its place."""
        value = {
            "name": vm,
            "state": "exported",
            "vm": {"path": f"/DC/{vm}", "vcenter": "vc1"},
            "disks": [{"key": 2000, "size": SIZE}],
            "backup": {"run": "r1"},
        }
        temporary = self.specs / f".{vm}.tmp"
        temporary.write_text(json.dumps({"vms": [value]}))
        temporary.rename(self.specs / f"{vm}.yaml")

    def start(self) -> float:
        """Start a daemon; seconds until it is ready."""
        began = time.monotonic()
        self.daemon = subprocess.Popen(
            [sys.executable, "-m", "reconciler", "watch", "specs"],
            cwd=self.folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        ready = threading.Event()
        threading.Thread(target=self._read, args=(self.daemon, ready), daemon=True).start()
        if not ready.wait(DEADLINE):
            raise BenchError("the daemon is not ready")
        took = time.monotonic() - began
        until(partial(self.has, self.disks), "every server")
        time.sleep(1.0)
        return took

    @staticmethod
    def _read(daemon: subprocess.Popen[str], ready: threading.Event) -> None:
        assert daemon.stderr
        for line in daemon.stderr:
            if '"message": "ready"' in line:
                ready.set()

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.daemon
        self.daemon.send_signal(number)
        return self.daemon.wait(DEADLINE)

    def servers(self) -> dict[int, tuple[proc.Process, int, str]]:
        """pid → process, port, export name."""
        found = {}
        for one in proc.processes():
            served = parse(one.argv)
            if served and served.mark and served.mark.hub == HUB and not served.starting:
                name = one.argv[one.argv.index("--export-name") + 1]
                found[one.identity.pid] = (one, served.mark.port, name)
        return found

    def has(self, count: int) -> bool:
        """Whether so many servers run."""
        return len(self.servers()) == count

    def figures(self) -> dict[str, float]:
        """What the daemon's process has used and has now."""
        assert self.daemon
        pid = self.daemon.pid
        status = Path(f"/proc/{pid}/status").read_text()
        wakes = 0
        for task in os.listdir(f"/proc/{pid}/task"):
            try:
                text = Path(f"/proc/{pid}/task/{task}/status").read_text()
            except OSError:
                continue  # it has ended
            wakes += int(re.search(r"\nvoluntary_ctxt_switches:\s+(\d+)", text)[1])  # type: ignore[index]
        return {
            # The kernel's clock of the process, to the nanosecond, threads that ended included.
            "cpu": time.clock_gettime((~pid << 3) | 2),
            "pss_mib": memory_of([pid]),
            "rss_mib": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024,  # type: ignore[index]
            "wakes": wakes,
            "fds": len(os.listdir(f"/proc/{pid}/fd")),
        }

    def close(self) -> None:
        if self.daemon and self.daemon.poll() is None:
            self.stop()
        for pid in self.servers():
            os.kill(pid, signal.SIGKILL)
        assert self.appliance.stdin
        self.appliance.stdin.close()
        self.appliance.wait(DEADLINE)


def answers(port: int, name: str) -> bool:
    return nbd.handshake([nbd.Target("127.0.0.1", port, name)], 10.0)[0].answered


def bare(process: proc.Process, name: str, image: Path) -> float:
    """Seconds of a bare start of a server's own command on a socket, until its handshake."""
    # Not under our mark: the daemon would take it for a second server of the disk.
    argv = [*(word.replace(HUB, "bare") for word in process.argv[:-1]), str(image)]
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
        began = time.perf_counter()
        pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", ENTER, *argv],
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, listener.fileno(), 3)],
            setsid=True,
        )
        answered = answers(listener.getsockname()[1], name)
        took = time.perf_counter() - began
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not answered:
        raise BenchError("a bare server does not answer")
    return took


def heals(hub: Hub, kills: int, image: Path) -> dict[str, Any]:
    """Kill servers one by one; from the kill to the next one's answer, beside a bare start."""
    healed, started = [], []
    victims = sorted(hub.servers().items())
    random.Random(1).shuffle(victims)
    # Each once: one that dies again and again is left down for a while, which is not the question.
    for pid, (process, port, name) in victims[:kills]:
        started.append(bare(process, name, image))
        began = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        while not answers(port, name) or proc.identify(pid) == process.identity:
            pass
        healed.append(time.perf_counter() - began)
        time.sleep(BETWEEN)
    found = {"heal_ms": spread(healed), "bare_ms": spread(started)}
    ratio = found["heal_ms"]["median"] / found["bare_ms"]["median"]
    return {**found, "ratio": round(ratio, 2), "kills": len(healed)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p99, least and most, in milliseconds."""
    ordered = sorted(1000 * value for value in values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    found = {
        "median": statistics.median(ordered),
        "p99": p99,
        "min": ordered[0],
        "max": ordered[-1],
    }
    return {key: round(value, 1) for key, value in found.items()}


def idle(hub: Hub, seconds: float) -> dict[str, float]:
    """What a minute costs in which nothing happens."""
    before = hub.figures()
    time.sleep(seconds)
    after = hub.figures()
    minute = 60 / seconds
    return {
        "cpu_s_per_min": round((after["cpu"] - before["cpu"]) * minute, 3),
        "wakes_per_min": round((after["wakes"] - before["wakes"]) * minute),
        "rss_mib": round(after["rss_mib"], 1),
        "pss_mib": round(after["pss_mib"], 1),
        "fds": after["fds"],
    }


def saves(hub: Hub, count: int) -> dict[str, float]:
    """From the rename of a new VM's file until its image is begun."""
    took = []
    for number in range(count):
        vm = f"new-{number}"
        image = hub.folder / "repository" / vm
        began = time.perf_counter()
        hub.save(vm)
        while not image.exists():
            time.sleep(0.0005)
        took.append(time.perf_counter() - began)
        until(partial(hub.has, hub.disks + number + 1), "its server")
        time.sleep(0.3)
    hub.disks += count
    return spread(took)


def cycles(hub: Hub, count: int) -> dict[str, Any]:
    """Many heals, and what the daemon has more of after them."""
    before = hub.figures()
    victims: list[tuple[int, tuple[proc.Process, int, str]]] = []
    for _ in range(count):
        victims = victims or sorted(hub.servers().items())
        pid, (process, port, name) = victims.pop()
        os.kill(pid, signal.SIGKILL)
        while not answers(port, name) or proc.identify(pid) == process.identity:
            pass
    time.sleep(2.0)
    after = hub.figures()
    keys = ("rss_mib", "fds")
    return {"cycles": count, **{k: [round(before[k], 1), round(after[k], 1)] for k in keys}}


@contextlib.contextmanager
def site(disks: int) -> Iterator[tuple[Hub, Path]]:
    """A hub, and an image for bare starts; gone afterwards with all that it started."""
    folder = Path(tempfile.mkdtemp(prefix="bench-daemon-"))
    image = folder / "bare.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    hub = Hub(folder, disks)
    try:
        yield hub, image
    finally:
        hub.close()
        shutil.rmtree(folder)


def measure(runs: int, quick: bool, tell: Tell) -> Measured:
    """Heals of servers that the daemon started, each beside a bare start, a round being the median
    of so many kills; then some idle minutes, one after the other. `quick`: small and short."""
    disks, kills, seconds = (10, 5, 3.0) if quick else (100, 60, 60.0)
    found = Rounds("daemon")
    for number in range(runs):
        with site(disks) as (hub, image):
            hub.start()
            tell(f"daemon: {kills} heals, round {number + 1} of {runs}")
            took = heals(hub, kills, image)
            bare_ms, heal_ms = took["bare_ms"]["median"], took["heal_ms"]["median"]
            found.add("heal", FLOOR, bare_ms, unit="ms")
            found.add("heal", TOOL, heal_ms, bare_ms, unit="ms")
            for minute in range(min(runs, MINUTES) if number == runs - 1 else 0):
                tell(f"daemon: idle with {disks} accepted runs, {minute + 1}")
                rest = idle(hub, seconds)
                found.add("idle", TOOL, rest["cpu_s_per_min"], unit="CPU s/min")
                found.add("idle, memory", TOOL, rest["pss_mib"], unit="MiB")
    return found.measured()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disks", type=int, default=100)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--idle", type=float, default=60.0)
    parser.add_argument("--saves", type=int, default=9)
    parser.add_argument("--cycles", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"disks": options.disks}
    with site(options.disks) as (hub, image):
        found["first_ready_s"] = round(hub.start(), 2)
        found["own"] = heals(hub, options.kills, image)
        if options.cycles:
            found["growth"] = cycles(hub, options.cycles)
        hub.stop(signal.SIGKILL)
        found["adopting_ready_s"] = round(hub.start(), 2)
        found["adopted"] = heals(hub, options.kills, image)
        hub.stop()
        hub.start()
        if options.idle:
            found["idle"] = idle(hub, options.idle)
        if options.saves:
            found["save_ms"] = saves(hub, min(options.saves, 9))
        found["exit_code"] = hub.stop()
    text = json.dumps(found, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except BenchError as error:
        sys.exit(str(error))
