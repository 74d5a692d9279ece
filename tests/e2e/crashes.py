"""What crash tests share: a command that dies at a point, the way back, and what must be true."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from reconciler.cli.main import cli
from reconciler.core.actions import CHANGES
from reconciler.core.actual import Identity
from reconciler.core.call import Call, CallState
from reconciler.core.ledger import Ledger
from reconciler.core.mark import Mark, parse
from reconciler.host import proc, store
from tests.crashing import Point
from tests.e2e.site import ROOT, Appliance, Site, until

Key = tuple[str, int, str, int]
"""(VM, disk, run, attempt), as marks and leases have it."""
APPLIES: Final = 8
"""Applies that an operator is ready to type; three are enough in the worst case known."""


# -- dying


def begin(site: Site, options: Sequence[str], command: Sequence[str]) -> subprocess.Popen[str]:
    """Start a command that is to die, or to be recorded."""
    module = ("tests.crashing", *options, "--")
    return site.start(*command, module=module, PYTHONPATH=str(ROOT))


def record(site: Site, command: Sequence[str]) -> list[Point]:
    """Run a command to its end; every point that it came by, in order."""
    file = site.folder / "points"
    process = begin(site, ("--record", str(file)), command)
    out, err = process.communicate(timeout=120)
    assert process.returncode >= 0, f"{process.returncode}:\n{out}{err}"
    return [Point.parse(line) for line in file.read_text().splitlines()]


def crash(site: Site, options: Sequence[str], command: Sequence[str]) -> None:
    """Run a command that must die by the SIGKILL that the options ask for."""
    process = begin(site, options, command)
    out, err = process.communicate(timeout=120)
    said = f"{' '.join(options)}: ended with {process.returncode}:\n{out}{err}"
    assert process.returncode == -signal.SIGKILL, said


# -- looking, without the 0.4 s that the start of a command takes


def look(site: Site, *arguments: str) -> str:
    """What a command that only looks says, run in this process."""
    out = io.StringIO()
    config = str(site.folder / "reconciler.yaml")
    with contextlib.redirect_stdout(out):
        cli.main(["--config", config, *arguments], standalone_mode=False)
    return out.getvalue()


def plan(site: Site) -> list[dict[str, Any]]:
    """The actions that are planned."""
    text = look(site, "plan", "-f", str(site.specs), "-o", "json")
    changes: list[dict[str, Any]] = json.loads(text)["changes"]
    return changes


def status(site: Site) -> dict[str, dict[str, Any]]:
    """VM → its status."""
    vms = json.loads(look(site, "status", "-o", "json"))["vms"]
    return {vm["name"]: vm for vm in vms}


def condition(site: Site, vm: str, kind: str) -> tuple[str, str]:
    """(status, reason)."""
    found = next(one for one in status(site)[vm]["conditions"] if one["type"] == kind)
    return found["status"], found["reason"]


def ledger(site: Site) -> Ledger | None:
    return store.read(site.folder / "state")


def calls(site: Site) -> Mapping[str, Call]:
    """VM → its newest call."""
    known = ledger(site)
    ordered = sorted(known.calls if known else (), key=lambda call: (call.created, call.attempt))
    return {call.vm: call for call in ordered}


def starting(site: Site) -> list[int]:
    """The servers that are still the small step before their exec."""
    found = []
    for process in proc.processes():
        served = parse(process.argv)
        mine = served and served.mark and served.mark.hub == site.hub
        if served and mine and served.starting:
            found.append(process.identity.pid)
    return found


def has_lock(site: Site, pid: int) -> bool:
    """Whether that process is the last that has taken the hub's lock."""
    with contextlib.suppress(OSError, ValueError):  # there is none yet; it is being written
        holder = json.loads((site.folder / "state" / "lock").read_text())
        return bool(holder["pid"] == pid)
    return False


def leftovers(site: Site) -> list[Path]:
    """Half-made files in the repository."""
    found = (site.folder / "repository").rglob(".*ing-*")
    return sorted(found)


# -- the way back


def recover(
    site: Site, appliance: Appliance, command: Sequence[str] = ("apply", "-y"), lines: int = APPLIES
) -> None:
    """What an operator types after a crash: the same again, until there is nothing to do.

    Of an unknown call, the operator looks into the appliance's own log, and says what is there.
    """
    for _ in range(lines):
        site.run(*command, code=None)
        settled = True
        for vm, call in calls(site).items():
            assert call.state is not CallState.INTENDED, f"{vm} was left INTENDED by a whole apply"
            if call.state is CallState.UNKNOWN:
                seen = any(one["job_id"] == call.job_id for one in appliance.starts())
                answer = "--accepted" if seen else "--resend"
                site.run("resolve", vm, answer, "--reason", "the appliance's log", "-y")
                settled = False
            elif call.state is CallState.REJECTED:
                site.run("retry", vm)
                settled = False
        if settled and not any(one["action"] in (*CHANGES, "wait") for one in plan(site)):
            return
    raise AssertionError(f"not converged after {lines} times: {plan(site)}")


# -- what must be true


def wanted(site: Site, runs: Mapping[str, tuple[str, Iterable[int]]]) -> set[Key]:
    """VM → (run, disk keys), with the newest attempt that the ledger knows."""
    known = ledger(site)
    assert known is not None
    return {
        (vm, key, run, known.attempt(vm, run)) for vm, (run, keys) in runs.items() for key in keys
    }


def check(site: Site, appliance: Appliance, expected: set[Key], began: Mapping[str, int]) -> None:
    """The world is exactly what was wanted, and every witness of it says the same.

    `began`: run as the targets name it (`ctx-1-r1`) → how often the appliance may have begun it.
    """
    changes = [one for one in plan(site) if one["action"] in CHANGES]
    assert changes == []
    marks = site.servers()
    assert sorted(mark.key for mark in marks.values()) == sorted(expected), "orphans or doubles"
    assert starting(site) == []
    check_ports(site, marks)
    known = ledger(site)
    assert known is not None
    leases = {lease.key: lease.port for lease in known.leases}
    assert leases == {mark.key: mark.port for mark in marks.values()}, "leaked or lost leases"
    assert leftovers(site) == []
    check_status(site, marks)
    check_images(site)
    assert Counter(map(run_of, appliance.starts())) == Counter(began)
    jobs = Counter(start["job_id"] for start in appliance.starts())
    assert set(jobs.values()) <= {1}, jobs


def check_ports(site: Site, marks: Mapping[Identity, Mark]) -> None:
    """Every port of the range that listens is one of ours, and held by its server itself."""
    assert site.listening() == {mark.port for mark in marks.values()}
    holders = {proc.listener_inode(identity.pid): mark.port for identity, mark in marks.items()}
    listening = [s for s in proc.tcp_sockets() if s.listening and s.port in site.ports]
    assert {one.inode: one.port for one in listening} == holders


def check_status(site: Site, marks: Mapping[Identity, Mark]) -> None:
    """`status` says of every server what is so."""
    told = {
        (vm["name"], int(disk["key"])): (disk["pid"], disk["port"], disk["ready"])
        for vm in status(site).values()
        for disk in vm["disks"]
        if disk["pid"] is not None
    }
    assert told == {(mark.vm, mark.disk): (one.pid, mark.port, True) for one, mark in marks.items()}


def check_images(site: Site) -> None:
    """No image is damaged. Leaked clusters (3) are none. Source: qemu-img(1), check."""
    for image in (site.folder / "repository").rglob("*.qcow2"):
        line = ["qemu-img", "check", "-U", "-q", "-f", "qcow2", str(image)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 3), f"{image}: {done.stdout}{done.stderr}"


def run_of(start: Mapping[str, Any]) -> str:
    """`ctx-1-r1`: the VM and the run of an accepted start, whatever its attempt."""
    name = str(start["nbd_targets"]).split(",")[0].rsplit("/", 1)[1]
    return re.sub(r"(-a[0-9]+)?-disk[0-9]+$", "", name)


def same_bytes(source: Path, image: str, kind: str = "qcow2") -> bool:
    """Whether an image, a file or an `nbd://` export (`raw`), holds what a source disk holds."""
    line = ["qemu-img", "compare", "-q", "-f", "raw", "-F", kind, str(source), image]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), f"{image}: {done.stderr}"
    return done.returncode == 0


def copies_ended(appliance: Appliance) -> list[dict[str, Any]]:
    """The ends of every job that the appliance has begun, once they are all there."""

    def all_there() -> list[dict[str, Any]] | None:
        jobs = {one["job_id"] for one in appliance.starts()}
        ends = [one for one in appliance.log_lines("end") if one["job_id"] in jobs]
        return ends if len({one["job_id"] for one in ends}) == len(jobs) else None

    return until(all_there, "the end of every copy", 60.0)
