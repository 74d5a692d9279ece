#!/usr/bin/env python3
"""What the reconciler costs, next to the same work without it and with what people would use.

python -m bench.bench [--disks 1,10,100] [--runs 5] [--peers all|none|LIST] [--json FILE] [--quick]

A round does the floor, ours, each peer and the floor again, one after the other, so that what else
loads the machine loads all of them; every figure is also a ratio to the floor of its own round.
README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from bench.clients import Appliance
from bench.figures import FLOOR, TOOL, Figure, Measured, Rounds, table, targets, write
from bench.hubs import APPLY, IMPORT_CLICK, Floor, Site
from bench.peers import Peer, Unavailable
from bench.workplace import (
    HERE,
    BenchError,
    Took,
    carried_out,
    cpu_of,
    cpu_of_ours,
    end,
    machine,
    memory_of,
    reconciler,
    servers,
    timed,
    told,
    workplace,
)

RESULTS: Final = HERE / "results" / "latest.json"
PEERS: Final = ("runit", "pm2", "pyinfra", "supervisord", "ansible", "systemd_run")
"""Modules of bench.peers."""
STARTS: Final = 3
"""A command that only starts up is quick, so each round repeats it this often."""
FEW: Final = 2
"""Rounds of a peer of which one takes more than 20 s."""
IDLE: Final = 10.0
"""Seconds that supervisors are watched while nothing happens."""
COMMANDS: Final = (
    "--help",
    "--version",
    "status",
    "plan --help",
    "apply --help",
    "validate -f spec.yaml",
    "plan -f spec.yaml",
    "doctor --help",
    "watch --help",
)
"""Commands of which the start-up is measured, on a hub to which nothing was applied."""
APPLIED: Final = ("status", "explain vm-000", "events", "history vm-000")
"""The same, once everything is applied."""
PARTS: Final = ("daemon", "scale")
"""Modules that measure more, each by `measure`."""
ROOM: Final = 16.0
"""MiB of free memory that each server is reckoned with, before 500 of them are started."""


# -- rounds with one number of disks


class Round:
    """One round: what each side found, beside the floor of before and after."""

    def __init__(self, site: Site, floor: Floor, found: Rounds) -> None:
        self.site, self.floor, self.found = site, floor, found

    def floor_once(self) -> dict[str, float]:
        """What the floor takes, by the name of the figure."""
        seen: dict[str, float] = {}
        floor = self.floor
        floor.site.fresh()
        seen["cold, with --fork"] = floor.cold(fork=True)
        floor.stop()
        floor.site.fresh()
        spent = cpu_of_ours()
        seen["cold"] = floor.cold(fork=False)
        seen["cold, CPU of servers"] = cpu_of(list(servers()))
        seen["cold, CPU"] = seen["cold, CPU of servers"] + cpu_of_ours() - spent
        seen["heal"] = floor.heal()
        seen["no-op"] = floor.look()
        seen["stop"] = floor.stop()
        floor.site.called_once()
        return seen

    def ours(self) -> dict[str, Took | float]:
        """What the tool takes."""
        site = self.site
        seen: dict[str, Took | float] = {}
        site.fresh()
        site.forget()
        first = site.apply()
        seen["cold, read for the first time"] = self.last_call(first)
        site.verify()
        site.stop()
        site.fresh()
        cold = site.apply()
        seen["cold, to its exit"] = cold
        seen["cold, CPU of servers"] = spent = cpu_of(list(servers()))
        seen["cold, CPU"] = spent + cold.cpu
        seen["cold, to the last call"] = self.last_call(cold)
        pids = site.verify()
        for name, command in (
            ("no-op plan", ("plan", "-f", "spec.yaml")),
            ("no-op", APPLY),
            ("status", ("status",)),
        ):
            seen[name] = site.ours(*command)
        if site.verify() != pids:
            raise BenchError("an apply with nothing to do replaced a server")
        end([pids[site.disks[0].export]], signal.SIGKILL)
        seen["heal"] = site.apply()
        if len(pids.items() - site.verify().items()) != 1:
            raise BenchError("healing one server replaced others")
        seen["stop"] = site.stop()
        return seen

    def last_call(self, took: Took) -> float:
        """Seconds from the begin of a command to the last call at the appliance."""
        return float(self.site.appliance.counted()["last"]) - took.began

    def peer(self, peer: Peer) -> dict[str, float]:
        """What a peer takes. Raises BenchError if it does not do the work."""
        site, seen = self.site, dict[str, float]()
        site.fresh()
        peer.prepare(self.floor)
        seen["cold, to the last call"] = peer.cold(self.floor).wall
        site.called_once()
        pids = set(servers())
        if len(pids) != site.count:
            raise BenchError(f"{peer.name}: {len(pids)} of {site.count} servers run")
        try:
            took = peer.again(self.floor)
        except Unavailable as error:
            self.found.absent("no-op", peer.name, str(error))
        else:
            seen["no-op"] = took.wall
            seen["no-op, CPU"] = took.cpu
        if set(servers()) != pids:
            raise BenchError(f"{peer.name} replaced servers with nothing to do")
        seen["heal"] = peer.heal(self.floor)
        if len(set(servers()) & pids) != site.count - 1:
            raise BenchError(f"{peer.name} replaced others than the one that died")
        site.called_once()
        seen["stop"] = peer.stop(self.floor)
        return seen


def bench_disks(site: Site, runs: int, peers: Sequence[Peer]) -> Measured:
    """Rounds of everybody with one number of disks."""
    found = Rounds(f"{site.count} disks" if site.count > 1 else "1 disk")
    floor = Floor(site, learned(site))
    round_ = Round(site, floor, found)
    working = list(peers)
    for number in range(runs):
        told(f"{site.count} disks: round {number + 1} of {runs}: floor, ours")
        before = round_.floor_once()
        ours = round_.ours()
        theirs: dict[str, dict[str, float]] = {}
        for peer in list(working):
            if peer.slow and number >= FEW:
                continue
            told(f"{site.count} disks: round {number + 1} of {runs}: {peer.name}")
            try:
                theirs[peer.name] = round_.peer(peer)
            except (BenchError, Unavailable) as error:
                told(f"{peer.name}: {error}")
                found.absent("cold, to the last call", peer.name, f"failed: {error}"[:120])
                working.remove(peer)
                end(list(peer.supervisors()), signal.SIGKILL)
                end(list(servers()), signal.SIGKILL)
        after = round_.floor_once()
        noted(found, before, ours, theirs, after)
    for peer in working:
        if peer.supervises:
            idle(peer, floor, found)
    return found.measured()


def noted(
    found: Rounds,
    before: dict[str, float],
    ours: dict[str, Took | float],
    theirs: dict[str, dict[str, float]],
    after: dict[str, float],
) -> None:
    """One round's values, each beside the mean of the floors around it."""
    floor = {name: (before[name] + after[name]) / 2 for name in before}
    for name, value in floor.items():
        title = "cold, to the last call" if name == "cold" else name
        found.add(title, FLOOR, value, unit=unit_of(name))
    below = {
        "cold, to the last call": floor["cold"],
        "cold, to its exit": floor["cold"],
        "cold, read for the first time": floor["cold"],
        "no-op plan": floor["no-op"],
        "status": floor["no-op"],
        **{name: floor[name] for name in ("no-op", "heal", "stop", "cold, CPU")},
        "cold, CPU of servers": floor["cold, CPU of servers"],
    }
    for name, took in ours.items():
        wall = took.wall if isinstance(took, Took) else took
        found.add(name, TOOL, wall, below[name], unit_of(name))
        if name == "cold, to the last call":
            found.add("cold, with --fork", TOOL, wall, floor["cold, with --fork"])
        if isinstance(took, Took) and name in ("no-op", "no-op plan", "status", "heal", "stop"):
            found.add(f"{name}, CPU", TOOL, took.cpu, unit="CPU s")
    for who, seen in theirs.items():
        for name, value in seen.items():
            found.add(name, who, value, below.get(name), unit_of(name))


def unit_of(name: str) -> str:
    return "CPU s" if ", CPU" in name else "s"


def idle(peer: Peer, floor: Floor, found: Rounds) -> None:
    """What a supervisor costs while nothing happens."""
    told(f"{peer.name}: {IDLE:g} s in which nothing happens")
    floor.site.fresh()
    peer.prepare(floor)
    peer.cold(floor)
    pids = peer.supervisors()
    spent = cpu_of(pids)
    time.sleep(IDLE)
    found.add("idle", peer.name, (cpu_of(pids) - spent) * 60 / IDLE, unit="CPU s/min")
    found.add("idle, memory", peer.name, memory_of(pids), unit="MiB")
    peer.stop(floor)


def learned(site: Site) -> dict[str, tuple[str, ...]]:
    """Export name → the argv of its server, from a first round that nobody times."""
    site.fresh()
    site.apply()
    pids = site.verify()
    running = servers()
    site.stop()
    return {export: running[pid] for export, pid in pids.items()}


# -- start-up


def bench_start(site: Site, times: int) -> Measured:
    """Commands that only start up, and `status` with everything applied; each so many times."""
    found = Rounds("start-up")
    site.fresh()
    timed(IMPORT_CLICK, site.root)
    begun = False
    for name, line in (
        *((one, one) for one in COMMANDS),
        *((f"{one}, applied", one) for one in APPLIED),
    ):
        told(f"start-up: {name}")
        if name.endswith(", applied") and not begun:
            site.apply()
            site.verify()
            begun = True
        site.run(*line.split())  # fills the caches; nobody times it
        for _ in range(times):
            below = timed(IMPORT_CLICK, site.root)
            took = site.run(*line.split())
            found.add(name, "import click", below.cpu, unit="CPU s")
            found.add(name, TOOL, took.cpu, below.cpu, unit="CPU s")
    site.stop()
    return found.measured()


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


# -- all of it


def installed(names: Sequence[str], found: Rounds, facts: dict[str, object]) -> list[Peer]:
    """The peers that can be had here; of the others, why not."""
    peers: list[Peer] = []
    versions: dict[str, str] = {}
    for name in names:
        try:
            module = importlib.import_module(f"bench.peers.{name}")
        except ModuleNotFoundError as error:
            raise BenchError(f"there is no peer {name!r}: {', '.join(PEERS)}") from error
        kinds = [
            kind
            for kind in vars(module).values()
            if isinstance(kind, type)
            and issubclass(kind, Peer)
            and kind.__module__ == module.__name__
        ]
        for kind in kinds:
            if "name" not in vars(kind):
                continue
            told(f"{kind.name}: installing what is missing")
            peer = kind()
            try:
                versions[peer.name] = peer.install()
            except Unavailable as error:
                told(f"{peer.name}: {error}")
                found.absent("cold, to the last call", peer.name, f"not here: {error}"[:120])
            else:
                peers.append(peer)
    facts["peers"] = versions
    return peers


def parts(names: Sequence[str], runs: int, *, quick: bool) -> Measured:
    """What the other modules measure."""
    found = Measured()
    for name in names:
        module = importlib.import_module(f"bench.{name}")
        measure: Callable[[int, bool, Callable[[str], None]], Measured] = module.measure
        try:
            found += measure(runs, quick, told)
        except BenchError as error:  # what the others found has taken long
            told(f"{name}: {error}")
            found += Measured([Figure(name, "all of it", TOOL, note=f"failed: {error}"[:120])])
    return found


def room(count: int) -> bool:
    """Whether so many servers have room in memory."""
    text = Path("/proc/meminfo").read_text()
    free = int(text.split("MemAvailable:")[1].split()[0]) / 1024
    return count * ROOM < free / 2


def numbers(text: str) -> list[int]:
    found = [int(word) for word in text.split(",")]
    if not all(1 <= one <= 2000 for one in found):
        raise ValueError
    return found


def words(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--disks", type=numbers, default=[1, 10, 100, 500], help="how many, default 1,10,100,500"
    )
    parser.add_argument("--runs", type=int, default=5, help="rounds, default 5")
    parser.add_argument(
        "--peers",
        default="all",
        help=f"all, none, or some of {','.join(PEERS)}; they run with 100 disks, or the most",
    )
    parser.add_argument(
        "--parts", type=words, default=list(PARTS), help=f"none, or some of {','.join(PARTS)}"
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"default {RESULTS}")
    parser.add_argument("--quick", action="store_true", help="10 disks, 2 rounds, no peers")
    parser.add_argument(
        "--profile", action="store_true", help="no figures: where our CPU time goes"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.disks, options.runs, options.peers = [10], 2, "none"
    options.peers = list(PEERS) if options.peers == "all" else words(options.peers)
    return options


def measured(options: argparse.Namespace, root: Path, facts: dict[str, object]) -> Measured:
    """Everything that was asked for, but the parts."""
    command = reconciler()
    appliance = Appliance()

    def site(count: int, name: str = "site") -> Site:
        return Site(root / f"{name}-{count}", count, command, appliance)

    most = max(options.disks)
    if options.profile:
        profile(site(most))
        return Measured()
    where = 100 if 100 in options.disks else most
    absent = Rounds(f"{where} disks" if where > 1 else "1 disk")
    peers = installed(options.peers, absent, facts)
    times = options.runs if options.quick else options.runs * STARTS
    found = bench_start(site(where, "start"), times)
    for count in options.disks:
        if count > 100 and not room(count):
            told(f"{count} disks: left out, there is not enough memory")
            continue
        runs = options.runs if count <= 100 else min(options.runs, 3)
        found += bench_disks(site(count), runs, peers if count == where else ())
    return found + absent.measured()


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(sys.argv[1:] if arguments is None else arguments)
    return carried_out(lambda: whole(options))


def whole(options: argparse.Namespace) -> int:
    """Everything that was asked for, measured, written and shown. Raises BenchError."""
    with workplace() as root:
        facts = machine(root)
        found = measured(options, root, facts)
    if options.profile:
        return 0
    found += parts(options.parts, options.runs, quick=options.quick)
    facts["load_after"] = os.getloadavg()[0]
    write(options.json, facts, options.runs, found)
    print(" · ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"seconds by the clock where no unit is named; {options.runs} rounds\n")
    print(table(found))
    print()
    for one in targets(found):
        print(f"target: {one}")
    print(f"\nevery value: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
