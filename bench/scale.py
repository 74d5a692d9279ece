"""How cost grows with the number of VMs, and with the number of servers.

python -m bench.scale [--vms 100,1000,10000] [--exported 100] [--servers 2000] [--runs 3]

Plans without servers; a daemon whose directory has so many VMs at rest beside some that are
exported; and one hub with as many servers as asked for, or as memory holds. CPU seconds, of whole
processes and without their children. README.md says how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from bench.clients import free_ports
from bench.figures import TOOL, Curve, Measured, Rounds, Series, Tell, table, write
from bench.workplace import (
    DEADLINE,
    BenchError,
    end,
    machine,
    memory_of,
    reconciler,
    told,
    workplace,
)
from reconciler.core.mark import parse
from reconciler.host import nbd, proc

HERE: Final = Path(__file__).resolve().parent
DISKS: Final = 3
"""Of each VM that is planned."""
SPEC: Final = """\
vars:
  night: "{{ run | default('nightly-2026-11-26') }}"
  tier: "{{ 'gold' if 'gold' in group_names else 'silver' }}"
defaults:
  disks: inventory
  repository: local
  backup: {run: "{{ night }}", type: full}
  labels: {tier: "{{ tier }}", site: "{{ site | default('a') }}"}
vms:
  - loop: "{{ inventory | list }}"
    name: "{{ item }}"
    when: item is match('ctx-')
"""
CONFIG: Final = """\
hub: bench
state: state
inventory: {file: inventory.yaml}
repositories: {local: {root: repository, min_free: 0}}
ports: {range: 1024-65535}
snas: {a: {url: "http://127.0.0.1:1", max_running: 100000}}
vcenters: {v: {host: v, user: u, password: {file: password}}}
"""
LEFT: Final = 4 << 30
"""Bytes of memory that stay free, however many servers are asked for."""
STILL: Final = 0.4
"""Seconds without CPU time after which what was begun is over."""
PASS: Final = 4
"""Seconds between two passes of the daemon, where they are what is measured."""


# -- plans


def site(folder: Path, vms: int, *, loop: bool) -> None:
    """A directory in which `reconciler plan` plans so many VMs: by one loop, or a file each."""
    specs = folder / "specs"
    (specs / "group_vars").mkdir(parents=True)
    if loop:
        (specs / "site.yaml").write_text(SPEC)
        (specs / "group_vars" / "gold.yaml").write_text("site: b\n")
    for n in range(0 if loop else vms):
        backup = "disks: inventory, backup: {run: nightly-2026-11-26}"
        (specs / f"ctx-{n}.yaml").write_text(f"vms:\n  - {{name: ctx-{n}, {backup}}}\n")
    (folder / "reconciler.yaml").write_text(CONFIG)
    (folder / "password").write_text("x")
    disks = ", ".join(f"{{key: {2000 + n}, size: 1MiB}}" for n in range(DISKS))
    lines = ["groups: {gold: ['ctx-*7'], db: ['ctx-1*']}", "vms:"]
    for n in range(vms):
        lines += [f"  ctx-{n}:", f"    vm: {{name: vm{n}, path: /DC1/vm/vm{n}}}"]
        lines += [f"    disks: [{disks}]"]
    (folder / "inventory.yaml").write_text("\n".join(lines) + "\n")


def spent(command: Sequence[str], folder: Path) -> tuple[float, float]:
    """CPU seconds and MiB of a command. Raises BenchError."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE)
    assert process.stdout is not None
    printed = process.stdout.read().decode()
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchError(f"exit {process.returncode} from {command}\n{printed[-500:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def plans(vms: Sequence[int], runs: int, tell: Tell) -> Measured:
    """`plan` and `validate` of so many VMs; runs interleaved."""
    found = Measured()
    lines: dict[str, list[tuple[float, float]]] = {}
    beyond: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        cases = {
            (kind, many): Path(name) / f"{kind}{many}"
            for many in (1, *vms)
            for kind in ("a loop", "files")
        }
        for (kind, many), folder in cases.items():
            site(folder, many, loop=kind == "a loop")
        spent([reconciler(), "plan"], next(iter(cases.values())))  # what is compiled stays so
        taken: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
        for number in range(runs):
            tell(f"plans: round {number + 1} of {runs}")
            for (kind, many), folder in cases.items():
                for command in ("validate", "plan"):
                    one = spent([reconciler(), command], folder)
                    taken.setdefault((kind, many, command), []).append(one)
        for many in vms:
            rounds = Rounds(f"{many} VMs planned")
            for (kind, count, command), values in taken.items():
                if count != many:
                    continue
                for cpu, mib in values:
                    rounds.add(f"{command}, {kind}, CPU", TOOL, cpu, unit="CPU s")
                    rounds.add(f"{command}, {kind}, memory", TOOL, mib, unit="MiB")
                cpu = statistics.median(one for one, _ in values)
                start = statistics.median(one for one, _ in taken[kind, 1, command])
                lines.setdefault(f"{command}, {kind}", []).append((many, cpu))
                beyond.setdefault(f"{command}, {kind}", []).append((many, cpu - start))
            found += rounds.measured()
    curves = [
        Curve(name, title, "VMs", "CPU s", [Series(who, points) for who, points in some.items()])
        for name, title, some in (
            ("plan", "Planning: the whole command", lines),
            ("plan-beyond-start", "Planning: beyond a plan of one VM", beyond),
        )
    ]
    return found + Measured(curves=curves)


# -- a daemon


class Hub:
    """A hub of one-disk VMs in a directory of its own, with a daemon and an appliance."""

    def __init__(self, folder: Path, exported: int, resting: int, *, loop: bool = False) -> None:
        self.folder, self.exported = folder, exported
        self.hub = f"bench-scale-{os.getpid()}-{folder.name}"
        self.specs = folder / "specs"
        self.specs.mkdir(parents=True)
        command = [sys.executable, str(HERE / "appliance.py")]
        self.appliance = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.appliance.stdout
        self.url = f"http://127.0.0.1:{int(self.appliance.stdout.readline())}"
        self.ports = free_ports(exported + 12).start
        (folder / "password").write_text("x\n")
        self.configure("1h")
        for number in range(exported):
            self.export(f"ctx-{number}")
        if loop:
            self.loop(resting)
        for number in range(0 if loop else resting):
            self.rest(f"rest-{number}")
        self.daemon: subprocess.Popen[str] | None = None

    def configure(self, resync: str) -> None:
        config = {
            "hub": self.hub,
            "state": "state",
            "repositories": {"local": {"root": "repository", "min_free": "1MiB"}},
            "ports": {"range": f"{self.ports + 1}-{self.ports + self.exported + 11}"},
            "api": {"listen": f"127.0.0.1:{self.ports}"},
            "snas": {"site-a": {"url": self.url, "max_running": 10_000}},
            "vcenters": {"vc1": {"host": "h", "user": "u", "password": {"file": "password"}}},
            "loop": {"healthy_after": "100ms", "resync": resync},
        }
        (self.folder / "reconciler.yaml").write_text(json.dumps(config))

    def save(self, file: str, text: str) -> None:
        """A file, renamed into its place."""
        temporary = self.specs / f".{file}.tmp"
        temporary.write_text(text)
        temporary.rename(self.specs / f"{file}.yaml")

    def export(self, vm: str) -> None:
        value = {
            "name": vm,
            "state": "exported",
            "vm": {"path": f"/DC/{vm}", "vcenter": "vc1"},
            "disks": [{"key": 2000, "size": 64 << 20}],
            "backup": {"run": "r1"},
        }
        self.save(vm, json.dumps({"vms": [value]}))

    def rest(self, vm: str, *, protect: bool = False) -> None:
        told = "true" if protect else "false"
        self.save(vm, f"vms:\n  - name: {vm}\n    state: absent\n    protect: {told}\n")

    def loop(self, vms: int, *, odd: bool = False) -> None:
        """One file for all that rest; `odd`: one of them is to be protected."""
        odds = "- {name: odd, state: absent, protect: true}" if odd else ""
        loop = f"loop: '{{{{ range({vms}) | list }}}}', name: 'big-{{{{ item }}}}', state: absent"
        self.save("big", f"vms:\n  - {{{loop}}}\n  {odds}\n")

    def start(self) -> float:
        """Start a daemon; CPU seconds until it is ready and still. Raises BenchError."""
        self.daemon = subprocess.Popen(
            [reconciler(), "watch", "specs"], cwd=self.folder, stderr=subprocess.PIPE, text=True
        )
        ready, said = threading.Event(), list[str]()

        def read(daemon: subprocess.Popen[str]) -> None:
            assert daemon.stderr
            for line in daemon.stderr:
                said.append(line)
                if '"message": "ready"' in line:
                    ready.set()

        threading.Thread(target=read, args=(self.daemon,), daemon=True).start()
        limit = time.monotonic() + 10 * DEADLINE
        while not ready.wait(0.05):
            if time.monotonic() > limit or self.daemon.poll() is not None:
                raise BenchError("the daemon is not ready:\n" + "".join(said[-20:]))
        while len(self.servers()) < self.exported:
            time.sleep(0.1)
        return self.still(1.5)

    def stop(self) -> None:
        assert self.daemon
        self.daemon.send_signal(signal.SIGTERM)
        self.daemon.wait(DEADLINE)

    def cpu(self) -> float:
        """CPU seconds of the daemon so far, also of its threads that have ended."""
        assert self.daemon
        # The clock of another process. Source: clock_getcpuclockid(3), linux/posix-timers.h.
        return time.clock_gettime((~self.daemon.pid << 3) | 2)

    def still(self, seconds: float = STILL) -> float:
        """Wait until the daemon does nothing; CPU seconds so far."""
        last, since = self.cpu(), time.monotonic()
        while time.monotonic() - since < seconds:
            time.sleep(0.05)
            if (now := self.cpu()) - last > 0.002:
                last, since = now, time.monotonic()
        return self.cpu()

    def costs(self, do: Callable[[], object]) -> float:
        """CPU milliseconds of the daemon for something that happens."""
        before = self.still()
        do()
        time.sleep(0.1)
        return (self.still() - before) * 1000

    def servers(self) -> dict[int, tuple[proc.Process, int, str]]:
        """pid → process, port, export name."""
        found = {}
        for one in proc.processes():
            served = parse(one.argv)
            if served and served.mark and served.mark.hub == self.hub and not served.starting:
                name = one.argv[one.argv.index("--export-name") + 1]
                found[one.identity.pid] = (one, served.mark.port, name)
        return found

    def kill(self, pid: int, port: int, name: str) -> None:
        """One server; until the next answers."""
        process = proc.identify(pid)
        os.kill(pid, signal.SIGKILL)
        target = nbd.Target("127.0.0.1", port, name)
        limit = time.monotonic() + DEADLINE
        while proc.identify(pid) == process or not nbd.handshake([target], 10.0)[0].answered:
            if time.monotonic() > limit:
                raise BenchError(f"the server on port {port} does not come back")

    def memory(self) -> float:
        """MiB of the daemon."""
        assert self.daemon
        return memory_of([self.daemon.pid])

    def close(self) -> None:
        if self.daemon and self.daemon.poll() is None:
            self.stop()
        end(list(self.servers()), signal.SIGKILL)
        assert self.appliance.stdin
        self.appliance.stdin.close()
        self.appliance.wait(DEADLINE)


@contextlib.contextmanager
def hub(exported: int, resting: int, *, loop: bool = False) -> Iterator[Hub]:
    """A hub that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        found = Hub(Path(name), exported, resting, loop=loop)
        try:
            yield found
        finally:
            found.close()


def daemons(vms: Sequence[int], exported: int, runs: int, tell: Tell) -> Measured:
    """What a daemon costs beside so many VMs at rest."""
    found = Measured()
    curves: dict[str, list[tuple[float, float]]] = {}
    times = max(3, runs)
    for resting in vms:
        tell(f"a daemon: {exported} exported, {resting} at rest")
        rounds = Rounds(f"{resting} VMs at rest, {exported} exported")
        with hub(exported, resting) as one:
            rounds.add("first start", TOOL, one.start(), unit="CPU s")
            one.stop()
            rounds.add("start again", TOOL, one.start(), unit="CPU s")
            rounds.add("memory", TOOL, one.memory(), unit="MiB")
            one.costs(partial(one.rest, "rest-0", protect=True))
            for number, (pid, (_, port, name)) in enumerate(sorted(one.servers().items())[:times]):
                took = one.costs(partial(one.kill, pid, port, name))
                rounds.add("heal of one", TOOL, took, unit="CPU ms")
                file = f"rest-{number + 1}"
                took = one.costs(partial(one.rest, file, protect=True))
                rounds.add("a saved file", TOOL, took, unit="CPU ms")
            one.stop()
            one.configure(f"{PASS}s")
            one.start()
            for _ in range(times):
                before = one.cpu()
                time.sleep(2 * PASS)
                rounds.add("a pass", TOOL, (one.cpu() - before) * 500, unit="CPU ms")
        with hub(1, resting, loop=True) as big:
            big.start()
            big.costs(partial(big.rest, "small"))
            for number in range(times):
                took = big.costs(partial(big.rest, "small", protect=not number % 2))
                rounds.add("a small file beside one loop", TOOL, took, unit="CPU ms")
                took = big.costs(partial(big.loop, resting, odd=not number % 2))
                rounds.add("the file with the loop", TOOL, took, unit="CPU ms")
        measured = rounds.measured()
        for figure in measured.figures:
            curves.setdefault(f"{figure.name}|{figure.unit}", []).append((resting, figure.median))
        found += measured
    shown = (
        ("daemon-events", "The daemon: a heal and a saved file, by VMs at rest", "CPU ms",
         ("heal of one", "a saved file", "a small file beside one loop", "the file with the loop")),
        ("daemon-pass", "The daemon: one pass over all, by VMs at rest", "CPU ms", ("a pass",)),
        ("daemon-start", "The daemon: its start, by VMs at rest", "CPU s",
         ("first start", "start again")),
        ("daemon-memory", "The daemon: its memory, by VMs at rest", "MiB", ("memory",)),
    )  # fmt: skip
    return found + Measured(
        curves=[
            Curve(name, title, "VMs", unit, [Series(who, curves[f"{who}|{unit}"]) for who in some])
            for name, title, unit, some in shown
        ]
    )


# -- many servers


def free_memory() -> int:
    """Bytes. Source: proc(5), /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise BenchError("the kernel does not say how much memory is free")


def of_server(pid: int) -> dict[str, float]:
    """What one server has."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    return {
        "PSS": memory_of([pid]),
        "RSS": int(values["VmRSS"].split()[0]) / 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(values["Threads"]),
    }


def many(counts: Sequence[int], runs: int, tell: Tell) -> Measured:
    """One hub with so many servers, as far as memory holds them."""
    found = Measured()
    curves: dict[str, list[tuple[float, float]]] = {}
    each = 16 << 20
    for count in counts:
        if free_memory() - count * each < LEFT:
            rounds = Rounds(f"{count} servers")
            rounds.absent("first start", TOOL, f"{free_memory() >> 20} MiB of memory are free")
            found += rounds.measured()
            continue
        tell(f"one hub with {count} servers")
        rounds = Rounds(f"{count} servers")
        with hub(count, 0) as one:
            before, began = free_memory(), time.monotonic()
            rounds.add("first start", TOOL, one.start(), unit="CPU s")
            rounds.add("until all are up and still", TOOL, time.monotonic() - began)
            each = max(1 << 20, (before - free_memory()) // count)
            rounds.add("memory of the machine, each", TOOL, each / (1 << 20), unit="MiB")
            pids = sorted(one.servers())
            for pid in pids[:: max(1, count // 20)]:
                for what, value in of_server(pid).items():
                    unit = "MiB" if what.endswith("SS") else ""
                    rounds.add(f"one server, {what}", TOOL, value, unit=unit)
            assert one.daemon
            descriptors = len(os.listdir(f"/proc/{one.daemon.pid}/fd"))
            rounds.add("descriptors of the daemon", TOOL, descriptors, unit="")
            rounds.add("memory of the daemon", TOOL, one.memory(), unit="MiB")
            for pid, (_, port, name) in sorted(one.servers().items())[: max(3, runs)]:
                took = one.costs(partial(one.kill, pid, port, name))
                rounds.add("heal of one", TOOL, took, unit="CPU ms")
            for _ in range(runs):
                for command in ("plan", "status"):
                    cpu, _mib = spent([reconciler(), command], one.folder)
                    rounds.add(f"{command}, nothing to do", TOOL, cpu, unit="CPU s")
        measured = rounds.measured()
        for figure in measured.figures:
            curves.setdefault(figure.name, []).append((count, figure.median))
        found += measured
    names = ("plan, nothing to do", "status, nothing to do", "first start")
    series = [Series(who, curves[who]) for who in names if who in curves]
    title = "One hub with many servers"
    return found + Measured(curves=[Curve("servers", title, "servers", "CPU s", series)])


def measure(
    runs: int,
    quick: bool,
    tell: Tell,
    *,
    vms: Sequence[int] = (),
    exported: int = 0,
    counts: Sequence[int] | None = None,
) -> Measured:
    """All of it. `quick`: small, to see that it works. `counts`: of servers."""
    vms = vms or ((10, 100) if quick else (100, 1000, 10_000))
    exported = exported or (5 if quick else 100)
    if counts is None:
        counts = (10,) if quick else (100, 500)
    with workplace():
        found = plans(vms, runs, tell) + daemons(vms, exported, runs, tell)
        return found + many(counts, runs, tell) if counts else found


def numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",") if int(one)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=numbers, default=[100, 1000, 10_000])
    parser.add_argument("--exported", type=int, default=100)
    parser.add_argument("--servers", type=numbers, default=[100, 500], help="0: none")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    facts = machine(Path(tempfile.gettempdir()))
    found = measure(
        options.runs,
        quick=False,
        tell=told,
        vms=options.vms,
        exported=options.exported,
        counts=options.servers,
    )
    if options.json:
        write(options.json, facts, options.runs, found)
    print(table(found))


if __name__ == "__main__":
    main()
